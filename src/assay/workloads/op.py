"""Any operator: kernels against a reference, each a function of the arguments that a maker gives.

The maker is `make(seed, **sizes)` and returns a tuple; docs/op.md is the guide. Functions are called as they
are: nothing between the clock and the call but gradient mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from assay.contracts import Case, Mark, Option, Probe, Scalar, System, Work
from assay.errors import AssayError, UsageError
from assay.plugins import load_target
from assay.workloads._functions import copies, flatten, given, mapped, overwritten, tensors

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"fp64": ("float64", "complex128"), "fp32": ("float32", "complex64"), "bf16": ("bfloat16", None)}
DTYPES["fp16"] = ("float16", None)
FRESH = 1_000_000  # between the seed of the timed arguments and that of the gate's later ones

Call = Callable[[], tuple[Any, Sequence["Tensor | None"]]]  # -> result, gradients


class OperatorSystem(System, Protocol):
    """What this workload needs of a system: a function, and how its calls are made.

    `change` is applied to the arguments before they are used. A system that `replays` gets its call bound to
    one set of arguments, and is given other values in place.
    """

    function: Callable[..., Any]
    change: Callable[[Any], Any]
    replays: bool

    def bound(self, call: Call) -> Call: ...
    def proof(self) -> Mapping[str, Scalar]: ...


class OpTrial:
    """Calls on one set of arguments, made before from the case's seed."""

    phases: tuple[str, ...] = ()

    def __init__(self, system: OperatorSystem, case: Case) -> None:
        self._system, self._case = system, case
        self._arguments = _arguments(system, case, case.seed)
        call = system.bound(_call(system.function, self._arguments, case))
        self._call = call

        def step(_mark: Mark) -> None:
            call()

        self.step: Callable[[Mark], None] = step

    @property
    def work(self) -> Mapping[str, Work]:
        """What the maker states of its sizes; else the bytes of what must be read and written, once each."""
        return {"step": _work(self._case, self._arguments, self._call)}

    def reset(self) -> None:
        """The function keeps its own state."""

    def outputs(self, seed: int) -> Mapping[str, Tensor]:
        """`output:<path>`, `grad:<path>` of the arguments, and `input:<path>` of those that were changed."""
        fresh = _arguments(self._system, self._case, _gate_seed(self._case, seed))
        if self._case.params["direction"] == "backward":  # the graph that is held keeps the timed values
            return _outcome(fresh, _call(self._system.function, fresh, self._case))
        with given(self._arguments, fresh) as arguments:
            if not self._system.replays:
                return _outcome(arguments, _call(self._system.function, arguments, self._case))
            held = tensors(self._arguments)
            if any(t is not held[path] for path, t in tensors(arguments).items()):
                raise UsageError(
                    "a graph cannot be asked about other inputs",
                    expected="the same shapes from every seed, and memory of its own for every entry",
                    remedy="use params.timing=call",
                )
            return _outcome(arguments, self._call)

    def proof(self) -> Mapping[str, Scalar]:
        """The system's own counters."""
        return self._system.proof()


def _gate_seed(case: Case, stream: int) -> int:
    """The timed arguments before timing, fresh ones after it."""
    return case.seed + FRESH * (stream - 1)


# ---- arguments --------------------------------------------------------------------------------------------


def _maker(place: Scalar) -> Callable[..., Any]:
    if not place:
        raise UsageError(
            "the workload op needs the maker of its arguments",
            expected="--inputs pkg.module:make or path/to/file.py:make",
        )
    return load_target(str(place), "a maker of arguments")


def _parameters(place: Scalar) -> Mapping[str, inspect.Parameter]:
    """The maker's parameters after the seed. Raises UsageError for one that takes no seed."""
    try:
        first, *others = inspect.signature(_maker(place)).parameters.values()
    except ValueError:  # it takes nothing, or is a builtin without a signature
        first, others = None, []
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        raise UsageError(f"the maker '{place}' takes no seed", expected="make(seed, ...)")
    return {p.name: p for p in others if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _arguments(system: OperatorSystem, case: Case, seed: int) -> tuple[Any, ...]:
    """The maker's arguments on the case's device and in its dtype; leaves that require grad where needed."""
    import torch

    place, takes = case.params["inputs"], _parameters(case.params["inputs"])
    given: dict[str, Any] = {name: case.params[name] for name in takes if name in case.params}
    if "device" in takes:
        given["device"] = case.device
    try:
        made = _maker(place)(seed, **given)
    except (AssayError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        said = " ".join(f"{type(e).__name__}: {e}".split())
        raise UsageError(
            f"the maker '{place}' raised {said}", remedy=f"called {_spelled(seed, given)}"
        ) from e
    if not isinstance(made, tuple):
        raise UsageError(
            f"the maker '{place}' did not return the arguments",
            expected="a tuple of them",
            got=type(made).__name__,
        )
    real, complex_ = DTYPES.get(case.dtype, (None, None))
    wanted: dict[bool, Any] = {
        False: real and getattr(torch, real),
        True: complex_ and getattr(torch, complex_),
    }
    grad = case.params["direction"] != "forward"

    def place_one(t: Tensor) -> Tensor:
        dtype = wanted[t.is_complex()] if t.is_floating_point() or t.is_complex() else None
        return t.detach().to(case.device, dtype).requires_grad_(grad and t.requires_grad)

    found: tuple[Any, ...] = system.change(mapped(made, place_one))
    return found


def _spelled(seed: int, given: Mapping[str, Any]) -> str:
    return f"make({', '.join([str(seed), *(f'{k}={v!r}' for k, v in given.items())])})"


# ---- calls ------------------------------------------------------------------------------------------------


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], case: Case) -> Call:
    """What is timed, on these arguments: the function, its backward pass, or both."""
    import torch

    direction, no_grad = case.params["direction"], torch.no_grad
    if direction == "forward":

        def forward() -> tuple[Any, Sequence[Tensor | None]]:
            with no_grad():
                return function(*arguments), ()

        return forward
    leaves = [t for t in tensors(arguments).values() if t.requires_grad]
    if not leaves:
        raise UsageError(
            f"nothing to differentiate: no argument requires grad, and direction is {direction}",
            expected="tensors made with requires_grad=True",
            got=f"those of '{case.params['inputs']}'",
        )
    differentiate = torch.autograd.grad
    cotangents: list[Tensor] = []  # made at the first call

    def backward_of(result: Any, *, again: bool) -> Sequence[Tensor | None]:
        ends = [t for t in tensors(result).values() if t.requires_grad]
        if not cotangents:
            cotangents.extend(_cotangent(end, n) for n, end in enumerate(ends))
        return differentiate(ends, leaves, cotangents, retain_graph=again, allow_unused=True)

    if direction == "both":

        def both() -> tuple[Any, Sequence[Tensor | None]]:
            result = function(*arguments)
            return result, backward_of(result, again=False)

        return both
    held = function(*arguments)

    def backward() -> tuple[Any, Sequence[Tensor | None]]:
        return held, backward_of(held, again=True)

    return backward


def _cotangent(output: Tensor, number: int) -> Tensor:
    """Fixed normal numbers of the output's shape, rounded to bfloat16 so that every dtype holds the same."""
    import torch

    rng = np.random.Generator(np.random.PCG64(number))
    shape = (*output.shape, 2) if output.is_complex() else tuple(output.shape)
    drawn = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).bfloat16().float()
    drawn = torch.view_as_complex(drawn) if output.is_complex() else drawn
    return drawn.to(output.device, output.dtype)


def _outcome(arguments: tuple[Any, ...], call: Call) -> dict[str, Tensor]:
    """One call as the gate compares it."""
    before = copies(arguments)
    result, gradients = call()
    found = flatten(result)
    leaves = [path for path, t in tensors(arguments).items() if t.requires_grad]
    for path, gradient in zip(leaves if gradients else (), gradients, strict=True):
        if gradient is not None:
            found[f"grad:{path}"] = gradient.detach().clone()
    return found | overwritten(arguments, before)


# ---- work -------------------------------------------------------------------------------------------------


def _work(case: Case, arguments: tuple[Any, ...], call: Call) -> Work:
    """By the maker's attribute `work(**sizes)`, a mapping with `bytes`, `flops` or both, where it has one."""
    place = case.params["inputs"]
    stated = getattr(_maker(place), "work", None)
    dtype = next((t.dtype for t in tensors(arguments).values() if t.is_floating_point()), None)
    named = str(dtype).removeprefix("torch.") if dtype else None
    if stated is not None:
        sizes = {n: v for n, v in case.params.items() if n in inspect.signature(stated).parameters}
        found = stated(**sizes)
        moved, flops = found.get("bytes"), found.get("flops")
        return Work(bytes=moved, working_set_bytes=moved, flops=flops, matmul_dtype=named)
    result, gradients = call()
    inputs, outputs = _held_bytes(tensors(arguments).values()), _held_bytes(tensors(result).values())
    # a backward pass reads a cotangent of each output, and needs no output
    per_direction = {"forward": outputs, "backward": outputs, "both": 2 * outputs}
    moved = inputs + per_direction[str(case.params["direction"])]
    moved += _held_bytes(g for g in gradients if g is not None)
    return Work(bytes=float(moved), working_set_bytes=float(moved))


def _held_bytes(found: Any) -> int:
    """Bytes that tensors hold; what an expanded one repeats, and what two of them share, counts once."""
    sizes: dict[int, tuple[int, int]] = {}
    for t in found:
        storage = t.untyped_storage()
        seen, whole = sizes.get(storage.data_ptr(), (0, storage.nbytes()))
        sizes[storage.data_ptr()] = (min(seen + t.numel() * t.element_size(), whole), whole)
    return sum(size for size, _ in sizes.values())


class Op:
    """Every output, and every gradient where the backward pass is asked for, is what the gate compares."""

    summary = "a function of tensors: kernels against a reference, forward, backward or both"
    params: Mapping[str, Option] = {
        "inputs": Option(default="", help="the maker of arguments: pkg.module:make or path/to/file.py:make"),
        "direction": Option(
            default="forward", help="what is timed of the function", choices=("forward", "backward", "both")
        ),
        "cache": Option(
            default="warm",
            help="the last cache level before a call; cold is overwritten",
            choices=("warm", "cold"),
        ),
        "timing": Option(
            default="kernel",
            help="on CUDA: kernels back to back, or calls with the host's launches between them",
            choices=("kernel", "call"),
        ),
    }
    probes: Mapping[str, Probe] = {}
    functions = True

    def sizes(self, given: Mapping[str, Sequence[Scalar]]) -> Mapping[str, Option]:
        """What the makers' signatures name beside the seed and the device, with their defaults."""
        found: dict[str, Option] = {}
        for place in given.get("inputs", [""]):
            for name, parameter in _parameters(place).items():
                default = parameter.default
                if name in self.params:
                    raise UsageError(
                        f"the maker '{place}' has a parameter '{name}', which is the workload's own",
                        remedy="name it otherwise",
                    )
                if default is parameter.empty and name != "device":
                    if not given.get(name):
                        raise UsageError(f"the maker '{place}' needs '{name}'", remedy=f"--set {name}=VALUE")
                    default = given[name][0]
                if isinstance(default, bool | int | float | str) and name != "device":
                    choices = (True, False) if isinstance(default, bool) else ()
                    found[name] = Option(default=default, help=f"of {place}", choices=choices)
        return found

    def check(self, case: Case) -> None:
        """Raise UsageError for a cold cache where there is none to clear, and for autocast."""
        if case.params["cache"] == "cold" and not case.device.startswith("cuda"):
            raise UsageError(
                "cache=cold needs a CUDA device", expected="warm on the CPU", remedy="--device cuda"
            )
        if case.params["cache"] == "cold" and case.params["timing"] == "call":
            raise UsageError("cache=cold times kernels alone", expected="timing=kernel", got="timing=call")
        if case.dtype not in ("as given", *DTYPES):
            raise UsageError(
                f"an operator has no dtype '{case.dtype}'",
                expected="auto (as the maker gives them), fp32 or bf16",
            )

    def smaller(self, case: Case) -> Case | None:  # noqa: ARG002
        """What a size means is the maker's to know."""
        return None

    def prepare(self, system: OperatorSystem, case: Case) -> OpTrial:
        """Make the timed arguments from the case's seed."""
        return OpTrial(system, case)

    def expected(self, system: OperatorSystem, case: Case, seed: int) -> Mapping[str, Tensor]:
        """The reference's own answer."""
        arguments = _arguments(system, case, _gate_seed(case, seed))
        return _outcome(arguments, _call(system.function, arguments, case))


WORKLOAD = Op()

"""The resolvent's diagonal as an operator, by each of its implementations (docs/resolvent.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from assay.contracts import Case, Claim, Option, Options, Variant
from assay.errors import UsageError
from assay.variants._operator import Operator

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VARIANT", "make"]

IMPLEMENTATIONS = ("pcr", "loop", "schur", "triton", "serial")
ROUNDINGS = 16  # of each argument: cyclic reduction rounds what it makes of them once a level
KERNELS = {"triton": "_forward", "serial": "_serial"}  # by the name in diagonal_kernel.py
TELLING = 128  # rows from which on the products of a backward pass tell log depth from a loop


def make(
    seed: int, n: int = 4096, batch: int = 16, data: str = "normal", shared: bool = False
) -> tuple[Tensor, Tensor, Tensor, complex]:
    """a (batch, n), b and c (batch, n-1) or, shared, (n-1,): independent N(0, 1); z = 0.1 + 0.1j.

    `nonnegative` takes the absolute values of b and c, so that no product b c is negative and |G| <= 10.
    Raises UsageError for other data and sizes.
    """
    import torch

    if data not in ("normal", "nonnegative") or n < 1 or batch < 1:
        raise UsageError(
            "no such matrices",
            expected="data=normal or nonnegative, n and batch of 1 or more",
            got=f"data={data}, n={n}, batch={batch}",
        )
    generator = torch.Generator().manual_seed(seed)
    links = (n - 1,) if shared else (batch, n - 1)
    a, b, c = (torch.randn(size, generator=generator) for size in ((batch, n), links, links))
    if data == "nonnegative":
        b, c = b.abs(), c.abs()
    return a.requires_grad_(), b.requires_grad_(), c.requires_grad_(), 0.1 + 0.1j


def _build(case: Case, options: Options) -> Operator:
    function = _function(str(options["implementation"]))
    if options["compile"]:
        from assay.systems.decoder.compiling import compile_call, require_compiler

        require_compiler(case.device)
        function = compile_call(function, "default")
    return Operator(function, replays=bool(options["cuda_graph"]), compiled=bool(options["compile"]))


def _function(implementation: str) -> Callable[..., Any]:
    from assay.systems.resolvent import resolvent_diagonal

    def resolvent(a: Tensor, b: Tensor, c: Tensor, z: complex) -> Tensor:
        return resolvent_diagonal(a, b, c, z, implementation=implementation)  # type: ignore[arg-type]

    return resolvent


def _oracle(case: Case) -> Operator:
    """The recurrence in complex128; at the case's own precision, on arguments that carry ROUNDINGS.

    Near-singular matrices multiply every rounding, and no algorithm in complex64 can know the matrix better
    than its own roundings leave it: so the yardstick grows with the condition of the matrix, and with that
    alone.
    """
    if case.dtype == "fp64":
        return Operator(_function("schur"))
    return Operator(_function("loop"), change=_rounded)


def _rounded(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        up = torch.rand(value.shape, generator=generator).to(value.device) < 0.5
        far = ROUNDINGS * torch.finfo(value.dtype).eps
        changed = value.detach() * (1 + torch.where(up, far, -far)).to(value.dtype)
        return changed.requires_grad_(value.requires_grad)

    return tuple(map(moved, arguments))


def _check(case: Case, options: Options) -> None:
    if not options.get("cuda_graph"):
        return
    if not case.device.startswith("cuda"):
        raise UsageError("cuda_graph=true needs a CUDA device", remedy="--device cuda, or cuda_graph=false")
    if case.params["direction"] == "backward":
        raise UsageError(
            "cuda_graph=true captures a backward pass together with its forward",
            expected="direction forward or both",
            got="backward",
        )


def _claims(case: Case, options: Options) -> Sequence[Claim]:
    """The registered operator ran, and inside it the implementation that was named."""
    implementation, backward = str(options["implementation"]), case.params["direction"] == "backward"
    kernel = implementation in KERNELS
    operator = "assay::resolvent_diagonal" + "_triton" * kernel + "_backward" * backward
    found = [Claim(counter=f"ops.{operator}", comparison=">", value=0, why="the registered operator ran")]
    inside = _kernel(implementation, case) if kernel else _operations(implementation, case)
    found += [replace(c, why=f"implementation={implementation} ran inside it") for c in inside]
    if options["compile"]:
        found += [
            Claim(counter="compiled_graphs", comparison=">", value=0, why="torch.compile made a graph"),
            Claim(counter="graph_breaks", comparison="==", value=0, why="the whole call is in it"),
        ]
    if options["cuda_graph"]:
        why = "the call was replayed as a CUDA graph"
        found.append(Claim(counter="cuda_graph_replays", comparison=">", value=0, why=why, timed=True))
    return found


def _operations(implementation: str, case: Case) -> list[Claim]:
    """Cyclic reduction takes a reciprocal a level and never divides, the recurrence divides twice a row.

    In a backward pass alone they differ by their products. `schur` is `loop` on wider numbers: which of the
    two it was, the error figures show.
    """
    n, log_depth = int(case.params.get("n", 1)), implementation == "pcr"
    if case.params["direction"] != "backward":
        if log_depth:
            levels = math.ceil(math.log2(n))
            return [Claim(counter="ops.aten::reciprocal", comparison=">", value=levels, why="")]
        return [Claim(counter="ops.aten::div", comparison=">=", value=2 * (n - 1), why="")]
    if n < TELLING:
        return []
    return [Claim(counter="ops.aten::mul", comparison="<" if log_depth else ">=", value=n, why="")]


def _kernel(implementation: str, case: Case) -> list[Claim]:
    """A profile on CUDA names the kernel; Triton's interpreter leaves no trace in one."""
    if not case.device.startswith("cuda"):
        return []
    name = "_backward" if case.params["direction"] == "backward" else KERNELS[implementation]
    return [Claim(counter=f"ops.{name}", comparison=">", value=0, why="")]


VARIANT = Variant(
    summary="the resolvent's diagonal of tridiagonal matrices, by several implementations",
    build=_build,
    options={
        "implementation": Option(default="pcr", help="how it is computed", choices=IMPLEMENTATIONS),
        "compile": Option(default=False, help="torch.compile around it", choices=(True, False)),
        "cuda_graph": Option(
            default=False, help="the whole call, captured once and replayed", choices=(True, False)
        ),
    },
    claims=_claims,
    weights="none",
    oracle=_oracle,
    opaque=True,
    workloads=("op",),
    check=_check,
    inputs="assay.variants.resolvent:make",
)

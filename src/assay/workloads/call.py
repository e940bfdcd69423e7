"""Calling a plain function: what `assay.compare` and `assay.measure` do with Python callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from assay.contracts import Case, Mark, Option, Probe, Scalar, System, Work
from assay.workloads._functions import copies, flatten, given, overwritten

if TYPE_CHECKING:
    from torch import Tensor


FRESH = 3  # seeds of inputs that nobody has seen come right after that of the timed ones


class FunctionSystem(System, Protocol):
    """What this workload needs of a system: a function, and inputs by seed as a tuple of arguments."""

    function: Callable[..., Any]
    make_inputs: Callable[[int], tuple[Any, ...]]


class CallTrial:
    """One call of the function. The inputs of the timed calls are made once, before."""

    phases: tuple[str, ...] = ()
    work: Mapping[str, Work] = {}

    def __init__(self, system: FunctionSystem, case: Case) -> None:
        self._system, self._seed = system, case.seed
        function, arguments = system.function, system.make_inputs(case.seed)
        self._arguments = arguments
        self.step: Callable[[Mark], None] = lambda _mark: function(*arguments)

    def reset(self) -> None:
        """The function keeps its own state."""

    def outputs(self, seed: int) -> Mapping[str, Tensor]:
        """`output:<path>` of every tensor that it returns, `input:<path>` of the arguments it changed."""
        fresh = self._system.make_inputs(self._seed if seed == 1 else self._seed + FRESH + seed)
        with given(self._arguments, fresh) as arguments:
            before = copies(arguments)
            return flatten(self._system.function(*arguments)) | overwritten(arguments, before)

    def proof(self) -> Mapping[str, Scalar]:
        """An opaque function claims nothing."""
        return {}


class Call:
    """One call of an opaque function on the inputs that a maker gives for a seed."""

    summary = "one call of a Python function (used by assay.compare and assay.measure)"
    params: Mapping[str, Option] = {}
    probes: Mapping[str, Probe] = {}
    functions = False  # they come as Python objects, and are called with the inputs as they are

    def sizes(self, given: Mapping[str, Sequence[Scalar]]) -> Mapping[str, Option]:  # noqa: ARG002
        """There are none."""
        return {}

    def check(self, case: Case) -> None:
        """Nothing to check before the function runs."""

    def smaller(self, case: Case) -> Case | None:
        """An opaque function has no smaller case."""

    def prepare(self, system: FunctionSystem, case: Case) -> CallTrial:
        """Make the timed inputs from the case's seed."""
        return CallTrial(system, case)

    def expected(self, system: FunctionSystem, case: Case, seed: int) -> Mapping[str, Tensor]:
        """The reference function's own answer."""
        return CallTrial(system, case).outputs(seed)


WORKLOAD = Call()

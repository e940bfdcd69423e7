"""Calling a plain function: what `assay.compare` and `assay.measure` do with Python callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from assay.contracts import Case, Mark, Option, Probe, Scalar, System, Work
from assay.workloads._functions import flatten

if TYPE_CHECKING:
    from torch import Tensor


class FunctionSystem(System, Protocol):
    """What this workload needs of a system: a function, and inputs by seed as a tuple of arguments."""

    function: Callable[..., Any]
    make_inputs: Callable[[int], tuple[Any, ...]]


class CallTrial:
    """One call of the function. The inputs of the timed calls are made once, before."""

    phases: tuple[str, ...] = ()
    work: Mapping[str, Work] = {}

    def __init__(self, system: FunctionSystem, case: Case) -> None:
        self._system = system
        function, arguments = system.function, system.make_inputs(case.seed)
        self.step: Callable[[Mark], None] = lambda _mark: function(*arguments)

    def reset(self) -> None:
        """The function keeps its own state."""

    def outputs(self, seed: int) -> Mapping[str, Tensor]:
        """Every tensor that the function returns, `output:<path>`."""
        return flatten(self._system.function(*self._system.make_inputs(seed)))

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

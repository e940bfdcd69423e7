"""An operator as a system for the workload `op`. Not a plug-in itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from assay.contracts import Scalar
from assay.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["Operator"]

Call = Callable[[], Any]
WARM_UP = 3  # calls before a capture: libraries and autograd allocate in the first ones


class Operator:
    """A function of tensors, called as it is or, where it `replays`, as a CUDA graph of the whole call."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        replays: bool = False,
        compiled: bool = False,
        change: Callable[[Any], Any] | None = None,
    ) -> None:
        self.function, self.replays, self._compiled = function, replays, compiled
        self.change: Callable[[Any], Any] = change or (lambda arguments: arguments)
        self._replayed = 0
        self._operators: dict[str, int] = {}  # of what was captured, which no profile of a replay shows

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to release."""

    def with_inputs(self, change: Callable[[Any], Any]) -> Operator:
        """The same function on changed arguments."""
        return Operator(self.function, replays=self.replays, compiled=self._compiled, change=change)

    def bound(self, call: Call) -> Call:
        """What is timed of a call whose arguments stay the same tensors."""
        return self._captured(call) if self.replays else call

    def proof(self) -> Mapping[str, Scalar]:
        """Replays of the graph and the operators that it captured; what torch.compile did."""
        found: dict[str, Scalar] = dict(self._operators)
        if self.replays:
            found["cuda_graph_replays"] = self._replayed
        if self._compiled:
            from assay.systems.decoder.compiling import compile_proof

            found |= compile_proof()
        return found

    def _captured(self, call: Call) -> Call:
        import torch
        from torch.profiler import ProfilerActivity, profile

        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph: torch.cuda.CUDAGraph = torch.cuda.CUDAGraph()
        try:
            with profile(activities=[ProfilerActivity.CPU]) as seen, torch.cuda.graph(graph):
                results = call()
        except RuntimeError as e:
            raise UsageError("the call cannot be captured as a CUDA graph", got=str(e).splitlines()[0]) from e

        self._operators = {f"ops.{e.key}": e.count for e in seen.key_averages()}

        def replay() -> Any:
            graph.replay()
            self._replayed += 1
            return results

        return replay

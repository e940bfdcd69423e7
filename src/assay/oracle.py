"""The oracle of a case: canonical weights, true answers, and the yardstick of the precision tier.

The first arm's worker makes it once, in a process of its own, and writes it into the run's scratch folder;
every worker that is gated reads it there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from assay import gate, yardstick
from assay.contracts import Case, System, Variant, Workload
from assay.errors import Unavailable, one_line
from assay.measure.record import Figure
from assay.wire import OracleMade, as_failure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STAGES", "OracleMaker", "at", "captured", "load_answers", "probe_figures", "state_path"]

STAGES = {"before": 1, "after": 2}  # input streams of the gate
PARAMETER_DTYPE = {"bf16": "bfloat16", "fp16": "float16"}  # the others keep float32 weights
DOUBLE_ORACLE_PARAMETERS = 5e8  # above, a low-precision case has a float32 oracle
LARGE_ORACLE_BYTES = 1 << 30  # above, the oracle's float64 answers are stored in float32


def at(case: Case, dtype: str) -> Case:
    """The case in another dtype."""
    return msgspec.structs.replace(case, dtype=dtype)


class OracleMaker:
    """Makes the oracle of a case from the first arm's variant; `construct` builds that arm for a case."""

    def __init__(
        self,
        case: Case,
        name: str,
        variant: Variant,
        workload: Workload,
        scratch: Path,
        construct: Callable[[Case], System],
    ) -> None:
        self.case, self.name, self.scratch = case, name, scratch
        self.variant, self.workload, self.construct = variant, workload, construct

    def make(self, budget_flops: float) -> OracleMade:
        """Canonical weights, then the oracle's answers to both stages' inputs, into the scratch folder."""
        with _writers() as pool:
            return self._make(budget_flops, pool)

    def _make(self, budget_flops: float, pool: ThreadPoolExecutor) -> OracleMade:
        written: list[Future[None]] = []
        state = {} if self.variant.opaque else self._canonical_state()
        if not self.variant.opaque:
            written.append(pool.submit(_save, state, state_path(self.scratch, self.case)))
        digest = pool.submit(_state_digest, state)
        unraised = self._unraised()
        above = self.case.dtype if unraised else self._above(state)
        with self._reference(above, state) as oracle:
            case, answers = self._fitting_answers(oracle, self._gate_case(oracle, budget_flops), above)
            not_applicable = [
                f"{f.quantity}: the baseline itself does not pass it, {f.where}"
                for f in probe_figures(self.workload, oracle, at(case, above))
                if not f.passed
            ]
        answered = [
            pool.submit(_save, _compact(tensors), oracle_path(self.scratch, self.case, stage))
            for stage, tensors in answers.items()
        ]
        norms = {stage: gate.gradient_norm(tensors) for stage, tensors in answers.items()}
        wait(answered)  # copies from the device beside a graph's capture by the reference would break that
        reference = self._reference_errors(case, state, answers, norms, alone=bool(unraised))
        for file in written + answered:
            file.result()
        return OracleMade(
            case=case,
            oracle=f"{self.name} itself" if unraised else self._oracle_name(above),
            state=digest.result(),
            reference=reference,
            grad_norms=norms,
            not_applicable=[*not_applicable, unraised]
            if self.workload.functions and unraised
            else not_applicable,
        )

    def _unraised(self) -> str:
        """Why the reference cannot be its own oracle at a higher precision; empty where it can."""
        if not self.variant.opaque or self.variant.oracle is not None:
            return ""
        if not self.workload.functions:
            return "functions are called with the inputs as they are"
        found: dict[str, str] = {}
        try:
            for dtype in ("fp64", self.case.dtype):
                with self._reference(dtype, {}) as function:
                    answers = self.workload.expected(function, at(self.case, dtype), STAGES["before"])
                found[dtype] = yardstick.below_float64(answers)
        except Exception as e:
            if as_failure(e, self.name).status == "out_of_memory":
                raise
            raised, _, said = one_line(e, 200).partition(": ")
            return f"float64 oracle: {self.name} raises {raised} there: {said}"
        if found["fp64"]:
            return f"float64 oracle: {self.name} gives {found['fp64']} there"
        return "" if found[self.case.dtype] else f"float64 oracle: {self.name} is no less precise itself"

    def _oracle_name(self, above: str) -> str:
        if self.variant.oracle is not None:
            return f"reference implementation in {above}"
        return f"{self.name} in {above}"

    def _canonical_state(self) -> dict[str, Tensor]:
        """The first arm's weights, rounded to the case's dtype before anybody sees them."""
        import torch

        dtype = getattr(torch, PARAMETER_DTYPE.get(self.case.dtype, "float32"))
        with _entered(self.construct(at(self.case, "fp32"))) as system:
            return {
                name: t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype, copy=True)
                for name, t in system.state().items()
            }

    def _above(self, state: Mapping[str, Tensor]) -> str:
        """One precision above the case, or two where that is affordable."""
        size = sum(t.numel() for t in state.values())
        return "fp64" if self.case.dtype == "fp32" or size <= DOUBLE_ORACLE_PARAMETERS else "fp32"

    @contextmanager
    def _reference(self, dtype: str, state: Mapping[str, Tensor]) -> Iterator[Any]:
        """The oracle's implementation in a dtype, with the canonical weights."""
        case = at(self.case, dtype)
        system = self.variant.oracle(case) if self.variant.oracle else self.construct(case)
        with _entered(system):
            if state:
                system.load(state)  # type: ignore[attr-defined]  # a system that shares weights has it
            yield system

    def _gate_case(self, oracle: Any, budget_flops: float) -> Case:
        """The case itself where one answer of the oracle fits the budget, else the first smaller one."""
        case = self.case
        while self._flops(oracle, case) > budget_flops:
            smaller = self.workload.smaller(case)
            if smaller is None:
                break
            case = smaller
        return case

    def _fitting_answers(
        self, oracle: Any, case: Case, above: str
    ) -> tuple[Case, dict[str, dict[str, Tensor]]]:
        """The oracle's answers to both stages, on a smaller case while memory does not hold them."""
        while True:
            try:
                found = {stage: self._answers(oracle, at(case, above), stage) for stage in STAGES}
            except Exception as e:
                smaller = self.workload.smaller(case)
                if as_failure(e, self.name).status != "out_of_memory" or smaller is None:
                    raise
                case = smaller
            else:
                return case, found

    @staticmethod
    def _flops(oracle: Any, case: Case) -> float:
        stated = oracle.work(case.workload, case.params) if hasattr(oracle, "work") else {}
        return sum(w.flops or 0.0 for name, w in stated.items() if name != "step")

    def _answers(self, system: Any, case: Case, stage: str) -> dict[str, Tensor]:
        """What the workload asks of the oracle, and before the launches every layer's output."""
        if stage != "before":  # the meaning tier alone names the layer that departs
            return dict(self.workload.expected(system, case, STAGES[stage]))
        with captured(system) as layers:
            found = dict(self.workload.expected(system, case, STAGES[stage]))
        return found | {f"layer:{name}": t for name, t in layers.items()}

    def _reference_errors(
        self,
        case: Case,
        state: Mapping[str, Tensor],
        answers: Mapping[str, Mapping[str, Tensor]],
        norms: Mapping[str, float],
        *,
        alone: bool,
    ) -> dict[str, float]:
        """The reference at the case's own dtype against the oracle: the yardstick of the precision tier.

        A function that is `alone`, its own oracle at its own precision, sets it by its response to rounding.
        """
        if alone:
            return self._own_response(answers)
        errors: dict[str, float] = {}
        with self._reference(self.case.dtype, state) as reference:
            for stage, stream in STAGES.items():
                outputs = self.workload.expected(reference, at(case, self.case.dtype), stream)
                _keep_largest(errors, gate.errors(outputs, answers[stage], norms[stage]))
                if self.variant.opaque:
                    _keep_largest(errors, {n: yardstick.opaque_rounding(t) for n, t in outputs.items()})
        return errors

    def _own_response(self, answers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """An opaque function's response to inputs moved by one unit in the last place."""
        errors: dict[str, float] = {}
        with _entered(self.construct(self.case)) as system:
            for stage, stream in STAGES.items():
                moved = system.with_inputs(yardstick.one_ulp)
                _keep_largest(
                    errors, gate.errors(self.workload.expected(moved, self.case, stream), answers[stage])
                )
        return {
            name: max(e, yardstick.opaque_rounding(answers["before"][name])) for name, e in errors.items()
        }


def probe_figures(workload: Workload, system: Any, case: Case) -> list[Figure]:
    """A figure for each of the workload's probes, tried on a system."""
    return [
        gate.probe_figure(name, *probe.run(system, case), expects_change=probe.expects_change)
        for name, probe in workload.probes.items()
    ]


def state_path(scratch: Path, case: Case) -> Path:
    """Where the canonical weights of a case are."""
    return scratch / f"state-{case.id}.pt"


def oracle_path(scratch: Path, case: Case, stage: str) -> Path:
    """Where the oracle's answers to a stage's inputs are."""
    return scratch / f"oracle-{case.id}-{stage}.pt"


def load_answers(scratch: Path, case: Case, stage: str) -> dict[str, Tensor]:
    """The oracle's answers, mapped from their file into host memory."""
    import torch

    path = oracle_path(scratch, case, stage)
    loaded: dict[str, Tensor] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    return loaded


@contextmanager
def captured(system: Any) -> Iterator[dict[str, Tensor]]:
    """The first output of every layer that the system names, by forward hooks, while inside."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if name not in found and hasattr(value, "detach"):
                found[name] = value.detach().cpu()

        return hook

    layers = system.layers() if hasattr(system, "layers") else {}
    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _entered(system: System) -> Iterator[Any]:
    with system as entered:
        yield entered


def _keep_largest(into: dict[str, float], found: Mapping[str, float]) -> None:
    for name, error in found.items():
        into[name] = max(error, into.get(name, 0.0))


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32 where float64 would be very large. Else where they are: torch.save fetches each."""
    import torch

    tensors = {n: t.detach() for n, t in tensors.items()}
    large = sum(t.numel() * t.element_size() for t in tensors.values()) > LARGE_ORACLE_BYTES
    narrow = {n: t.float().cpu() if large and t.dtype == torch.float64 else t for n, t in tensors.items()}
    return {n: t if t.untyped_storage().nbytes() == t.nbytes else t.cpu() for n, t in narrow.items()}


@contextmanager
def _writers() -> Iterator[ThreadPoolExecutor]:
    """Threads to write files in while the oracle works: gigabytes each, a core each.

    Without checksums, which would take most of the time; torch keeps that choice by thread or by process.
    """
    from torch.serialization import get_crc32_options, set_crc32_options

    kept = get_crc32_options()
    try:
        with ThreadPoolExecutor(initializer=set_crc32_options, initargs=(False,)) as pool:
            yield pool
    finally:
        set_crc32_options(kept)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises Unavailable where the disk has no room for it, of which torch says nothing."""
    import torch

    try:
        torch.save(dict(tensors), path)
    except (OSError, RuntimeError) as e:
        wanted, left = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(path.parent).free
        path.unlink(missing_ok=True)  # what was written of it is in the way of saying so
        if left >= wanted:
            raise
        raise Unavailable(
            f"'{path.parent.parent}' has no room for the {wanted / 2**20:,.0f} MiB of {path.name}",
            "set TMPDIR to a folder on a larger disk",
        ) from e


def _state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes, 12 hex digits; empty where there are no weights."""
    import torch

    if not state:
        return ""
    sha = hashlib.sha256()
    for name, tensor in state.items():
        sha.update(name.encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:12]

"""Cases of one run that differ in length or batch size alone: one table and one line an arm.

Time to first token, time a token and tokens a second are as docs/roofline.md defines them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from assay.measure.record import Case, Record, flat_params
from assay.report.roofline import Point, median
from assay.report.view import ArmView, CaseView

__all__ = ["Sweep", "SweepPoint", "sweeps"]


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One arm in one case. `time_ns` is what the sweep times, `floor_ns` the floor of the same."""

    arm: str
    length: float  # tokens of a row: of the prompt, of the sequence, or in the cache on average
    batch: int
    time_ns: float
    floor_ns: float | None
    tokens: float  # done in that time, over all rows
    point: Point

    @property
    def tokens_per_s(self) -> float:
        """Of the whole batch."""
        return self.tokens / (self.time_ns * 1e-9)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One phase over lengths, batch sizes or both."""

    key: str
    subject: str  # Prefill
    length_name: str  # prompt
    lengths_name: str  # lengths
    time_name: str  # time to first token
    details: str  # what the cases share
    points: tuple[SweepPoint, ...]

    @property
    def title(self) -> str:
        """`Decode over contexts and batch sizes`: what varies."""
        names = ((self.lengths_name, {p.length for p in self.points}), ("batch sizes", self.batches))
        return f"{self.subject} over {' and '.join(name for name, values in names if len(values) > 1)}"

    @property
    def lengths(self) -> tuple[float, ...]:
        """The distinct lengths, ascending."""
        return tuple(sorted({p.length for p in self.points}))

    @property
    def batches(self) -> tuple[int, ...]:
        """The distinct batch sizes, ascending."""
        return tuple(sorted({p.batch for p in self.points}))


@dataclass(frozen=True, kw_only=True)
class _Kind:
    workload: str
    phase: str
    subject: str
    length: str  # the parameters that vary
    batch: str
    length_name: str
    lengths_name: str
    time_name: str


_TRAINED = {
    "phase": "step",
    "length": "seq_length",
    "batch": "batch_size",
    "length_name": "length",
    "lengths_name": "lengths",
    "time_name": "step",
}
_GENERATED = {"workload": "generate", "length": "gen_input_length", "batch": "gen_batch_size"}
_KINDS = (
    _Kind(workload="train", subject="Training", **_TRAINED),
    _Kind(workload="infer", subject="Inference", **_TRAINED),
    _Kind(
        phase="prefill",
        subject="Prefill",
        length_name="prompt",
        lengths_name="lengths",
        time_name="time to first token",
        **_GENERATED,
    ),
    _Kind(
        phase="decode",
        subject="Decode",
        length_name="context",
        lengths_name="contexts",
        time_name="time a token",
        **_GENERATED,
    ),
)


def sweeps(views: Sequence[CaseView]) -> list[Sweep]:
    """Every sweep that the cases make: two or more measured ones that share all but length and batch."""
    found = []
    for kind in _KINDS:
        groups: dict[str, list[CaseView]] = {}
        for view in views:
            if view.case.workload == kind.workload and {kind.length, kind.batch} <= view.case.params.keys():
                groups.setdefault(_shared(view.case, kind), []).append(view)
        for details, group in groups.items():
            points = tuple(sorted(_points(group, kind), key=lambda p: (p.batch, p.length)))
            if len({(p.length, p.batch) for p in points}) > 1:
                found.append(
                    Sweep(
                        key=f"{kind.phase}-{group[0].case.id}",
                        subject=kind.subject,
                        length_name=kind.length_name,
                        lengths_name=kind.lengths_name,
                        time_name=kind.time_name,
                        details=details,
                        points=points,
                    )
                )
    return found


def _shared(case: Case, kind: _Kind) -> str:
    params = {k: v for k, v in case.params.items() if k not in (kind.length, kind.batch)}
    return " · ".join(filter(None, (flat_params(params), case.dtype, case.device, f"seed {case.seed}")))


def _points(group: Sequence[CaseView], kind: _Kind) -> Iterator[SweepPoint]:
    for view in group:
        length, batch = int(view.case.params[kind.length]), int(view.case.params[kind.batch])
        for arm in view.arms:
            point = arm.point(kind.phase)
            if not point.time_ns:
                continue
            if kind.phase == "decode":
                yield _decode(arm, point, length, batch)
                continue
            yield SweepPoint(
                arm=arm.name,
                length=length,
                batch=batch,
                time_ns=point.time_ns,
                floor_ns=point.floor_ns,
                tokens=batch * length,
                point=point,
            )


def _decode(arm: ArmView, point: Point, prompt: int, batch: int) -> SweepPoint:
    """The mean lap of a sample, median over samples, at the mean context: lap k reads prompt + k keys."""
    laps = _laps(arm.measured)
    assert point.time_ns is not None
    mean_ns = median([sum(sample) / laps for r in arm.measured for sample in r.laps_ns.get("decode", ())])
    return SweepPoint(
        arm=arm.name,
        length=prompt + (laps + 1) / 2,
        batch=batch,
        time_ns=mean_ns or point.time_ns / laps,  # with several steps a sample there are no laps
        floor_ns=point.floor_ns / laps if point.floor_ns else None,
        tokens=batch,
        point=point,
    )


def _laps(records: Sequence[Record]) -> int:
    """Decode steps of one generation: all its tokens but the first."""
    return int(records[0].case.params["gen_output_length"]) - 1

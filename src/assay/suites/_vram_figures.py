"""The figures of `vram`: pure functions of one run's entries. Not a plug-in itself.

A figure is a number of this run, or None where the reason says why.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from assay.contracts import Arm, Attempted, Case, Entry, Metric, Record
from assay.measure.record import Status
from assay.measure.verdict import Comparison, compare_records
from assay.suites import _vram_oom as oom
from assay.suites._vram_cases import BASELINE, Asked, policy_of
from assay.suites._vram_oom import Capacity

__all__ = ["Figures", "Reading", "Slowdown"]

H200 = "H200"
PROFILED = 0.1  # a step that was profiled may take so much more or less than those that were timed
OURS = ("offload", "auto")
LONG = ("llama-8b:6", 1, 65536)  # the targets' shape, batch and length
SHORT = ("llama-1b", 4, 2048)  # and one on which offloading cannot hide


@dataclass(frozen=True, kw_only=True)
class Slowdown:
    """Time of a step over the baseline's, with its interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One policy in one case. Sizes are MiB; medians over launches."""

    case: Case
    policy: str
    records: Sequence[Record] = ()
    reason: str = ""
    failed: bool = False
    slowdown: Slowdown | None = None  # None of the baseline, and where there is no ratio

    @property
    def batch(self) -> int:
        return int(self.case.params["batch_size"])

    @property
    def length(self) -> int:
        return int(self.case.params["seq_length"])

    @property
    def step_ms(self) -> float | None:
        """Median of all samples."""
        samples = [ns for r in self.records for ns in r.samples_ns["step"]]
        return statistics.median(samples) * 1e-6 if samples else None

    @property
    def peak_mib(self) -> float | None:
        """Of the device; on the CPU of the process's resident memory."""
        return self._median(lambda r: r.memory.peak_mib if r.memory else None)

    @property
    def after_forward_mib(self) -> float | None:
        """What a step has allocated and holds when its forward is over."""
        return self._median(lambda r: r.timeline.end_mib.get("forward") if r.timeline else None)

    @property
    def step_peak_mib(self) -> float | None:
        """The most that a step has allocated and holds at once."""
        return self._median(lambda r: max(r.timeline.peak_mib.values()) if r.timeline else None)

    @property
    def gradients_mib(self) -> float | None:
        """What is left when backward is over."""
        return self._median(lambda r: r.timeline.end_mib.get("backward") if r.timeline else None)

    @property
    def activation_mib(self) -> float | None:
        """The step's peak without its gradients. Weights and inputs were there before it."""
        peak, gradients = self.step_peak_mib, self.gradients_mib
        return None if peak is None or gradients is None else max(0.0, peak - gradients)

    @property
    def backward_increment_mib(self) -> float | None:
        """How far backward's peak is above what was held when it began."""
        peak = self._median(lambda r: r.timeline.peak_mib.get("backward") if r.timeline else None)
        begun = self.after_forward_mib
        return None if peak is None or begun is None else peak - begun

    @property
    def exposed_ms(self) -> float | None:
        """Time that compute stood still for copies in one step; where the policy tells."""
        return self.counted("offload_exposed_ms")

    @property
    def target_share(self) -> float | None:
        """Of the activation peak, that `auto` was to keep."""
        return _number(self.records[0].arm.options.get("target_share")) if self.records else None

    def counted(self, name: str) -> float | None:
        """A counter, the median of all launches."""
        return self._median(lambda r: _number(r.proof.get(name)))

    def proof(self, name: str) -> float | None:
        """A counter, the largest of all launches."""
        found = [n for r in self.records if (n := _number(r.proof.get(name))) is not None]
        return max(found, default=None)

    def _median(self, of: Callable[[Record], float | None]) -> float | None:
        found = [value for r in self.records if (value := of(r)) is not None]
        return statistics.median(found) if found else None


class Figures:
    """What the entries of one run say of every policy in every case."""

    def __init__(
        self, entries: Sequence[Entry], asked: Asked, launches: int, attempts: Sequence[Attempted] = ()
    ) -> None:
        self.entries, self.asked, self.launches = entries, asked, launches
        self.attempts = attempts

    @property
    def cases(self) -> Sequence[Case]:
        """Those asked for; of mode oom the one that its plan chose."""
        return [e.case for e in self.entries] if self.asked.mode == "oom" else self.asked.cases

    @cached_property
    def capacities(self) -> list[list[Capacity]]:
        """By axis, then by policy; those that the run did not come to the end of say so."""
        return oom.capacities(self.asked, self.attempts) if self.asked.mode == "oom" else []

    @cached_property
    def comparisons(self) -> Sequence[Comparison]:
        """All pairs of the run, one family."""
        records = [r for e in self.entries for r in e.records]
        return compare_records(records, stored=None, asked_launches=self.launches)

    @cached_property
    def readings(self) -> list[Reading]:
        """Every policy in every case, in order."""
        return [self.reading(case, arm) for case in self.cases for arm in self.asked.arms]

    def reading(self, case: Case, arm: Arm) -> Reading:
        """The arm's records in the case: of the first pair that was measured, or of the arm alone."""
        policy = policy_of(arm)
        found = [e for e in self.entries if e.case == case and arm in e.arms]
        records = [r for e in found for r in e.records if r.arm.name == arm.name]
        good = [r for r in records if r.status.measured]
        own = [r for r in records if not (r.status.measured or r.status is Status.PARTNER_FAILED)]
        if good:
            good = [r for r in good if r.other == good[0].other]
            reason = f"launch {own[0].launch}: {own[0].status}: {own[0].reason}" if own else ""
            slowdown = self._slowdown(good[0])
            return Reading(
                case=case, policy=policy, records=good, slowdown=slowdown, reason=reason, failed=bool(own)
            )
        if own:
            reason, lacking = f"{own[0].status}: {own[0].reason}", own[0].status is Status.UNAVAILABLE
            return Reading(case=case, policy=policy, reason=reason, failed=not lacking)
        reason = next((e.reason for e in found if e.reason), "") or ("its baseline failed" if records else "")
        failed = bool(reason) and not any(e.lacking for e in found)
        return Reading(case=case, policy=policy, reason=reason or "not measured in this run", failed=failed)

    def _slowdown(self, record: Record) -> Slowdown | None:
        """Of the other arm of a pair."""
        if record.arm.name == record.baseline:
            return None
        places = (record.case, record.baseline, record.other)
        found = next((c for c in self.comparisons if (c.case, c.baseline, c.other) == places), None)
        if found is None or found.interval is None:
            return None
        i = found.interval
        return Slowdown(ratio=1 / i.ratio, low=1 / i.high, high=1 / i.low)

    def baseline(self, reading: Reading) -> Reading | None:
        """The first policy in the same case, where that is another one and was measured."""
        first = next(r for r in self.readings if r.case == reading.case)
        return None if first.policy == reading.policy or not first.records else first

    def saved_share(self, reading: Reading, of: Callable[[Reading], float | None]) -> float | None:
        """By how much a size is below the baseline's, 0 to 1; negative where it is above."""
        baseline = self.baseline(reading)
        mine, theirs = of(reading), of(baseline) if baseline else None
        return None if mine is None or not theirs else 1 - mine / theirs

    # -- the recommendation -------------------------------------------------------------------------

    def recommendation(self) -> str:
        """Which policy has the lowest peak at the largest size, and which saves for the least time.

        Of mode oom: which goes furthest along each axis, at what cost. Empty of the others.
        """
        if self.asked.mode == "oom":
            return " ".join(oom.recommendation(found, self.readings) for found in self.capacities)
        if self.asked.mode != "peak":
            return ""
        sized = sorted((r for r in self.readings if r.records), key=lambda r: (r.length * r.batch, r.batch))
        if not sized:
            return "No recommendation: nothing was measured."
        rivals = [r for r in sized if r.case == sized[-1].case and r.activation_mib is not None]
        saving = [r for r in rivals if (self.saved_share(r, _activation) or 0) > 0]
        where = f"At batch {sized[-1].batch} x {sized[-1].length} tokens"
        if not saving:
            alone = [r.policy for r in rivals]
            what = (
                "no policy lowers the activation peak" if len(alone) > 1 else f"only {alone[0]} was measured"
            )
            return f"{where} {what}."
        lowest = min(saving, key=lambda r: r.activation_mib or 0.0)
        quickest = min(saving, key=_time)
        told = f"{where} {self._praise(lowest)}: the lowest activation peak"
        if quickest is lowest:
            return f"{told}, and the quickest of those that lower it."
        return f"{told}. And {self._praise(quickest)}: the quickest of those that lower it."

    def _praise(self, reading: Reading) -> str:
        share = self.saved_share(reading, _activation) or 0.0
        cost = f"{reading.slowdown} times the step time" if reading.slowdown else "an unknown step time"
        return f"{reading.policy} holds {reading.activation_mib:,.1f} MiB ({-100 * share:+.0f}%) at {cost}"

    # -- the KPIs -----------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Metric]:
        """Every KPI's figure, of this run or None with the reason."""
        return {
            "vram_different_tensors": self._different(),
            "vram_offload_activation_reduction": self._offload(self._reduction, LONG),
            "vram_offload_step_time": self._offload(self._step_time, LONG),
            "vram_offload_over_save_on_cpu": self._offload(self._over_save_on_cpu, LONG),
            "vram_offload_exposed": self._offload(self._exposed, LONG, SHORT),
            "vram_auto_over_pure": self._auto_over_pure(),
            "vram_largest_batch": self._largest_batch(),
        }

    def _different(self) -> Metric:
        """Tensors of the loss and the gradients that a policy changed, the most of any policy and case."""
        policies = [r for r in self.readings if r.policy != BASELINE]
        counted = [n for r in policies if (n := r.proof("different_tensors")) is not None]
        broken = next((r for r in policies if r.failed), None)
        if broken:
            return Metric(reason=f"{broken.policy}: {broken.reason}", failed=True)
        if not counted:
            return Metric(reason="no policy was held against off in this run")
        return Metric(value=max(counted))

    def _auto_over_pure(self) -> Metric:
        """Time of `auto` over the quickest pure policy's that is as lean: the lower end, at its worst."""
        if not self.asked.cuda:
            return Metric(reason="on the CPU nothing overlaps: no time to judge a plan by")
        planned = [r for r in self.readings if r.policy.startswith("auto")]
        broken = next((r for r in self.readings if r.failed and r.policy != BASELINE), None)
        if planned and broken:  # it may have been the quickest, or auto at its worst
            return Metric(reason=f"{broken.policy}: {broken.reason}", failed=True)
        found = [
            (auto.slowdown.low / pure.high, auto)
            for auto in planned
            if auto.slowdown and (pure := self._quickest_within(auto))
        ]
        if not found:
            return Metric(reason="no auto beside a pure policy that is as lean")
        end, auto = max(found, key=lambda one: one[0])
        return Metric(value=end, reason=f"{auto.policy} at batch {auto.batch} x {auto.length} tokens")

    def _quickest_within(self, auto: Reading) -> Slowdown | None:
        """Of the pure policies in the same case whose activations are within the target of `auto`."""
        off, share = self.baseline(auto), auto.target_share
        if off is None or off.policy != BASELINE or off.activation_mib is None or share is None:
            return None
        limit = share * off.activation_mib
        lean = [
            r.slowdown for r in self.readings
            if r.case == auto.case and not r.policy.startswith("auto") and r.slowdown
            and r.activation_mib is not None and r.activation_mib <= limit
        ]  # fmt: skip
        return min(lean, key=lambda s: s.ratio, default=None)

    def _largest_batch(self) -> Metric:
        """That of our policies which goes furthest, over that of `off`: the least of all lengths."""
        if self.asked.mode != "oom":
            return Metric(reason="a figure of --mode oom")
        if not self.asked.cuda:
            return Metric(reason="on the CPU the host is the device: what is offloaded takes as much there")
        broken = any(a.fits is None and a.status is not Status.UNAVAILABLE for a in self.attempts)
        gains = []
        for along in self.capacities:
            if along[0].axis.name != "batch_size":
                continue
            off, ours = along[0], [one for one in along if policy_of(one.arm).startswith(OURS)]
            if policy_of(off.arm) != BASELINE or not ours:
                return Metric(reason="off, and offload or auto, were not both asked for")
            best = max(ours, key=lambda one: one.largest or 0)
            unknown = next((one.reason for one in (off, best) if one.largest is None), "")
            if unknown or not off.largest:
                return Metric(reason=unknown or "off fits nothing: no ratio", failed=broken and bool(unknown))
            gains.append(((best.largest or 0) / off.largest, f"{policy_of(best.arm)}: {best.axis}"))
        value, reason = min(gains)
        return Metric(value=value, reason=reason)

    def _offload(self, figure: Callable[[Reading], Metric], *places: tuple[str, int, int]) -> Metric:
        """A figure of offloading at the shapes, and on the device, that the targets speak of."""
        found = [
            r
            for r in self.readings
            if r.policy == "offload" and r.records and (r.case.params["shape"], r.batch, r.length) in places
        ]
        if not found:
            where = " or ".join(
                f"{shape}, batch {batch} x {length} tokens" for shape, batch, length in places
            )
            return Metric(reason=f"a target for {where}, on one H200")
        device = found[0].records[0].environment
        if device is None or H200 not in device.device:
            return Metric(
                reason=f"a target for one H200; this is {device.device if device else 'another machine'}"
            )
        return figure(found[0])  # a run has one shape, and each shape one place

    def _reduction(self, reading: Reading) -> Metric:
        share = self.saved_share(reading, _activation)
        return Metric(value=share, reason="" if share is not None else "off was not measured")

    def _step_time(self, reading: Reading) -> Metric:
        found = reading.slowdown
        if found is None:
            return Metric(reason="off was not measured")
        return Metric(value=found.ratio, low=found.low, high=found.high)

    def _exposed(self, reading: Reading) -> Metric:
        """What offloading exposes over what was predicted: the time that compute stood still, or that it adds
        to the step, whichever is more."""
        planned, least = (reading.counted(f"plan_{name}_ms") for name in ("step", "exposed"))
        stood, baseline = reading.exposed_ms, self.baseline(reading)
        if planned is None or least is None:
            why = [str(r.proof["plan_reason"]) for r in reading.records if "plan_reason" in r.proof]
            return Metric(reason=why[0] if why else "offload has no prediction")
        if stood is None or reading.slowdown is None or not (baseline and baseline.step_ms):
            return Metric(reason="off was not measured")
        off_ms, kept_ms, over = baseline.step_ms, planned - least, reading.slowdown
        ends = [max(stood, (ratio - 1) * off_ms) for ratio in (over.low, over.ratio, over.high)]
        told = (
            f"{stood:.1f} ms stood still, {(over.ratio - 1) * off_ms:.1f} ms added; predicted {least:.1f} ms"
        )
        if abs(kept_ms / off_ms - 1) > PROFILED:
            told += f", of a step without offloading that took {kept_ms:.1f} ms for {off_ms:.1f}"
        elif least > 0:
            low, value, high = (end / least for end in ends)
            return Metric(value=value, low=low, high=high, reason=told)
        return Metric(reason=f"no prediction to divide by: {told}")

    def _over_save_on_cpu(self, reading: Reading) -> Metric:
        """Added time of save_on_cpu over that of offload; nothing where offload adds none."""
        theirs = next(
            (r for r in self.readings if r.case == reading.case and r.policy == "save-on-cpu"), None
        )
        if theirs is None or theirs.slowdown is None or reading.slowdown is None:
            return Metric(reason="off, offload and save-on-cpu were not all measured")
        added = reading.slowdown.ratio - 1
        if added <= 0:
            return Metric(reason="offload adds no time to divide by")
        return Metric(value=(theirs.slowdown.ratio - 1) / added)


def _time(reading: Reading) -> tuple[bool, float]:
    """To sort by: over the baseline's where there is one; arms that take turns meet the same noise."""
    return (False, reading.slowdown.ratio) if reading.slowdown else (True, reading.step_ms or 0.0)


def _activation(reading: Reading) -> float | None:
    return reading.activation_mib


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

"""What is asked of an arm after its last sample: what ran in a step, and whether it answers from memory."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from assay import proof
from assay.contracts import Trial
from assay.measure import clock, validity
from assay.measure.busy import busy_us
from assay.measure.loop import Sampler

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["confused", "kernel_times_ns", "operators", "remembered"]

PHASE_END = "assay.end_of."  # names the events of a profile that end its phases
ENTER = "profiler::_record_function"  # what naming a range does
# Asked in a row: for 5 s and at least the first four. Whoever repeats every second, third or fourth answer,
# from wherever on, gives one question the answer to the other; the first four find every second.
QUESTIONS, TURNS_S = (3, 4, 4, 3, 3, 4, 3, 4), 5.0  # the gate asks 1 and 2


def operators(trial: Trial, device: str) -> tuple[Mapping[str, int], str, dict[str, float]]:
    """Operator -> how often one more step calls it; a digest of that; `kernel_times_ns` on CUDA.

    Each phase ends synchronised here, so that its kernels are its own. What the profiler saw is counted as it
    comes, also an operator that calls its namesake, which torch's tables leave out: they take 0.08 ms an
    event, minutes for a generation of 128 tokens.
    """
    # torch.profiler is this with more around it, and imports torch._inductor: seconds
    from torch.autograd.profiler import profile, record_function
    from torch.autograd.profiler_util import StringTable

    cuda = device.startswith("cuda")
    synchronize = clock.for_device(device).synchronize

    def end(phase: str) -> None:
        synchronize()
        with record_function(PHASE_END + phase):
            pass

    trial.reset()
    with profile(use_device="cuda" if cuda else None, use_kineto=True) as run:
        trial.step(end if cuda else clock.ignore)
        synchronize()
    events = run.kineto_results.events()
    readable: Mapping[str, str] = StringTable()
    seen = Counter(_counted(events))
    # a range that was named is there twice, for the host and for the device, with the same count
    found = sorted({(readable[name], count) for (name, _), count in seen.items()})
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:12] if found else ""
    return dict(found), digest, kernel_times_ns(events) if cuda else {}


def _counted(events: Iterable[Any]) -> Iterator[tuple[str, int]]:
    """Name and kind of device of each of Kineto's events but those that are there because somebody looks."""
    for event in events:
        name: str = event.name()
        if not name.startswith((PHASE_END, ENTER)) and not event.is_hidden_event():
            yield name, int(event.device_type())


def kernel_times_ns(events: Sequence[Any]) -> dict[str, float]:
    """Phase -> ns in which a kernel or a copy ran, from Kineto events of which a PHASE_END ends each phase.

    Empty where the profiler saw nothing of a device.
    """
    spans: list[tuple[float, float]] = []
    marks: list[tuple[str, float]] = []
    begin = min((event.start_ns() for event in events), default=0)  # a float of ns since 1970 is off by 250

    def at_us(ns: int) -> float:
        return (ns - begin) / 1e3

    for event in events:
        name, device = event.name(), event.device_type().name
        if name.startswith(PHASE_END):
            if device == "CPU":
                marks.append((name.removeprefix(PHASE_END), at_us(event.end_ns())))
        elif device == "CUDA" and not event.is_user_annotation():
            spans.append((at_us(event.start_ns()), at_us(event.end_ns())))
    found = busy_us(spans, sorted(marks, key=lambda mark: mark[1]))
    return {phase: round(1e3 * us, 1) for phase, us in found.items()}


def remembered(
    steps_ns: Sequence[float], sampler: Sampler, fresh: Callable[[int], Trial], *, one_input: bool
) -> str | None:
    """Why the samples `steps_ns` are void: on inputs that it has never seen the same step takes far longer.

    `fresh` makes a trial with inputs of another seed, so many on from the case's; `one_input` where all its
    steps have the same. A suspicion is asked three times, each beside a step as it was timed, and the
    quickest of either kind are compared: a machine that stalls slows some steps, one that throttles slows
    both kinds.
    """
    if not steps_ns:
        return None

    def unseen(attempt: int) -> float:
        if one_input:  # each call needs a trial of its own
            trials = [fresh(10 * attempt + n) for n in (1, 2, 3)]
            return min(sampler.clock.time(trial.step).step_ns for trial in trials)
        other = Sampler(fresh(10 * attempt + 1), sampler.clock)
        return min(other.sample(lead_in=1).step_ns, other.sample(lead_in=0).step_ns)  # inputs rotate

    unseen_ns = seen_ns = math.inf
    for attempt in range(3):
        unseen_ns = min(unseen_ns, unseen(attempt))
        if validity.remembered_reason(steps_ns, unseen_ns) is None:
            return None
        seen_ns = min(seen_ns, sampler.sample(lead_in=0).step_ns)
    return validity.remembered_reason([max(statistics.median(steps_ns), seen_ns)], unseen_ns)


def confused(trial: Trial, agreed: Callable[[bool], bool]) -> str | None:
    """Why the samples are void: asked two questions by turns, it gave one the answer to the other.

    An arm that answers afresh only now and then may be lucky when the gate asks. `agreed` makes ranks that
    answer together decide together.
    """
    end = time.monotonic() + TURNS_S
    answers: list[tuple[int, Tensor]] = []
    for question in QUESTIONS:
        if agreed(len(answers) > 3 and time.monotonic() > end):
            break
        trial.reset()
        answers.append((question, proof.sampled(trial.outputs(question))))
    return validity.CONFUSED if agreed(proof.confused(answers)) else None

"""Measuring one arm with no partner: for `assay.measure`."""

from __future__ import annotations

import time

from assay.channel import Channel, ask
from assay.journal import Launch, alone_record, now
from assay.measure.clock import Timing
from assay.measure.loop import Blocks
from assay.measure.record import Memory, Record
from assay.pairs import Pair
from assay.plan import Plan
from assay.wire import Build, Built, Finish, Finished, MeasureMemory, Ready, Sample, Sampled, Warm

__all__ = ["measure_alone"]


def measure_alone(plan: Plan, channel: Channel, samples: int) -> Record:
    """Build, warm up and sample the plan's only arm. Raises what the arm raises, as WorkerError."""
    (arm,), (case,) = plan.arms, plan.cases
    launch = Launch(number=0, started=now())
    try:
        launch.built[arm.name] = ask(channel, Build(), Built)
        launch.memory[arm.name] = ask(channel, MeasureMemory(), Memory)
        launch.ready[arm.name] = ask(channel, Warm(floor=plan.config.warmup_steps), Ready)
        times: list[Timing] = []
        end = time.monotonic() + plan.config.time_budget_s
        while len(times) < samples and (len(times) < 2 or time.monotonic() < end):
            times.append(ask(channel, Sample(), Sampled).timing)
        launch.finished[arm.name] = ask(channel, Finish(profile=False), Finished)
    finally:
        channel.close()
    launch.blocks = Blocks(baseline=times, order="B" * len(times), stop=f"{len(times)} samples")
    return alone_record(plan, Pair(case=case, baseline=arm, other=arm), launch)

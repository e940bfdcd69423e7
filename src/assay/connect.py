"""How a run reaches its arms: a worker process each, or a runner in this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from assay.channel import Channel, InlineChannel, ProcessChannel
from assay.config import RunConfig
from assay.measure.record import Arm, Case
from assay.wire import Open

__all__ = ["Connect", "Workers", "connect_inline", "connect_process", "connection"]

Connect = Callable[[Open, Path, float], Channel]


def connection(config: RunConfig) -> Connect:
    """How arms are reached: a process each, or in this process under `--isolation inline`."""
    return connect_inline if config.isolation == "inline" else connect_process


def connect_inline(opening: Open, _scratch: Path, _timeout_s: float) -> Channel:
    """A runner in this process, which no timeout can end."""
    from assay.worker import open_runner

    if opening.case.device == "cpu":  # all that torch's profiler has to say there is when it starts and stops
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return InlineChannel(open_runner(opening))


def connect_process(opening: Open, scratch: Path, timeout_s: float) -> Channel:
    """A worker that has been asked to open; its answer is still to be read."""
    channel = ProcessChannel.open(opening.arm, scratch, timeout_s)
    channel.send(opening)
    return channel


class Workers:
    """Opens the arms of one run."""

    def __init__(self, config: RunConfig, scratch: Path, connect: Connect) -> None:
        self.config, self.scratch, self._connect = config, scratch, connect

    def open(self, case: Case, arm: Arm) -> Channel:
        """A fresh worker of the arm, importing; the answer to Open is still to be read."""
        if self.config.fresh_compile:
            folder = tempfile.mkdtemp(prefix="compile-", dir=self.scratch)
            fresh = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
            arm = msgspec.structs.replace(arm, env={**fresh, **arm.env})
        opening = Open(case=case, arm=arm, scratch=str(self.scratch), weights=self.config.weights)
        return self._connect(opening, self.scratch, self.config.timeout_s)

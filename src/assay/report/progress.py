"""Live progress: what is being done, the time left, and the running ratio with its interval.

A terminal gets one moving line; a pipe or a log gets a plain line a launch, and at most one line every
ten seconds for what is being done.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from assay.measure.record import Case, Record

__all__ = ["RichProgress", "time_left_s"]

_QUIET_S = 10.0  # between plain lines that only say what is being done


def time_left_s(elapsed_s: float, done: float, total: int) -> float | None:
    """Seconds left, were every launch to take as long as those done. `done` may count part of a launch.

    None before anything is done, since nothing supports a guess.
    """
    return elapsed_s * (total - done) / done if done > 0 else None


def _clock_text(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RichProgress:
    """An observer that shows a run on a console, standard error unless another is given."""

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._now = now
        self._total = 0
        self._begun_s = self._said_s = 0.0
        self._arrived: dict[tuple[str, str, str, int], set[str]] = {}
        self._part = 0.0  # of the launch that is running
        self._ratio = ""
        self._bar: tuple[Progress, TaskID] | None = None

    def started(self, total_launches: int) -> None:
        """Start the bar over the launches of all cases and pairs."""
        self._total = total_launches
        self._begun_s = self._now()
        self._said_s = self._begun_s - _QUIET_S
        if self._console.is_terminal:
            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[done]}"),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[left]} left"),
                TextColumn("{task.description}", markup=False, table_column=rest),
                console=self._console,
                transient=True,
                expand=True,
            )
            task = progress.add_task("", total=total_launches, done=f"0/{total_launches}", left="-:--")
            progress.start()
            self._bar = (progress, task)

    def doing(self, case: Case, arm: str, what: str) -> None:
        """Say what an arm is being put through: building, gate, warming up, measuring."""
        said = f"{case.workload} · {arm}: {what}"
        if self._bar:
            self._show(said)
        elif self._now() - self._said_s >= _QUIET_S:
            self._say(f"[{self._place()}] {said}")

    def block(
        self,
        case: Case,
        baseline: str,
        other: str,
        launch: int,
        launches: int,
        n_blocks: int,
        asked_blocks: int | None,
        ratio: float,
        low: float | None,
        high: float | None,
    ) -> None:
        """Show the running ratio; its interval once there are enough batches."""
        bounds = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        of = f"/{asked_blocks}" if asked_blocks else ""
        self._part = min(1.0, n_blocks / asked_blocks) if asked_blocks else 0.0
        self._ratio = (
            f"{baseline} / {other} {ratio:.3f}{bounds} · {case.workload} · "
            f"launch {launch + 1}/{launches} · block {n_blocks}{of}"
        )
        self._show(self._ratio)

    def record(self, record: Record) -> None:
        """Count a launch once all its arms have reported."""
        place = (record.case.id, record.baseline, record.other, record.launch)
        arrived = self._arrived.setdefault(place, set())
        arrived.add(record.arm.name)
        if not record.status.measured and record.reason:
            self._say(f"{record.case.workload} · {record.arm.name}: {record.status}: {record.reason}")
        if arrived >= {record.baseline, record.other}:
            self._part = 0.0
            if not self._bar:
                arms = dict.fromkeys((record.baseline, record.other))
                said = self._ratio or f"{record.case.workload} · {' / '.join(arms)}: {record.status}"
                self._say(f"[{self._place()}] {said} · {self._left()} left")
            self._ratio = ""
            self._show("")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._say(text)

    def finished(self) -> None:
        """Take the bar away; the summary follows."""
        if self._bar:
            self._bar[0].stop()
            self._bar = None

    def _done(self) -> int:
        return sum(arrived >= set(place[1:3]) for place, arrived in self._arrived.items())

    def _place(self) -> str:
        return f"{self._done()}/{self._total}"

    def _left(self) -> str:
        elapsed = self._now() - self._begun_s
        return _clock_text(time_left_s(elapsed, self._done() + self._part, self._total))

    def _show(self, said: str) -> None:
        if self._bar:
            progress, task = self._bar
            progress.update(
                task,
                completed=self._done() + self._part,
                description=said,
                done=self._place(),
                left=self._left(),
            )

    def _say(self, text: str) -> None:
        self._said_s = self._now()
        if self._bar:
            self._bar[0].console.print(Text(text))
        else:
            self._console.print(Text(text), soft_wrap=True)  # in a log one thing said is one line

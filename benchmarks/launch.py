"""Where the wall time of a launch goes: the session's waits for its workers, by what it waited for.

    python benchmarks/launch.py [what `assay compare` takes: arms and options]

A row for each stretch of the run, and the medians over all launches but the first, which compiles what the
others find in caches; then each arm's cold starts, as its worker timed them. Seconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from assay import cli, session
from assay.channel import Channel
from assay.connect import connection
from assay.measure.record import Record
from assay.observer import NullObserver
from assay.plan import make_plan
from assay.wire import Gate, Open, Reply, Request

# what a worker is asked -> the column; opening is start and imports, less what went on meanwhile
PARTS = {
    "Open": "start",
    "Oracle": "oracle",
    "Check": "meaning",
    "Build": "build",
    "MeasureMemory": "memory",
    "TraceMemory": "memory",
    "Gate before": "gate",
    "Warm": "warm-up",
    "Settle": "warm-up",
    "Sample": "sampling",
    "Finish": "proof",
    "Gate after": "gate again",
    "end": "end",
}
COLUMNS = [*dict.fromkeys(PARTS.values())]


class Stretch:
    """A time that ends with the last of some workers, and the waits in it by part and arm."""

    def __init__(self, begin: float) -> None:
        self.begin = self.end = begin
        self.waits: dict[tuple[str, str], float] = defaultdict(float)
        self.ended = False

    @property
    def launch(self) -> bool:
        """Whether samples were taken in it."""
        return any(part == "sampling" for part, _ in self.waits)

    def waited(self, part: str, arm: str = "") -> float:
        """Seconds of waiting for a part of one arm, or of all."""
        return sum(s for (p, a), s in self.waits.items() if p == part and arm in ("", a))


class Watch:
    """The stretches of a run in order. Each begins where the one before it ended."""

    def __init__(self) -> None:
        self.stretches = [Stretch(time.monotonic())]

    def add(self, arm: str, asked: str, begin: float) -> None:
        """A wait that ends now."""
        end = time.monotonic()
        if asked == "Open" and self.stretches[-1].ended:
            self.stretches.append(Stretch(self.stretches[-1].end))
        stretch = self.stretches[-1]
        stretch.waits[PARTS[asked], arm] += end - begin
        stretch.end = end
        stretch.ended |= asked == "end"


class Watched:
    """A channel whose waits are written down."""

    def __init__(self, channel: Channel, arm: str, watch: Watch) -> None:
        self._channel, self._arm, self._watch = channel, arm, watch
        self._asked = "Open"

    def send(self, request: Request) -> None:
        """Remember what the next answer is to."""
        self._asked = type(request).__name__ + (f" {request.stage}" if isinstance(request, Gate) else "")
        self._channel.send(request)

    def receive(self) -> Reply:
        """The answer, once it is there."""
        begin = time.monotonic()
        try:
            return self._channel.receive()
        finally:
            self._watch.add(self._arm, self._asked, begin)

    def close(self) -> None:
        """End the worker."""
        begin = time.monotonic()
        self._channel.close()
        self._watch.add(self._arm, "end", begin)


def show(stretches: Sequence[Stretch], records: Sequence[Record]) -> None:
    """Print the table; `rest` is the session's own time and the start of processes."""
    print(f"{'':24}" + "".join(f"{c:>11}" for c in (*COLUMNS, "rest", "wall")))

    def line(title: str, values: Sequence[float]) -> None:
        print(f"{title:24}" + "".join(f"{v:11.2f}" if v >= 0.005 else f"{'':11}" for v in values))

    def whole(stretch: Stretch) -> list[float]:
        wall, waits = stretch.end - stretch.begin, [stretch.waited(c) for c in COLUMNS]
        return [*waits, wall - sum(waits), wall]

    launches = [s for s in stretches if s.launch]
    for s in stretches:
        line(f"launch {launches.index(s)}" if s.launch else "before the launches", whole(s))
    print(f"in all {stretches[-1].end - stretches[0].begin:.2f}")
    later = launches[1:] or launches
    line("median", [statistics.median(column) for column in zip(*map(whole, later), strict=True)])
    for arm in dict.fromkeys(arm for s in later for _, arm in s.waits):
        line(f"  {arm}"[:24], [statistics.median(s.waited(c, arm) for s in later) for c in COLUMNS])
    for arm in dict.fromkeys(r.arm.name for r in records):
        colds = [r.cold for r in records if r.arm.name == arm and r.cold]
        for name in ("import_s", "build_s", "first_call_s"):
            print(f"{arm} {name}: {', '.join(f'{getattr(cold, name):.2f}' for cold in colds)}")


def main() -> None:
    """Run the comparison and print where its time went; nothing is written."""
    _, bound, _ = cli.app.parse_args(["compare", *sys.argv[1:]])
    given = bound.arguments
    how, what = given.get("how", cli.How()), given.get("what", cli.What())
    config = cli._configuration(given.get("arms", ()), what, how)
    connect, watch = connection(config), Watch()

    def watched(opening: Open, scratch: Path, timeout_s: float) -> Channel:
        return Watched(connect(opening, scratch, timeout_s), opening.arm.name, watch)

    found = session.run(make_plan(config), None, NullObserver(), connect=watched)
    show(watch.stretches, found.records)
    for record in found.records:
        if not record.status.measured:
            print(f"{record.arm.name}: {record.status}: {record.reason}")


if __name__ == "__main__":
    main()

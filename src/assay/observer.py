"""What the session tells while it works. The session prints nothing: it tells an observer."""

from __future__ import annotations

from typing import Protocol

from assay.measure.record import Case, Record

__all__ = ["NullObserver", "Observer"]


class Observer(Protocol):
    """Told about a run as it goes on. Every call comes from the session's own thread and must be cheap.

    A launch is over when the records of both its arms have come. `low` and `high` are the anytime
    interval of `ratio` (baseline time / other time) inside the launch; None before 16 batches.
    """

    def started(self, total_launches: int) -> None: ...
    def doing(self, case: Case, arm: str, what: str) -> None: ...
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
    ) -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self) -> None: ...


class NullObserver:
    """Listens and says nothing."""

    def started(self, total_launches: int) -> None:
        """Nothing to show."""

    def doing(self, case: Case, arm: str, what: str) -> None:
        """Nothing to show."""

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
        """Nothing to show."""

    def record(self, record: Record) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to show."""

    def finished(self) -> None:
        """Nothing to show."""

"""Ctrl-C: at once while nothing is lost by it, after the block in hand while something would be."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from assay.observer import Observer

__all__ = ["Interrupt"]


class Interrupt:
    """`asked`: the user wants the run to stop. `abandoned`: and a worker may still be answering."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.asked = self.abandoned = False
        self._measuring = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Ctrl-C ends the run: once the block in hand is taken and gated while measuring, at once elsewhere.

        A second Ctrl-C stops without waiting. What is on disk stays as it is.
        """

        def handle(number: int, frame: object) -> None:
            del number, frame
            at_once = not self._measuring or self.asked
            self.asked = True
            if at_once:
                self.abandoned = True
                raise KeyboardInterrupt
            self.observer.note("stopping after this block; what was measured is gated and kept")

        try:
            before = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not the main thread: the caller's own handling stands
            yield
            return
        try:
            with contextlib.suppress(KeyboardInterrupt):
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def finishing_first(self) -> Iterator[None]:
        """From the first block to the last check: a first Ctrl-C waits, so that nothing measured is lost."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False

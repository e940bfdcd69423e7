"""When to stop sampling: small objects that say why, asked after every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1
from typing import Protocol

from assay.measure.stats import running_interval

__all__ = ["MIN_BLOCKS", "Stop", "after", "until"]

MIN_BLOCKS = 2  # a launch mean needs at least this many


class Stop(Protocol):
    """Says why sampling may end now, or None."""

    def __call__(self, log_ratios: Sequence[float], elapsed_s: float) -> str | None: ...


@dataclass(frozen=True)
class after:  # noqa: N801  (reads as a phrase: stop=after(20))
    """Exactly this many blocks."""

    blocks: int

    def __call__(self, log_ratios: Sequence[float], elapsed_s: float) -> str | None:
        del elapsed_s
        return f"{self.blocks} blocks asked for" if len(log_ratios) >= self.blocks else None


@dataclass(frozen=True, kw_only=True)
class until:  # noqa: N801  (reads as a phrase: stop=until(rel_ci=..., max_s=...))
    """Until the running interval's half width is at most `rel_ci`, or `max_s` seconds have passed."""

    rel_ci: float
    max_s: float
    confidence: float = 0.95

    def __call__(self, log_ratios: Sequence[float], elapsed_s: float) -> str | None:
        if len(log_ratios) < MIN_BLOCKS:
            return None
        looks = len(log_ratios) % max(1, len(log_ratios) // 20) == 0  # a look reads the whole launch
        shown = running_interval(log_ratios, self.confidence) if looks else None
        if shown is not None and expm1(shown.half_width) <= self.rel_ci:
            return f"interval within {self.rel_ci:.2%}"
        return f"time budget of {self.max_s:.3g} s" if elapsed_s >= self.max_s else None

"""What each ingredient of a recipe gives: an attribution's rows, words and chart, from its comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from assay.measure.record import Attribution, spelled_scalar
from assay.measure.verdict import Comparison, MemoryComparison
from assay.report import words
from assay.report.figures import Figure
from assay.report.rows import ATTRIBUTION_FRAME, attribution_rows
from assay.report.view import CaseView

__all__ = [
    "ADDED",
    "HEADERS",
    "LEFT_OUT",
    "NUMBERS",
    "Contribution",
    "cells",
    "contributions",
    "figures",
    "memory_change",
    "ratio",
    "remarks",
    "what_changed",
]

ADDED, LEFT_OUT = "added alone", "left out alone"
HEADERS = (
    "ingredient",
    "what changes",
    "added alone: ratio [interval]",
    "added: peak MiB",
    "left out alone: ratio [interval]",
    "left out: peak MiB",
)
NUMBERS = ("added: peak MiB", "left out: peak MiB")


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One ingredient: added to the plain recipe, and left out of the best one. None: no such record yet."""

    ingredient: str
    added: Comparison | None
    left_out: Comparison | None

    @property
    def about(self) -> tuple[Attribution, ...]:
        """What its pairs stand for."""
        return tuple(c.attribution for c in (self.added, self.left_out) if c and c.attribution)

    @property
    def swapped(self) -> bool:
        """Whether it is in neither recipe and was only tried."""
        return any(a.swapped for a in self.about)


def contributions(view: CaseView) -> list[Contribution]:
    """The ingredients of a case, the one that costs most to leave out first; those without a ratio last."""
    found: dict[tuple[str, str], Comparison] = {
        (c.attribution.ingredient, c.attribution.kind): c
        for c in view.comparisons
        if c.attribution and not c.headline
    }
    made = [
        Contribution(ingredient=name, added=found.get((name, "add")), left_out=found.get((name, "leave")))
        for name in dict.fromkeys(name for name, _ in found)
    ]
    return sorted(made, key=_effect, reverse=True)


def _effect(one: Contribution) -> float:
    return one.left_out.interval.ratio if one.left_out and one.left_out.interval else -math.inf


def cells(view: CaseView) -> list[tuple[str, ...]]:
    """A row under HEADERS for every ingredient."""
    return [
        (
            one.ingredient,
            what_changed(one),
            *(cell for c in (one.added, one.left_out) for cell in (_judged(c), memory_change(c))),
        )
        for one in contributions(view)
    ]


def what_changed(one: Contribution) -> str:
    """`false → true; added on top of cache=static`."""
    first = one.about[0]
    said = [f"{_value(first.before)} → {_value(first.after)}"]
    if one.swapped:
        said.append("in neither: swapped in")
    for about in one.about:
        verb = "added" if about.kind == "add" else "left out"
        if about.given:
            given = ", ".join(f"{name}={_value(value)}" for name, value in about.given.items())
            said.append(f"{verb} on top of {given}")
        if about.along:
            said.append(f"{verb}, it takes away {', '.join(about.along)}")
    return "; ".join(said)


def _value(value: object) -> str:
    return spelled_scalar(value) if isinstance(value, bool | int | float | str) else words.UNKNOWN


def ratio(comparison: Comparison | None) -> str:
    """Time without over time with, and its interval."""
    return words.ratio(comparison.interval) if comparison and comparison.interval else words.UNKNOWN


def _judged(comparison: Comparison | None) -> str:
    if comparison is None:
        return words.UNKNOWN
    word = words.verdict_word(comparison)
    return f"{ratio(comparison)} {word}" if comparison.interval else word


def memory_change(comparison: Comparison | None) -> str:
    """Peak with the ingredient minus peak without: `-310 (less)`."""
    memory: MemoryComparison | None = comparison.memory if comparison else None
    if memory is None:
        return words.UNKNOWN
    change = memory.other_mib - memory.baseline_mib
    return f"{change:+,.{1 if abs(change) < 100 else 0}f} ({memory.verdict})"


def remarks(view: CaseView) -> list[str]:
    """How to read the table: what a ratio is, what the ratios do not add up to, what was not tried."""
    total = next((c for c in view.comparisons if c.attribution and c.headline), None)
    if total is None:
        return []
    base, best = total.baseline, total.other
    said = [
        f"Time without an ingredient over time with it: added alone to {base}, left out alone of {best}. "
        "Above 1 the ingredient makes it faster. MiB: peak with it less peak without it."
    ]
    parts = [one for one in contributions(view) if not one.swapped]
    products = [_product([one.added for one in parts]), _product([one.left_out for one in parts])]
    whole = f"{best} against {base} is {ratio(total)}" if total.interval else f"{best} has no ratio to {base}"
    if all(products):
        said.append(
            "Contributions need not multiply up to the total: multiplied, those added come to "
            f"{products[0]} and those left out to {products[1]}; {whole}."
        )
    about = total.attribution
    if about and about.left_out:
        said.append(f"Not tried: {'; '.join(about.left_out)}.")
    return said


def _product(judged: Sequence[Comparison | None]) -> str:
    """`2.31`, or `2.31 (4 of 5 have a ratio)`; empty where none has."""
    found = [c.interval.ratio for c in judged if c and c.interval]
    if not found:
        return ""
    missing = f" ({len(found)} of {len(judged)} have a ratio)" if len(found) < len(judged) else ""
    return f"{words.number(math.prod(found), 3)}{missing}"


def figures(view: CaseView) -> list[Figure]:
    """The contributions as points with their intervals; nothing without a ratio."""
    named = [
        (one.ingredient, way, c.interval, words.verdict_word(c), c.margin)
        for one in contributions(view)
        for way, c in ((ADDED, one.added), (LEFT_OUT, one.left_out))
        if c and c.interval
    ]
    if not named:
        return []
    return [
        Figure(
            kind="attribution",
            key=f"{view.case.id}-attribution",
            title="What each ingredient gives",
            caption="Time without it over time with it, with its interval, on a logarithmic scale; right of "
            "the grey margin it makes the step faster. Intervals are cut off beyond "
            f"{ATTRIBUTION_FRAME:g} times the outermost ratios.",
            rows=attribution_rows(named),
        )
    ]

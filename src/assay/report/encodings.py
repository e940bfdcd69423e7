"""What the drawings of charts share: their rows, the legend that picks an arm, axes of time, tooltips."""

from __future__ import annotations

from typing import Any

import altair as alt

__all__ = ["TIME_AXIS", "Drawing", "arm", "chart", "pick", "seconds", "spelled", "tip"]

Drawing = Any  # altair's chained methods do not keep the type of a chart

TIME_AXIS = "format(datum.value, '~s') + 's'"


def chart() -> alt.Chart:
    """A chart of the rows that a report gives by the name `rows`."""
    return alt.Chart(alt.NamedData("rows"))


def seconds(field: str, axis: type[alt.X] | type[alt.Y], title: str) -> Any:
    """A time axis: seconds with SI prefixes, not from zero, since differences are the point."""
    scale = alt.Scale(zero=False, nice=True)
    return axis(f"{field}:Q", scale=scale, axis=alt.Axis(title=title, labelExpr=TIME_AXIS, tickCount=5))


def pick() -> alt.Parameter:
    """Picking an arm in the legend brings it out."""
    return alt.selection_point(name="pick", fields=["a"], bind="legend")


def arm(picked: alt.Parameter) -> tuple[Any, Any]:
    """Colour by arm in the order of the rows, and the fading of arms that are not picked in the legend."""
    colour = alt.Color("a:N", sort=None)
    return colour, alt.condition(picked, alt.value(0.75), alt.value(0.08))


def tip(field: str, title: str, pattern: str | None = None) -> alt.Tooltip:
    """One line of a tooltip; `pattern` formats a number."""
    return alt.Tooltip(field, title=title, format=pattern) if pattern else alt.Tooltip(field, title=title)


def spelled(*fields: str) -> dict[str, str]:
    """Calculated fields `<name>_text` that spell seconds with a unit, for tooltips."""
    return {f"{field}_text": f"format(datum.{field}, '.4s') + 's'" for field in fields}

"""How rates and times are drawn on logarithmic axes: the roofline, sweeps, scaling."""

from __future__ import annotations

from typing import Any

import altair as alt

from assay.report.encodings import TIME_AXIS, Drawing, arm, chart, pick, tip

__all__ = ["batches", "lengths", "roofline", "scaling_memory", "scaling_rate", "scaling_time"]

_LEADING = "round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))"  # digit of a tick


def _log(
    axis: type[alt.X] | type[alt.Y], field: str, title: str, label: str, base: int = 10, *, all_: bool = False
) -> Any:
    """A logarithmic axis; `label` spells a tick. Decimal ones are labelled at 1, 2 and 5, or all of them."""
    if base == 10 and not all_:
        label = f"indexof([1, 2, 5], {_LEADING}) < 0 ? '' : {label}"
    spelled = alt.Axis(title=title, tickCount=5, labelOverlap="greedy", labelExpr=label)
    scale = alt.Scale(type="log", base=base, nice=False, padding=10)
    return axis(f"{field}:Q", scale=scale, axis=spelled)


def roofline() -> Drawing:
    """Achieved FLOP/s against FLOPs a byte under both roofs; a point an arm and phase."""
    picked = pick()
    colour, fading = arm(picked)
    x = _log(alt.X, "x", "FLOPs a byte", "format(datum.value, '~s')")
    y = _log(alt.Y, "y", "achieved FLOP/s", "format(datum.value, '~s')")
    roofs = (
        chart()
        .transform_filter("isValid(datum.roof)")
        .transform_calculate(
            rate="datum.roof == 'memory' ? format(datum.y / datum.x, '.3s') + 'B/s' : "
            "format(datum.y, '.3s') + 'FLOP/s'"
        )
    )
    tips = [tip("a:N", "arm"), tip("phase:N", "phase"), tip("x:Q", "FLOPs a byte", ".3s")]
    tips += [tip("y:Q", "FLOP/s", ".3s"), tip("mfu:Q", "MFU", ".1%"), tip("mbu:Q", "MBU", ".1%")]
    tips += [tip("bound:N", "bound by")]
    line = roofs.mark_line(style="roof").encode(
        x=x, y=y, detail="roof:N", tooltip=[tip("roof:N", "roof"), tip("rate:N", "measured")]
    )
    shape = alt.Shape("phase:N", sort=None)
    points = (
        chart()
        .transform_filter("!isValid(datum.roof)")
        .mark_point(size=70, filled=True)
        .encode(x=x, y=y, color=colour, shape=shape, opacity=fading, tooltip=tips)
        .add_params(picked)
    )
    return line + points


def _sweep(x_title: str, y_title: str, tick: str, spelled: str) -> Drawing:
    """A line an arm on logarithmic axes, and what the floor allows, dashed."""
    picked = pick()
    colour, _ = arm(picked)
    x = _log(alt.X, "x", x_title, "format(datum.value, ',')", base=2)
    y = _log(alt.Y, "y", y_title, tick)
    rows = chart().transform_calculate(y_text=spelled.format("y"), floor_text=spelled.format("floor"))
    tips = [tip("a:N", "arm"), tip("x:Q", x_title, ","), tip("y_text:N", y_title)]
    tips += [tip("floor_text:N", "at the floor")]
    line = rows.mark_line(strokeWidth=2, point=True).encode(
        x=x, y=y, color=colour, opacity=alt.condition(picked, alt.value(1), alt.value(0.1)), tooltip=tips
    )
    floor = (
        chart()
        .transform_filter("isValid(datum.floor)")
        .transform_aggregate(y="min(floor)", groupby=["x"])
        .mark_line(style="floor")
        .encode(x=x, y=y)
    )
    return floor + line.add_params(picked)


def lengths() -> Drawing:
    """Time against length."""
    return _sweep("tokens", "time", TIME_AXIS, "isValid(datum.{0}) ? format(datum.{0}, '.4s') + 's' : '-'")


def batches() -> Drawing:
    """Tokens a second against the batch."""
    tick = "format(datum.value, '~s')"
    return _sweep("batch", "tokens/s", tick, "isValid(datum.{0}) ? format(datum.{0}, '.4s') : '-'")


def _scaling(x_title: str, y_title: str, tick: str, spelled: str) -> Drawing:
    """Measured points on logarithmic axes, and each arm's fitted power law, dashed."""
    picked = pick()
    colour, _ = arm(picked)
    shown = alt.condition(picked, alt.value(1), alt.value(0.1))
    x = _log(alt.X, "x", x_title, "format(datum.value, ',')", base=2)
    y = _log(alt.Y, "y", y_title, tick, all_=True)
    tips = [tip("a:N", "arm"), tip("x:Q", x_title, ","), tip("y_text:N", y_title)]
    tips += [tip("law:N", "grows as")]
    rows = chart().transform_calculate(y_text=spelled.format("y"))
    points = rows.mark_point(size=50, filled=True).encode(x=x, y=y, color=colour, opacity=shown, tooltip=tips)
    fit = (
        chart()
        .transform_filter("isValid(datum.fit)")
        .transform_calculate(y="datum.fit")
        .mark_line(strokeWidth=1.5, strokeDash=[5, 4])
        .encode(x=x, y=y, color=colour, opacity=shown)
    )
    return fit + points.add_params(picked)


def scaling_time() -> Drawing:
    """Time against N."""
    return _scaling("N", "time", TIME_AXIS, "format(datum.{0}, '.4s') + 's'")


def scaling_memory() -> Drawing:
    """Peak memory against tokens."""
    return _scaling("tokens", "peak MiB", "format(datum.value, ',')", "format(datum.{0}, ',.1f')")


def scaling_rate() -> Drawing:
    """Tokens a second against the batch."""
    return _scaling("batch", "tokens/s", "format(datum.value, '~s')", "format(datum.{0}, '.4s')")

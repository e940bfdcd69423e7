"""The charts, each defined once: interactive in the HTML report, and the same as SVG and PNG files.

A definition holds no data and no colour. Rows come by the name `rows`; colours come from a theme, which
is CSS variables in a page (so that dark mode and paper need no redrawing) and plain values in a file.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import altair as alt
import vl_convert

from assay.report.rows import Rows

__all__ = ["KINDS", "Theme", "definition", "height_px", "render", "theme"]

Spec = dict[str, Any]
Drawing = Any  # altair's chained methods do not keep the type of a chart
Theme = Literal["page", "paper"]

_PAPER = {
    "--ink": "#1c2330",
    "--soft": "#5b6675",
    "--line": "#e1e5ea",
    "--base": "#8a94a3",
    "--other": "#0b62b0",
    "--third": "#b8430e",
    "--fourth": "#00735c",
    "--fifth": "#8a5a00",
    "--sixth": "#9c1f5c",
    "--band": "#dfe4ea",
}
_ARMS = ("--base", "--other", "--third", "--fourth", "--fifth", "--sixth")
_WIDTH = 640  # of a chart in a file, pixels
_ROWS = {
    "ladder": ("label", 30),
    "attribution": ("label", 36),
    "launches": ("l", 24),
    "distribution": ("l", 34),
    "memory": ("phase", 34),
}
_HEIGHT = 200  # of a chart whose rows are not counted, pixels
_SCALED = ("scaling-time", "scaling-memory", "scaling-rate")
_TALL = {"roofline": 320, "timeline": 300, "lengths": 260, "batches": 260} | dict.fromkeys(_SCALED, 300)
_LEADING = "round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))"  # digit of a tick
_TIME_AXIS = "format(datum.value, '~s') + 's'"


def theme(name: Theme) -> Spec:
    """Vega-Lite configuration: every colour, font and stroke that the definitions leave open."""
    colour = {key: f"var({key})" if name == "page" else value for key, value in _PAPER.items()}
    family = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif" if name == "page" else "sans-serif"
    text = {
        "labelColor": colour["--soft"],
        "titleColor": colour["--soft"],
        "labelFontSize": 12,
        "titleFontSize": 12,
    }
    return {
        "background": "transparent" if name == "page" else "#ffffff",
        "font": family,
        "view": {"stroke": None},
        "axis": {
            **text,
            "domainColor": colour["--line"],
            "tickColor": colour["--line"],
            "gridColor": colour["--line"],
            "titleFontWeight": "normal",
            "labelOverlap": True,
        },
        "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
        "legend": {**text, "orient": "top", "title": None, "symbolStrokeWidth": 2, "offset": 6},
        "range": {"category": [colour[name] for name in _ARMS]},
        "style": {
            "band": {"color": colour["--band"]},
            "one": {"color": colour["--ink"], "strokeDash": [3, 3]},
            "ratio": {"color": colour["--other"], "strokeWidth": 2},
            "cloud": {"color": colour["--other"], "fillOpacity": 0.2},
            "dot": {"color": colour["--other"], "size": 70},
            "roof": {"color": colour["--ink"], "strokeWidth": 1.5},
            "floor": {"color": colour["--ink"], "strokeWidth": 1.5, "strokeDash": [5, 4]},
        },
    }


def _chart() -> alt.Chart:
    return alt.Chart(alt.NamedData("rows"))


def _seconds(field: str, axis: type[alt.X] | type[alt.Y], title: str) -> Any:
    """A time axis: seconds with SI prefixes, not from zero, since differences are the point."""
    scale = alt.Scale(zero=False, nice=True)
    return axis(f"{field}:Q", scale=scale, axis=alt.Axis(title=title, labelExpr=_TIME_AXIS, tickCount=5))


def _pick() -> alt.Parameter:
    """Picking an arm in the legend brings it out."""
    return alt.selection_point(name="pick", fields=["a"], bind="legend")


def _arm(pick: alt.Parameter) -> tuple[Any, Any]:
    """Colour by arm in the order of the rows, and the fading of arms that are not picked in the legend."""
    colour = alt.Color("a:N", sort=None)
    return colour, alt.condition(pick, alt.value(0.75), alt.value(0.08))


def _tip(field: str, title: str, pattern: str | None = None) -> alt.Tooltip:
    return alt.Tooltip(field, title=title, format=pattern) if pattern else alt.Tooltip(field, title=title)


def _spelled(*fields: str) -> dict[str, str]:
    """Calculated fields `<name>_text` that spell seconds with a unit, for tooltips."""
    return {f"{field}_text": f"format(datum.{field}, '.4s') + 's'" for field in fields}


_RATIO_TIPS = (_tip("ratio:Q", "ratio", ".4f"), _tip("low:Q", "low", ".4f"), _tip("high:Q", "high", ".4f"))


def _distribution() -> Drawing:
    """Every sample as a tick, a row an arm in each launch: shifts between launches stand out."""
    pick = _pick()
    colour, fading = _arm(pick)
    tips = [
        _tip("a:N", "arm"),
        _tip("l:O", "launch"),
        _tip("s_text:N", "time"),
        _tip("went:N", "in its block"),
    ]
    return (
        _chart()
        .transform_calculate(**_spelled("s"))
        .mark_tick(thickness=1.5, height=alt.RelativeBandSize(band=0.8))
        .encode(
            x=_seconds("s", alt.X, "time of a step"),
            y=alt.Y("l:O", axis=alt.Axis(title="launch", grid=False)),
            yOffset=alt.YOffset("a:N", sort=None),
            color=colour,
            opacity=fading,
            tooltip=tips,
        )
        .add_params(pick)
    )


def _cumulative() -> Drawing:
    """The share of samples at or below a time: whole distributions, tails included, without bins."""
    pick = _pick()
    colour, _ = _arm(pick)
    tips = [_tip("a:N", "arm"), _tip("s_text:N", "time"), _tip("share:Q", "samples at or below", ".0%")]
    return (
        _chart()
        .transform_window(share="cume_dist(s)", sort=[alt.SortField("s")], groupby=["a"])
        .transform_calculate(**_spelled("s"))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=_seconds("s", alt.X, "time of a step"),
            y=alt.Y("share:Q", axis=alt.Axis(title="share of samples", format=".0%", tickCount=5)),
            color=colour,
            opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
            tooltip=tips,
        )
        .add_params(pick)
    )


def _sequence() -> Drawing:
    """Samples in the order they were taken: drift shows as a slope, order effects as filled or hollow."""
    pick = _pick()
    colour, fading = _arm(pick)
    tips = [_tip("a:N", "arm"), _tip("n:Q", "block"), _tip("l:O", "launch"), _tip("s_text:N", "time")]
    tips += [_tip("went:N", "in its block")]
    shade = (
        _chart()
        .transform_filter("datum.l % 2 == 0")
        .transform_aggregate(x0="min(n)", x1="max(n)", groupby=["l"])
    )
    shade = shade.transform_calculate(x0="datum.x0 - 0.5", x1="datum.x1 + 0.5")
    points = (
        _chart()
        .transform_calculate(**_spelled("s"))
        .mark_point(size=22, strokeWidth=1.2)
        .encode(
            x=alt.X(
                "n:Q",
                axis=alt.Axis(title="block, launches shaded in turn", grid=False),
                scale=alt.Scale(nice=False),
            ),
            y=_seconds("s", alt.Y, "time of a step"),
            color=colour,
            fillOpacity=alt.condition("datum.went == 'first'", alt.value(1), alt.value(0)),
            fill=alt.Fill("a:N", sort=None, legend=None),
            opacity=fading,
            tooltip=tips,
        )
        .add_params(pick)
    )
    return shade.mark_rect(style="band", opacity=0.45).encode(x="x0:Q", x2="x1:Q") + points


def _band(*, across: bool) -> Drawing:
    """The margin within which times are called the same, and the line at 1."""
    rows = _chart().transform_aggregate(m0="min(m0)", m1="max(m1)")
    band = rows.mark_rect(style="band")
    one = rows.transform_calculate(one="1").mark_rule(style="one")
    if across:
        return band.encode(y="m0:Q", y2="m1:Q") + one.encode(y="one:Q")
    return band.encode(x="m0:Q", x2="m1:Q") + one.encode(x="one:Q")


def _narrowing() -> Drawing:
    """The ratio with its interval as blocks came in, against the margin."""
    ratio = alt.Y("low:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="ratio", tickCount=6))
    tips = [_tip("n:Q", "blocks"), *_RATIO_TIPS]
    blocks = alt.X(
        "n:Q", axis=alt.Axis(title="blocks so far", grid=False), scale=alt.Scale(nice=False, zero=False)
    )
    cloud = _chart().mark_area(style="cloud").encode(x=blocks, y=ratio, y2="high:Q", tooltip=tips)
    line = _chart().mark_line(style="ratio").encode(x=blocks, y="ratio:Q", tooltip=tips)
    return _band(across=True) + cloud + line


def _ladder() -> Drawing:
    """Ratios with their intervals, a row each, against the margin: right of it is faster."""
    tips = [_tip("label:N", "arm"), _tip("verdict:N", "verdict"), *_RATIO_TIPS]
    rung = alt.Y("label:N", sort=None, axis=alt.Axis(title=None, labelLimit=150))
    ratio = alt.X(
        "low:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="ratio to the baseline", tickCount=6)
    )
    bar = _chart().mark_rule(style="ratio", strokeWidth=3, strokeCap="round")
    dot = _chart().mark_point(style="dot", filled=True, opacity=1)
    bars = bar.encode(y=rung, x=ratio, x2="high:Q", tooltip=tips)
    return _band(across=False) + bars + dot.encode(y=rung, x="ratio:Q", tooltip=tips)


def _attribution() -> Drawing:
    """What an ingredient gives, added alone and left out alone: right of 1 it makes the step faster."""
    pick = _pick()
    colour, _ = _arm(pick)
    tips = [
        _tip("label:N", "ingredient"),
        _tip("a:N", "measured"),
        _tip("verdict:N", "verdict"),
        *_RATIO_TIPS,
    ]
    shared = {
        "y": alt.Y("label:N", sort=None, axis=alt.Axis(title=None, labelLimit=150)),
        "yOffset": alt.YOffset("a:N", sort=None),
        "color": colour,
        "opacity": alt.condition(pick, alt.value(1), alt.value(0.1)),
        "tooltip": tips,
    }
    ratio = alt.X(
        "from:Q",
        scale=alt.Scale(type="log", nice=False, padding=16),
        axis=alt.Axis(title="time without it / time with it", tickCount=6, format=".3~f"),
    )
    bars = _chart().mark_rule(strokeWidth=3, strokeCap="round").encode(x=ratio, x2="to:Q", **shared)
    dots = _chart().mark_point(filled=True, size=45).encode(x="ratio:Q", **shared)
    return _band(across=False) + bars + dots.add_params(pick)


def _launches() -> Drawing:
    """The mean ratio of each launch: what the verdict's interval is made of."""
    tips = [_tip("l:O", "launch"), _RATIO_TIPS[0]]
    ratio = alt.X(
        "ratio:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="mean ratio of a launch", tickCount=6)
    )
    dot = _chart().mark_point(style="dot", filled=True, opacity=1)
    dots = dot.encode(x=ratio, y=alt.Y("l:O", axis=alt.Axis(title="launch")), tooltip=tips)
    return _band(across=False) + dots


def _memory() -> Drawing:
    """Peak memory by phase and arm, from zero."""
    pick = _pick()
    colour, fading = _arm(pick)
    tips = [_tip("a:N", "arm"), _tip("phase:N", "phase"), _tip("mib:Q", "peak MiB", ",.1f")]
    return (
        _chart()
        .mark_bar(height=alt.RelativeBandSize(band=0.9), cornerRadiusEnd=2)
        .encode(
            x=alt.X("mib:Q", axis=alt.Axis(title="peak MiB", tickCount=4, format=",")),
            y=alt.Y("phase:N", sort=None, axis=alt.Axis(title=None)),
            yOffset=alt.YOffset("a:N", sort=None),
            color=colour,
            opacity=fading,
            tooltip=tips,
        )
        .add_params(pick)
    )


def _timeline() -> Drawing:
    """Memory against the time of one step, a line an arm; dashed, where its forward ends."""
    pick = _pick()
    colour, _ = _arm(pick)
    shown = alt.condition(pick, alt.value(1), alt.value(0.1))
    tips = [_tip("a:N", "policy"), _tip("x_text:N", "time"), _tip("mib:Q", "MiB", ",.1f")]
    line = (
        _chart()
        .transform_filter("isValid(datum.mib)")
        .transform_calculate(**_spelled("x"))
        .mark_line(interpolate="step-after", strokeWidth=1.5)
        .encode(
            x=alt.X("x:Q", axis=alt.Axis(title="time", labelExpr=_TIME_AXIS, tickCount=6)),
            y=alt.Y("mib:Q", axis=alt.Axis(title="MiB", tickCount=5, format=",")),
            color=colour,
            opacity=shown,
            order="x:Q",
            tooltip=tips,
        )
    )
    ends = (
        _chart()
        .transform_filter("isValid(datum.end)")
        .mark_rule(strokeDash=[5, 4], strokeWidth=1)
        .encode(x="end:Q", color=colour, opacity=shown)
    )
    return ends + line.add_params(pick)


def _laps() -> Drawing:
    """Time of each further token: a cache that copies itself shows as a slope."""
    pick = _pick()
    colour, _ = _arm(pick)
    tips = [_tip("a:N", "arm"), _tip("n:Q", "token"), _tip("s_text:N", "median")]
    tips += [_tip("low_text:N", "10%"), _tip("high_text:N", "90%")]
    rows = _chart().transform_calculate(**_spelled("s", "low", "high"))
    token = alt.X(
        "n:Q", axis=alt.Axis(title="further token", grid=False), scale=alt.Scale(nice=False, zero=False)
    )
    shown = alt.condition(pick, alt.value(1), alt.value(0.1))
    area = rows.mark_area().encode(
        x=token,
        y=_seconds("low", alt.Y, "time of a token"),
        y2="high:Q",
        color=colour,
        opacity=alt.value(0.2),
    )
    line = rows.mark_line(strokeWidth=2).encode(x=token, y="s:Q", color=colour, opacity=shown, tooltip=tips)
    return area + line.add_params(pick)


def _log(
    axis: type[alt.X] | type[alt.Y], field: str, title: str, label: str, base: int = 10, *, all_: bool = False
) -> Any:
    """A logarithmic axis; `label` spells a tick. Decimal ones are labelled at 1, 2 and 5, or all of them."""
    if base == 10 and not all_:
        label = f"indexof([1, 2, 5], {_LEADING}) < 0 ? '' : {label}"
    spelled = alt.Axis(title=title, tickCount=5, labelOverlap="greedy", labelExpr=label)
    scale = alt.Scale(type="log", base=base, nice=False, padding=10)
    return axis(f"{field}:Q", scale=scale, axis=spelled)


def _roofline() -> Drawing:
    """Achieved FLOP/s against FLOPs a byte under both roofs; a point an arm and phase."""
    pick = _pick()
    colour, fading = _arm(pick)
    x = _log(alt.X, "x", "FLOPs a byte", "format(datum.value, '~s')")
    y = _log(alt.Y, "y", "achieved FLOP/s", "format(datum.value, '~s')")
    roofs = (
        _chart()
        .transform_filter("isValid(datum.roof)")
        .transform_calculate(
            rate="datum.roof == 'memory' ? format(datum.y / datum.x, '.3s') + 'B/s' : "
            "format(datum.y, '.3s') + 'FLOP/s'"
        )
    )
    tips = [_tip("a:N", "arm"), _tip("phase:N", "phase"), _tip("x:Q", "FLOPs a byte", ".3s")]
    tips += [_tip("y:Q", "FLOP/s", ".3s"), _tip("mfu:Q", "MFU", ".1%"), _tip("mbu:Q", "MBU", ".1%")]
    tips += [_tip("bound:N", "bound by")]
    line = roofs.mark_line(style="roof").encode(
        x=x, y=y, detail="roof:N", tooltip=[_tip("roof:N", "roof"), _tip("rate:N", "measured")]
    )
    shape = alt.Shape("phase:N", sort=None)
    points = (
        _chart()
        .transform_filter("!isValid(datum.roof)")
        .mark_point(size=70, filled=True)
        .encode(x=x, y=y, color=colour, shape=shape, opacity=fading, tooltip=tips)
        .add_params(pick)
    )
    return line + points


def _sweep(x_title: str, y_title: str, tick: str, spelled: str) -> Drawing:
    """A line an arm on logarithmic axes, and what the floor allows, dashed."""
    pick = _pick()
    colour, _ = _arm(pick)
    x = _log(alt.X, "x", x_title, "format(datum.value, ',')", base=2)
    y = _log(alt.Y, "y", y_title, tick)
    rows = _chart().transform_calculate(y_text=spelled.format("y"), floor_text=spelled.format("floor"))
    tips = [_tip("a:N", "arm"), _tip("x:Q", x_title, ","), _tip("y_text:N", y_title)]
    tips += [_tip("floor_text:N", "at the floor")]
    line = rows.mark_line(strokeWidth=2, point=True).encode(
        x=x, y=y, color=colour, opacity=alt.condition(pick, alt.value(1), alt.value(0.1)), tooltip=tips
    )
    floor = (
        _chart()
        .transform_filter("isValid(datum.floor)")
        .transform_aggregate(y="min(floor)", groupby=["x"])
        .mark_line(style="floor")
        .encode(x=x, y=y)
    )
    return floor + line.add_params(pick)


def _lengths() -> Drawing:
    """Time against length."""
    return _sweep("tokens", "time", _TIME_AXIS, "isValid(datum.{0}) ? format(datum.{0}, '.4s') + 's' : '-'")


def _batches() -> Drawing:
    """Tokens a second against the batch."""
    tick = "format(datum.value, '~s')"
    return _sweep("batch", "tokens/s", tick, "isValid(datum.{0}) ? format(datum.{0}, '.4s') : '-'")


def _scaling(x_title: str, y_title: str, tick: str, spelled: str) -> Drawing:
    """Measured points on logarithmic axes, and each arm's fitted power law, dashed."""
    pick = _pick()
    colour, _ = _arm(pick)
    shown = alt.condition(pick, alt.value(1), alt.value(0.1))
    x = _log(alt.X, "x", x_title, "format(datum.value, ',')", base=2)
    y = _log(alt.Y, "y", y_title, tick, all_=True)
    tips = [_tip("a:N", "arm"), _tip("x:Q", x_title, ","), _tip("y_text:N", y_title)]
    tips += [_tip("law:N", "grows as")]
    rows = _chart().transform_calculate(y_text=spelled.format("y"))
    points = rows.mark_point(size=50, filled=True).encode(x=x, y=y, color=colour, opacity=shown, tooltip=tips)
    fit = (
        _chart()
        .transform_filter("isValid(datum.fit)")
        .transform_calculate(y="datum.fit")
        .mark_line(strokeWidth=1.5, strokeDash=[5, 4])
        .encode(x=x, y=y, color=colour, opacity=shown)
    )
    return fit + points.add_params(pick)


def _scaling_time() -> Drawing:
    """Time against N."""
    return _scaling("N", "time", _TIME_AXIS, "format(datum.{0}, '.4s') + 's'")


def _scaling_memory() -> Drawing:
    """Peak memory against tokens."""
    return _scaling("tokens", "peak MiB", "format(datum.value, ',')", "format(datum.{0}, ',.1f')")


def _scaling_rate() -> Drawing:
    """Tokens a second against the batch."""
    return _scaling("batch", "tokens/s", "format(datum.value, '~s')", "format(datum.{0}, '.4s')")


KINDS = {
    "ladder": _ladder,
    "attribution": _attribution,
    "launches": _launches,
    "narrowing": _narrowing,
    "distribution": _distribution,
    "cumulative": _cumulative,
    "sequence": _sequence,
    "laps": _laps,
    "memory": _memory,
    "timeline": _timeline,
    "roofline": _roofline,
    "lengths": _lengths,
    "batches": _batches,
    "scaling-time": _scaling_time,
    "scaling-memory": _scaling_memory,
    "scaling-rate": _scaling_rate,
}


def height_px(kind: str, rows: Rows) -> int:
    """A chart of rows is as high as it has rows; every other one has the same height."""
    if kind not in _ROWS:
        return _TALL.get(kind, _HEIGHT)
    field, step = _ROWS[kind]
    return step * len({row[field] for row in rows})


@functools.cache
def definition(kind: str, validate: bool = False) -> Spec:
    """The Vega-Lite definition of a kind of chart, as wide as its container, waiting for `rows`.

    Validation against the schema takes a fifth of a second a chart, so the tests do it, once for all.
    """
    with alt.utils.schemapi.debug_mode(validate):
        fit = alt.AutoSizeParams(type="fit-x", contains="padding")
        spec: Spec = KINDS[kind]().properties(width="container", autosize=fit).to_dict(validate=validate)
    return {key: value for key, value in spec.items() if key != "config"}


def render(kind: str, rows: Rows, title: str, file_format: Literal["svg", "png"]) -> bytes:
    """Draw a chart as a file, without a browser and without the network."""
    size = {"width": _WIDTH, "height": height_px(kind, rows), "padding": 12}
    spec = {**definition(kind), **size, "title": title, "datasets": {"rows": rows}}
    config = theme("paper")
    if file_format == "svg":
        return vl_convert.vegalite_to_svg(spec, config=config, allowed_base_urls=[]).encode()
    return vl_convert.vegalite_to_png(spec, config=config, allowed_base_urls=[], scale=2)

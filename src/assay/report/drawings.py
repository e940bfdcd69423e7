"""How samples, ratios and memory of a comparison are drawn, one function for a chart."""

from __future__ import annotations

import altair as alt

from assay.report.encodings import TIME_AXIS, Drawing, arm, chart, pick, seconds, spelled, tip

__all__ = [
    "attribution",
    "cumulative",
    "distribution",
    "ladder",
    "laps",
    "launches",
    "memory",
    "narrowing",
    "sequence",
    "timeline",
]

_RATIO_TIPS = (tip("ratio:Q", "ratio", ".4f"), tip("low:Q", "low", ".4f"), tip("high:Q", "high", ".4f"))


def distribution() -> Drawing:
    """Every sample as a tick, a row an arm in each launch: shifts between launches stand out."""
    picked = pick()
    colour, fading = arm(picked)
    tips = [
        tip("a:N", "arm"),
        tip("l:O", "launch"),
        tip("s_text:N", "time"),
        tip("went:N", "in its block"),
    ]
    return (
        chart()
        .transform_calculate(**spelled("s"))
        .mark_tick(thickness=1.5, height=alt.RelativeBandSize(band=0.8))
        .encode(
            x=seconds("s", alt.X, "time of a step"),
            y=alt.Y("l:O", axis=alt.Axis(title="launch", grid=False)),
            yOffset=alt.YOffset("a:N", sort=None),
            color=colour,
            opacity=fading,
            tooltip=tips,
        )
        .add_params(picked)
    )


def cumulative() -> Drawing:
    """The share of samples at or below a time: whole distributions, tails included, without bins."""
    picked = pick()
    colour, _ = arm(picked)
    tips = [tip("a:N", "arm"), tip("s_text:N", "time"), tip("share:Q", "samples at or below", ".0%")]
    return (
        chart()
        .transform_window(share="cume_dist(s)", sort=[alt.SortField("s")], groupby=["a"])
        .transform_calculate(**spelled("s"))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=seconds("s", alt.X, "time of a step"),
            y=alt.Y("share:Q", axis=alt.Axis(title="share of samples", format=".0%", tickCount=5)),
            color=colour,
            opacity=alt.condition(picked, alt.value(1), alt.value(0.1)),
            tooltip=tips,
        )
        .add_params(picked)
    )


def sequence() -> Drawing:
    """Samples in the order they were taken: drift shows as a slope, order effects as filled or hollow."""
    picked = pick()
    colour, fading = arm(picked)
    tips = [tip("a:N", "arm"), tip("n:Q", "block"), tip("l:O", "launch"), tip("s_text:N", "time")]
    tips += [tip("went:N", "in its block")]
    shade = (
        chart()
        .transform_filter("datum.l % 2 == 0")
        .transform_aggregate(x0="min(n)", x1="max(n)", groupby=["l"])
    )
    shade = shade.transform_calculate(x0="datum.x0 - 0.5", x1="datum.x1 + 0.5")
    points = (
        chart()
        .transform_calculate(**spelled("s"))
        .mark_point(size=22, strokeWidth=1.2)
        .encode(
            x=alt.X(
                "n:Q",
                axis=alt.Axis(title="block, launches shaded in turn", grid=False),
                scale=alt.Scale(nice=False),
            ),
            y=seconds("s", alt.Y, "time of a step"),
            color=colour,
            fillOpacity=alt.condition("datum.went == 'first'", alt.value(1), alt.value(0)),
            fill=alt.Fill("a:N", sort=None, legend=None),
            opacity=fading,
            tooltip=tips,
        )
        .add_params(picked)
    )
    return shade.mark_rect(style="band", opacity=0.45).encode(x="x0:Q", x2="x1:Q") + points


def _band(*, across: bool) -> Drawing:
    """The margin within which times are called the same, and the line at 1."""
    rows = chart().transform_aggregate(m0="min(m0)", m1="max(m1)")
    band = rows.mark_rect(style="band")
    one = rows.transform_calculate(one="1").mark_rule(style="one")
    if across:
        return band.encode(y="m0:Q", y2="m1:Q") + one.encode(y="one:Q")
    return band.encode(x="m0:Q", x2="m1:Q") + one.encode(x="one:Q")


def narrowing() -> Drawing:
    """The ratio with its interval as blocks came in, against the margin."""
    ratio = alt.Y("low:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="ratio", tickCount=6))
    tips = [tip("n:Q", "blocks"), *_RATIO_TIPS]
    blocks = alt.X(
        "n:Q", axis=alt.Axis(title="blocks so far", grid=False), scale=alt.Scale(nice=False, zero=False)
    )
    cloud = chart().mark_area(style="cloud").encode(x=blocks, y=ratio, y2="high:Q", tooltip=tips)
    line = chart().mark_line(style="ratio").encode(x=blocks, y="ratio:Q", tooltip=tips)
    return _band(across=True) + cloud + line


def ladder() -> Drawing:
    """Ratios with their intervals, a row each, against the margin: right of it is faster."""
    tips = [tip("label:N", "arm"), tip("verdict:N", "verdict"), *_RATIO_TIPS]
    rung = alt.Y("label:N", sort=None, axis=alt.Axis(title=None, labelLimit=150))
    ratio = alt.X(
        "low:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="ratio to the baseline", tickCount=6)
    )
    bar = chart().mark_rule(style="ratio", strokeWidth=3, strokeCap="round")
    dot = chart().mark_point(style="dot", filled=True, opacity=1)
    bars = bar.encode(y=rung, x=ratio, x2="high:Q", tooltip=tips)
    return _band(across=False) + bars + dot.encode(y=rung, x="ratio:Q", tooltip=tips)


def attribution() -> Drawing:
    """What an ingredient gives, added alone and left out alone: right of 1 it makes the step faster."""
    picked = pick()
    colour, _ = arm(picked)
    tips = [
        tip("label:N", "ingredient"),
        tip("a:N", "measured"),
        tip("verdict:N", "verdict"),
        *_RATIO_TIPS,
    ]
    shared = {
        "y": alt.Y("label:N", sort=None, axis=alt.Axis(title=None, labelLimit=150)),
        "yOffset": alt.YOffset("a:N", sort=None),
        "color": colour,
        "opacity": alt.condition(picked, alt.value(1), alt.value(0.1)),
        "tooltip": tips,
    }
    ratio = alt.X(
        "from:Q",
        scale=alt.Scale(type="log", nice=False, padding=16),
        axis=alt.Axis(title="time without it / time with it", tickCount=6, format=".3~f"),
    )
    bars = chart().mark_rule(strokeWidth=3, strokeCap="round").encode(x=ratio, x2="to:Q", **shared)
    dots = chart().mark_point(filled=True, size=45).encode(x="ratio:Q", **shared)
    return _band(across=False) + bars + dots.add_params(picked)


def launches() -> Drawing:
    """The mean ratio of each launch: what the verdict's interval is made of."""
    tips = [tip("l:O", "launch"), _RATIO_TIPS[0]]
    ratio = alt.X(
        "ratio:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="mean ratio of a launch", tickCount=6)
    )
    dot = chart().mark_point(style="dot", filled=True, opacity=1)
    dots = dot.encode(x=ratio, y=alt.Y("l:O", axis=alt.Axis(title="launch")), tooltip=tips)
    return _band(across=False) + dots


def memory() -> Drawing:
    """Peak memory by phase and arm, from zero."""
    picked = pick()
    colour, fading = arm(picked)
    tips = [tip("a:N", "arm"), tip("phase:N", "phase"), tip("mib:Q", "peak MiB", ",.1f")]
    return (
        chart()
        .mark_bar(height=alt.RelativeBandSize(band=0.9), cornerRadiusEnd=2)
        .encode(
            x=alt.X("mib:Q", axis=alt.Axis(title="peak MiB", tickCount=4, format=",f")),
            y=alt.Y("phase:N", sort=None, axis=alt.Axis(title=None)),
            yOffset=alt.YOffset("a:N", sort=None),
            color=colour,
            opacity=fading,
            tooltip=tips,
        )
        .add_params(picked)
    )


def timeline() -> Drawing:
    """Memory against the time of one step, a line an arm; dashed, where its forward ends."""
    picked = pick()
    colour, _ = arm(picked)
    shown = alt.condition(picked, alt.value(1), alt.value(0.1))
    tips = [tip("a:N", "policy"), tip("x_text:N", "time"), tip("mib:Q", "MiB", ",.1f")]
    line = (
        chart()
        .transform_filter("isValid(datum.mib)")
        .transform_calculate(**spelled("x"))
        .mark_line(interpolate="step-after", strokeWidth=1.5)
        .encode(
            x=alt.X("x:Q", axis=alt.Axis(title="time", labelExpr=TIME_AXIS, tickCount=6)),
            y=alt.Y("mib:Q", axis=alt.Axis(title="MiB", tickCount=5, format=",f")),
            color=colour,
            opacity=shown,
            order="x:Q",
            tooltip=tips,
        )
    )
    ends = (
        chart()
        .transform_filter("isValid(datum.end)")
        .mark_rule(strokeDash=[5, 4], strokeWidth=1)
        .encode(x="end:Q", color=colour, opacity=shown)
    )
    return ends + line.add_params(picked)


def laps() -> Drawing:
    """Time of each further token: a cache that copies itself shows as a slope."""
    picked = pick()
    colour, _ = arm(picked)
    tips = [tip("a:N", "arm"), tip("n:Q", "token"), tip("s_text:N", "median")]
    tips += [tip("low_text:N", "10%"), tip("high_text:N", "90%")]
    rows = chart().transform_calculate(**spelled("s", "low", "high"))
    token = alt.X(
        "n:Q", axis=alt.Axis(title="further token", grid=False), scale=alt.Scale(nice=False, zero=False)
    )
    shown = alt.condition(picked, alt.value(1), alt.value(0.1))
    area = rows.mark_area().encode(
        x=token,
        y=seconds("low", alt.Y, "time of a token"),
        y2="high:Q",
        color=colour,
        opacity=alt.value(0.2),
    )
    line = rows.mark_line(strokeWidth=2).encode(x=token, y="s:Q", color=colour, opacity=shown, tooltip=tips)
    return area + line.add_params(picked)

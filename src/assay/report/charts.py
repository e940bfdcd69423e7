"""The charts, each defined once: interactive in the HTML report, and the same as SVG and PNG files.

A definition holds no data and no colour. Rows come by the name `rows`; colours come from theme.py, as CSS
variables in a page, so that dark mode and paper need no redrawing. drawings.py and curves.py draw the kinds.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import altair as alt
import vl_convert

from assay.report import curves, drawings
from assay.report.rows import Rows
from assay.report.theme import theme

__all__ = ["KINDS", "definition", "height_px", "render"]

Spec = dict[str, Any]

KINDS = {
    "ladder": drawings.ladder,
    "attribution": drawings.attribution,
    "launches": drawings.launches,
    "narrowing": drawings.narrowing,
    "distribution": drawings.distribution,
    "cumulative": drawings.cumulative,
    "sequence": drawings.sequence,
    "laps": drawings.laps,
    "memory": drawings.memory,
    "timeline": drawings.timeline,
    "roofline": curves.roofline,
    "lengths": curves.lengths,
    "batches": curves.batches,
    "scaling-time": curves.scaling_time,
    "scaling-memory": curves.scaling_memory,
    "scaling-rate": curves.scaling_rate,
}
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

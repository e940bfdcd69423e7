"""The colours, fonts and strokes of the charts: CSS variables in a page, plain values in a file."""

from __future__ import annotations

from typing import Any, Literal

__all__ = ["Theme", "theme"]

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


def theme(name: Theme) -> dict[str, Any]:
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

"""The report as one self-contained HTML file: it opens without a network, on a phone and on paper.

The page's own policy forbids every request and every script but its two, so that a hostile name in a
record can neither run nor call home. Charts are drawn by the bundled Vega-Lite, one copy, without eval.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

import msgspec

from assay.errors import AssayError
from assay.measure.record import Record
from assay.measure.verdict import Comparison
from assay.report import attribution, charts, facts, words
from assay.report.figures import (
    Figure,
    comparison_figures,
    ladder,
    overview,
    points_for,
    roofline,
    sweep_figures,
)
from assay.report.markup import Safe, element, join, table
from assay.report.suite import (
    FINDING_HEADERS,
    FINDING_NUMBERS,
    SCALING_HEADERS,
    SCALING_NUMBERS,
    Page,
    Section,
    finding_cells,
    scaling_cells,
    scaling_rows,
)
from assay.report.sweeps import Sweep, sweeps
from assay.report.theme import theme
from assay.report.view import (
    CaseView,
    case_views,
    environments,
    failures_of,
    gate_rows,
    telemetry,
    warnings_of,
)

__all__ = ["Bundle", "render_html"]

_MARKS = {"faster": "▲ ", "slower": "▼ ", "same": "= ", "unknown": "? ", "no ratio": "✕ "}
_SWEEPS = "Over lengths and batch sizes"
_CARDS = 12  # verdicts shown as cards; more become a plain list
_OPEN = 12  # cases shown opened; of more, each opens on demand
_CHARTED = 200  # comparisons with charts; of more, the rest have their tables


class Bundle:
    """The chart library's script. Making it takes two seconds of one core, so another process does.

    Start it before reading the records, and hand it to `render_html`. Nothing is kept on disk.
    """

    def __init__(self) -> None:
        program = "import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle().encode())"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],  # -P: the user's folder may hold a module of any name
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def script(self) -> str:
        """Wait for the script. Raises AssayError where it could not be made. May be called once."""
        script, complaint = self._process.communicate()
        if self._process.returncode:
            raise AssayError(f"vl-convert could not bundle the chart library: {complaint.decode()[-300:]}")
        return script.decode()


def render_html(
    records: Sequence[Record],
    comparisons: Sequence[Comparison],
    bundle: Bundle | None = None,
    page: Page | None = None,
) -> str:
    """Return the whole report, after a suite's page where there is one.

    `bundle` may have been started earlier, to save time.
    """
    bundle = bundle or Bundle()
    views = case_views(records, comparisons)
    swept = sweeps(views)
    figures: list[Figure] = []
    points = points_for(min(len(comparisons), _CHARTED))
    charted = {id(c): points for c in [c for c in comparisons if c.interval][:_CHARTED]}
    main = join(
        [
            *(_page(page, figures) if page else ()),
            _verdicts(views, figures),
            *(_case(view, figures, charted, len(views)) for view in views),
            _sweeps(swept, figures),
            _method(views),
            _environment(records),
            _configuration(records),
            _ids(views),
        ]
    )
    body = element(
        "div",
        _top(records, views, page),
        element("div", _contents(views, swept, page), element("main", main), attributes={"class": "columns"}),
        attributes={"class": "page"},
    )
    return _document(f"Assay: {page.title}" if page else _title(views), body, _data(figures), bundle.script())


# The frame


def _document(title: str, body: Safe, data: str, library: str) -> str:
    scripts = (library, _resource("page.js"))
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    nothing_else = "base-uri 'none'; form-action 'none'"
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; {nothing_else}"
    head = [
        Safe('<meta charset="utf-8">'),
        Safe(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Safe('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Safe(_resource("page.css"))),
    ]
    tail = [
        element("script", Safe(data), attributes={"type": "application/json", "id": "data"}),
        *(element("script", Safe(script)) for script in scripts),
    ]
    page = element("html", element("head", *head), element("body", body, *tail), attributes={"lang": "en"})
    return f"<!doctype html>\n{page}\n"


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _resource(name: str) -> str:
    return resources.files("assay.report").joinpath(name).read_text(encoding="utf-8")


def _data(figures: Iterable[Figure]) -> str:
    """What the page's script draws from: every definition once, all rows once. Never ends a script."""
    figures = list(figures)
    payload = {
        "config": theme("page"),
        "specs": {kind: charts.definition(kind) for kind in dict.fromkeys(f.kind for f in figures)},
        "rows": {f.key: f.rows for f in figures},
    }
    return msgspec.json.encode(payload).decode().replace("<", "\\u003c")


def _title(views: Sequence[CaseView]) -> str:
    first = next((c for view in views for c in view.headlines), None)
    return f"Assay: {words.sentence(first)}" if first else "Assay report"


def _top(records: Sequence[Record], views: Sequence[CaseView], page: Page | None) -> Safe:
    runs = ", ".join(dict.fromkeys(r.run for r in records))
    begun = min((r.started for r in records), default="")
    devices = dict.fromkeys(r.environment.device or r.environment.cpu for r in records if r.environment)
    size = f"{words.count(len(views), 'case')}, {words.count(len(records), 'record')}"
    facts_line = " · ".join(part for part in (begun, ", ".join(devices), size) if part)
    return element(
        "header",
        element("h1", page.title if page else "Assay report"),
        element("p", facts_line, attributes={"class": "soft"}),
        element("p", "Run ", element("code", runs), attributes={"class": "soft small"}),
        attributes={"class": "top"},
    )


def _contents(views: Sequence[CaseView], swept: Sequence[Sweep], page: Page | None) -> Safe:
    cases = [_entry(f"#{view.case.id}", view.case.workload, words.case_details(view.case)) for view in views]
    rest = (
        *((("#sweeps", _SWEEPS),) if swept else ()),
        ("#method", "How it was measured"),
        ("#environment", "Where it was measured"),
        ("#configuration", "Configuration"),
        ("#records", "Records"),
    )
    front = [("#kpis", "KPIs"), *((f"#{s.anchor}", s.title) for s in page.sections)] if page else []
    entries = [_entry(place, name) for place, name in front]
    entries += [_entry("#verdicts", "Verdicts"), *cases, *(_entry(place, name) for place, name in rest)]
    opened = {"open": ""} if len(entries) <= _OPEN else {}
    inside = element("details", element("summary", "Contents"), element("ul", *entries), attributes=opened)
    return element("nav", inside, attributes={"aria-label": "Contents"})


def _entry(place: str, name: str, details: str = "") -> Safe:
    small = element("small", details) if details else ""
    return element("li", element("a", name, attributes={"href": place}), small)


def _section(anchor: str, title: str, *children: object) -> Safe:
    heading = element("h2", title)
    return element("section", heading, *children, attributes={"id": anchor})


def _figures(figures: Sequence[Figure], shown: list[Figure]) -> Safe:
    """The places of charts; their definitions and rows go to the page's data through `shown`."""
    shown.extend(figures)
    return element("div", *map(_figure, figures), attributes={"class": "figures"}) if figures else Safe("")


def _figure(figure: Figure) -> Safe:
    height = str(charts.height_px(figure.kind, figure.rows))
    plot = {
        "class": "plot",
        "data-kind": figure.kind,
        "data-rows": figure.key,
        "data-height": height,
        "role": "img",
    }
    return element(
        "figure",
        element("h4", figure.title),
        element("figcaption", figure.caption),
        element("div", attributes={**plot, "aria-label": f"{figure.title}. {figure.caption}"}),
    )


# A suite's page


def _page(page: Page, shown: list[Figure]) -> list[Safe]:
    """The KPIs, then every section of the suite."""
    said = [element("p", line) for line in (page.headline, *page.said)]
    status = FINDING_HEADERS.index("status")
    cells = [
        [
            element("span", c, attributes={"class": "bad"}) if i == status and c in ("FAILED", "ERROR") else c
            for i, c in enumerate(line)
        ]
        for line in finding_cells(page.findings)
    ]
    kpis = _section("kpis", "KPIs", *said, table(FINDING_HEADERS, cells, FINDING_NUMBERS))
    return [kpis, *(_part(section, shown) for section in page.sections)]


def _part(section: Section, shown: list[Figure]) -> Safe:
    said = [element("p", line, attributes={"class": "soft small"}) for line in section.said]
    inside = [*said, table(section.headers, section.rows, section.numbers) if section.rows else ""]
    if section.scaling and (drawn := scaling_rows(section.scaling)):
        scaling = section.scaling
        figure = Figure(
            kind=scaling.kind, key=scaling.key, title=scaling.title, caption=scaling.caption, rows=drawn
        )
        inside += [
            table(SCALING_HEADERS, scaling_cells(scaling), SCALING_NUMBERS),
            _figures([figure], shown),
        ]
    inside += [_figures(section.figures, shown)]
    return _section(section.anchor, section.title, *inside)


# The verdicts


def _verdicts(views: Sequence[CaseView], shown: list[Figure]) -> Safe:
    items = [_verdict(view, c) for view in views for c in view.headlines]
    many = " many" if len(items) > _CARDS else ""
    rest = sum(c.interval is not None for view in views for c in view.comparisons) - _CHARTED
    note = (
        f"Charts are drawn for the first {_CHARTED} ratios; {rest:,} more have their tables."
        if rest > 0
        else ""
    )
    listed = element("ul", *items, attributes={"class": f"verdicts{many}"}) if items else ""
    return _section(
        "verdicts", "Verdicts", listed, element("p", note) if note else "", _figures(overview(views), shown)
    )


def _verdict(view: CaseView, comparison: Comparison) -> Safe:
    word = words.verdict_word(comparison)
    kind = word.partition(" (")[0]
    case = element("a", view.case.workload, attributes={"href": f"#{view.case.id}"})
    return element(
        "li",
        element("span", _MARKS[kind], word, attributes={"class": "chip"}),
        element("p", element("strong", words.sentence(comparison))),
        element("p", case, " ", words.case_details(view.case), attributes={"class": "params"}),
        attributes={"class": f"verdict {'refused' if kind == 'no ratio' else kind}"},
    )


# A case


def _case(view: CaseView, shown: list[Figure], charted: Mapping[int, int], cases: int) -> Safe:
    arms = table(facts.ARM_HEADERS, facts.arm_cells(view), facts.ARM_NUMBERS)
    ceilings = facts.ceilings(view)
    shares = f"MFU, MBU: share of the ceilings measured on this machine ({ceilings})." if ceilings else ""
    inside = [
        arms,
        element("p", shares, attributes={"class": "soft small"}) if shares else "",
        _figures(ladder(view), shown),
        *(_comparison(view, c, shown, charted.get(id(c), 0)) for c in view.headlines),
        _attribution(view, shown, charted),
        _phases(view),
        _roofline(view, shown, charted),
        _gate(view),
        _errors(view),
        _failures(view),
        _warnings(view),
    ]
    details = element("p", words.case_details(view.case), attributes={"class": "params"})
    if cases > _OPEN:
        inside = [element("details", element("summary", "Evidence"), *inside[1:])]
        inside.insert(0, arms)
    return _section(view.case.id, view.case.workload, details, *inside)


def _attribution(view: CaseView, shown: list[Figure], charted: Mapping[int, int]) -> Safe:
    """What each ingredient gives; the pairs behind it open on demand."""
    cells = attribution.cells(view)
    if not cells:
        return Safe("")
    said = [element("p", line, attributes={"class": "soft small"}) for line in attribution.remarks(view)]
    pairs = [_comparison(view, c, shown, charted.get(id(c), 0)) for c in view.comparisons if not c.headline]
    return join(
        [
            element("h3", "Attribution"),
            table(attribution.HEADERS, cells, attribution.NUMBERS),
            *said,
            _figures(attribution.figures(view), shown),
            element("details", element("summary", "Pair by pair"), *pairs),
        ]
    )


def _comparison(view: CaseView, comparison: Comparison, shown: list[Figure], points: int) -> Safe:
    noise = words.noise_sentence(comparison.noise) if comparison.noise else ""
    return join(
        [
            element("h3", f"{comparison.other} against {comparison.baseline}"),
            element("p", words.sentence(comparison)),
            element("p", noise, attributes={"class": "soft small"}) if noise else "",
            _figures(comparison_figures(view, comparison, points) if points else [], shown),
        ]
    )


def _phases(view: CaseView) -> Safe:
    cells = facts.phase_cells(view)
    if not cells:
        return Safe("")
    return join([element("h3", "Phases"), table(facts.PHASE_HEADERS, cells, facts.PHASE_NUMBERS)])


def _roofline(view: CaseView, shown: list[Figure], charted: Mapping[int, int]) -> Safe:
    """Every phase against this machine's ceilings; the chart for cases that have charts."""
    points = facts.roof_points(view)
    if not points:
        return Safe("")
    drawn = not view.comparisons or any(id(c) in charted for c in view.comparisons)
    return join(
        [
            element("h3", "Roofline"),
            element("p", facts.roof_words(points), attributes={"class": "soft small"}),
            table(facts.ROOF_HEADERS, facts.roof_cells(points), facts.ROOF_NUMBERS),
            _figures(roofline(view) if drawn else [], shown),
        ]
    )


def _gate(view: CaseView) -> Safe:
    rows = [row for arm in view.arms for row in gate_rows(arm)]
    if not rows:
        return Safe("")
    place = facts.GATE_HEADERS.index("gate")
    cells = [
        [
            element("span", c, attributes={"class": "bad"}) if i == place and row.failed else c
            for i, c in enumerate(line)
        ]
        for row, line in zip(rows, facts.gate_cells(rows), strict=True)
    ]
    said = element("p", " ".join(facts.gate_words(view)), attributes={"class": "soft small"})
    return join(
        [element("h3", "Gate: the same work"), said, table(facts.GATE_HEADERS, cells, facts.GATE_NUMBERS)]
    )


def _errors(view: CaseView) -> Safe:
    cells = facts.error_cells(view)
    if not cells:
        return Safe("")
    said = element("p", facts.ERROR_WORDS, attributes={"class": "soft small"})
    shown = table(facts.ERROR_HEADERS, cells, facts.ERROR_NUMBERS)
    return join([element("h3", "Errors against the oracle"), said, shown])


def _failures(view: CaseView) -> Safe:
    failed = [
        element("li", element("strong", arm), ": ", words.outcome(o.status, o.launches, o.reason))
        for arm, o in failures_of(view)
    ]
    left = [element("li", line) for c in view.comparisons for line in c.left_out]
    return _list("What failed", "failures", [*failed, *left])


def _warnings(view: CaseView) -> Safe:
    found = warnings_of(view.records)
    said = [f"{w.text} ({', '.join(w.arms)}; {words.count(w.records, 'record')})" for w in found]
    return _list("Warnings", "warnings", [element("li", line) for line in said])


def _list(title: str, kind: str, items: Sequence[Safe]) -> Safe:
    if not items:
        return Safe("")
    return join([element("h3", title), element("ul", *items, attributes={"class": kind})])


# Over lengths and batch sizes


def _sweeps(swept: Sequence[Sweep], shown: list[Figure]) -> Safe:
    """What varies with the length or the batch alone, a table and charts each."""
    parts = [
        join(
            [
                element("h3", sweep.title),
                element("p", sweep.details, attributes={"class": "params"}),
                table(facts.sweep_headers(sweep), facts.sweep_cells(sweep), facts.sweep_numbers(sweep)),
                _figures(sweep_figures(sweep), shown),
            ]
        )
        for sweep in swept
    ]
    return _section("sweeps", _SWEEPS, *parts) if parts else Safe("")


# The end matter


def _method(views: Sequence[CaseView]) -> Safe:
    """Cases that were measured alike share one table."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for view in views:
        if found := tuple(facts.method_rows(view)):
            alike.setdefault(found, []).append(str(view.case))
    parts = [
        join([element("p", "; ".join(cases), attributes={"class": "params"}), table(("what", "how"), found)])
        for found, cases in alike.items()
    ]
    return _section("method", "How it was measured", *parts)


def _environment(records: Sequence[Record]) -> Safe:
    parts = [
        join(
            [element("h3", f"Arms: {', '.join(arms)}"), table(("what", "value"), facts.environment_rows(env))]
        )
        for env, arms in environments(records)
    ]
    seen = telemetry(records)
    extra = [element("h3", "Seen while measuring"), table(("what", "value"), seen)] if seen else []
    return _section("environment", "Where it was measured", *parts, *extra)


def _configuration(records: Sequence[Record]) -> Safe:
    parts = [
        join([element("p", "Hash ", element("code", digest)), element("pre", _json(config))])
        for digest, config in facts.configurations(records)
    ]
    return _section("configuration", "Configuration", *parts)


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


def _ids(views: Sequence[CaseView]) -> Safe:
    rows = [
        (arm.name, str(view.case), element("code", " ".join(r.id for r in arm.records)))
        for view in views
        for arm in view.arms
    ]
    inside = table(("arm", "case", "records by launch"), rows)
    return _section("records", "Records", element("details", element("summary", "Show their ids"), inside))

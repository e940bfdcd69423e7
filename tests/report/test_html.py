import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import msgspec
import pytest

from assay.errors import AssayError
from assay.measure.record import Arm
from assay.report.html import Bundle, render_html
from assay.report.markup import Safe, element, table
from tests.report.fixtures import BASELINE, Finished, case_of, compared, finished, pair

HOSTILE = "<img src=http://evil.example/x onerror=alert(1)></script><script>alert(2)</script>"


class Page(HTMLParser):
    """What a page is made of, without what its scripts and styles say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.text: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style"):
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.inside[self._open][-1] += data
        else:
            self.text.append(data)


class Quick(Bundle):
    """A bundle that draws nothing, for tests that do not look at charts."""

    def __init__(self) -> None:
        pass

    def script(self) -> str:
        return "/* no charts */"


def render(run: Finished) -> str:
    return render_html(run.records, run.comparisons, Quick())


@pytest.fixture(scope="module")
def whole() -> str:
    run = finished()
    return render_html(run.records, run.comparisons)


def test_nothing_is_loaded_from_anywhere(whole: str) -> None:
    page = Page(whole)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "data", "action", "poster", "background"), (tag, name)
            assert name != "href" or (value or "").startswith("#")
    for style in page.inside["style"]:
        assert not re.search(r"@import|url\s*\(|https?:", style)


def test_policy_forbids_requests_and_allows_two_scripts_by_their_hash(whole: str) -> None:
    page = Page(whole)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    data, *scripts = page.inside["script"]
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert json.loads(data).keys() == {"config", "specs", "rows"}


def test_the_chart_library_is_there_once(whole: str) -> None:
    assert sum("vegaEmbed=" in script for script in Page(whole).inside["script"]) == 1


def test_every_chart_has_its_definition_and_rows(whole: str) -> None:
    page = Page(whole)
    data = json.loads(page.inside["script"][0])
    plots = [a for _, a in page.tags if a.get("class") == "plot"]
    assert (
        {a["data-kind"] for a in plots}
        == set(data["specs"])
        >= {"narrowing", "distribution", "memory", "laps"}
    )
    assert {a["data-rows"] for a in plots} == set(data["rows"])
    assert all(data["rows"].values())


def test_verdicts_come_first_and_contents_reach_every_section(whole: str) -> None:
    page = Page(whole)
    text = " ".join(page.text)
    assert text.index("fused is 1.40x faster than eager") < text.index("Samples by launch")
    targets = {a["id"] for _, a in page.tags if "id" in a}
    assert {(a["href"] or "")[1:] for tag, a in page.tags if tag == "a"} <= targets
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_method_environment_gate_configuration_and_ids_are_told(whole: str) -> None:
    text = " ".join(Page(whole).text)
    for said in (
        "the baseline went first in 25 of 50 blocks",
        "10 to 14 steps, steady",
        "2.13.0+cpu",
        "Oracle: eager in float64",
        "copy 21.3 GB/s",
        '"compile_mode": "default"',
        finished().records[0].id,
    ):
        assert said in text, said


def test_hostile_names_are_text() -> None:
    run = finished(launches=2, blocks=4)
    records = [
        msgspec.structs.replace(
            r,
            arm=Arm(name=HOSTILE, target="x") if r.arm.name == "fused" else r.arm,
            other=HOSTILE if r.other == "fused" else r.other,
            warnings=[HOSTILE],
            config={HOSTILE: HOSTILE},
            reason=HOSTILE,
            run=HOSTILE,
        )
        for r in run.records
    ]
    odd = [msgspec.structs.replace(c, other=HOSTILE) if c.other == "fused" else c for c in run.comparisons]
    page = Page(render(Finished(tuple(records), tuple(odd))))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len(page.inside["script"]) == 3
    assert HOSTILE in " ".join(page.text)
    assert any(
        row.get("a") == HOSTILE
        for rows in json.loads(page.inside["script"][0])["rows"].values()
        for row in rows
    )


def test_many_cases_are_folded_and_thinned() -> None:
    records, comparisons = [], []
    for seed in range(30):
        case = msgspec.structs.replace(case_of("infer"), seed=seed)
        made = pair(case, 2, 4, seed=seed)
        records += made
        comparisons.append(compared(case, made, 2, 4))
    page = Page(render(Finished(tuple(records), tuple(comparisons))))
    assert sum(tag == "summary" for tag, _ in page.tags) == 32  # contents, ids and thirty cases
    assert any(a.get("class") == "verdicts many" for _, a in page.tags)


def test_single_arm_without_comparison_makes_a_page() -> None:
    alone = [
        msgspec.structs.replace(r, other=BASELINE)
        for r in pair(case_of("infer"), 1, 4)
        if r.arm.name == BASELINE
    ]
    assert "eager" in " ".join(Page(render(Finished(tuple(alone), ()))).text)


def test_nothing_measured_makes_a_page() -> None:
    assert "Assay report" in render(Finished((), ()))


def test_bundle_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(AssayError, match="could not bundle"):
        Bundle().script()


def test_markup_escapes_everything_but_its_own() -> None:
    assert element("p", "<", Safe("<b>"), attributes={"title": '"<'}) == '<p title="&quot;&lt;">&lt;<b></p>'
    assert "<td>&lt;i&gt;</td>" in table(("a", "b"), [("x", "<i>")])
    assert table(("a",), []) == ""

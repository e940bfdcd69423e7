"""The report in a real browser: charts drawn, nothing requested, nothing wider than a phone, printable."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs playwright: pip install 'assay[dev]'")
from playwright.sync_api import Browser, Page, sync_playwright

from assay.report.html import render_html
from tests.report.fixtures import finished

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = finished()
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_html(run.records, run.comparisons), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--headless"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


class Watched:
    """An open report and what it said and asked for."""

    def __init__(
        self, browser: Browser, report: Path, *, width: int, height: int, dark: bool = False
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            offline=True,
        )
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector(".plot:not([data-state=drawn])", state="detached")

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def desktop(browser: Browser, report: Path) -> Iterator[Watched]:
    watched = Watched(browser, report, width=1280, height=900)
    yield watched
    watched.close()


def test_charts_are_drawn_without_a_word_or_a_request(desktop: Watched, report: Path) -> None:
    plots = desktop.page.locator(".plot")
    assert plots.count() > 15
    assert desktop.page.locator(".plot svg").count() == plots.count()
    marks = plots.evaluate_all(
        "all => all.map(p => p.querySelectorAll('svg .mark-group path, svg path').length)"
    )
    assert min(marks) > 3
    assert desktop.said == []
    assert desktop.asked == [report.as_uri()]


def test_legend_picks_an_arm(desktop: Watched) -> None:
    plot = desktop.page.locator(".plot[data-kind=distribution]").first
    faded = plot.locator(".mark-rect path[opacity='0.08']")
    assert faded.count() == 0
    plot.locator(".role-legend-symbol path").first.click()
    faded.first.wait_for(state="attached")
    assert faded.count() == 50


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (820, 1180), (1280, 900)])
def test_page_fits_its_window_and_is_seen(
    browser: Browser, report: Path, tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    watched = Watched(browser, report, width=width, height=height, dark=dark)
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".plot svg").evaluate_all("all => Math.max(...all.map(s => s.clientWidth))") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(17, 21, 28)" if dark else "rgb(255, 255, 255)")
    picture = tmp_path / "page.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 20_000
    watched.close()


def test_dark_mode_reaches_into_the_charts(browser: Browser, report: Path) -> None:
    line = "document.querySelector('.plot[data-kind=narrowing] .mark-line path')"
    colours = []
    for dark in (False, True):
        watched = Watched(browser, report, width=1280, height=900, dark=dark)
        colours.append(watched.page.evaluate(f"getComputedStyle({line}).stroke"))
        watched.close()
    assert colours == ["rgb(11, 98, 176)", "rgb(94, 176, 242)"]


def test_prints_to_pdf(desktop: Watched) -> None:
    pdf = desktop.page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    desktop.page.emulate_media(media="print")
    assert not desktop.page.locator("nav").is_visible()
    assert desktop.page.locator("#verdicts").is_visible()

import io

import msgspec
import numpy as np
from rich.console import Console

from assay.report.terminal import render_summary
from tests.report.fixtures import BASELINE, Finished, case_of, finished, measured
from tests.report.golden import assert_golden
from tests.report.test_roofline import record


def summary(run: Finished, width: int = 80, colour: bool = False, verbose: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    render_summary(run.records, run.comparisons, console, verbose=verbose)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def test_summary_at_80_columns_without_colour() -> None:
    assert_golden("summary.txt", summary(finished()))


def test_verbose_adds_the_roofline_and_nothing_else() -> None:
    plain, more = summary(finished()).splitlines(), summary(finished(), verbose=True)
    added = [line for line in more.splitlines() if line not in plain]
    assert_golden("roofline.txt", "\n".join(added) + "\n")
    assert [line for line in more.splitlines() if line and line not in added] == [p for p in plain if p]


def test_gaps_between_kernels_are_shown_where_they_were_measured() -> None:
    text = summary(Finished((record(kernel_ns={"forward": 5e6}),), ()), verbose=True)
    (forward,) = [line.split() for line in text.splitlines() if line.startswith("  forward")]
    assert forward == [
        "forward",
        "mine",
        "20.00",
        "ms",
        "50%",
        "2.5%",
        "compute",
        "2.00",
        "25%",
        "host-bound",
    ]


def test_no_line_is_wider_than_the_terminal() -> None:
    for width in (80, 100, 120):
        assert max(map(len, summary(finished(), width, verbose=True).splitlines())) <= width


def test_verdict_carries_colour_as_well_as_its_word() -> None:
    assert "\x1b[1;32m" in summary(finished(), colour=True)
    assert "faster" in summary(finished())


def test_an_arm_measured_alone_is_shown_without_a_ratio() -> None:
    alone = measured(case_of("infer"), BASELINE, 0, 0, 10, np.random.default_rng(1), other=BASELINE)
    text = summary(Finished((alone,), ()))
    assert "eager" in text
    assert "ratio:" not in text
    assert "(baseline)" not in text


def test_markup_in_a_name_is_printed_as_it_is() -> None:
    run = finished()
    odd = [msgspec.structs.replace(r, warnings=["[red]not a style[/red]"]) for r in run.records]
    assert "[red]not a style[/red]" in summary(Finished(tuple(odd), run.comparisons))

"""The Python API: plain callables, closures and all, compared or measured in this process."""

import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import assay
from assay.contracts import Record
from assay.measure import clock
from assay.measure.record import Status
from assay.measure.verdict import Verdict
from tests.sessions import Stage, play

Function = Callable[..., Any]
QUICK: dict[str, Any] = {"time_budget_s": 60.0, "rel_ci": 0.2, "warmup_steps": 1}  # some 20 blocks


def matrix(seed: int) -> tuple[Tensor]:
    """One argument: a 32 x 32 normal matrix of that seed."""
    return (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)),)


def compare(
    a: Function, b: Function, inputs: Callable[[int], Any] = matrix, **more: Any
) -> assay.Comparisons:
    return assay.compare({"a": a, "b": b}, inputs=inputs, **QUICK, **more)


@pytest.fixture(autouse=True)
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples in this thread's processor time, so that a busy machine takes as many blocks as an idle one."""
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter_ns=time.thread_time_ns))


def repeated(times: int) -> Function:
    """A closure that squares its argument a number of times over, and returns the first square."""

    def squares(x: Tensor) -> Tensor:
        for _ in range(times):
            out = x @ x
        return out

    return squares


def test_more_of_the_same_work_is_slower() -> None:
    found = compare(repeated(2), repeated(20))
    assert found.verdict is Verdict.SLOWER
    assert found.ratio
    assert found.interval
    low, high = found.interval
    assert low <= found.ratio <= high < 1
    assert found.reason == ""
    assert found.comparisons[0].scope == "one launch"


def test_records_say_that_the_functions_ran_inline_and_passed() -> None:
    found = compare(repeated(1), repeated(1))
    assert [r.status for r in found.records] == [Status.OK] * 2
    for record in found.records:
        assert record.method
        assert (record.method.isolation, record.method.clock) == ("inline", "wall")
        assert record.gate
        assert record.gate.passed
        assert record.gate.oracle == "a itself"
        assert {f.stage for f in record.gate.figures} == {"before", "after"}
        assert record.case.dtype == "as given"


def test_more_than_two_functions_are_all_held_against_the_first() -> None:
    functions = {"one": repeated(1), "two": repeated(2), "wrong": lambda x: x @ x.T}
    found = assay.compare(functions, inputs=matrix, **QUICK)
    assert [c.other for c in found.comparisons] == ["two", "wrong"]
    assert found.comparisons[0].verdict is not None
    assert found.comparisons[1].verdict is None


def test_rendering_is_a_table_here_and_html_in_a_notebook() -> None:
    found = compare(repeated(1), repeated(8))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert "slower" in text
    assert str(found) == repr(found)
    assert "slower" in str(found)
    page = found._repr_html_()
    assert page.startswith("<pre")
    assert "slower" in page
    assert "\x1b" not in page


def test_names_are_escaped_in_html() -> None:
    found = assay.compare({"<a>": repeated(1), "b": repeated(1)}, inputs=matrix, **QUICK)
    assert "<a>" not in found._repr_html_()
    assert "&lt;a&gt;" in found._repr_html_()


# The same work


def plus(value: float) -> Function:
    return lambda x: x @ x + value


def test_wrong_result_gives_no_ratio_and_says_where() -> None:
    def last_row_wrong(x: Tensor) -> Tensor:
        out = x @ x
        out[-1] += 0.01
        return out

    found = compare(repeated(1), last_row_wrong)
    assert (found.verdict, found.ratio, found.interval) == (None, None, None)
    assert "gate_failed" in found.reason
    assert "output:0 differs: error" in found.reason
    assert "first at position [31]" in found.reason
    assert "no ratio" in str(found)


def test_another_order_of_summation_is_the_same_work() -> None:
    assert compare(lambda x: x.sum(), lambda x: x.sum(0).sum()).reason == ""


def test_cached_answer_is_caught_on_fresh_inputs() -> None:
    kept: list[Tensor] = []

    def cached(x: Tensor) -> Tensor:
        if len(kept) < 20:  # right while it is looked at, then the first answer for ever
            kept.append(x @ x)
            return kept[-1]
        return kept[0]

    assert "gate_failed" in compare(repeated(1), cached).reason


def test_reference_that_does_not_reproduce_itself_gives_no_ratio() -> None:
    found = compare(lambda x: x + torch.randn(32, 32), lambda x: x + torch.randn(32, 32))
    assert "a: gate_failed" in found.reason


@pytest.mark.parametrize(
    ("value", "other", "path"),
    [
        ({"loss": 2.0, "parts": (1.0, [3.0])}, {"loss": 2.0, "parts": (1.0, [3.5])}, "output:parts.1.0"),
        ((7, 8), (7, 9), "output:1"),
        (3, 4, "output:0"),
        (True, False, "output:0"),
        (0, 1, "output:0"),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, "output:b"),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0}, "output:b"),
    ],
)
def test_nested_results_are_compared_by_path(value: Any, other: Any, path: str) -> None:
    assert compare(lambda _x: value, lambda _x: value).reason == ""
    said = compare(lambda _x: value, lambda _x: other).reason
    assert f"precision gate: {path} differs" in said


@pytest.mark.parametrize("nothing", [None, (), {}])
def test_functions_that_return_nothing_prove_nothing(nothing: Any) -> None:
    assert "nothing to compare" in compare(lambda _x: nothing, lambda _x: nothing).reason


def test_zeros_against_zeros_is_refused() -> None:
    assert "nothing was compared" in compare(lambda x: x * 0, lambda x: x * 0).reason


def test_gradients_of_the_inputs_can_be_what_is_compared() -> None:
    def gradient(scale: float) -> Function:
        def f(x: Tensor) -> Tensor:
            (found,) = torch.autograd.grad((x.square() * scale).sum(), x)
            return found

        return f

    def leaf(seed: int) -> tuple[Tensor]:
        return (matrix(seed)[0].requires_grad_(),)

    assert compare(gradient(1.0), gradient(1.0), leaf).reason == ""
    assert "gate_failed" in compare(gradient(1.0), gradient(1.01), leaf).reason


# What goes wrong


def test_function_that_raises_is_an_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(repeated(1), lambda x: x @ torch.ones(3, 3))
    assert [r.status for r in found.records] == [Status.PARTNER_FAILED, Status.ERROR]
    assert "'b' raised RuntimeError" in found.reason
    assert "Traceback" in capsys.readouterr().err, "the user's own fault is shown where it is"


def test_function_that_returns_something_else_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(assay.UsageError, match="returned something else; expected tensors or nested"):
        compare(lambda _x: "text", repeated(1))
    assert "got str" in compare(repeated(1), lambda _x: "text").reason
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"functions": {"a": max}}, "one function cannot be compared; expected two or more; got 1"),
        (
            {"inputs": lambda _seed: torch.ones(1)},
            "did not return the arguments; expected a tuple; got Tensor",
        ),
        ({"time_budget_s": 0.0}, "--time-budget must be positive"),
        ({"margin": 2.0}, "--margin or --confidence is out of range"),
        ({"warmup_steps": -1}, "--warmup-steps is too small"),
        ({"rel_ci": -1.0}, "--rel-ci must be positive"),
    ],
)
def test_wrong_argument_is_refused(arguments: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"functions": {"a": max, "b": max}, "inputs": matrix} | arguments
    with pytest.raises(assay.UsageError) as caught:
        assay.compare(given.pop("functions"), **given)
    assert said in str(caught.value)


def test_comparison_works_outside_the_main_thread() -> None:
    found: list[assay.Comparisons] = []
    thread = threading.Thread(target=lambda: found.append(compare(repeated(1), repeated(1))))
    thread.start()
    thread.join()
    assert found[0].verdict is not None


def test_interrupt_before_the_first_block_is_an_interrupt() -> None:
    def stop(value: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return value

    with pytest.raises(KeyboardInterrupt):
        compare(stop, stop)


# One function


def test_function_is_measured_alone() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)

    found = assay.measure(work, samples=5, time_budget_s=5.0, warmup_steps=2)
    assert (found.record.arm.name, len(found.samples_ns), found.summary.n) == ("work", 5, 5)
    assert found.summary.min_ns <= found.median_ns <= found.summary.max_ns < 1e5
    assert found.record.method
    assert len(calls) > 5 * found.record.method.inner > 100, "a sample of a short call is many calls"
    assert str(found).startswith("work: median ")
    assert (found.record.status, found.record.gate) == (Status.OK, None)


def test_inputs_are_given_and_time_ends_the_measuring() -> None:
    found = assay.measure(torch.square, inputs=matrix, samples=10**6, time_budget_s=0.05, warmup_steps=1)
    assert 2 <= len(found.samples_ns) < 10**6


def test_measured_function_that_raises_is_an_error() -> None:
    with pytest.raises(assay.WorkerError, match="raised ZeroDivisionError"):
        assay.measure(lambda: 1 / 0)


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"time_budget_s": 0.0}])
def test_measuring_nothing_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(assay.UsageError, match="nothing would be measured"):
        assay.measure(max, **arguments)


# Reading back


def test_records_are_loaded_from_a_folder_or_a_file(tmp_path: Path) -> None:
    written = list(play(Stage(), tmp_path).records)
    loaded = assay.load(tmp_path)
    assert loaded == written == assay.load(str(tmp_path / "records.jsonl"))
    assert all(isinstance(r, Record) for r in loaded)
    with pytest.raises(assay.StoreError, match="no records at"):
        assay.load(tmp_path / "elsewhere")


def test_importing_the_package_imports_neither_torch_nor_what_reports_need() -> None:
    code = "import sys, assay; print([m for m in ('torch', 'scipy', 'rich', 'altair') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_function_measure_is_not_replaced_by_the_package_of_that_name() -> None:
    code = "import assay, types; assay.measure(max, inputs=lambda _: (1, 2), time_budget_s=0.01)\n"
    code += "import assay.measure.stats, assay.session\nassert isinstance(assay.measure, types.FunctionType)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_function_that_remembers_its_answers_gets_no_ratio() -> None:
    import functools

    def work(x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(20):
            y = torch.tanh(y @ x / 32 + x)
        return y

    def inputs(seed: int) -> tuple[torch.Tensor]:
        return (torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)),)

    found = assay.compare(
        {"honest": work, "cached": functools.cache(work)}, inputs=inputs, time_budget_s=0.5, warmup_steps=3
    )
    assert found.ratio is None
    assert "output:0 differs" in found.reason  # other values in the tensors that it remembers

"""Errors: one line a user can act on, and the exit code that goes with it."""

import inspect

import pytest

from assay import errors
from assay.errors import AssayError, StoreError, Unavailable, UsageError, WorkerError, nearest


def test_usage_error_says_what_expected_got_and_remedy_in_one_line() -> None:
    error = UsageError("unknown dtype", expected="bf16 or fp32", got="bf15", remedy="did you mean 'bf16'?")
    assert str(error) == "unknown dtype; expected bf16 or fp32; got bf15; did you mean 'bf16'?"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("no arm"), "no arm"),
        (UsageError("no arm", expected="two"), "no arm; expected two"),
        (
            UsageError("--batch-size", expected="at least 1", got=0),
            "--batch-size; expected at least 1; got 0",
        ),
        (UsageError("no arm", remedy="name one"), "no arm; name one"),
    ],
)
def test_usage_error_leaves_out_what_nobody_stated(error: UsageError, line: str) -> None:
    assert str(error) == line


def test_got_is_shown_when_it_is_falsy() -> None:
    assert [str(UsageError("x", got=got)) for got in (0, False, "", None)] == [
        "x; got 0",
        "x; got False",
        "x; got ",
        "x",
    ]


def test_unavailable_keeps_reason_and_remedy_apart_for_the_record() -> None:
    error = Unavailable("fused needs triton", "pip install 'assay[kernels]'")
    assert (error.reason, error.remedy) == ("fused needs triton", "pip install 'assay[kernels]'")
    assert str(error) == "fused needs triton: pip install 'assay[kernels]'"
    assert str(Unavailable("no CUDA device")) == "no CUDA device"


def test_worker_error_carries_the_status_of_the_record() -> None:
    error = WorkerError("timeout", "no answer in 60 s")
    assert (error.status, str(error)) == ("timeout", "no answer in 60 s")


@pytest.mark.parametrize(
    ("kind", "code"), [(AssayError, 4), (UsageError, 4), (StoreError, 4), (Unavailable, 3), (WorkerError, 3)]
)
def test_exit_codes_are_those_of_the_method(kind: type[AssayError], code: int) -> None:
    assert kind.exit_code == code


def test_every_error_is_caught_by_the_root_and_exported() -> None:
    tree = {name for name, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)}
    assert tree == set(errors.__all__) - {"nearest", "one_line"}
    assert all(issubclass(getattr(errors, name), AssayError) for name in tree)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fusd", "did you mean 'fused'?"), ("eagre", "did you mean 'eager'?"), ("zzzz", ""), ("", "")],
)
def test_nearest_suggests_only_what_is_close(name: str, expected: str) -> None:
    assert nearest(name, ["eager", "fused", "sdpa"]) == expected


def test_nearest_takes_an_iterator_and_none_known() -> None:
    assert nearest("fusd", iter(["fused"])) == "did you mean 'fused'?"
    assert nearest("fusd", []) == ""

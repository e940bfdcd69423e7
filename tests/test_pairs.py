"""The pairs of an attribution: for each workload and device, and a real run from flags to table."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from assay import session
from assay.config import RunConfig
from assay.errors import UsageError
from assay.measure.record import Attribution, Case, Status
from assay.measure.store import read_records
from assay.measure.verdict import compare_records
from assay.observer import NullObserver
from assay.pairs import Pair, attribution_pairs
from assay.plan import make_plan, resolve_options
from assay.plugins import find
from assay.report.attribution import cells, contributions
from assay.report.view import case_views
from tests.sessions import SIZES, Stage, tiny

DTYPES = {"cpu": "fp32", "cuda": "bf16-autocast"}
Said = tuple[str, str, str, str]  # kind, ingredient, names of baseline and other


def case_of(workload: str, device: str) -> Case:
    params = {n: SIZES.get(n, o.default) for n, o in find("workloads", workload).params.items()}
    return Case(workload=workload, params=params, dtype=DTYPES[device], device=device)


def pairs(workload: str, device: str, arms: Sequence[str] = ("eager", "fused")) -> list[Pair]:
    made = make_plan(tiny(arms, workload)).arms  # parsed and resolved; the pairs are another device's
    return attribution_pairs([case_of(workload, device)], made, arms)


def said(found: Sequence[Pair]) -> list[Said]:
    return [(about(p).kind, about(p).ingredient, p.baseline.name, p.other.name) for p in found]


def about(pair: Pair) -> Attribution:
    assert pair.attribution
    return pair.attribution


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, installed=True)


def _pretend(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return (object() if installed else None) if name == "liger_kernel" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


# Which pairs

SWAPPED = [
    pair
    for name in ("norm", "swiglu", "rope")
    for pair in (
        ("add", name, "eager", f"eager[{name}=liger]"),
        ("leave", name, "fused", f"fused[{name}=liger]"),
    )
]
RECOMPUTE = [
    ("add", "recompute", "eager", "eager[recompute=true]"),
    ("leave", "recompute", "fused[recompute=false]", "fused"),
]
COMPILE = ("add", "compile", "eager", "eager[compile=true]")
GRAPH_LEFT = ("leave", "cuda_graph", "fused[cuda_graph=false]", "fused")
CUDA_STEP = [
    COMPILE,
    ("leave", "compile", "fused[compile=false,cuda_graph=false]", "fused"),
    ("add", "cuda_graph", "eager[compile=true]", "eager[compile=true,cuda_graph=true]"),
    GRAPH_LEFT,
]
WANTED: dict[tuple[str, str], list[Said]] = {
    ("train", "cpu"): [
        ("add", "attention", "eager", "eager[attention=sdpa]"),
        ("leave", "attention", "fused[attention=eager]", "fused"),
        ("add", "loss", "eager", "eager[loss=chunked]"),
        ("leave", "loss", "fused[loss=torch]", "fused"),
        *RECOMPUTE,
        COMPILE,
        ("leave", "compile", "fused[compile=false]", "fused"),
    ],
    ("infer", "cpu"): [
        ("add", "attention", "eager", "eager[attention=sdpa]"),
        ("leave", "attention", "fused[attention=eager]", "fused"),
        COMPILE,
        ("leave", "compile", "fused[compile=false]", "fused"),
    ],
    ("generate", "cpu"): [
        ("add", "attention", "eager", "eager[attention=sdpa]"),
        ("leave", "attention", "fused[attention=eager]", "fused"),
        ("add", "merged", "eager", "eager[merged=true]"),
        ("leave", "merged", "fused[merged=false]", "fused"),
        COMPILE,
        ("leave", "compile", "fused[compile=false]", "fused"),
        ("add", "cache", "eager", "eager[cache=static]"),
        ("leave", "cache", "fused[cache=growing]", "fused"),
    ],
    ("train", "cuda"): [
        ("add", "attention", "eager", "eager[attention=cudnn]"),
        ("leave", "attention", "fused[attention=eager]", "fused"),
        *SWAPPED,
        ("add", "loss", "eager", "eager[loss=chunked]"),
        ("leave", "loss", "fused[loss=torch]", "fused"),
        *RECOMPUTE,
        *CUDA_STEP,
    ],
    ("infer", "cuda"): [
        ("add", "attention", "eager", "eager[attention=cudnn]"),
        ("leave", "attention", "fused[attention=eager]", "fused"),
        *SWAPPED,
        *CUDA_STEP,
    ],
    ("generate", "cuda"): [
        ("add", "attention", "eager", "eager[attention=cudnn]"),
        ("leave", "attention", "fused[attention=eager]", "fused"),
        *SWAPPED,
        ("add", "merged", "eager", "eager[merged=true]"),
        ("leave", "merged", "fused[merged=false]", "fused"),
        COMPILE,
        ("leave", "compile", "fused[compile=false]", "fused"),
        ("add", "cuda_graph", "eager[cache=static]", "eager[cache=static,cuda_graph=true]"),
        GRAPH_LEFT,
        ("add", "cache", "eager", "eager[cache=static]"),
        ("leave", "cache", "fused[cache=growing,cuda_graph=false]", "fused"),
    ],
}


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize(("workload", "device"), WANTED)
def test_each_ingredient_that_matters_is_added_and_left_out(workload: str, device: str) -> None:
    found = said(pairs(workload, device))
    assert found == [("total", "", "eager", "fused"), *WANTED[workload, device]]


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize(("workload", "device"), WANTED)
@pytest.mark.parametrize("arms", [("eager", "fused"), ("fused", "eager"), ("compile", "fused[merged=true]")])
def test_a_pair_differs_in_its_ingredient_and_what_goes_with_it_only(
    workload: str, device: str, arms: Sequence[str]
) -> None:
    case = case_of(workload, device)
    for pair in pairs(workload, device, arms)[1:]:
        without, with_it = (
            {n: i.value for n, i in find("variants", a.target).ingredients(case, a.options).items()}
            for a in pair.arms
        )
        differ = {name for name in without if without[name] != with_it[name]}
        assert differ == {about(pair).ingredient, *about(pair).along}
        values = (without[about(pair).ingredient], with_it[about(pair).ingredient])
        assert values == (about(pair).before, about(pair).after)
        assert about(pair).given.items() <= without.items()


@pytest.mark.usefixtures("liger")
def test_what_an_ingredient_needs_and_takes_along_is_said() -> None:
    train = {(about(p).kind, about(p).ingredient): about(p) for p in pairs("train", "cuda")}
    assert train["add", "cuda_graph"].given == {"compile": True}
    assert train["leave", "compile"].along == ["cuda_graph"]
    assert train["add", "norm"].swapped
    assert train["leave", "norm"].swapped
    generate = {(about(p).kind, about(p).ingredient): about(p) for p in pairs("generate", "cuda")}
    assert generate["add", "cuda_graph"].given == {"cache": "static"}
    assert generate["leave", "cache"].along == ["cuda_graph"]
    assert generate["leave", "compile"].along == [], "a replayed token needs no compiler"


def test_what_is_not_tried_is_said_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert about(pairs("infer", "cpu")[0]).left_out == [
        "norm, swiglu, rope: torch in both; Liger's kernel needs a CUDA device",
        "merged: false in both",
        "cuda_graph: false in both; a CUDA graph needs a CUDA device",
        "compile_mode: default in both",
    ]
    _pretend(monkeypatch, installed=False)
    (line, *_) = about(pairs("infer", "cuda")[0]).left_out
    assert line.startswith(
        "norm, swiglu, rope: torch in both; Liger's kernel needs liger-kernel (pip install"
    )


def test_what_auto_would_choose_anew_is_pinned() -> None:
    """Compiled, a small step would get a CUDA graph too: adding `compile` must not add that."""
    arms = ("fused[compile=false]", "fused")
    added = next(p for p in pairs("infer", "cuda", arms) if about(p).ingredient == "compile")
    assert added.other.name == "fused[compile=true,cuda_graph=false]"


def test_compile_mode_is_an_ingredient_that_needs_compile() -> None:
    found = pairs("infer", "cpu", ("eager", "compile[compile_mode=max-autotune]"))
    assert (
        "add",
        "compile_mode",
        "eager[compile=true]",
        "eager[compile=true,compile_mode=max-autotune]",
    ) in (said(found))


def test_pair_that_is_the_total_once_more_keeps_a_name_of_its_own() -> None:
    one = pairs("infer", "cpu", ("eager", "eager[attention=sdpa]"))
    assert said(one) == [
        ("total", "", "eager", "eager[attention=sdpa]"),
        ("add", "attention", "eager", "eager[attention=sdpa]#2"),
        ("leave", "attention", "eager[attention=eager]", "eager[attention=sdpa]"),
    ]
    other = pairs("infer", "cpu", ("fused[attention=eager]", "fused"))
    assert said(other)[2] == ("leave", "attention", "fused[attention=eager]#2", "fused")
    for found in (one, other):
        assert len({pair.place(0) for pair in found}) == len(found)


def test_plan_has_the_pairs_of_every_case_and_checks_their_arms() -> None:
    config = RunConfig(
        arms=["eager", "fused"],
        workload=["train", "infer"],
        params={"shape": ["tiny"], "seq_length": [8, 16]},
        device="cpu",
        attribute=True,
    )
    made = make_plan(config)
    assert [arm.name for arm in made.arms] == ["eager", "fused"]
    assert [p.case for p in made.pairs if about(p).kind == "total"] == list(made.cases)
    assert made.launches() == (2 * 9 + 2 * 5) * 5
    for pair in made.pairs:
        for arm in pair.arms:
            assert arm.options == resolve_options(find("variants", arm.target), arm), "nothing unknown"


# Refusals


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["eager", "sdpa", "fused"], "--attribute explains one arm by another; expected two arms"),
        (["eager", "hf"], "--attribute cannot take 'hf' apart; expected two arms that are recipes"),
        (["json:loads", "fused"], "--attribute cannot take 'json:loads' apart"),
        (["eager", "eager"], "nothing to tell apart between 'eager' and 'eager#2'"),
    ],
)
def test_wrong_arms_are_refused_in_one_line(arms: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(tiny(arms, attribute=True))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# A run


def test_attribution_runs_and_its_table_comes_from_the_records_alone(tmp_path: Path) -> None:
    config = tiny(["eager", "fused[compile=false]"], "train", attribute=True)
    session.run(make_plan(config), tmp_path, NullObserver())
    records = read_records(tmp_path)
    assert {(r.status, r.reason) for r in records} == {(Status.OK, "")}
    assert all(r.gate and r.gate.passed for r in records)
    (view,) = case_views(records, compare_records(records, stored=None, asked_launches=1))
    (total,) = view.headlines
    assert (total.baseline, total.other) == ("eager", "fused[compile=false]")
    found = contributions(view)
    assert {c.ingredient for c in found} == {"attention", "loss", "recompute"}
    assert all(c.added and c.added.interval and c.left_out and c.left_out.interval for c in found)
    assert [row[1] for row in sorted(cells(view))] == ["eager → sdpa", "torch → chunked", "false → true"]


def test_resumed_attribution_repeats_no_pair(tmp_path: Path) -> None:
    config = tiny(["eager", "fused"], "infer", attribute=True)
    first, second = Stage(), Stage()
    done = session.run(make_plan(config), tmp_path, NullObserver(), connect=first.connect).records
    assert len(done) == 2 * 5
    again = session.run(make_plan(config), tmp_path, NullObserver(), resume=True, connect=second.connect)
    assert second.opened == []
    assert [r.id for r in again.records] == [r.id for r in done]

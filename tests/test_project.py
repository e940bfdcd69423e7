"""The project's own files agree with each other: pins, version, scripts, documents."""

import json
import math
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from assay import suite
from assay.errors import UsageError
from assay.measure.record import Case, Scalar
from assay.wire import Failure, Reply
from tests.sessions import Fault, Stage
from tests.test_imports import faults

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = [".ci/run", "scripts/check", "scripts/gpu", "scripts/test"]
ADDING = (ROOT / "docs" / "adding.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def pins() -> dict[str, str]:
    """Canonical name -> exact version of constraints.txt; a line of any other form fails."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matched = [
        re.fullmatch(r"([\w.-]+)==([\w.!]+)", line) for line in lines if line and not line.startswith("#")
    ]
    assert all(matched), "constraints.txt holds only comments and name==version"
    return {canonicalize_name(m[1]): m[2] for m in matched if m}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *extras["models"], *extras["dev"]]]


@pytest.mark.parametrize("wanted", requirements(), ids=str)
def test_every_requirement_is_pinned_at_a_version_that_satisfies_it(wanted: Requirement) -> None:
    assert wanted.specifier.contains(pins()[canonicalize_name(wanted.name)])


def test_newest_entry_of_the_changelog_is_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == PROJECT["version"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_script_is_executable_and_parses(program: str) -> None:
    assert os.access(ROOT / program, os.X_OK)
    parsed = subprocess.run(["bash", "-n", ROOT / program], capture_output=True, text=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "--always-make", "--silent", "venv", f"PYTHON={old}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 2
    assert made.stderr.startswith(f"Assay needs Python 3.11 or newer; {old} is Python 3.9.2.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_index_of_the_docs_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def examples() -> dict[str, str]:
    """File -> source of the Python examples of docs/adding.md; the first line of each names its file."""
    blocks = re.findall(r"^```python\n# src/assay/(\S+)\.py\n(.*?)^```", ADDING, re.MULTILINE | re.DOTALL)
    return {path.replace("/", "."): source for path, source in blocks}


def example(module: str) -> dict[str, Any]:
    """The names that an example defines."""
    names: dict[str, Any] = {"__name__": f"assay.{module}"}
    exec(compile(examples()[module], module, "exec"), names)
    return names


def test_every_kind_of_plugin_has_an_example_that_keeps_to_the_import_table() -> None:
    assert {module.partition(".")[0] for module in examples()} == {"data", "suites", "variants", "workloads"}
    assert len(examples()) == ADDING.count("```python")
    assert [fault for module, source in examples().items() for fault in faults(module, source)] == []


def test_example_data_set_gives_what_the_seed_chose() -> None:
    ponds = example("data.ponds")["DATASET"]
    assert {e.id for e in ponds.examples(None, 9, 0)} == {"still-0", "still-1", "moving-0"}
    assert [e.subject for e in ponds.examples("still", 1, 3)] == ["still"]
    assert list(ponds.examples(None, 2, 5)) == list(ponds.examples(None, 2, 5))
    with pytest.raises(UsageError, match="did you mean 'still'"):
        next(ponds.examples("stil", 1, 0))


def test_example_suite_plans_judges_and_exports(tmp_path: Path) -> None:
    widths = example("suites.widths")["SUITE"]
    stage = Stage(faults={"compile": in_case("batch_size", 4, Failure(status="out_of_memory", reason=""))})
    run, (written,) = suite.run_suite("widths", widths, {}, tmp_path, where="cpu", connect=stage.connect)
    assert [e.case.params["batch_size"] for e in run.entries] == [1, 2, 4]
    assert [(f.status, f.value) for f in run.findings] == [("FAILED", 2.0)]
    rows = [(row["batch_size"], row["arm"], row["ns"]) for row in json.loads(written.read_text())]
    assert rows == [(size, arm, 1e6) for size in (1, 2) for _ in range(3) for arm in ("eager", "compile")]


def in_case(name: str, value: Scalar, reply: Reply) -> Fault:
    """Answer so to every request about a case with this parameter."""
    return lambda arm, _request: reply if arm.opening.case.params[name] == value else None


def test_example_variant_runs_what_it_claims() -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    variant = example("variants.rms_fused")["VARIANT"]
    case = Case(workload="call")
    with variant.build(case, {"width": 8}) as system, profile(activities=[ProfilerActivity.CPU]) as seen:
        (x_NW,) = system.make_inputs(3)
        y_NW = system.function(x_NW)
    expected_NW = x_NW / (x_NW.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(y_NW, expected_NW, atol=1e-5)
    ran = {f"ops.{event.key}" for event in seen.key_averages()}
    assert {claim.counter for claim in variant.claims(case, {})} <= ran


class Bigram:
    """The least of a language model: the next token depends on the last one alone."""

    vocab_size = 5

    def __init__(self, logits_VV: Any) -> None:
        self._logits_VV = logits_VV

    def forward(self, ids_BT: Any) -> Any:
        return self._logits_VV[ids_BT]

    def proof(self) -> dict[str, int]:
        return {"seen": 1}


def test_example_workload_scores_what_its_step_times() -> None:
    import torch

    workload = example("workloads.score")["WORKLOAD"]
    case = Case(workload="score", params={"batch_size": 2, "seq_length": 64})
    assert workload.smaller(case).params == {"batch_size": 2, "seq_length": 32}
    trial = workload.prepare(Bigram(torch.zeros(5, 5)), case)
    marks: list[str] = []
    trial.step(marks.append)
    assert tuple(marks) == trial.phases
    score_BT = trial.outputs(1)["output:score"]
    assert score_BT.shape == (2, 63)
    assert torch.allclose(score_BT, torch.tensor(-math.log(5)))

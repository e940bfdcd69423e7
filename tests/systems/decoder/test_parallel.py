"""A decoder over two ranks computes what one process does: loss, every whole gradient, logits, tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.systems.decoder.helpers import CONFIGS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """What both ranks found: case -> quantity -> relative error against one process."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.systems.decoder.two_ranks", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", ["sharded {}", "split {} False", "split {} True"])
def test_two_ranks_compute_what_one_process_does(
    errors: list[dict[str, dict[str, float]]], case: str, name: str
) -> None:
    for rank in errors:
        found = rank[case.format(name)]
        assert len(found) > 10
        assert {n: e for n, e in found.items() if not e < 1e-5} == {}
        assert {n: e for n, e in found.items() if n.startswith("state:") and e != 0} == {}


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_the_ranks_do_not_divide_are_weighted(
    errors: list[dict[str, dict[str, float]]], rows: int
) -> None:
    for rank in errors:
        assert {n: e for n, e in rank[f"sharded llama, {rows} rows"].items() if not e < 1e-5} == {}

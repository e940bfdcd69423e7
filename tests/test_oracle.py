"""The oracle's files: written by threads while it works, and there when somebody may look."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from assay import oracle
from assay.errors import Unavailable
from assay.measure.record import Arm
from assay.plan import make_plan
from assay.wire import Open
from assay.worker import open_runner
from tests.sessions import tiny


def test_answers_are_on_disk_before_the_reference_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may capture a CUDA graph, which a copy from the device by another thread would break."""
    case = make_plan(tiny(["eager", "eager"], "train")).cases[0]
    opening = Open(case=case, arm=Arm(name="a", target="eager"), scratch=str(tmp_path), weights="shared")
    maker = open_runner(opening)._oracle()
    save, reference_errors, found = oracle._save, maker._reference_errors, dict[str, set[str]]()

    def slowly(tensors: Mapping[str, Tensor], path: Path) -> None:
        time.sleep(0.2)
        save(tensors, path)

    def look(*arguments: Any, **options: Any) -> dict[str, float]:
        for stage in oracle.STAGES:
            found[stage] = set(oracle.load_answers(tmp_path, case, stage))
        return reference_errors(*arguments, **options)

    monkeypatch.setattr(oracle, "_save", slowly)
    monkeypatch.setattr(maker, "_reference_errors", look)
    made = maker.make(1e12)
    assert "loss" in found["before"] & found["after"]
    assert set(made.reference) <= found["before"]
    state: dict[str, Tensor] = torch.load(oracle.state_path(tmp_path, case), weights_only=True)
    assert len(state) > 0


def test_file_that_cannot_be_written_is_the_oracles_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_plan(tiny(["eager", "eager"], "infer")).cases[0]
    opening = Open(case=case, arm=Arm(name="a", target="eager"), scratch=str(tmp_path), weights="shared")

    def full(_tensors: Mapping[str, Tensor], _path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(oracle, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        open_runner(opening)._oracle().make(1e12)


@pytest.mark.parametrize(
    ("left", "said"), [(0, "no room for the 4 MiB of weights.pt"), (2**30, "unexpected pos")]
)
def test_full_disk_is_said_with_what_helps(
    left: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_tensors: object, path: Path) -> None:
        path.write_bytes(b"torn")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", no_room)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=left))
    path = tmp_path / "weights.pt"
    with pytest.raises(RuntimeError if left else Unavailable, match=said) as refused:
        oracle._save({"w": torch.zeros(2**20)}, path)
    assert ("set TMPDIR" in str(refused.value)) is not bool(left)
    assert not path.exists(), "what was written of it would leave no room for a word"

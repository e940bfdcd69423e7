"""The run folder keeps every whole line, whatever happens to the process, the disk or the reader."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import StoreError
from assay.measure import store
from assay.measure.record import (
    SCHEMA,
    Arm,
    Case,
    Environment,
    Figure,
    GateReport,
    Memory,
    Method,
    PhaseMemory,
    Record,
    SampleLine,
    Status,
    Work,
    record_id,
)
from assay.measure.store import RunStore, completed, latest, read_records, read_samples

RUN = "r1"
CASE = Case(workload="op", params={"n": 4, "note": "ü"})


def make_record(arm: str = "eager", launch: int = 0, status: Status = Status.OK, **fields: object) -> Record:
    base = Record(
        status=status,
        id=record_id(RUN, CASE, "eager", "fused", arm, launch),
        run=RUN,
        case=CASE,
        arm=Arm(name=arm, target=arm),
        baseline="eager",
        other="fused",
        launch=launch,
        started="2026-01-01T00:00:00Z",
        samples_ns={"step": [1.5, 2.5]},
    )
    return msgspec.structs.replace(base, **fields)


def make_sample(block: int = 0) -> SampleLine:
    return SampleLine(
        run=RUN,
        case=CASE.id,
        arm="eager",
        other="fused",
        launch=0,
        block=block,
        first=True,
        samples_ns={"step": 3.5},
        wall_ns=4.0,
    )


def write(folder: Path, records: list[Record]) -> bytes:
    """Store records and return the file's bytes."""
    with RunStore(folder, RUN) as run:
        for record in records:
            run.append_record(record)
    return (folder / store.RECORDS).read_bytes()


# ---- round trip -------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | words
scalar_maps = st.dictionaries(words, scalars, max_size=3)
memories = st.builds(
    Memory,
    source=words,
    peak_mib=finite,
    final_mib=finite,
    reserved_mib=finite,
    baseline_mib=finite,
    device_mib=st.none() | finite,
    phases=st.dictionaries(words, st.builds(PhaseMemory, peak_mib=finite, reserved_mib=finite), max_size=2),
)
figures = st.builds(
    Figure,
    tier=words,
    stage=words,
    quantity=words,
    error=st.none() | finite,
    limit=st.none() | finite,
    passed=st.booleans(),
)
gates = st.builds(
    GateReport,
    passed=st.booleans(),
    oracle=words,
    weights=words,
    state=words,
    shape=scalar_maps,
    reduced=st.booleans(),
    figures=st.lists(figures, max_size=2),
)
environments = st.builds(
    Environment,
    python=words,
    platform=words,
    cpu=words,
    cores=st.integers(1, 512),
    variables=st.dictionaries(words, words, max_size=2),
    telemetry=scalar_maps,
)
methods = st.builds(
    Method,
    clock=words,
    isolation=words,
    pairing=words,
    cache=words,
    inner=st.integers(1, 9),
    warmup_steps=st.integers(0, 9),
    warmup_steady=st.booleans(),
    stop=words,
    order=st.text("BO", max_size=5),
    lead_in=st.integers(0, 3),
    seed=st.integers(0, 2**31),
    launches=st.integers(1, 9),
    settling_blocks=st.integers(0, 16),
)
any_record = st.builds(
    make_record,
    arm=words,
    launch=st.integers(0, 9),
    status=st.sampled_from(list(Status)),
    reason=words,
    case=st.builds(Case, workload=words, params=scalar_maps, seed=st.integers(0, 2**31)),
    samples_ns=st.dictionaries(words, st.lists(finite, max_size=4), max_size=3),
    laps_ns=st.dictionaries(words, st.lists(st.lists(finite, max_size=2), max_size=2), max_size=2),
    work=st.dictionaries(words, st.builds(Work, flops=st.none() | finite), max_size=2),
    memory=st.none() | memories,
    gate=st.none() | gates,
    environment=st.none() | environments,
    method=st.none() | methods,
    proof=scalar_maps,
    warnings=st.lists(words, max_size=2),
    config=st.dictionaries(words, st.none() | scalars | st.lists(scalars, max_size=2), max_size=2),
)


@settings(max_examples=60)
@given(st.lists(any_record, max_size=3))
def test_any_record_reads_back_as_it_was(records: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), records)
        assert read_records(folder) == records


@settings(max_examples=80)
@given(st.lists(any_record, min_size=1, max_size=3), st.data())
def test_truncation_at_any_byte_loses_at_most_the_last_whole_line(
    records: list[Record], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = write(folder, records)
        cut = data.draw(st.integers(0, len(content)))
        (folder / store.RECORDS).write_bytes(content[:cut])
        kept = records[: content[:cut].count(b"\n")]
        assert read_records(folder) == kept

        assert write(folder, records[:1]).startswith(content[: content[:cut].rfind(b"\n") + 1])
        assert read_records(folder) == [*kept, records[0]]


def test_a_line_begins_with_its_schema_and_status(tmp_path: Path) -> None:
    line = write(tmp_path, [make_record()])
    assert list(json.loads(line))[:3] == ["schema", "status", "id"]


def test_samples_read_back_as_they_were(tmp_path: Path) -> None:
    samples = [make_sample(block) for block in range(3)]
    with RunStore(tmp_path, RUN) as run:
        for sample in samples:
            run.append_sample(sample)
        assert read_samples(tmp_path) == samples, "a sample is there before the store is closed"


# ---- what does not read back, and what is damaged ---------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_record_that_json_cannot_hold_is_refused_and_harms_nothing(tmp_path: Path, bad: float) -> None:
    with RunStore(tmp_path, RUN) as run:
        run.append_record(make_record())
        with pytest.raises(StoreError, match=r"would not read back: .*samples_ns"):
            run.append_record(make_record("fused", samples_ns={"step": [bad]}))
        with pytest.raises(StoreError, match="would not read back"):
            run.append_record(make_record("fused", reason="\ud800"))
    assert read_records(tmp_path) == [make_record()]


def test_a_newer_schema_is_refused_with_both_versions(tmp_path: Path) -> None:
    line = write(tmp_path, [make_record()])
    newer = line.replace(b'"schema":%d' % SCHEMA, b'"schema":%d' % (SCHEMA + 1))
    path = tmp_path / store.RECORDS
    path.write_bytes(line + newer)
    with pytest.raises(StoreError, match=rf"line 2 has schema {SCHEMA + 1}; expected at most {SCHEMA}"):
        read_records(path)
    path.write_bytes(line + newer.replace(b'"status":"ok"', b'"status":7'))
    with pytest.raises(StoreError, match=rf"line 2 has schema {SCHEMA + 1}"):
        read_records(path)


@pytest.mark.parametrize("damage", [b"{", b'{"status":"ok"}', b"\x00\x00", b"\xff\xfe", b"[]", b'"text"'])
def test_a_damaged_middle_line_is_named(tmp_path: Path, damage: bytes) -> None:
    line = write(tmp_path, [make_record()])
    (tmp_path / store.RECORDS).write_bytes(line + damage + b"\n" + line)
    with pytest.raises(StoreError, match=r"records\.jsonl line 2 is damaged: "):
        read_records(tmp_path)


def test_a_folder_without_records_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no records at .*; expected a run's folder"):
        read_records(tmp_path)


def test_a_torn_tail_is_set_aside_byte_for_byte(tmp_path: Path) -> None:
    whole = write(tmp_path, [make_record()])
    path = tmp_path / store.RECORDS
    path.write_bytes(whole + whole[:40])
    assert read_records(tmp_path) == [make_record()], "a reader does not wait for the repair"
    assert write(tmp_path, [make_record(launch=1)]).startswith(whole)
    assert (tmp_path / "records.jsonl.torn").read_bytes() == whole[:40] + b"\n"
    assert [r.launch for r in read_records(tmp_path)] == [0, 1]


# ---- the disk ---------------------------------------------------------------------------------------------


def test_a_disk_that_fills_between_lines_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunStore(tmp_path, RUN) as run:
        run.append_record(make_record())
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="No space left on device; free disk space, then resume"):
            run.append_record(make_record("fused"))
        monkeypatch.undo()
        run.append_record(make_record(launch=1))
    assert [r.launch for r in read_records(tmp_path)] == [0, 1]


SHORT_WRITE = """
import resource, sys
from assay.errors import StoreError
from tests.measure.test_store import *
from assay.measure.store import RECORDS
folder = Path(sys.argv[1])
with RunStore(folder, RUN) as run:
    run.append_record(make_record())
    end = (folder / RECORDS).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (end + 100, end + 100))  # room for a part of the next line
    try:
        run.append_record(make_record("fused"))
    except StoreError as e:
        print(e)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    places = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_disk_that_fills_inside_a_line_takes_that_line_back(tmp_path: Path) -> None:
    with python(SHORT_WRITE, str(tmp_path)) as child:
        said, _ = child.communicate(timeout=300)
    assert "cannot append to" in said and said.count("\n") == 1
    assert (tmp_path / store.RECORDS).read_bytes().endswith(b"\n")
    assert read_records(tmp_path) == [make_record()]


def test_a_nearly_full_disk_is_found_before_anything_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MIN_FREE_MIB", 2**50)
    with pytest.raises(StoreError, match=r"MiB of disk space left; expected at least"):
        RunStore(tmp_path / "a" / "b", RUN)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write to .*; choose a folder that you can write to"):
        RunStore(tmp_path / "file" / "run", RUN)


# ---- one writer, killed or not ----------------------------------------------------------------------------


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    busy = rf"another run \(process {os.getpid()}\); wait"
    with RunStore(tmp_path, RUN), pytest.raises(StoreError, match=busy):
        RunStore(tmp_path, "r2")
    with RunStore(tmp_path, "r2"):
        pass


APPENDER = """
import sys
from tests.measure.test_store import *
with RunStore(sys.argv[1], RUN) as run:
    for launch in range(10**6):
        run.append_sample(make_sample(launch))
        run.append_record(make_record(launch=launch, reason="x" * 20_000))
        print(launch, flush=True)
"""


def test_a_killed_writer_leaves_every_record_it_reported(tmp_path: Path) -> None:
    with python(APPENDER, str(tmp_path)) as child:
        assert child.stdout is not None
        reported = [int(child.stdout.readline()) for _ in range(20)]
        child.send_signal(signal.SIGKILL)
    launches = [r.launch for r in read_records(tmp_path)]
    assert launches[: len(reported)] == reported == list(range(20))
    assert len(read_samples(tmp_path)) >= 20
    with RunStore(tmp_path, RUN) as run:  # the dead process holds no lock
        run.append_record(make_record(launch=-1))
    assert [r.launch for r in read_records(tmp_path)] == [*launches, -1]


# ---- resuming and configuration ---------------------------------------------------------------------------


def test_a_launch_is_complete_when_both_arms_have_answered() -> None:
    pairs = {
        0: (Status.OK, Status.OK),
        1: (Status.INTERRUPTED, Status.INTERRUPTED),
        2: (Status.OUT_OF_MEMORY, Status.PARTNER_FAILED),
        3: (Status.CRASHED, Status.PARTNER_FAILED),
        4: (Status.OK, Status.TIMEOUT),
        6: (Status.KILLED, Status.PARTNER_FAILED),
    }
    records = [
        make_record(arm, launch, status)
        for launch, statuses in pairs.items()
        for arm, status in zip(("eager", "fused"), statuses, strict=True)
    ]
    records.append(make_record("eager", 5))  # its partner's record was lost
    done = completed(records, launches=7)
    assert {place[3] for place in done} == {0, 1, 2}
    assert (CASE.id, "eager", "fused", 0) in done
    assert {place[3] for place in completed(records, launches=1)} == {0}


def test_what_a_resumed_run_repeated_replaces_the_crash() -> None:
    crash, partner = make_record(status=Status.CRASHED), make_record("fused", status=Status.PARTNER_FAILED)
    again, fused = make_record(), make_record("fused")
    assert latest([crash, partner, again, fused]) == [again, fused]
    assert len(completed([crash, partner, again, fused], launches=1)) == 1


def test_config_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore(tmp_path, RUN) as run:
        run.save_config("launches: 5\n")
        monkeypatch.setattr(
            Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
        )
        with pytest.raises(StoreError, match=r"cannot write .*config\.yaml: I/O error"):
            run.save_config("launches: 6\n")
        monkeypatch.undo()
        assert (tmp_path / "config.yaml").read_text() == "launches: 5\n"
        run.save_config("launches: 7\n")
    assert (tmp_path / "config.yaml").read_text() == "launches: 7\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "config.yaml",
        "records.jsonl",
        "samples.jsonl",
    ]

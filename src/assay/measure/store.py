"""The run folder: append-only lines that a crash, a kill or a full disk cannot damage.

    records.jsonl   one Record a line, fsynced: the truth, from which everything else is rebuilt
    samples.jsonl   one SampleLine a line, as they are taken
    *.torn          half-written last lines that a killed run left, set aside when the folder is reopened
    config.yaml     the resolved configuration that repeats the run
    .lock           held by the one process that writes here

A line is one `write` on a descriptor opened for appending. A line that does not fit is cut off again, so
the file always ends where the last whole line ends.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from assay.errors import StoreError
from assay.measure.record import SCHEMA, Record, SampleLine, Status

__all__ = [
    "MIN_FREE_MIB",
    "RunStore",
    "check_writable",
    "completed",
    "latest",
    "read_records",
    "read_samples",
    "write_atomically",
]

MIN_FREE_MIB = 64  # a full run of 10,000 records with their samples is about this big
RECORDS, SAMPLES, CONFIG, LOCK = "records.jsonl", "samples.jsonl", "config.yaml", ".lock"

# A launch that ended so may end otherwise when repeated; every other status is an answer.
_RETRIED = frozenset({Status.TIMEOUT, Status.CRASHED, Status.KILLED})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LineT = TypeVar("_LineT", Record, SampleLine)


class _Header(msgspec.Struct):
    schema: int = SCHEMA


_RECORD = msgspec.json.Decoder(Record)
_SAMPLE = msgspec.json.Decoder(SampleLine)
_HEADER = msgspec.json.Decoder(_Header)


class RunStore:
    """The one writer of a run's folder; a context manager.

    Opening checks that the folder can be written and has MIN_FREE_MIB free, before anything is measured,
    takes the lock, and sets torn last lines aside. Every failure is a StoreError of one line.
    """

    def __init__(self, folder: str | Path, run_id: str) -> None:
        self.folder, self.run_id = Path(folder), run_id
        check_space(self.folder)
        with _explained(f"write to {self.folder}"), ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(self.folder / LOCK))
            self._records = stack.enter_context(_appending(self.folder / RECORDS))
            self._samples = stack.enter_context(_appending(self.folder / SAMPLES))
            _sync_folder(self.folder)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and release the lock; harmless when repeated."""
        self._open.close()

    def append_record(self, record: Record) -> None:
        """Write one record and return when it is on the disk.

        Raises StoreError where the disk is full, or where the line would not read back: JSON holds neither
        NaN nor infinity.
        """
        assert record.run == self.run_id, f"record of run {record.run} in the store of {self.run_id}"
        assert record.schema == SCHEMA, "a record is written in the schema of this version"
        # Defaults are omitted, and this one will change: the schema is written whatever it is.
        line = b'{"schema":%d,' % SCHEMA + _encode(record, _RECORD)[1:]
        with _explained(f"append to {self.folder / RECORDS}"):
            _append(self._records, line)
            os.fsync(self._records)

    def append_sample(self, sample: SampleLine) -> None:
        """Hand one sample to the operating system, so that killing this process does not lose it."""
        assert sample.run == self.run_id, f"sample of run {sample.run} in the store of {self.run_id}"
        line = _encode(sample, _SAMPLE)
        with _explained(f"append to {self.folder / SAMPLES}"):
            _append(self._samples, line)

    def save_config(self, text: str) -> None:
        """Replace config.yaml by this text, as a whole or not at all."""
        write_atomically(self.folder / CONFIG, text.encode())


def read_records(path: str | Path) -> list[Record]:
    """Return the records of a run's folder, or of one JSONL file, in the order they were written.

    A torn last line is not a record and is left out. Raises StoreError for a damaged line, with its
    number, and for a record of a newer schema, with both versions.
    """
    file = _lines_file(path, RECORDS)
    records = _read(file, _RECORD)
    if any(record.schema > SCHEMA for record in records):
        raise _fault(file, _RECORD)
    return records


def read_samples(path: str | Path) -> list[SampleLine]:
    """Return the sample lines of a run's folder, or of one JSONL file, as `read_records` does."""
    return _read(_lines_file(path, SAMPLES), _SAMPLE)


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each id, in order of first appearance: what a resumed run repeated is replaced."""
    return list({record.id: record for record in records}.values())


def completed(records: Iterable[Record], launches: int) -> set[tuple[str, str, str, int]]:
    """What a resumed run need not repeat: (case id, baseline, other, launch) with both arms answered.

    Measured arms count, interrupted ones too, and so does every failure that repeating would only
    repeat. A launch in which an arm timed out, crashed or was killed is measured again, with both its arms.
    """
    arms: dict[tuple[str, str, str, int], set[str]] = {}
    retried: set[tuple[str, str, str, int]] = set()
    for record in latest(records):
        if record.launch < launches:
            place = (record.case.id, record.baseline, record.other, record.launch)
            arms.setdefault(place, set()).add(record.arm.name)
            if record.status in _RETRIED:
                retried.add(place)
    return {place for place, names in arms.items() if {place[1], place[2]} <= names} - retried


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new. Raises StoreError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _explained(f"write {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _encode(value: _LineT, decoder: msgspec.json.Decoder[_LineT]) -> bytes:
    """One line, newline included, that is known to read back: an unreadable one would hide all others."""
    try:
        line = msgspec.json.encode(value)
        decoder.decode(line)
    except (msgspec.DecodeError, TypeError, ValueError) as e:
        raise StoreError(f"a {type(value).__name__} would not read back: {e}") from e
    return line + b"\n"


def _append(fd: int, line: bytes) -> None:
    """Append a whole line or nothing. The caller holds the lock, so the file's end is where we begin."""
    end = os.fstat(fd).st_size
    try:
        written = os.write(fd, line)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(fd, end)
        raise


def check_space(folder: Path) -> None:
    """Refuse a nearly full disk before anything is created."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    with _explained(f"write to {folder}"):
        free_mib = shutil.disk_usage(place).free / 2**20
    if free_mib < MIN_FREE_MIB:
        raise StoreError(
            f"{folder} has {free_mib:.0f} MiB of disk space left; expected at least {MIN_FREE_MIB} MiB; "
            "free some or choose a folder on another disk"
        )


def check_writable(folder: Path) -> None:
    """Find a place where no folder can be, or a full disk, before anything is measured. Raises StoreError.

    Nothing is left behind.
    """
    check_space(folder)
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise StoreError(f"cannot write '{folder}': '{parent}' is not a folder; choose another place")
    probe = parent / f".assay-probe-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as e:
        raise StoreError(f"cannot write in '{parent}': {e.strerror}; choose another place") from e


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder against other runs. The lock dies with this process, however it dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode() or "unknown"
            raise StoreError(
                f"{path.parent} is being written by another run (process {holder}); "
                "wait until it ends or choose another folder"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, b"%d" % os.getpid())
        yield
    finally:
        os.close(fd)


@contextmanager
def _appending(path: Path) -> Iterator[int]:
    """A descriptor that appends to a file of whole lines."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _set_torn_aside(fd, path)
        yield fd
    finally:
        os.close(fd)


def _set_torn_aside(fd: int, path: Path) -> None:
    """Move what follows the last newline to `<name>.torn`: copied and synced there before it is cut here."""
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return
    whole = path.read_bytes().rfind(b"\n") + 1
    with path.with_name(f"{path.name}.torn").open("ab") as torn:
        torn.write(os.pread(fd, size - whole, whole) + b"\n")
        torn.flush()
        os.fsync(torn.fileno())
    os.ftruncate(fd, whole)


def _sync_folder(folder: Path) -> None:
    """Make the names of new files as durable as their content."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lines_file(path: str | Path, name: str) -> Path:
    path = Path(path)
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise StoreError(f"no records at {file}; expected a run's folder or a .jsonl file")
    return file


def _whole_lines(file: Path) -> bytes:
    with _explained(f"read {file}"):
        data = file.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def _read(file: Path, decoder: msgspec.json.Decoder[_LineT]) -> list[_LineT]:
    collecting = gc.isenabled()
    gc.disable()  # many small live objects and no garbage: collecting would double the time
    try:
        return decoder.decode_lines(_whole_lines(file))
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise _fault(file, decoder) from e
    finally:
        if collecting:
            gc.enable()


def _fault(file: Path, decoder: msgspec.json.Decoder[_LineT]) -> StoreError:
    """Say which line is wrong. Only called for a file that has one."""
    for number, line in enumerate(_whole_lines(file).split(b"\n"), 1):
        try:
            if line and (schema := _HEADER.decode(line).schema) > SCHEMA:
                return StoreError(
                    f"{file} line {number} has schema {schema}; expected at most {SCHEMA}; "
                    "read it with the version of assay that wrote it, or a newer one"
                )
            if line:
                decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            return StoreError(f"{file} line {number} is damaged: {e}; take that line out to read the rest")
    raise AssertionError(f"{file} was damaged a moment ago and is not now")


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn an operating system's error into one line with its remedy."""
    try:
        yield
    except OSError as e:
        full = "free disk space, then resume the run: every line already written is intact"
        remedy = full if e.errno in _FULL else "choose a folder that you can write to"
        raise StoreError(f"cannot {doing}: {e.strerror or e}; {remedy}") from e

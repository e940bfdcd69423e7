"""How long 10,000 records take to read, judge and draw. Target: at most 3 s for reading and drawing.

python benchmarks/report.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import msgspec

from assay import show
from assay.config import from_mapping
from assay.measure.record import Record, record_id
from assay.measure.store import RunStore, read_records
from assay.report.html import Bundle, render_html
from tests.report.fixtures import case_of, pair

COMPARISONS = 1000


def many(run: str) -> list[Record]:
    """A thousand comparisons of two arms and five launches, each with its own seed."""
    template = pair(case_of("infer"), launches=5, blocks=20)
    found = []
    for seed in range(COMPARISONS):
        for record in template:
            case = msgspec.structs.replace(record.case, seed=seed)
            place = record_id(run, case, record.baseline, record.other, record.arm.name, record.launch)
            found.append(msgspec.structs.replace(record, case=case, id=place, run=run))
    return found


def main() -> None:
    """Print seconds for each part."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        records = many("bench")
        with RunStore(folder, "bench") as store:
            for record in records:
                store.append_record(record)
        size = (folder / "records.jsonl").stat().st_size / 2**20
        begin = time.perf_counter()
        bundle = Bundle()
        loaded = read_records(folder)
        read = time.perf_counter()
        comparisons = show.judged(loaded, from_mapping({}, "defaults"))
        judged = time.perf_counter()
        page = render_html(loaded, comparisons, bundle)
        drawn = time.perf_counter()
    print(f"{len(loaded)} records, {size:.0f} MiB, {len(page) / 2**20:.1f} MiB of HTML")
    print(f"read {read - begin:.2f} s, judge {judged - read:.2f} s, draw {drawn - judged:.2f} s")
    print(f"reading and drawing {read - begin + drawn - judged:.2f} s, in all {drawn - begin:.2f} s")


if __name__ == "__main__":
    main()

"""Assay puts performance claims about PyTorch language models to the proof.

    import assay
    result = assay.compare({"a": f, "b": g}, inputs=make_inputs)   # result.verdict, .ratio, .interval
    timing = assay.measure(f)                                      # timing.median_ns
    records = assay.load("assay-results/...")

Importing this package never imports torch.
"""

from assay.api import Comparisons, Measurement, compare, load, measure
from assay.errors import AssayError, StoreError, Unavailable, UsageError, WorkerError

__all__ = [
    "AssayError",
    "Comparisons",
    "Measurement",
    "StoreError",
    "Unavailable",
    "UsageError",
    "WorkerError",
    "compare",
    "load",
    "measure",
]

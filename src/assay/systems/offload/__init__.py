"""Activation offloading: what autograd saves waits in host memory between forward and backward.

    from assay.systems.offload import offload_activations
    offload = offload_activations(model)              # once: it owns the pool of host memory
    with offload:                                     # every step
        model(ids_BT).loss.backward()
    offload.statistics.bytes_out

Read hooks.py, which is the system; devices.py is the little it asks of a device, pool.py where the bytes
wait. docs/offload.md shows how to use it. Importing this package does not import torch: names are imported
when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.lazy import exports

if TYPE_CHECKING:
    from assay.systems.offload.hooks import Candidate, Offloader, offload_activations
    from assay.systems.offload.statistics import Skipped, Statistics

__all__ = ["Candidate", "Offloader", "Skipped", "Statistics", "offload_activations"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Candidate": "hooks",
        "Offloader": "hooks",
        "Skipped": "statistics",
        "Statistics": "statistics",
        "offload_activations": "hooks",
    },
)

"""Activation offloading: what autograd saves waits in host memory between forward and backward.

    from assay.systems.offload import offload_activations
    offload = offload_activations(model)              # once: it owns the pool of host memory
    with offload:                                     # every step
        model(ids_BT).loss.backward()
    offload.statistics.bytes_out

    planned = plan_activations(model, model.model.layers, step, target_mib=4096)
    with planned:                                     # some blocks keep, some offload, some recompute
        model(ids_BT).loss.backward()

Read hooks.py, which is the system; options.py is what it may be asked for, entries.py and storages.py what it
knows of tensors, devices.py the little it asks of a device, pool.py where the bytes wait; fp8.py is the form
in which they may be lossy, errors.py what that costs in accuracy. plan.py has the words of planning:
profile.py measures a step, walk.py predicts what a plan of it costs, search.py finds the plan, planned.py
has blocks do it, and choosing.py decides tensor by tensor. docs/offload.md shows how to use it all.
Importing this package does not import torch: names are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.lazy import exports

if TYPE_CHECKING:
    from assay.systems.offload.errors import gradient_errors
    from assay.systems.offload.hooks import Offloader, offload_activations
    from assay.systems.offload.options import Candidate
    from assay.systems.offload.plan import (
        BlockProfile,
        Choice,
        Link,
        Piece,
        Plan,
        Prediction,
        Profile,
    )
    from assay.systems.offload.planned import PlannedOffloader, plan_activations
    from assay.systems.offload.profile import profile_step
    from assay.systems.offload.search import make_plan
    from assay.systems.offload.statistics import Skipped, Statistics
    from assay.systems.offload.walk import simulate

__all__ = [
    "BlockProfile",
    "Candidate",
    "Choice",
    "Link",
    "Offloader",
    "Piece",
    "Plan",
    "PlannedOffloader",
    "Prediction",
    "Profile",
    "Skipped",
    "Statistics",
    "gradient_errors",
    "make_plan",
    "offload_activations",
    "plan_activations",
    "profile_step",
    "simulate",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "BlockProfile": "plan",
        "Candidate": "options",
        "Choice": "plan",
        "Link": "plan",
        "Offloader": "hooks",
        "Piece": "plan",
        "Plan": "plan",
        "PlannedOffloader": "planned",
        "Prediction": "plan",
        "Profile": "plan",
        "Skipped": "statistics",
        "Statistics": "statistics",
        "gradient_errors": "errors",
        "make_plan": "search",
        "offload_activations": "hooks",
        "plan_activations": "planned",
        "profile_step": "profile",
        "simulate": "walk",
    },
)

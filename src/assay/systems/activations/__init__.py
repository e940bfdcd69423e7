"""Activation policies: what becomes, between forward and backward, of what autograd saves.

policies.py has one context manager a policy; language.py makes a language model of the bench take its
training steps under one, and holds its gradients against those without. Neither is imported here: the names
are listed without torch.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CUDA_ONLY", "POLICIES"]

# Policy -> what it does. The first is the baseline of the others.
POLICIES: Mapping[str, str] = {
    "off": "activations stay on the device",
    "offload": "they wait in host memory: offload_activations",
    "auto": "each block keeps, recomputes or offloads, planned for a target peak",
    "save-on-cpu": "torch.autograd.graph.save_on_cpu, pinned",
    "checkpoint": "every block is computed again in backward",
    "torchtune": "torchtune's OffloadActivations",
    "trl": "TRL's OffloadActivations",
}
CUDA_ONLY = ("save-on-cpu", "torchtune", "trl")  # on the CPU these move nothing

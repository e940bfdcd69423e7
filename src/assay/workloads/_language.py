"""What the language-model workloads share: token inputs and the probes. Not a plug-in itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from assay.contracts import Case, LanguageModel, Option, Probe

if TYPE_CHECKING:
    from torch import Tensor

SHAPE = Option(default="seed", help="named shape, config.json, Hugging Face folder or hub id")
ROTATED_INPUTS = 4  # timed steps rotate through this many inputs
PROBE_LENGTH = 16


def token_ids(case: Case, vocab_size: int, batch: int, length: int, *stream: int) -> Tensor:
    """Uniform random token ids (batch, length), int64, the same on every machine, device and torch.

    NumPy's PCG64 on the case's seed and `stream`, so no library's generator decides what is measured.
    """
    import torch

    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([case.seed, *stream])))
    return torch.from_numpy(rng.integers(0, vocab_size, (batch, length))).to(case.device)


def sequences(case: Case, vocab_size: int, stream: int) -> Tensor:
    """Token ids of the case's `batch_size` and `seq_length`."""
    return token_ids(case, vocab_size, whole(case, "batch_size"), whole(case, "seq_length"), stream)


class Inputs:
    """Token ids of the timed steps: a few tensors in turn, with new values before every sample.

    `draw` makes those of a case and a stream. The gate's go through the same tensors, so that an arm which
    knows a tensor again, or ids, gains nothing or answers for the wrong ones.
    """

    def __init__(self, case: Case, draw: Callable[[Case, int], Tensor]) -> None:
        self._on_host, self._draw, self._streams = replace(case, device="cpu"), draw, count(100)
        self._held = [draw(case, next(self._streams)) for _ in range(ROTATED_INPUTS)]
        self._used = 0  # tensors in turn since they were new

    def renew(self) -> None:
        """Other ids in every tensor that was used, without a wait for the device."""
        for ids_BT in self._held[: self._used]:
            drawn_BT = self._draw(self._on_host, next(self._streams))
            ids_BT.copy_(drawn_BT.pin_memory() if ids_BT.is_cuda else drawn_BT, non_blocking=True)
        used = self._held[: self._used]
        self._held, self._used = self._held[self._used :] + used, 0

    def __next__(self) -> Tensor:
        found = self._held[self._used % ROTATED_INPUTS]
        self._used += 1
        return found

    def holding(self, values_BT: Tensor) -> Tensor:
        """The next tensor, with those values."""
        return next(self).copy_(values_BT)


def smaller_sequences(case: Case) -> Case | None:
    """Shorter sequences first, then fewer, never less than 2 x 32."""
    return halve(case, {"seq_length": 32, "batch_size": 2})


def whole(case: Case, name: str) -> int:
    """A parameter of the case that is a whole number."""
    value = case.params[name]
    assert isinstance(value, int), f"{name} was checked to be whole"
    return value


def halve(case: Case, floors: Mapping[str, int]) -> Case | None:
    """The case with its largest reducible parameter halved, never under its floor; None when all are there.

    Keys come in the order in which they are reduced.
    """
    for name, floor in floors.items():
        value = whole(case, name)
        if value > max(floor, 1):
            return Case(
                workload=case.workload,
                params={**case.params, name: max(floor, value // 2)},
                dtype=case.dtype,
                device=case.device,
                seed=case.seed,
            )
    return None


def _logits(system: LanguageModel, ids_BT: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        return system.forward(ids_BT).double()


def _causality(system: LanguageModel, case: Case) -> tuple[float, float, str]:
    """Change one token: nothing before it may move."""
    ids_BT = token_ids(case, system.vocab_size, 1, PROBE_LENGTH, 7)
    changed_BT = ids_BT.clone()
    t = PROBE_LENGTH // 2
    changed_BT[:, t] = (changed_BT[:, t] + 1) % system.vocab_size
    a_BTV, b_BTV = _logits(system, ids_BT), _logits(system, changed_BT)
    moved_T = (a_BTV - b_BTV).abs().amax(dim=(0, 2))[:t]
    return (
        float(moved_T.max()),
        float(a_BTV.abs().max()),
        f"token {t} changed, position {int(moved_T.argmax())} moved",
    )


def _position(system: LanguageModel, case: Case) -> tuple[float, float, str]:
    """Swap two early tokens: the last position must move."""
    ids_BT = token_ids(case, system.vocab_size, 1, PROBE_LENGTH, 8)
    ids_BT[:, 1] = (ids_BT[:, 2] + 1) % system.vocab_size  # the two that are swapped must differ
    swapped_BT = ids_BT.clone()
    swapped_BT[:, [1, 2]] = ids_BT[:, [2, 1]]
    a_V, b_V = _logits(system, ids_BT)[0, -1], _logits(system, swapped_BT)[0, -1]
    return float((a_V - b_V).abs().max()), float(a_V.abs().max()), "tokens 1 and 2 swapped"


PROBES = {
    "causality": Probe(run=_causality, expects_change=False),
    "position": Probe(run=_position, expects_change=True),
}

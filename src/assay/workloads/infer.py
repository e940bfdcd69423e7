"""Inference: one forward pass over whole sequences, logits for every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from assay.contracts import Case, LanguageModel, Mark, Option, Scalar, Work
from assay.workloads._functions import overwritten, plain
from assay.workloads._language import PROBES, SHAPE, Inputs, sequences, smaller_sequences

if TYPE_CHECKING:
    from torch import Tensor


class InferTrial:
    """One forward pass on rotating random inputs, without gradients."""

    phases = ("forward",)

    def __init__(self, system: LanguageModel, case: Case) -> None:
        import torch

        self._system, self._case = system, case
        self._no_grad = torch.no_grad
        self._inputs = Inputs(case, lambda case, stream: sequences(case, system.vocab_size, stream))
        self.work: Mapping[str, Work] = system.work("infer", case.params)

    def step(self, mark: Mark) -> None:
        """Logits of every position, then dropped."""
        with self._no_grad():
            self._system.forward(next(self._inputs))
        mark("forward")

    def reset(self) -> None:
        """A step leaves nothing behind; the next sample's inputs are new."""
        self._inputs.renew()

    def outputs(self, seed: int) -> Mapping[str, Tensor]:
        """`logits`, (B, T, V)."""
        before_BT = sequences(self._case, self._system.vocab_size, seed)
        ids_BT = self._inputs.holding(before_BT)
        with self._no_grad():
            logits_BTV = plain(self._system.forward(ids_BT)).clone()
        return {"logits": logits_BTV, **overwritten({"ids": ids_BT}, {"ids": before_BT})}

    def proof(self) -> Mapping[str, Scalar]:
        """The system's own counters."""
        return self._system.proof()


class Infer:
    """The logits of every position are what the gate compares."""

    summary = "one forward pass, logits for every position"
    params: Mapping[str, Option] = {
        "shape": SHAPE,
        "batch_size": Option(default=2, help="sequences per step", minimum=1),
        "seq_length": Option(default=512, help="tokens per sequence", minimum=1),
    }
    probes = PROBES
    functions = False

    def sizes(self, given: Mapping[str, Sequence[Scalar]]) -> Mapping[str, Option]:  # noqa: ARG002
        """All are in `params`."""
        return {}

    def check(self, case: Case) -> None:
        """Everything is in the options."""

    def smaller(self, case: Case) -> Case | None:
        """Shorter sequences first, then fewer."""
        return smaller_sequences(case)

    def prepare(self, system: LanguageModel, case: Case) -> InferTrial:
        """Inputs are (batch_size, seq_length) random token ids."""
        return InferTrial(system, case)

    def expected(self, system: LanguageModel, case: Case, seed: int) -> Mapping[str, Tensor]:
        """The oracle takes the same step."""
        return InferTrial(system, case).outputs(seed)


WORKLOAD = Infer()

"""Training: forward, backward and clearing the gradients; the optimizer's step as a further phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from assay.contracts import Case, LanguageModel, Mark, Option, Scalar, Work
from assay.workloads._functions import overwritten, plain
from assay.workloads._language import PROBES, SHAPE, Inputs, sequences, smaller_sequences

if TYPE_CHECKING:
    from torch import Tensor


class TrainTrial:
    """One training step on rotating random inputs."""

    def __init__(self, system: LanguageModel, case: Case) -> None:
        self._system, self._case = system, case
        self._optimizer = str(case.params["optimizer"])
        self._inputs = Inputs(case, lambda case, stream: sequences(case, system.vocab_size, stream))
        self.phases: tuple[str, ...] = ("forward", "backward", "zero_grad")
        if self._optimizer != "none":
            self.phases = ("forward", "backward", "optimizer", "zero_grad")
        self.work: Mapping[str, Work] = system.work("train", case.params)

    def step(self, mark: Mark) -> None:
        """Forward with loss, backward, the optimizer where asked for, zero_grad."""
        loss = self._system.loss(next(self._inputs))
        mark("forward")
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        mark("backward")
        if self._optimizer != "none":
            self._system.optimizer_step(self._optimizer)
            mark("optimizer")
        self._system.zero_grad()
        mark("zero_grad")

    def reset(self) -> None:
        """A step leaves nothing behind: gradients are cleared inside it. The next sample's inputs are new."""
        self._inputs.renew()

    def outputs(self, seed: int) -> Mapping[str, Tensor]:
        """`loss` and `grad:<name>` of every parameter that has one."""
        before_BT = sequences(self._case, self._system.vocab_size, seed)
        ids_BT = self._inputs.holding(before_BT)
        try:
            loss = plain(self._system.loss(ids_BT))
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            grads = {f"grad:{n}": plain(g) for n, g in self._system.gradients().items() if g is not None}
        finally:  # also where memory ends half way: what is there would be added to
            self._system.zero_grad()
        return {"loss": loss.detach(), **grads, **overwritten({"ids": ids_BT}, {"ids": before_BT})}

    def proof(self) -> Mapping[str, Scalar]:
        """The system's own counters."""
        return self._system.proof()


class Train:
    """Loss and the gradient of every parameter are what the gate compares."""

    summary = "forward + backward + zero_grad of next-token training"
    params: Mapping[str, Option] = {
        "shape": SHAPE,
        "batch_size": Option(default=2, help="sequences per step", minimum=1),
        "seq_length": Option(default=512, help="tokens per sequence", minimum=2),
        "optimizer": Option(
            default="none",
            help="a further phase: the optimizer's step, at learning rate 0 so that weights stay shared",
            choices=("none", "sgd", "adamw"),
        ),
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

    def prepare(self, system: LanguageModel, case: Case) -> TrainTrial:
        """Inputs are (batch_size, seq_length) random token ids."""
        return TrainTrial(system, case)

    def expected(self, system: LanguageModel, case: Case, seed: int) -> Mapping[str, Tensor]:
        """The oracle takes the same step."""
        return TrainTrial(system, case).outputs(seed)


WORKLOAD = Train()

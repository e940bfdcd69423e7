"""A language model whose training steps run under an activation policy, and the proof that it is lossless.

Loss and gradients under the policy are held against those of the same module without it, on the same inputs
and with deterministic algorithms, after those without have been held against themselves.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from assay.errors import UsageError
from assay.measure.record import Scalar, Work
from assay.measure.saved import Ledger, saved_tensors
from assay.systems.activations.policies import Offload, Policy
from assay.systems.decoder.adapter import ModuleLM

__all__ = ["PolicyLM", "blocks_of", "deterministic"]

SCATTER = 3.0  # a tensor may depart from the baseline's this many times as far as the baseline's own repeats
REPEATS = 2
TINY = 1e-30  # of a norm: what divides is never zero
_ATTENTION_BACKWARD = re.compile(r"(flash|efficient)_attention\w*_backward")


class PolicyLM:
    """`inner` with `policy` around the forward of `loss`; everything else is the inner model's.

    `proof` adds the policy's counters and, once, what `differing` finds at `batch` x `length` tokens.
    """

    def __init__(self, inner: ModuleLM, policy: Policy, batch: int, length: int) -> None:
        self._inner, self._policy = inner, policy
        self._size = (batch, length)
        self._found: dict[str, Scalar] = {}
        self._under = contextlib.ExitStack()  # of a step whose backward belongs inside
        self._graphs = self._compiled_graphs()

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_step()
        self._inner.__exit__(*exc)

    @property
    def vocab_size(self) -> int:
        return self._inner.vocab_size

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of every position, (B, T, V); nothing is saved here, so no policy has a say."""
        return self._inner.forward(ids_BT)

    def loss(self, ids_BT: Tensor) -> Tensor:
        """The inner model's loss, a scalar, ready for backward, under the policy."""
        self._end_step()
        with contextlib.ExitStack() as under:
            under.enter_context(self._policy.around(ids_BT))
            loss = self._inner.loss(ids_BT)
            if self._policy.spans_backward:
                self._under = under.pop_all()
        return loss

    def _end_step(self) -> None:
        """Leave the policy that spans backward: by whatever comes after it."""
        self._under.close()

    def decoding(self, batch: int, max_length: int) -> Any:
        """The inner model's."""
        return self._inner.decoding(batch, max_length)

    def state(self) -> Mapping[str, Tensor]:
        return self._inner.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._inner.load(state)

    def gradients(self) -> Mapping[str, Tensor | None]:
        self._end_step()
        return self._inner.gradients()

    def zero_grad(self) -> None:
        self._end_step()
        self._inner.zero_grad()

    def optimizer_step(self, name: str) -> None:
        self._end_step()
        self._inner.optimizer_step(name)

    def layers(self) -> Mapping[str, nn.Module]:
        return self._inner.layers()

    def work(self, workload: str, params: Mapping[str, Scalar]) -> Mapping[str, Work]:
        """The inner model's: what a policy computes again is no further work of the step."""
        return self._inner.work(workload, params)

    def describe(self) -> Mapping[str, Scalar]:
        return self._inner.describe()

    def proof(self) -> dict[str, Scalar]:
        """Counters of the model and of the policy, and how many tensors differ from those without it."""
        if not self._found and type(self._policy) is not Policy:
            self._found = {**self.differing(*self._size), **self._predict()}
            self._settle()
        return {**self._inner.proof(), **self._policy.counters(), **self._found}

    def _predict(self) -> dict[str, Scalar]:
        """Have an offloader say what it should cost; or why it cannot."""
        if isinstance(self._policy, Offload):
            try:
                self._policy.predict(self._inputs(*self._size)[0])
            except torch.OutOfMemoryError as e:
                return {
                    "plan_reason": f"a step without offloading does not fit: {str(e).partition(chr(10))[0]}"
                }
            except UsageError as e:  # a figure that is only told: no reason to have none of the others
                return {"plan_reason": f"no step was profiled: {e}"}
        return {}

    def _settle(self) -> None:
        """Leave everything as the steps that are timed leave it: nothing of steps without the policy, or of
        another size, in an allocator's hands or in a pool of host memory."""
        torch.cuda.empty_cache()
        for ids_BT in self._inputs(*self._size):
            self._answers(ids_BT, self._policy)
        self.zero_grad()

    def _inputs(self, batch: int, length: int) -> Tensor:
        """Two batches of token ids, (2, B, T), the same ones each time."""
        generator = torch.Generator().manual_seed(batch * length)
        both = torch.randint(self.vocab_size, (2, batch, length), generator=generator)
        return both.to(next(iter(self.state().values())).device)

    def differing(self, batch: int, length: int) -> dict[str, Scalar]:
        """Steps on one input: without the policy, again without it, and with it, each after one on another.

        `different_tensors` counts the loss and the gradients that depart further than SCATTER times what the
        baseline departs from itself: where all tensors reproduce, every one that is not bit-identical. Where
        some do not, one that did may have by luck: it may depart like one that was rounded once. How far off
        the farthest is tells rounding from wrong data.
        Smaller batches, then shorter sequences, where the step without does not fit.
        """
        while True:
            try:
                return self._differing(batch, length)
            except torch.OutOfMemoryError:
                if batch == 1 and length <= 2:
                    raise
                batch, length = (max(1, batch // 2), length) if batch > 1 else (batch, length // 2)
            self.zero_grad()
            torch.cuda.empty_cache()

    def _differing(self, batch: int, length: int) -> dict[str, Scalar]:
        ids_BT, others_BT = self._inputs(batch, length)
        with deterministic(compiled=self._compiled_graphs() > self._graphs):
            with saved_tensors() as ledger:
                first = {name: t.clone() for name, t in self._answers(ids_BT, Policy()).items()}
            own = [self._departures(first, ids_BT, Policy()) for _ in range(REPEATS)]
            scatter = {name: max(d[name] for d in own) for name in first}
            limit = {name: SCATTER * departure for name, departure in scatter.items()}
            if any(limit.values()):
                limit = {name: max(limit[name], SCATTER * _rounding(t)) for name, t in first.items()}
            different: dict[str, float] = {}  # the farthest that each was off, as a share of its size
            for _ in range(REPEATS):
                self._answers(others_BT, self._policy)  # what it keeps of one step must not come in the next
                before = self._bytes_out()
                found = self._departures(first, ids_BT, self._policy)
                for name, departure in found.items():
                    if not departure <= limit[name]:  # not `>`: a NaN is no agreement
                        off = departure / float(first[name].norm(dtype=torch.float32).clamp_min(TINY))
                        different[name] = max(off, different.get(name, 0.0), key=_nan_first)
        self.zero_grad()
        return {
            "compared_tensors": len(first),
            "reproduced_tensors": sum(not departure for departure in scatter.values()),
            "different_tensors": len(different),
            "compared_batch": batch,
            "compared_length": length,
            **self._share_out(ledger, self._bytes_out() - before),
            **_farthest(different),
        }

    def _compiled_graphs(self) -> int:
        """Of the process: what others compiled in it before says nothing of this model."""
        return int(self._inner.proof().get("compiled_graphs", 0))

    def _bytes_out(self) -> int:
        """By their size on the device."""
        counters = self._policy.counters()
        return int(counters.get("offload_bytes_out", 0)) + int(counters.get("offload_bytes_spared", 0))

    def _share_out(self, ledger: Ledger, bytes_out: int) -> dict[str, Scalar]:
        """Of an offloader: what left, over what had to by the ledger: storages large enough, without the last
        ones, that are in flight when backward begins."""
        if not isinstance(self._policy, Offload):
            return {}
        options = self._policy.offloader.options
        may_leave = ledger.storages_bytes(options.min_bytes)
        due = may_leave - options.inflight_bytes(0, may_leave)
        return {"offload_share": bytes_out / due if due > 0 else 0.0}

    def _departures(self, first: Mapping[str, Tensor], ids_BT: Tensor, policy: Policy) -> dict[str, float]:
        """L2 distance of the loss and of every gradient from the first answers; 0 only where bits agree."""
        answers = self._answers(ids_BT, policy)
        if answers.keys() != first.keys():
            return dict.fromkeys(first, float("nan"))
        return {name: float((answers[name] - t).norm(dtype=torch.float32)) for name, t in first.items()}

    def _answers(self, ids_BT: Tensor, policy: Policy) -> dict[str, Tensor]:
        self.zero_grad()
        with contextlib.ExitStack() as under:
            under.enter_context(policy.around(ids_BT))
            loss = self._inner.loss(ids_BT)
            if not policy.spans_backward:
                under.close()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return {"loss": loss.detach()} | {n: g for n, g in self.gradients().items() if g is not None}


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder, ours or transformers'. Raises UsageError where there are none."""
    blocks = getattr(getattr(module, "model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UsageError(f"{type(module).__name__} has no blocks", expected="a decoder with `model.layers`")
    return list(blocks)


def _nan_first(departure: float) -> float:
    """A departure for comparing: one that is no number is the farthest."""
    return math.inf if math.isnan(departure) else departure


def _farthest(different: Mapping[str, float]) -> dict[str, Scalar]:
    """The tensor that is the farthest off, and by how much of its size: rounding, or wrong data."""
    if not different:
        return {}
    name = max(different, key=lambda name: _nan_first(different[name]))
    off = different[name]  # as text where it is no number: a record has none
    return {
        "farthest_different": name,
        "farthest_departure": float(f"{off:.3g}") if math.isfinite(off) else str(off),
    }


def _rounding(t: Tensor) -> float:
    """L2 size of a rounding of every element, as if all went the same way."""
    return torch.finfo(t.dtype).eps / 2 * float(t.norm(dtype=torch.float32))


@contextlib.contextmanager
def deterministic(*, compiled: bool) -> Iterator[None]:
    """Deterministic algorithms where an operator has one; restored afterwards.

    Attention is that of another kernel than cuDNN's, which has none; compiled code has chosen its own.
    """
    before, warned, cudnn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(cudnn and compiled)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operator without one says so; the repeats show what it does
            with contextlib.nullcontext() if compiled else _StrictAttention():  # type: ignore[no-untyped-call]
                yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


class _StrictAttention(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Attention's backward passes take their deterministic algorithm only where others would be an error.

    For them alone: a matrix product is an error then, unless the environment said something before the first
    one. Compiled code does not run under a dispatch mode.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if not _ATTENTION_BACKWARD.search(func.name()):
            return func(*args, **(kwargs or {}))
        torch.use_deterministic_algorithms(True)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)

"""FLOPs, fewest bytes and least memory of the phase-2 model's steps: floors no correct implementation beats.

Conventions are those of systems/decoder/cost.py: a multiply and an add are two FLOPs and only matrix products
count, so the mixer (a few operations a row and width) counts nothing; bytes are each weight once a phase,
gradients, logits and ids. The memory counts as the cheaper of its two forms: the recurrence, which writes and
reads a K x V matrix a position and head, or the products of all pairs. Imports no torch.

The mixer lets every position see the last one, so training needs all T of them, and the head at T - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

from assay.errors import UsageError, nearest
from assay.measure.record import Scalar, Work
from assay.systems.decoder.cost import OPTIMIZER_PASSES, WIDTHS, Widths
from assay.systems.resolvent.shapes import Phase2Config

__all__ = ["forward_flops", "least_memory", "work"]

_ID_BYTES = 8  # token ids are int64


def forward_flops(config: Phase2Config, batch: int, length: int, head_positions: int | None = None) -> float:
    """FLOPs of one forward over (batch, length) tokens with the head at `head_positions` of each row."""
    K, T = config.head_dim, length
    memory = config.n_heads * min(4.0 * K * K * T, 2.0 * K * T * (T + 1))
    blocks = config.n_layers * (2.0 * config.block_matmul_parameters * T + memory)
    return batch * (blocks + 2.0 * config.head_parameters * (T if head_positions is None else head_positions))


def work(config: Phase2Config, workload: str, params: Mapping[str, Scalar], dtype: str) -> dict[str, Work]:
    """Work of every phase of `train` or `infer`, and of `step`, their sum; empty for another workload.

    Reads `batch_size` and `seq_length`, and `optimizer` for `train`. Raises UsageError for an unknown dtype.
    """
    if workload not in ("train", "infer"):
        return {}
    widths, batch, length = _widths(dtype), int(params["batch_size"]), int(params["seq_length"])
    weights = float((config.parameters - config.head_parameters) * widths.computed)  # no embedding table
    ids = float(batch * length * _ID_BYTES)
    if workload == "infer":
        logits = float(batch * length * config.vocab_size * widths.computed)
        totals = {"forward": (forward_flops(config, batch, length), weights + logits + ids)}
    else:
        flops = forward_flops(config, batch, length, length - 1)
        stored = float(config.trained_parameters * widths.stored)
        totals = {"forward": (flops, weights + ids), "backward": (2 * flops, weights + stored)}
        optimizer = str(params.get("optimizer", "none"))
        if optimizer in OPTIMIZER_PASSES:
            totals["optimizer"] = (0.0, OPTIMIZER_PASSES[optimizer] * stored)
        totals["zero_grad"] = (0.0, 0.0)
    totals["step"] = reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), totals.values())
    largest = max(moved for name, (_, moved) in totals.items() if name != "step")
    return {
        name: Work(
            tokens=batch * length,
            samples=batch,
            flops=flops,
            bytes=moved,
            working_set_bytes=largest if name == "step" else moved,
            matmul_dtype=widths.matmul,
        )
        for name, (flops, moved) in totals.items()
    }


def least_memory(config: Phase2Config, batch: int, length: int, dtype: str) -> dict[str, int]:
    """What must exist at once at the peak of a forward that returns its logits: name -> bytes.

    The weights and ids throughout; beside them, where the head runs, its input and its result, or where a
    feed-forward runs, the residual stream and the wider activations, whichever is more.
    """
    widths, tokens = _widths(dtype), batch * length
    always = {"weights": config.parameters * widths.stored, "ids": tokens * _ID_BYTES}
    stream = tokens * config.d_model * widths.computed
    head = {"hidden states": stream, "logits": tokens * config.vocab_size * widths.computed}
    feed = {"residual stream": stream, "feed-forward": tokens * config.d_ff * widths.computed}
    return always | max(head, feed, key=lambda tensors: sum(tensors.values()))


def _widths(dtype: str) -> Widths:
    if dtype not in WIDTHS:
        raise UsageError(
            f"unknown dtype '{dtype}'", expected=f"one of {', '.join(WIDTHS)}", remedy=nearest(dtype, WIDTHS)
        )
    return WIDTHS[dtype]

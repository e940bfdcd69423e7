"""FLOPs and fewest bytes of a decoder's phases: floors that no correct implementation can beat.

Conventions. A multiply and an add are two FLOPs, and only matrix products count: norms, softmax, RoPE and
activations are left out, so that the sum stays a lower bound. Causal attention counts the pairs that
exist, T (T + 1) / 2, not the T^2 that math attention executes. What nobody reads need not be computed:

- training: the last token predicts nothing, so T - 1 positions are necessary;
- prefill: one position needs the head, and in the last layer one position needs more than keys and values.

Bytes count each weight once a phase in the width it is computed in, gradients in the width they are kept
in, logits that are returned, and the key-value cache. Activations could stay on chip and count nothing.
The embedding table counts only where the head reads it (tied): a lookup touches a few rows.

Work is stated in the phase where it is done: a loss that is fused with the head computes the head's two
gradient products in the forward, and what it moves from the backward leaves the sum of FLOPs as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

from assay.errors import UsageError, nearest
from assay.measure.record import Scalar, Work
from assay.systems.decoder.shapes import DecoderConfig

__all__ = [
    "OPTIMIZER_PASSES",
    "WIDTHS",
    "Widths",
    "forward_flops",
    "kv_bytes_per_token",
    "weight_bytes",
    "work",
]

_ID_BYTES = 8  # token ids are int64


@dataclass(frozen=True)
class Widths:
    """Bytes of a stored weight and of a computed element, and the matrix rate to hold FLOPs against."""

    stored: int
    computed: int
    matmul: str


WIDTHS: Mapping[str, Widths] = {
    "fp64": Widths(8, 8, "float64"),
    "fp32": Widths(4, 4, "float32"),
    "bf16": Widths(2, 2, "bfloat16"),
    "fp16": Widths(2, 2, "float16"),
    "bf16-autocast": Widths(4, 2, "bfloat16"),
}

# What a step of an optimizer must move, in multiples of the parameters: sgd reads weight and gradient and
# writes the weight; AdamW also reads and writes two moments.
OPTIMIZER_PASSES = {"sgd": 3, "adamw": 7}


def forward_flops(
    config: DecoderConfig, batch: int, length: int, *, head_positions: int | None = None, causal: bool = True
) -> float:
    """FLOPs of one forward over (batch, length) tokens with the head at `head_positions` of each row.

    `causal=False` counts the full T^2 square, which is what math attention with a mask executes.
    """
    head = length if head_positions is None else head_positions
    linear = config.num_hidden_layers * config.layer_matmul_parameters * length
    pairs = length * (length + 1) / 2 if causal else length * length
    attention = config.num_hidden_layers * _attention_flops(config, pairs)
    return batch * (2.0 * (linear + config.head_parameters * head) + attention)


def weight_bytes(config: DecoderConfig, dtype: str) -> float:
    """Bytes of the weights that a forward reads: all but an embedding table that only serves lookups."""
    lookups = 0 if config.tie_word_embeddings else config.head_parameters
    return float((config.parameters - lookups) * _widths(dtype).computed)


def kv_bytes_per_token(config: DecoderConfig, dtype: str) -> int:
    """Bytes of keys and values that one token of one row adds to the cache."""
    return 2 * config.num_hidden_layers * config.kv_width * _widths(dtype).computed


def work(
    config: DecoderConfig,
    workload: str,
    params: Mapping[str, Scalar],
    dtype: str,
    *,
    fused_loss: bool = False,
) -> dict[str, Work]:
    """Work of every phase of a workload, and of `step`, which is their sum.

    `fused_loss` says that the loss is fused with the head, whose gradients are then computed in `forward`.

    Reads `batch_size`, `seq_length` (`train`, `infer`; `optimizer` adds that phase), and `gen_batch_size`,
    `gen_input_length`, `gen_output_length` (`generate`). Empty for a workload that this file does not know.
    """
    phases: dict[str, Work] = {}
    if workload == "train":
        phases = _train(config, int(params["batch_size"]), int(params["seq_length"]), dtype, fused_loss)
        optimizer = str(params.get("optimizer", "none"))
        if optimizer in OPTIMIZER_PASSES:
            passes = OPTIMIZER_PASSES[optimizer] * config.parameters * _widths(dtype).stored
            phases["optimizer"] = _phase(phases["forward"], flops=0.0, moved=float(passes))
    elif workload == "infer":
        phases = {"forward": _infer(config, int(params["batch_size"]), int(params["seq_length"]), dtype)}
    elif workload == "generate":
        batch, prompt = int(params["gen_batch_size"]), int(params["gen_input_length"])
        phases = _generate(config, batch, prompt, int(params["gen_output_length"]), dtype)
    return {**phases, "step": _total(workload, phases)} if phases else {}


def _widths(dtype: str) -> Widths:
    if dtype not in WIDTHS:
        raise UsageError(
            f"unknown dtype '{dtype}'", expected=f"one of {', '.join(WIDTHS)}", remedy=nearest(dtype, WIDTHS)
        )
    return WIDTHS[dtype]


def _attention_flops(config: DecoderConfig, pairs: float) -> float:
    """Two products, scores and mixing, of 2 x head_dim FLOPs for each query-key pair and head."""
    return 4.0 * config.query_width * pairs


def _phase(like: Work, *, flops: float, moved: float) -> Work:
    return Work(
        tokens=like.tokens,
        samples=like.samples,
        flops=flops,
        bytes=moved,
        working_set_bytes=moved,
        matmul_dtype=like.matmul_dtype,
    )


def _train(config: DecoderConfig, batch: int, length: int, dtype: str, fused_loss: bool) -> dict[str, Work]:
    widths, weights = _widths(dtype), weight_bytes(config, dtype)
    flops = forward_flops(config, batch, length - 1)
    base = Work(tokens=batch * length, samples=batch, matmul_dtype=widths.matmul)
    gradients = float(config.parameters * widths.stored)
    # A fused loss leaves the gradient of the head's weight, as wide as it is computed, for the backward to
    # read in place of the weight itself.
    early = 4.0 * batch * (length - 1) * config.head_parameters if fused_loss else 0.0
    kept = config.head_parameters * widths.computed if fused_loss else 0
    return {
        "forward": _phase(base, flops=flops + early, moved=weights + kept + batch * length * _ID_BYTES),
        # each product of the forward has two in the backward: by its input and by its weight or partner
        "backward": _phase(base, flops=2 * flops - early, moved=weights + gradients),
        "zero_grad": _phase(base, flops=0.0, moved=0.0),  # gradients may simply be dropped
    }


def _infer(config: DecoderConfig, batch: int, length: int, dtype: str) -> Work:
    logits = batch * length * config.vocab_size * _widths(dtype).computed
    base = Work(tokens=batch * length, samples=batch, matmul_dtype=_widths(dtype).matmul)
    moved = weight_bytes(config, dtype) + logits + batch * length * _ID_BYTES
    return _phase(base, flops=forward_flops(config, batch, length), moved=moved)


def _generate(config: DecoderConfig, batch: int, prompt: int, output: int, dtype: str) -> dict[str, Work]:
    """Prefill gives the first token; each of the output - 1 further tokens is one decode step."""
    matmul = _widths(dtype).matmul
    first = Work(tokens=batch * prompt, samples=batch, matmul_dtype=matmul)
    cache = kv_bytes_per_token(config, dtype) * batch
    written = weight_bytes(config, dtype) + cache * prompt + batch * prompt * _ID_BYTES
    phases = {"prefill": _phase(first, flops=_prefill_flops(config, batch, prompt), moved=written)}
    steps = output - 1
    if steps:
        keys = sum(prompt + j for j in range(1, output))  # keys read, over all steps
        linear = config.num_hidden_layers * config.layer_matmul_parameters + config.head_parameters
        attention = config.num_hidden_layers * _attention_flops(config, keys)
        phases["decode"] = Work(
            tokens=batch * steps,
            samples=batch,
            flops=batch * (2.0 * linear * steps + attention),
            bytes=weight_bytes(config, dtype) * steps + cache * keys,
            working_set_bytes=weight_bytes(config, dtype) + cache * (prompt + steps),
            matmul_dtype=matmul,
        )
    return phases


def _prefill_flops(config: DecoderConfig, batch: int, prompt: int) -> float:
    """All layers but the last in full; of that one, keys and values in full, the rest at one position."""
    keys_and_values = 2 * config.hidden_size * config.kv_width
    full = (config.num_hidden_layers - 1) * config.layer_matmul_parameters * prompt
    last = keys_and_values * prompt + config.layer_matmul_parameters - keys_and_values
    pairs = (config.num_hidden_layers - 1) * prompt * (prompt + 1) / 2 + prompt
    return batch * (2.0 * (full + last + config.head_parameters) + _attention_flops(config, pairs))


def _total(workload: str, phases: Mapping[str, Work]) -> Work:
    """The sum of the phases. Training and inference count a token once; generation counts new tokens."""
    works = list(phases.values())
    new_tokens = (works[0].samples or 0) + sum(w.tokens or 0 for w in works[1:])
    return Work(
        tokens=new_tokens if workload == "generate" else works[0].tokens,
        samples=works[0].samples,
        flops=reduce(lambda total, w: total + (w.flops or 0.0), works, 0.0),
        bytes=reduce(lambda total, w: total + (w.bytes or 0.0), works, 0.0),
        working_set_bytes=max(w.working_set_bytes or 0.0 for w in works),
        matmul_dtype=works[0].matmul_dtype,
    )

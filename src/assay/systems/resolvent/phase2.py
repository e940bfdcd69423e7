"""The phase-2 language model: resolvent mixer, dissipative Hebbian memory, feed-forward.

    model = create_phase2_model("base")
    logits_BTV = model(ids_BT)
    logits_BTV, state = model(ids_BT, state=state, return_state=True)

Token and position embeddings, blocks that are pre-norm and residual throughout, a norm, a head of its own:

    x = x + mixer(norm(x));  x = x + memory(norm(x));  x = x + W2 gelu(W1 norm(x))

The mixer sees a whole call, later positions too, so the logits of a position are no prediction of what comes
after it: docs/phase2-model.md says what that does to a next-token loss.

Shapes: B batch, T positions of a call, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from assay.errors import UsageError
from assay.measure.record import Scalar
from assay.systems.resolvent.aligned import AlignedLinear
from assay.systems.resolvent.memory import HebbianMemory
from assay.systems.resolvent.mixer import ResolventMixer
from assay.systems.resolvent.shapes import VOCABULARY, Phase2Config, phase2_config

__all__ = ["Phase2Model", "Phase2State", "create_phase2_model"]


class Phase2State(NamedTuple):
    """What a model carries from one call to the next: each layer's W, (B, H, K, V), and positions seen."""

    memory: tuple[Tensor, ...]
    positions: int


class Block(nn.Module):
    """Mixer, memory and feed-forward, each added to what it was given the norm of."""

    def __init__(self, config: Phase2Config, implementation: str) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.d_model)
        self.mixer = ResolventMixer(config, implementation)
        self.memory_norm = nn.LayerNorm(config.d_model)
        self.memory = HebbianMemory(config)
        self.feed_norm = nn.LayerNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x_BTD: Tensor, h: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), h).to(x_BTD.dtype)
        read_BTD, memory = self.memory(self.memory_norm(x_BTD), memory)
        x_BTD = x_BTD + read_BTD
        fed_BTD: Tensor = self.down(F.gelu(self.up(self.feed_norm(x_BTD))))
        return x_BTD + fed_BTD, memory


class Phase2Model(nn.Module):
    """See create_phase2_model. Positions beyond `n_seq` and couplings of longer calls are made as needed."""

    def __init__(self, config: Phase2Config, implementation: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Parameter(
            waves(0, config.n_seq, config.d_model).to(torch.get_default_dtype()), requires_grad=False
        )
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]  # of blocks, which torch forgets
            Block(config, implementation) for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.head = AlignedLinear("head", config.d_model, config.vocab_size, bias=False)

    @overload
    def forward(self, input_ids: Tensor, state: Phase2State | None = None) -> Tensor: ...
    @overload
    def forward(
        self, input_ids: Tensor, state: Phase2State | None = None, *, return_state: Literal[True]
    ) -> tuple[Tensor, Phase2State]: ...
    def forward(
        self, input_ids: Tensor, state: Phase2State | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Phase2State]:
        """Logits (B, T, V); with `return_state` also the state after the call.

        `state` is what an earlier call on the same rows returned; None begins anew. Ids are checked on the
        CPU only, outside torch.compile: elsewhere that would wait for the device. Raises UsageError for ids,
        or a state, that do not fit.
        """
        self._check_ids(input_ids)
        if state is not None:
            self._check_state(state, input_ids.shape[0])
        seen, memories = state.positions if state else 0, []
        x_BTD = self.token(input_ids) + self._positions(seen, input_ids.shape[1])
        # of all layers at once: compiled, they are one kernel
        h = torch.stack([block.mixer.couplings(input_ids.shape[1]) for block in self.blocks])
        for layer, block in enumerate(self.blocks):
            x_BTD, memory = block(x_BTD, h[layer], state.memory[layer] if state else None)
            memories.append(memory)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        if not return_state:
            return logits_BTV
        return logits_BTV, Phase2State(tuple(memories), seen + input_ids.shape[1])

    def _positions(self, start: int, count: int) -> Tensor:
        """Embeddings of positions from `start` on, (count, D): stored ones, or computed beyond them."""
        if start + count <= self.config.n_seq:
            return self.position[start : start + count]
        stored = self.position[start:]
        more = count - stored.shape[0]
        made = waves(start + count - more, more, self.config.d_model, stored.device)
        return torch.cat((stored, made.to(stored.dtype)))

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            raise UsageError(
                "input_ids", expected="whole numbers (B, T)", got=f"{ids.dtype} {tuple(ids.shape)}"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise UsageError(
                    "a token is outside the vocabulary",
                    expected=f"0 to {self.config.vocab_size - 1}",
                    got=low if low < 0 else high,
                    remedy="use the model's own tokenizer, or create it with that vocab_size",
                )

    def _check_state(self, state: Phase2State, batch: int) -> None:
        config = self.config
        wanted = (batch, config.n_heads, config.head_dim, config.head_dim)
        found = [tuple(m.shape) for m in state.memory]
        if found != [wanted] * config.n_layers:
            wrong = next((shape for shape in found if shape != wanted), wanted)
            raise UsageError(
                "the state does not fit",
                expected=f"{config.n_layers} layers of {wanted}",
                got=f"{len(found)} of {wrong}",
                remedy="give what the same model returned for the same rows, or None to begin anew",
            )


def create_phase2_model(
    preset: str = "base",
    *,
    vocab_size: int = VOCABULARY,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    implementation: str = "auto",
    **overrides: Scalar,
) -> Phase2Model:
    """A phase-2 model with random weights: `small` (29.0 M parameters), `base` (71.0 M) or `large` (256 M).

    `overrides` change fields of the preset's Phase2Config. `dtype` is that of the weights, float32 unless
    given; they are drawn in float32 from `seed`, or from torch's global generator. `implementation` is that
    of the mixer's `resolvent_diagonal`. Raises UsageError for an unknown preset, override or value.
    """
    config = phase2_config(preset, vocab_size=vocab_size, **overrides)
    with torch.device(device if device is not None else torch.get_default_device()):
        model = Phase2Model(config, implementation)
        where = model.head.weight.device
        initialise(model, None if seed is None else torch.Generator(where).manual_seed(seed))
    return model.to(dtype) if dtype is not None else model


@torch.no_grad()
def initialise(model: Phase2Model, generator: torch.Generator | None) -> None:
    """Fill a model with random weights, drawn in the order of its parameters.

    Matrices are N(0, 1 / fan-in), the ones that write to the residual stream divided by the root of their
    number; the embedding is N(0, 1) and the head N(0, 1 / D), so logits are of order 1. Rates of the memory's
    heads spread from 1/2 to 1/64 a position. Couplings are 1 + 0.1 N(0, 1): hopping between neighbours.
    """
    writers = math.sqrt(3 * model.config.n_layers)
    for name, parameter in model.named_parameters():
        if name == "position":
            continue
        if "norm" in name or name.endswith("bias"):
            parameter.fill_(float("norm" in name and name.endswith("weight")))
            continue
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if name.endswith("coupling"):
            noise = 1 + 0.1 * noise
        elif name != "token.weight":
            noise /= math.sqrt(parameter.shape[1])
        if name.endswith(("out.weight", "down.weight")):
            noise /= writers
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, AlignedLinear):
            noise[layer.columns :] = 0
        parameter.copy_(noise)
    heads, columns = model.config.n_heads, model.blocks[0].memory.qkv_rate.columns
    rates = torch.logspace(-1, -6, heads, base=2) if heads > 1 else torch.full((1,), 0.125)
    for block in model.blocks:
        block.memory.qkv_rate.bias[columns - heads : columns] = rates.expm1().log()


def waves(start: int, count: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed embeddings of positions, (count, width), float64: sines and cosines of geometric wave lengths.

    Column 2 i is sin(p / 10000^(2 i / width)), column 2 i + 1 its cosine.
    """
    positions = torch.arange(start, start + count, device=device, dtype=torch.float64)
    columns = torch.arange(0, width, 2, device=device, dtype=torch.float64)
    turns = positions[:, None] * torch.exp(columns * (-math.log(10000.0) / width))
    return torch.stack((turns.sin(), turns.cos()), -1).flatten(1)[:, :width]

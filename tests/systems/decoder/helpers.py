"""Small decoders and how far two answers are apart."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from assay.systems.decoder.model import Decoder, initialise
from assay.systems.decoder.shapes import SHAPES, DecoderConfig, RopeScaling

TINY = SHAPES["tiny"]
CONFIGS: dict[str, DecoderConfig] = {
    "llama": TINY,
    "llama3-tied": replace(
        TINY,
        tie_word_embeddings=True,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    ),
    "llama-bias": replace(TINY, attention_bias="qkvo"),
    "mistral": replace(TINY, architecture="MistralForCausalLM", num_key_value_heads=4),
    "qwen2": replace(TINY, architecture="Qwen2ForCausalLM", attention_bias="qkv"),
    "qwen3": replace(
        TINY, architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=24, tie_word_embeddings=True
    ),
}


def new(config: DecoderConfig = TINY, attend: str = "eager", seed: int = 0) -> Decoder:
    """A float32 decoder with the random weights of a seed."""
    model = Decoder(config, attend)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def token_ids(batch: int, length: int, config: DecoderConfig = TINY, seed: int = 1) -> Tensor:
    """Random token ids, (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator)


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())

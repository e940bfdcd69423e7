"""The stock transformers model of a shape: the peer, and the truth that our own model is tested against."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from assay.errors import Unavailable
from assay.systems.decoder.shapes import DecoderConfig

__all__ = ["hf_config", "hf_module"]


def hf_config(config: DecoderConfig) -> Any:
    """The transformers configuration of a shape. Raises Unavailable without transformers."""
    transformers = _transformers()
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(config.rope_scaling)}
    kind = getattr(transformers, config.architecture.replace("ForCausalLM", "Config"))
    extra: dict[str, Any] = {} if config.architecture == "Qwen2ForCausalLM" else {"head_dim": config.head_dim}
    if config.architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        extra["attention_bias"] = config.attention_bias == "qkvo"
    if config.architecture == "MistralForCausalLM":
        extra["sliding_window"] = None
    return kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )


def hf_module(config: DecoderConfig, attend: str, *, liger: bool = False) -> nn.Module:
    """A float32 LlamaForCausalLM or its like on the CPU with weights yet to be loaded.

    `attend` is transformers' `attn_implementation`; `liger` applies Liger's kernels, which changes
    transformers for the whole process. Built on the CPU, so that its RoPE frequencies are those of every
    other arm to the last bit. Raises Unavailable without transformers.
    """
    transformers = _transformers()
    from transformers.initialization import no_init_weights

    stock = hf_config(config)
    stock._attn_implementation = attend
    with no_init_weights():
        module = getattr(transformers, config.architecture)(stock)
    module.tie_weights()  # a part of the initialising that was left out
    if liger:
        _apply_liger(module, config.architecture)
    built: nn.Module = module
    return built


def _apply_liger(module: nn.Module, architecture: str) -> None:
    from liger_kernel.transformers import monkey_patch

    kind = architecture.removesuffix("ForCausalLM").lower()
    getattr(monkey_patch, f"apply_liger_kernel_to_{kind}")(model=module)
    patched = module.forward

    @functools.wraps(patched)
    def forward(*args: Any, **kwargs: Any) -> Any:
        """Liger leaves its fused loss out of eval mode, in which every arm runs, unless it is asked."""
        return patched(*args, **kwargs, skip_logits=True if kwargs.get("labels") is not None else None)

    module.forward = forward


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise Unavailable("the stock model needs transformers", "pip install 'assay[models]'") from e
    return transformers

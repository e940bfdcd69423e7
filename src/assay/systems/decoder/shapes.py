"""Shapes of decoders: named ones, and those that a config.json, a local folder or a hub id describes.

Nothing here imports torch: the command line validates shapes and lists them through this file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from assay.errors import Unavailable, UsageError, nearest

__all__ = [
    "SHAPES",
    "SUPPORTED",
    "DecoderConfig",
    "RopeScaling",
    "Shape",
    "check_params",
    "parse_config",
    "resolve",
    "to_raw",
]

Bias = Literal["none", "qkv", "qkvo"]
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_T = TypeVar("_T", int, float, bool)


def _check_architecture(architecture: str) -> None:
    if architecture not in SUPPORTED:
        raise UsageError(
            f"unsupported architecture '{architecture}'",
            expected=f"one of {', '.join(SUPPORTED)}",
            remedy=nearest(architecture, SUPPORTED),
        )


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of long wavelengths: `factor` beyond original / `low`, none below / `high`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder with RMSNorm, half-rotation RoPE, grouped-query attention and SwiGLU.

    Field names are Hugging Face's. `qk_norm` is Qwen3's RMSNorm of every query and key head;
    `attention_bias` says which projections have one. Raises UsageError for a shape that cannot be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: Bias = "none"
    architecture: str = "LlamaForCausalLM"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be positive", got=getattr(self, name))
        if self.head_dim % 2:
            raise UsageError(
                "odd head size", expected="an even head_dim, since RoPE turns halves", got=self.head_dim
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                "KV heads do not divide heads",
                expected=f"num_key_value_heads that divides {self.num_attention_heads}",
                got=self.num_key_value_heads,
            )
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise UsageError(
                "rms_norm_eps and rope_theta must be positive", got=(self.rms_norm_eps, self.rope_theta)
            )
        _check_architecture(self.architecture)

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, which is that of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer that enter a matrix product: q, k, v, o, gate, up, down."""
        attention = self.hidden_size * (2 * self.query_width + 2 * self.kv_width)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_vector_parameters(self) -> int:
        """Parameters of one layer that do not: norms and biases."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        qkv = self.query_width + 2 * self.kv_width
        bias = {"none": 0, "qkv": qkv, "qkvo": qkv + self.hidden_size}[self.attention_bias]
        return norms + bias

    @property
    def head_parameters(self) -> int:
        """Parameters of the embedding table, and of the head, which may be the same."""
        return self.vocab_size * self.hidden_size

    @property
    def summary(self) -> str:
        """One line for lists: parameters and sizes."""
        heads = f"{self.num_attention_heads} heads, {self.num_key_value_heads} KV"
        return (
            f"{self.parameters / 1e6:,.1f} M parameters: vocabulary {self.vocab_size}, hidden "
            f"{self.hidden_size}, {self.num_hidden_layers} layers, {heads}, "
            f"{self.max_position_embeddings} positions"
        )

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        layer = self.layer_matmul_parameters + self.layer_vector_parameters
        tables = self.head_parameters * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A resolved shape: its configuration, and where real weights may lie: a folder or a hub id."""

    name: str
    config: DecoderConfig
    folder: Path | None = None
    hub_id: str | None = None


_LLAMA3 = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
_SEED = DecoderConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
)
_LLAMA_1B = DecoderConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=_LLAMA3,
    tie_word_embeddings=True,
)
_QWEN3_06B = DecoderConfig(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1e6,
    tie_word_embeddings=True,
    qk_norm=True,
    architecture="Qwen3ForCausalLM",
)
_TINY = replace(
    _SEED,
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    max_position_embeddings=128,
)

SHAPES: Mapping[str, DecoderConfig] = {
    "tiny": _TINY,
    "seed": _SEED,
    "qwen3-0.6b": _QWEN3_06B,
    "llama-1b": _LLAMA_1B,
    "qwen3-4b": replace(
        _QWEN3_06B, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32
    ),
    "llama-8b": replace(
        _LLAMA_1B,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        head_dim=128,
        rope_scaling=replace(_LLAMA3, factor=8.0),
        tie_word_embeddings=False,
    ),
}


def resolve(shape: str) -> Shape:
    """Return the shape of a name, a config.json, a local model folder or a hub id (`owner/name`).

    `NAME:LAYERS` is a named shape with another number of layers. Raises UsageError with the nearest name, or
    Unavailable where a hub id cannot be fetched.
    """
    name, colon, layers = shape.partition(":")
    if name in SHAPES and (not colon or layers.isdecimal()):
        config = SHAPES[name]
        return Shape(name=shape, config=replace(config, num_hidden_layers=int(layers)) if colon else config)
    path = Path(shape).expanduser()
    if path.is_dir():
        return Shape(name=shape, config=_read(path / "config.json"), folder=path)
    if path.suffix == ".json":
        return Shape(name=shape, config=_read(path))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", shape):
        return Shape(name=shape, config=_read(_fetch_config(shape)), hub_id=shape)
    raise UsageError(
        f"unknown shape '{shape}'",
        expected=f"one of {', '.join(SHAPES)}, a config.json, a model folder or a hub id",
        remedy=nearest(shape, SHAPES),
    )


def check_params(params: Mapping[str, bool | int | float | str]) -> None:
    """Raise UsageError where the lengths of a case do not fit the positions of its shape.

    Reads `shape`, `seq_length`, `gen_input_length` and `gen_output_length`; those absent are not checked.
    """
    positions = resolve(str(params["shape"])).config.max_position_embeddings
    prompt, output = int(params.get("gen_input_length", 0)), int(params.get("gen_output_length", 0))
    for what, length in (
        ("sequence length", int(params.get("seq_length", 0))),
        ("prompt + output", prompt + output),
    ):
        if length > positions:
            raise UsageError(
                f"{what} beyond the positions of shape '{params['shape']}'",
                expected=f"at most {positions}",
                got=length,
            )


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read a Hugging Face config.json, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises UsageError for what would make another function than the decoder here computes.
    """
    architecture = (raw.get("architectures") or ["(none)"])[0]
    _check_architecture(architecture)
    _refuse_unsupported(raw, architecture)
    heads, hidden = _get(raw, "num_attention_heads", int), _get(raw, "hidden_size", int)
    if raw.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise UsageError("hidden_size is not a multiple of the heads", got=f"{hidden} and {heads}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    bias: Bias = "qkv" if architecture == "Qwen2ForCausalLM" else "none"
    return DecoderConfig(
        vocab_size=_get(raw, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=_get(raw, "intermediate_size", int),
        num_hidden_layers=_get(raw, "num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=_get(raw, "num_key_value_heads", int, heads),
        head_dim=_get(raw, "head_dim", int, hidden // max(heads, 1)),
        max_position_embeddings=_get(raw, "max_position_embeddings", int),
        rms_norm_eps=_get(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=_get({**raw, **rope}, "rope_theta", float, 1e4),
        rope_scaling=_parse_scaling(rope),
        tie_word_embeddings=_get(raw, "tie_word_embeddings", bool, False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        attention_bias="qkvo" if raw.get("attention_bias") else bias,
        architecture=architecture,
    )


def to_raw(config: DecoderConfig) -> dict[str, Any]:
    """What `parse_config` reads: a config.json of transformers 5 that transformers 4 understands too.

    Raises UsageError for a shape that its architecture cannot state.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(config.rope_scaling)}
    raw = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        **{name: getattr(config, name) for name in _COUNTS},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "attention_bias": config.attention_bias == "qkvo",
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.architecture == "MistralForCausalLM":
        raw["sliding_window"] = None
    if parse_config(raw) != config:
        raise UsageError(
            f"no config.json of {config.architecture} can state this shape",
            expected="Qwen3's qk_norm, and biases as the architecture has them",
            got=f"qk_norm={config.qk_norm}, attention_bias={config.attention_bias}",
        )
    return raw


def _refuse_unsupported(raw: Mapping[str, Any], architecture: str) -> None:
    windowed = raw.get("use_sliding_window", architecture == "MistralForCausalLM")
    refused = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(raw.get("mlp_bias")),
        "sliding_window": bool(windowed and raw.get("sliding_window")),
        "quantization_config": raw.get("quantization_config") is not None,
        "partial_rotary_factor": (raw.get("rope_parameters") or raw).get("partial_rotary_factor", 1) != 1,
    }
    for key in (key for key, bad in refused.items() if bad):
        raise UsageError(f"config.json asks for {key}, which this decoder does not have", got=raw.get(key))


def _parse_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UsageError("unsupported rope scaling", expected="default or llama3", got=kind)
    return RopeScaling(
        factor=_get(rope, "factor", float),
        low_freq_factor=_get(rope, "low_freq_factor", float),
        high_freq_factor=_get(rope, "high_freq_factor", float),
        original_max_position_embeddings=_get(rope, "original_max_position_embeddings", int),
    )


def _get(raw: Mapping[str, Any], key: str, kind: type[_T], default: _T | None = None) -> _T:
    """Return `raw[key]` as a number of that kind. Raises UsageError when it is absent or another kind."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"config.json: bad '{key}'", expected=kind.__name__, got=repr(value))
    return kind(value)  # type: ignore[arg-type]  # `fits` has made sure that it is a number


def _read(path: Path) -> DecoderConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot read '{path}'", expected="a model's config.json", got=e) from e
    if not isinstance(raw, dict):
        raise UsageError(
            f"'{path}' is not a model's config.json", expected="an object", got=type(raw).__name__
        )
    return parse_config(raw)


def _fetch_config(hub_id: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as e:
        raise Unavailable(f"shape '{hub_id}' needs huggingface_hub", "pip install 'assay[models]'") from e
    try:
        with _without_warnings("huggingface_hub"):  # one for every retry; the last failure is told below
            return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as e:  # the hub's client raises several unrelated trees; each means "not reachable"
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise Unavailable(f"cannot fetch the shape of '{hub_id}': {reason}", "give a local folder") from e


@contextlib.contextmanager
def _without_warnings(logger: str) -> Iterator[None]:
    """Let a library log nothing below errors while inside."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)

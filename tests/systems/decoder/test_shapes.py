from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import Unavailable, UsageError
from assay.systems.decoder.shapes import SHAPES, check_params, parse_config, resolve

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # the seed's by hand: 2 x 1000 x 512 + 4 x (512 x 1280 + 3 x 512 x 1376 + 1024) + 512
        ("seed", 12_104_192),
        ("qwen3-0.6b", 596_049_920),
        ("llama-1b", 1_235_814_400),
        ("qwen3-4b", 4_022_468_096),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_named_shapes_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    assert resolve(name).config.parameters == parameters


def test_shapes_and_costs_do_not_import_torch() -> None:
    parts = "assay.systems.decoder.cost, assay.systems.decoder.shapes"
    code = f"import sys, {parts}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown shape 'lama-1b'.*did you mean 'llama-1b'\?"):
        resolve("lama-1b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 15}, "odd head size"),
        ({"num_key_value_heads": 3}, "KV heads do not divide heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
        ({"rms_norm_eps": 0.0}, "must be positive"),
        ({"architecture": "GPT2LMHeadModel"}, "unsupported architecture"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SHAPES["tiny"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCasualLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"architectures": None}, "one of LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling.*got yarn"),
        ({"hidden_size": "wide"}, "bad 'hidden_size'; expected int"),
        ({"hidden_size": True}, "bad 'hidden_size'; expected int"),
        ({"vocab_size": None}, "bad 'vocab_size'"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"num_attention_heads": 0}, "not a multiple"),
    ],
)
def test_config_files_of_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config({**LLAMA, **change})


def test_config_is_read_in_the_spelling_of_transformers_4_and_5() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    old = parse_config({**LLAMA, "rope_scaling": scaling})
    new = parse_config(
        {**LLAMA, "rope_theta": None, "rope_parameters": {**scaling, "rope_theta": 5e5}},
    )
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling is not None
    assert old.rope_scaling.factor == 8.0


def test_architecture_decides_biases_and_norms_of_heads() -> None:
    assert parse_config({**LLAMA, "architectures": ["Qwen2ForCausalLM"]}).attention_bias == "qkv"
    assert parse_config({**LLAMA, "attention_bias": True}).attention_bias == "qkvo"
    assert parse_config({**LLAMA, "architectures": ["Qwen3ForCausalLM"]}).qk_norm


def test_shape_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    by_folder, by_file = resolve(str(tmp_path)), resolve(str(tmp_path / "config.json"))
    assert by_folder.config == by_file.config == parse_config(LLAMA)
    assert by_folder.folder == tmp_path
    assert by_file.folder is None


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_broken_config_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError) as e:
        resolve(str(tmp_path))
    assert "\n" not in str(e.value)


@given(
    heads=st.integers(-1, 12),
    kv_heads=st.integers(-1, 12),
    head_dim=st.integers(-1, 40),
    layers=st.integers(-1, 3),
)
def test_a_configuration_is_either_possible_or_refused(
    heads: int, kv_heads: int, head_dim: int, layers: int
) -> None:
    possible = min(heads, kv_heads, head_dim, layers) > 0 and heads % kv_heads == 0 and head_dim % 2 == 0
    raw = {
        **LLAMA,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
    }
    if possible:
        assert parse_config(raw).query_width == heads * head_dim
    else:
        with pytest.raises(UsageError):
            parse_config(raw)


def test_lengths_beyond_the_positions_are_refused() -> None:
    check_params({"shape": "tiny", "batch_size": 1, "seq_length": 128})
    check_params({"shape": "tiny", "gen_input_length": 100, "gen_output_length": 28})
    with pytest.raises(UsageError, match=r"sequence length beyond.*at most 128; got 129"):
        check_params({"shape": "tiny", "seq_length": 129})
    with pytest.raises(UsageError, match=r"prompt \+ output beyond.*at most 128; got 129"):
        check_params({"shape": "tiny", "gen_input_length": 100, "gen_output_length": 29})


def test_hub_that_cannot_be_reached_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(Unavailable, match=r"cannot fetch the shape of 'owner/name': no route: give a local"):
        resolve("owner/name")


def test_shape_of_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    shape = resolve("owner/name")
    assert (shape.config, shape.hub_id, shape.folder) == (parse_config(LLAMA), "owner/name", None)

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.errors import Unavailable, UsageError
from assay.systems.decoder.build import build_decoder, build_hf, load, new_decoder
from assay.systems.decoder.hf import hf_module
from assay.systems.decoder.loading import save, weight_files
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.shapes import parse_config, resolve, to_raw
from assay.systems.decoder.state import load_strict, named_state, tied_names
from tests.systems.decoder.helpers import CONFIGS, error, new, token_ids


@pytest.fixture(params=["llama3-tied", "qwen3", "llama-bias"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A model folder as transformers saves it, with the weights of seed 7."""
    config = CONFIGS[request.param]
    stock = hf_module(config, "sdpa")
    load_strict(named_state(stock), named_state(new(config, seed=7)), to="stock", tied=tied_names(stock))
    stock.save_pretrained(tmp_path)  # type: ignore[operator]  # a module's attribute, to mypy
    return request.param, tmp_path


def test_real_weights_of_a_folder_come_back(folder: tuple[str, Path]) -> None:
    name, path = folder
    shape = resolve(str(path))
    assert shape.config == CONFIGS[name]
    model, weights = new_decoder(shape, seed=0, device="cpu")
    assert weights == "real"
    ids_BT = token_ids(2, 9)
    assert error(model(ids_BT).logits, new(CONFIGS[name], seed=7)(ids_BT).logits) < 1e-6
    system = build_hf(str(path), name="hf", dtype="fp32", device="cpu", seed=0, attend="sdpa")
    assert system.describe()["weights"] == "real"
    assert error(system.forward(ids_BT), model(ids_BT).logits) < 1e-5


def test_random_weights_where_there_are_none() -> None:
    system = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp32", device="cpu", seed=0)
    assert system.describe()["weights"] == "random"
    assert system.describe()["parameters"] == 80_192
    assert weight_files(resolve("tiny")) == []


def _shards(path: Path, state: dict[str, Tensor]) -> None:
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({n: state[n].clone() for n in chosen}, path / file)
    index = {"weight_map": {n: file for file, chosen in parts.items() for n in chosen}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_config(path: Path) -> None:
    raw = {**vars(CONFIGS["llama"]), "architectures": ["LlamaForCausalLM"], "attention_bias": False}
    (path / "config.json").write_text(json.dumps(raw))


def test_shards_are_read_through_their_index_without_old_frequency_tables(tmp_path: Path) -> None:
    _write_config(tmp_path)
    state = named_state(new(CONFIGS["llama"], seed=3))
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    _shards(tmp_path, {**state, **table})
    model, weights = new_decoder(resolve(str(tmp_path)), seed=0, device="cpu")
    assert weights == "real"
    assert all(torch.equal(t, state[n]) for n, t in named_state(model).items())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UsageError, match=r"a shard that is not there; expected b.safetensors"):
        new_decoder(resolve(str(tmp_path)), seed=0, device="cpu")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    _write_config(tmp_path)
    state = named_state(new(CONFIGS["llama"]))
    save_file({n: t for n, t in state.items() if "norm" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"do not fit shape .* 5 missing.*; give the config.json that"):
        new_decoder(resolve(str(tmp_path)), seed=0, device="cpu")


# load and save, for programs


def test_load_takes_a_folder_a_name_a_file_or_a_configuration(
    folder: tuple[str, Path], tmp_path: Path
) -> None:
    name, path = folder
    real = named_state(new(CONFIGS[name], seed=7))
    for where in (path, str(path)):
        model = load(where, dtype="fp32", device="cpu")
        assert all(torch.equal(t, real[n]) for n, t in named_state(model).items())
    drawn = named_state(new(CONFIGS[name], seed=2))
    for shape in (path / "config.json", CONFIGS[name]):
        model = load(shape, "sdpa", dtype="fp32", device="cpu", seed=2)
        assert all(torch.equal(t, drawn[n]) for n, t in named_state(model).items())
    assert load("tiny", device="cpu").config == CONFIGS["llama"]


@pytest.mark.parametrize("parts", ["fused", "sdpa", "plain", Parts(attention="sdpa", loss="chunked")])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16", "bf16-autocast"])
def test_load_rounds_the_same_weights_to_every_dtype(dtype: str, parts: Parts | str) -> None:
    model = load("tiny", parts, dtype=dtype, device="cpu")
    drawn = named_state(new())
    for name, tensor in named_state(model).items():
        assert tensor.dtype == model.lm_head.weight.dtype
        assert torch.equal(tensor, drawn[name].to(tensor.dtype))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("parts", ["fused", "plain"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_saved_comes_back_here_and_in_transformers(name: str, parts: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(CONFIGS[name], parts, dtype="fp32", device="cpu", seed=4)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", "fused", dtype="fp32", device="cpu")
    assert again.config == CONFIGS[name]
    state = named_state(model)
    assert all(torch.equal(t, state[n]) for n, t in named_state(again).items())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids_BT = token_ids(2, 9)
    assert error(stock(input_ids=ids_BT).logits, model(ids_BT).logits) < 1e-5


@pytest.mark.parametrize("name", list(CONFIGS))
def test_configuration_written_is_the_one_read(name: str) -> None:
    assert parse_config(json.loads(json.dumps(to_raw(CONFIGS[name])))) == CONFIGS[name]


def test_configuration_that_no_file_states_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIGS["llama"], qk_norm=True)
    with pytest.raises(UsageError, match=r"no config.json of LlamaForCausalLM can state this shape"):
        save(load(config, device="cpu"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"cannot write '.*taken'; expected a folder to write into; got"):
        save(load("tiny", device="cpu"), tmp_path / "taken")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"shape": "tinny"}, "unknown shape 'tinny'; expected .*; did you mean 'tiny'"),
    "parts": ({"parts": "fussed"}, r"unknown recipe 'fussed'; expected .* or a Parts; did you mean 'fused'"),
    "dtype": ({"dtype": "bf32"}, "unknown dtype 'bf32'; expected one of fp64"),
    "device": ({"device": "cuda:1"}, "unknown device 'cuda:1'; expected auto, cpu or cuda; choose among"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_refuses_what_cannot_be(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        load(**{"shape": "tiny", "device": "cpu", **options})


def test_load_never_draws_weights_in_place_of_missing_ones(tmp_path: Path) -> None:
    _write_config(tmp_path)
    with pytest.raises(
        UsageError, match=r"no weights in .*; expected \*.safetensors .*; give the config.json"
    ):
        load(tmp_path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_load_says_what_this_machine_lacks() -> None:
    with pytest.raises(Unavailable, match="there is no CUDA device: use device='cpu'"):
        load("tiny", device="cuda")
    with pytest.raises(Unavailable, match="Liger"):
        load("tiny", Parts(norm="liger"), device="cpu")

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.errors import UsageError
from assay.systems.decoder.build import build_decoder, build_hf, new_decoder
from assay.systems.decoder.hf import hf_module
from assay.systems.decoder.loading import weight_files
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.shapes import resolve
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
    with pytest.raises(UsageError, match=r"do not fit shape .* 5 missing"):
        new_decoder(resolve(str(tmp_path)), seed=0, device="cpu")

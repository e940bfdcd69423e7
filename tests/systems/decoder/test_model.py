"""The model and the oracle are two implementations; the stock transformers models are the third."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from assay.errors import UsageError
from assay.systems.decoder.attention import ATTENTION, attention
from assay.systems.decoder.cache import Cache, GrowingCache, StaticCache
from assay.systems.decoder.hf import hf_module
from assay.systems.decoder.model import Decoder
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.precision import cast
from assay.systems.decoder.reference import ReferenceLM, reference_logits
from assay.systems.decoder.shapes import DecoderConfig
from assay.systems.decoder.state import load_strict, named_gradients, named_state, tied_names
from tests.systems.decoder.helpers import CONFIGS, TINY, error, new, token_ids

# Stock models take cosines, sines and the loss in float32 whatever their own precision is.
STOCK_LIMIT = {torch.float64: 2e-6, torch.float32: 5e-6}


def _reference(model: Decoder, dtype: str = "fp64") -> ReferenceLM:
    return ReferenceLM(model.config, named_state(model), dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", list(STOCK_LIMIT))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_reference_equals_the_stock_model(name: str, dtype: torch.dtype) -> None:
    config, limit = CONFIGS[name], STOCK_LIMIT[dtype]
    stock = hf_module(config, "eager")
    load_strict(named_state(stock), named_state(new(config)), to="stock", tied=tied_names(stock))
    stock = cast(stock, dtype, "cpu").eval()
    reference = _reference(new(config), "fp64" if dtype is torch.float64 else "fp32")
    ids_BT = token_ids(2, 48)
    theirs, ours = stock(input_ids=ids_BT, labels=ids_BT), reference.loss(ids_BT)
    assert error(reference.forward(ids_BT), theirs.logits) < limit
    assert error(ours, theirs.loss) < limit
    theirs.loss.backward()
    ours.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    gradients = reference.gradients()
    assert set(gradients) == {n for n, _ in stock.named_parameters()}
    for parameter, p in stock.named_parameters():
        gradient = gradients[parameter]
        assert gradient is not None
        assert p.grad is not None
        assert error(gradient, p.grad) < limit, parameter


@pytest.mark.parametrize("attend", list(ATTENTION))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_model_equals_the_reference_in_float64(name: str, attend: str) -> None:
    model = cast(new(CONFIGS[name], attend), torch.float64, "cpu")
    reference = _reference(new(CONFIGS[name]))
    ids_BT = token_ids(2, 20)
    out, expected = model(ids_BT, labels=ids_BT), reference.loss(ids_BT)
    assert error(out.logits, reference.forward(ids_BT)) < 1e-13
    assert error(out.loss, expected) < 1e-13
    out.loss.backward()
    expected.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    gradients = reference.gradients()
    for parameter, p in model.named_parameters():
        gradient = gradients[parameter]
        assert gradient is not None
        assert p.grad is not None
        assert error(p.grad, gradient) < 1e-12, parameter


@pytest.mark.parametrize("attend", list(ATTENTION))
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 2e-6), ("bf16", 2e-2), ("bf16-autocast", 2e-2)])
def test_precisions_stay_near_the_truth_and_keep_their_dtypes(attend: str, dtype: str, limit: float) -> None:
    from assay.systems.decoder.precision import precision

    at = precision(dtype)
    model = cast(new(attend=attend), at.weights, "cpu")
    ids_BT = token_ids(2, 20)
    with at.context("cpu"):
        out = model(ids_BT, labels=ids_BT, use_cache=True)
    assert error(out.logits, _reference(new()).forward(ids_BT)) < limit
    assert out.logits.dtype == at.compute
    assert out.loss.dtype == torch.float32
    assert {t.dtype for t in (*out.past_key_values.keys, *out.past_key_values.values)} == {at.compute}


def test_frequencies_survive_every_cast() -> None:
    model = new()
    exact = model.model.rotary_emb.inv_freq.clone()
    for dtype in (torch.bfloat16, torch.float64):
        assert cast(model, dtype, "cpu") is model
        assert torch.equal(model.to(dtype).model.rotary_emb.inv_freq, exact)
    stock = cast(hf_module(TINY, "eager"), torch.bfloat16, "cpu")
    assert torch.equal(stock.get_buffer("model.rotary_emb.inv_freq"), exact)


@pytest.mark.parametrize("attend", list(ATTENTION))
def test_later_tokens_do_not_move_earlier_logits(attend: str) -> None:
    model, ids_BT = new(attend=attend), token_ids(1, 12)
    changed_BT = ids_BT.clone()
    changed_BT[0, 7] = (changed_BT[0, 7] + 1) % TINY.vocab_size
    with torch.no_grad():
        a, b = model(ids_BT).logits, model(changed_BT).logits
    assert torch.equal(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-3


def test_random_weights_make_attention_uneven_and_activations_of_order_one() -> None:
    state = named_state(new())
    logits_BTV = reference_logits(state, TINY, token_ids(4, 32))
    assert 0.5 < float(logits_BTV.std()) < 2.0
    flat = {n: torch.zeros_like(t) if "q_proj" in n else t for n, t in state.items()}  # uniform attention
    assert error(reference_logits(flat, TINY, token_ids(4, 32)), logits_BTV) > 0.1


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (named_state(new(seed=s)) for s in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("attend", list(ATTENTION))
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_incremental_decoding_equals_the_full_forward_at_every_position(
    kind: str, attend: str, prompt: int
) -> None:
    model = cast(new(CONFIGS["qwen3"], attend), torch.float64, "cpu")
    ids_BT, cache = token_ids(2, 14), _cache(kind, CONFIGS["qwen3"])
    with torch.no_grad():
        full_BTV = model(ids_BT).logits
        parts = [model(ids_BT[:, :prompt], past_key_values=cache).logits]
        parts += [model(ids_BT[:, t : t + 1], past_key_values=cache).logits for t in range(prompt, 14)]
    assert error(torch.cat(parts, dim=1), full_BTV) < 1e-13


def _cache(kind: str, config: DecoderConfig) -> Cache:
    if kind == "growing":
        return GrowingCache()
    cache = StaticCache(config, 2, 16, dtype=torch.float64, device="cpu")
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(1e3)  # what an earlier generation left must not be seen
    return cache


def test_growing_cache_takes_several_tokens_at_a_time() -> None:
    model, ids_BT, cache = cast(new(), torch.float64, "cpu"), token_ids(2, 12), GrowingCache()
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in (ids_BT[:, :5], ids_BT[:, 5:])]
        assert error(torch.cat(parts, dim=1), model(ids_BT).logits) < 1e-13
    assert cache.length == 12


def test_head_runs_at_the_last_positions_that_are_asked_for() -> None:
    model, ids_BT = new(), token_ids(2, 6)
    widths: list[int] = []
    model.lm_head.register_forward_hook(_note_width(widths))
    with torch.no_grad():
        assert error(model(ids_BT, logits_to_keep=1).logits, model(ids_BT).logits[:, -1:]) < 1e-6
    assert widths == [1, 6]


def _note_width(widths: list[int]):  # type: ignore[no-untyped-def]  # a hook's type has five parts
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        widths.append(inputs[0].shape[1])

    return hook


def test_unknown_attention_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'sdpa'"):
        attention("spda")


# recompute


class _Made(TorchDispatchMode):
    """Every storage that an operator made, to see later which are still held."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self._made[ref.cdata] = (ref, storage.nbytes())
        return out

    def held_bytes(self) -> int:
        return sum(size for ref, size in self._made.values() if not ref.expired())


@pytest.mark.parametrize("merged", [False, True])
def test_recompute_keeps_one_activation_less_of_each_layer_and_learns_the_same(merged: bool) -> None:
    held: dict[bool, int] = {}
    gradients: dict[bool, dict[str, Tensor | None]] = {}
    ids_BT, plain = token_ids(2, 24), new(TINY)
    for recompute in (False, True):
        model = Decoder(TINY, Parts(merged=merged, recompute=recompute))
        load_strict(named_state(model), named_state(plain), to="model", tied=tied_names(model))
        with _Made() as made:
            loss = model(ids_BT, labels=ids_BT).loss
        held[recompute] = made.held_bytes()
        loss.backward()
        gradients[recompute] = named_gradients(model)
    silu = ids_BT.numel() * TINY.intermediate_size * 4
    assert held[False] - held[True] == TINY.num_hidden_layers * silu
    for name, want in gradients[False].items():
        got = gradients[True][name]
        assert got is not None, name
        assert want is not None, name
        assert torch.equal(got, want), name

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.errors import UsageError
from assay.systems.decoder.adapter import ModuleLM, build_module
from assay.systems.decoder.build import build_decoder, build_reference
from assay.systems.decoder.model import next_token_loss
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.state import named_state
from tests.systems.decoder.helpers import CONFIGS, TINY, error, new, token_ids


class Bigram(nn.Module):
    """The least that the contract asks: ids in, logits out, no cache, no labels, no config."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.table(input_ids) * self.get_buffer("scale")
        return out


class Talkative(Bigram):
    """The most: its own loss, and tuples as a cache."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        logits_BTV = super().forward(input_ids)
        new_BKTD = self.table(input_ids)[:, None]
        past = new_BKTD if past_key_values is None else torch.cat((past_key_values[0][0], new_BKTD), dim=2)
        loss = None if labels is None else next_token_loss(logits_BTV, labels) * 3
        cache = ((past, past),) if use_cache else None
        return SimpleNamespace(logits=logits_BTV, loss=loss, past_key_values=cache)


def _wrap(module: nn.Module, **changes: Any) -> ModuleLM:
    common: dict[str, Any] = {"name": "mine", "dtype": "fp32", "device": "cpu", "weights": "builder"}
    return ModuleLM(module, **common, **changes)


def test_plain_module_trains_infers_and_generates_by_recomputing() -> None:
    module, ids_BT = Bigram(), token_ids(2, 6, TINY) % 11
    with _wrap(module) as system:
        assert system.vocab_size == 11  # by a probe
        assert system.forward(ids_BT).equal(module(ids_BT))
        loss = system.loss(ids_BT)
        assert loss.item() == pytest.approx(next_token_loss(module(ids_BT), ids_BT).item())
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        assert set(system.gradients()) == {"table.weight"}
        assert system.gradients()["table.weight"] is not None
        system.zero_grad()
        assert system.gradients() == {"table.weight": None}
        decoding = system.decoding(2, 8)
        _, token_B1 = decoding.prefill(ids_BT)
        logits_BV, _ = decoding.advance(token_B1)
        assert logits_BV.equal(module(token_B1)[:, -1])
        assert system.proof()["full_recompute"] is True
        assert system.work("train", {}) == {}
        assert system.layers() == {}


def test_a_fused_loss_states_the_heads_gradients_in_the_forward() -> None:
    params = {"batch_size": 2, "seq_length": 8}
    plain, fused = (
        build_decoder("tiny", Parts(loss=loss), name="x", dtype="fp32", device="cpu", seed=0)
        for loss in ("torch", "chunked")
    )
    before, after = plain.work("train", params), fused.work("train", params)
    moved = 2 * 2 * TINY.vocab_size * TINY.hidden_size * 2 * 7  # two products at 7 positions of 2 rows
    assert (after["forward"].flops or 0) - (before["forward"].flops or 0) == moved
    assert (before["backward"].flops or 0) - (after["backward"].flops or 0) == moved
    assert after["step"].flops == before["step"].flops


def test_a_modules_own_loss_and_tuple_cache_are_used() -> None:
    module, ids_BT = Talkative(), token_ids(2, 6, TINY) % 11
    system = _wrap(module)
    plain = next_token_loss(module(ids_BT).logits, ids_BT).item()
    assert system.loss(ids_BT).item() == pytest.approx(3 * plain)
    decoding = system.decoding(2, 8)
    _, token_B1 = decoding.prefill(ids_BT)
    decoding.advance(token_B1)
    assert system.proof()["kv_tokens_cached"] == 7
    assert system.proof()["full_recompute"] is False


def test_modules_that_take_anything_are_asked_whether_they_cache() -> None:
    class Open(Bigram):
        def forward(self, input_ids: Tensor, **_rest: Any) -> Any:
            return super().forward(input_ids)

    class Passing(Talkative):
        def forward(self, **given: Any) -> Any:  # type: ignore[override]  # a wrapper's signature
            return super().forward(**given)

    for module, recomputes in ((Open(), True), (Passing(), False)):
        system = _wrap(module)
        system.decoding(1, 8).prefill(token_ids(1, 4) % 11)
        assert system.proof()["full_recompute"] is recomputes

    class Forgetful(Bigram):
        def forward(self, input_ids: Tensor, past_key_values: Any = None) -> Any:
            return super().forward(input_ids)

    with pytest.raises(UsageError, match="takes past_key_values and gave none back"):
        _wrap(Forgetful()).decoding(1, 8).prefill(token_ids(1, 4) % 11)


def test_vocabulary_comes_from_the_builder_then_the_config() -> None:
    module = Bigram()
    module.config = SimpleNamespace(vocab_size=9)  # type: ignore[assignment]  # as stock models have it
    assert _wrap(module).vocab_size == 9
    assert _wrap(module, vocab_size=7).vocab_size == 7


def test_state_has_parameters_and_kept_buffers_once() -> None:
    assert set(_wrap(Bigram()).state()) == {"table.weight", "scale"}
    tied = new(CONFIGS["llama3-tied"])
    assert "lm_head.weight" not in _wrap(tied).state()


def test_load_is_strict_and_names_the_first_three() -> None:
    system = _wrap(new())
    state = {name: t + 1 for name, t in system.state().items()}
    system.load(state)
    assert all(torch.equal(t, state[name]) for name, t in system.state().items())
    missing = dict(list(state.items())[5:])
    with pytest.raises(UsageError, match=r"do not fit 'mine': 5 missing: .*, .*, .* and 2 more"):
        system.load(missing)
    with pytest.raises(UsageError, match="1 extra: surplus"):
        system.load({**state, "surplus": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"1 mis-shaped: model.norm.weight \(3,\) for \(64,\)"):
        system.load({**state, "model.norm.weight": torch.zeros(3)})


def test_nothing_is_loaded_where_something_does_not_fit() -> None:
    system = _wrap(new())
    before = {name: t.clone() for name, t in system.state().items()}
    with pytest.raises(UsageError):
        system.load({name: t + 1 for name, t in before.items() if name != "model.norm.weight"})
    assert all(torch.equal(t, before[name]) for name, t in system.state().items())


def test_tied_weights_load_under_either_name_but_not_with_two_values() -> None:
    system = _wrap(new(CONFIGS["llama3-tied"]))
    state = {name: t + 1 for name, t in system.state().items()}
    table = state.pop("model.embed_tokens.weight")
    system.load({**state, "lm_head.weight": table})
    assert torch.equal(system.state()["model.embed_tokens.weight"], table)
    system.load({**state, "lm_head.weight": table, "model.embed_tokens.weight": table.clone()})
    with pytest.raises(UsageError, match=r"untied.*lm_head.weight"):
        system.load({**state, "lm_head.weight": table + 1, "model.embed_tokens.weight": table})


def test_state_map_renames_everywhere() -> None:
    system = _wrap(Bigram(), state_map={"table.weight": "embed.weight"})
    assert set(system.state()) == {"embed.weight", "scale"}
    assert set(system.gradients()) == {"embed.weight"}
    system.load({"embed.weight": torch.ones(11, 11), "scale": torch.ones(1)})
    with pytest.raises(UsageError, match=r"names 'tabel.weight'.*did you mean 'table.weight'"):
        _wrap(Bigram(), state_map={"tabel.weight": "x"})


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_steps_leave_the_weights_alone(name: str) -> None:
    system = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp32", device="cpu", seed=0)
    before = {n: t.clone() for n, t in system.state().items()}
    for _ in range(2):
        system.loss(token_ids(2, 8)).backward()  # type: ignore[no-untyped-call]  # unannotated in torch
        system.optimizer_step(name)
    assert all(torch.equal(t, before[n]) for n, t in system.state().items())
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        system.optimizer_step("adam")


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (lambda: 3, r"builder 'b' returned int; expected an nn.Module"),
        (lambda _case: None, r"builder 'b' returned NoneType"),
        (
            lambda: 1 / 0,
            r"builder 'b' raised; expected an nn.Module; got ZeroDivisionError: division by zero",
        ),
    ],
)
def test_builders_that_give_no_module_are_one_line(builder: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        build_module(builder, "b", case="the case")
    assert "\n" not in str(e.value)


def test_builders_take_the_case_or_nothing() -> None:
    seen: list[object] = []

    def with_case(case: object) -> nn.Module:
        seen.append(case)
        return Bigram()

    def with_default(case: object = None) -> nn.Module:
        return with_case(case)

    def with_width(width: int = 11) -> nn.Module:
        return Bigram(width)

    for builder in (with_case, with_default):
        build_module(builder, "b", case="the case")
    assert seen == ["the case", "the case"]
    assert build_module(with_width, "b", case="the case").table.num_embeddings == 11  # type: ignore[union-attr]  # ours


def test_modules_that_are_called_otherwise_or_answer_otherwise_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected forward\(input_ids, ...\); got forward\(input\)"):
        _wrap(nn.Sequential(nn.Embedding(3, 3)))

    class Wrong(Bigram):
        def forward(self, input_ids: Tensor) -> Any:
            return {"answer": input_ids}

    with pytest.raises(UsageError, match=r"expected logits .* got dict"):
        _wrap(Wrong()).forward(token_ids(1, 3))

    class Flat(Bigram):
        def forward(self, input_ids: Tensor) -> Any:
            return super().forward(input_ids)[:, -1]

    with pytest.raises(UsageError, match="logits of 2 dimensions"):
        _wrap(Flat()).forward(token_ids(1, 3) % 11)


def test_layers_are_named_and_hooks_fire_in_model_and_oracle_alike() -> None:
    system = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp64", device="cpu", seed=0)
    oracle = build_reference("tiny", dtype="fp64", device="cpu", seed=0)
    seen: list[dict[str, Tensor]] = []
    for each in (system, oracle):
        found: dict[str, Tensor] = {}
        for name, layer in each.layers().items():
            layer.register_forward_hook(lambda _m, _i, out, name=name, found=found: found.update({name: out}))
        each.forward(token_ids(1, 5))
        seen.append(found)
    assert list(seen[0]) == list(seen[1]) == ["model.layers.0", "model.layers.1"]
    assert all(error(seen[0][name], seen[1][name]) < 1e-13 for name in seen[0])


def test_a_builders_compiled_module_keeps_its_own_names() -> None:
    system = _wrap(torch.compile(Bigram(), backend="eager"))  # type: ignore[arg-type]  # it is a module
    assert set(system.state()) == {"table.weight", "scale"}
    assert system.forward(token_ids(1, 4) % 11).shape == (1, 4, 11)


def test_reference_takes_the_state_of_the_model() -> None:
    oracle = build_reference("tiny", dtype="fp64", device="cpu", seed=0)
    model = new(seed=5)
    oracle.load(named_state(model))
    assert error(oracle.forward(token_ids(1, 9)), model(token_ids(1, 9)).logits.detach()) < 1e-6
    with pytest.raises(UsageError, match="the reference has no optimizer"):
        oracle.optimizer_step("sgd")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")],
)
def test_a_builder_that_runs_out_of_memory_is_no_mistake_of_its_user(error: Exception) -> None:
    def greedy() -> nn.Module:
        raise error

    with pytest.raises(type(error)) as caught:
        build_module(greedy, "greedy", None)
    assert caught.value is error

"""The phase-2 model against its plain reference; presets, lengths, dtypes, states, compiling, training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from assay.errors import UsageError
from assay.systems.decoder.state import named_gradients, named_state
from assay.systems.resolvent import PRESETS, Phase2Model, Phase2State, create_phase2_model
from assay.systems.resolvent.cost import least_memory
from assay.systems.resolvent.reference import phase2_logits

TINY: dict[str, Any] = {
    "vocab_size": 57, "d_model": 24, "n_layers": 2, "n_seq": 20, "n_heads": 3, "head_dim": 8, "d_ff": 32,
    "chunk": 4,
}  # fmt: skip
COMPILER = [  # torch's own, when it compiles
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex"),
]


def tiny(**more: Any) -> Phase2Model:
    return create_phase2_model("small", seed=0, **{**TINY, **more})


def token_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 57, (batch, length), generator=torch.Generator().manual_seed(seed))


# Presets


@pytest.mark.parametrize(("preset", "millions"), [("small", "29.0"), ("base", "71.0"), ("large", "256.5")])
def test_presets_have_the_parameters_that_are_stated(preset: str, millions: str) -> None:
    with torch.device("meta"):
        model = Phase2Model(PRESETS[preset])
    counted = sum(t.numel() for t in named_state(model).values())
    assert f"{counted / 1e6:.1f}" == millions
    assert counted == PRESETS[preset].parameters
    assert counted - model.position.numel() == PRESETS[preset].trained_parameters
    padding = sum(p.numel() for p in model.parameters()) - counted
    config = PRESETS[preset]
    rows = (
        -(3 * config.memory_width + config.n_heads) % 64
    )  # of q, k, v and rates; the head's: 50257 to 50304
    assert padding == 47 * config.d_model + config.n_layers * rows * (config.d_model + 1)


def test_same_seed_same_weights_in_every_dtype() -> None:
    first, again, half = tiny(), tiny(), tiny(dtype=torch.float16)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert torch.equal(weight.half(), half.state_dict()[name])
    other = create_phase2_model("small", seed=1, **TINY)
    assert not torch.equal(first.token.weight, other.token.weight)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: create_phase2_model("bas"), "no preset 'bas' .*small, base, large; did you mean 'base'"),
        (lambda: create_phase2_model(n_head=4), "has no 'n_head'; .*; did you mean 'n_heads'"),
        (
            lambda: create_phase2_model(n_layers=0),
            "n_layers of the phase-2 model; expected at least 1; got 0",
        ),
        (lambda: create_phase2_model(d_model=12.5), "d_model .*; expected a whole number; got 12.5"),
        (lambda: create_phase2_model(eta=0.0), "eta of the phase-2 model; expected above 0; got 0.0"),
        (lambda: create_phase2_model(dt=float("nan")), "dt of the phase-2 model; expected a number; got nan"),
        (lambda: tiny(implementation="pcrr"), "no implementation 'pcrr'"),
        (lambda: tiny()(torch.tensor([[1, 57]])), "outside the vocabulary; expected 0 to 56; got 57"),
        (lambda: tiny()(torch.tensor([[1, -1]])), "outside the vocabulary; expected 0 to 56; got -1"),
        (lambda: tiny()(torch.tensor([1, 2])), "input_ids; expected whole numbers"),
        (lambda: tiny()(torch.rand(2, 3)), "input_ids; expected whole numbers"),
        (
            lambda: tiny()(token_ids(2, 3), tiny()(token_ids(1, 3), return_state=True)[1]),
            r"the state does not fit; expected 2 layers of \(2, 3, 8, 8\); got 2 of \(1, 3, 8, 8\)",
        ),
        (lambda: tiny()(token_ids(2, 3), Phase2State((), 0)), "the state does not fit; .*; got 0 of"),
    ],
)
def test_what_is_wrong_gets_one_line(call: Callable[[], object], line: str) -> None:
    with pytest.raises(UsageError, match=line) as refused:
        call()
    assert "\n" not in str(refused.value)


# Against the reference


@pytest.mark.parametrize("T", [1, 2, 7, 20, 33])
def test_logits_and_gradients_are_the_references(T: int) -> None:
    model, ids_BT = tiny(dtype=torch.float64), token_ids(2, T)
    state = {n: p.clone().requires_grad_() for n, p in named_state(model).items()}
    found, expected = model(ids_BT), phase2_logits(state, model.config, ids_BT)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, gradient in named_gradients(model).items():
        if name == "position":
            assert gradient is None
        elif state[name].grad is None:  # the couplings of a single position
            assert T == 1
        else:
            torch.testing.assert_close(gradient, state[name].grad, rtol=1e-9, atol=1e-11)


def test_a_carried_state_continues_memory_and_positions() -> None:
    """With the mixer silenced, whose rows are those of one call, two calls are one."""
    model = tiny(dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if ".mixer.out." in name:
            parameter.data.zero_()
    ids_BT = token_ids(2, 31)
    whole, last = model(ids_BT, return_state=True)
    first, state = model(ids_BT[:, :13], return_state=True)
    second, end = model(ids_BT[:, 13:], state, return_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-12)
    assert (state.positions, end.positions) == (13, 31)
    for got, want in zip(end.memory, last.memory, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    second.sum().backward()  # the state did not cut the graph
    assert model.token.weight.grad is not None
    assert (model.token.weight.grad[ids_BT[:, :13].unique()] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_and_autocast_stay_near_float32(dtype: torch.dtype) -> None:
    model, ids_BT = tiny(), token_ids(3, 25)
    wide = model(ids_BT)
    limit = {torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    with torch.autocast("cpu", dtype):
        mixed = model(ids_BT)
    found, state = tiny(dtype=dtype)(ids_BT, return_state=True)
    for logits in (mixed, found):
        assert logits.dtype == dtype
        assert (logits.float() - wide).norm() < limit * wide.norm()
    assert {m.dtype for m in state.memory} == {torch.float32}


def test_the_mixer_sees_later_positions() -> None:
    """What the documents say of a next-token loss rests on it."""
    model, ids_BT = tiny(), token_ids(1, 10)
    changed = ids_BT.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 57
    assert ((model(ids_BT) - model(changed))[0, :6].abs().amax(-1) > 1e-4).all()


# Use


def test_training_lowers_the_loss() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    starts, losses = torch.Generator().manual_seed(0), []
    for step in range(20):
        shape = (8, 12) if step % 2 else (4, 26)  # batch and length change, and go beyond n_seq
        ids_BT = (torch.randint(57, (shape[0], 1), generator=starts) + torch.arange(shape[1])) % 57
        logits_BTV = model(ids_BT)
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_logits_lie_in_aligned_rows_and_can_be_flattened_without_a_copy() -> None:
    logits_BTV = tiny()(token_ids(2, 5))
    assert logits_BTV.stride() == (5 * 64, 64, 1)
    assert logits_BTV.view(-1, 57).data_ptr() == logits_BTV.data_ptr()


def test_the_heads_padding_stays_zero_and_no_checkpoint_has_it() -> None:
    model = tiny()
    assert model.head.weight.shape == (64, 24)
    assert named_state(model)["head.weight"].shape == (57, 24)
    model(token_ids(2, 5)).square().mean().backward()
    assert model.head.weight.grad is not None
    assert not model.head.weight.grad[57:].any()
    assert not model.head.weight[57:].any()


@pytest.mark.slow
@pytest.mark.filterwarnings(*[mark.args[0] for mark in COMPILER])
def test_compiles_whole_and_gives_the_same() -> None:
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    ids_BT = token_ids(2, 24)
    (want, state), (got, carried) = model(ids_BT, return_state=True), compiled(ids_BT, return_state=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().mean(), model.head.weight)[0] for x in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    state, carried = (s._replace(memory=tuple(m.detach() for m in s.memory)) for s in (state, carried))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids_BT, carried), model(ids_BT, state), rtol=1e-4, atol=1e-5)


# On a GPU


@pytest.mark.gpu
@pytest.mark.filterwarnings(*[mark.args[0] for mark in COMPILER])
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")  # the first call of a process
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch primes its own pool
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_float16_on_a_gpu_is_near_float32(graphs: bool) -> None:
    model = create_phase2_model("small", seed=0, device="cuda")
    ids_BT = torch.randint(0, 50257, (2, 300), device="cuda")
    with torch.no_grad():
        wide = model(ids_BT)
        half = create_phase2_model("small", seed=0, device="cuda", dtype=torch.float16)
        eager = half(ids_BT)
        compiled = torch.compile(half, fullgraph=True, dynamic=False, options={"triton.cudagraphs": graphs})
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(ids_BT).clone()
    for logits in (eager, found):
        assert logits.dtype == torch.float16
        assert (logits.float() - wide).norm() < 5e-3 * wide.norm()


@pytest.mark.gpu
def test_kernel_and_chunks_agree_in_the_model_on_a_gpu() -> None:
    model = create_phase2_model("small", seed=0, device="cuda")
    ids_BT = torch.randint(0, 50257, (2, 300), device="cuda")
    chunked, by_chunks = model(ids_BT, return_state=True)
    with torch.no_grad():
        found, by_kernel = model(ids_BT, return_state=True)
        model(ids_BT, by_kernel)
    torch.testing.assert_close(found, chunked.detach(), rtol=1e-3, atol=1e-3)
    for got, want in zip(by_kernel.memory, by_chunks.memory, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
def test_float16_forward_takes_little_more_than_its_tensors() -> None:
    before = torch.cuda.memory_allocated()
    model = create_phase2_model("base", device="cuda", dtype=torch.float16)
    ids_BT = torch.randint(0, 50257, (1, 4096), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        logits_BTV = model(ids_BT)
    peak = torch.cuda.max_memory_allocated() - before
    assert logits_BTV.isfinite().all()
    assert peak <= 1.2 * sum(least_memory(model.config, 1, 4096, "fp16").values())

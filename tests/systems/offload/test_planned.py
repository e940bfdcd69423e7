"""A plan changes no bit of a gradient, keeps what it predicts, and leaves the model as it was."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.errors import UsageError
from assay.measure.saved import saved_tensors
from assay.systems.decoder import load
from assay.systems.offload import (
    Choice,
    Plan,
    PlannedOffloader,
    Prediction,
    make_plan,
    offload_activations,
    plan_activations,
    profile_step,
    simulate,
)
from assay.systems.offload.devices import CpuDevice
from tests.systems.offload.helpers import gradients, make, mlp, same

WIDTH = 16
NOTHING = Prediction(peak_bytes=0, step_ms=0.0, exposed_ms=0.0, bytes_out=0)


def planned(
    choices: Sequence[Choice], blocks: Sequence[nn.Module], *held: object, inflight: int = 4096
) -> Any:
    plan = Plan(choices=tuple(choices), max_inflight_bytes=inflight, predicted=NOTHING)
    return PlannedOffloader(plan, blocks, *held, min_bytes=0, device="cpu")


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_BC: Tensor) -> Tensor:
        out: Tensor = x_BC + self.down(nn.functional.gelu(self.up(self.norm(x_BC))))
        return out


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x_BC: Tensor) -> Tensor:
        q_BC, k_BC, v_BC = self.qkv(x_BC).chunk(3, -1)
        out: Tensor = x_BC + (q_BC @ k_BC.T / WIDTH).softmax(-1) @ v_BC
        return out


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "residual": _Residual,
    "attention": _Attention,
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tanh": nn.Tanh,  # saves what it gives to the next block
    "dropout": lambda: nn.Dropout(0.3),
    "relu": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "nested": lambda: nn.Sequential(_Residual(), _Attention()),
}


@settings(max_examples=80)
@given(
    stack=st.lists(
        st.tuples(st.sampled_from(sorted(BLOCKS)), st.sampled_from(Choice)), min_size=1, max_size=7
    ),
    inflight=st.sampled_from([0, 2000, 10**6]),
    seed=st.integers(0, 2**16),
    outer=st.booleans(),
)
def test_gradients_of_random_plans_are_bit_identical(
    stack: list[tuple[str, Choice]], inflight: int, seed: int, outer: bool
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(*(BLOCKS[name]() for name, _ in stack))
    x_BC = torch.randn(8, WIDTH, requires_grad=True)
    context = planned([choice for _, choice in stack], list(model), model, inflight=inflight)
    around = make(held=[model]) if outer else nullcontext()

    def loss(context: Any) -> Tensor:
        torch.manual_seed(seed)
        with context:
            found: Tensor = model(x_BC * 1).square().sum()
        return found

    leaves = [x_BC, *model.parameters()]
    want = gradients(lambda: loss(nullcontext()), leaves)
    for _ in range(2):
        with around:
            assert same(gradients(lambda: loss(context), leaves), want)
    gc.collect()
    assert context.offloader.pool_in_use_bytes == 0


@pytest.fixture(name="ids_BT", scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder() -> Any:
    return load("tiny", "sdpa", dtype="fp32", device="cpu")


@pytest.mark.parametrize("first", Choice)
@pytest.mark.parametrize("second", [Choice.KEEP, Choice.OFFLOAD, Choice.RECOMPUTE_OFFLOAD])
def test_decoder(decoder: Any, ids_BT: Tensor, first: Choice, second: Choice) -> None:
    context = planned([first, second], decoder.model.layers, decoder)
    leaves = list(decoder.parameters())

    def loss(context: Any) -> Tensor:
        with context:
            found: Tensor = decoder(ids_BT, labels=ids_BT).loss
        return found

    assert same(gradients(lambda: loss(context), leaves), gradients(lambda: loss(nullcontext()), leaves))
    assert (context.statistics.bytes_out > 0) == any(choice.share for choice in (first, second))


def test_stock_llama(ids_BT: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    leaves = list(llama.parameters())
    context = planned(
        [Choice.OFFLOAD, Choice.RECOMPUTE, Choice.RECOMPUTE_OFFLOAD, Choice.OFFLOAD_HALF, Choice.KEEP],
        llama.model.layers, llama,
    )  # fmt: skip

    def loss(context: Any) -> Tensor:
        with context:
            found: Tensor = llama(ids_BT, labels=ids_BT, use_cache=False).loss
        return found

    assert same(gradients(lambda: loss(context), leaves), gradients(lambda: loss(nullcontext()), leaves))
    assert context.statistics.bytes_back > 0


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, on compiling
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # likewise
@pytest.mark.parametrize("how", ["wrapped", "in place", "all of it"])
def test_compiled_blocks(how: str) -> None:
    torch.compiler.reset()
    model = mlp()
    blocks: list[nn.Module] = list(model)
    if how == "wrapped":
        blocks = [torch.compile(block, backend="aot_eager") for block in blocks]  # type: ignore[misc]
    elif how == "in place":
        for block in blocks:
            block.compile(backend="aot_eager")
    run: Any = nn.Sequential(*blocks)
    run = torch.compile(run, backend="aot_eager") if how == "all of it" else run
    context = planned(
        [Choice.OFFLOAD, Choice.RECOMPUTE, Choice.RECOMPUTE_OFFLOAD, Choice.KEEP], blocks, model
    )
    x_BC = torch.randn(16, 32)

    def loss(context: Any) -> Tensor:
        with context:
            found: Tensor = run(x_BC).square().sum()
        return found

    leaves = list(model.parameters())
    want = gradients(lambda: loss(nullcontext()), leaves)
    assert same(gradients(lambda: loss(context), leaves), want)
    assert context.statistics.bytes_out > 0


def test_model_is_as_it_was_afterwards_also_after_an_exception() -> None:
    model = mlp()
    context = planned([Choice.OFFLOAD, Choice.RECOMPUTE, Choice.KEEP, Choice.RECOMPUTE_OFFLOAD], list(model))
    with context, context:  # re-entrant
        assert "forward" in vars(model[0])
        assert "forward" not in vars(model[2])
    handle = model[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), context:
        model(torch.randn(4, 32))
    handle.remove()
    assert not any("forward" in vars(block) for block in model)
    with context:
        model(torch.randn(4, 32)).sum().backward()
    with context, torch.no_grad():
        model(torch.randn(4, 32))
    assert context.statistics.bytes_out == 0
    gc.collect()
    assert context.offloader.pool_in_use_bytes == 0


def test_profile_is_what_the_ledger_finds(decoder: Any, ids_BT: Tensor) -> None:
    def step() -> None:
        decoder(ids_BT, labels=ids_BT).loss.backward()

    layers = decoder.model.layers
    profile = profile_step(step, layers, decoder, min_bytes=4096, device="cpu")
    with saved_tensors() as ledger:
        step()
    assert profile.saved_bytes == profile.peak_bytes == ledger.peak_bytes
    by_module = {row.name: row.nbytes for row in ledger.by("module")}
    for i, block in enumerate(profile.blocks):
        own = sum(n for name, n in by_module.items() if f".layers.{i}" in name)
        # what the first block is given, positions and embedding, is the trunk's in the ledger
        assert own <= block.saved_bytes <= own + block.input_bytes
        assert 0 < block.input_bytes < block.saved_bytes / 4
        assert block.movable_bytes <= block.saved_bytes
        assert block.forward_ms > 0 and block.backward_ms > 0
    assert profile.outside_bytes > 0
    assert profile.link.out_bytes_per_s > 1e8


class _Scaled(nn.Module):
    """Saves a table that every block shares, such as rotary positions, beside its own."""

    def forward(self, x_BC: Tensor, table_BC: Tensor) -> Tensor:
        return (x_BC * table_BC).exp().sin()


def test_memory_of_backward_is_beside_what_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block uses the shared table first; nothing that the others saved is gone by then."""
    monkeypatch.setattr(CpuDevice, "peak_bytes", lambda _: next(peaks))
    peaks = itertools.chain([0, 0], itertools.repeat(10**9))  # the first two are the base
    blocks = [_Scaled() for _ in range(6)]
    x_BC = torch.randn(64, WIDTH, requires_grad=True)

    def step() -> None:
        h_BC, table_BC = x_BC * 1, torch.ones(64, WIDTH, requires_grad=True) * 2
        for block in blocks:
            h_BC = block(h_BC, table_BC)
        h_BC.sum().backward()

    profile = profile_step(step, blocks, x_BC, [x_BC], min_bytes=0, device="cpu")
    saved = 0
    for piece in profile.pieces:
        saved += piece.nbytes
        assert piece.gradient_bytes == (4 * 64 * WIDTH if piece is profile.pieces[0] else 0)
        if piece.block is not None and not piece.is_input:
            assert 10**9 - saved <= piece.backward_bytes <= 10**9 - saved + 2 * piece.nbytes


def test_predicted_peak_is_the_ledgers_where_blocks_recompute() -> None:
    """Without copies the ledger sees what stays: inputs of blocks that recompute, all of the others."""
    model = nn.Sequential(*(_Residual() for _ in range(6)))
    x_BC = torch.randn(64, WIDTH)

    def step() -> None:
        model(x_BC * 1).square().sum().backward()

    profile = profile_step(step, list(model), model, x_BC, min_bytes=0, device="cpu")
    target = int(0.7 * profile.peak_bytes)
    plan = make_plan(profile, target_bytes=target, choices=[Choice.RECOMPUTE])
    assert Choice.RECOMPUTE in plan.choices
    context = PlannedOffloader(plan, list(model), model, min_bytes=0, device="cpu")
    with saved_tensors() as ledger, context:
        loss = model(x_BC * 1).square().sum()
    stays = sum(
        block.input_bytes if choice.recomputes else block.saved_bytes
        for block, choice in zip(profile.blocks, plan.choices, strict=True)
    )
    assert ledger.peak_bytes == stays + profile.outside_bytes
    assert ledger.peak_bytes <= plan.predicted.peak_bytes <= target
    loss.backward()


@pytest.mark.parametrize("blocks_in_flight", [0.5, 1.0, 2.5])
def test_predicted_peak_is_what_is_there_where_blocks_offload(blocks_in_flight: float) -> None:
    """Sources that wait and copies that are back, counted as blocks end in forward and begin in backward."""
    model = nn.Sequential(*(_Residual() for _ in range(8)))
    x_BC = torch.randn(64, WIDTH)
    profile = profile_step(
        lambda: model(x_BC * 1).square().sum().backward(), list(model), model, min_bytes=0, device="cpu"
    )
    largest = profile.blocks[1].saved_bytes
    inflight = int(blocks_in_flight * largest)
    context = planned([Choice.OFFLOAD] * 8, list(model), model, inflight=inflight)
    there: list[int] = []

    def look(*_: object) -> None:
        entries = [ref() for line in context.offloader._step.lines.values() for ref in line.order]
        there.append(sum(e.nbytes for e in entries if e and (e.source is not None or e.restored is not None)))

    for block in model:
        block.register_forward_hook(lambda _module, _args, out: look() or (out.register_hook(look), None)[1])
    with context:
        model(x_BC * 1).square().sum().backward()
    predicted = simulate(profile, [Choice.OFFLOAD] * 8, inflight).peak_bytes - profile.outside_bytes
    assert max(there) <= predicted <= max(there) + largest


def test_one_call_measures_and_plans(decoder: Any, ids_BT: Tensor) -> None:
    def step() -> None:
        decoder(ids_BT, labels=ids_BT).loss.backward()

    decoder.zero_grad()
    layers = decoder.model.layers
    context = plan_activations(decoder, layers, step, target_mib=1.2, min_bytes=4096, device="cpu")
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert context.plan.predicted.peak_bytes <= 1.2 * 2**20
    with context:
        step()
    assert context.statistics.predicted_peak_bytes == context.plan.predicted.peak_bytes
    twice = plan_activations(decoder, layers, step, target_mib=2.4, scale=2, min_bytes=4096, device="cpu")
    assert 1.2 * 2**20 < twice.plan.predicted.peak_bytes <= 2.4 * 2**20


def test_target_chooses_tensor_by_tensor_from_the_third_step_on() -> None:
    model = mlp(64, 8)
    x_BC = torch.randn(64, 64)
    leaves = list(model.parameters())
    offload = offload_activations(model, min_bytes=0, max_inflight_bytes=2**15, target_mib=0.25, device="cpu")

    def loss(context: Any, x_BC: Tensor) -> Tensor:
        with context:
            found: Tensor = model(x_BC).square().sum()
        return found

    want = gradients(lambda: loss(nullcontext(), x_BC), leaves)
    out = []
    for _ in range(4):
        assert same(gradients(lambda: loss(offload, x_BC), leaves), want)
        out.append(offload.statistics.bytes_out)
    assert out[0] >= out[1] > out[2] >= out[3] > 0
    stays = offload.statistics.skipped["target"].nbytes
    assert offload.statistics.predicted_peak_bytes is not None
    assert stays <= offload.statistics.predicted_peak_bytes <= 0.25 * 2**20
    # other candidates: all leaves once more, and what is chosen next is for them
    longer_BC = torch.randn(96, 64)
    for _ in range(2):
        loss(offload, longer_BC).backward()
        assert offload.statistics.predicted_peak_bytes is None or offload.statistics.bytes_out > out[2]
    for _ in range(2):
        loss(offload, longer_BC).backward()
    assert "target" in offload.statistics.skipped
    assert offload.statistics.predicted_peak_bytes is not None


def test_target_out_of_reach_is_refused_when_the_third_step_begins() -> None:
    model = mlp(64, 8)
    offload = offload_activations(model, min_bytes=0, target_mib=0.001, device="cpu")
    for _ in range(2):
        with offload:
            model(torch.randn(64, 64)).sum().backward()
    with (
        pytest.raises(UsageError, match=r"no plan fits the target; expected >= .* MiB; got 0\.0 MiB"),
        offload,
    ):
        pass
    assert offload._depth == 0


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (lambda model: model(torch.randn(4, 32)), "the step ran no backward; expected a function that runs"),
        (
            lambda model: (model(torch.randn(4, 32)) + model(torch.randn(4, 32))).sum().backward(),
            "block 0 ran 2 times in the step; expected once; profile one forward and one backward",
        ),
        (
            lambda model: model[1](torch.randn(4, 32)).sum().backward(),
            "block 0 ran 0 times in the step; expected once; profile one forward and one backward",
        ),
    ],
)
def test_step_that_cannot_be_profiled_is_refused(step: Callable[[nn.Module], object], line: str) -> None:
    model = mlp()
    with pytest.raises(UsageError, match=line):
        profile_step(lambda: step(model), list(model), model, device="cpu")


def test_bad_numbers_are_refused() -> None:
    model = mlp()
    with pytest.raises(UsageError, match="the plan is for other blocks; expected 1 blocks; got 4"):
        planned([Choice.KEEP], list(model))
    with pytest.raises(UsageError, match="scale is too small; expected > 0; got 0"):
        plan_activations(model, list(model), lambda: None, target_mib=1, scale=0)
    with pytest.raises(UsageError, match="target_mib is too small; expected > 0; got -1"):
        offload_activations(target_mib=-1, device="cpu")


def test_fsdp2_on_one_rank(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sharded = mlp()
        for block in [*sharded, sharded]:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        x_BC, leaves = torch.randn(16, 32), list(sharded.parameters())
        profile = profile_step(
            lambda: sharded(x_BC).square().sum().backward(), list(sharded), sharded, min_bytes=0, device="cpu"
        )
        assert profile.saved_bytes > 0
        context = planned(
            [Choice.OFFLOAD, Choice.RECOMPUTE, Choice.RECOMPUTE_OFFLOAD, Choice.KEEP], list(sharded), sharded
        )

        def local(context: Any) -> list[Tensor]:
            def loss() -> Tensor:
                with context:
                    found: Tensor = sharded(x_BC).square().sum()
                return found

            return [gradient.to_local() for gradient in gradients(loss, leaves)]  # type: ignore[attr-defined]

        assert same(local(context), local(nullcontext()))
        assert context.statistics.bytes_out > 0
    finally:
        torch.distributed.destroy_process_group()

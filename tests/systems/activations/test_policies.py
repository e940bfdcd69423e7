"""Each policy counts what it did, and what it cannot do here is said in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from assay.errors import Unavailable, UsageError
from assay.systems.activations import POLICIES, policies
from assay.systems.activations.language import PolicyLM, blocks_of
from assay.systems.activations.policies import (
    THEIRS,
    Auto,
    Checkpoint,
    Hooks,
    Offload,
    Policy,
    build_policy,
    profile_of,
)
from assay.systems.decoder.build import build_decoder
from assay.systems.decoder.parts import Parts
from assay.systems.offload import Profile, offload_activations
from tests.systems.offload.helpers import gradients, mlp, same


def no_loss(ids_BT: Tensor) -> Tensor:
    raise AssertionError("asked for no step")


def offloading(model: nn.Module, **more: Any) -> Offload:
    return Offload(offload_activations(model, device="cpu", min_bytes=0, max_inflight_bytes=0, **more))


def steps(policy: Policy, model: nn.Sequential, count: int = 3) -> list[Tensor]:
    """The gradients of the last of some steps."""
    leaves, found = list(model.parameters()), list[Tensor]()
    for seed in range(count):
        x_BC = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))

        def loss(x_BC: Tensor = x_BC) -> Tensor:
            with policy.around(x_BC):
                return model(x_BC).square().sum()

        found = gradients(loss, leaves)
    return found


def test_offloading_counts_bytes_of_every_step_and_no_allocation_once_warm() -> None:
    model = mlp()
    policy = offloading(model)
    want = steps(Policy(), model)
    assert same(steps(policy, model), want)
    first = policy.counters()
    assert first["offload_steps"] == 3
    assert first["offload_bytes_out"] > 0
    assert first["offload_bytes_out"] == first["offload_bytes_back"] + first["offload_bytes_recalled"]
    assert first["offload_unbalanced_steps"] == 0
    steps(policy, model)
    then = policy.counters()
    assert then["offload_bytes_out"] == 2 * first["offload_bytes_out"]
    assert then["offload_pinned_allocations"] == first["offload_pinned_allocations"]
    assert policy.counters() == then, "a step is counted once, however often one asks"


def test_step_without_its_backward_is_unbalanced() -> None:
    model = mlp()
    policy = offloading(model)
    with policy.around():
        loss = model(torch.randn(16, 32)).sum()
    del loss
    assert policy.counters()["offload_unbalanced_steps"] == 1


def test_every_block_is_recomputed_in_every_backward_and_forward_is_given_back() -> None:
    model = mlp()
    policy = Checkpoint(list(model))
    want = steps(Policy(), model)
    assert same(steps(policy, model), want)
    assert policy.counters() == {"recomputed_blocks": 12, "recomputed_blocks_per_step": 4.0}
    assert all("forward" not in vars(block) for block in model)


def test_forwards_are_given_back_after_an_exception() -> None:
    model = mlp()
    policy = Checkpoint(list(model))
    with pytest.raises(RuntimeError), policy.around():
        model(torch.randn(3, 5))
    assert all("forward" not in vars(block) for block in model)


def test_packed_tensors_of_other_hooks_are_counted() -> None:
    model = mlp()
    policy = Hooks(saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy))
    assert same(steps(policy, model), steps(Policy(), model))
    assert int(policy.counters()["packed_tensors"]) > 3 * len(model)


@pytest.mark.parametrize("name", ["save-on-cpu", "torchtune", "trl"])
def test_what_moves_nothing_on_the_cpu_is_unavailable_there(name: str) -> None:
    with pytest.raises(Unavailable, match=f"'{name}' moves nothing on the CPU"):
        build_policy(name, mlp(), [], no_loss, "cpu", {})


PEER = """
from torch.autograd.graph import saved_tensors_hooks

def get_act_offloading_ctx_manager(model, **options):
    hooks = saved_tensors_hooks(lambda t: t, lambda t: t)
    hooks.given = model, options
    return hooks
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts packages on the path, by the places of their modules, for the time of a test."""

    def put(place: str, text: str) -> None:
        file = tmp_path.joinpath(*place.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(text)

    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] in THEIRS]:
            monkeypatch.delitem(sys.modules, name)

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield put
    forget()


@pytest.mark.parametrize(
    ("name", "options"),
    [("trl", {"warn_if_no_head": False}), ("torchtune", {"enable_activation_offloading": True})],
)
def test_peers_are_made_as_their_trainers_make_them(
    name: str, options: dict[str, bool], peer: Callable[[str, str], None]
) -> None:
    peer(THEIRS[name][0], PEER)
    model = mlp()
    policy = build_policy(name, model, [], no_loss, "cuda", {})
    assert policy.spans_backward == (name == "trl")
    assert policy.around().given == (model, options)  # type: ignore[attr-defined]  # the fake's
    assert same(steps(policy, model), steps(Policy(), model))
    assert int(policy.counters()["packed_tensors"]) > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"'trl' needs trl.*-m pip install trl"),
        ("import nowhere.else_", r"'trl' needs nowhere.*-m pip install nowhere"),
        ("import torch.nowhere", r"'trl' cannot be had here: .*torch\.nowhere.*another version of torch"),
        ("", r"'trl' cannot be had here: .*get_act_offloading_ctx_manager.*another version of trl"),
    ],
)
def test_library_that_is_missing_or_another_is_named(
    text: str | None, said: str, peer: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is None:
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        peer(THEIRS["trl"][0], text)
    with pytest.raises(Unavailable, match=said):
        build_policy("trl", mlp(), [], no_loss, "cuda", {})


def test_every_policy_that_the_cpu_has_is_built() -> None:
    model = mlp()
    kinds = {
        name: type(build_policy(name, model, list(model), no_loss, "cpu", {}))
        for name in ("off", "offload", "checkpoint")
    }
    assert kinds == {"off": Policy, "offload": Offload, "checkpoint": Checkpoint}
    assert next(iter(POLICIES)) == "off"


class _Spanning(Hooks):
    """Hooks that must not be left before backward, as TRL's: they drop what they keep on the way out."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.left = 0

        def pack(t: Tensor) -> int:
            self.kept[len(self.kept)] = t
            return len(self.kept) - 1

        super().__init__(saved_tensors_hooks(pack, lambda n: self.kept[n]), spans_backward=True)

    @contextlib.contextmanager
    def around(self, *held: Tensor) -> Iterator[None]:
        with super().around(*held):
            yield
        self.kept.clear()
        self.left += 1


def _language(policy: Policy) -> PolicyLM:
    inner = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp32", device="cpu", seed=0)
    return PolicyLM(inner, policy, 2, 16)


def test_offloading_is_held_against_what_its_bytes_and_the_link_let_it_be() -> None:
    """The prediction is of all that leaves, also outside blocks: its bytes are those of a step."""
    inner = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp32", device="cpu", seed=0)
    blocks, where = blocks_of(inner.module), {"device": "cpu", "min_bytes": 1024}
    seen: list[Profile] = []

    def profiled(ids_BT: Tensor) -> Profile:
        seen.append(profile_of(inner.loss, ids_BT, blocks, inner.module, **where))
        return seen[-1]

    offloader = offload_activations(inner.module, max_inflight_bytes=2**16, **where)
    language = PolicyLM(inner, Offload(offloader, profile=profiled), 2, 16)
    found = language.proof()
    assert (found["different_tensors"], len(seen)) == (0, 1)
    assert found["plan_step_ms"] == pytest.approx(seen[0].step_ms + float(found["plan_exposed_ms"]))
    assert language.proof()["plan_step_ms"] == found["plan_step_ms"]
    assert len(seen) == 1, "measured once"
    outside = sum(piece.movable_bytes for piece in seen[0].pieces if piece.block is None)
    assert outside > 0
    for _ in range(3):  # the last ones of a step like the one before stay
        language.loss(torch.arange(32).reshape(2, 16)).backward()  # type: ignore[no-untyped-call]
    policy = language._policy
    assert isinstance(policy, Offload)
    assert policy.predicted is not None
    assert policy.offloader.statistics.bytes_out == policy.predicted.bytes_out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_after_a_proof_at_another_size_steps_are_what_they_were(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is cut for the steps that are timed: none of them finds it as a smaller proof left it."""
    inner = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp32", device=device, seed=0)
    options = {"min_bytes": 1024, "max_inflight_bytes": 0}
    policy = build_policy("offload", inner.module, blocks_of(inner.module), inner.loss, device, options)
    assert isinstance(policy, Offload)
    language = PolicyLM(inner, policy, 4, 16)
    differing = PolicyLM._differing

    def small(self: PolicyLM, batch: int, length: int) -> dict[str, Any]:
        if batch > 2:
            raise torch.OutOfMemoryError("for the test")
        return differing(self, batch, length)

    monkeypatch.setattr(PolicyLM, "_differing", small)
    found = language.proof()
    assert found["compared_batch"] == 2
    assert ("plan_exposed_ms" in found) == (device == "cuda")
    proved = policy.offloader.statistics.bytes_out
    ids_BT = torch.arange(64, device=device).reshape(4, 16)
    language.loss(ids_BT).backward()  # type: ignore[no-untyped-call]
    assert policy.offloader.statistics.bytes_out == proved > 0
    assert language.proof()["offload_pinned_allocations"] == found["offload_pinned_allocations"]


@pytest.mark.parametrize(
    ("fault", "want"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore"),
            "a step without offloading does not fit: CUDA out of memory. Tried to allocate 1 GiB.",
        ),
        (UsageError("two steps saved different tensors"), "no step was profiled: two steps saved different"),
    ],
)
def test_a_prediction_that_cannot_be_made_says_why(fault: Exception, want: str) -> None:
    inner = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp32", device="cpu", seed=0)

    def fails(ids_BT: Tensor) -> Profile:
        raise fault

    offloader = offload_activations(inner.module, device="cpu", min_bytes=1024)
    found = PolicyLM(inner, Offload(offloader, profile=fails), 2, 16).proof()
    assert str(found["plan_reason"]).startswith(want)
    assert "plan_step_ms" not in found


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({}, "cpu"),
        ({"lossy": "fp8"}, "cuda"),
        ({"skip_last": 2}, "cuda"),
        ({"pin": False}, "cuda"),
        ({"prefetch": False}, "cuda"),
    ],
)
def test_nothing_is_predicted_of_what_the_walk_does_not_know(options: dict[str, Any], device: str) -> None:
    def profiling(**options: Any) -> object:
        return policies._profiling(offload_activations(device="cpu", **options), mlp(), [], no_loss, device)

    assert profiling(**options) is None
    assert (profiling() is None) == (device == "cpu")


def test_step_that_does_not_fit_is_planned_from_half_the_batch() -> None:
    inner = build_decoder("tiny", Parts(attention="sdpa"), name="x", dtype="fp32", device="cpu", seed=0)
    batches = list[int]()

    def loss(ids_BT: Tensor) -> Tensor:
        batches.append(len(ids_BT))
        if len(ids_BT) > 2:
            raise torch.OutOfMemoryError("for the test")
        return inner.loss(ids_BT)

    blocks = blocks_of(inner.module)
    auto = Auto(
        inner.module, blocks, loss,
        size=(8, 8), share=0.5, target_mib=None, device="cpu", min_bytes=0, pin=False,
    )  # fmt: skip
    ids_BT = torch.arange(64).reshape(8, 8)
    found = auto._profile(ids_BT)
    assert batches[:3] == [8, 4, 2]
    small = profile_of(loss, ids_BT[:2], blocks, inner.module, device="cpu", min_bytes=0)
    assert found.saved_bytes == 4 * small.saved_bytes
    assert all(p.grad is None for p in inner.module.parameters())
    with pytest.raises(torch.OutOfMemoryError):
        profile_of(loss, ids_BT, blocks, inner.module, device="cpu", min_bytes=0)


def _packs(policy: Hooks) -> bool:
    """Whether what autograd saves now goes to it."""
    before = policy.counters()["packed_tensors"]
    torch.ones(2, requires_grad=True).exp()
    return policy.counters()["packed_tensors"] != before


@pytest.mark.parametrize("end", ["gradients", "zero_grad", "optimizer_step", "loss"])
def test_policy_that_spans_backward_is_left_by_what_comes_after(end: str) -> None:
    policy, ids_BT = _Spanning(), torch.arange(32).reshape(2, 16)
    language = _language(policy)
    language.loss(ids_BT).backward()  # type: ignore[no-untyped-call]
    assert (policy.left, _packs(policy)) == (0, True)
    match end:
        case "optimizer_step":
            language.optimizer_step("sgd")
        case "loss":
            language.loss(ids_BT)
        case _:
            getattr(language, end)()
    assert (policy.left, _packs(policy)) == (1, end == "loss")
    language.zero_grad()
    assert not _packs(policy)


def test_policy_that_spans_backward_is_left_where_forward_fails() -> None:
    policy = _Spanning()
    language = _language(policy)
    with pytest.raises(IndexError):
        language.loss(torch.full((2, 16), language.vocab_size))
    assert not _packs(policy)


def test_policy_that_spans_backward_is_left_where_backward_fails() -> None:
    policy = _Spanning()
    language = _language(policy)
    with pytest.raises(KeyError), language:
        loss = language.loss(torch.arange(32).reshape(2, 16))
        policy.kept.clear()
        loss.backward()  # type: ignore[no-untyped-call]
    assert not _packs(policy)


def test_policy_that_spans_backward_is_proved_with_backward_inside() -> None:
    found = _language(_Spanning()).differing(2, 16)
    assert (found["different_tensors"], found["reproduced_tensors"]) == (0, found["compared_tensors"])

"""Every wrong offloader is caught by the check that its name is beside; the right one passes them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from assay.systems.offload.hooks import Offloader
from tests.mutants import offload as wrong
from tests.systems.offload.helpers import LateDevice, gradients, make, mlp, same

Kind = type[Offloader]


def gradients_are_those_without(kind: Kind) -> bool:
    """Three steps, on late copies, of a model whose storages are freed and taken again while it runs."""
    model, device = mlp(), LateDevice()
    leaves = list(model.parameters())
    offload = make(kind, device=device, max_inflight_bytes=4096)

    def loss(x_BC: Tensor) -> Tensor:
        for block in model:
            x_BC = block(x_BC).tanh() * 1.5
        return x_BC.square().sum()

    def offloaded(x_BC: Tensor) -> Tensor:
        with offload:
            return loss(x_BC)

    for seed in range(3):
        x_BC = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
        want = gradients(lambda x=x_BC: loss(x), leaves)  # type: ignore[misc]
        if not same(gradients(lambda x=x_BC: offloaded(x), leaves), want):  # type: ignore[misc]
            return False
    return device.strays == 0


def something_left_and_came_back(kind: Kind) -> bool:
    model = mlp()
    offload = make(kind, [model], max_inflight_bytes=0, min_bytes=2048)
    with offload:
        model(torch.randn(16, 32)).sum().backward()
    moved = offload.statistics
    return moved.bytes_out > 0 and moved.bytes_out == moved.bytes_back + moved.bytes_recalled


def each_storage_left_once(kind: Kind) -> bool:
    """Query, key and value are views of one projection, 3 x 32 x 32 floats."""
    weight_CD = nn.Parameter(torch.randn(32, 96))
    offload = make(kind)
    with offload:
        q_BC, k_BC, v_BC = (torch.randn(32, 32) @ weight_CD).chunk(3, dim=-1)
        (q_BC @ k_BC.T @ v_BC).sum().backward()
    # the input of the projection, the projection, and q @ k.T
    return offload.statistics.bytes_out == 4 * 32 * (32 + 96 + 32)


def copies_leave_the_compute_stream_free(kind: Kind) -> bool:
    """Copies run on streams of their own, each after what compute was given before it was asked for."""
    device, model = LateDevice(), mlp()
    with make(kind, [model], device=device, max_inflight_bytes=4096):
        model(torch.randn(16, 32)).sum().backward()
    waits = {"out": False, "back": False}
    for what, stream, more in device.log:
        if what == "wait" and stream in waits and more.stream is device.main:
            waits[stream] = True
        elif what == "copy":
            if not waits.get(stream, False):
                return False
            waits[stream] = False
    return bool(device.copies("out") and device.copies("back"))


def nothing_comes_back_during_forward(kind: Kind) -> bool:
    device, model = LateDevice(), mlp()
    with make(kind, [model], device=device, max_inflight_bytes=4096):
        loss = model(torch.randn(16, 32)).sum()
        early = device.copies("back")
        loss.backward()
    return not early and device.copies("back") != []


CHECKS: list[Callable[[Kind], bool]] = [
    gradients_are_those_without,
    something_left_and_came_back,
    each_storage_left_once,
    copies_leave_the_compute_stream_free,
    nothing_comes_back_during_forward,
]


@pytest.mark.parametrize("check", CHECKS)
def test_right_offloader_passes(check: Callable[[Kind], bool]) -> None:
    assert check(Offloader)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (wrong.KeyedByPointer, gradients_are_those_without),
        (wrong.CopiesOnTheComputeStream, copies_leave_the_compute_stream_free),
        (wrong.PrefetchAtPack, nothing_comes_back_during_forward),
        (wrong.UpperLimit, something_left_and_came_back),
        (wrong.EveryViewCopied, each_storage_left_once),
        (wrong.NoWaits, gradients_are_those_without),
        (wrong.SourceFreedAtOnce, gradients_are_those_without),
    ],
)
def test_wrong_offloader_is_caught(kind: Kind, check: Callable[[Kind], bool]) -> None:
    assert not check(kind)


def test_every_wrong_offloader_is_tried() -> None:
    (tried,) = [m.args[1] for m in test_wrong_offloader_is_caught.pytestmark]  # type: ignore[attr-defined]
    assert {kind.__name__ for kind, _ in tried} == set(wrong.__all__)

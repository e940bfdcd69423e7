"""The chunked loss is the plain one, and never holds more than a chunk of logits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from assay.systems.decoder import loss as module
from assay.systems.decoder.loss import IGNORED, chunked_loss
from assay.systems.decoder.model import Decoder, next_token_loss
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.precision import cast
from assay.systems.decoder.state import load_strict, named_gradients, named_state, tied_names
from tests.systems.decoder.helpers import CONFIGS, error, new, token_ids

B, T, H, V = 3, 21, 16, 37


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B, T, H), a head (V, H), and labels (B, T) of which some are left out."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(B, T, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_BT = torch.randint(0, V, (B, T), generator=generator)
    labels_BT[0, :9] = IGNORED
    labels_BT[1, ::2] = IGNORED
    return hidden_BTH, weight_VH, labels_BT


@pytest.mark.parametrize("chunk_bytes", [1, V * 8, 5 * V * 8, 20 * V * 8, B * T * V * 8 - 1, 1 << 29])
@pytest.mark.parametrize("left_out", ["none", "some", "a row", "all but one", "all"])
def test_value_and_gradients_are_the_plain_ones(
    chunk_bytes: int, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    hidden_BTH, weight_VH, labels_BT = _inputs()
    if left_out == "none":
        labels_BT = labels_BT.clamp_min(0)
    elif left_out == "a row":
        labels_BT[2] = IGNORED
    elif left_out != "some":
        labels_BT = torch.full_like(labels_BT, IGNORED)
        labels_BT[1, 5] = 3 if left_out == "all but one" else IGNORED
    loss = chunked_loss(hidden_BTH, weight_VH, labels_BT)
    if left_out == "all":  # nothing to learn; torch's mean over no label is NaN
        assert loss.item() == 0
        expected = hidden_BTH.sum() * 0 + weight_VH.sum() * 0
    else:
        expected = next_token_loss(hidden_BTH @ weight_VH.T, labels_BT)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    truth = torch.autograd.grad(expected * 3, (hidden_BTH, weight_VH))
    for got, want in zip(torch.autograd.grad(loss * 3, (hidden_BTH, weight_VH)), truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_learns_the_same_from_either_loss(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    config = CONFIGS["llama3-tied"]  # its head's gradient is added to the embedding's
    plain = cast(new(config, "sdpa"), torch.float64, "cpu")
    model = cast(
        Decoder(config, Parts(attention="sdpa", loss="chunked", merged=merged)), torch.float64, "cpu"
    )
    load_strict(named_state(model), named_state(plain), to="model", tied=tied_names(model))
    ids_BT = token_ids(3, 17, config)
    labels_BT = ids_BT.clone()
    labels_BT[:, :5] = IGNORED
    out, expected = model(ids_BT, labels=labels_BT), plain(ids_BT, labels=labels_BT)
    assert out.logits is None
    assert error(out.loss, expected.loss) < 1e-13
    out.loss.backward()
    expected.loss.backward()
    truth = named_gradients(plain)
    for name, gradient in named_gradients(model).items():
        wanted = truth[name]
        assert gradient is not None
        assert wanted is not None
        assert error(gradient, wanted) < 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_no_allocation_is_as_large_as_the_logits(
    gradients: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by torch's profiler, which sees every allocation, those inside operators too."""
    tokens, wide, vocabulary = 512, 8, 4096
    chunk = 16 * vocabulary * dtype.itemsize
    hidden_BTH = torch.randn(2, tokens // 2, wide, dtype=dtype, requires_grad=gradients)
    weight_VH = torch.randn(vocabulary, wide, dtype=dtype, requires_grad=gradients)
    labels_BT = torch.randint(0, vocabulary, (2, tokens // 2))
    full = tokens * vocabulary * dtype.itemsize

    def peak(chunk_bytes: int) -> tuple[int, int]:
        """Most bytes held at once beyond those before, and the largest allocation."""
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        with torch.set_grad_enabled(gradients):
            allocated = list(_allocated(hidden_BTH, weight_VH, labels_BT))
        held = torch.tensor(allocated).cumsum(0)
        return int(held.max()), max(allocated)

    held, largest = peak(chunk)
    results = sum(t.nbytes for t in (hidden_BTH, weight_VH)) * 2 if gradients else 0  # saved, and scaled
    # on the CPU the softmax is another chunk, in at least float32; a product may pad its operand
    assert largest < 1.05 * chunk * max(1, 4 // dtype.itemsize)
    assert held < 3.5 * largest + results
    assert held < full / 4
    assert peak(1 << 29)[1] >= full  # one chunk of everything: the count does see logits


def _allocated(hidden_BTH: Tensor, weight_VH: Tensor, labels_BT: Tensor) -> Iterator[int]:
    """Bytes of each allocation of a loss and its backward in order, below zero where one is freed."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss = chunked_loss(hidden_BTH, weight_VH, labels_BT)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]  # unannotated in torch
    hidden_BTH.grad = weight_VH.grad = None
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()

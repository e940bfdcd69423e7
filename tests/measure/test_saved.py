"""The saved-tensor ledger against what small modules are known to save."""

import gc
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.measure.saved import saved_tensors, summary


class Two(nn.Module):
    """Linear 4 -> 8, then exp: saves the input, the weight's views, and the exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8, bias=False)
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, x_BC: Tensor) -> Tensor:
        y_BC: Tensor = self.up(x_BC)
        return y_BC.exp() * self.scale


def test_ledger_names_what_each_module_keeps() -> None:
    x_BC = torch.randn(16, 4)
    with saved_tensors() as ledger:
        loss = Two()(x_BC).sum()
    activations = [(s.module, s.shape, s.dtype) for s in ledger.activations]
    assert activations == [("Two.up", (16, 4), "float32"), ("Two", (16, 8), "float32")]
    assert ledger.nbytes == ledger.peak_bytes == 16 * 4 * 4 + 16 * 8 * 4
    assert {(s.module, s.shape) for s in ledger.tensors if s.held} == {("Two", (8,))}
    assert [(row.name, row.share) for row in ledger.by("module")] == [("Two", 2 / 3), ("Two.up", 1 / 3)]
    loss.backward()


def test_views_of_one_storage_count_once() -> None:
    x_N = torch.randn(100, requires_grad=True) * 1
    with saved_tensors() as ledger:
        kept = x_N[:50].exp().sum() + (x_N[:50] * x_N[50:]).sum()
    views = [s for s in ledger.tensors if s.storage_bytes == 400]
    assert len(views) == 2
    assert len({s.storage for s in views}) == 1
    assert ledger.nbytes == 400 + 200
    assert (ledger.storages_bytes(200), ledger.storages_bytes(201)) == (600, 400)
    kept.backward()


def test_peak_is_of_what_is_kept_at_once() -> None:
    x_N = torch.randn(1000, requires_grad=True)
    with saved_tensors() as ledger:
        for _ in range(3):
            (x_N * 1).exp().sum().backward()
    assert ledger.nbytes == 3 * 4000
    assert ledger.peak_bytes == 4000


def test_checkpointed_region_keeps_its_input_alone() -> None:
    block = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x_BC = torch.randn(4, 8, requires_grad=True) * 1
    with saved_tensors() as ledger:
        loss = checkpoint(block, x_BC, use_reentrant=False).sum()
    assert [s.shape for s in ledger.activations] == [(4, 8)]
    loss.backward()


def test_gradients_are_those_without_it_and_nothing_stays_alive() -> None:
    model, x_BC = Two(), torch.randn(16, 4)
    model(x_BC).sum().backward()
    wanted = model.up.weight.grad
    assert wanted is not None
    model.zero_grad()
    with saved_tensors() as ledger:
        model(x_BC).sum().backward()
    gc.collect()
    assert model.up.weight.grad is not None and torch.equal(model.up.weight.grad, wanted)
    assert ledger._live_bytes == 0


def test_modified_tensor_is_refused_as_autograd_refuses_it() -> None:
    with saved_tensors():
        y_N = torch.randn(8, requires_grad=True).exp()
        loss = y_N.sum()
    with torch.no_grad():
        y_N.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_table_adds_up() -> None:
    with saved_tensors() as ledger:
        loss = Two()(torch.randn(2**18, 4)).sum()
    header, first, second, total, peak = ledger.table().splitlines()
    assert header.split() == ["module", "tensors", "MiB", "share"]
    assert first.split() == ["Two", "1", "8.000", "66.7%"]
    assert second.split() == ["Two.up", "1", "4.000", "33.3%"]
    assert total.split() == ["activations", "2", "12.000"]
    assert peak.split() == ["peak", "12.000"]
    assert ledger.table("dtype").splitlines()[1].split() == ["float32", "2", "12.000", "100.0%"]
    loss.backward()


def test_summary_joins_modules_that_differ_in_their_index_and_keeps_few_rows() -> None:
    blocks = [OrderedDict(up=nn.Linear(4, 4), turn=nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*map(nn.Sequential, blocks))
    with saved_tensors() as ledger:
        model(torch.randn(16, 4)).sum()
    found = summary(ledger, most=2)
    assert found is not None
    modules = [share for share in found.shares if share.by == "module"]
    assert {s.name: s.tensors for s in modules} == {"Sequential.*.turn": 3, "Sequential.*.up": 3}
    assert sum(s.share for s in modules) == pytest.approx(1)
    assert found.total_mib == pytest.approx(ledger.nbytes / 2**20)
    assert found.tensors == len(ledger.activations)
    (one,) = [s for s in summary(ledger, most=1).shares if s.by == "module"]  # type: ignore[union-attr]  # as before
    assert (one.name, one.tensors) == ("(2 more)", 6)


def test_summary_of_nothing_is_none() -> None:
    with saved_tensors() as ledger:
        pass
    assert summary(ledger) is None

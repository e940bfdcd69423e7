"""How far rounding alone may take the answer of a function that nobody can see into."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from assay import yardstick
from tests.tensors import values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_ulp_moves_every_entry_to_its_neighbour(dtype: torch.dtype) -> None:
    value = values(50, 50).to(dtype)
    moved = yardstick.one_ulp(value)
    assert isinstance(moved, Tensor)
    assert moved.dtype == dtype
    up, down = (torch.nextafter(value, torch.full_like(value, end)) for end in (math.inf, -math.inf))
    assert bool(((moved == up) | (moved == down)).all())
    assert 0.3 < float((moved == up).double().mean()) < 0.7
    assert torch.equal(moved, yardstick.one_ulp(value))  # type: ignore[arg-type]  # a tensor gives a tensor


def test_one_ulp_reaches_nested_arguments_and_leaves_what_is_no_float() -> None:
    ids, weight = torch.arange(4), values(3).requires_grad_()
    found: Any = yardstick.one_ulp(((weight, {"ids": ids, "name": "x"}), 3))
    (moved, options), count = found
    assert not torch.equal(moved, weight)
    assert moved.requires_grad
    assert options == {"ids": ids, "name": "x"}
    assert count == 3


@pytest.mark.parametrize(
    ("dtype", "units"),
    [(torch.float32, 8), (torch.float64, 8), (torch.complex64, 8), (torch.bfloat16, 1), (torch.float16, 1)],
)
def test_opaque_rounding_is_eight_units_of_the_output_or_one_of_16_bits(
    dtype: torch.dtype, units: int
) -> None:
    assert yardstick.opaque_rounding(torch.ones(1, dtype=dtype)) == units * torch.finfo(dtype).eps
    assert yardstick.opaque_rounding(torch.ones(1, dtype=torch.int64)) == 0.0


def test_precision_below_float64_is_named() -> None:
    wide, narrow = torch.ones(1, dtype=torch.complex128), torch.ones(1, dtype=torch.complex64)
    assert yardstick.below_float64({"output:0": wide, "output:1": torch.ones(1, dtype=torch.int32)}) == ""
    assert yardstick.below_float64({"output:0": wide, "output:1": narrow}) == "output:1 in complex64"


def test_one_ulp_moves_both_parts_of_a_complex_number() -> None:
    moved = yardstick.one_ulp(torch.tensor([1 + 1j]))
    assert isinstance(moved, torch.Tensor)
    assert bool((moved.real != 1) & (moved.imag != 1))

"""The resolvent mixer: couplings for any length, and the matrix it stands for."""

from __future__ import annotations

import pytest
import torch

from assay.errors import UsageError
from assay.systems.resolvent.mixer import LEAST_GAMMA, ResolventMixer
from assay.systems.resolvent.shapes import phase2_config


def mixer(implementation: str = "auto") -> ResolventMixer:
    torch.manual_seed(0)
    made = ResolventMixer(phase2_config("small", d_model=6, n_seq=5), implementation)
    torch.nn.init.normal_(made.coupling)
    return made


@pytest.mark.parametrize("T", [1, 2, 5, 12])
@pytest.mark.parametrize("implementation", ["auto", "pcr", "loop", "schur"])
def test_is_the_dense_resolvents_diagonal_read_back(implementation: str, T: int) -> None:
    made = mixer(implementation).double()
    x_BTD = torch.randn(2, T, 6, dtype=torch.float64)
    v_BT, raw_BT = made.potential(x_BTD).unbind(-1)
    gamma_BT = torch.log1p(raw_BT.exp()) + LEAST_GAMMA
    h = made.coupling[[i % 4 for i in range(T - 1)]]  # four learned, then the same again
    T_BTT = torch.diag_embed(v_BT - 1j * gamma_BT) + torch.diag(h, 1) + torch.diag(h, -1)
    G_BT = torch.linalg.inv(T_BTT - 0.1j * torch.eye(T)).diagonal(dim1=1, dim2=2)
    expected = made.out(torch.stack((G_BT.real, G_BT.imag), -1))
    torch.testing.assert_close(made(x_BTD, made.couplings(x_BTD.shape[1])), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_a_float32_island(dtype: torch.dtype) -> None:
    made, x_BTD = mixer().to(dtype), torch.randn(2, 9, 6, dtype=dtype)
    h = made.couplings(9)
    assert h.dtype == torch.float32
    wide = mixer().to(dtype).float()(x_BTD.float(), h)
    torch.testing.assert_close(made(x_BTD, h), wide, rtol=0, atol=0)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(made(x_BTD, h), wide, rtol=0, atol=0)


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no implementation 'pcrr'; expected .*; did you mean 'pcr'"):
        mixer("pcrr")

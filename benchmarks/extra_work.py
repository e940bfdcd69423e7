"""Builders whose work differs by a known share: a forward pass made of 10 or 11 equal passes."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.contracts import Case
from assay.systems.decoder.model import Decoder, Output, initialise
from assay.systems.decoder.shapes import resolve


class _Repeated(Decoder):
    passes = 10

    def forward(self, input_ids: Tensor, *args: object, **kwargs: object) -> Output:
        for _ in range(self.passes - 1):
            super().forward(input_ids)
        return super().forward(input_ids, *args, **kwargs)  # type: ignore[arg-type]  # handed on as given


class _OneMore(_Repeated):
    passes = 11


def ten(case: Case) -> Decoder:
    """The model, ten times over."""
    return _build(_Repeated, case)


def eleven(case: Case) -> Decoder:
    """The same with 10% more work."""
    return _build(_OneMore, case)


def _build(kind: type[_Repeated], case: Case) -> Decoder:
    model = kind(resolve(str(case.params["shape"])).config)
    initialise(model, torch.Generator().manual_seed(case.seed))
    return model

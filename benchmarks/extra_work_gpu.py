"""Two builders for benchmarks/false_alarms.py on a GPU: work bound by the device, and 3% more of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, VOCABULARY = 4096, 512


class Products(nn.Module):
    """`count` products of one square matrix; all but the last leave the answer alone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.vocab_size = VOCABULARY
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTH = self.embedding(input_ids)
        y_BTH = x_BTH
        for _ in range(self.count):
            y_BTH = self.square(x_BTH)
        logits: Tensor = self.head(y_BTH)
        return logits


def _made(count: int) -> Products:
    torch.manual_seed(0)
    return Products(count)


def hundred() -> Products:
    """100 products."""
    return _made(100)


def hundred_and_three() -> Products:
    """103 products: 3% more, for the same answer."""
    return _made(103)

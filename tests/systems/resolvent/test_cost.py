"""The phase-2 model's costs on numbers worked by hand."""

from __future__ import annotations

import pytest

from assay.errors import UsageError
from assay.systems.resolvent.cost import forward_flops, least_memory, work
from assay.systems.resolvent.shapes import PRESETS, Phase2Config

SHAPE = Phase2Config(d_model=4, n_layers=2, n_seq=8, n_heads=2, head_dim=3, d_ff=5, vocab_size=7)
# a block: q, k, v and rates 4 x 20, back 6 x 4, feed-forward 2 x 4 x 5
BLOCK = 80 + 24 + 40
PARAMETERS = 2 * 28 + 32 + 2 * (BLOCK + (10 + 12 + 7) + (20 + 4 + 5 + 4) + 24) + 8


def test_flops_by_hand() -> None:
    # two positions of two rows; pairs: 2 x 3 x 2 x 3 = 36 a head, less than 4 x 9 x 2 = 72 of the recurrence
    assert forward_flops(SHAPE, 2, 2) == 2 * (2 * (2 * BLOCK * 2 + 2 * 36) + 2 * 28 * 2)
    # nine positions: 4 x 9 x 9 = 324 of the recurrence, less than 2 x 3 x 9 x 10 = 540
    assert forward_flops(SHAPE, 1, 9, 8) == 2 * (2 * BLOCK * 9 + 2 * 324) + 2 * 28 * 8


def test_work_of_inference_and_training() -> None:
    assert SHAPE.parameters == PARAMETERS
    params = {"batch_size": 2, "seq_length": 3, "optimizer": "adamw"}
    infer = work(SHAPE, "infer", params, "fp16")
    assert infer["forward"].bytes == 2 * (PARAMETERS - 28) + 2 * 6 * 7 + 8 * 6
    assert infer["step"].flops == forward_flops(SHAPE, 2, 3)
    assert (infer["step"].tokens, infer["step"].matmul_dtype) == (6, "float16")
    train = work(SHAPE, "train", params, "fp32")
    forward = forward_flops(SHAPE, 2, 3, 2)
    assert list(train) == ["forward", "backward", "optimizer", "zero_grad", "step"]
    assert train["step"].flops == 3 * forward
    assert train["optimizer"].bytes == 7 * 4 * (PARAMETERS - 32)  # positions are not trained
    assert work(SHAPE, "generate", params, "fp32") == {}


def test_least_memory_names_its_tensors() -> None:
    assert least_memory(SHAPE, 2, 3, "bf16-autocast") == {
        "weights": 4 * PARAMETERS, "ids": 48, "hidden states": 2 * 6 * 4, "logits": 2 * 6 * 7,
    }  # fmt: skip
    base = least_memory(PRESETS["base"], 1, 4096, "fp16")
    assert base["weights"] == 2 * 70_955_062
    assert base["logits"] == 2 * 4096 * 50257
    narrow = Phase2Config(**{**vars(SHAPE), "vocab_size": 2})
    assert set(least_memory(narrow, 1, 1, "fp32")) == {"weights", "ids", "residual stream", "feed-forward"}


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown dtype 'fp61'"):
        least_memory(SHAPE, 1, 1, "fp61")

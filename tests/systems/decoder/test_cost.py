"""Hand-worked costs of a decoder small enough to count: V=10 H=4 I=6 L=2, 2 query heads, 1 KV head, D=2."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from assay.errors import UsageError
from assay.systems.decoder.cost import forward_flops, kv_bytes_per_token, weight_bytes, work
from assay.systems.decoder.model import Decoder
from assay.systems.decoder.shapes import SHAPES, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    max_position_embeddings=16,
)
# One layer: q 4x4, k 4x2, v 4x2, o 4x4 = 48 and gate, up, down 3 x 4x6 = 72, so 120 in products; two norms
# of 4 more. Head and table 10 x 4 = 40 each. All: 2 x 128 + 80 + 4 = 340; read in a forward: 300.


def test_parameters() -> None:
    assert CONFIG.layer_matmul_parameters == 120
    assert CONFIG.parameters == 340
    assert sum(p.numel() for p in Decoder(CONFIG).parameters()) == 340


def test_forward_flops() -> None:
    # B=3, T=5: 2 x (2 x 120 + 40) x 5 = 2800 a row; scores and mixing 4 x 4 x 15 pairs x 2 layers = 480.
    assert forward_flops(CONFIG, 3, 5) == 3 * (2800 + 480)
    # the full square has 25 pairs: 800
    assert forward_flops(CONFIG, 3, 5, causal=False) == 3 * (2800 + 800)
    # the head at one position saves 2 x 40 x 4
    assert forward_flops(CONFIG, 3, 5, head_positions=1) == 3 * (2800 - 320 + 480)


def test_training() -> None:
    phases = work(CONFIG, "train", {"batch_size": 3, "seq_length": 5, "optimizer": "adamw"}, "bf16-autocast")
    # T - 1 = 4 positions: 2 x 280 x 4 = 2240, and 4 x 4 x 10 pairs x 2 layers = 320
    assert phases["forward"].flops == 3 * 2560
    assert phases["backward"].flops == 2 * 3 * 2560
    assert phases["forward"].bytes == 300 * 2 + 15 * 8  # weights as bfloat16, ids as int64
    assert phases["backward"].bytes == 300 * 2 + 340 * 4  # weights again, and a float32 gradient of each
    assert phases["zero_grad"].bytes == 0
    assert phases["optimizer"].bytes == 7 * 340 * 4
    assert phases["step"].flops == 3 * 3 * 2560
    assert phases["step"].tokens == 15
    assert phases["forward"].matmul_dtype == "bfloat16"
    assert "optimizer" not in work(CONFIG, "train", {"batch_size": 3, "seq_length": 5}, "fp32")


def test_a_fused_loss_moves_the_heads_two_gradient_products_into_the_forward() -> None:
    params = {"batch_size": 3, "seq_length": 5}
    plain = work(CONFIG, "train", params, "bf16-autocast")
    fused = work(CONFIG, "train", params, "bf16-autocast", fused_loss=True)
    # One product of the head: 2 x 40 weights x 4 positions = 320 a row; two of them for 3 rows: 1920.
    assert fused["forward"].flops == 3 * 2560 + 1920
    assert fused["backward"].flops == 2 * 3 * 2560 - 1920
    assert fused["step"].flops == plain["step"].flops == 3 * 3 * 2560
    # Forward also writes the head's gradient, 40 in bfloat16; backward reads it in place of the weight.
    assert fused["forward"].bytes == 300 * 2 + 40 * 2 + 15 * 8
    assert fused["backward"].bytes == plain["backward"].bytes
    assert work(CONFIG, "infer", params, "fp32", fused_loss=True) == work(CONFIG, "infer", params, "fp32")


def test_inference() -> None:
    phases = work(CONFIG, "infer", {"batch_size": 3, "seq_length": 5}, "fp32")
    assert phases["forward"].flops == 3 * 3280
    assert phases["forward"].bytes == 300 * 4 + 3 * 5 * 10 * 4 + 15 * 8  # weights, logits, ids


def test_generation() -> None:
    params = {"gen_batch_size": 3, "gen_input_length": 5, "gen_output_length": 3}
    phases = work(CONFIG, "generate", params, "bf16")
    # Prefill: the first layer in full, 2 x 120 x 5 + 16 x 15 pairs; of the last one keys and values,
    # 2 x 16 x 5, and at one position the other 104 parameters and 5 pairs; the head at one position.
    assert phases["prefill"].flops == 3 * (1200 + 240 + 160 + 208 + 80 + 80)
    assert phases["prefill"].bytes == 300 * 2 + 3 * 5 * 16 + 15 * 8  # weights, the cache it writes, ids
    # Two further tokens, over 6 and 7 keys: 2 x 280 each, and 4 x 4 x 13 pairs x 2 layers.
    assert phases["decode"].flops == 3 * (2 * 560 + 416)
    assert phases["decode"].bytes == 2 * 600 + 3 * 16 * 13
    assert phases["decode"].tokens == 6
    assert phases["step"].tokens == 9
    assert kv_bytes_per_token(CONFIG, "bf16") == 16  # 2 tensors x 2 layers x 2 wide x 2 bytes


def test_one_new_token_has_no_decode() -> None:
    params = {"gen_batch_size": 1, "gen_input_length": 5, "gen_output_length": 1}
    assert list(work(CONFIG, "generate", params, "fp32")) == ["prefill", "step"]


def test_tied_head_reads_the_table() -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    assert tied.parameters == 300
    assert weight_bytes(tied, "fp32") == weight_bytes(CONFIG, "fp32") == 1200


def test_unknown_workload_has_no_costs_and_unknown_dtype_is_refused() -> None:
    assert work(CONFIG, "op", {}, "fp32") == {}
    with pytest.raises(UsageError, match="did you mean 'bf16'"):
        weight_bytes(CONFIG, "bf17")


@pytest.mark.parametrize("shape", ["tiny", "qwen"])
def test_formula_agrees_with_torchs_own_counter_on_eager_attention(shape: str) -> None:
    """The counter sees the full square that math attention executes, forward and backward."""
    config = SHAPES["tiny"]
    if shape == "qwen":
        config = replace(config, qk_norm=True, tie_word_embeddings=True, head_dim=24, num_key_value_heads=4)
    model = Decoder(config, "eager")
    ids_BT = torch.randint(0, config.vocab_size, (3, 10))
    with FlopCounterMode(display=False) as forward:
        out = model(ids_BT, labels=ids_BT)
    executed = forward_flops(config, 3, 10, causal=False)
    assert forward.get_total_flops() == executed
    with FlopCounterMode(display=False) as backward:
        out.loss.backward()
    assert backward.get_total_flops() == 2 * executed
    params = {"batch_size": 3, "seq_length": 10}
    assert (work(config, "train", params, "fp32")["forward"].flops or 0) < executed

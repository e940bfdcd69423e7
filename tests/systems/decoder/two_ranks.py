"""One of two ranks: what a spread decoder answers, against one process. For test_parallel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.model import Decoder
from assay.systems.decoder.parallel import ShardedLM, TensorParallelLM
from assay.systems.decoder.parts import Parts
from assay.systems.decoder.state import named_state
from tests.systems.decoder.helpers import CONFIGS, error, new, token_ids

STATIC = Parts(attention="sdpa", cache="static", loss="chunked")


def both(kind: type[ModuleLM], name: str, **more: Any) -> tuple[ModuleLM, ModuleLM]:
    """One process's decoder of a configuration, and the spread one with its weights."""
    config = CONFIGS[name]
    facts: dict[str, Any] = {"name": name, "dtype": "fp32", "device": "cpu", "weights": "random"}
    one = ModuleLM(new(config), config=config, **facts)
    many = kind(Decoder(config, STATIC), config=config, compile_mode=None, cuda_graph=False, **facts, **more)
    many.load(named_state(one.module))
    return one, many


def sharded(name: str, batch: int) -> dict[str, float]:
    """Errors of state, loss and every gradient."""
    one, many = both(ShardedLM, name)
    ids = token_ids(batch, 12, CONFIGS[name])
    found = {f"state:{n}": error(many.state()[n], t) for n, t in one.state().items()}
    losses = [lm.loss(ids) for lm in (one, many)]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    found["loss"] = error(losses[1], losses[0])
    wanted, got = one.gradients(), many.gradients()
    assert list(wanted) == list(got)
    for n, gradient in wanted.items():
        mine = got[n]
        assert gradient is not None
        assert mine is not None
        found[f"grad:{n}"] = error(mine, gradient)
    found["forward"] = error(many.forward(ids), one.forward(ids))
    many.optimizer_step("adamw")
    assert int(many.proof()["fsdp_sharded_parameters"]) == len(wanted)
    return found


def split(name: str, static: bool) -> dict[str, float]:
    """Errors of logits, and of each step of a generation."""
    one, many = both(TensorParallelLM, name, static_cache=static)
    ids = token_ids(2, 9, CONFIGS[name])
    found = {f"state:{n}": error(many.state()[n], t) for n, t in one.state().items()}
    found["forward"] = error(many.forward(ids), one.forward(ids))
    steps = [lm.decoding(2, 9) for lm in (one, many)]
    answers = [d.prefill(ids[:, :5]) for d in steps]
    for t in range(5, 9):
        found[f"step {t}"] = error(answers[1][0], answers[0][0])
        assert torch.equal(answers[0][1], answers[1][1])
        answers = [d.advance(ids[:, t : t + 1]) for d in steps]
    one_proof, proof = one.proof(), many.proof()
    assert proof["kv_tokens_cached"] == 9
    assert static or proof["kv_bytes_per_token"] == one_proof["kv_bytes_per_token"]
    tied = CONFIGS[name].tie_word_embeddings
    assert proof["tensor_parallel_modules"] == 7 * CONFIGS[name].num_hidden_layers + (not tied)
    return found


def main() -> None:
    dist.init_process_group("gloo")
    found = {f"sharded {name}": sharded(name, 4) for name in CONFIGS}
    found |= {f"sharded llama, {rows} rows": sharded("llama", rows) for rows in (1, 3)}
    found |= {f"split {name} {static}": split(name, static) for name in CONFIGS for static in (False, True)}
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

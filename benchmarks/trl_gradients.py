"""Are gradients right under TRL's offloading of activations, with backward inside its context and outside?

    python benchmarks/trl_gradients.py [--without-liger]

Llama-1B of transformers, 4 x 2048 tokens, bfloat16, on a CUDA device, with TRL installed. Prints for each
step how many of the loss and the gradients differ from those of a step without it, each after a step on other
inputs, and how far the farthest is off as a share of its size: by the fastest algorithms, then by the
deterministic ones; and what a step takes on the host's clock, copies of the gradients included.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time

import torch
import transformers
import trl  # type: ignore[import-not-found]  # no dependency
from torch import Tensor
from trl.models.activation_offloading import get_act_offloading_ctx_manager  # type: ignore[import-not-found]

from assay.systems.activations.language import deterministic
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.build import build_hf

SHAPE, BATCH, LENGTH = "llama-1b", 4, 2048


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--without-liger", action="store_true")
    liger = not parser.parse_args().without_liger
    versions = f"TRL {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; {SHAPE}, {BATCH} x {LENGTH} tokens, bf16")
    language = build_hf(SHAPE, name="hf", dtype="bf16", device="cuda", seed=0, attend="sdpa", liger=liger)
    for strict in (False, True):
        with deterministic(compiled=False) if strict else contextlib.nullcontext():
            compare(language, f"liger={liger} det={strict}")


def compare(language: ModuleLM, name: str) -> None:
    """Lines for one kind of algorithms."""
    ids_BT, others_BT = (
        torch.randint(
            language.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed)
        ).cuda()
        for seed in (1, 2)
    )
    first = answers(language, ids_BT)
    print(f"{name} off again: {difference(first, answers(language, ids_BT))}", flush=True)
    for inside in (False, True):
        context = get_act_offloading_ctx_manager(language.module, warn_if_no_head=False)
        for attempt in range(2):
            answers(language, others_BT, context, inside)
            found = answers(language, ids_BT, context, inside)
            print(f"{name} inside={inside} round {attempt}: {difference(first, found)}", flush=True)
        begin = time.perf_counter()
        for _ in range(2):
            answers(language, ids_BT, context, inside)
        print(f"  step ms {(time.perf_counter() - begin) / 2 * 1e3:.1f}", flush=True)
        head = language.module.get_submodule("lm_head")  # its hooks switch the context off for the head
        head._forward_pre_hooks.clear()
        head._forward_hooks.clear()
        head._forward_hooks_always_called.clear()


def answers(
    language: ModuleLM,
    ids_BT: Tensor,
    context: contextlib.AbstractContextManager[object] | None = None,
    inside: bool = False,
) -> dict[str, Tensor]:
    """The loss and every gradient of a step, by name."""
    language.zero_grad()
    with contextlib.ExitStack() as under:
        if context is not None:
            under.enter_context(context)
        loss = language.loss(ids_BT)
        if not inside:
            under.close()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    torch.cuda.synchronize()
    gradients = {n: g.clone() for n, g in language.gradients().items() if g is not None}
    return {"loss": loss.detach().clone(), **gradients}


def difference(first: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """How many differ, how many are no numbers, and the farthest of the others."""
    off = {n: float((found[n].float() - t.float()).norm() / t.float().norm()) for n, t in first.items()}
    numbers = {n: by for n, by in off.items() if not math.isnan(by)}
    worst = max(numbers, key=lambda n: numbers[n])
    differ = sum(by != 0 for by in off.values())
    return (
        f"{differ} of {len(off)} differ, {len(off) - len(numbers)} NaN; "
        f"worst else {worst} {numbers[worst]:.3g}"
    )


if __name__ == "__main__":
    main()

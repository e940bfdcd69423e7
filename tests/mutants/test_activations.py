"""Every wrong policy fails its proof, by the name of the counter; the right ones pass theirs."""

from __future__ import annotations

import pytest
import torch

from assay import gate
from assay.contracts import Case
from assay.plugins import find
from assay.systems.activations.language import PolicyLM, blocks_of
from assay.systems.activations.policies import Checkpoint, Offload
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.build import build_decoder
from assay.systems.decoder.parts import Parts
from tests.mutants.activations import MISSED_MIB, MISSED_TARGET, RIGHT_AUTO, WRONG, Made
from tests.systems.offload.helpers import make

CASE = Case(workload="train", params={"shape": "tiny", "batch_size": 2, "seq_length": 16})
RIGHT: dict[str, Made] = {
    "offload": lambda module, _: Offload(make(held=[module], max_inflight_bytes=4096, min_bytes=1024)),
    "checkpoint": lambda _, blocks: Checkpoint(blocks),
    "auto": RIGHT_AUTO,
}


def decoder(dtype: str) -> ModuleLM:
    return build_decoder("tiny", Parts(attention="sdpa"), name="d", dtype=dtype, device="cpu", seed=0)


def disproved(policy: str, built: Made, dtype: str = "fp32", **options: str | float) -> list[str]:
    """The claims of a policy that are not borne out by steps as the worker takes them."""
    inner = decoder(dtype)
    system = PolicyLM(inner, built(inner.module, blocks_of(inner.module)), 2, 16)
    before = dict(system.proof())  # after warm-up
    for seed in range(2):
        ids_BT = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(seed))
        system.loss(ids_BT).backward()
        system.zero_grad()
    claims = find("variants", "activations").claims(CASE, {"policy": policy, **options})
    mine = [claim for claim in claims if not claim.counter.startswith("ops.")]
    return gate.prove(mine, system.proof(), before)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_policy_fails_the_claim_that_its_name_is_beside(name: str) -> None:
    policy, built, counter = WRONG[name]
    tries = 5  # which addresses come again is the allocator's to say: a pointer as a key may go well once
    assert any(counter in line for _ in range(tries) for line in disproved(policy, built)), name


@pytest.mark.parametrize("policy", RIGHT)
def test_right_policy_bears_out_every_claim(policy: str) -> None:
    assert disproved(policy, RIGHT[policy]) == []


def lossy(module: torch.nn.Module, _blocks: list[torch.nn.Module]) -> Offload:
    return Offload(make(held=[module], max_inflight_bytes=4096, min_bytes=1024, lossy="fp8"))


def test_lossy_offloading_is_claimed_as_what_it_is() -> None:
    assert disproved("offload", lossy, "bf16", lossy="fp8") == []
    assert any("different_tensors" in line for line in disproved("offload", lossy, "bf16"))
    (line,) = disproved("offload", RIGHT["offload"], "bf16", lossy="fp8")
    assert "offload_bytes_spared" in line


def test_plan_that_misses_the_target_it_was_given_is_no_plan_for_it() -> None:
    (line,) = disproved("auto", MISSED_TARGET, target_mib=MISSED_MIB)
    assert "plan_over_target" in line
    assert "no plan meets target_mib" in line

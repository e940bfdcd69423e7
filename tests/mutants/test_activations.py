"""Every wrong policy fails its proof, by the name of the counter; the right ones pass theirs."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from assay import proof
from assay.contracts import Case
from assay.plugins import find
from assay.systems.activations import policies
from assay.systems.activations.language import PolicyLM, _farthest, _rounding, blocks_of
from assay.systems.activations.policies import THEIRS, Checkpoint, Offload, Policy
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
    return proof.prove(mine, system.proof(), before)


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


class _Scattered(PolicyLM):
    """Gradients that two steps do not share to the bit, and one, `lucky`, that they happened to."""

    def __init__(self, *, scatter: float, off: float) -> None:
        inner = decoder("bf16")
        super().__init__(inner, RIGHT["checkpoint"](inner.module, blocks_of(inner.module)), 2, 16)
        self._scatter, self._off, self._steps = scatter, off, 0

    def _answers(self, ids_BT: torch.Tensor, policy: Policy) -> dict[str, torch.Tensor]:
        del ids_BT
        self._steps += 1
        off = self._off * (type(policy) is not Policy)
        found = {"scattered": self._scatter * (self._steps % 2), "lucky": off * 2**-8}
        return {name: torch.full((64,), 1.0 + by) for name, by in found.items()}


@pytest.mark.parametrize(
    ("scatter", "off", "different"), [(0.0, 0.0, 0), (0.0, 0.01, 1), (0.01, 0.01, 0), (0.01, 100, 1)]
)
def test_a_tensor_that_reproduced_by_luck_may_be_rounded_otherwise(
    scatter: float, off: float, different: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA one of 147 did, by the atomics of attention's backward pass, and a right policy was refused."""
    monkeypatch.setattr("assay.systems.activations.language._rounding", lambda t: 2**-8 * float(t.norm()))
    found = _Scattered(scatter=scatter, off=off).differing(2, 16)
    assert found["different_tensors"] == different
    assert found["reproduced_tensors"] == (1 if scatter else 2)
    assert found.get("farthest_different") == ("lucky" if different else None)
    assert found.get("farthest_departure") == (pytest.approx(off * 2**-8, rel=1e-2) if different else None)


def test_a_gradient_that_is_no_number_is_the_farthest_off() -> None:
    assert _farthest({}) == {}
    found = _farthest({"rounded": 0.004, "lost": math.nan, "wrong": 2.6e6})
    assert found["farthest_different"] == "lost"
    assert found["farthest_departure"] == "nan"  # which a record can hold


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float32, 2**-24)])
def test_a_rounding_is_half_a_unit_of_the_dtype_in_every_element(dtype: torch.dtype, unit: float) -> None:
    assert _rounding(torch.full((64,), 3.0, dtype=dtype)) == pytest.approx(unit * 3 * 8)


class _Watch(TorchDispatchMode):
    """Names of operators that run where one without a deterministic algorithm is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.strict: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            self.strict.append(func.name())
        return func(*args, **(kwargs or {}))


def test_attention_goes_back_by_its_deterministic_algorithm() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    inner = decoder("fp32")
    system = PolicyLM(inner, RIGHT["checkpoint"](inner.module, blocks_of(inner.module)), 2, 16)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not strict while the watch looks on
    try:
        with _Watch() as watch:
            system.differing(2, 16)
    finally:
        torch.use_deterministic_algorithms(before)
    assert {name.partition("(")[0] for name in watch.strict} == {
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    }


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["sdpa", "hf"])
def test_steps_on_a_gpu_reproduce_to_the_bit(base: str) -> None:
    """Long enough for attention's backward pass to add up in any order, were it allowed to."""
    case = Case(
        workload="train", params={"shape": "tiny:4", "batch_size": 4, "seq_length": 2048}, dtype="bf16",
        device="cuda",
    )  # fmt: skip
    for policy in ("offload", "checkpoint"):
        with find("variants", "activations").build(case, {"policy": policy, "base": base}) as system:
            found = cast("PolicyLM", system).differing(4, 2048)
        assert found["reproduced_tensors"] == found["compared_tensors"]
        assert found["different_tensors"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True])
def test_trl_without_backward_inside_is_caught(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that we made: its trainer has backward inside, and gradients are wrong where it is not."""
    pytest.importorskip("trl")
    case = Case(
        workload="train", params={"shape": "llama-1b", "batch_size": 4, "seq_length": 2048}, dtype="bf16",
        device="cuda",
    )  # fmt: skip
    place, options, spans = THEIRS["trl"]
    assert spans
    monkeypatch.setattr(policies, "THEIRS", {"trl": (place, options, inside)})
    with find("variants", "activations").build(case, {"policy": "trl", "base": "hf-liger"}) as system:
        found = cast("PolicyLM", system).differing(4, 2048)
    assert found["reproduced_tensors"] == found["compared_tensors"]
    assert (found["different_tensors"] == 0) == inside


def test_plan_that_misses_the_target_it_was_given_is_no_plan_for_it() -> None:
    (line,) = disproved("auto", MISSED_TARGET, target_mib=MISSED_MIB)
    assert "plan_over_target" in line
    assert "no plan meets target_mib" in line

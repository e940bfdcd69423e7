from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import cast

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from assay.contracts import Case, Claim, LanguageModel, Options, Scalar, Variant
from assay.errors import UsageError
from assay.plugins import find, names
from assay.variants._custom import custom_variant
from tests.systems.decoder.helpers import error, token_ids

LENGTHS: dict[str, Scalar] = {
    "batch_size": 2,
    "seq_length": 12,
    "gen_batch_size": 2,
    "gen_input_length": 8,
    "gen_output_length": 5,
}
DECODERS = [
    n for n in names("variants") if n not in ("phase2", "resolvent")
]  # those two have their own tests
SDPA = "ops.aten::scaled_dot_product_attention"
UNCOMPILED: list[tuple[str, Options]] = [
    ("eager", {}),
    ("eager", {"recompute": True}),
    ("sdpa", {}),
    ("fused", {"compile": False}),
    ("hf", {}),
    ("hf", {"attn_implementation": "eager"}),
]


def _case(workload: str, dtype: str = "fp32", device: str = "cpu") -> Case:
    return Case(workload=workload, params={"shape": "tiny", **LENGTHS}, dtype=dtype, device=device)


def _run(variant: Variant, case: Case, options: Options) -> dict[str, Scalar]:
    """Check the arm against the oracle over the case's workload and return its counters, operators too."""
    assert variant.oracle is not None
    system = cast("LanguageModel", variant.build(case, options))
    oracle = cast("LanguageModel", variant.oracle(case))
    system.load(oracle.state())
    ids_BT, limit = token_ids(2, 12), 1e-5 if case.dtype == "fp32" else 3e-2
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        if case.workload == "train":
            loss = system.loss(ids_BT)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            assert abs(loss.item() - oracle.loss(ids_BT).item()) < limit * 5
        elif case.workload == "infer":
            assert error(system.forward(ids_BT), oracle.forward(ids_BT)) < limit
        else:
            decoding = system.decoding(2, 13)
            logits_BV, token_B1 = decoding.prefill(ids_BT[:, :8])
            assert error(logits_BV, oracle.forward(ids_BT[:, :8])[:, -1]) < limit
            for _ in range(4):
                _, token_B1 = decoding.advance(token_B1)
    operators = {f"ops.{event.key}": event.count for event in profiled.key_averages()}
    return {SDPA: 0, **operators, **system.proof()}


def _holds(claim: Claim, proof: Mapping[str, Scalar]) -> bool:
    got = float(proof[claim.counter])
    return {"==": got == claim.value, ">": got > claim.value, ">=": got >= claim.value}[claim.comparison]


@pytest.mark.parametrize("dtype", ["fp32", "bf16-autocast"])
@pytest.mark.parametrize("workload", ["train", "infer", "generate"])
@pytest.mark.parametrize(("name", "options"), UNCOMPILED)
def test_variant_agrees_with_the_oracle_and_proves_its_claims(
    name: str, options: Options, workload: str, dtype: str
) -> None:
    variant, case = find("variants", name), _case(workload, dtype)
    claims, proof = variant.claims(case, options), _run(variant, case, options)
    assert claims
    assert [c for c in claims if not _holds(c, proof)] == []


def test_claims_fail_for_what_another_variant_does() -> None:
    case = _case("generate")
    proof = {**_run(find("variants", "eager"), case, {}), "compiled_graphs": 0}  # other tests may compile
    for name, counter in (("sdpa", SDPA), ("fused", "static_cache_steps"), ("compile", "compiled_graphs")):
        broken = [c.counter for c in find("variants", name).claims(case, {}) if not _holds(c, proof)]
        assert counter in broken, name


@pytest.mark.parametrize("recompute", [False, True])
def test_claim_of_recomputing_fails_for_a_step_that_does_not(recompute: bool) -> None:
    eager, case = find("variants", "eager"), _case("train")
    system = cast("LanguageModel", eager.build(case, {"recompute": recompute}))
    with profile(
        activities=[ProfilerActivity.CPU]
    ) as profiled:  # of this arm alone: the oracle has a silu too
        system.loss(token_ids(2, 12)).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    proof = {SDPA: 0, **{f"ops.{event.key}": event.count for event in profiled.key_averages()}}
    broken = [c.counter for c in eager.claims(case, {"recompute": True}) if not _holds(c, proof)]
    assert broken == ([] if recompute else ["ops.aten::silu"])


def test_on_cuda_the_fused_decode_claims_replayed_graphs() -> None:
    claimed = {c.counter for c in find("variants", "fused").claims(_case("generate", device="cuda"), {})}
    assert "cuda_graph_replays" in claimed
    assert "cuda_graph_replays" not in {
        c.counter for c in find("variants", "fused").claims(_case("generate"), {})
    }


def test_a_replayed_graph_is_proved_by_its_kernels_since_it_shows_no_operators() -> None:
    case, graph = _case("generate", device="cuda"), {"cache": "static", "cuda_graph": True}
    one = Case(workload="generate", params={**case.params, "gen_batch_size": 1}, dtype="bf16", device="cuda")
    plain = {c.counter for c in find("variants", "sdpa").claims(case, graph)}
    assert SDPA not in plain
    assert "ops._decode_split" in plain
    assert "ops._stream" not in plain
    assert "ops._stream" in {c.counter for c in find("variants", "fused").claims(one, {})}
    two = {c.counter for c in find("variants", "fused").claims(case, {})}  # LENGTHS has two rows
    assert "ops._stream" not in two


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, when it compiles
@pytest.mark.parametrize("name", ["compile", "fused"])
def test_compiled_generation_agrees_and_proves_its_claims(name: str) -> None:
    variant, case = find("variants", name), _case("generate")
    proof = _run(variant, case, {})
    assert [c for c in variant.claims(case, {}) if not _holds(c, proof)] == []
    again = _run(variant, case, {})
    assert again["compiled_graphs"] == proof["compiled_graphs"]  # nothing is compiled a second time


def test_unknown_compile_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'max-autotune'"):
        find("variants", "compile").build(_case("infer"), {"compile_mode": "max-autotun"})


def test_lengths_are_checked_before_anything_is_built() -> None:
    too_long = Case(workload="infer", params={"shape": "tiny", "seq_length": 200})
    for name in DECODERS:
        with pytest.raises(UsageError, match="beyond the positions"):
            find("variants", name).check(too_long, {})


def test_listing_and_checking_variants_does_not_import_torch() -> None:
    code = (
        "import sys; from assay.plugins import find, names; from assay.contracts import Case\n"
        "case = Case(workload='infer', params={'shape': 'seed', 'seq_length': 8}, dtype='bf16')\n"
        f"assert set({DECODERS}) <= set(names('variants'))\n"
        f"[find('variants', n).check(case, {{}}) for n in {DECODERS}]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_custom_variants_are_not_listed() -> None:
    assert {"eager", "sdpa", "compile", "fused", "hf"} <= set(names("variants"))
    assert not any("custom" in name for name in names("variants"))


def test_custom_builder_draws_the_same_weights_for_the_same_seed() -> None:
    def build() -> nn.Module:
        class Table(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(5, 5)

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = self.table(input_ids)
                return out

        return Table()

    build.vocab_size = 4  # type: ignore[attr-defined]  # the attribute that builders may carry
    variant = custom_variant("b", build)
    first, again = (cast("LanguageModel", variant.build(_case("infer"), {})) for _ in range(2))
    assert torch.equal(first.state()["table.weight"], again.state()["table.weight"])
    assert first.vocab_size == 4
    assert custom_variant("b", build, weights="own").weights == "own"


@pytest.mark.parametrize(("attribute", "value"), [("vocab_size", "many"), ("state_map", ["x"])])
def test_bad_builder_attributes_are_refused(attribute: str, value: object) -> None:
    def build() -> nn.Module:
        return nn.Identity()

    setattr(build, attribute, value)
    with pytest.raises(UsageError, match=f"bad {attribute} of builder 'b'"):
        custom_variant("b", build)

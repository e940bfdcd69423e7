"""The variant `activations` in the bench: a session through gate and proofs, and what it is asked in vain."""

from __future__ import annotations

import subprocess
import sys

import pytest

from assay.config import RunConfig
from assay.contracts import Case
from assay.errors import UsageError
from assay.measure.record import Record, Status
from assay.plan import make_plan
from assay.plugins import find
from tests.sessions import measured

ACTIVATIONS = find("variants", "activations")


def session(*arms: str, trace: bool = False) -> list[Record]:
    return measured(
        RunConfig(
            arms=list(arms),
            workload=["train"],
            params={"shape": ["tiny:3"], "batch_size": [2], "seq_length": [32]},
            dtype=["fp32"],
            device="cpu",
            launches=1,
            warmup_steps=1,
            benchmark_steps=2,
            isolation="inline",
            trace_memory=trace,
        )
    )


def test_policies_pass_the_gate_and_their_proofs_and_lower_what_forward_leaves() -> None:
    policies = ("off", "offload,max_inflight_mib=0.1", "checkpoint")
    names = [f"activations[policy={policy}]" for policy in policies]
    records = session(*names, trace=True)
    assert {r.status for r in records} == {Status.OK}, [r.reason for r in records]
    by_arm = {r.arm.name: r for r in records}
    off, offload, checkpoint = (by_arm[name] for name in names)
    for record in (offload, checkpoint):
        assert record.proof["different_tensors"] == 0
        assert record.proof["reproduced_tensors"] == record.proof["compared_tensors"]
        assert off.timeline
        assert record.timeline
        assert record.timeline.end_mib["forward"] < 0.5 * off.timeline.end_mib["forward"]
    assert off.saved
    assert off.saved.total_mib == pytest.approx(off.timeline.end_mib["forward"], rel=0.02)
    assert offload.saved is None, "the offloader's hooks hide what is saved"
    assert "different_tensors" not in off.proof


def test_policy_that_this_machine_lacks_does_not_stop_the_others() -> None:
    records = session("activations", "activations[policy=trl]", "activations[policy=checkpoint]")
    ended = [(r.arm.options["policy"], r.status) for r in records if r.arm.options["policy"] != "off"]
    assert ended == [("trl", Status.UNAVAILABLE), ("checkpoint", Status.OK)]


def test_stock_model_is_a_base() -> None:
    pytest.importorskip("transformers")
    records = session("activations[base=hf]", "activations[base=hf,policy=checkpoint]")
    assert {r.status for r in records} == {Status.OK}, [r.reason for r in records]


@pytest.mark.parametrize(
    ("arm", "line"),
    [
        ("activations[policy=offlod]", "did you mean 'offload'"),
        ("activations[base=plain]", "'base'.*cannot be plain"),
    ],
)
def test_bad_option_is_refused(arm: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        make_plan(RunConfig(arms=["activations", arm], workload=["train"], device="cpu"))


def test_copies_are_claimed_of_every_moving_policy_on_cuda() -> None:
    case = Case(workload="train", params={"shape": "tiny"}, device="cuda")
    for policy in ("offload", "save-on-cpu", "torchtune", "trl"):
        claimed = {claim.counter for claim in ACTIVATIONS.claims(case, {"policy": policy})}
        assert {"ops.Memcpy DtoH (Device -> Pinned)", "ops.Memcpy HtoD (Pinned -> Device)"} <= claimed


def test_looking_at_it_imports_no_torch() -> None:
    code = (
        "import sys; from assay.plugins import find; v = find('variants', 'activations'); "
        "from assay.contracts import Case; v.claims(Case(workload='train', params={'shape': 'tiny'}), {}); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""The variant `phase2` in the bench: checks, claims, and sessions through the gate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch

from assay.config import RunConfig
from assay.contracts import Case, LanguageModel, Options
from assay.errors import UsageError
from assay.measure.record import Record, Status
from assay.plugins import find
from assay.systems.resolvent import IMPLEMENTATIONS
from assay.systems.resolvent.mixer import ResolventMixer
from tests.sessions import measured

PHASE2 = find("variants", "phase2")
SIZES: Mapping[str, Any] = {"shape": ["small"], "batch_size": [2], "seq_length": [12]}
COMPILER = [
    "ignore:.*script_method.*:DeprecationWarning",  # torch's own, when it compiles
    "ignore:Torchinductor does not support code generation for complex",
    "ignore:TensorFloat32:UserWarning",  # full float32 is what we asked for
    "ignore:The CUDA Graph is empty:UserWarning",  # torch primes its own pool
    "ignore:\\s*Online softmax is disabled:UserWarning",  # its own choice for few rows
    "ignore:Attempting to run cuBLAS:UserWarning",  # the first call of a process
]


def case(workload: str = "infer", shape: str = "small", device: str = "cpu") -> Case:
    return Case(workload=workload, params={"shape": shape, "batch_size": 2, "seq_length": 12}, device=device)


def session(*arms: str, workload: str = "infer", dtype: str = "fp32", device: str = "cpu") -> list[Record]:
    config = RunConfig(
        arms=list(arms),
        workload=[workload],
        params=dict(SIZES),
        dtype=[dtype],
        device=device,
        launches=1,
        warmup_steps=1,
        benchmark_steps=2,
        isolation="inline",
    )
    return measured(config)


@pytest.mark.parametrize(
    ("shape", "device", "options", "line"),
    [
        ("seed", "cpu", {}, "'seed' is no preset of the phase-2 model; expected --shape small, base, large"),
        ("bas", "cpu", {}, "did you mean 'base'"),
        ("small", "cpu", {"cuda_graph": True}, "needs a CUDA device"),
        ("small", "cuda", {"cuda_graph": True, "compile": False}, "needs compile=true"),
    ],
)
def test_what_cannot_be_is_refused_before_any_process(
    shape: str, device: str, options: Options, line: str
) -> None:
    assert PHASE2.check is not None
    with pytest.raises(UsageError, match=line):
        PHASE2.check(case(shape=shape, device=device), options)


def test_checking_imports_no_torch() -> None:
    code = (
        "import sys; from assay.plugins import find; from assay.contracts import Case\n"
        "find('variants', 'phase2').check(Case(workload='infer', params={'shape': 'base'}), {})\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_implementations_are_those_of_the_operator() -> None:
    assert set(PHASE2.options["implementation"].choices) == set(IMPLEMENTATIONS)


def test_claims_follow_the_options() -> None:
    def counters(device: str, options: Options) -> set[str]:
        return {c.counter for c in PHASE2.claims(case(device=device), options)}

    operator, compiled = "ops.assay::resolvent_diagonal", {"compiled_graphs", "graph_breaks"}
    assert counters("cpu", {"compile": False}) == {operator}
    assert counters("cpu", {}) == {*compiled, operator}
    assert counters("cuda", {}) == {*compiled, "ops.cudaGraphLaunch"}
    assert counters("cuda", {"cuda_graph": False}) == {*compiled, f"{operator}_triton"}
    assert counters("cuda", {"compile": False, "implementation": "pcr"}) == {operator}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_session_passes_the_gate_and_says_that_nothing_is_causal(dtype: str) -> None:
    records = session("phase2[compile=false]", "phase2[compile=false,implementation=loop]", dtype=dtype)
    assert [(r.status, r.reason) for r in records] == [(Status.OK, "")] * 2
    assert all(r.gate is not None and r.gate.passed for r in records)
    assert records[0].gate is not None
    assert [s.partition(",")[0] for s in records[0].gate.skipped] == [
        "causality: the baseline itself does not pass it"
    ]
    assert records[0].model["parameters"] == 29_035_540


def test_training_gives_the_oracles_loss_and_gradients() -> None:
    trained = case("train")
    assert PHASE2.oracle is not None
    system = cast("LanguageModel", PHASE2.build(trained, {"compile": False}))
    oracle = cast("LanguageModel", PHASE2.oracle(trained))
    system.load(oracle.state())
    ids_BT = torch.randint(system.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = [arm.loss(ids_BT) for arm in (system, oracle)]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    expected = oracle.gradients()
    for name, found in system.gradients().items():
        want = expected[name]
        assert (found is None) == (want is None) == (name == "position"), name
        if found is not None and want is not None:
            assert (found - want).norm() <= 1e-3 * want.norm() + 1e-7, name


@pytest.mark.slow
@pytest.mark.filterwarnings(*COMPILER)
def test_compiled_passes_the_gate() -> None:
    records = session("phase2[compile=false]", "phase2")
    assert [(r.status, r.reason) for r in records] == [(Status.OK, "")] * 2


def test_a_mixer_that_is_a_little_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One coupling too late: the arm is refused in float32, while the oracle is untouched."""
    right = ResolventMixer.couplings
    monkeypatch.setattr(ResolventMixer, "couplings", lambda self, n: right(self, n).roll(1))
    records = session("phase2[compile=false]", "phase2[compile=false]")
    assert {r.status for r in records} == {Status.GATE_FAILED}


@pytest.mark.gpu
@pytest.mark.filterwarnings(*COMPILER)
@pytest.mark.parametrize(
    ("workload", "dtype"), [("infer", "fp16"), ("infer", "fp32"), ("train", "bf16-autocast")]
)
def test_graphs_on_a_gpu_pass_gate_and_proof(workload: str, dtype: str) -> None:
    records = session("phase2[compile=false]", "phase2", workload=workload, dtype=dtype, device="cuda")
    assert [(r.status, r.reason) for r in records] == [(Status.OK, "")] * 2
    assert torch.cuda.is_available()

"""The whole path on a CUDA device: every variant, every workload, every dtype, gated and proved."""

import pytest

from assay import compare as compare_functions
from assay import session
from assay.config import RunConfig
from assay.measure.record import Status
from assay.observer import NullObserver
from assay.plan import make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),  # torch's own, on compiling
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),  # full float32 is what we asked for
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # torch primes its own pool
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # the first call of a process
]

SIZES = {"shape": ["tiny"], "seq_length": [64], "gen_input_length": [16], "gen_output_length": [24]}


def config(*arms: str, workload: str, dtype: str = "bf16-autocast", **options: object) -> RunConfig:
    params = {
        k: v for k, v in SIZES.items() if k == "shape" or k.startswith("gen") == (workload == "generate")
    }
    return RunConfig(
        arms=list(arms),
        workload=[workload],
        params=params,
        dtype=[dtype],
        device="cuda",
        launches=1,
        warmup_steps=3,
        benchmark_steps=6,
        **options,
    )


@pytest.mark.parametrize("workload", ["train", "infer", "generate"])
@pytest.mark.parametrize(
    ("other", "dtype"),
    [
        *((other, dtype) for other in ("sdpa", "hf") for dtype in ("bf16-autocast", "bf16", "fp32")),
        ("compile", "bf16-autocast"),
        *((other, "bf16") for other in ("cudnn", "flash", "liger", "hf-liger")),
        *(("fused", dtype) for dtype in ("bf16-autocast", "bf16", "fp32")),
    ],
)
def test_every_variant_passes_gate_and_proof_on_cuda(other: str, dtype: str, workload: str) -> None:
    plan = make_plan(config("eager", other, workload=workload, dtype=dtype, isolation="inline"))
    records = session.run(plan, None, NullObserver()).records
    assert [(r.arm.name, r.status, r.reason) for r in records] == [
        ("eager", Status.OK, ""),
        (other, Status.OK, ""),
    ]
    for record in records:
        assert record.method is not None
        assert record.method.clock == "cuda"
        assert record.memory is not None
        assert record.memory.source == "cuda-allocator"
        assert set(record.kernel_ns) == {*record.phases, "step"}
        assert 0 < record.kernel_ns["step"] < 1.5 * record.summary["step"].median_ns


def test_decoding_of_fused_replays_a_graph_in_a_worker_process() -> None:
    records = session.run(
        make_plan(config("eager", "fused", workload="generate")), None, NullObserver()
    ).records
    fused = records[1]
    assert fused.status is Status.OK, fused.reason
    assert fused.proof["cuda_graph_replays"] > 0
    assert len(fused.laps_ns["decode"][0]) == 23
    assert fused.proof["ops._decode_split"] > 0
    assert fused.proof["ops._stream"] > 0


def test_torchs_kernels_behind_a_replayed_graph_prove_their_claims() -> None:
    arm = "sdpa[cache=static,cuda_graph=true]"
    plan = make_plan(config("eager", arm, workload="generate", dtype="bf16", isolation="inline"))
    records = session.run(plan, None, NullObserver()).records
    assert [r.reason for r in records] == ["", ""]


@pytest.mark.parametrize("mutant", ["no_causal_mask", "rope_discarded", "heads_not_transposed_back"])
def test_mutants_are_refused_in_bfloat16_on_cuda(mutant: str) -> None:
    arm = f"tests/mutants/decoder.py:{mutant}"
    plan = make_plan(config("eager", arm, workload="infer", dtype="bf16", isolation="inline"))
    records = session.run(plan, None, NullObserver()).records
    assert records[1].status is Status.GATE_FAILED
    assert not records[1].samples_ns


def test_functions_on_cuda_are_timed_with_events() -> None:
    import torch

    def make(seed: int) -> tuple[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return (torch.randn(512, 512, device="cuda", generator=generator),)

    found = compare_functions(
        {"once": lambda x: x @ x, "twice": lambda x: (x @ x, x @ x)[0]}, inputs=make, time_budget_s=3
    )
    assert found.verdict == "slower"
    assert found.records[0].method is not None
    assert found.records[0].method.clock == "cuda"

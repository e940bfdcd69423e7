"""One arm, for real: complete records inside this process, and what a Runner makes of trouble."""

import dataclasses
import importlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from assay import plugins, worker
from assay.contracts import Case, Claim, Options, Variant
from assay.errors import Unavailable, UsageError
from assay.measure import processor
from assay.measure.record import Arm, Record, Status
from assay.measure.store import read_records, read_samples
from assay.plan import make_plan
from assay.systems.decoder.shapes import SHAPES
from assay.wire import (
    Build,
    Built,
    Failure,
    Finish,
    Finished,
    MeasureMemory,
    Open,
    Ready,
    Reply,
    Request,
    Sample,
    Sampled,
    Settle,
    Warm,
    as_failure,
)
from assay.worker import Runner, open_runner
from tests.sessions import measured, tiny

PHASES = {
    "train": ["forward", "backward", "zero_grad"],
    "infer": ["forward"],
    "generate": ["prefill", "decode"],
}
QUANTITIES = {
    "train": {"loss", "grad"},
    "infer": {"logits"},
    "generate": {"logits", "tokens"},
}


@pytest.fixture(scope="module", params=list(PHASES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A whole run of one workload: eager against fused, two launches."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny(["eager", "fused[compile=false]"], request.param, launches=2, benchmark_steps=8)
    measured(config, folder)
    return request.param, folder


def test_records_are_complete(run: tuple[str, Path]) -> None:
    workload, folder = run
    records = read_records(folder)
    assert [(r.launch, r.arm.name, r.status) for r in records] == [
        (n, arm, Status.OK) for n in range(2) for arm in ("eager", "fused[compile=false]")
    ]
    for record in records:
        assert record.phases == PHASES[workload]
        assert set(record.samples_ns) == {"step", *PHASES[workload]} == set(record.summary)
        assert all(len(s) == 4 and min(s) > 0 for s in record.samples_ns.values())
        assert_described(record)
        assert_method(record)


def assert_described(record: Record) -> None:
    """Cold start, memory, work, model and environment are all there and of a sane size."""
    assert record.memory
    assert record.memory.peak_mib >= record.memory.final_mib > 0
    assert record.cold
    assert min(record.cold.build_s, record.cold.first_call_s) > 0
    assert record.work["step"].flops
    assert record.model["parameters"] == SHAPES["tiny"].parameters
    env = record.environment
    assert env
    assert env.threads
    assert env.packages["torch"]
    assert {"before.load_1m", "after.load_1m"} <= set(env.telemetry)
    assert record.config["arms"] == ["eager", "fused[compile=false]"]
    assert record.config_hash == record.run


def assert_method(record: Record) -> None:
    method = record.method
    assert method
    assert (method.clock, method.isolation, method.pairing) == ("wall", "inline", "interleaved")
    assert (method.launches, method.lead_in, method.stop) == (2, 1, "4 blocks asked for")
    assert method.settling_blocks <= 4  # none where a sample took long, as on a busy machine
    assert sorted(method.order) == ["B", "B", "O", "O"]
    assert method.warmup_steps >= 1
    mean_ns = record.summary["step"].mean_ns
    assert method.inner * mean_ns > 1e5, "a sample is long against the clock"


def test_gate_holds_every_tier_before_and_after(run: tuple[str, Path]) -> None:
    workload, folder = run
    for record in read_records(folder):
        gate = record.gate
        assert gate
        assert gate.passed
        assert not gate.reduced
        assert gate.oracle == "reference implementation in fp64"
        assert (gate.weights, gate.skipped) == ("shared", [])
        assert gate.shape == record.case.params
        assert len(gate.state) == 12
        found = {(f.tier, f.stage) for f in gate.figures}
        assert found == {
            ("meaning", "before"),
            ("probe", "before"),
            ("precision", "before"),
            ("precision", "after"),
        }
        kinds = {f.quantity.partition(":")[0] for f in gate.figures if f.tier == "precision"}
        assert kinds == QUANTITIES[workload]
        assert {f.quantity for f in gate.figures if f.tier == "probe"} >= {"causality", "position"}
        assert all(f.error is not None for f in gate.figures if f.quantity != "weights")
        assert "weights" in {f.quantity for f in gate.figures}


def test_proofs_tell_the_arms_apart(run: tuple[str, Path]) -> None:
    workload, folder = run
    eager, fused = read_records(folder)[:2]
    sdpa = "ops.aten::scaled_dot_product_attention"
    assert eager.proof[sdpa] == 0
    assert float(fused.proof[sdpa]) > 0
    if workload == "generate":
        assert eager.proof["kv_tokens_cached"] == 12, "prompt 8 + output 5 - 1"
        assert float(fused.proof["static_cache_steps"]) > 0


def test_sample_lines_are_the_records_samples(run: tuple[str, Path]) -> None:
    _, folder = run
    lines = read_samples(folder)
    for record in read_records(folder):
        mine = [s for s in lines if (s.arm, s.launch) == (record.arm.name, record.launch)]
        for phase, samples in record.samples_ns.items():
            assert [s.samples_ns[phase] for s in mine] == samples


def test_phases_add_up_to_the_step_within_the_time_between_marks(run: tuple[str, Path]) -> None:
    _, folder = run
    for record in read_records(folder):
        for n, step in enumerate(record.samples_ns["step"]):
            parts = math.fsum(record.samples_ns[p][n] for p in record.phases)
            assert 0.5 * step < parts <= step + 1


def test_generation_has_one_lap_for_every_token_after_the_first() -> None:
    """Laps are kept where a sample is one step, so the step must be longer than the clock's target."""
    config = tiny(["eager", "eager"], "generate", benchmark_steps=2)
    config.params.update({"gen_output_length": [12]})
    for record in measured(config):
        assert record.method
        assert record.method.inner == 1
        assert [len(laps) for laps in record.laps_ns["decode"]] == [11] * 2


def test_dtypes_make_cases_of_their_own() -> None:
    records = measured(tiny(["eager", "sdpa"], dtype=["fp32", "bf16"], benchmark_steps=2))
    assert [(r.case.dtype, r.status) for r in records] == [
        (d, Status.OK) for d in ("fp32", "fp32", "bf16", "bf16")
    ]
    oracles = {r.case.dtype: r.gate.oracle for r in records if r.gate}
    assert set(oracles.values()) == {"reference implementation in fp64"}


def test_optimizer_is_a_further_phase_and_leaves_the_weights_shared() -> None:
    config = tiny(["eager", "sdpa"], "train")
    config.params["optimizer"] = ["adamw"]
    records = measured(config)
    assert [r.status for r in records] == [Status.OK] * 2
    assert records[0].phases == ["forward", "backward", "optimizer", "zero_grad"]


# Claims


def boasting(claim: Claim) -> Variant:
    """Eager, with a claim of one's own."""
    honest: Variant = plugins.find("variants", "eager")
    return dataclasses.replace(honest, summary="a boast", claims=lambda _case, _options: (claim,))


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (
            Claim(
                counter="ops.aten::_scaled_dot_product_cudnn_attention",
                comparison=">",
                value=0,
                why="it is fused",
            ),
            "it is fused: ops.aten::_scaled_dot_product_cudnn_attention is 0, expected > 0",
        ),
        (
            Claim(counter="cuda_graph_replays", comparison=">", value=0, why="graphs are replayed"),
            "graphs are replayed: cuda_graph_replays is 0, expected > 0",
        ),
        (
            Claim(counter="offloaded_bytes", comparison=">", value=0, why="it offloads"),
            "it offloads: offloaded_bytes is not counted, expected > 0",
        ),
    ],
)
def test_false_claim_is_disproved(monkeypatch: pytest.MonkeyPatch, claim: Claim, said: str) -> None:
    real = plugins.find_variant
    monkeypatch.setattr(
        plugins, "find_variant", lambda target, **_: boasting(claim) if target == "sdpa" else real(target)
    )
    records = measured(tiny(["eager", "sdpa"]))
    assert [(r.status, r.reason) for r in records] == [
        (Status.PARTNER_FAILED, ""),
        (Status.PROOF_FAILED, said),
    ]


# Builders


BUILDERS = """
import torch
from torch import nn


class Wordy(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids):
        return self.head(self.table(input_ids).cumsum(1).tanh())


def wordy():
    print("building, with a word on standard output", flush=True)
    return Wordy()


def raises(case):
    raise ValueError("no weights here")


def returns_text():
    return "a model"


class Headless(Wordy):
    def forward(self, input_ids):
        return self.table(input_ids)[..., 0]


def headless():
    return Headless()


def wants_images():
    return nn.Linear(4, 4)
"""


@pytest.fixture
def builders(tmp_path: Path) -> str:
    file = tmp_path / "builders_of_mine.py"
    file.write_text(BUILDERS)
    return str(file)


@pytest.mark.parametrize("workload", ["train", "infer", "generate"])
def test_users_module_is_compared_with_itself(builders: str, workload: str) -> None:
    records = measured(tiny([f"{builders}:wordy"] * 2, workload))
    assert [r.status for r in records] == [Status.OK] * 2
    assert records[1].gate
    assert records[1].gate.oracle == f"{builders}:wordy in fp64"


@pytest.mark.parametrize(
    ("builder", "said"),
    [
        ("raises", "raised; expected an nn.Module; got ValueError: no weights here"),
        ("returns_text", "returned str; expected an nn.Module"),
        ("headless", "returned something else; expected logits (batch, length, vocabulary)"),
        ("wants_images", "cannot be called; expected forward(input_ids, ...); got forward(input)"),
        ("wrody", "has no 'wrody'; expected a builder; did you mean 'wordy'?"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_wrong_builder_is_bad_usage_in_one_line(
    builders: str, tmp_path: Path, builder: str, said: str, first: bool
) -> None:
    arms = [f"{builders}:wordy", f"{builders}:{builder}"]
    with pytest.raises(UsageError) as caught:
        measured(tiny(arms[::-1] if first else arms), tmp_path / "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# The runner


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unavailable("needs CUDA", "get one"), "unavailable"),
        (UsageError("wrong"), "usage"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "out_of_memory"),
        (ValueError("two\nlines"), "error"),
    ],
)
def test_exception_becomes_the_status_that_it_stands_for(error: Exception, status: str) -> None:
    found = as_failure(error, "mine")
    assert found.status == status
    assert "\n" not in found.reason


class Steps:
    """A trial whose steps sleep as long as a list says, one entry a step; below zero they raise."""

    phases = ("forward",)
    work: Mapping[str, Any] = {}

    def __init__(self, slow_s: list[float]) -> None:
        self._slow_s = slow_s

    def step(self, mark: Callable[[str], None]) -> None:
        if self._slow_s:  # to sleep for no time would still give the processor away
            time.sleep(self._slow_s.pop(0))
        mark("forward")

    def reset(self) -> None:
        """Nothing to put back."""

    def proof(self) -> dict[str, int]:
        return {"calls": 1}


class Nothing:
    """A system that only opens and closes."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def __enter__(self) -> "Nothing":
        self._log.append("entered")
        return self

    def __exit__(self, *_: object) -> None:
        self._log.append("left")


def runner(log: list[str], slow_s: list[float]) -> Runner:
    def build(_case: Case, _options: Options) -> Any:
        return Nothing(log)

    workload: Any = SimpleNamespace(prepare=lambda _system, _case: Steps(slow_s), probes={})
    opening = Open(case=Case(workload="w"), arm=Arm(name="mine", target="mine"), scratch="", weights="own")
    return Runner(opening, Variant(summary="nothing", build=build, weights="none", opaque=True), workload)


def ask(to: Runner, request: Request) -> Reply:
    return to.handle(request)


def test_runner_holds_its_system_from_build_to_close() -> None:
    log: list[str] = []
    mine = runner(log, [])
    built = ask(mine, Build())
    assert isinstance(built, Built)
    assert built.cold.first_call_s >= 0
    assert log == ["entered"]
    mine.close()
    mine.close()
    assert log == ["entered", "left"]


def test_first_call_is_cold_start_and_no_sample() -> None:
    mine = runner([], [0.05])
    built = ask(mine, Build())
    assert isinstance(built, Built)
    assert built.cold.first_call_s >= 0.05


def test_arm_that_leaves_fails_its_case_and_not_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = runner([], [])
    monkeypatch.setattr(Steps, "step", lambda _self, _mark: sys.exit(0))
    assert ask(mine, Build()) == Failure(status="error", reason="'mine' raised SystemExit: 0")


def test_steps_that_were_slow_when_counted_are_counted_again() -> None:
    """Build and the memory pass take two steps; two more slow ones mislead the first calibration."""
    mine = runner([], [0.0, 0.0, 0.004, 0.004])
    ask(mine, Build())
    ask(mine, MeasureMemory())
    ready = ask(mine, Warm(floor=1))
    assert isinstance(ready, Ready)
    assert ready.inner > 10
    mine.close()


def test_builds_and_turns_begin_where_they_are_told_and_say_where_they_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved: list[int | None] = []
    monkeypatch.setattr(processor, "move", moved.append)
    monkeypatch.setattr(processor, "current", lambda: 7)
    mine = runner([], [])
    built = ask(mine, Build(processor=1))
    ask(mine, Warm(floor=1))
    turns = [ask(mine, Settle(processor=2)), ask(mine, Sample(processor=3)), ask(mine, Sample())]
    assert moved == [1, 2, 3, None]
    for answer in (built, *turns):
        assert isinstance(answer, Built | Sampled)
        assert answer.processor == 7


@pytest.mark.parametrize(
    ("answers", "restless"),
    [([True] * 5, False), ([False, False, True, False, False], False), ([False] * 3, True)],
)
def test_a_turn_ends_at_rest_and_an_arm_that_never_does_is_told(
    answers: list[bool], restless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(answers)
    monkeypatch.setattr(processor, "rest", lambda: left.pop(0))
    mine = runner([], [])
    ask(mine, Build())
    ask(mine, Warm(floor=1))
    for turn in (Settle(), Sample(), Sample(), Sample(rest=False), Sample(), Sample()):
        assert isinstance(ask(mine, turn), Sampled)
    assert left == []
    done = ask(mine, Finish(profile=False))
    assert isinstance(done, Finished)
    assert done.restless == restless


def test_page_faults_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([1000, 1020, 1020, 1050, 1050, 5050])
    mine = runner([], [])
    ask(mine, Build())
    ready = ask(mine, Warm(floor=1))
    assert isinstance(ready, Ready)
    monkeypatch.setattr(processor, "page_faults", lambda: next(counts) * (1 + ready.inner))
    for turn in (Settle(), Sample(), Sample(), Sample()):
        ask(mine, turn)
    done = ask(mine, Finish(profile=False))
    assert isinstance(done, Finished)
    assert done.page_faults == 30, "the median, and none of what nobody keeps"


def test_exception_in_a_sample_is_a_reply_and_the_runner_lives_on() -> None:
    slow_s: list[float] = []
    mine = runner([], slow_s)
    ask(mine, Build())
    ask(mine, Warm(floor=0))
    slow_s.append(-1.0)
    broken = ask(mine, Sample())
    assert isinstance(broken, Failure)
    assert (broken.status, broken.reason) == (
        "error",
        "'mine' raised ValueError: sleep length must be non-negative",
    )
    assert isinstance(ask(mine, Sample()), Sampled)
    done = ask(mine, Finish(profile=False))
    assert isinstance(done, Finished)
    assert done.proof == {"calls": 1}


def test_counters_are_those_of_the_timed_steps_and_not_of_the_questions_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [0]
    mine = runner([], [])
    monkeypatch.setattr(mine.workload, "functions", (), raising=False)
    monkeypatch.setattr(Steps, "step", lambda _self, _mark: steps.append(0))
    monkeypatch.setattr(Steps, "proof", lambda _self: {"steps": len(steps)})
    ask(mine, Build())
    ask(mine, Warm(floor=1))
    ask(mine, Sample())
    timed = len(steps)

    def question(_trial: Any, _agreed: Any) -> None:
        steps.append(0)
        raise MemoryError("no room for an answer")

    monkeypatch.setattr(worker.audit, "remembered", lambda *_, **__: None)
    monkeypatch.setattr(worker.audit, "confused", question)
    done = ask(mine, Finish(profile=True))
    assert isinstance(done, Finished)
    assert len(steps) == timed + 1
    assert (done.void, done.proof) == ("", {"steps": timed, "questions_not_asked": "out of memory"})


def test_graph_that_is_compiled_while_timed_voids_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, graphs = runner([], []), [3]
    monkeypatch.setattr(worker, "compiled_graphs", lambda: graphs[0])
    ask(mine, Build())
    ask(mine, Warm(floor=1))
    ask(mine, Sample())
    done = ask(mine, Finish(profile=False))
    assert isinstance(done, Finished)
    assert done.void == ""
    graphs[0] += 1
    done = ask(mine, Finish(profile=False))
    assert isinstance(done, Finished)
    assert done.void.startswith("1 compilation(s) inside the timed region")


def test_opening_resolves_names_before_anything_is_built() -> None:
    def opening(workload: str, target: str, device: str = "cpu") -> Open:
        case = Case(workload=workload, device=device)
        return Open(case=case, arm=Arm(name=target, target=target), scratch="", weights="shared")

    assert isinstance(open_runner(opening("infer", "eager")), Runner)
    with pytest.raises(UsageError, match="did you mean 'infer'"):
        open_runner(opening("infre", "eager"))
    with pytest.raises(UsageError, match="did you mean 'eager'"):
        open_runner(opening("infer", "egaer"))


def test_a_requirement_that_is_not_met_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    eager = plugins.find("variants", "eager")
    for name, said in (("cuda", "needs a CUDA device"), ("no_such_module_here", "needs no_such_module_here")):
        monkeypatch.setattr(
            plugins, "find_variant", lambda _target, n=name, **_: replace(eager, requires=(n,))
        )
        case = Case(workload="infer", params={"shape": "tiny", "batch_size": 1, "seq_length": 8})
        opening = Open(case=case, arm=Arm(name="x", target="eager"), scratch=str(tmp_path), weights="shared")
        with pytest.raises(Unavailable, match=said):
            open_runner(opening)


@pytest.mark.parametrize("workload", ["infer", "train", "generate"])
def test_arm_that_compiles_nothing_does_not_import_the_compiler(workload: str, tmp_path: Path) -> None:
    case = make_plan(tiny(["eager", "eager"], workload)).cases[0]
    opening = Open(case=case, arm=Arm(name="a", target="eager"), scratch=str(tmp_path), weights="own")
    (tmp_path / "opening").write_bytes(msgspec.msgpack.encode(opening))
    code = (
        "import sys; from pathlib import Path; import msgspec; from assay.wire import Open\n"
        "from assay.worker import open_runner\n"
        "runner = open_runner(msgspec.msgpack.decode(Path(sys.argv[1]).read_bytes(), type=Open))\n"
        "runner.build(); runner.measure_memory(); runner.warm(1); runner.turn()\n"
        "assert runner.finish(profile=True).operators\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "opening")], check=True)


def test_modules_of_a_stock_model_are_imported_with_the_worker(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    case = make_plan(tiny(["eager", "eager"], "train")).cases[0]
    opening = Open(case=case, arm=Arm(name="a", target="hf"), scratch=str(tmp_path), weights="own")
    (tmp_path / "opening").write_bytes(msgspec.msgpack.encode(opening))
    code = (
        "import sys; from pathlib import Path; import msgspec; from assay.wire import Open\n"
        "from assay.worker import open_runner\n"
        "open_runner(msgspec.msgpack.decode(Path(sys.argv[1]).read_bytes(), type=Open)).import_ahead()\n"
        "assert any(name.startswith('transformers.models.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "opening")], check=True)


@pytest.mark.parametrize(("options", "wanted"), [({"base": "hf"}, True), ({}, False)])
def test_policy_imports_what_its_base_would(
    options: Options, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_plan(tiny(["eager", "eager"], "train")).cases[0]
    asked: dict[str, list[str]] = {"hf": [], "activations": []}
    for target, names in asked.items():
        arm = Arm(name="a", target=target, options=options if target == "activations" else {})
        runner = open_runner(Open(case=case, arm=arm, scratch=str(tmp_path), weights="own"))
        with monkeypatch.context() as patched:
            patched.setattr(importlib, "import_module", names.append)
            runner.import_ahead()
    ours, theirs = asked["hf"]
    assert theirs.startswith("transformers.models.")
    assert asked["activations"] == ["assay.systems.activations.language", ours, *[theirs][: int(wanted)]]


def test_module_that_is_missing_is_left_to_the_build(tmp_path: Path) -> None:
    case = make_plan(tiny(["eager", "eager"], "train")).cases[0]
    opening = Open(case=case, arm=Arm(name="a", target="eager"), scratch=str(tmp_path), weights="own")
    runner = open_runner(opening)
    asked: list[Case] = []

    def imports(case: Case, _options: Options) -> list[str]:
        asked.append(case)
        return ["assay.no_such_module"]

    runner.variant = dataclasses.replace(runner.variant, imports=imports)
    runner.import_ahead()
    assert asked == [case]

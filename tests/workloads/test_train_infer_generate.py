"""The three workloads on the tiny decoder: what a step does, and that outputs are what the oracle expects."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from assay import plugins
from assay.contracts import Case, LanguageModel
from assay.gate import judge_outputs
from assay.workloads._language import Inputs, sequences
from tests.sessions import SIZES

STREAM = 1


def case(workload: str, **more: Any) -> Case:
    known = plugins.find("workloads", workload).params
    params = {n: SIZES.get(n, o.default) for n, o in known.items()} | more
    return Case(workload=workload, params=params)


@pytest.fixture
def eager() -> Iterator[LanguageModel]:
    variant = plugins.find("variants", "eager")
    with variant.build(case("infer"), {}) as system:
        yield system


@pytest.fixture
def oracle() -> Iterator[Any]:
    """The reference implementation, which must take every workload too."""
    with plugins.find("variants", "eager").oracle(
        Case(workload="infer", params=dict(SIZES), dtype="fp64")
    ) as found:
        yield found


@pytest.mark.parametrize("name", ["train", "infer", "generate"])
def test_outputs_of_the_timed_code_are_what_the_oracle_expects(
    eager: LanguageModel, oracle: Any, name: str
) -> None:
    workload = plugins.find("workloads", name)
    outputs = workload.prepare(eager, case(name)).outputs(STREAM)
    expected = workload.expected(oracle, case(name), STREAM)
    figures = judge_outputs("meaning", "before", outputs, expected, dtype="fp32")
    assert [f for f in figures if not f.passed] == []
    other = workload.expected(oracle, case(name), STREAM + 1)
    assert not all(f.passed for f in judge_outputs("meaning", "before", outputs, other, dtype="fp32"))


@pytest.mark.parametrize(
    ("name", "more", "marks"),
    [
        ("train", {}, ["forward", "backward", "zero_grad"]),
        ("train", {"optimizer": "sgd"}, ["forward", "backward", "optimizer", "zero_grad"]),
        ("infer", {}, ["forward"]),
        ("generate", {}, ["prefill", *["decode"] * 4]),
    ],
)
def test_step_marks_its_phases_in_order(
    eager: LanguageModel, name: str, more: dict[str, Any], marks: list[str]
) -> None:
    trial = plugins.find("workloads", name).prepare(eager, case(name, **more))
    seen: list[str] = []
    trial.reset()
    trial.step(seen.append)
    assert seen == marks
    assert list(dict.fromkeys(seen)) == list(trial.phases)
    assert set(trial.work) >= {"step", *trial.phases} - {"zero_grad", "optimizer"}


def test_training_step_leaves_no_gradient_and_the_weights_as_they_were(eager: LanguageModel) -> None:
    before = {n: t.clone() for n, t in eager.state().items()}
    trial = plugins.find("workloads", "train").prepare(eager, case("train", optimizer="adamw"))
    trial.step(lambda _phase: None)
    assert all(g is None for g in eager.gradients().values())
    assert all(torch.equal(t, before[n]) for n, t in eager.state().items())


def test_training_compares_the_loss_and_the_gradient_of_every_parameter(eager: LanguageModel) -> None:
    outputs = plugins.find("workloads", "train").prepare(eager, case("train")).outputs(STREAM)
    assert set(outputs) == {"loss", *(f"grad:{n}" for n in eager.gradients())}
    assert outputs["loss"].shape == ()
    assert all(float(t.norm()) > 0 for t in outputs.values())


def test_timed_steps_rotate_through_inputs_that_the_gate_does_not_use(
    eager: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    forward = eager.forward

    def watched(ids_BT: Tensor) -> Tensor:
        seen.append(tuple(ids_BT.flatten().tolist()))
        return forward(ids_BT)

    monkeypatch.setattr(eager, "forward", watched)
    trial = plugins.find("workloads", "infer").prepare(eager, case("infer"))
    for _ in range(8):
        trial.step(lambda _phase: None)
    timed = list(seen)
    assert len(set(timed)) == 4
    assert timed[:4] == timed[4:]
    trial.outputs(STREAM)
    assert seen[-1] not in timed


@pytest.mark.parametrize("name", ["train", "infer", "generate"])
def test_every_sample_has_new_inputs_in_the_tensors_that_the_gate_uses_too(
    eager: LanguageModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trial: Any = plugins.find("workloads", name).prepare(eager, case(name))
    inputs, held, seen = trial._inputs, trial._inputs._held[:], set[tuple[int, ...]]()
    for steps in (1, 1, 3, 4, 9, 1):
        trial.reset()
        used = [next(inputs) for _ in range(steps)]
        assert {id(ids) for ids in used} <= {id(ids) for ids in held}
        now = {tuple(ids.flatten().tolist()) for ids in used}
        assert len(now) == min(steps, len(held))
        assert not now & seen
        seen |= now
    drawn: list[Tensor] = []
    monkeypatch.setattr(Inputs, "holding", lambda self, ids: drawn.append(held[0].copy_(ids)) or drawn[-1])
    assert "input:ids" not in trial.outputs(STREAM)
    assert drawn[0] is held[0]


def test_generation_is_greedy_and_its_logits_are_those_of_given_tokens(eager: LanguageModel) -> None:
    trial = plugins.find("workloads", "generate").prepare(eager, case("generate"))
    outputs = trial.outputs(STREAM)
    assert outputs["logits"].shape == (2, 5, 96)
    assert outputs["tokens"].shape == (2, 5)
    assert torch.equal(outputs["tokens"][:, 0], outputs["logits"][:, 0].argmax(-1))


def test_tokens_are_not_compared_where_rounding_may_decide_them() -> None:
    low = Case(workload="generate", params=case("generate").params, dtype="bf16")
    with plugins.find("variants", "eager").build(low, {}) as system:
        workload = plugins.find("workloads", "generate")
        assert set(workload.prepare(system, low).outputs(STREAM)) == {"logits"}
        assert set(workload.expected(system, low, STREAM)) == {"logits"}


@pytest.mark.parametrize("name", ["train", "infer", "generate"])
def test_smaller_case_ends_and_runs_the_same_workload(name: str) -> None:
    workload = plugins.find("workloads", name)
    sizes: list[Case] = []
    at: Case | None = case(name, **{n: 4096 for n in SIZES if n != "shape" and n in workload.params})
    while at is not None:
        sizes.append(at)
        at = workload.smaller(at)
    assert len(sizes) > 3
    assert {c.workload for c in sizes} == {name}
    workload.check(sizes[-1])


@pytest.mark.parametrize("name", ["train", "infer", "generate", "call"])
def test_every_parameter_says_what_it_is(name: str) -> None:
    workload = plugins.find("workloads", name)
    assert all(
        option.help and option.default not in option.choices[1:] for option in workload.params.values()
    )
    assert workload.summary
    assert set(workload.probes) == ({"causality", "position"} if name != "call" else set())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # a prototype, says torch
def test_inputs_are_renewed_without_a_wait_for_the_device() -> None:
    cuda = Case(workload="infer", params={"batch_size": 2, "seq_length": 64}, device="cuda")
    inputs = Inputs(cuda, lambda case, stream: sequences(case, 96, stream))
    used = [next(inputs) for _ in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.renew()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for n, ids_BT in enumerate(used):
        assert torch.equal(ids_BT, sequences(cuda, 96, 104 + n))

"""Every path once on a GPU at the seed's shape, against the reference in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from assay.contracts import Case, Claim, LanguageModel, Scalar
from assay.plugins import find
from assay.systems.decoder.build import load
from assay.systems.decoder.generator import Generator
from assay.systems.decoder.reference import ReferenceLM
from assay.systems.decoder.state import named_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),  # torch's own, on compiling
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),  # full float32 is what we asked for
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # torch primes its own pool
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # the first call of a process
]

# Relative error of the logits, of a 16-bit or float32 model of four layers against float64.
LIMITS = {"fp32": 1e-5, "bf16": 3e-2, "bf16-autocast": 3e-2}
PROMPT, TOKENS = 24, 8
BUILDS = [
    ("eager", {}),
    ("sdpa", {}),
    ("compile", {}),
    ("compile", {"compile_mode": "reduce-overhead"}),
    ("fused", {}),
    ("fused", {"compile": False}),
    ("fused", {"merged": False}),
    ("cudnn", {}),
    ("flash", {}),
    ("liger", {}),
    ("hf", {}),
    ("hf-liger", {}),
]


def _case(dtype: str) -> Case:
    lengths = {"gen_batch_size": 2, "gen_input_length": PROMPT, "gen_output_length": TOKENS + 1}
    return Case(workload="generate", params={"shape": "seed", **lengths}, dtype=dtype, device="cuda")


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("name", "options"), BUILDS)
def test_every_build_does_the_references_work(name: str, options: dict[str, str | bool], dtype: str) -> None:
    variant = find("variants", name)
    oracle: LanguageModel = variant.oracle(_case("fp64"))
    system: LanguageModel = variant.build(_case(dtype), options)
    system.load(oracle.state())
    ids_BT = torch.randint(0, oracle.vocab_size, (2, PROMPT + TOKENS), device="cuda")
    truth_BTV = oracle.forward(ids_BT)
    for _ in range(2):  # the second time a graph is replayed
        assert _error(system.forward(ids_BT).clone(), truth_BTV) < LIMITS[dtype]
    _check_training(system, oracle, ids_BT, LIMITS[dtype])
    for rows in (2, 1):  # one row has kernels of its own
        _check_decoding(system, ids_BT[:rows], truth_BTV[:rows], LIMITS[dtype])
    disproved = [c for c in variant.claims(_case(dtype), options) if not _holds(c, system.proof())]
    assert not disproved


def _check_decoding(
    system: LanguageModel, ids_BT: torch.Tensor, truth_BTV: torch.Tensor, limit: float
) -> None:
    decoding = system.decoding(len(ids_BT), PROMPT + TOKENS)
    for _ in range(3):  # a graph is captured at the second prompt and replayed from then on
        assert _error(decoding.prefill(ids_BT[:, :PROMPT])[0], truth_BTV[:, PROMPT - 1]) < limit
        for t in range(PROMPT, PROMPT + TOKENS):
            logits_BV, token_B1 = decoding.advance(ids_BT[:, t : t + 1])
            assert _error(logits_BV, truth_BTV[:, t]) < limit
            assert token_B1.equal(logits_BV.argmax(-1, keepdim=True))


def _check_training(system: LanguageModel, oracle: LanguageModel, ids_BT: torch.Tensor, limit: float) -> None:
    oracle.zero_grad()
    expected = oracle.loss(ids_BT)
    expected.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    loss = system.loss(ids_BT)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    assert abs(loss.item() - expected.item()) < limit * expected.item()
    truth = oracle.gradients()
    for name, gradient in system.gradients().items():
        expected_gradient = truth[name]
        assert gradient is not None
        assert expected_gradient is not None
        assert _error(gradient, expected_gradient) < 5 * limit, name
    system.optimizer_step("adamw")
    system.zero_grad()


def _holds(claim: Claim, proof: Mapping[str, Scalar]) -> bool:
    """Claims about operators need a profile, which the worker makes; the others must hold here."""
    counter, comparison, value = claim.counter, claim.comparison, claim.value
    if counter.startswith("ops."):
        return True
    got = float(proof[counter])
    return bool({"==": got == value, ">": got > value, ">=": got >= value}[comparison])


@pytest.mark.parametrize(("dtype", "tie"), [("fp32", 1e-3), ("bf16", 0.2), ("bf16-autocast", 0.2)])
@pytest.mark.parametrize("parts", ["sdpa", "fused"])
def test_generator_continues_prompts_of_any_lengths(parts: str, dtype: str, tie: float) -> None:
    """Each token is the oracle's after the same prefix, or as good as; graphs and kernels see the padding."""
    model = load("seed", parts, dtype=dtype, device="cuda")
    oracle = ReferenceLM(model.config, named_state(model), dtype="fp64", device="cuda")
    generator = Generator(model, dtype=dtype)
    prompts = [[7] * 3 + [n] for n in range(4)] + [[*range(90)], [5], [*range(400)]]
    made = generator.generate(prompts, 12)
    for prompt, row in zip(prompts, made, strict=True):
        logits_BTV = oracle.forward(torch.tensor([prompt + row[:-1]], device="cuda"))
        logits_TV = logits_BTV[0, len(prompt) - 1 :]
        chosen_T = logits_TV.gather(1, torch.tensor(row, device="cuda")[:, None])[:, 0]
        assert (logits_TV.amax(-1) - chosen_T).max() < tie
    assert generator.generate(prompts, 12) == made
    drawn = generator.generate(prompts, 12, temperature=1.0, seed=3)
    assert drawn != made
    assert generator.generate(prompts, 12, temperature=1.0, seed=3) == drawn
    stream = list(generator.stream(prompts, 12, temperature=1.0, seed=3))
    assert torch.stack(stream, dim=1).tolist() == drawn
    whole = [[*range(96)]] * 2  # fills its bucket: the prompt itself is captured at the second call
    assert generator.generate(whole, 5) == generator.generate(whole, 5)

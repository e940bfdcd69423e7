"""Generation: prefill a prompt, then decode greedily, one token after another over a key-value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from assay.contracts import Case, LanguageModel, Mark, Option, Scalar, Work
from assay.workloads._functions import overwritten, plain
from assay.workloads._language import PROBES, SHAPE, Inputs, halve, token_ids, whole

if TYPE_CHECKING:
    from torch import Tensor

GREEDY_STEPS = 16  # tokens that must agree with the oracle's greedy ones, in float32


def _sizes(case: Case) -> tuple[int, int, int]:
    return (
        whole(case, "gen_batch_size"),
        whole(case, "gen_input_length"),
        whole(case, "gen_output_length"),
    )


class GenerateTrial:
    """Phases: `prefill` ends with the first token; each lap of `decode` is one further token."""

    phases = ("prefill", "decode")

    def __init__(self, system: LanguageModel, case: Case) -> None:
        import torch

        self._torch = torch
        self._system, self._case = system, case
        batch, prompt, output = _sizes(case)
        self._inputs = Inputs(case, lambda case, stream: self._prompts(case, stream, prompt))
        self._decoding = system.decoding(batch, prompt + output)
        self._tokens_BN = torch.zeros(batch, output, dtype=torch.int64, device=case.device)
        self.work: Mapping[str, Work] = system.work("generate", case.params)

    def _prompts(self, case: Case, stream: int, length: int) -> Tensor:
        return token_ids(case, self._system.vocab_size, whole(case, "gen_batch_size"), length, stream)

    def step(self, mark: Mark) -> None:
        """Greedy generation of the asked number of tokens; nothing waits for the device."""
        with self._torch.no_grad():
            self._generate(next(self._inputs), self._tokens_BN, mark)

    def _generate(self, ids_BT: Tensor, tokens_BN: Tensor, mark: Mark) -> None:
        _, token_B1 = self._decoding.prefill(ids_BT)
        tokens_BN[:, :1].copy_(token_B1)
        mark("prefill")
        for n in range(1, tokens_BN.shape[1]):
            _, token_B1 = self._decoding.advance(token_B1)
            tokens_BN[:, n : n + 1].copy_(token_B1)
            mark("decode")

    def reset(self) -> None:
        """Prefill starts its cache anew; the next sample's prompts are new."""
        self._inputs.renew()

    def outputs(self, seed: int) -> Mapping[str, Tensor]:
        """`logits` (B, N, V) of given tokens fed one by one; from float32 up greedy `tokens` too."""
        _, prompt, output = _sizes(self._case)
        ids_BT = self._prompts(self._case, seed, prompt + output - 1)
        with self._torch.no_grad():
            prompt_BT = self._inputs.holding(ids_BT[:, :prompt])
            logits = [plain(self._decoding.prefill(prompt_BT)[0]).clone()]
            for t in range(prompt, prompt + output - 1):
                logits.append(plain(self._decoding.advance(ids_BT[:, t : t + 1])[0]).clone())  # noqa: PERF401 (order)
            found: dict[str, Tensor] = {"logits": self._torch.stack(logits, dim=1)}
            if self._case.dtype in ("fp32", "fp64"):
                tokens_BN = self._tokens_BN[:, :GREEDY_STEPS].clone()
                self._generate(prompt_BT, tokens_BN, lambda _: None)
                found["tokens"] = tokens_BN
        return found | overwritten({"ids": prompt_BT}, {"ids": ids_BT[:, :prompt]})

    def proof(self) -> Mapping[str, Scalar]:
        """The system's own counters."""
        return self._system.proof()


class Generate:
    """The gate holds every incremental step against the oracle's one full forward pass."""

    summary = "prefill and greedy decoding over a key-value cache"
    params: Mapping[str, Option] = {
        "shape": SHAPE,
        "gen_batch_size": Option(default=1, help="sequences generated at once", minimum=1),
        "gen_input_length": Option(default=128, help="prompt tokens", minimum=1),
        "gen_output_length": Option(default=128, help="tokens to generate", minimum=2),
    }
    probes = PROBES
    functions = False

    def sizes(self, given: Mapping[str, Sequence[Scalar]]) -> Mapping[str, Option]:  # noqa: ARG002
        """All are in `params`."""
        return {}

    def check(self, case: Case) -> None:
        """Everything is in the options."""

    def smaller(self, case: Case) -> Case | None:
        """A shorter output, then a shorter prompt, then fewer sequences."""
        return halve(case, {"gen_output_length": 8, "gen_input_length": 8, "gen_batch_size": 2})

    def prepare(self, system: LanguageModel, case: Case) -> GenerateTrial:
        """Prompts are (gen_batch_size, gen_input_length) random token ids."""
        return GenerateTrial(system, case)

    def expected(self, system: LanguageModel, case: Case, seed: int) -> Mapping[str, Tensor]:
        """One full forward pass gives every step's logits; greedy tokens by full passes again and again."""
        import torch

        batch, prompt, output = _sizes(case)
        ids_BT = token_ids(case, system.vocab_size, batch, prompt + output - 1, seed)
        with torch.no_grad():
            found = {"logits": system.forward(ids_BT)[:, prompt - 1 :].clone()}
            if case.dtype in ("fp32", "fp64"):
                grown_BT = ids_BT[:, :prompt]
                for _ in range(min(GREEDY_STEPS, output)):
                    next_B1 = system.forward(grown_BT)[:, -1].argmax(-1, keepdim=True)
                    grown_BT = torch.cat([grown_BT, next_B1], dim=1)
                found["tokens"] = grown_BT[:, prompt:]
        return found


WORKLOAD = Generate()

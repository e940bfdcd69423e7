"""The proofs: the claimed thing ran, on the shared weights, and answered the question that was asked.

Pure functions over tensors and counters; torch is imported where it is used.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from assay.contracts import Claim
from assay.gate import is_real_or_complex
from assay.measure.record import Scalar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["confused", "prove", "same_state", "sampled"]

_COMPARE = {"==": operator.eq, ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
SAMPLED = 4096  # entries of each quantity
TELLING = 1e-3  # answers to two questions that are nearer, as a share of their size, tell nothing


def prove(
    claims: Sequence[Claim], counters: Mapping[str, Scalar], before: Mapping[str, Scalar] | None = None
) -> list[str]:
    """The claims that the counters do not bear out, one line each. A missing counter proves nothing.

    `before` holds the counters as they stood at the first sample, for the claims about the timed region.
    """
    failures = []
    for claim in claims:
        got = counters.get(claim.counter)
        earlier = (before or {}).get(claim.counter, 0) if claim.timed else 0
        if not isinstance(got, str) and got is not None and not isinstance(earlier, str):
            got -= earlier
        if isinstance(got, str) or got is None or not _COMPARE[claim.comparison](got, claim.value):
            seen = "not counted" if got is None else got
            when = " while timed" if claim.timed else ""
            failure = (
                f"{claim.why}: {claim.counter} is {seen}{when}, expected {claim.comparison} {claim.value:g}"
            )
            more = [f"{name} is {counters[name]}" for name in claim.told if name in counters]
            failures.append(failure + (f" ({', '.join(more)})" if more else ""))
    return failures


def same_state(own: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> str:
    """Why two states are not the same weights, or an empty string. Compares names, shapes and values."""
    import torch

    for name, tensor in canonical.items():
        mine = own.get(name)
        if mine is None:
            return f"parameter '{name}' is missing"
        if mine.shape != tensor.shape:
            return f"parameter '{name}' has shape {tuple(mine.shape)}, expected {tuple(tensor.shape)}"
        if not torch.equal(mine.to(tensor.dtype), tensor.to(mine.device)):
            return f"parameter '{name}' differs from the shared weights"
    extra = [name for name in own if name not in canonical]
    return f"parameter '{extra[0]}' is not in the shared weights" if extra else ""


def sampled(outputs: Mapping[str, Tensor]) -> Tensor:
    """Some entries of every quantity of numbers, each over their norm, in one vector on the host."""
    import torch

    found = [torch.zeros(0, dtype=torch.float64)]
    for t in outputs.values():
        if is_real_or_complex(t) and t.numel():
            flat = t.detach().reshape(-1)[:: max(1, t.numel() // SAMPLED)].cpu()
            some = torch.view_as_real(flat.to(torch.complex128)).reshape(-1).nan_to_num()
            found.append(some / some.norm().clamp_min(1e-300))
    return torch.cat(found)


def confused(answers: Sequence[tuple[int, Tensor]]) -> bool:
    """Whether two of these samples of answers differ that are to the same question, of two.

    Rounding never takes an answer half the way to the other's, unless the two can hardly be told apart.
    """
    if len({answer.shape for _, answer in answers}) > 1:
        return False
    farthest = {True: 0.0, False: 0.0}  # by whether both are to the same question
    for (m, a), (n, b) in combinations(answers, 2):
        farthest[m == n] = max(farthest[m == n], float((a - b).norm()))
    apart = farthest[False]
    return apart > TELLING * float(answers[0][1].norm()) and farthest[True] > apart / 2

"""What the language-model workloads share: the same tokens everywhere, smaller cases, and probes."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.gate import probe_figure
from assay.measure.record import Case
from assay.workloads._language import PROBES, halve, sequences, smaller_sequences, token_ids

CASE = Case(workload="infer", params={"batch_size": 3, "seq_length": 7})


def test_tokens_are_the_same_on_every_machine_and_version() -> None:
    """Numbers written down once: a change would make records of different versions incomparable."""
    assert token_ids(CASE, 1000, 2, 5, 1).tolist() == [[522, 889, 992, 557, 302], [800, 228, 956, 891, 58]]


@given(seed=st.integers(0, 2**32), vocab_size=st.integers(1, 10**6), stream=st.integers(0, 200))
def test_tokens_stay_inside_the_vocabulary_and_repeat_with_seed_and_stream(
    seed: int, vocab_size: int, stream: int
) -> None:
    case = Case(workload="infer", seed=seed)
    ids_BT = token_ids(case, vocab_size, 2, 9, stream)
    assert (ids_BT.shape, ids_BT.dtype) == ((2, 9), torch.int64)
    assert 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < vocab_size
    assert torch.equal(ids_BT, token_ids(case, vocab_size, 2, 9, stream))


def test_streams_and_seeds_differ() -> None:
    drawn = [token_ids(Case(workload="w", seed=s), 10**6, 1, 8, stream) for s in (0, 1) for stream in (1, 2)]
    assert len({tuple(ids[0].tolist()) for ids in drawn}) == 4


def test_sequences_have_the_shape_of_the_case() -> None:
    assert sequences(CASE, 50, 0).shape == (3, 7)


@given(length=st.integers(1, 5000), batch=st.integers(1, 64))
def test_smaller_cases_get_there_without_passing_the_floor(length: int, batch: int) -> None:
    case: Case | None = Case(
        workload="infer", params={"batch_size": batch, "seq_length": length, "shape": "tiny"}, seed=5
    )
    sizes: list[tuple[Any, Any]] = []
    while case is not None:
        sizes.append((case.params["seq_length"], case.params["batch_size"]))
        assert (case.seed, case.params["shape"]) == (5, "tiny")
        case = smaller_sequences(case)
    assert sizes[-1] == (min(length, 32), min(batch, 2))
    assert all(a[0] >= b[0] and a[1] >= b[1] and a != b for a, b in pairwise(sizes))


def test_parameters_are_reduced_in_the_order_given() -> None:
    case = Case(workload="w", params={"a": 8, "b": 8})
    first = halve(case, {"b": 4, "a": 2})
    assert first
    assert first.params == {"a": 8, "b": 4}
    second = halve(first, {"b": 4, "a": 2})
    assert second
    assert second.params == {"a": 4, "b": 4}
    assert halve(Case(workload="w", params={"a": 1}), {"a": 0}) is None


# Probes, on systems whose property is plain to see


def system(forward: Any) -> Any:
    return SimpleNamespace(vocab_size=50, forward=forward)


def causal(ids_BT: Tensor) -> Tensor:
    """Running sums, so that order matters only with the weights: (B, T, 1)."""
    weights_T = torch.arange(1, ids_BT.shape[1] + 1)
    return (ids_BT * weights_T).cumsum(1)[..., None].float()


def forgetful(ids_BT: Tensor) -> Tensor:
    """A set of tokens, whatever their order: causal, but deaf to positions."""
    return ids_BT.cumsum(1)[..., None].float()


def clairvoyant(ids_BT: Tensor) -> Tensor:
    return causal(ids_BT) + ids_BT.sum(1)[:, None, None]


@pytest.mark.parametrize(
    ("forward", "causality", "position"),
    [(causal, True, True), (forgetful, True, False), (clairvoyant, False, True)],
)
def test_probes_tell_systems_apart(forward: Any, causality: bool, position: bool) -> None:
    passed = {}
    for name, probe in PROBES.items():
        found = probe.run(system(forward), Case(workload="infer", seed=1))
        passed[name] = probe_figure(name, *found, expects_change=probe.expects_change).passed
    assert passed == {"causality": causality, "position": position}


def test_causality_says_which_position_moved() -> None:
    moved, scale, where = PROBES["causality"].run(system(clairvoyant), Case(workload="infer"))
    assert moved > 0
    assert scale > 0
    assert where.startswith("token 8 changed, position ")

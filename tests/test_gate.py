"""The gate's arithmetic: what counts as the same work, and what the one line says where it is not."""

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay import gate
from assay.measure.record import Figure, Spread
from tests.tensors import values

F64 = torch.float64


def judged(out: Tensor | None, ref: Tensor, name: str = "logits", **others: Tensor) -> Figure:
    """The meaning tier's figure of one quantity."""
    outputs = {name: out, **others}
    return gate.judge_outputs("meaning", "before", outputs, {name: ref, **others}, dtype="fp32")[0]


# How far


def test_equal_tensors_do_not_depart_at_all() -> None:
    ref = values(2, 3, 5)
    assert gate.compare(ref.clone(), ref) == gate.Departure(0.0, "", "")


def test_row_error_is_its_distance_over_the_root_mean_square_of_row_norms() -> None:
    ref = torch.tensor([[3.0, 4.0], [0.0, 12.0]])  # norms 5 and 12: root mean square sqrt(84.5)
    out = torch.tensor([[3.0, 4.0], [0.0, 12.5]])
    departure = gate.compare(out, ref)
    assert departure.error == pytest.approx(0.5 / math.sqrt(84.5))
    assert departure.where == "first at position [1]"


def test_gradient_error_is_whole_and_over_the_larger_of_its_norm_and_the_scale() -> None:
    ref, out = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert gate.compare(out, ref, scale=0.1).error == pytest.approx(0.5 / 5)
    assert gate.compare(out, ref, scale=50.0).error == pytest.approx(0.5 / 50)


def test_small_gradient_is_held_against_a_share_of_the_whole_gradient() -> None:
    """A bias whose gradient nearly cancels is rounding, not a fault, beside a gradient far larger."""
    large, small = values(100, 100), 1e-6 * values(4)
    noise = small + 1e-4 * values(4, seed=1)
    assert not judged(noise, small, "grad:bias").passed
    assert judged(noise, small, "grad:bias", **{"grad:weight": large}).passed


@given(row=st.integers(0, 5), column=st.integers(0, 6), sign=st.sampled_from([-1, 1]))
def test_any_single_wrong_row_is_found_and_named(row: int, column: int, sign: int) -> None:
    ref = values(2, 3, 7)
    out = ref.clone()
    out.view(6, 7)[row, column] += sign * 0.01
    figure = judged(out, ref)
    assert not figure.passed
    assert figure.where == f"first at position [{row // 3}, {row % 3}]"


@given(first=st.integers(0, 9))
def test_place_is_where_the_departure_begins_not_where_it_is_worst(first: int) -> None:
    ref = values(1, 10, 4)
    growth = torch.linspace(1.0, 3.0, 10, dtype=F64)[:, None]
    out = torch.where(torch.arange(10)[:, None] >= first, ref + growth, ref)
    assert gate.compare(out, ref).where == f"first at position [0, {first}]"


@given(scale=st.floats(1e-30, 1e30), seed=st.integers(0, 9))
def test_error_is_relative_whatever_the_units(scale: float, seed: int) -> None:
    ref, out = values(4, 5, seed=seed), values(4, 5, seed=seed + 100)
    assert gate.compare(out * scale, ref * scale).error == pytest.approx(gate.compare(out, ref).error)


@given(order=st.permutations(range(6)), seed=st.integers(0, 9))
def test_error_does_not_depend_on_the_order_of_rows_or_columns(order: list[int], seed: int) -> None:
    ref, out = values(6, 6, seed=seed), values(6, 6, seed=seed + 100)
    error = gate.compare(out, ref).error
    assert gate.compare(out[order], ref[order]).error == pytest.approx(error)
    assert gate.compare(out[:, order], ref[:, order]).error == pytest.approx(error)


def test_other_shape_departs_without_end() -> None:
    figure = judged(values(2, 3), values(3, 2))
    assert (figure.passed, figure.error) == (False, None)
    assert figure.note == "shape (2, 3), expected (3, 2)"


def test_scalars_are_compared_by_value() -> None:
    assert judged(torch.tensor(2.0 + 1e-8, dtype=F64), torch.tensor(2.0, dtype=F64), "loss").passed
    assert not judged(torch.tensor(2.0 + 1e-4, dtype=F64), torch.tensor(2.0, dtype=F64), "loss").passed


# Counts: nothing is masked or clamped first


def test_zeros_against_zeros_is_a_failure() -> None:
    figure = judged(torch.zeros(3, 3), torch.zeros(3, 3))
    assert not figure.passed
    assert "nothing was compared" in figure.note


@pytest.mark.parametrize(("bad", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("quantity", ["logits", "grad:weight"])
def test_entry_that_is_not_finite_fails_whatever_the_tolerance(bad: float, name: str, quantity: str) -> None:
    ref = values(8, 8)
    out = ref.clone()
    out[3, 4] = bad
    figure = judged(out, ref, quantity)
    assert not figure.passed, name
    assert figure.error is None
    assert figure.note == "1 non-finite entries of 64, the oracle has 0"


@pytest.mark.parametrize("quantity", ["logits", "loss", "grad:weight"])
def test_nothing_finite_against_nothing_finite_is_a_failure(quantity: str) -> None:
    """Two models that both end in NaN have not been shown to do the same work."""
    nothing = torch.full(() if quantity == "loss" else (3, 3), math.nan)
    figure = judged(nothing, nothing, quantity)
    assert not figure.passed
    assert figure.note == "the oracle has no finite value: nothing was compared"


def test_infinities_in_the_same_places_are_the_same_answer() -> None:
    ref = values(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
    assert gate.compare(ref.clone(), ref) == gate.Departure(0.0, "", "")


def test_infinities_hide_no_error_in_the_finite_entries() -> None:
    ref = values(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
    out = ref.clone()
    out[3, 0] += 0.5
    assert gate.compare(out, ref).error > 0.1
    assert gate.compare(out, ref, scale=1e-3).error > 0.1


def test_infinities_in_other_places_are_not_the_same_answer() -> None:
    ref, out = values(4, 4), values(4, 4)
    ref[0, 1], out[0, 2] = math.inf, math.inf
    assert not judged(out, ref).passed


@given(extra=st.integers(0, 40))
def test_more_zeros_than_the_oracle_has_are_a_fault(extra: int) -> None:
    """One entry in a hundred and one more may be zero: a dropped block of a product is not rounding."""
    ref = values(10, 10)
    out = ref.clone().flatten()
    out[:extra] = 0.0
    departure = gate.compare(out.view(10, 10), ref)
    assert bool(departure.fault) == (extra > 2)


# Whole numbers


def test_tokens_must_agree_and_the_first_that_does_not_is_named() -> None:
    ref = torch.tensor([[5, 6, 7], [8, 9, 9]])
    out = torch.tensor([[5, 6, 7], [8, 1, 9]])
    figure = judged(out, ref, "tokens")
    assert not figure.passed
    assert figure.error == pytest.approx(1 / 6)
    assert figure.where == "first at [1, 1]"
    assert judged(ref.clone(), ref, "tokens").passed


def test_zero_is_an_answer_among_whole_numbers() -> None:
    assert judged(torch.tensor(0), torch.tensor(0), "output:0").passed


# Which quantities


def test_quantity_that_the_arm_lacks_fails() -> None:
    figure = judged(None, values(3), "grad:weight")
    assert not figure.passed
    assert figure.note == "missing: the arm gives no such quantity"


def test_quantity_that_only_the_arm_has_fails() -> None:
    ref = {"loss": values(1)}
    found = gate.judge_outputs("meaning", "before", {**ref, "grad:extra": values(2)}, ref, dtype="fp32")
    assert [(f.quantity, f.passed) for f in found] == [("loss", True), ("grad:extra", False)]


def test_oracle_without_output_proves_nothing() -> None:
    (figure,) = gate.judge_outputs("precision", "before", {}, {}, dtype="as given", reference={})
    assert not figure.passed
    assert gate.explain([figure]) == (
        "precision gate: outputs differs: nothing to compare: the oracle gives no output"
    )


@pytest.mark.parametrize(
    ("quantity", "limit"),
    [("loss", 1e-5), ("logits", 2e-4), ("grad:a.b", 1e-3), ("output:x", 1e-4), ("tokens", 1e-4)],
)
def test_meaning_has_one_limit_for_each_kind(quantity: str, limit: float) -> None:
    assert judged(values(4), values(4), quantity).limit == limit


# Precision


def precision(error: float, reference: dict[str, float], dtype: str = "bf16", name: str = "logits") -> Figure:
    """The precision tier's figure of an output that departs by `error`."""
    ref = torch.ones(1, 1, dtype=F64)
    (figure,) = gate.judge_outputs(
        "precision", "after", {name: ref * (1 + error)}, {name: ref}, dtype=dtype, reference=reference
    )
    return figure


@given(reference=st.floats(0.01, 0.33), share=st.floats(0.1, 2.9))
def test_three_times_the_reference_error_is_allowed(reference: float, share: float) -> None:
    assert precision(share * reference, {"logits": reference}).passed
    assert not precision((share + 3.0) * reference, {"logits": reference}).passed


@pytest.mark.parametrize(("dtype", "unit"), [("fp32", 2**-23), ("bf16", 2**-8), ("bf16-autocast", 2**-8)])
def test_lucky_reference_still_allows_the_rounding_of_the_dtype(dtype: str, unit: float) -> None:
    assert precision(2.9 * unit, {"logits": 0.0}, dtype).passed
    assert not precision(3.2 * unit, {"logits": 0.0}, dtype).passed


def test_gradients_share_the_median_of_the_reference_errors() -> None:
    """One tensor where the reference was exact by luck must not fail an arm as good as the reference."""
    lucky = {"grad:a": 0.0, "grad:b": 0.02, "grad:c": 0.03}
    limit = precision(0.0, lucky, name="grad:a").limit
    assert limit == pytest.approx(3 * 0.02)


def limits(
    reference: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> list[float]:
    """Of every quantity; their shapes are alike but for those given."""
    oracle = {name: values(*(shapes or {}).get(name, (4, 4))) for name in reference}
    figures = gate.judge_outputs("precision", "before", oracle, oracle, dtype="fp32", reference=reference)
    return [figure.limit or 0.0 for figure in figures]


def test_a_gradient_counts_as_off_as_much_as_the_same_one_in_another_block() -> None:
    """Of rank one, its error is a single draw: the phase-2 model failed its own gate by such a bias."""
    errors = [("a.bias", 0.001), ("a.bias", 0.02), ("b.bias", 0.01), ("b.bias", 0.01)]
    reference = {f"grad:blocks.{i}.{name}": error for i, (name, error) in enumerate(errors)}
    assert limits(reference) == pytest.approx([0.06, 0.06, 0.03, 0.03])


def test_an_expert_is_not_excused_by_another_of_its_block() -> None:
    errors = {"0.experts.0": 0.01, "0.experts.1": 0.2, "1.experts.0": 0.02, "1.experts.1": 0.01, "2.x": 0.01}
    reference = {f"grad:blocks.{name}.weight": error for name, error in errors.items()}
    assert limits(reference) == pytest.approx([0.06, 0.6, 0.06, 0.6, 0.03])


def test_a_layer_is_not_excused_by_another_shape_of_the_same_sequence() -> None:
    reference = {"grad:net.0.weight": 0.01, "grad:net.2.weight": 0.2, "grad:net.4.weight": 0.01}
    assert limits(reference, {"grad:net.2.weight": (2, 8)}) == pytest.approx([0.03, 0.6, 0.03])


def test_reference_without_a_finite_error_excuses_nothing() -> None:
    out, ref = values(2, 2), values(2, 2)
    out[0, 0] = ref[1, 1] = math.inf  # as many as the oracle has, elsewhere
    (figure,) = gate.judge_outputs(
        "precision", "before", {"logits": out}, {"logits": ref}, dtype="fp16", reference={"logits": math.inf}
    )
    assert not figure.passed


def test_reference_as_wrong_as_zeros_bounds_nothing() -> None:
    out = values(4, 4)
    for error, passed in ((0.3, True), (0.4, False)):
        (figure,) = gate.judge_outputs(
            "precision", "before", {"output:0": out}, {"output:0": out}, dtype="fp32",
            reference={"output:0": error},
        )  # fmt: skip
        assert figure.passed is passed
    assert figure.note == "the reference itself is off by as much: nothing bounds the error"


def test_errors_are_on_the_scales_that_the_figures_use() -> None:
    ref = {"loss": values(1), "grad:weight": values(5, 5), "grad:bias": 1e-9 * values(5)}
    out = {name: tensor + 1e-6 for name, tensor in ref.items()}
    figures = gate.judge_outputs("meaning", "before", out, ref, dtype="fp32")
    assert gate.errors(out, ref) == {f.quantity: f.error for f in figures}
    assert gate.errors({"other": values(1)}, ref) == {}


# Probes


@pytest.mark.parametrize(
    ("departure", "expects_change", "passed"),
    [(0.0, False, True), (1e-3, False, False), (0.0, True, False), (1e-3, True, True)],
)
def test_probe_passes_when_the_output_does_as_it_should(
    departure: float, expects_change: bool, passed: bool
) -> None:
    figure = gate.probe_figure("causality", departure, 2.0, "token 8", expects_change=expects_change)
    assert (figure.passed, figure.error) == (passed, departure / 2.0)
    assert bool(figure.note) != passed


def test_probe_that_is_not_finite_fails_either_way() -> None:
    for expects_change in (True, False):
        assert not gate.probe_figure("p", math.nan, 1.0, "", expects_change=expects_change).passed
        assert not gate.probe_figure("p", math.inf, 1.0, "", expects_change=expects_change).passed


# What is kept and said


def figure(
    quantity: str,
    error: float,
    *,
    tier: str = "meaning",
    passed: bool = True,
    where: str = "",
    note: str = "",
) -> Figure:
    return Figure(
        tier=tier,
        stage="before",
        quantity=quantity,
        error=error,
        limit=1.0,
        passed=passed,
        where=where,
        note=note,
    )


def test_worst_keeps_every_failure_and_the_closest_pass_of_each_kind() -> None:
    figures = [
        figure("grad:a", 0.1),
        figure("grad:b", 0.7),
        figure("grad:c", 5.0, passed=False),
        figure("grad:d", 6.0, passed=False),
        figure("loss", 0.2),
        figure("causality", 0.0, tier="probe"),
        figure("position", 0.0, tier="probe"),
    ]
    kept = [f.quantity for f in gate.worst(figures)]
    assert sorted(kept) == ["causality", "grad:b", "grad:c", "grad:d", "loss", "position"]
    assert kept[:2] == ["grad:c", "grad:d"]


def test_explanation_is_one_line_with_what_how_much_and_where() -> None:
    failed = [
        figure("grad:w", 3.0, passed=False),
        figure("logits", 0.24, passed=False, where="first at position [0, 1]"),
    ]
    assert gate.explain(failed, "first layer that departs is layers.0") == (
        "meaning gate: logits differs: error 0.24, limit 1, first at position [0, 1], "
        "first layer that departs is layers.0 (and 1 more)"
    )


def test_probe_is_the_first_thing_said_and_a_pass_says_nothing() -> None:
    moved = figure("causality", 0.5, tier="probe", passed=False, note="the output moved")
    assert gate.explain([figure("logits", 2.0, passed=False), moved]).startswith("probe gate: causality")
    assert gate.explain([figure("logits", 0.5)]) == ""


def test_first_layer_that_departs_is_named_with_its_position() -> None:
    oracle = {f"layer:model.layers.{i}": values(1, 4, 8, seed=i) for i in range(3)}
    layers = {name.removeprefix("layer:"): t.float() for name, t in oracle.items()}
    assert gate.first_departing(layers, oracle) == ""
    for i in (1, 2):
        layers[f"model.layers.{i}"][0, 2:] += 0.1
    named = "first layer that departs is model.layers.1, at position [0, 2]"
    assert gate.first_departing(layers, oracle) == named


def test_layers_are_compared_over_the_positions_that_both_saw() -> None:
    whole = values(1, 6, 8)
    assert gate.first_departing({"a": whole[:, :3].float()}, {"layer:a": whole}) == ""
    assert gate.first_departing({"a": whole[:, :3] + 0.1}, {"layer:a": whole})
    assert gate.first_departing({"unknown": whole}, {"layer:a": whole}) == ""


def test_complex_tensors_are_compared_in_both_parts() -> None:
    ref = torch.tensor([[3 + 4j, 0j], [0j, 5j]], dtype=torch.complex128)
    off = ref + torch.tensor([[0j, 0j], [0j, 0.5j]])
    assert gate.compare(ref.to(torch.complex64), ref) == (0.0, "", "")
    assert gate.compare(off, ref).error == pytest.approx(0.1)
    assert gate.compare(off, ref).where == "first at position [1]"
    bad = ref.clone()
    bad[0, 0] = complex(float("nan"), 0)
    assert gate.compare(bad, ref).fault == "1 non-finite entries of 4, the oracle has 0"
    assert gate.gradient_norm({"grad:z": torch.tensor([3j, 4.0])}) == 5.0


def test_nan_in_the_same_place_does_not_differ() -> None:
    ref = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    assert gate.compare(ref.clone(), ref) == (0.0, "", "")
    assert gate.compare(ref.flip(1), ref).error == math.inf


def test_spread_counts_what_the_error_hides() -> None:
    ref = torch.tensor([[1.0, 2.0], [0.0, 2.0], [3.0, 4.0]])
    out = torch.tensor([[1.0, 2.5], [0.0, 0.0], [3.0, float("inf")]])
    (figure,) = gate.judge_outputs(
        "precision", "before", {"output:0": out}, {"output:0": ref}, dtype="fp32", spreads=True
    )
    assert figure.spread
    assert figure.spread == Spread(mse=None, nrmse=None, max_relative=None, nonfinite=1, zero_rows=1, rows=3)
    (figure,) = gate.judge_outputs(
        "precision", "before", {"output:0": out[:2]}, {"output:0": ref[:2]}, dtype="fp32", spreads=True
    )
    assert figure.spread == Spread(
        mse=pytest.approx((0.25 + 4) / 4),
        nrmse=pytest.approx(math.sqrt(4.25 / 9)),
        max_relative=1.0,
        nonfinite=0,
        zero_rows=1,
        rows=2,
    )
    assert gate.worst([figure, figure]) == [figure, figure]

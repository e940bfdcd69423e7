import functools
import json
import operator
import shutil
import subprocess
from typing import Any

import msgspec
import numpy as np
import pytest

from assay.measure.verdict import Comparison
from assay.report.seed_json import seed_results
from tests.report.fixtures import BASELINE, OTHER, REFUSED, finished
from tests.report.golden import assert_golden

RUN = finished()
RESULTS = seed_results(RUN.records, RUN.comparisons)
STEP = {
    "wall_clock_time": {"mean_ms", "std_ms", "median_ms", "min_ms", "max_ms", "p95_ms", "p99_ms"},
    "memory": {"peak_mb", "final_mb", "reserved_mb"},
    "throughput": {"samples_per_sec", "tokens_per_sec"},
}
LATENCY = {"mean_ms", "std_ms", "median_ms", "p95_ms", "p99_ms"}
GENERATION = {
    "first_token_latency": LATENCY,
    "per_token_latency": LATENCY,
    "total_generation": {"mean_ms", "std_ms", "output_tokens"},
    "memory": {"peak_mb", "final_mb"},
    "throughput": {"tokens_per_sec"},
}
COMPARISON = {
    "training": {"speedup", "time_reduction_percent", "memory_reduction_mb", "memory_reduction_percent"},
    "inference": {"speedup", "time_reduction_percent", "memory_reduction_mb"},
    "generation": {"speedup", "latency_reduction_percent", "first_token_speedup"},
}
RECIPES = (
    "comparison.training.speedup",
    "comparison.inference.memory_reduction_mb",
    "comparison.generation.first_token_speedup",
    "default_model.training.memory.peak_mb",
    "default_model.training.wall_clock_time.p99_ms",
    "example_model.inference.throughput.tokens_per_sec",
    "example_model.generation.per_token_latency.mean_ms",
    "example_model.generation.total_generation.output_tokens",
    "config.vocab_size",
)


def at(recipe: str, results: dict[str, Any]) -> Any:
    return functools.reduce(operator.getitem, recipe.split("."), results)


def test_results() -> None:
    assert_golden("benchmark_results.json", json.dumps(RESULTS, indent=2) + "\n")


def test_keys_are_exactly_those_of_the_seed_suite() -> None:
    assert list(RESULTS) == ["timestamp", "config", "default_model", "example_model", "comparison", "assay"]
    for model in (RESULTS["default_model"], RESULTS["example_model"]):
        assert {k: set(v) for k, v in model["training"].items()} == STEP
        assert {k: set(v) for k, v in model["inference"].items()} == STEP
        assert {k: set(v) for k, v in model["generation"].items()} == GENERATION
    assert {k: set(v) for k, v in RESULTS["comparison"].items()} == COMPARISON


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_gives_a_number(recipe: str) -> None:
    assert isinstance(at(recipe, RESULTS), int | float)


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_recipes_give_numbers_through_jq() -> None:
    program = ", ".join(f".{recipe}" for recipe in RECIPES)
    run = subprocess.run(
        ["jq", program], input=json.dumps(RESULTS), capture_output=True, text=True, check=True
    )
    assert [float(line) for line in run.stdout.split()] == [at(recipe, RESULTS) for recipe in RECIPES]


def test_training_time_leaves_the_optimizer_out() -> None:
    mine = [r for r in RUN.records if r.case.workload == "train" and r.arm.name == BASELINE and r.samples_ns]
    sums = np.concatenate(
        [np.sum([r.samples_ns[p] for p in ("forward", "backward", "zero_grad")], axis=0) for r in mine]
    )
    assert at("default_model.training.wall_clock_time.mean_ms", RESULTS) == pytest.approx(sums.mean() * 1e-6)
    tokens_per_s = at("default_model.training.throughput.tokens_per_sec", RESULTS)
    assert tokens_per_s == pytest.approx(2 * 512 / (sums.mean() * 1e-9))


def test_speedup_and_reduction_agree_with_the_means() -> None:
    before = at("default_model.inference.wall_clock_time.mean_ms", RESULTS)
    after = at("example_model.inference.wall_clock_time.mean_ms", RESULTS)
    assert at("comparison.inference.speedup", RESULTS) == pytest.approx(before / after)
    assert at("comparison.inference.time_reduction_percent", RESULTS) == pytest.approx(
        100 * (before - after) / before
    )


def test_per_token_latency_is_of_the_further_tokens_only() -> None:
    laps = [x for r in RUN.records if r.arm.name == OTHER for s in r.laps_ns.get("decode", ()) for x in s]
    assert len(laps) == 5 * 10 * 31
    assert at("example_model.generation.per_token_latency.mean_ms", RESULTS) == pytest.approx(
        np.mean(laps) * 1e-6
    )


def test_failed_gate_gives_null_speedups_and_no_numbers() -> None:
    refused = [c for c in RUN.comparisons if c.other == REFUSED]
    results = seed_results([r for r in RUN.records if r.other == REFUSED], refused)
    assert results["default_model"] == results["example_model"] == {}
    values = [value for block in results["comparison"].values() for value in block.values()]
    assert values == [None] * 10


def test_measured_arms_without_a_verdict_keep_numbers_but_get_no_speedup() -> None:
    bare = [msgspec.structs.replace(c, interval=None, verdict=None) for c in RUN.comparisons]
    results = seed_results(RUN.records, bare)
    assert results["comparison"]["training"]["speedup"] is None
    assert isinstance(at("example_model.training.memory.peak_mb", results), float)


def test_workload_that_did_not_run_is_absent() -> None:
    def is_train(thing: Any) -> bool:
        return bool(thing.case.workload == "train")

    comparisons: list[Comparison] = list(filter(is_train, RUN.comparisons))
    results = seed_results(list(filter(is_train, RUN.records)), comparisons)
    assert list(results["comparison"]) == list(results["default_model"]) == ["training"]


def test_what_the_seed_suite_lacked_is_under_assay() -> None:
    assay = RESULTS["assay"]
    assert (assay["default_model"], assay["example_model"]) == (BASELINE, OTHER)
    assert assay["comparisons"][0]["verdict"] == "faster"
    assert assay["comparisons"][0]["interval"]["low"] > 1
    assert assay["records"] == [r.id for r in RUN.records]
    failed = {f["arm"] for f in assay["gate"][0]["figures"] if f["failed"]}
    assert failed == {REFUSED}

"""Doubtful samples are named, honest ones are not; the text carries the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure.validity import (
    Facts,
    busy,
    coarse_clock,
    drift,
    few_blocks,
    host_bound,
    implausible_reason,
    order_effect,
    outliers,
    recompile_reason,
    remembered_reason,
    throttled,
    two_modes,
    warnings,
)

N = 40
MS = 1e6
ALTERNATE = np.arange(N) % 2 == 0


def noise(seed: int, n: int = N, cv: float = 0.01) -> np.ndarray:
    return MS * np.exp(cv * np.random.default_rng(seed).standard_normal(n))


def facts(step_ns: np.ndarray, **changes: object) -> Facts:
    values: dict[str, object] = {
        "samples_ns": {"step": step_ns.tolist()},
        "wall_ns": step_ns.tolist(),
        "clock": "wall",
        "resolution_ns": 50.0,
        "cores": 2,
    }
    return Facts(**{**values, **changes})  # type: ignore[arg-type]  # the keys are those above


def test_honest_samples_raise_no_warning() -> None:
    alarms = sum(bool(warnings(facts(noise(seed), went_first=ALTERNATE.tolist()))) for seed in range(200))
    assert alarms <= 10


def test_every_doubt_becomes_one_line() -> None:
    slow = noise(0) * np.linspace(1, 1.2, N)
    doubtful = facts(
        slow,
        clock="cuda",
        wall_ns=(3 * slow).tolist(),
        resolution_ns=MS / 100,
        before={"load_1m": 3.0},
        after={"throttle_reasons": "power_cap,idle"},
        restless=True,
    )
    lines = warnings(doubtful)
    assert [line.partition(":")[0] for line in lines] == [
        "host-bound",
        "coarse clock",
        "drift",
        "throttled",
        "busy machine",
        "restless",
    ]
    assert not any("\n" in line for line in lines)


def test_page_faults_are_told_where_they_cost_a_share_that_matters() -> None:
    """Samples of a millisecond: a fault takes at least 250 ns."""
    assert not warnings(facts(noise(0), page_faults=39))
    (line,) = warnings(facts(noise(0), page_faults=2016))
    assert line.startswith("page faults: 2,016 a step")
    assert "MALLOC_TRIM_THRESHOLD_=" in line
    assert not warnings(facts(noise(0), page_faults=2016, clock="cuda")), "the device's time, not the host's"
    (bare,) = warnings(facts(noise(0), page_faults=2016, variables={"LD_PRELOAD": "libjemalloc.so"}))
    assert "MALLOC" not in bare


@pytest.mark.parametrize("rate, word", [(1.05, "slower"), (0.95, "faster")])
def test_drift_says_how_much_and_which_way(rate: float, word: str) -> None:
    line = drift(MS * np.linspace(1, rate, N) * (1 + 0.001 * ALTERNATE))
    assert line is not None and word in line and "3." in line


@given(st.integers(0, 10**6))
def test_drift_does_not_depend_on_the_unit(seed: int) -> None:
    times = noise(seed) * np.linspace(1, 1.02, N)
    assert drift(times) == drift(times * 1000)


def test_a_small_drift_is_left_to_the_interval() -> None:
    assert drift(MS * np.linspace(1, 1.005, N)) is None


def test_constant_samples_have_no_drift_modes_or_outliers() -> None:
    same = np.full(N, MS)
    assert drift(same) is None and two_modes(same) is None and outliers(same) is None


def test_two_modes_are_counted() -> None:
    times = noise(1, cv=0.002) * np.where(np.arange(N) % 4 == 0, 1.1, 1.0)
    assert two_modes(times) == "two modes: 10 of 40 samples are 10% slower than the rest"
    assert two_modes(noise(1)) is None


def test_one_far_sample_is_an_outlier_not_a_mode() -> None:
    times = noise(2)
    times[7] *= 3
    assert two_modes(times) is None
    line = outliers(times)
    assert line is not None and "of 40 samples, 1 severe; the slowest is 3" in line


def test_order_effect_needs_both_orders_and_a_real_difference() -> None:
    times = noise(3)
    assert order_effect(times, ALTERNATE) is None
    line = order_effect(times * np.where(ALTERNATE, 1.05, 1.0), ALTERNATE)
    assert line is not None and line.endswith("slower when first in a block than when second")
    assert order_effect(times * 1.05, np.ones(N, dtype=bool)) is None


def test_host_bound_by_the_hosts_time_or_by_the_gaps_between_kernels() -> None:
    assert host_bound(10 * MS, 11 * MS, 9 * MS) is None
    assert host_bound(10 * MS, None, None) is None
    assert host_bound(10 * MS, 20 * MS, 9 * MS) == (
        "host-bound: a step takes 2.00 times as long on the host as on the device"
    )
    assert host_bound(10 * MS, 10.1 * MS, 4 * MS) == (
        "host-bound: kernels run in 40% of a step's device time, the rest waits"
    )


def test_host_bound_compares_medians_on_cuda_only() -> None:
    step = noise(4)
    waits = {"wall_ns": (1.1 * step).tolist(), "kernel_ns": 0.3 * MS}
    assert [line.partition(":")[0] for line in warnings(facts(step, clock="cuda", **waits))] == ["host-bound"]
    assert warnings(facts(step, **waits)) == []


def test_coarse_clock_counts_inner_steps() -> None:
    step = np.full(N, 1000.0)
    assert (
        coarse_clock(step, 1, 50.0) == "coarse clock: one tick is 5.0% of a sample; time more steps a sample"
    )
    assert coarse_clock(step, 100, 50.0) is None


def test_few_blocks_busy_and_throttled() -> None:
    assert few_blocks(12) is None and few_blocks(3) is not None
    assert busy({"load_1m": 1.0}, 2) is None and busy({}, 2) is None
    assert busy({"load_1m": 1.01}, 2) == "busy machine: load average 1.01 on 2 core(s) at the start"
    assert throttled({"throttle_reasons": "idle"}, {"throttle_reasons": ""}) is None
    assert throttled({"throttle_reasons": "hw_thermal"}, {"throttle_reasons": "power_cap"}) == (
        "throttled: the driver reports hw_thermal, power_cap"
    )


def test_few_samples_are_judged_by_no_other_check() -> None:
    wild = np.array([MS, 5 * MS, 9 * MS])
    assert [line[:11] for line in warnings(facts(wild, went_first=[True, False, True]))] == ["3 sample(s)"]


def test_a_recompile_voids_the_samples() -> None:
    assert recompile_reason(2, 2) is None
    assert recompile_reason(2, 4) == (
        "2 compilation(s) inside the timed region: the samples include compiling"
    )


def test_the_phase_that_beats_its_floor_by_most_is_named() -> None:
    samples = {"prefill": [9.0e6, 8.0e6], "decode": [3.0e6, 1.0e6], "step": [12.0e6, 9.0e6]}
    assert implausible_reason(samples, {"prefill": 8.0e6, "step": 9.0e6}) is None
    reason = implausible_reason(samples, {"prefill": 10.0e6, "decode": 2.0e6, "absent": 1.0})
    assert reason == (
        "a sample of 'decode' took 1 ms, 2.00 times faster than its physical floor of 2 ms "
        "on this device: the stated work did not happen, or `assay doctor` measured the ceilings too low"
    )


def test_answers_from_memory_void_the_samples_and_slow_new_inputs_do_not() -> None:
    assert remembered_reason([100.0] * 5, 5e6) is not None
    assert remembered_reason([1e6] * 5, 5e6) is None  # slower, but not as a memory is
    assert remembered_reason([100.0] * 5, 5e3) is None  # too short to say

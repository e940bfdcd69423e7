from assay.measure.busy import busy_us


def test_overlapping_spans_count_once_and_gaps_not_at_all() -> None:
    # 0-10 and 5-15 cover 15, 12-14 lies inside, 20-30 follows a gap of 5
    assert busy_us([(20, 30), (0, 10), (5, 15), (12, 14)], []) == {"step": 25}


def test_spans_belong_to_the_phase_they_start_in_and_laps_add_up() -> None:
    marks = [("prefill", 10.0), ("decode", 20.0), ("decode", 30.0)]
    spans = [(0.0, 4.0), (5.0, 9.0), (11.0, 14.0), (21.0, 22.0), (31.0, 36.0)]
    assert busy_us(spans, marks) == {"step": 17.0, "prefill": 8.0, "decode": 4.0}


def test_a_phase_without_kernels_was_idle_and_a_step_without_any_is_unknown() -> None:
    assert busy_us([(5, 6)], [("forward", 4), ("backward", 8)]) == {"step": 1, "forward": 0, "backward": 1}
    assert busy_us([], [("forward", 4)]) == {}

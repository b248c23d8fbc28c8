"""How fast a run goes: batch sizes, a limited rate, a ceiling of errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crm.rules.throttling import (
    FAR_OVER,
    FIRST_ROWS,
    MAX_PAUSE,
    MAX_ROWS,
    MIN_ROWS,
    STEP,
    BatchSizer,
    ErrorBudget,
    Pause,
    RateLimit,
    Throttle,
)

durations = st.floats(0, 100, allow_nan=False)
speeds = st.integers(1, 1_000_000)


def after_batches(sizer: BatchSizer, seconds: Iterable[float]) -> list[int]:
    """The sizes after full batches that took so long."""
    sizes = []
    for duration in seconds:
        sizer.after_batch(sizer.size, duration)
        sizes.append(sizer.size)
    return sizes


@given(st.lists(durations, max_size=30))
def test_the_size_stays_in_its_bounds_and_grows_by_half_at_most(seconds: list[float]) -> None:
    sizer = BatchSizer()
    before = sizer.size
    for size in after_batches(sizer, seconds):
        assert MIN_ROWS <= size <= MAX_ROWS
        assert size <= math.ceil(before * STEP)
        before = size


@given(speeds)
def test_a_steady_speed_leads_to_the_target_time(rows_per_second: int) -> None:
    sizer = BatchSizer()
    assert sizer.size == FIRST_ROWS
    for _ in range(20):
        sizer.after_batch(sizer.size, sizer.size / rows_per_second)
    assert sizer.size == pytest.approx(min(MAX_ROWS, max(MIN_ROWS, rows_per_second)), abs=1)


@given(st.floats(FAR_OVER * 1.01, 1_000))
def test_a_batch_that_is_far_over_the_target_shrinks_the_next_one_at_once(seconds: float) -> None:
    sizer = BatchSizer()
    words = sizer.after_batch(FIRST_ROWS, seconds)
    assert sizer.size == max(MIN_ROWS, math.floor(FIRST_ROWS / seconds))
    assert words is not None
    assert words.startswith("batch size: 5,000 rows took ")
    assert words.endswith(f": 5,000 -> {sizer.size:,} rows")


@given(st.floats(1.01, FAR_OVER))
def test_a_batch_that_is_somewhat_over_shrinks_the_next_one_by_a_step_at_most(seconds: float) -> None:
    sizer = BatchSizer()
    assert sizer.after_batch(FIRST_ROWS, seconds) is None
    assert math.floor(FIRST_ROWS / STEP) <= sizer.size < FIRST_ROWS


def test_the_last_batch_of_a_source_says_nothing_of_larger_ones() -> None:
    sizer = BatchSizer()
    sizer.after_batch(3, 0.001)
    assert sizer.size == FIRST_ROWS
    sizer.after_batch(0, 0.001)
    assert sizer.size == FIRST_ROWS


@given(st.integers(1, 30_000), st.lists(durations, max_size=20))
def test_a_fixed_size_stays_whatever_the_speed(size: int, seconds: list[float]) -> None:
    assert set(after_batches(BatchSizer(fixed=size), seconds)) <= {size}


@given(st.integers(1, 30_000), st.integers(0, 20))
def test_a_fixed_size_comes_back_in_steps_after_timeouts(size: int, timeouts: int) -> None:
    sizer = BatchSizer(fixed=size)
    for _ in range(timeouts):
        sizer.halve("a timeout")
    assert sizer.size == max(1, size // 2**timeouts)
    sizes = [sizer.size, *after_batches(sizer, [1.0] * 40)]
    assert sizes[-1] == size
    assert all(later <= math.ceil(STEP * earlier) for earlier, later in pairwise(sizes))


def test_a_timeout_halves_the_size_below_the_bounds_too() -> None:
    sizer = BatchSizer()
    assert sizer.halve("a timeout") == "batch size: 5,000 -> 2,500 rows after a timeout"
    for _ in range(20):
        sizer.halve("a timeout")
    assert sizer.size == 1
    assert after_batches(sizer, [0.1] * 3) == [2, 3, 5]
    assert after_batches(sizer, [0.1] * 20)[-1] > MIN_ROWS


@given(st.integers(1, 30_000), st.lists(durations, max_size=30))
def test_a_limited_rate_bounds_the_size(most: int, seconds: list[float]) -> None:
    assert all(size <= most for size in after_batches(BatchSizer(max_rows=most), seconds))
    assert all(size <= most for size in after_batches(BatchSizer(max_rows=most, fixed=5_000), seconds))


def test_no_batch_is_empty() -> None:
    for options in ({"fixed": 0}, {"max_rows": 0}, {"fixed": -1}, {"max_rows": -1}):
        with pytest.raises(ValueError, match="at least one row"):
            BatchSizer(**options)


@given(st.integers(1, 10_000), st.lists(st.tuples(st.integers(1, 20_000), durations), min_size=1, max_size=20))
def test_the_rate_is_held_over_any_stretch_of_batches_and_no_pause_is_longer_than_needed(
    rows_per_second: int, batches: list[tuple[int, float]]
) -> None:
    limit: Throttle = RateLimit(rows_per_second)
    now = 1_000.0
    for rows, seconds in batches:
        started, now = now, now + seconds
        limit.after_batch(rows, started)
        pause = limit.wait_reason(now)
        if pause is not None:
            assert pause.seconds > 0
            now += pause.seconds
            assert now - started == pytest.approx(rows / rows_per_second, rel=1e-6)
            # Clocks count in steps: what is left after the wait is nothing that anybody would wait for.
            left = limit.wait_reason(now)
            assert left is None or left.seconds < 1e-6
        assert now - started >= rows / rows_per_second * (1 - 1e-6)


@given(
    st.integers(1, 10_000),
    st.integers(1, 8),
    st.integers(1, 5_000),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
)
def test_the_rate_is_that_of_all_who_share_it_from_their_first_batch_on(
    rows_per_second: int, shares: int, size: int, sources: list[int]
) -> None:
    limits = [RateLimit(rows_per_second, shares) for _ in range(shares)]
    rows = min(size, limits[0].max_rows)
    begin = 1_000.0
    for batches in sources:
        begun: list[float] = []
        for turn, limit in enumerate(limits):
            now = begin
            limit.begin(now, rows, turn)
            for _ in range(batches):
                if pause := limit.wait_reason(now):
                    now += pause.seconds
                begun.append(now)
                limit.after_batch(rows, now)
        for number, moment in enumerate(sorted(begun)):
            assert (moment - begin) * rows_per_second >= number * rows * (1 - 1e-6)
        begin = max(begun)


def test_a_pause_names_its_reason_and_its_figures() -> None:
    limit = RateLimit(1_000)
    assert limit.wait_reason(7.0) is None
    limit.after_batch(1_250, 10.0)
    assert limit.wait_reason(11.0) == Pause("max-rate: 1,250 rows/s >= 1,000: waiting 0.2 s", 0.25)
    assert limit.wait_reason(11.3) is None
    limit.after_batch(500, 12.0)
    assert limit.wait_reason(12.0) == Pause("max-rate: 500 rows in no time >= 1,000: waiting 0.5 s", 0.5)


@given(st.integers(1, 100_000))
def test_a_batch_of_a_limited_rate_never_pauses_so_long_that_the_run_seems_dead(rows_per_second: int) -> None:
    limit = RateLimit(rows_per_second)
    assert 1 <= limit.target_rows <= limit.max_rows
    assert limit.target_rows / rows_per_second <= 1
    assert limit.max_rows / rows_per_second <= MAX_PAUSE


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row per second"):
        RateLimit(0)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_ceiling_in_rows_is_exceeded_by_one_row_more(most: int, read: int, error_new: int) -> None:
    ceiling = ErrorBudget.parse(str(most))
    assert (ceiling.exceeded(read, error_new) is not None) == (error_new > most)


@given(st.decimals(0, 100, places=2), st.integers(0, 10**6), st.data())
def test_a_ceiling_in_percent_is_judged_from_a_thousand_rows_on(share: Decimal, read: int, data: st.DataObject) -> None:
    error_new = data.draw(st.integers(0, read))
    ceiling = ErrorBudget.parse(f"{share}%")
    is_over = read >= 1_000 and Decimal(error_new) / max(read, 1) * 100 > share
    assert (ceiling.exceeded(read, error_new) is not None) == is_over


def test_an_exceeded_ceiling_is_told_with_its_figures() -> None:
    assert ErrorBudget.parse("50").exceeded(5_000, 50) is None
    assert ErrorBudget.parse("50").exceeded(5_000, 51) == "max-errors: 51 new errors in 5,000 rows, more than 50"
    share = ErrorBudget.parse(" 2.50 %")
    assert str(share) == "2.5%"
    assert share.exceeded(999, 999) is None
    assert share.exceeded(1_000, 25) is None
    assert share.exceeded(2_000, 1_234) == "max-errors: 1,234 new errors in 2,000 rows, 61.70% and more than 2.5%"
    assert ErrorBudget.parse("0").exceeded(10, 0) is None
    assert ErrorBudget.parse("0").exceeded(10, 1) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "-1",
        "-1%",
        "1.5",
        "101%",
        "100.01%",
        "nan",
        "inf%",
        "1_000",
        "1e",
        "five",
        "\N{ARABIC-INDIC DIGIT FIVE}",
        "1%%",
    ],
)
def test_what_is_no_ceiling_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is neither a number of rows, such as 50, nor a share of them"):
        ErrorBudget.parse(text)


@given(st.integers(0, 10**6) | st.decimals(0, 100, places=3).map("{}%".format))
def test_a_ceiling_is_written_as_it_is_read(number: object) -> None:
    ceiling = ErrorBudget.parse(str(number))
    again = ErrorBudget.parse(str(ceiling))
    assert (again.maximum, again.is_share) == (ceiling.maximum, ceiling.is_share)

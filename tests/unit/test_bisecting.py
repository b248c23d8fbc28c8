"""Refused items stand alone, and all others are written or read together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crm.outcome import Refusal
from crm.postgres.apart import Bisection


def refusing(bad: set[int], attempts: list[list[int]] | None = None) -> Callable[[Sequence[int]], int | Refusal]:
    """An attempt that adds items up, and refuses those with a bad one among them: by the first of these."""

    def attempt(some: Sequence[int]) -> int | Refusal:
        if attempts is not None:
            attempts.append(list(some))
        first = next((item for item in some if item in bad), None)
        return sum(some) if first is None else Refusal(str(first))

    return attempt


@given(st.integers(0, 40).flatmap(lambda size: st.tuples(st.just(size), st.sets(st.integers(0, max(0, size - 1))))))
def test_every_item_has_its_turn_once_and_in_its_order(case: tuple[int, set[int]]) -> None:
    size, bad = case
    parts = list(Bisection(range(size), refusing(bad)))
    assert [item for some, _ in parts for item in some] == list(range(size))
    for some, found in parts:
        if bad.isdisjoint(some):
            assert found == sum(some)
        else:
            (item,) = some
            assert found == Refusal(str(item))


@given(st.integers(1, 500).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))))
def test_one_refused_item_costs_two_attempts_a_halving(case: tuple[int, int]) -> None:
    size, bad = case
    attempts: list[list[int]] = []
    list(Bisection(range(size), refusing({bad}, attempts)))
    assert len(attempts) <= 1 + 2 * math.ceil(math.log2(size))


def test_what_nothing_refuses_is_attempted_at_once() -> None:
    attempts: list[list[int]] = []
    assert list(Bisection(range(9), refusing(set(), attempts))) == [(range(9), 36)]
    assert len(attempts) == 1


def test_no_item_is_no_attempt() -> None:
    attempts: list[list[int]] = []
    assert list(Bisection([], refusing(set(), attempts))) == []
    assert attempts == []


def test_what_is_left_is_what_was_not_yielded_yet() -> None:
    parts = Bisection(range(8), refusing({2, 5}))
    seen: list[int] = []
    for some, _ in parts:
        seen += some
        assert seen + parts.left == list(range(8))
    assert parts.left == []


def test_a_later_attempt_knows_what_the_earlier_parts_came_to() -> None:
    done: list[int] = []
    seen: list[list[int]] = []

    def attempt(some: Sequence[int]) -> int | Refusal:
        seen.append(list(done))
        return Refusal("3") if 3 in some else len(some)

    for some, _ in Bisection(range(4), attempt):
        done += some
    assert seen == [[], [], [0, 1], [0, 1], [0, 1, 2]]


def test_an_error_of_an_attempt_ends_it() -> None:
    def attempt(some: Sequence[int]) -> int | Refusal:
        if 3 in some and len(some) == 1:
            raise LookupError
        return Refusal() if 3 in some else len(some)

    parts = iter(Bisection(range(8), attempt))
    assert [list(some) for some, _ in (next(parts), next(parts))] == [[0, 1], [2]]
    with pytest.raises(LookupError):
        next(parts)

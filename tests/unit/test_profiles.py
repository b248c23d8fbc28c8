"""Which cases of a test are taken every day."""

from __future__ import annotations

from itertools import product
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import profiles
from tests.support.profiles import left_out


def a_case(number: int, step: int | None, **values: Any) -> Any:
    marker = None if step is None else pytest.mark.sampled(step).mark
    callspec = SimpleNamespace(params=values, indices=dict.fromkeys(values, number))
    item = pytest.Function.__new__(pytest.Function)
    vars(item).update(callspec=callspec, _obj=test_each_value_has_its_turn, get_closest_marker=lambda _name: marker)
    return item


@pytest.mark.parametrize("step", [2, 3])
def test_each_value_has_its_turn(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(profiles, "SOAKING", False)
    combined = [{"a": a, "b": b} for a, b in product("uvw", range(5))]
    cases = [a_case(number, step, **values) for number, values in enumerate(combined)]
    left = left_out(cases)
    taken = [case for case in cases if case not in left]
    assert len(cases) // step - 1 <= len(taken) <= len(cases) // step + 2
    assert {case.callspec.params["b"] for case in taken} == set(range(5))
    assert {case.callspec.params["a"] for case in taken} == set("uvw")
    shuffled = list(cases)
    Random(1).shuffle(shuffled)  # noqa: S311 - any order
    assert left_out(shuffled) == left


def test_a_soak_takes_all_and_so_does_a_test_that_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "SOAKING", False)
    assert left_out([a_case(number, None, a=number) for number in range(4)]) == set()
    monkeypatch.setattr(profiles, "SOAKING", True)
    assert left_out([a_case(number, 2, a=number) for number in range(4)]) == set()

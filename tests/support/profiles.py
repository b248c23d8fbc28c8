"""How many examples a property test draws: what a CI run has time for, or what `make soak` asks for.

The profile is chosen by the environment, so that the processes which share the tests agree on it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from math import ceil
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings

Case = TypeVar("Case")

#: Whether this is `make soak`.
SOAKING = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
#: How many a property test draws on one day; each day draws others.
DAILY_EXAMPLES = 25
#: The least that `make soak` asks of a property test, over all of its cases; and of the stateful machine, with the
#: steps of each example.
MIN_EXAMPLES, MACHINE_EXAMPLES, MACHINE_STEPS = 2_000, 1_000, 40


#: Where Hypothesis keeps the settings of a property test; it has no public name for them.
_SETTINGS = "_hypothesis_internal_use_settings"


def examples(few: int) -> int:
    """The number of examples of a test, over all of its cases, that is too slow for Hypothesis's own default."""
    return max(few, MIN_EXAMPLES) if SOAKING else few


def against_the_database(few: int) -> settings:
    """The settings of a property test that writes to the database. To explain a failure would take hours there."""
    return settings(
        max_examples=examples(few),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    )


def every(step: int) -> int:
    """The step through the cases that a test counts off: one in a soak, which takes all of them."""
    return 1 if SOAKING else step


def sample(cases: Iterable[Case], step: int) -> list[Case]:
    """Every so many of the cases; in a soak all of them."""
    return list(cases)[:: every(step)]


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The cases that are not in the samples of their tests: with `sampled(3)` two of three, in a soak none.

    Of parameters that are combined those cases are taken whose numbers add up to a multiple: so each value of each
    parameter has its turn, as far as the others have as many values as the step.
    """
    sampled: dict[Any, list[tuple[Any, int, pytest.Item]]] = {}
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None and marker.args and not SOAKING:
            sampled.setdefault(_function(item), []).append((_callspec(item), marker.args[0], item))
    left: set[pytest.Item] = set()
    for cases in sampled.values():
        numbers: dict[str, dict[str, int]] = {}
        # Chance may have shuffled them.
        for callspec, step, item in sorted(cases, key=lambda case: tuple(case[0].indices.values())):
            of_values = [(numbers.setdefault(name, {}), repr(value)) for name, value in callspec.params.items()]
            if sum(known.setdefault(value, len(known)) for known, value in of_values) % step:
                left.add(item)
    return left


def share_examples(items: Iterable[pytest.Item]) -> None:
    """Share the examples of each property test among its cases: for every generation, say, a part of them."""
    for function, cases in Counter(map(_function, items)).items():
        if (chosen := getattr(function, _SETTINGS, None)) is not None:
            setattr(function, _SETTINGS, settings(chosen, max_examples=ceil(chosen.max_examples / cases)))


def settings_of(item: pytest.Item) -> settings | None:
    """The settings of a property test; None for another one."""
    chosen: settings | None = getattr(_function(item), _SETTINGS, None)
    return chosen


def load_profile() -> None:
    """Load the profile that the environment names. A machine that has other things to do is no reason to fail."""
    settings.register_profile(
        "unhurried", max_examples=DAILY_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile("soak", settings.get_profile("unhurried"), max_examples=MIN_EXAMPLES, print_blob=True)
    settings.load_profile("soak" if SOAKING else "unhurried")


def _function(item: pytest.Item) -> Any:
    function = getattr(item, "obj", None)
    return getattr(function, "__func__", function)


def _callspec(item: pytest.Item) -> Any:
    return getattr(item, "callspec")  # noqa: B009 - a function's case has one, an item need not

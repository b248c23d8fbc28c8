"""Typed values of the environment: taken as they are written, or refused by their name."""

from __future__ import annotations

import pytest
from django.core.exceptions import ImproperlyConfigured

from config.environment import Env


def env(value: str) -> Env:
    found = Env()
    found.ENVIRON = {"NAME": value}
    return found


@pytest.mark.parametrize(
    ("text", "is_on"), [("on", True), (" TRUE\n", True), ("1", True), ("off", False), ("n", False)]
)
def test_a_switch_is_on_or_off(text: str, is_on: bool) -> None:  # noqa: FBT001 - a parameter of the test
    assert env(text).bool("NAME", default=not is_on) is is_on


def test_an_empty_value_is_the_default() -> None:
    for empty in ("", " \t"):
        assert env(empty).bool("NAME", default=True) is True
        assert env(empty).int("NAME", default=7) == 7
        assert env(empty).str("NAME", default="x") == "x"
        assert env(empty).list("NAME", default=["x"]) == ["x"]
    assert env("x").str("OTHER", default="y") == "y"


def test_white_space_around_the_items_of_a_list_is_not_part_of_them() -> None:
    assert env("a.example.com, b.example.com").list("NAME", default=[]) == ["a.example.com", "b.example.com"]


def test_a_value_that_begins_with_a_dollar_names_no_other_variable() -> None:
    assert env("$NAME").str("NAME", default="") == "$NAME"
    assert env("$NAME").list("NAME", default=[]) == ["$NAME"]
    for read in (env("$OTHER").bool, env("$OTHER").int):
        with pytest.raises(ImproperlyConfigured):
            read("NAME", default=1)


@pytest.mark.parametrize(("kind", "fault"), [("bool", "neither on nor off"), ("int", "not a whole number")])
def test_any_other_value_is_refused_by_its_name_and_not_shown(kind: str, fault: str) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        getattr(env("hunter2"), kind)("NAME", default=0)
    assert f"NAME is {fault}" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("text", ["1_000", "-1", "+1", "1.0", "\N{FULLWIDTH DIGIT ONE}0", "9" * 5_000])
def test_a_whole_number_is_written_in_ascii_digits(text: str) -> None:
    assert env("1000").int("NAME", default=0) == 1000
    with pytest.raises(ImproperlyConfigured, match="NAME is not a whole number"):
        env(text).int("NAME", default=0)

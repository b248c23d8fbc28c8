"""Lists arrive in PostgreSQL as they were, rendered the fast way: PostgreSQL itself is the judge."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from django.db import DataError, connection
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crm.postgres.arrays import render
from tests.conftest import Database
from tests.support.profiles import examples

#: Everything that has a meaning in an array literal, in a string literal or in a placeholder.
AWKWARD = st.sampled_from(
    [
        *("", " ", "NULL", "null", "\\", "\\\\", '"', '""', '\\"', "'", "''", "\\'", "{", "}", "{}", ",", '","', "n"),
        *("\n", "\r\n", "\t", "\v", "%", "%s", "%%", "%(a)s", "$1", ";--", "E'\\n'", "\\N", "\x01", "\x7f", "\ufeff"),
        *("\N{NO-BREAK SPACE}", "é", "e\N{COMBINING ACUTE ACCENT}", "李", "👩\N{ZERO WIDTH JOINER}💻", "\U0010ffff"),
    ]
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
TEXTS = AWKWARD | ANY_TEXT | st.lists(AWKWARD, max_size=5).map("".join)
against_postgresql = settings(
    max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def through(values: list[Any], type_name: str = "text") -> list[Any]:
    """The elements as PostgreSQL hands them back."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT value FROM unnest(%s::{type_name}[]) WITH ORDINALITY AS t(value, n) ORDER BY n", [values]
        )
        return [value for (value,) in cursor.fetchall()]


@against_postgresql
@given(st.lists(TEXTS | st.none(), max_size=8))
@example([])
@example([None])
@example([None, None])
@example([""])
@example(["", None, ""])
@example(["NULL", None, "n", "\\", '"', None])
def test_any_text_goes_in_and_comes_out_the_same(database: Database, values: list[str | None]) -> None:
    assert through(values) == values


@against_postgresql
@given(st.lists(TEXTS | st.none(), max_size=8))
def test_what_psycopg_would_have_sent_means_the_same(database: Database, values: list[str | None]) -> None:
    connection.ensure_connection()
    with psycopg.ClientCursor(connection.connection) as plain:
        theirs = plain.execute("SELECT %s::text[]", [values]).fetchone()
        assert plain.execute("SELECT %s::text[]", [render(values)]).fetchone() == theirs == (values,)


@against_postgresql
@given(st.lists(TEXTS | st.none(), max_size=4), st.lists(TEXTS | st.none(), max_size=4))
def test_columns_side_by_side_do_not_run_into_each_other(
    database: Database, left: list[str | None], right: list[str | None]
) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s::text[], %s::text[]", [left, right])
        assert cursor.fetchone() == (left, right)


@pytest.mark.parametrize(
    ("values", "type_name"),
    [
        ([1, -2, 2**31 - 1], "integer"),
        ([2**40, None], "bigint"),
        ([True, None, False], "boolean"),
        ([None, 1.5], "double precision"),
    ],
)
def test_other_lists_still_go_their_own_way(database: Database, values: list[Any], type_name: str) -> None:
    assert through(values, type_name) == values


def test_a_list_of_lists_still_is_an_array_of_two_dimensions(database: Database) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s::text[]", [[["a", "b,"], ["c", None]]])
        assert cursor.fetchone() == ([["a", "b,"], ["c", None]],)


def test_a_long_list_is_one_array(database: Database) -> None:
    values = [f"person {number}" if number % 3 else None for number in range(20_000)]
    assert through(values) == values


@pytest.mark.parametrize("values", [["\0"], ["a\0,b"], ["a", None, "\0n"], ["\0", "b"], ["a", "b\0"]])
def test_a_nul_is_refused_as_psycopg_refuses_it(values: list[str | None]) -> None:
    with pytest.raises(psycopg.DataError, match="NUL"):
        render(values)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.none(), max_size=5))
def test_no_nul_ever_passes(values: list[str | None]) -> None:
    if any(value is not None and "\0" in value for value in values):
        with pytest.raises(psycopg.DataError):
            render(values)
    else:
        assert "\0" not in render(values)


def test_django_sees_the_refusal_of_a_nul_as_an_error_of_the_data(database: Database) -> None:
    with pytest.raises(DataError):
        through(["a\0"])


@pytest.mark.parametrize("values", [[1], ["a", 1], [None, b"a"], [["a"]]])
def test_only_text_is_rendered(values: list[Any]) -> None:
    with pytest.raises(TypeError):
        render(values)

"""What Python and SQL both compute is the same in both."""

from __future__ import annotations

import sys

from django.db import connection
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crm.rules.mapping import canonical_username, canonical_username_sql, contact_id, contact_id_sql
from crm.rules.source_rows import WHITE_SPACE
from tests.conftest import Database

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
against_postgresql = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@against_postgresql
@given(st.lists(TEXT, min_size=1, max_size=20), st.sampled_from(["profiles", "leads"]))
@example(["", "1", "é", "李", "'", "\\", "a:b"], "leads")
def test_postgresql_makes_the_same_id(database: Database, source_ids: list[str], table: str) -> None:
    rows = database.rows(f"SELECT {contact_id_sql('%s || id')} FROM unnest(%s::text[]) AS id", f"{table}:", source_ids)
    assert [identifier for (identifier,) in rows] == [contact_id(table, source_id) for source_id in source_ids]


def test_postgresql_trims_what_python_trims(database: Database) -> None:
    characters = [chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    space = {character for character in characters if not character.strip()}
    assert set(WHITE_SPACE) == space
    texts = [f"{character}a{character}b{character}" for character in sorted(space)]
    trimmed_there = database.rows("SELECT btrim(t, %s) FROM unnest(%s::text[]) AS t", WHITE_SPACE, texts)
    assert [text for (text,) in trimmed_there] == [text.strip() for text in texts]


@against_postgresql
@given(st.lists(TEXT | st.sampled_from(["\u2003 TGP-1\x85", "René", "İ", "\u212a"]), min_size=1, max_size=20))
def test_postgresql_spells_a_username_as_python_does(database: Database, usernames: list[str]) -> None:
    rows = database.rows(f"SELECT {canonical_username_sql('name')} FROM unnest(%s::text[]) AS name", usernames)
    assert [name for (name,) in rows] == [canonical_username(name) for name in usernames]


@against_postgresql
@given(st.emails())
def test_postgresql_lower_cases_the_name_of_an_address_as_python_does(database: Database, email: str) -> None:
    connection.ensure_connection()
    name = email.upper().partition("@")[0]
    assert database.rows("""SELECT lower(%s COLLATE "C")""", name) == [(name.lower(),)]

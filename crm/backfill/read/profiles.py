"""Profiles by id, as they are now. Only reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.postgres.apart import read_apart
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.rules.source_rows import SOURCE_TABLES, ProfileRow

_ROWS = "SELECT {values} FROM (SELECT {columns} FROM profiles r WHERE r.id = ANY(%s)) r {join}"


def read_profiles(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, ids: Sequence[str]
) -> tuple[dict[str, ProfileRow], set[str]]:
    """Return the profiles by id, and the ids of those that cannot be read or whose id several rows have."""
    repeated = set(facts.repeated_ids.get("profiles", ())) & set(ids)
    rows, unreadable = read_apart(
        connection, [profile for profile in ids if profile not in repeated], partial(_read, connection, facts)
    )
    return {row.id: row for row in rows}, repeated | unreadable.keys()


def _read(connection: BaseDatabaseWrapper, facts: DatabaseFacts, ids: Sequence[str]) -> list[ProfileRow]:
    table = SOURCE_TABLES["profiles"]
    columns, join = table.columns(facts.missing), table.join(facts.missing, "")
    with connection.cursor() as cursor:
        read_as_text(cursor)
        cursor.execute(_ROWS.format(values=table.values, columns=columns, join=join), [list(ids)])
        return [ProfileRow._make(values) for values in cursor.fetchall()]

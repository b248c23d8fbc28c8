"""Reads complete ledger entries, and the changes of updates in the form of entries. No other module does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.outcome import Outcome, UpdateOutcome
from crm.postgres.loaders import read_as_text
from crm.rules.entry import Entry
from crm.rules.mapping import rounded

#: The columns of an entry `entry`, in the order that `entry_of` expects.
COLUMNS = """
entry.id, entry.source, entry.source_id, entry.outcome, entry.contact_id, entry.run_id, entry.source_updated_at,
entry.filled, entry.seen_preparer, entry.seen_updated_at, entry.contact_updated_at, entry.attribution_before::text
"""
#: The same columns for an update `change`.
COLUMNS_OF_UPDATE = f"""
change.line_id, change.source, change.source_id, '{UpdateOutcome.UPDATED}', change.contact_id, change.run_id,
change.source_updated_at, change.columns, NULL, NULL::timestamp, change.contact_updated_at,
change.attribution_before::text
"""
NUMBER_OF_COLUMNS = len(Entry._fields) - 1


def entry_of(values: Sequence[Any], second_digits: int) -> Entry:
    """Return an entry from the values of its columns, with timestamps as text.

    `second_digits` is the number of fractional digits of a second that a contact stores.
    """
    identifier, source, source_id, outcome, contact_id, run_id, updated_at, filled, *others = values
    return Entry(
        identifier,
        source,
        source_id,
        UpdateOutcome.UPDATED if outcome == UpdateOutcome.UPDATED else Outcome(outcome),
        contact_id or "",
        run_id,
        updated_at,
        tuple(filled.split(",")) if filled else (),
        updated_at and rounded(updated_at, second_digits),
        *others,
    )


def read_entries(connection: BaseDatabaseWrapper, second_digits: int, query: str, parameters: Any) -> list[Entry]:
    """Return the entries that a query of COLUMNS finds."""
    with connection.cursor() as cursor:
        read_as_text(cursor)
        cursor.execute(query, parameters)
        return [entry_of(values, second_digits) for values in cursor.fetchall()]

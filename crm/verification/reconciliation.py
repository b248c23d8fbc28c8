"""Checks in SQL that source rows, ledger entries and contacts agree.

A contact belongs to the backfill if there is a ledger entry with its id and the outcome `created`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.latecomers import last_finished
from crm.outcome import Outcome, Source
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.snapshot import stream
from crm.rules.addresses import canonical_address_sql
from crm.rules.mapping import UNQUALIFIED, contact_id_sql
from crm.rules.row_reference import reference_sql
from crm.rules.source_rows import SOURCE_TABLES
from crm.runs.other_rules import OtherRules
from crm.verification.findings import Check, Finding, Kind, unexplained

_REFERENCE = reference_sql("entry")

_ENTRIES_BY_OUTCOME = """
SELECT entry.outcome, count(*),
       count(*) FILTER (WHERE entry.outcome <> 'error' AND entry.contact_id IS NOT NULL AND c.id IS NULL)
  FROM ledger_entry entry LEFT JOIN crm_contacts c ON c.id = entry.contact_id
 GROUP BY 1
"""
_ROWS_GONE = """
SELECT entry.outcome, count(*) FROM ledger_entry entry
 WHERE entry.source = ANY(%s) AND NOT {row_is_there}
 GROUP BY 1
"""
_ROW_IS_THERE = "EXISTS (SELECT FROM {table} r WHERE r.id = entry.source_id)"

_MISSING_ENTRIES = """
SELECT '{table}:' || r.id, c.id FROM {table} r JOIN crm_contacts c ON c.id = {derived}
 WHERE NOT EXISTS (SELECT FROM ledger_entry entry WHERE entry.id = c.id)
"""
_WRONG_IDS = (
    f"SELECT {_REFERENCE}, entry.contact_id FROM ledger_entry entry WHERE entry.id <> {contact_id_sql(_REFERENCE)}"
)
_NO_CONTACTS = f"""
SELECT {_REFERENCE}, NULL FROM ledger_entry entry
 WHERE entry.outcome IN ('created', 'merged', 'exists') AND entry.contact_id IS NULL
"""
_OUTCOMES = ", ".join(f"'{outcome}'" for outcome in Outcome)
_UNKNOWN_OUTCOMES = f"""
SELECT {_REFERENCE}, entry.contact_id FROM ledger_entry entry WHERE entry.outcome NOT IN ({_OUTCOMES})
"""
_TWO_CREATORS = f"""
SELECT {_REFERENCE}, entry.contact_id FROM ledger_entry entry
 WHERE entry.outcome = 'created' AND entry.contact_id <> entry.id
"""
# Includes rows that matched a contact created elsewhere: an excluded row must not be read at all.
_EXCLUDED_MIGRATED = """
SELECT '{table}:' || r.id, c.id, {updated_at} IS DISTINCT FROM entry.source_updated_at, entry.run_id
  FROM {table} r
  JOIN ledger_entry entry ON entry.id = {derived} AND entry.outcome <> 'error'
  JOIN crm_contacts c ON c.id = entry.contact_id
 WHERE {label} = ANY(%(labels)s::{label_type}[])
"""
# A contact created elsewhere is no defect if it was added or changed after the start of the run that created ours.
_CONTACTS_TWICE = f"""
WITH twice AS (SELECT {{key}} AS key FROM crm_contacts c WHERE {{key}} <> '' GROUP BY 1 HAVING count(*) > 1),
     theirs AS (
       SELECT twice.key, c.id, c."createdAt", c."updatedAt", entry.id IS NOT NULL AS ours, {_REFERENCE} AS reference,
              c."updatedAt" IS DISTINCT FROM entry.source_updated_at::timestamp({{second_digits}}) AS changed,
              run.started_at AT TIME ZONE 'UTC' AS begun, entry.run_id
         FROM twice JOIN crm_contacts c ON {{key}} = twice.key
              LEFT JOIN ledger_entry entry ON entry.id = c.id AND entry.outcome = 'created'
              LEFT JOIN backfill_run run ON run.id = entry.run_id
     )
SELECT our.reference, our.id,
       our.changed OR bool_and(
         CASE WHEN other.ours THEN other.changed
              ELSE COALESCE(greatest(other."createdAt", other."updatedAt") >= our.begun, false) END),
       pg_catalog.array_agg(other.run_id) OPERATOR(pg_catalog.||) our.run_id
  FROM theirs our JOIN theirs other ON other.key = our.key AND other.id <> our.id
 WHERE our.ours
 GROUP BY our.reference, our.id, our.changed, our.run_id
"""
_KEYS_OF_PERSON = {
    "email": canonical_address_sql("c.email"),
    "userId": 'c."userId"',
    "clerkUserId": 'c."clerkUserId"',
}
# No row refers to a history row, and deleting it leaves the contact unchanged.
_HISTORY_GONE = f"""
SELECT {reference_sql("change")}, change.contact_id
  FROM contact_update change
  JOIN crm_contacts c ON c.id = change.contact_id
 WHERE change.to_stage IS NOT NULL
   AND NOT EXISTS (SELECT FROM crm_stage_history step WHERE step.id = {{step}})
"""
_STEP = contact_id_sql("'crm_stage_history:' || change.contact_id || ':' || change.to_stage")
_HISTORY = """
SELECT EXISTS (SELECT FROM contact_update WHERE to_stage IS NOT NULL),
       has_column_privilege(to_regclass(quote_ident(%s) || '.crm_stage_history'), 'id', 'SELECT')
"""


class History(NamedTuple):
    """Whether updates promoted contacts, and whether this role may read the stage history that records it."""

    has_promotions: bool
    is_readable: bool

    @classmethod
    def of(cls, connection: BaseDatabaseWrapper) -> History:
        """Read both from the database."""
        with connection.cursor() as cursor:
            cursor.execute(_HISTORY, [settings.LEGACY_SCHEMA])
            return cls(*map(bool, cursor.fetchone()))

    @property
    def is_hidden(self) -> bool:
        """Whether there are promotions that cannot be checked."""
        return self.has_promotions and not self.is_readable


def history_gone(connection: BaseDatabaseWrapper, history: History) -> Iterator[Finding]:
    """Yield a finding for each promotion whose history row was deleted."""
    if history.is_hidden or not history.has_promotions:
        return
    for reference, contact_id in stream(connection, "history", _HISTORY_GONE.format(step=_STEP)):
        yield Finding(Check.HISTORY_GONE, Kind.CRM_CHANGED, reference, contact_id, ("stage",))


def count_entries(connection: BaseDatabaseWrapper) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of ledger entries by outcome, and of those whose contact was deleted since."""
    with connection.cursor() as cursor:
        cursor.execute(_ENTRIES_BY_OUTCOME)
        rows = sorted(cursor.fetchall())
    entries = {outcome: count for outcome, count, _ in rows}
    return entries, {outcome: deleted for outcome, _, deleted in rows if deleted}


def count_rows_gone(connection: BaseDatabaseWrapper, facts: DatabaseFacts) -> dict[str, int]:
    """Return the number of ledger entries whose source row is missing, by outcome."""
    gone: dict[str, int] = {}
    with connection.cursor() as cursor:
        for table in SOURCE_TABLES:
            query = _ROWS_GONE.format(
                row_is_there=_ROW_IS_THERE.format(table=table) if table in facts.tables else "false"
            )
            cursor.execute(query, [[source.value for source in Source.of_table(table)]])
            for outcome, count in cursor.fetchall():
                gone[outcome] = gone.get(outcome, 0) + count
    return gone


def reconcile(connection: BaseDatabaseWrapper, facts: DatabaseFacts, other_rules: OtherRules) -> Iterator[Finding]:
    """Yield a finding for each disagreement of source rows, entries and contacts."""
    # A run that could not delete one of two contacts reports them until one is deleted, so these are defects.
    left_twice = frozenset(last_finished(connection).left)
    for table in facts.tables:
        derived = contact_id_sql(f"'{table}:' || r.id")
        yield from _defects(connection, Check.MISSING_ENTRY, _MISSING_ENTRIES.format(table=table, derived=derived))
        yield from _excluded_migrated(connection, facts, other_rules, table, derived)
    for check, query in (
        (Check.WRONG_ID, _WRONG_IDS),
        (Check.UNKNOWN_OUTCOME, _UNKNOWN_OUTCOMES),
        (Check.NO_CONTACT, _NO_CONTACTS),
        (Check.TWO_CREATORS, _TWO_CREATORS),
    ):
        yield from _defects(connection, check, query)
    for column, key in _KEYS_OF_PERSON.items():
        query = _CONTACTS_TWICE.format(key=key, second_digits=facts.second_digits)
        for reference, contact_id, changed, runs in stream(connection, "twice", query):
            if contact_id in left_twice:
                kind, by = Kind.DEFECT, None
            else:
                kind, by = (Kind.CRM_CHANGED, None) if changed else unexplained(other_rules.of(runs))
            yield Finding(Check.CONTACT_TWICE, kind, reference, contact_id, (column,), by)


def _defects(connection: BaseDatabaseWrapper, check: Check, query: str) -> Iterator[Finding]:
    for reference, contact_id in stream(connection, check.value, query):
        yield Finding(check, Kind.DEFECT, reference, contact_id)


def _excluded_migrated(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, other_rules: OtherRules, table: str, derived: str
) -> Iterator[Finding]:
    source_table = SOURCE_TABLES[table]
    excluded = [label for label in facts.labels(table) if facts.source_of(table, label) is None]
    query = _EXCLUDED_MIGRATED.format(
        table=table,
        derived=derived,
        label=source_table.label_sql(facts.missing),
        updated_at=source_table.updated_at,
        label_type=facts.label_types[table],
    )
    column = source_table.label_column or UNQUALIFIED
    for reference, contact_id, changed, run in stream(connection, "excluded", query, {"labels": excluded}):
        kind, by = (Kind.SOURCE_CHANGED, None) if changed else unexplained(other_rules.of([run]))
        yield Finding(Check.EXCLUDED_MIGRATED, kind, reference, contact_id, (column,), by)

"""Counts the source rows, and lists the ids of those that a run has to read. Only reads.

After the first run, nearly every row is migrated. The few that are pending or in error are found by joins of whole
tables, and then read by their ids: that is twenty times faster than one lookup per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.outcome import WITH_CONTACT, Fault, Outcome, RowCounts, Source
from crm.postgres.facts.schema import DatabaseFacts
from crm.rules.source_rows import SOURCE_TABLES

#: The maximum number of rows of a table, and their maximum share, that are read by their ids. If more are left, the
#: whole table is read page by page.
FEW_ROWS, FEW_SHARE = 20_000, 0.1

# A user is a row where no profile stands for it, or where a run migrated it before there was one. Once per statement:
# that is a join of whole tables.
_SIGNUPS = """
WITH signups AS MATERIALIZED (
  SELECT id, "updatedAt" FROM users
   WHERE NOT EXISTS (SELECT FROM profiles WHERE profiles."userId" = users.id){migrated}
)"""
_MIGRATED_SIGNUPS = """
   UNION ALL
  SELECT users.id, users."updatedAt" FROM ledger_entry JOIN users ON users.id = ledger_entry.source_id
   WHERE ledger_entry.source = ANY(%(sources)s)
     AND EXISTS (SELECT FROM profiles WHERE profiles."userId" = users.id)"""
# One statement, so that all counts have the same snapshot. Each term is counted separately: the rows of the table
# without the ledger, the entries of rows by outcome, and the rows without an entry as pending.
_COUNTS = """
SELECT {label}::text, NULL AS outcome, NULL AS names_contact, count(*) FROM {rows} r WHERE true{only} GROUP BY 1
 UNION ALL
SELECT label::text, outcome, names_contact, counted
  FROM (SELECT {label} AS label, entry.outcome, entry.contact_id IS NOT NULL AS names_contact, count(*) AS counted
          FROM {rows} r LEFT JOIN ledger_entry entry ON entry.source_id = r.id AND entry.source = ANY(%(sources)s)
         WHERE true{only}
         GROUP BY 1, 2, 3) entry
"""
_COUNTS_WITHOUT_LEDGER = """
SELECT {label}::text, NULL AS outcome, NULL, count(*) FROM {rows} r WHERE true{only} GROUP BY 1
 UNION ALL
SELECT {label}::text, NULL, false, count(*) FROM {rows} r WHERE true{only} GROUP BY 1
"""
# Rows without an id have no entry. Rows with the same id share one entry, because they cannot be distinguished.
_ONLY = {"id": " AND r.id IS NOT NULL", "repeated": " AND r.id <> ALL(%(repeated)s)"}
_WITHOUT_ID = "SELECT count(*) FROM {rows} r WHERE id IS NULL"
_REPEATED = """
SELECT entry.outcome, entry.contact_id IS NOT NULL, count(*)
  FROM {rows} r LEFT JOIN ledger_entry entry ON entry.source_id = r.id AND entry.source = ANY(%(sources)s)
 WHERE r.id = ANY(%(repeated)s)
 GROUP BY r.id, entry.outcome, entry.contact_id
"""
_REPEATED_WITHOUT_LEDGER = """
SELECT NULL, false, count(*) FROM {rows} r WHERE r.id = ANY(%(repeated)s) GROUP BY r.id
"""
#: The reasons why rows that cannot have an entry are excluded.
DUPLICATE_ID, MISSING_ID = "duplicate_id", "missing_id"
_ERRORS = """
SELECT {label}::text, r.id
  FROM ledger_entry entry JOIN {rows} r ON r.id = entry.source_id
 WHERE entry.outcome = 'error' AND entry.source = ANY(%(sources)s)
   AND ({label} = ANY(%(labels)s::{label_type}[]) OR {label} IS NULL){only}
"""
_PENDING_ROWS = """
SELECT {label}::text, r.id
  FROM {rows} r
 WHERE ({label} = ANY(%(labels)s::{label_type}[]) OR {label} IS NULL){only}
   AND NOT EXISTS (SELECT FROM ledger_entry entry WHERE entry.source_id = r.id AND entry.source = ANY(%(sources)s))
"""
# As `source.UNSETTLED_OR_GONE` has it.
_GONE = """
  FROM {rows} r JOIN ledger_entry entry ON entry.source_id = r.id AND entry.source = ANY(%(sources)s)
 WHERE entry.outcome <> 'error' AND {label} = ANY(%(labels)s::{label_type}[]){only}
   AND (NOT EXISTS (SELECT FROM crm_contacts c WHERE c.id = entry.contact_id)
        OR EXISTS (SELECT FROM ledger_entry made
                    WHERE made.id = entry.contact_id AND made.outcome = 'created' AND made.run_id > entry.run_id))
"""
_GONE_ROWS = f"SELECT {{label}}::text, r.id {_GONE}"
_GONE_COUNTS = f"SELECT {{label}}::text, count(*) {_GONE} GROUP BY 1"
# A row that changed since its entry was written can be excluded now without a fault.
_EXCLUDED_OF_RUN = """
SELECT count(*)
  FROM {rows} r JOIN ledger_entry entry ON entry.source_id = r.id AND entry.source = ANY(%(sources)s)
 WHERE {label} <> ALL(%(labels)s::{label_type}[]) AND entry.run_id = %(run)s AND entry.outcome <> 'error'
   AND entry.source_updated_at = {updated_at}
"""


class Inventory(NamedTuple):
    """The row counts, and the ids of the rows to read for sources that have few of them.

    `gone` is the number of migrated rows by source whose contact is missing; zero unless requested.
    """

    row_counts: RowCounts
    left: Mapping[Source, Sequence[str]]
    gone: Mapping[Source, int]


@dataclass(slots=True)
class _Table:
    """The number of rows of a table by label, and by label, outcome and whether their entry has a contact.

    `without_entry` is the number of rows that cannot have an entry, by reason.
    """

    labels: Counter[str | None] = field(default_factory=Counter)
    entries: Counter[tuple[str | None, str | None, bool]] = field(default_factory=Counter)
    without_entry: Counter[str] = field(default_factory=Counter)

    def count(self, label: str | None, *outcomes: str | None) -> int:
        """Return the number of rows with this label and one of these outcomes."""
        return sum(self.entries[label, outcome, named] for outcome in outcomes for named in (True, False))


def count_rows(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, run_id: int | None = None, *, with_signups: bool = False
) -> RowCounts:
    """Count the source rows by source, exclusion and outcome, each term separately.

    If `run_id` is given, entries of that run for excluded rows are counted as a fault. Signups without an entry are
    pending if `with_signups`, and excluded otherwise.
    """
    settled, errors, pending = (dict.fromkeys(Source, 0) for _ in range(3))
    row_counts = RowCounts(0, {}, settled, errors, pending)
    for table in facts.tables:
        counted = _count(connection, facts, table)
        _add(row_counts, facts, table, counted, with_signups=with_signups)
        if run_id is not None and _has_excluded_entries(facts, table, counted):
            count = _excluded_of_run(connection, facts, table, run_id)
            _add_fault(row_counts, Fault.EXCLUDED_ROW, count)
    return row_counts


def take_inventory(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, *, with_gone: bool = False, with_signups: bool = False
) -> Inventory:
    """Count the source rows, and list the ids of the rows to read if they are few.

    `with_gone` includes the migrated rows whose contact is missing, `with_signups` the rows of signups.
    """
    row_counts = count_rows(connection, facts, with_signups=with_signups)
    left: dict[Source, list[str]] = {}
    gone = dict.fromkeys(Source, 0)
    for table in facts.tables:
        sources = [source for source in Source.of_table(table) if with_signups or not source.is_of_signups]
        if not sources:
            continue
        errors, pending = (sum(of[source] for source in sources) for of in (row_counts.errors, row_counts.pending))
        rows = errors + pending + sum(row_counts.settled[source] for source in sources)
        if with_gone and facts.has_ledger:
            for label, count in _rows(connection, facts, table, _GONE_COUNTS, sources):
                if (source := facts.source_of(table, label)) is not None:
                    gone[source] += count
        of_table = sum(gone[source] for source in sources)
        if errors + pending + of_table > min(FEW_ROWS, FEW_SHARE * rows):
            continue
        left |= {source: [] for source in sources}
        for count, query in ((errors, _ERRORS), (pending, _PENDING_ROWS), (of_table, _GONE_ROWS)):
            for label, identifier in _rows(connection, facts, table, query, sources) if count else ():
                source = facts.source_of(table, label)
                if source is not None:
                    left[source].append(identifier)
    return Inventory(row_counts, left, gone)


def _count(connection: BaseDatabaseWrapper, facts: DatabaseFacts, table: str) -> _Table:
    counted = _Table()
    query = _COUNTS if facts.has_ledger else _COUNTS_WITHOUT_LEDGER
    for label, outcome, names_contact, count in _rows(connection, facts, table, query):
        if names_contact is None:
            counted.labels[label] = count
        else:
            counted.entries[label, outcome, names_contact] += count
    if f"{table}.id" in facts.nullable:
        ((count,),) = _rows(connection, facts, table, _WITHOUT_ID)
        counted.without_entry[MISSING_ID] += count
    if facts.repeated_ids.get(table):
        query = _REPEATED if facts.has_ledger else _REPEATED_WITHOUT_LEDGER
        for outcome, names_contact, count in _rows(connection, facts, table, query):
            counted.labels[None] += 1
            counted.entries[None, outcome, names_contact] += 1
            counted.without_entry[DUPLICATE_ID] += count - 1
    return counted


def _add(row_counts: RowCounts, facts: DatabaseFacts, table: str, counted: _Table, *, with_signups: bool) -> None:
    row_counts.rows += counted.labels.total() + counted.without_entry.total()
    for reason, count in counted.without_entry.items():
        _exclude(row_counts, reason, count)
    for label in counted.labels.keys() | {label for label, _, _ in counted.entries}:
        source = facts.source_of(table, label)
        if source is None:
            _exclude(row_counts, facts.exclusion(table, label), counted.labels.get(label, 0))
            continue
        row_counts.settled[source] += counted.count(label, *WITH_CONTACT)
        row_counts.errors[source] += counted.count(label, Outcome.ERROR)
        pending = counted.count(label, None)
        if source.is_of_signups and not with_signups:
            _exclude(row_counts, facts.exclusion(table, label), pending)
        else:
            row_counts.pending[source] += pending
        for outcome in Outcome:
            row_counts.entries[outcome] += counted.count(label, outcome)
        _add_faults(row_counts, counted, label)


def _add_faults(row_counts: RowCounts, counted: _Table, label: str | None) -> None:
    for (of_label, said, names_contact), count in counted.entries.items():
        if of_label == label and said is not None:
            if said not in row_counts.entries:
                _add_fault(row_counts, Fault.UNKNOWN_OUTCOME, count)
            elif said in WITH_CONTACT and not names_contact:
                _add_fault(row_counts, Fault.NO_CONTACT, count)


def _exclude(row_counts: RowCounts, reason: str, count: int) -> None:
    if count:
        row_counts.excluded[reason] = row_counts.excluded.get(reason, 0) + count


def _add_fault(row_counts: RowCounts, fault: Fault, count: int) -> None:
    if count:
        row_counts.faults[fault] = row_counts.faults.get(fault, 0) + count


def _has_excluded_entries(facts: DatabaseFacts, table: str, counted: _Table) -> bool:
    return any(outcome is not None and facts.source_of(table, label) is None for label, outcome, _ in counted.entries)


def _excluded_of_run(connection: BaseDatabaseWrapper, facts: DatabaseFacts, table: str, run_id: int) -> int:
    ((count,),) = _rows(connection, facts, table, _EXCLUDED_OF_RUN, run=run_id)
    return int(count)


def _rows(
    connection: BaseDatabaseWrapper,
    facts: DatabaseFacts,
    table: str,
    query: str,
    sources: Iterable[Source] | None = None,
    **parameters: Any,
) -> list[tuple[Any, ...]]:
    """The answer to a query of a table; where it asks for labels, for those of `sources`, by default of all."""
    of_table = Source.of_table(table)
    parameters |= {
        "sources": [source.value for source in of_table],
        "labels": [label for source in sources or of_table for label in facts.labels_of(source)],
        "repeated": list(facts.repeated_ids.get(table, ())),
    }
    only = _ONLY["id"] if f"{table}.id" in facts.nullable else ""
    only += _ONLY["repeated"] if parameters["repeated"] else ""
    with connection.cursor() as cursor:
        names = {"label": SOURCE_TABLES[table].label_sql(facts.missing), "updated_at": SOURCE_TABLES[table].updated_at}
        rows = "signups" if table == "users" else table
        query = query.format(rows=rows, **names, only=only, label_type=facts.label_types[table])
        if table == "users":
            query = _SIGNUPS.format(migrated=_MIGRATED_SIGNUPS if facts.has_ledger else "") + query
        cursor.execute(query, parameters)
        return list(cursor.fetchall())

"""The census of the source rows, and what is left of them to be looked at. Only reads.

After the first run nearly every row has its line. The few that have none, or one that says `error`, are found by one
join over the whole tables, and then read by their ids: that is twenty times cheaper than asking for every row's line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.outcome import Census, Outcome, Source
from crm.backfill.schema import DatabaseFacts

#: How many rows of a table may be left to be read by their ids; with more, their pages pass over the whole table.
FEW_ROWS = 20_000

_NAMES = {
    "profiles": {"table": "profiles", "label": "role", "enum": "UserRole"},
    "leads": {"table": "leads", "label": "status", "enum": "LeadStatus"},
}
_LABELS = "SELECT {label}::text, count(*) FROM {table} GROUP BY 1"
_LEFT = """
  FROM {table} r LEFT JOIN ledger_entry line ON line.source_id = r.id AND line.source = ANY(%(sources)s)
 WHERE r.{label} = ANY(%(labels)s::"{enum}"[]) AND (line.outcome IS NULL OR line.outcome = 'error')
"""
_LEFT_WITHOUT_LEDGER = """
  FROM {table} r CROSS JOIN (SELECT NULL AS outcome) line WHERE r.{label} = ANY(%(labels)s::"{enum}"[])
"""
_LEFT_ROWS = "SELECT r.{label}::text, line.outcome, r.id {left} LIMIT %(most)s"
_LEFT_COUNTED = "SELECT r.{label}::text, line.outcome, count(*) {left} GROUP BY 1, 2"


class Survey(NamedTuple):
    """The census, and the ids of the rows that are to be looked at, for the sources where they are few."""

    census: Census
    left: Mapping[Source, Sequence[str]]


class _Table(NamedTuple):
    """Rows of a table by label, those of them that are left by label and outcome, and their ids by label if few."""

    labels: dict[str, int]
    left: Counter[tuple[str, str | None]]
    ids: dict[str, list[str]] | None


def take_census(connection: BaseDatabaseWrapper, facts: DatabaseFacts) -> Census:
    """Count the source rows by what they are and by what the ledger says of them. Inside a snapshot."""
    return survey(connection, facts).census


def survey(connection: BaseDatabaseWrapper, facts: DatabaseFacts) -> Survey:
    """Take the census and note what is left to be looked at. Inside a snapshot, or its sums may be of two moments."""
    excluded: Counter[str] = Counter()
    settled, errors, pending = (dict.fromkeys(Source, 0) for _ in range(3))
    left: dict[Source, list[str]] = {}
    rows = 0
    for table in _NAMES:
        looked_at = _look_at(connection, facts, table)
        rows += sum(looked_at.labels.values())
        for label, count in looked_at.labels.items():
            source = facts.source_of(table, label)
            if source is None:
                excluded[facts.exclusion(table, label)] += count
                continue
            pending[source] += looked_at.left[label, None]
            errors[source] += looked_at.left[label, Outcome.ERROR]
            settled[source] += count - looked_at.left[label, None] - looked_at.left[label, Outcome.ERROR]
            if looked_at.ids is not None:
                left.setdefault(source, []).extend(looked_at.ids.get(label, ()))
    return Survey(Census(rows, dict(excluded), settled, errors, pending), left)


def _look_at(connection: BaseDatabaseWrapper, facts: DatabaseFacts, table: str) -> _Table:
    names = _NAMES[table]
    left = (_LEFT if facts.has_ledger else _LEFT_WITHOUT_LEDGER).format(**names)
    sources = Source.of_table(table)
    parameters: dict[str, Any] = {
        "sources": [source.value for source in sources],
        "labels": [label for source in sources for label in facts.labels_of(source)],
        "most": FEW_ROWS + 1,
    }
    with connection.cursor() as cursor:
        cursor.execute(_LABELS.format(**names))
        labels = dict(cursor.fetchall())
        cursor.execute(_LEFT_ROWS.format(left=left, **names), parameters)
        rows = cursor.fetchall()
        if len(rows) > FEW_ROWS:
            cursor.execute(_LEFT_COUNTED.format(left=left, **names), parameters)
            return _Table(labels, Counter({(label, outcome): count for label, outcome, count in cursor}), None)
    ids: dict[str, list[str]] = defaultdict(list)
    for label, _outcome, identifier in rows:
        ids[label].append(identifier)
    return _Table(labels, Counter((label, outcome) for label, outcome, _identifier in rows), ids)

"""The census of the source rows, and what is left of them to be looked at. Only reads.

After the first run nearly every row has its line. The few that have none, or one that says `error`, are found by one
join over the whole tables, and then read by their ids: that is twenty times cheaper than asking for every row's line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.outcome import Census, Outcome, Source
from crm.backfill.schema import DatabaseFacts

#: How many rows of a table, and what share of them, may be left for them to be read by their ids. Where more are left,
#: the pages pass over the whole table.
FEW_ROWS, FEW_SHARE = 20_000, 0.1

_NAMES = {
    "profiles": {"table": "profiles", "label": "role", "enum": "UserRole"},
    "leads": {"table": "leads", "label": "status", "enum": "LeadStatus"},
}
# What is counted and what is left are parts of one statement, so that both are of one moment.
_LABELS = "SELECT {label}::text AS label, NULL AS outcome, NULL AS id, count(*) FROM {table} GROUP BY 1"
_LEFT = """
  FROM {table} r LEFT JOIN ledger_entry line ON line.source_id = r.id AND line.source = ANY(%(sources)s)
 WHERE r.{label} = ANY(%(labels)s::"{enum}"[]) AND (line.outcome IS NULL OR line.outcome = 'error')
"""
_LEFT_WITHOUT_LEDGER = """
  FROM {table} r CROSS JOIN (SELECT NULL AS outcome) line WHERE r.{label} = ANY(%(labels)s::"{enum}"[])
"""
_ROWS = _LABELS + " UNION ALL (SELECT r.{label}::text, COALESCE(line.outcome, ''), r.id, 1 {left} LIMIT %(most)s)"
_COUNTS = (
    _LABELS + " UNION ALL (SELECT r.{label}::text, COALESCE(line.outcome, ''), NULL, count(*) {left} GROUP BY 1, 2)"
)
#: What stands for the outcome of a row without a line.
_PENDING = ""


class Survey(NamedTuple):
    """The census, and the ids of the rows that are to be looked at, for the sources where they are few."""

    census: Census
    left: Mapping[Source, Sequence[str]]


@dataclass(slots=True)
class _Table:
    """Rows of a table by label; those of them that are left, by label and outcome; and their ids by label, if few."""

    labels: dict[str, int] = field(default_factory=dict)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    ids: defaultdict[str, list[str]] | None = None


def take_census(connection: BaseDatabaseWrapper, facts: DatabaseFacts) -> Census:
    """Count the source rows by what they are and by what the ledger says of them."""
    return survey(connection, facts).census


def survey(connection: BaseDatabaseWrapper, facts: DatabaseFacts) -> Survey:
    """Take the census and note what is left to be looked at."""
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
            pending[source] += looked_at.left[label, _PENDING]
            errors[source] += looked_at.left[label, Outcome.ERROR]
            settled[source] += count - looked_at.left[label, _PENDING] - looked_at.left[label, Outcome.ERROR]
            if looked_at.ids is not None:
                left.setdefault(source, []).extend(looked_at.ids.get(label, ()))
    return Survey(Census(rows, dict(excluded), settled, errors, pending), left)


def _look_at(connection: BaseDatabaseWrapper, facts: DatabaseFacts, table: str) -> _Table:
    names = _NAMES[table]
    sources = Source.of_table(table)
    left = (_LEFT if facts.has_ledger else _LEFT_WITHOUT_LEDGER).format(**names)
    parameters: dict[str, Any] = {
        "sources": [source.value for source in sources],
        "labels": [label for source in sources for label in facts.labels_of(source)],
        "most": FEW_ROWS + 1,
    }
    with connection.cursor() as cursor:
        cursor.execute(_ROWS.format(left=left, **names), parameters)
        found = _sorted_out(cursor.fetchall())
        if found.left.total() > FEW_ROWS:
            cursor.execute(_COUNTS.format(left=left, **names), parameters)
            found = _sorted_out(cursor.fetchall())
    are_few = found.left.total() <= min(FEW_ROWS, FEW_SHARE * sum(found.labels.values()))
    return found if are_few else replace(found, ids=None)


def _sorted_out(rows: Iterable[tuple[str, str | None, str, int]]) -> _Table:
    ids: defaultdict[str, list[str]] = defaultdict(list)
    table = _Table(ids=ids)
    for label, outcome, identifier, count in rows:
        if outcome is None:
            table.labels[label] = count
        else:
            table.left[label, outcome] += count
            ids[label].append(identifier)
    return table

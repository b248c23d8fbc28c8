"""Reads what a rollback assesses: ledger entries, contacts with their row version, and mapped source rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.entries import COLUMNS, COLUMNS_OF_UPDATE, NUMBER_OF_COLUMNS, entry_of, read_entries
from crm.backfill.read.profiles import read_profiles
from crm.backfill.read.referrers import Referrers, referrer_of
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.snapshots import VERSION, SnapshotReader
from crm.errors import OperatorError
from crm.models import BackfillRun
from crm.outcome import Reason, Refusal, Source
from crm.postgres.apart import read_apart
from crm.postgres.facts.columns import COLUMN
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.rollback.updates import UpdateRecord
from crm.rules.entry import Entry
from crm.rules.mapping import MappedRow, contact_id, map_rows, trimmed, unmapped
from crm.rules.matching import ASSIGNMENT_UNIT
from crm.rules.reverting import SourceRow
from crm.rules.snapshot import ContactSnapshot
from crm.rules.source_rows import SOURCE_TABLES, IntakeRow, ProfileRow, RawRow, SignupRow
from crm.runs.other_rules import OtherRules

_PAGE = f"SELECT {COLUMNS} FROM ledger_entry entry WHERE entry.run_id = %s AND entry.id > %s ORDER BY entry.id LIMIT %s"
# Uses the index on contact_id, which excludes `created` entries.
_MERGES = f"""
SELECT {COLUMNS} FROM ledger_entry entry JOIN unnest(%s::text[]) AS met(id) ON entry.contact_id = met.id
 WHERE entry.outcome = 'merged'
"""
_CREATORS = f"SELECT {COLUMNS} FROM ledger_entry entry WHERE entry.id = ANY(%s) AND entry.outcome = 'created'"
# All changes of a contact are read together, the last one first.
_UPDATED_CONTACTS = """
SELECT contact_id FROM contact_update WHERE run_id = %s AND contact_id COLLATE "C" > %s
 GROUP BY contact_id ORDER BY contact_id COLLATE "C" LIMIT %s
"""
_CHANGES = f"""
SELECT change.id, change.former, change.from_type, change.from_stage, change.to_stage, change.stage_entered_before,
       change.placeholder, change.to_type, {COLUMNS_OF_UPDATE}
  FROM contact_update change
"""
_UPDATES = f"{_CHANGES} WHERE change.run_id = %s AND change.contact_id = ANY(%s) ORDER BY change.id DESC"
_UPDATES_IN = f"{_CHANGES} WHERE change.contact_id = ANY(%s) ORDER BY change.id"
_LABELS = "SELECT id, {label}::text FROM {table} r WHERE id = ANY(%s)"

# A column that the backfill does not write has its default unless it was written elsewhere. Non-constant defaults are
# excluded because they cannot be compared later, and generated columns because they cannot be written.
_OTHER_COLUMNS = r"""
SELECT a.attname, has_column_privilege(c.oid, a.attnum, 'SELECT'), format('CASE WHEN %%s THEN %%L END',
       CASE WHEN d.adbin IS NULL THEN format('c.%%I IS NOT NULL', a.attname)
            ELSE format('c.%%I::text IS DISTINCT FROM (%%s)::%%s::text', a.attname, pg_get_expr(d.adbin, d.adrelid),
                        format_type(a.atttypid, a.atttypmod)) END, a.attname)
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE n.nspname = %s AND c.relname = 'crm_contacts' AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
   AND a.attidentity = '' AND a.attname <> ALL(%s)
   AND (d.adbin IS NULL OR pg_get_expr(d.adbin, d.adrelid) ~
        $constant$^(true|false|-?[0-9.]+|\(-[0-9.]+\)|'[^']*'(::[^()']+)?)$$constant$)
 ORDER BY a.attnum
"""

_ROWS = """
SELECT {values}, {account_changed} FROM (SELECT {columns} FROM {table} r WHERE r.id = ANY(%(ids)s)) r {join}
"""
# A user's email can change without a change to the profile.
_ACCOUNT_CHANGED = "COALESCE(u.changed_at >= %(started_at)s AT TIME ZONE 'UTC', false)"


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads what the rollback of one run needs.

    `set_elsewhere` is an SQL array of the names of columns that the backfill does not write and that are not at their
    default.
    """

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    run: BackfillRun
    set_elsewhere: str
    resolutions: Resolutions
    other_rules: OtherRules
    referrers: Referrers = field(default_factory=Referrers)

    @classmethod
    def of(cls, connection: BaseDatabaseWrapper, facts: DatabaseFacts, run: BackfillRun) -> Reader:
        """Return a reader for the rollback of `run`. Raises OperatorError if this role may not read all columns."""
        resolutions = Resolutions.every(connection)
        other_rules = OtherRules.read(connection)
        return cls(connection, facts, run, _set_elsewhere(connection), resolutions, other_rules)

    def page(self, after: str, size: int) -> list[Entry]:
        """Return at most `size` entries of the run in the order of their ids, those after the id `after`."""
        return self._entries(_PAGE, self.run.pk, after, size)

    def merges_into(self, contact_ids: Sequence[str]) -> list[Entry]:
        """Return the entries, of any run, of rows that were merged into these contacts."""
        return self._entries(_MERGES, contact_ids) if contact_ids else []

    def creators_of(self, contact_ids: Sequence[str]) -> dict[str, Entry]:
        """Return the entries that created these contacts, by contact id, excluding contacts created elsewhere."""
        return {entry.id: entry for entry in self._entries(_CREATORS, contact_ids)} if contact_ids else {}

    def updates(self, after: str, size: int) -> list[UpdateRecord]:
        """Return the changes of the run in at most `size` contacts by id, those after the id `after`."""
        return self.updates_of_run([contact for (contact,) in self._rows(_UPDATED_CONTACTS, self.run.pk, after, size)])

    def updates_of_run(self, contact_ids: Sequence[str]) -> list[UpdateRecord]:
        """Return the changes of the run in these contacts; for each contact, the last change first."""
        return self._records(_UPDATES, self.run.pk, contact_ids) if contact_ids else []

    def updates_in(self, contact_ids: Sequence[str]) -> list[Entry]:
        """Return the changes of all runs in these contacts, in the order in which they were made."""
        return [record.entry for record in self._records(_UPDATES_IN, contact_ids)] if contact_ids else []

    def updates_after_run(self, contact_ids: Sequence[str]) -> list[Entry]:
        """Return the changes by later runs to these contacts."""
        return [entry for entry in self.updates_in(contact_ids) if entry.run_id > self.run.pk]

    def _records(self, query: str, *parameters: Any) -> list[UpdateRecord]:
        found = []
        for values in self._rows(query, *parameters):
            number, former, *steps = values[:-NUMBER_OF_COLUMNS]
            entry = entry_of(values[-NUMBER_OF_COLUMNS:], self.facts.second_digits)
            former_values = json.loads(former) if former else {}
            former_entries = _former_entries(entry, former_values)
            found.append(UpdateRecord(number, entry, former_values, former_entries, *steps))
        sources = self._sources_now([entry for record in found for entry in record.entries])

        def now(entry: Entry) -> Entry:
            return entry._replace(source=sources.get(entry.id, entry.source))

        return [
            record._replace(
                entry=now(record.entry),
                former_entries={unit: now(entry) for unit, entry in record.former_entries.items()},
            )
            for record in found
        ]

    def _sources_now(self, entries: Sequence[Entry]) -> dict[str, str]:
        """Return the current source of each entry's row by entry id: a lead that converted has changed its source."""
        found: dict[str, str] = {}
        for table in self.facts.tables:
            query = _LABELS.format(label=SOURCE_TABLES[table].label_sql(self.facts.missing), table=table)
            ids = {entry.source_id: entry.id for entry in entries if Source(entry.source).table == table}
            for source_id, label in self._rows(query, list(ids)) if ids else ():
                if (source := self.facts.source_of(table, label)) is not None:
                    found[ids[source_id]] = source
        return found

    def contacts(self, contact_ids: Sequence[str]) -> dict[str, ContactSnapshot]:
        """Return the contacts with these ids, by id, without those that do not exist."""
        return SnapshotReader(self.connection, version=VERSION, set_elsewhere=self.set_elsewhere).read(contact_ids)

    def profiles(self, ids: Iterable[str]) -> dict[str, ProfileRow]:
        """Return the profiles with these ids by id, without those that do not exist or cannot be read."""
        found, _ = read_profiles(self.connection, self.facts, sorted(set(ids)))
        return found

    def source_rows(self, entries: Iterable[Entry]) -> dict[str, SourceRow]:
        """Return the current source rows of these entries by entry id. Of several entries of a row, the last counts.

        A row that cannot be read, or whose id is not unique, is returned unmapped, with the reason.
        """
        by_source: dict[Source, list[str]] = {}
        for entry in {entry.id: entry for entry in entries}.values():
            by_source.setdefault(Source(entry.source), []).append(entry.source_id)
        found: dict[str, SourceRow] = {}
        for source, source_ids in by_source.items():
            if source not in self.facts.sources:
                continue
            repeated = set(self.facts.repeated_ids.get(source.table, ())) & set(source_ids)
            read = partial(self._source_rows, source)
            rows, unreadable = read_apart(self.connection, [key for key in source_ids if key not in repeated], read)
            faults = {source_id: (Reason.UNREADABLE, refusal) for source_id, refusal in unreadable.items()}
            faults |= dict.fromkeys(repeated, (Reason.DUPLICATE_ID, Refusal()))
            rows += [SourceRow(unmapped(source.table, source_id, None, *fault)) for source_id, fault in faults.items()]
            found |= {row.mapped.id: row for row in rows}
        return found

    def _source_rows(self, source: Source, source_ids: Sequence[str]) -> list[SourceRow]:
        table = SOURCE_TABLES[source.table]
        sees_changes = table.row is ProfileRow
        query = _ROWS.format(
            values=table.values,
            account_changed=_ACCOUNT_CHANGED if sees_changes else "false",
            columns=table.columns(self.facts.missing),
            table=table.name,
            join=table.join(self.facts.missing, ', "updatedAt" AS changed_at' if sees_changes else ""),
        )
        found = self._rows(query, ids=list(source_ids), started_at=self.run.started_at)
        rows: list[RawRow] = [table.row._make(values) for *values, _ in found]
        rows = self.referrers.add_to(self.connection, self.facts, rows)
        mapped = self.resolutions.applied(map_rows(source, rows, self.facts.rules()))
        return [
            _source_row(row, maps_to, account_changed=account_changed)
            for row, maps_to, (*_, account_changed) in zip(rows, mapped, found, strict=True)
        ]

    def _entries(self, query: str, *parameters: Any) -> list[Entry]:
        return read_entries(self.connection, self.facts.second_digits, query, parameters)

    def _rows(self, query: str, *parameters: Any, **named: Any) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, named or parameters)
            return list(cursor.fetchall())


def _source_row(row: RawRow, mapped: MappedRow, *, account_changed: bool) -> SourceRow:
    if isinstance(row, ProfileRow):
        other_address = account_changed and not (mapped.resolution and mapped.resolution.separate_email)
        # Who is whose preparer changes without a trace in the profile.
        return SourceRow(mapped, may_differ=frozenset({"email"} if other_address else ()) | {*ASSIGNMENT_UNIT})
    if isinstance(row, SignupRow):
        return SourceRow(mapped)
    # Nor who has a code, in the lead; nor which of a person's intakes names the preparer, in the others.
    is_without_trace = isinstance(row, IntakeRow) or referrer_of(row)
    preparer = row.raw_assigned_preparer_id
    return SourceRow(
        mapped,
        raw_preparer=preparer if trimmed(preparer) else None,
        may_differ=frozenset(ASSIGNMENT_UNIT if is_without_trace else ()),
    )


def _former_entries(entry: Entry, former_values: Mapping[str, Any]) -> dict[str, Entry]:
    """Return entries for the rows that the replaced values came from, by unit."""
    found: dict[str, Entry] = {}
    for unit, what in former_values.items():
        if what is not None and "row" in what:
            table, _, source_id = what["row"].partition(":")
            found[unit] = entry._replace(
                id=contact_id(table, source_id),
                source=Source.of_table(table)[0],
                source_id=source_id,
                source_updated_at=what["updated_at"],
                filled=(unit,),
            )
    return found


def _set_elsewhere(connection: BaseDatabaseWrapper) -> str:
    """Return an SQL array of the names of columns that the backfill never writes and that are not at their default."""
    with connection.cursor() as cursor:
        cursor.execute(_OTHER_COLUMNS, [settings.LEGACY_SCHEMA, list(COLUMN.values())])
        columns = cursor.fetchall()
    if hidden := [name for name, readable, _ in columns if not readable]:
        raise OperatorError(
            f"This role may not read crm_contacts.{', '.join(hidden)}. Let the owner GRANT SELECT on the whole table: "
            "a rollback must see what users entered there before it deletes a contact."
        )
    names = ", ".join(name_if_set for *_, name_if_set in columns)
    return f"array_remove(ARRAY[{names}]::text[], NULL)".replace("%", "%%")

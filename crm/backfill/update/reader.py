"""Reads the rows to revisit, and the current state of their contacts. Only reads.

The condition is evaluated for every migrated row, so each part of it costs at most one index probe per row: PostgreSQL
cannot turn a scalar subquery with a LIMIT into a join. A row that was revisited does not satisfy the condition again.
Usually few rows are due. They are listed first, in one pass over rows and entries, and then read by their ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.entries import COLUMNS, read_entries
from crm.backfill.read.referrers import Referrers, codes_of_preparers, preparer_labels
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.snapshots import VERSION, SnapshotReader, missing_columns
from crm.backfill.read.source import (
    ROWS_WITH_ENTRY,
    UNSETTLED,
    Choice,
    Key,
    Page,
    SourceReader,
    address_of_profile,
    entry_of_row,
)
from crm.outcome import ASSIGNMENT, Outcome, Source
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.rules.addresses import canonical_address_sql
from crm.rules.entry import Entry
from crm.rules.mapping import (
    CONTACT_TYPE_OF_SOURCE,
    MappedRow,
    canonical_username_sql,
    has_no_referrer_sql,
    map_rows,
)
from crm.rules.source_rows import CLIENT_PREPARERS, REFERRED_ROWS, SOURCE_TABLES, is_outranked_sql
from crm.rules.updating import RevisitedContact, RowOfContact

_SEEN = "COALESCE(seen_updated_at, source_updated_at) AS seen, seen_updated_at, seen_preparer"
_ENTRY_OF_ROW = entry_of_row(f"outcome, contact_id, {_SEEN}, reason, run_id")
_CONTACT = "FROM crm_contacts c WHERE c.id = entry.contact_id LIMIT 1"
# The row changed, normally to a later time, or it matched a contact and no update has revisited it.
_DUE = f"""
(({{updated_at}} <> entry.seen OR (entry.outcome <> 'created' AND entry.seen_updated_at IS NULL))
 AND (SELECT true {_CONTACT}))
"""
_PLACEHOLDERS = ", ".join(
    f"'{kind.lower()}-' || lower(r.id){of_its_own}"
    for kind in CONTACT_TYPE_OF_SOURCE.values()
    # With and without the hash of an id that is not in lower case: earlier versions did not append it.
    for of_its_own in ("", " || '-' || left(encode(sha256(convert_to(r.id, 'UTF8')), 'hex'), 12)")
)
_HAS_EMAIL_NOW = f"""
(SELECT split_part(c.email, '@', 1) IN ({_PLACEHOLDERS}) AND (
   SELECT now.email IS NOT NULL AND NOT EXISTS (SELECT FROM crm_contacts WHERE email = now.email)
     FROM (SELECT {{address}} AS email OFFSET 0) now)
 {_CONTACT})
"""
# The ledger has the preparer that each row had: another one may come, in another table, while the row stays as it is.
_IS_ANOTHER = "{raw} IS DISTINCT FROM entry.seen_preparer"
_RESOLVED = f"""
({_IS_ANOTHER} AND (SELECT {_IS_ANOTHER.format(raw="id")} FROM profiles WHERE id = {{raw}} OR "userId" = {{raw}}
                     ORDER BY id <> {{raw}} LIMIT 1))
"""
_OF_CLIENT = f"""
(SELECT {_RESOLVED.format(raw='latest."preparerId"')} FROM (
   SELECT "preparerId" FROM {CLIENT_PREPARERS} WHERE "clientId" = r.id AND "isActive"
    ORDER BY "assignedAt" DESC NULLS LAST, id COLLATE "C" LIMIT 1) latest)
"""
# Which of several preparers a code means, the mapping tells.
_OF_REFERRER = """
({referrer} IN (SELECT {code} FROM ({codes}) preparer)
 AND ({referrer} IN (SELECT {code} FROM ({codes}) preparer GROUP BY 1 HAVING count(DISTINCT id) > 1)
      OR ({referrer}, COALESCE(entry.seen_preparer, '')) NOT IN (SELECT {code}, id FROM ({codes}) preparer)))
"""


def _has_another_preparer(facts: DatabaseFacts, source: Source) -> str | None:
    """Return the condition that a row `r` may have another preparer than its `entry` recorded; None if none does.

    It has the parameter `preparer_labels`.
    """
    if source is Source.CLIENTS:
        return None if CLIENT_PREPARERS in facts.missing else _OF_CLIENT
    own, referrer = _columns_of_preparer(facts, source)
    parts = [_RESOLVED.format(raw=f'r."{own}"')] if own else []
    if referrer:
        of_referrer = _OF_REFERRER.format(
            referrer=canonical_username_sql(f'r."{referrer}"'),
            code=canonical_username_sql("preparer.code"),
            codes=codes_of_preparers(facts),
        )
        parts.append(f"""({has_no_referrer_sql(f'r."{own}"')} AND {of_referrer})""" if own else of_referrer)
    if not parts:
        return None
    has_another = f"({' OR '.join(parts)})"
    of_intake = source.table == "tax_intake_leads"
    return f"({has_another} AND NOT {is_outranked_sql(facts.missing)})" if of_intake else has_another


def _columns_of_preparer(facts: DatabaseFacts, source: Source) -> tuple[str | None, str | None]:
    """Return the columns of the source's rows that name a preparer and a referrer, if there are such."""
    table = SOURCE_TABLES[source.table]
    if not issubclass(table.row, REFERRED_ROWS):
        return None, None
    own, referrer = (table.own[field].column for field in ("raw_assigned_preparer_id", "referrer_username"))
    has_own, has_referrer = (f"{table.name}.{column}" not in facts.missing for column in (own, referrer))
    return own if has_own else None, referrer if has_referrer and settings.CRM_ASSIGN_TO_REFERRER else None


def rows_to_revisit(facts: DatabaseFacts, source: Source, *, with_unsettled: bool) -> Choice:
    """Return the condition of the rows of a source that are to be revisited.

    `with_unsettled` adds the rows that are not migrated: a dry run revisits the rows that it would have migrated.
    """
    if not facts.has_ledger:
        return UNSETTLED
    parts = [_DUE.format(updated_at=SOURCE_TABLES[source.table].updated_at)]
    if source.table == "profiles":
        parts.append(_HAS_EMAIL_NOW.format(address=address_of_profile(canonical_address_sql, facts.missing)))
    if has_another := _has_another_preparer(facts, source):
        parts.append(f"({has_another} AND (SELECT true {_CONTACT}))")
    condition = f"entry.outcome <> 'error' AND ({' OR '.join(parts)})"
    if with_unsettled:
        condition = f"{UNSETTLED.condition} OR {condition}"
    return Choice(_ENTRY_OF_ROW, f"({condition})")


# Every row that may be due, in one pass over both tables: one probe per row would be ten times slower.
_MAY_BE_DUE = """
SELECT r.id FROM {table} r JOIN ledger_entry entry ON entry.source_id = r.id AND entry.source = ANY(%(sources)s)
 WHERE entry.outcome <> 'error' AND ({updated_at} <> COALESCE(entry.seen_updated_at, entry.source_updated_at)
                                    OR (entry.outcome <> 'created' AND entry.seen_updated_at IS NULL){or_has_another})
"""
_PLACEHOLDER = f"^({'|'.join(kind.lower() for kind in CONTACT_TYPE_OF_SOURCE.values())})-"
_MAY_HAVE_EMAIL = f"""
SELECT entry.source_id FROM crm_contacts c
  JOIN ledger_entry entry ON entry.contact_id = c.id AND entry.source = ANY(%(sources)s) AND entry.outcome <> 'error'
 WHERE c.email ~ '{_PLACEHOLDER}'
"""
# Not only the latest one: that would cost a sort of the whole table.
_HAS_ANOTHER_PREPARER = f"""
SELECT given."clientId" FROM {CLIENT_PREPARERS} given
  JOIN ledger_entry entry ON entry.source_id = given."clientId" AND entry.source = ANY(%(sources)s)
   AND entry.outcome <> 'error'
 WHERE given."isActive" AND {_IS_ANOTHER.format(raw='given."preparerId"')}
"""
#: The maximum number of rows that are listed.
MAX_LISTED = 50_000


@dataclass(frozen=True, slots=True)
class DueReader(SourceReader):
    """Reads the rows of a source that are due.

    If they are few, it lists them first and skips the others; otherwise it reads all rows. `listed` keeps the list of a
    whole table for its other sources.
    """

    listed: dict[str, Sequence[str] | None] = field(default_factory=dict, compare=False)

    def page(self, after: Key | None, size: int, most_new: int | None = None) -> Page:
        """Return at most `size` due rows that follow a key."""
        table = self.source.table
        if table not in self.listed:
            self.listed[table] = self._few()
        # A dataclass with slots cannot use super() without arguments.
        return SourceReader.page(replace(self, ids=self.listed[table]), after, size, most_new)

    def _few(self) -> list[str] | None:
        """Return the ids of all rows of the table that may be due; None if they are more than MAX_LISTED."""
        table = self.source.table
        of_clients = table == Source.CLIENTS.table
        has_another = None if of_clients else _has_another_preparer(self.facts, self.source)
        query = _MAY_BE_DUE.format(
            table=table,
            updated_at=SOURCE_TABLES[table].updated_at,
            or_has_another=f" OR {has_another}" if has_another else "",
        )
        if of_clients:
            query += f" UNION {_MAY_HAVE_EMAIL}"
            query += "" if CLIENT_PREPARERS in self.facts.missing else f" UNION {_HAS_ANOTHER_PREPARER}"
        parameters = {
            "sources": list(map(str, Source.of_table(table))),
            "preparer_labels": preparer_labels(self.facts),
        }
        with self.connection.cursor() as cursor:
            cursor.execute(f"{query} LIMIT {MAX_LISTED + 1}", parameters)
            found = [identifier for (identifier,) in cursor.fetchall()]
        return found if len(found) <= MAX_LISTED else None


_ENTRIES = f"SELECT {COLUMNS} FROM ledger_entry entry WHERE entry.id = ANY(%s) AND entry.outcome <> 'error'"
# Each part has its own index: at most one row created the contact, and most contacts have no other row.
ENTRIES_OF_CONTACTS = f"""
SELECT {COLUMNS} FROM ledger_entry entry
 WHERE entry.id = ANY(%(ids)s) AND entry.outcome = 'created'
 UNION ALL
SELECT {COLUMNS} FROM ledger_entry entry
 WHERE entry.contact_id = ANY(%(ids)s) AND entry.outcome IN ('merged', 'exists')
"""
# If the contact was modified between two updates, it is unknown who wrote which value.
_GIVEN = """
SELECT contact_id, string_agg(columns, ','),
       CASE WHEN min(contact_updated_at) = max(contact_updated_at) THEN max(contact_updated_at) END
  FROM contact_update WHERE contact_id = ANY(%s) GROUP BY contact_id
"""


@dataclass(frozen=True, slots=True)
class Present:
    """Reads the current entries, rows and contacts.

    `with_versions` needs the right to read `xmin`, which a dry run may lack.
    """

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    resolutions: Resolutions
    with_versions: bool
    referrers: Referrers = field(default_factory=Referrers)

    def entries(self, rows: Iterable[MappedRow]) -> dict[str, Entry]:
        """Return the entries of the migrated rows among these, by id."""
        return {entry.id: entry for entry in self._entries(_ENTRIES, [[row.id for row in rows]])}

    def entries_of(self, contacts: Collection[str]) -> list[Entry]:
        """Return the entries of the rows that created or matched these contacts."""
        return self._entries(ENTRIES_OF_CONTACTS, {"ids": list(contacts)})

    def _entries(self, query: str, parameters: Any) -> list[Entry]:
        if not self.facts.has_ledger:
            return []
        return read_entries(self.connection, self.facts.second_digits, query, parameters)

    def contacts(self, ids: Collection[str]) -> dict[str, RevisitedContact]:
        """Return the contacts with these ids that exist, by id, without their rows."""
        version = VERSION if self.with_versions else "''"
        reader = SnapshotReader(self.connection, missing_columns(self.facts), version=version)
        contacts = {key: RevisitedContact(snapshot) for key, snapshot in reader.read(ids).items()}
        if self.facts.has_ledger:
            for key, given, left_at in self._rows(_GIVEN, [list(contacts)]):
                contacts[key].given, contacts[key].left_at = set(_names(given)), left_at
        return contacts

    def add_rows(self, contacts: Mapping[str, RevisitedContact], entries: Sequence[Entry]) -> None:
        """Read the rows of contacts by their entries, in canonical order: those with a resolution come last."""
        by_id = {entry.id: entry for entry in entries if entry.contact_id in contacts}
        rows: dict[str, list[RowOfContact]] = {}
        for found in sorted(self._rows_of(by_id), key=lambda found: found.row.resolution is not None):
            rows.setdefault(found.entry.contact_id, []).append(found)
        entries_left = Counter(entry.contact_id for entry in by_id.values())
        for contact_id, contact in contacts.items():
            contact.rows = rows.get(contact_id, ())
            contact.has_all_rows = len(contact.rows) == entries_left[contact_id]
        for entry in by_id.values():
            contact = contacts[entry.contact_id]
            contact.was_assigned = contact.was_assigned or ASSIGNMENT in entry.filled
            if entry.outcome is Outcome.CREATED:
                contact.made_at = entry.written_at
        for entry in by_id.values():
            contact = contacts[entry.contact_id]
            if contact.made_at is not None and not contact.is_as_written:
                contact.given.update(entry.filled)

    def _rows_of(self, entries: Mapping[str, Entry]) -> Iterator[RowOfContact]:
        for source in self.facts.sources:
            ids = [entry.source_id for entry in entries.values() if entry.table == source.table]
            if not ids:
                continue
            reader = SourceReader(
                self.connection, self.facts, source, choice=ROWS_WITH_ENTRY, ids=ids, referrers=self.referrers
            )
            after: Key | None = None
            while (page := reader.page(after, len(ids))).rows:
                after = page.key
                for row in self.resolutions.applied(map_rows(source, page.rows, self.facts.rules())):
                    yield RowOfContact(entries[row.id], source, row)
                if page.is_last:
                    break

    def _rows(self, query: str, parameters: Any) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            return list(cursor.fetchall())


def _names(names: str | None) -> frozenset[str]:
    return frozenset(names.split(",")) if names else frozenset()

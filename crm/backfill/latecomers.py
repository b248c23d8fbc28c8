"""Removes duplicates: contacts that the application stored during a run, with another spelling of an address.

    scan the contacts -> find duplicates created by the backfill -> lock, compare, delete -> match their rows again

A batch finds existing contacts by the likely spellings of an address. Other spellings are handled after the last
source: the contact that the run created is deleted, and its rows are matched again as if the other contact had existed
before. A separate batch subtracts the former outcomes from the counts and adds the new ones, so that run, batches and
ledger still agree. The addresses that an update wrote in place of a placeholder are checked too, and so are contacts of
earlier runs since the last finished one, which may have ended before this step.

A contact of the backfill is kept if it was modified since or a row refers to it. All are kept if the role may not
delete. The record of the run stores the ids of kept contacts: every later run checks them again, and reports them until
one of the two contacts is deleted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet

from crm.backfill.read.contacts import ContactIndex
from crm.backfill.read.entries import COLUMNS, read_entries
from crm.backfill.read.noncanonical_emails import noncanonical_addresses
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.snapshots import SnapshotReader, missing_columns
from crm.backfill.read.source import ROWS_WITH_ENTRY, SourceReader
from crm.backfill.write.writer import BatchWriter
from crm.errors import OperatorError
from crm.models import BackfillBatch, BackfillRun, ContactUpdate, LedgerEntry
from crm.models.ledger import RunStatus
from crm.outcome import ASSIGNMENT, AssignedBy, Outcome, Source, Totals
from crm.postgres.facts.foreign_keys import find_cascades, find_foreign_keys, is_unreferenced
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.transactions import Timeouts
from crm.postgres.trust import UntrustedCodeError, require_still_trusted
from crm.rules.entry import Entry
from crm.rules.mapping import ContactDraft, MappedRow, map_rows
from crm.rules.matching import ExistingContact, fill
from crm.runs import lease

#: Maximum number of contacts in one transaction.
MAX_CONTACTS = 100
#: The key under which the record of a run stores the kept contacts.
RECORDED = "contacts_twice"

_MAY_DELETE = """
SELECT has_table_privilege('crm_contacts', 'DELETE') AND has_table_privilege('ledger_entry', 'DELETE')
"""
_OURS = """
SELECT c.id FROM crm_contacts c
 WHERE c.email = ANY(%(addresses)s)
   AND (c.id = ANY(%(known)s)
        OR EXISTS (SELECT FROM ledger_entry entry
                    WHERE entry.id = c.id AND entry.outcome = 'created' AND entry.run_id > %(since)s)
        OR EXISTS (SELECT FROM contact_update change
                    WHERE change.contact_id = c.id AND change.placeholder IS NOT NULL AND change.run_id > %(since)s))
"""
# Waits for transactions that are adding a row that refers to one of them. The statements that follow see these rows.
_LOCK = "SELECT id FROM crm_contacts WHERE id = ANY(%s) ORDER BY id FOR UPDATE"
_ENTRIES = f"""
SELECT {COLUMNS} FROM ledger_entry entry
 WHERE entry.contact_id = ANY(%s) AND entry.outcome IN ('created', 'merged')
"""


class ContactsTwice(NamedTuple):
    """Contacts of the backfill whose address another contact has in another spelling, and why they are kept."""

    contacts: Sequence[str] = ()
    why: str = ""


NONE_TWICE = ContactsTwice()


class _Finished(NamedTuple):
    """The last finished run, 0 if there is none, and the contacts that it kept beside another one."""

    run_id: int = 0
    left: Sequence[str] = ()


def last_finished(connection: BaseDatabaseWrapper, before: int | None = None) -> _Finished:
    """Return the last finished run, and the contacts that it kept beside another one.

    `before` excludes that run and later ones.
    """
    finished = _runs(connection).filter(status=RunStatus.FINISHED).order_by("-pk")
    if before is not None:
        finished = finished.filter(pk__lt=before)
    run_id, left = finished.values_list("pk", f"census__{RECORDED}").first() or (0, None)
    return _Finished(run_id, left or ())


def _runs(connection: BaseDatabaseWrapper) -> QuerySet[BackfillRun]:
    return BackfillRun.objects.using(connection.alias).filter(kind=BackfillRun.Kind.BACKFILL)


@dataclass(slots=True)
class Latecomers:
    """Removes the duplicates after the last source of a run. `twice` are the contacts that are kept."""

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    run_id: int
    twice: ContactsTwice = NONE_TWICE

    def are_possible(self, created: int) -> bool:
        """Return whether duplicates are possible. `created` is the number of contacts that this run created.

        They are possible if this run, or one since the last finished run, wrote an address, or if that run kept some.
        """
        since, left = last_finished(self.connection, self.run_id)
        unfinished = _runs(self.connection).filter(pk__gt=since, pk__lt=self.run_id, created__gt=0)
        replaced = ContactUpdate.objects.using(self.connection.alias).filter(
            run_id__gt=since, placeholder__isnull=False
        )
        return created > 0 or bool(left) or unfinished.exists() or replaced.exists()

    def remove(self) -> Iterator[None]:
        """Remove the duplicates, one transaction per step; the caller may stop between two steps.

        After a transient error, another call continues. Raises lease.LeaseLostError.
        """
        twice = sorted(self._duplicates())
        if not twice:
            return
        if obstacle := self._obstacle():
            self.twice = ContactsTwice(twice, obstacle)
            return
        stay: list[str] = []
        writer = BatchWriter(self.connection, ContactIndex(self.connection, self.facts), self.run_id, Timeouts())
        for first in range(0, len(twice), MAX_CONTACTS):
            some = twice[first : first + MAX_CONTACTS]
            stay += self._remove(some, writer)
            self.twice = ContactsTwice(stay, "they were modified, or rows refer to them") if stay else NONE_TWICE
            yield

    def _duplicates(self) -> set[str]:
        """Return the contacts of the backfill whose address another contact has in another spelling.

        Only those that were written since the last finished run, or that it kept.
        """
        since, left = last_finished(self.connection, self.run_id)
        found: set[str] = set()
        for page in noncanonical_addresses(self.connection, "crm_contacts"):
            with self.connection.cursor() as cursor:
                cursor.execute(
                    _OURS, {"since": since, "known": list(left), "addresses": [address for _, address in page]}
                )
                found.update(identifier for (identifier,) in cursor.fetchall())
        return found

    def _obstacle(self) -> str | None:
        """Return why no contact can be deleted, or None."""
        with self.connection.cursor() as cursor:
            cursor.execute(_MAY_DELETE)
            if cursor.fetchone() != (True,):
                return "this role may not delete contacts (docs/least_privilege.sql, rollback=on)"
        try:
            require_still_trusted(self.connection, "crm_contacts")
            find_foreign_keys(self.connection)
        except UntrustedCodeError:
            return "a table that refers to contacts belongs to a role that is not trusted"
        except OperatorError:
            return "this role cannot read every table that may refer to a contact"
        return None

    def _remove(self, ids: Sequence[str], writer: BatchWriter) -> list[str]:
        """Remove some of the duplicates in one transaction, and return those that are kept."""
        started = time.monotonic()
        written = ("crm_contacts", "backfill_batch", *find_cascades(self.connection))
        with lease.batch(self.connection, self.run_id, Timeouts(), *written) as totals:
            with self.connection.cursor() as cursor:
                cursor.execute(_LOCK, [list(ids)])
            entries = read_entries(self.connection, self.facts.second_digits, _ENTRIES, [list(ids)])
            rows = self._rows(entries)
            gone = self._delete(self._unmodified(ids, entries, rows))
            entries = [entry for entry in entries if entry.contact_id in gone]
            self._delete_entries(entries, rows)
            for source in Source:
                of_source = self._match_again(source, entries, rows, gone, writer)
                if of_source is not None:
                    batch = BackfillBatch.of(self.run_id, source, of_source, time.monotonic() - started)
                    batch.save(using=self.connection.alias, force_insert=True)
                    totals.add(of_source)
        return [identifier for identifier in ids if identifier not in gone]

    def _rows(self, entries: Iterable[Entry]) -> dict[tuple[str, str], MappedRow]:
        """Return the current source rows of the entries by source and id, in the order in which a run reads them."""
        resolutions, rules = Resolutions.every(self.connection), self.facts.rules()
        found: dict[tuple[str, str], MappedRow] = {}
        for source in self.facts.sources:
            ids = [entry.source_id for entry in entries if entry.source == source]
            if ids:
                reader = SourceReader(self.connection, self.facts, source, ids=ids, choice=ROWS_WITH_ENTRY)
                rows = resolutions.applied(map_rows(source, reader.page(None, len(ids)).rows, rules))
                found |= {(source.value, row.source_id): row for row in rows}
        return found

    def _unmodified(
        self, ids: Iterable[str], entries: Sequence[Entry], rows: dict[tuple[str, str], MappedRow]
    ) -> list[str]:
        """Return the contacts that are what their rows map to, and that no update changed."""
        contacts = SnapshotReader(self.connection, missing_columns(self.facts)).read(ids)
        updates = ContactUpdate.objects.using(self.connection.alias).filter(contact_id__in=list(contacts))
        updated = set(updates.values_list("contact_id", flat=True))
        of_contact: dict[str, list[Entry]] = {}
        for entry in entries:
            of_contact.setdefault(entry.contact_id, []).append(entry)
        return [
            identifier
            for identifier, contact in contacts.items()
            if identifier not in updated and _written(of_contact.get(identifier, ()), rows) == contact.values
        ]

    def _delete(self, ids: list[str]) -> dict[str, str]:
        """Delete the contacts that no row refers to. Returns their types by id."""
        unreferenced = is_unreferenced(find_foreign_keys(self.connection))
        with self.connection.cursor() as cursor:
            cursor.execute(
                f'DELETE FROM crm_contacts c WHERE c.id = ANY(%s) AND {unreferenced} RETURNING c.id, c."contactType"',
                [ids],
            )
            return dict(cursor.fetchall())

    def _delete_entries(self, entries: Iterable[Entry], rows: dict[tuple[str, str], MappedRow]) -> None:
        keys = [rows[entry.source, entry.source_id].id for entry in entries]
        LedgerEntry.objects.using(self.connection.alias).filter(pk__in=keys).delete()

    def _match_again(
        self,
        source: Source,
        entries: Iterable[Entry],
        rows: dict[tuple[str, str], MappedRow],
        types: dict[str, str],
        writer: BatchWriter,
    ) -> Totals | None:
        """Match the rows of a source again. Returns the counts, less the former outcomes from this run."""
        theirs = {(entry.source, entry.source_id): entry for entry in entries if entry.source == source}
        if not theirs:
            return None
        totals = writer.upsert_page(source, [row for key, row in rows.items() if key in theirs])
        before = [entry for entry in theirs.values() if entry.run_id == self.run_id]
        made = [entry for entry in before if entry.outcome == Outcome.CREATED]
        totals.read -= len(before)
        totals.created -= len(made)
        totals.merged -= len(before) - len(made)
        totals.created_by_type.subtract(Counter(types[entry.contact_id] for entry in made))
        for entry in before:
            # As the outcome of the row was counted.
            by = rows[entry.source, entry.source_id].assigned_by
            if by is AssignedBy.UNRESOLVED or (by is not None and ASSIGNMENT in entry.filled):
                totals.assignments[by.value] -= 1
        return totals


def _written(entries: Iterable[Entry], rows: dict[tuple[str, str], MappedRow]) -> ContactDraft | None:
    """Return the contact that its rows wrote; None if they no longer show it."""
    outcomes = {(entry.source, entry.source_id): entry.outcome for entry in entries}
    theirs = [(key, row) for key, row in rows.items() if key in outcomes]
    makers = [row.draft for key, row in theirs if outcomes[key] == Outcome.CREATED]
    if len(theirs) < len(outcomes) or len(makers) != 1 or makers[0] is None:
        return None
    contact = ExistingContact.of_draft(makers[0])
    for key, row in theirs:
        if row.draft is None or row.resolution is not None:
            return None
        if outcomes[key] == Outcome.MERGED:
            fill(contact, row.draft)
    return makers[0]._replace(**contact.fills)

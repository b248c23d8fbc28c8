"""Contacts that the application stored during a run, in another spelling of an address for which the run made one.

    pass over the contacts -> those of ours that have company -> lock, compare, delete -> settle their rows again

A batch meets what is there by then, in the spellings that are likely. The others are settled when the sources are
through: what the run made is taken out again, and its rows are settled as if the other contact had been there before.
They are counted out and in by a batch of their own, so run, batches and ledger go on agreeing. The same is asked of the
addresses that an update wrote in the place of a placeholder. What earlier runs wrote that never came to this is looked
at as well, back to the last one that finished.

A contact of ours that an update, or somebody else, has changed or refers to stays, as all of them do where the role may
not delete. The run's record keeps their ids: every run that follows looks at them again, and reports them for as long
as both contacts are there.
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
from crm.backfill.read.source import EVERY_ROW, SourceReader
from crm.backfill.write.writer import BatchWriter
from crm.errors import OperatorError
from crm.models import BackfillBatch, BackfillRun, ContactUpdate, LedgerEntry
from crm.models.ledger import RunStatus
from crm.outcome import Outcome, Source, Totals
from crm.postgres.facts.foreign_keys import find_foreign_keys, is_unreferenced
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.transactions import Timeouts, lock_as_a_writer
from crm.postgres.trust import UntrustedCodeError
from crm.rules.entry import Entry
from crm.rules.mapping import ContactDraft, MappedRow, map_rows
from crm.rules.matching import ExistingContact, fill
from crm.runs import lease

#: How many contacts are settled in one transaction.
CONTACTS_AT_ONCE = 100
#: The name under which a run's record keeps the contacts that stay.
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
# Whoever is just referring to one of them is waited for, and seen by the statements that follow.
_LOCK = "SELECT id FROM crm_contacts WHERE id = ANY(%s) ORDER BY id FOR UPDATE"
_ENTRIES = f"""
SELECT {COLUMNS} FROM ledger_entry entry
 WHERE entry.contact_id = ANY(%s) AND entry.outcome IN ('created', 'merged')
"""


class ContactsTwice(NamedTuple):
    """Contacts of ours that stay although another one has the same address in another spelling, and why they do."""

    contacts: Sequence[str] = ()
    why: str = ""


NOBODY_TWICE = ContactsTwice()


class _Finished(NamedTuple):
    """The last run that finished, 0 where none did, and the contacts that stayed then."""

    run_id: int = 0
    left: Sequence[str] = ()


def last_finished(connection: BaseDatabaseWrapper, before: int | None = None) -> _Finished:
    """The last run that finished, of those before a run, and the contacts that stayed beside another one then."""
    finished = _runs(connection).filter(status=RunStatus.FINISHED).order_by("-pk")
    if before is not None:
        finished = finished.filter(pk__lt=before)
    run_id, left = finished.values_list("pk", f"census__{RECORDED}").first() or (0, None)
    return _Finished(run_id, left or ())


def _runs(connection: BaseDatabaseWrapper) -> QuerySet[BackfillRun]:
    return BackfillRun.objects.using(connection.alias).filter(kind=BackfillRun.Kind.BACKFILL)


@dataclass(slots=True)
class Latecomers:
    """Settles what was stored during a run, when its sources are through. `twice` are those that stay."""

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    run_id: int
    twice: ContactsTwice = NOBODY_TWICE

    def are_possible(self, created: int) -> bool:
        """Whether this run, or one before it that did not finish, wrote an address at all; or contacts stayed then."""
        since, left = last_finished(self.connection, self.run_id)
        unfinished = _runs(self.connection).filter(pk__gt=since, pk__lt=self.run_id, created__gt=0)
        replaced = ContactUpdate.objects.using(self.connection.alias).filter(
            run_id__gt=since, placeholder__isnull=False
        )
        return created > 0 or bool(left) or unfinished.exists() or replaced.exists()

    def settle(self) -> Iterator[None]:
        """Settle them, step by step: a caller may stop between two of them. Raises lease.LeaseLostError.

        What a step did is committed: after a transient error, the next call goes on where this one stopped.
        """
        twice = sorted(self._with_company())
        if not twice:
            return
        if obstacle := self._obstacle():
            self.twice = ContactsTwice(twice, obstacle)
            return
        stay: list[str] = []
        writer = BatchWriter(self.connection, ContactIndex(self.connection, self.facts), self.run_id, Timeouts())
        for first in range(0, len(twice), CONTACTS_AT_ONCE):
            some = twice[first : first + CONTACTS_AT_ONCE]
            stay += self._settle(some, writer)
            self.twice = ContactsTwice(stay, "they have been changed, or are referred to") if stay else NOBODY_TWICE
            yield

    def _with_company(self) -> set[str]:
        """Return the contacts whose address another one has, in another spelling.

        Of these, those that were written since the last run that finished, or that stayed then.
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
        """Why nothing can be taken out at all."""
        with self.connection.cursor() as cursor:
            cursor.execute(_MAY_DELETE)
            if cursor.fetchone() != (True,):
                return "this role may not delete contacts (docs/least_privilege.sql, rollback=on)"
        try:
            find_foreign_keys(self.connection)
        except UntrustedCodeError:
            return "a table that refers to contacts belongs to a role that is not trusted"
        except OperatorError:
            return "this role cannot see everything that may refer to a contact"
        return None

    def _settle(self, ids: Sequence[str], writer: BatchWriter) -> list[str]:
        """Settle some of them in one transaction; those that stay."""
        started = time.monotonic()
        with lease.batch(self.connection, self.run_id, Timeouts(), lock_as_a_writer("crm_contacts")) as totals:
            with self.connection.cursor() as cursor:
                cursor.execute(_LOCK, [list(ids)])
            entries = read_entries(self.connection, self.facts.second_digits, _ENTRIES, [list(ids)])
            rows = self._rows(entries)
            gone = self._deleted(self._untouched(ids, entries, rows))
            entries = [entry for entry in entries if entry.contact_id in gone]
            self._forget(entries, rows)
            for source in Source:
                of_source = self._settle_again(source, entries, rows, gone, writer)
                if of_source is not None:
                    batch = BackfillBatch.of(self.run_id, source, of_source, time.monotonic() - started)
                    batch.save(using=self.connection.alias, force_insert=True)
                    totals.add(of_source)
        return [identifier for identifier in ids if identifier not in gone]

    def _rows(self, entries: Iterable[Entry]) -> dict[tuple[str, str], MappedRow]:
        """The source rows of entries as they are now, by source and id, in the order in which a run takes them."""
        resolutions, rules = Resolutions.every(self.connection), self.facts.rules()
        found: dict[tuple[str, str], MappedRow] = {}
        for source in Source:
            ids = [entry.source_id for entry in entries if entry.source == source]
            if ids:
                reader = SourceReader(self.connection, self.facts, source, ids=ids, choice=EVERY_ROW)
                rows = resolutions.applied(map_rows(source, reader.page(None, len(ids)).rows, rules))
                found |= {(source.value, row.source_id): row for row in rows}
        return found

    def _untouched(
        self, ids: Iterable[str], entries: Sequence[Entry], rows: dict[tuple[str, str], MappedRow]
    ) -> list[str]:
        """The contacts that are what their rows made of them, and that no update has changed."""
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

    def _deleted(self, ids: list[str]) -> dict[str, str]:
        """Delete those of the contacts that nobody refers to; their types by id."""
        unreferenced = is_unreferenced(find_foreign_keys(self.connection))
        with self.connection.cursor() as cursor:
            cursor.execute(
                f'DELETE FROM crm_contacts c WHERE c.id = ANY(%s) AND {unreferenced} RETURNING c.id, c."contactType"',
                [ids],
            )
            return dict(cursor.fetchall())

    def _forget(self, entries: Iterable[Entry], rows: dict[tuple[str, str], MappedRow]) -> None:
        keys = [rows[entry.source, entry.source_id].id for entry in entries]
        LedgerEntry.objects.using(self.connection.alias).filter(pk__in=keys).delete()

    def _settle_again(
        self,
        source: Source,
        entries: Iterable[Entry],
        rows: dict[tuple[str, str], MappedRow],
        types: dict[str, str],
        writer: BatchWriter,
    ) -> Totals | None:
        """Settle the rows of a source, and count out what they were before in this run."""
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
        return totals


def _written(entries: Iterable[Entry], rows: dict[tuple[str, str], MappedRow]) -> ContactDraft | None:
    """What the rows of a contact made of it; None where they do not tell any more."""
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

"""Repairs a batch of contacts in one transaction, or returns what would be repaired."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.write.upsert import MAX_ATTEMPTS
from crm.backfill.write.writer import first_trigger, lock_contacts
from crm.fields import array_types, as_columns, unnest
from crm.models import BackfillBatch, ContactUpdate, CRMContact
from crm.outcome import Refusal
from crm.postgres.apart import write_apart
from crm.postgres.errors import RewrittenError
from crm.postgres.facts.schema import SOURCE_OF_STRAYS
from crm.postgres.refusals import in_words, names_of_the_schema
from crm.postgres.transactions import Timeouts
from crm.repair.reader import AddressesOnDisk, Reader
from crm.repair.rules import (
    PREPARER,
    TYPE,
    Given,
    KeepCause,
    RepairOutcome,
    decide,
    keep_conflicts,
    totals_by_repair,
)
from crm.rules.mapping import Rules, contact_id
from crm.rules.snapshot import ContactSnapshot
from crm.runs import lease
from crm.try_execute import try_execute

logger = logging.getLogger(__name__)

_FIELDS = {field.attname: field for field in CRMContact._meta.concrete_fields}
#: The tables that a batch writes: see `crm.postgres.transactions.WrittenTables`.
_WRITTEN, _INSERTED = ("backfill_batch", "contact_update"), ("crm_contacts",)
#: The results for one contact.
_Group = Sequence[RepairOutcome]


class Writer(Protocol):
    """Repairs contacts, or returns what would be repaired."""

    def repair(self, ids: Sequence[str]) -> list[RepairOutcome]:
        """Repair the contacts with these ids."""


class DryRunWriter:
    """Returns what would be repaired, and writes nothing."""

    def __init__(self, reader: Reader, rules: Rules) -> None:
        self._reader = reader
        self._rules = rules
        self._given = AddressesOnDisk()

    def repair(self, ids: Sequence[str]) -> list[RepairOutcome]:
        """Return how a batch would end. What the database would refuse cannot be predicted."""
        outcomes, _ = _decide(ids, self._reader, self._rules, self._given, anew=False)
        return outcomes


def _decide(
    ids: Sequence[str], reader: Reader, rules: Rules, given: Given, *, anew: bool
) -> tuple[list[RepairOutcome], dict[str, ContactSnapshot]]:
    """Return the results for contacts as they are now, and these contacts."""
    contacts = reader.contacts(ids)
    drafts = [contact.values for contact in contacts.values()]
    outcomes = decide(drafts, reader.repairs, reader.profiles(drafts), rules)
    addresses = {found.value for found in outcomes if found.changed and found.column == "email"}
    return keep_conflicts(outcomes, reader.owners(addresses, anew=anew), given), contacts


@dataclass(slots=True)
class _Written:
    """The results that are final, the `updatedAt` of the written contacts, and the contacts to read again."""

    outcomes: list[RepairOutcome] = field(default_factory=list)
    updated_at: dict[str, str] = field(default_factory=dict)
    changed_meanwhile: list[_Group] = field(default_factory=list)


class DatabaseWriter:
    """Repairs contacts in batches of one run, each in its own transaction."""

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        reader: Reader,
        rules: Rules,
        run_id: int,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._rules = rules
        self._run_id = run_id
        self._timeouts = timeouts or Timeouts()
        self._logged: set[Refusal] = set()

    def repair(self, ids: Sequence[str]) -> list[RepairOutcome]:
        """Repair a batch of contacts. Contacts, records, counts and heartbeat are committed together.

        Raises lease.LeaseLostError if the run has lost the lease, and django.db.DatabaseError for a transient error.
        Nothing of the batch is written then.
        """
        started = time.monotonic()
        with lease.batch(self._connection, self._run_id, self._timeouts, *_WRITTEN, inserted=_INSERTED) as totals:
            written = self._write(ids)
            self._record(written)
            for repair, counts in totals_by_repair(written.outcomes).items():
                totals.add(counts)
                batch = BackfillBatch.of(self._run_id, repair, counts, time.monotonic() - started)
                batch.save(using=self._connection.alias, force_insert=True)
        return written.outcomes

    def _write(self, ids: Sequence[str]) -> _Written:
        """Decide and write. If a contact changed concurrently, it is read again.

        A contact that cannot be written after MAX_ATTEMPTS, or whose UPDATE a trigger suppresses, counts as refused.
        """
        written = _Written()
        waiting, attempts = list(ids), 0
        while waiting:
            attempts += 1
            outcomes, contacts = _decide(waiting, self._reader, self._rules, set(), anew=attempts == 1)
            self._write_apart(outcomes, contacts, written)
            left, written.changed_meanwhile = written.changed_meanwhile, []
            if left and attempts == MAX_ATTEMPTS:
                self._log([Refusal(trigger=first_trigger(self._connection, "UPDATE"))])
                written.outcomes += _refused(left)
                break
            waiting = [group[0].contact.id for group in left]
        return written

    def _write_apart(
        self, outcomes: Iterable[RepairOutcome], contacts: dict[str, ContactSnapshot], written: _Written
    ) -> None:
        """Write contacts. If PostgreSQL refuses one, bisect until it is alone, so that the others are written."""
        groups: dict[str, list[RepairOutcome]] = {}
        for outcome in outcomes:
            groups.setdefault(outcome.contact.id, []).append(outcome)
        to_write = []
        for contact in sorted(groups):
            if any(outcome.changed for outcome in groups[contact]):
                to_write.append(groups[contact])
            else:
                written.outcomes += groups[contact]
        apart = write_apart(self._connection, to_write, lambda some: self._write_groups(some, contacts))
        for some, updated_at in apart.done:
            written.updated_at |= updated_at
            for group in some:
                if group[0].contact.id in updated_at:
                    written.outcomes += group
                else:
                    written.changed_meanwhile.append(group)
        self._log({refusal for _, refusal in apart.refused})
        written.outcomes += _refused(group for group, _ in apart.refused)

    def _write_groups(self, groups: Sequence[_Group], contacts: dict[str, ContactSnapshot]) -> dict[str, str]:
        """Write the contacts that are unchanged since they were read, and return their `updatedAt` by id.

        Only the repaired columns are written. Raises RewrittenError if a trigger changed one of them.
        """
        values = {
            group[0].contact.id: {outcome.column: outcome.value for outcome in group if outcome.changed}
            for group in groups
        }
        by_columns: dict[tuple[str, ...], list[str]] = {}
        for contact, columns in values.items():
            by_columns.setdefault(tuple(columns), []).append(contact)
        lock_contacts(self._connection, values)
        written: list[str] = []
        for names, ids in by_columns.items():
            rows = [(contact, contacts[contact].version, *values[contact].values()) for contact in ids]
            written += try_execute(self._connection, _statement(names, self._connection), as_columns(rows))
        after = self._reader.contacts(sorted(written))
        for contact, found in after.items():
            if any(getattr(found.values, name) != value for name, value in values[contact].items()):
                raise RewrittenError(first_trigger(self._connection, "UPDATE"))
        return {contact: found.values.updated_at for contact, found in after.items()}

    def _log(self, refusals: Iterable[Refusal]) -> None:
        """Log each reason for which contacts were refused once."""
        for refusal in {names_of_the_schema(self._connection, refusal) for refusal in refusals} - self._logged:
            self._logged.add(refusal)
            logger.warning(
                "the database refuses a repair of a contact (%s): the contact stays unchanged and counts as refused; "
                "this message is logged once",
                in_words(refusal),
            )

    def _record(self, written: _Written) -> None:
        changes = [self._change(outcome, written.updated_at) for outcome in written.outcomes if outcome.changed]
        ContactUpdate.objects.using(self._connection.alias).bulk_create(changes, batch_size=1_000)

    def _change(self, outcome: RepairOutcome, updated_at: dict[str, str]) -> ContactUpdate:
        contact, profile = outcome.contact, outcome.profile
        if profile is None or profile.updated_at is None:
            raise AssertionError(outcome.repair)
        source = self._reader.facts.source_of("profiles", profile.role) or SOURCE_OF_STRAYS["profiles"]
        change = ContactUpdate(
            run_id=self._run_id,
            line_id=contact_id("profiles", profile.id),
            source=source,
            source_id=profile.id,
            contact_id=contact.id,
            columns=outcome.changed,
            source_updated_at=profile.updated_at,
            contact_updated_at=updated_at[contact.id],
        )
        if outcome.changed == PREPARER:
            change.former = {PREPARER: {"values": [contact.assigned_preparer_id]}}
        elif outcome.changed == TYPE:
            change.from_type, change.to_type = contact.contact_type, outcome.value
        else:
            change.placeholder = contact.email
        return change


def _refused(groups: Iterable[_Group]) -> Iterator[RepairOutcome]:
    for group in groups:
        for outcome in group:
            yield outcome.kept(KeepCause.REFUSED) if outcome.changed else outcome


def _statement(names: Sequence[str], connection: BaseDatabaseWrapper) -> str:
    """Return the UPDATE of these columns of contacts that still have the row version that was read."""
    columns = array_types([_FIELDS[name] for name in names], connection)
    return (
        f"UPDATE crm_contacts c SET {', '.join(f'{column} = v.{column}' for column in columns)} "
        f"FROM {unnest('v', {'id': 'text[]', 'version': 'text[]', **columns})} "
        "WHERE c.id = v.id AND c.xmin = v.version::xid RETURNING c.id"
    )

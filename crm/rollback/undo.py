"""Undoes a batch of entries in one transaction.

entries -> assess (read and compare) -> lock -> delete contacts, remove merges -> delete entries -> counts, heartbeat

The assessment takes no locks. It records the version (`xmin`) of each contact row, and a contact is only written if it
still has that version. The contacts are locked FOR UPDATE first: the lock waits for transactions that are adding a row
that refers to the contact, and blocks new ones. The DELETE is a separate statement, so it sees what these transactions
committed, and deletes a contact only if its version is unchanged and no row of any table refers to it. A DELETE without
the lock would check the other tables before it waits, and would delete the interaction that it waited for. This
requires a snapshot for each statement: `crm.postgres.session` makes every transaction READ COMMITTED.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.update.writer import stage_history_id, write_contacts
from crm.backfill.write.writer import lock_contacts
from crm.fields import array_types, as_columns, unnest
from crm.models import BackfillRun, CRMContact, CRMStageHistory, LedgerEntry, Rollback
from crm.outcome import Outcome, Totals, UpdateOutcome
from crm.postgres.apart import write_apart
from crm.postgres.facts.columns import COLUMN
from crm.postgres.facts.foreign_keys import (
    Reference,
    find_cascades,
    find_foreign_keys,
    is_unreferenced,
    referring_tables,
)
from crm.postgres.transactions import Timeouts
from crm.postgres.trust import require_still_trusted
from crm.rollback.ahead import Page
from crm.rollback.reader import Reader
from crm.rollback.repairs import assess_repairs, before_repair
from crm.rollback.updates import AssessedUpdates, Restored, UpdateRecord, assess_updates
from crm.rules.entry import Entry
from crm.rules.reverting import (
    Assessment,
    KeepReason,
    Rows,
    Status,
    before_merge,
    confidence_of,
    differs_from_merge,
    edited_columns,
    is_expired,
    is_unchanged,
    is_written_over,
    maps_to_nothing,
    merges_that_miss,
    mismatch_reason,
)
from crm.rules.snapshot import ContactSnapshot
from crm.runs import lease
from crm.runs.other_rules import OtherRules
from crm.try_execute import try_execute

_SEEN_COLUMNS = {"id": "text[]", "version": "text[]"}
_SEEN = unnest("seen", _SEEN_COLUMNS)
_AS_SEEN = "c.id = seen.id AND c.xmin = seen.version::xid"
_LOCK = f"SELECT c.id FROM crm_contacts c JOIN {_SEEN} ON {_AS_SEEN} ORDER BY c.id FOR UPDATE OF c"
_DELETE = f"DELETE FROM crm_contacts c USING {_SEEN} WHERE {_AS_SEEN} AND {{unreferenced}} RETURNING c.id"
_FIND_KEPT = f"""
SELECT c.id, c.xmin::text = seen.version, {{tables}} FROM crm_contacts c JOIN {_SEEN} ON c.id = seen.id
"""
_FORGET_ENTRIES = "DELETE FROM ledger_entry WHERE id = ANY(%s::text[]) AND former IS NULL"
_FORGET_UPDATES_OF = "DELETE FROM contact_update WHERE contact_id = ANY(%s::text[])"
_FORGET_UPDATES = "DELETE FROM contact_update WHERE id = ANY(%s::bigint[])"
# The contact has what the rows had then, as far as anything tells.
_REVISIT = """
UPDATE ledger_entry entry SET seen_updated_at = NULL, seen_preparer = (
         SELECT "assignedPreparerId" FROM crm_contacts c WHERE c.id = entry.contact_id)
"""
_REVISIT_CREATORS = f"{_REVISIT} WHERE id = ANY(%s::text[])"
_REVISIT_OTHER_ROWS = f"{_REVISIT} WHERE contact_id = ANY(%s::text[]) AND outcome IN ('merged', 'exists')"

_ENTRY_COLUMNS = ", ".join(f'"{column.column}"' for column in LedgerEntry._meta.concrete_fields)
_FORMER_ENTRIES = f"""
UPDATE ledger_entry entry SET ({_ENTRY_COLUMNS}) = (
         SELECT {_ENTRY_COLUMNS} FROM jsonb_populate_record(NULL::ledger_entry, entry.former))
 WHERE id = ANY(%s::text[]) AND former IS NOT NULL
"""

Versions = dict[str, str]


@dataclass(slots=True)
class Reversal:
    """What merges wrote into a contact and is to be removed, with what other runs merged on top of it."""

    version: str
    #: The attribution confidence of the row that created the contact.
    confidence: int
    #: The values to restore, by field.
    before: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    later_merges: list[Entry] = field(default_factory=list)

    def put_back(self, merge: Entry) -> None:
        """Add the values from before a merge, except those that an earlier merge has added.

        An attribution is filled before it is completed, so the values before the fill are those of the whole unit.
        """
        before = before_merge(merge, self.confidence)
        self.before = self.before | before if "attribution" in merge.filled else before | self.before


@dataclass(slots=True)
class Assessed:
    """A batch of entries: final assessments, and the contacts to delete or to write, subject to their row version."""

    assessments: list[Assessment] = field(default_factory=list)
    creators: dict[str, Entry] = field(default_factory=dict)
    deletable: Versions = field(default_factory=dict)
    merges: dict[str, list[Entry]] = field(default_factory=dict)
    updates: dict[str, list[Entry]] = field(default_factory=dict)
    reversals: dict[str, Reversal] = field(default_factory=dict)


@dataclass(slots=True)
class Reverted:
    """The assessments of a batch's entries, and the merged entries of other runs that were reversed with them."""

    assessments: list[Assessment] = field(default_factory=list)
    later_merges: list[Entry] = field(default_factory=list)

    def reversed_entries(self, outcome: Outcome) -> list[Entry]:
        """Return the reversed entries with an outcome."""
        gone = [assessment.entry for assessment in self.assessments if assessment.status is Status.REVERSED]
        return [entry for entry in gone if entry.outcome is outcome]

    @property
    def reversed_ids(self) -> list[str]:
        """The ids of the reversed entries, including those of other runs."""
        gone = [assessment.entry.id for assessment in self.assessments if assessment.status is Status.REVERSED]
        return gone + [entry.id for entry in self.later_merges]


class RunDeletedError(Exception):
    """The record of the run was deleted during its rollback, and with it the counts of the rollback."""

    def __init__(self, run_id: int) -> None:
        super().__init__(f"the record of run {run_id} was deleted meanwhile")


class Undoer(Protocol):
    """Undoes entries in the database, or returns what would be undone."""

    def undo(self, page: Page) -> Reverted:
        """Undo a batch of entries."""

    def undo_updates(self, records: Sequence[UpdateRecord]) -> Reverted:
        """Undo a batch of changes by --update."""


def assess(page: Page, reader: Reader, restored: Mapping[str, Restored] | None = None) -> Assessed:
    """Compare the contacts of a batch of entries with what was written, and return what can be undone.

    Entries that were merged into a contact of the same run are assessed with the entry that created it, and excluded
    here. The contacts in `restored` are compared as they would be without the changes of the run by --update.
    """
    entries, restored = page.entries, restored or {}
    gone = {entry for found in restored.values() for entry in (*found.later_merges, *_entries_of(found.records))}
    run_id = reader.run.pk
    created = [entry for entry in entries if entry.outcome is Outcome.CREATED]
    contacts = reader.contacts([entry.contact_id for entry in entries if entry.contact_id])
    contacts |= {
        contact_id: replace(contacts[contact_id], values=found.values) for contact_id, found in restored.items()
    }
    assessed = Assessed(creators={entry.id: entry for entry in created})
    foreign = [
        entry for entry in entries if entry.outcome is Outcome.MERGED and entry.contact_id not in assessed.creators
    ]
    their_creators = reader.creators_of([entry.contact_id for entry in foreign if entry.contact_id])
    foreign = [entry for entry in foreign if not _is_made_by(run_id, their_creators.get(entry.contact_id))]
    merges = reader.merges_into([*assessed.creators, *{entry.contact_id for entry in foreign}])
    merges = [merge for merge in merges if merge not in gone]
    for merge in merges:
        assessed.merges.setdefault(merge.contact_id, []).append(merge)
    assessed.updates = _by_contact(entry for entry in reader.updates_in(list(assessed.creators)) if entry not in gone)
    updates = [update for updates in assessed.updates.values() for update in updates]
    wanted = {entry.id: entry for entry in (*created, *merges, *foreign, *their_creators.values(), *updates)}
    rows = page.rows_of(wanted)
    rows |= reader.source_rows(entry for entry in wanted.values() if entry.id not in rows)

    # Merges with a source row are compared with it; for those of expired intakes, updates show what was overwritten.
    expired = {entry.contact_id for entry in foreign if is_expired(entry, rows)}
    over = _by_contact(entry for entry in reader.updates_in(sorted(expired)) if entry not in gone)
    for entry in created:
        _assess_created(entry, contacts.get(entry.id), assessed, rows, reader.other_rules)
    for entry in foreign:
        creator = their_creators.get(entry.contact_id)
        stands = is_expired(entry, rows) and not is_written_over(entry, over.get(entry.contact_id, ()))
        _assess_merged(
            entry, contacts.get(entry.contact_id), creator, assessed, rows, reader.other_rules, stands=stands
        )
    for contact_id, reversal in assessed.reversals.items():
        others = [merge for merge in assessed.merges[contact_id] if merge.run_id != run_id]
        reversal.later_merges = merges_that_miss(contacts[contact_id], reversal.before, others, rows)
        for merge in reversal.later_merges:
            reversal.put_back(merge)
    for entry in entries:
        if entry.outcome is Outcome.ERROR or (entry.outcome is Outcome.EXISTS and entry.contact_id in contacts):
            assessed.assessments.append(Assessment(entry, Status.REVERSED))
        elif entry.outcome is Outcome.EXISTS:
            assessed.assessments.append(Assessment(entry, Status.KEPT, KeepReason.DELETED))
    return assessed


def _by_contact(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.contact_id, []).append(entry)
    return found


def _entries_of(records: Iterable[UpdateRecord]) -> list[Entry]:
    return [record.entry for record in records]


def assess_changes(records: Sequence[UpdateRecord], reader: Reader) -> AssessedUpdates:
    """Compare the contacts of a batch of changes with what was written, and return what can be undone."""
    contact_ids = sorted({record.entry.contact_id for record in records})
    if reader.run.kind == BackfillRun.Kind.REPAIR:
        profiles = reader.profiles(record.entry.source_id for record in records)
        return assess_repairs(records, reader.contacts(contact_ids), profiles)
    merges = reader.merges_into(contact_ids)
    rows = reader.source_rows([*merges, *(entry for record in records for entry in record.entries)])
    expired = sorted({record.entry.contact_id for record in records if is_expired(record.entry, rows)})
    later = reader.updates_after_run(expired)
    contacts = reader.contacts(contact_ids)
    return assess_updates(records, contacts, _by_contact(merges), _by_contact(later), rows, reader.other_rules)


def _assess_created(
    entry: Entry, contact: ContactSnapshot | None, assessed: Assessed, rows: Rows, other_rules: OtherRules
) -> None:
    merges = [merge for merge in assessed.merges.get(entry.id, ()) if merge.filled] + assessed.updates.get(entry.id, [])
    by_other_rules = other_rules.of(writer.run_id for writer in (entry, *merges)) is not None
    if contact is None:
        assessed.assessments.append(Assessment(entry, Status.KEPT, KeepReason.DELETED))
    elif any(maps_to_nothing(writer, rows) for writer in (entry, *merges)):
        why = KeepReason.OTHER_RULES if by_other_rules else KeepReason.SOURCE_CHANGED
        assessed.assessments.append(Assessment(entry, Status.KEPT, why))
    elif edited := edited_columns(contact, entry, merges, rows):
        why = mismatch_reason(contact, entry.written_at, by_other_rules=by_other_rules)
        assessed.assessments.append(Assessment(entry, Status.KEPT, why, _named(edited)))
    else:
        assessed.deletable[entry.id] = contact.version


def _assess_merged(
    entry: Entry,
    contact: ContactSnapshot | None,
    creator: Entry | None,
    assessed: Assessed,
    rows: Rows,
    other_rules: OtherRules,
    *,
    stands: bool,
) -> None:
    """Assess a merge. `stands` is whether it can be reversed although its source row is missing."""
    if contact is None:
        assessed.assessments.append(Assessment(entry, Status.KEPT, KeepReason.DELETED))
    elif (marker := _marker_of(entry, creator)) and contact.values.updated_at != marker:
        assessed.assessments.append(Assessment(entry, Status.KEPT, KeepReason.EDITED, _named(["updated_at"])))
    elif not entry.filled:
        assessed.assessments.append(Assessment(entry, Status.REVERSED))
    elif not stands and not is_unchanged(entry, rows):
        assessed.assessments.append(Assessment(entry, Status.KEPT, KeepReason.SOURCE_CHANGED))
    elif differing := differs_from_merge(contact, entry, rows, assessed.merges.get(contact.values.id, ())):
        by_other_rules = other_rules.of([entry.run_id]) is not None
        why = mismatch_reason(contact, _marker_of(entry, creator), by_other_rules=by_other_rules)
        assessed.assessments.append(Assessment(entry, Status.KEPT, why, _named(differing)))
    else:
        nothing = Reversal(contact.version, confidence_of(creator, rows))
        reversal = assessed.reversals.setdefault(contact.values.id, nothing)
        reversal.put_back(entry)
        reversal.entries.append(entry)


class DryRunUndoer:
    """Returns what would be undone, and writes nothing."""

    def __init__(self, connection: BaseDatabaseWrapper, reader: Reader) -> None:
        self._connection = connection
        self._reader = reader

    def undo(self, page: Page) -> Reverted:
        """Return how a batch would end, assuming that the changes by --update in its contacts were undone before.

        What the database would refuse cannot be predicted.
        """
        records = self._reader.updates_of_run(sorted({entry.contact_id for entry in page.entries if entry.contact_id}))
        restored = assess_changes(records, self._reader).restored if records else {}
        assessed = assess(page, self._reader, restored)
        require_still_trusted(self._connection, "crm_contacts")
        references = _excluding_history(find_foreign_keys(self._connection), _history_of(restored.values()))
        kept = _find_kept(self._connection, references, assessed.deletable)
        gone = {contact_id for contact_id in assessed.deletable if kept.get(contact_id) == ""}
        reverted = Reverted(assessed.assessments)
        _conclude_created(assessed, gone, {}, kept, reverted)
        _conclude_reversals(assessed, set(assessed.reversals), {}, reverted)
        return reverted

    def undo_updates(self, records: Sequence[UpdateRecord]) -> Reverted:
        """Return how a batch of changes would end."""
        assessed = assess_changes(records, self._reader)
        return _conclude_updates(assessed, set(assessed.restored), {})


class DatabaseUndoer:
    """Undoes entries in the database, and adds them to the counts of the rollback."""

    def __init__(self, connection: BaseDatabaseWrapper, reader: Reader, rollback_id: int) -> None:
        self._connection = connection
        self._reader = reader
        self._rollback_id = rollback_id
        self._cascades: Sequence[str] | None = None

    def undo(self, page: Page) -> Reverted:
        """Undo a batch of entries. Contacts, entries, counts and heartbeat are committed together.

        Raises lease.LeaseLostError if the rollback has lost the lease, RunDeletedError if the record of the run is
        gone, and django.db.DatabaseError for a transient error. Nothing of the batch is undone then.
        """
        assessed = assess(page, self._reader)
        if self._cascades is None:
            self._cascades = find_cascades(self._connection)
        with self._batch(*self._cascades):
            reverted = self._revert(assessed)
            self._forget_entries(reverted.reversed_ids)
            self._execute(_FORGET_UPDATES_OF, [entry.id for entry in reverted.reversed_entries(Outcome.CREATED)])
            self._count(reverted)
        return reverted

    def undo_updates(self, records: Sequence[UpdateRecord]) -> Reverted:
        """Undo a batch of changes. Contacts, history, records, counts and heartbeat are committed together.

        Raises the errors of `undo`.
        """
        assessed = assess_changes(records, self._reader)
        is_repair = self._reader.run.kind == BackfillRun.Kind.REPAIR
        restore = self._restore_repaired if is_repair else self._restore
        with self._batch(*(() if is_repair else ("crm_stage_history",))):
            restored, refused = self._apart(sorted(assessed.restored), lambda ids: restore(ids, assessed))
            reverted = _conclude_updates(assessed, restored, refused)
            gone = [record for contact in sorted(restored) for record in assessed.restored[contact].records]
            self._execute(_FORGET_UPDATES, [record.number for record in gone])
            # The next run with --update revisits the rows of these contacts.
            self._execute(_REVISIT_CREATORS, list(restored))
            self._execute(_REVISIT_OTHER_ROWS, list(restored))
            self._forget_entries([entry.id for entry in reverted.later_merges])
            self._count(reverted)
        return reverted

    def _batch(self, *written: str) -> AbstractContextManager[Totals]:
        written = ("crm_contacts", "contact_update", "rollback", *written)
        return lease.batch(self._connection, self._rollback_id, Timeouts(), *written)

    def _forget_entries(self, ids: list[str]) -> None:
        """Delete entries, so that their rows are pending again.

        If --recreate-deleted replaced an entry, the former entry is restored instead: otherwise the next run would
        create a contact that people deleted.
        """
        self._execute(_FORGET_ENTRIES, ids)
        self._execute(_FORMER_ENTRIES, ids)

    def _execute(self, statement: str, keys: list[str] | list[int]) -> None:
        # The ORM would send thousands of keys as one parameter each.
        with self._connection.cursor() as cursor:
            cursor.execute(statement, [keys])

    def _restore(self, contact_ids: Sequence[str], assessed: AssessedUpdates) -> set[str]:
        contacts = {
            contact: (assessed.restored[contact].version, assessed.restored[contact].values) for contact in contact_ids
        }
        restored = write_contacts(self._connection, contacts)
        if history := _history_of(assessed.restored[contact] for contact in restored):
            CRMStageHistory.objects.using(self._connection.alias).filter(pk__in=history).delete()
        return restored

    def _restore_repaired(self, contact_ids: Sequence[str], assessed: AssessedUpdates) -> set[str]:
        """Restore only the repaired columns."""
        repaired = Assessed()
        for contact_id in contact_ids:
            found = assessed.restored[contact_id]
            reversal = Reversal(found.version, found.values.attribution_confidence)
            for record in found.records:
                reversal.before |= before_repair(record)
            repaired.reversals[contact_id] = reversal
        return self._revert_merges(contact_ids, repaired)

    def _revert(self, assessed: Assessed) -> Reverted:
        reverted = Reverted(assessed.assessments)
        references = find_foreign_keys(self._connection)
        gone, refused = self._apart(sorted(assessed.deletable), lambda ids: self._delete(ids, assessed, references))
        stay = {contact_id: seen for contact_id, seen in assessed.deletable.items() if contact_id not in gone}
        _conclude_created(assessed, gone, refused, _find_kept(self._connection, references, stay), reverted)
        taken, refused = self._apart(sorted(assessed.reversals), lambda ids: self._revert_merges(ids, assessed))
        _conclude_reversals(assessed, taken, refused, reverted)
        return reverted

    def _apart(
        self, contact_ids: Sequence[str], action: Callable[[Sequence[str]], set[str]]
    ) -> tuple[set[str], dict[str, str]]:
        """Call `action`, which returns the ids that it wrote, with the contacts, apart from those that are refused.

        Returns the ids that were written, and the SQLSTATE by id of those that PostgreSQL refused.
        """
        written = write_apart(self._connection, contact_ids, action)
        done = {contact_id for _, some in written.done for contact_id in some}
        return done, {contact_id: refusal.sqlstate or "" for contact_id, refusal in written.refused}

    def _delete(self, contact_ids: Sequence[str], assessed: Assessed, references: Sequence[Reference]) -> set[str]:
        seen = [list(contact_ids), [assessed.deletable[contact_id] for contact_id in contact_ids]]
        with self._connection.cursor() as cursor:
            cursor.execute(_LOCK, seen)
        return set(try_execute(self._connection, _DELETE.format(unreferenced=is_unreferenced(references)), seen))

    def _revert_merges(self, contact_ids: Sequence[str], assessed: Assessed) -> set[str]:
        by_columns: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        for contact_id in contact_ids:
            found = assessed.reversals[contact_id]
            columns = tuple(sorted(found.before))
            by_columns.setdefault(columns, []).append(
                (contact_id, found.version, *(found.before[name] for name in columns))
            )
        taken: set[str] = set()
        lock_contacts(self._connection, contact_ids)
        for columns, contacts in by_columns.items():
            values = as_columns(contacts)
            taken.update(try_execute(self._connection, _reversal_statement(columns, self._connection), values))
        return taken

    def _count(self, reverted: Reverted) -> None:
        counts = counted(reverted)
        records = Rollback.objects.using(self._connection.alias).select_for_update()
        rollback = records.filter(pk=self._rollback_id).first()
        if rollback is None:
            # If the record of the rollback was deleted too, it has lost the lease, and `renew` raises.
            lease.renew(self._rollback_id, Totals())
            raise RunDeletedError(self._reader.run.pk)
        for name, count in counts.numbers.items():
            setattr(rollback, name, getattr(rollback, name) + count)
        for reason, count in counts.reasons.items():
            rollback.reasons[reason] = rollback.reasons.get(reason, 0) + count
        rollback.save(using=self._connection.alias)


@dataclass(slots=True)
class Counts:
    """Entries by kind and status, under the names of `crm.models.Rollback`, and those not reversed by reason."""

    numbers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add the counts of a batch."""
        self.numbers.update(other.numbers)
        self.reasons.update(other.reasons)

    def of(self, status: Status) -> int:
        """Return the number of entries of every kind with a status."""
        return sum(self.numbers[f"{kind}_{status}"] for kind in set(_KINDS.values()))

    @property
    def failed(self) -> int:
        """The number of entries that the database refused to undo."""
        return self.of(Status.FAILED)

    @property
    def remaining(self) -> int:
        """The number of entries of the run that are still in the ledger."""
        failed = self.numbers["contacts_failed"] + self.numbers["merges_failed"]
        return failed + sum(self.numbers[f"{kind}_kept"] for kind in ("contacts", "merges", "lines"))


_KINDS: Mapping[Outcome | UpdateOutcome, str] = {
    UpdateOutcome.UPDATED: "updates",
    Outcome.CREATED: "contacts",
    Outcome.MERGED: "merges",
    Outcome.EXISTS: "lines",
    Outcome.ERROR: "lines",
}


def counted(reverted: Reverted) -> Counts:
    """Return the counts of a batch."""
    assessments = reverted.assessments
    numbers = Counter(f"{_KINDS[assessment.entry.outcome]}_{assessment.status}" for assessment in assessments)
    if reverted.later_merges:
        numbers["later_merges"] = len(reverted.later_merges)
    return Counts(numbers, Counter(assessment.reason for assessment in assessments if assessment.keep_reason))


def _conclude_created(
    assessed: Assessed, gone: set[str], refused: Mapping[str, str], kept: Mapping[str, str | None], reverted: Reverted
) -> None:
    """Add the assessments of the contacts to delete, and of what was merged into any contact of the batch."""
    for contact_id in assessed.deletable:
        entry = assessed.creators[contact_id]
        if contact_id in gone:
            reverted.assessments.append(Assessment(entry, Status.REVERSED))
        elif contact_id in refused:
            reverted.assessments.append(Assessment(entry, Status.FAILED, KeepReason.REFUSED, refused[contact_id]))
        else:
            reverted.assessments.append(_kept(entry, kept, contact_id))
    made = [assessment for assessment in reverted.assessments if assessment.entry.outcome is Outcome.CREATED]
    for creator, status, *_ in made:
        for merge in assessed.merges.get(creator.id, ()):
            if _is_made_by(creator.run_id, merge):
                why = None if status is Status.REVERSED else KeepReason.WITH_ITS_CONTACT
                reverted.assessments.append(Assessment(merge, status, why))
            elif status is Status.REVERSED:
                reverted.later_merges.append(merge)


def _kept(entry: Entry, kept: Mapping[str, str | None], contact_id: str) -> Assessment:
    """Return the assessment of a contact that the DELETE did not delete."""
    if contact_id not in kept:
        return Assessment(entry, Status.KEPT, KeepReason.DELETED)
    if (tables := kept[contact_id]) is None:
        return Assessment(entry, Status.KEPT, KeepReason.EDITED, "meanwhile")
    if tables:
        return Assessment(entry, Status.KEPT, KeepReason.REFERENCED, tables)
    # A trigger of the application can suppress a DELETE without an error.
    return Assessment(entry, Status.FAILED, KeepReason.REFUSED, "not deleted")


def _conclude_reversals(assessed: Assessed, taken: set[str], refused: Mapping[str, str], reverted: Reverted) -> None:
    for contact_id, reversal in assessed.reversals.items():
        if contact_id in taken:
            reverted.later_merges.extend(reversal.later_merges)
        for entry in reversal.entries:
            if contact_id in taken:
                assessment = Assessment(entry, Status.REVERSED)
            elif contact_id in refused:
                assessment = Assessment(entry, Status.FAILED, KeepReason.REFUSED, refused[contact_id])
            else:
                assessment = Assessment(entry, Status.KEPT, KeepReason.EDITED, "meanwhile")
            reverted.assessments.append(assessment)


def _conclude_updates(assessed: AssessedUpdates, restored: set[str], refused: Mapping[str, str]) -> Reverted:
    reverted = Reverted(assessed.assessments)
    for contact, found in assessed.restored.items():
        if contact in restored:
            reverted.later_merges.extend(found.later_merges)
        for record in found.records:
            if contact in restored:
                assessment = Assessment(record.entry, Status.REVERSED)
            elif contact in refused:
                assessment = Assessment(record.entry, Status.FAILED, KeepReason.REFUSED, refused[contact])
            else:
                assessment = Assessment(record.entry, Status.KEPT, KeepReason.EDITED, "meanwhile")
            reverted.assessments.append(assessment)
    return reverted


def _find_kept(
    connection: BaseDatabaseWrapper, references: Sequence[Reference], seen: Versions
) -> dict[str, str | None]:
    """Return by contact id the names of the tables that refer to it, or None if it has another version.

    Contacts that do not exist are left out.
    """
    if not seen:
        return {}
    with connection.cursor() as cursor:
        cursor.execute(_FIND_KEPT.format(tables=referring_tables(references)), [list(seen.keys()), list(seen.values())])
        return {contact: ", ".join(tables) if as_seen else None for contact, as_seen, tables in cursor.fetchall()}


def _history_of(restored: Iterable[Restored]) -> list[str]:
    """Return the ids of the history rows of the changes to be undone."""
    return [
        stage_history_id(found.values.id, record.to_stage)
        for found in restored
        for record in found.records
        if record.to_stage is not None
    ]


def _excluding_history(references: Sequence[Reference], history: Sequence[str]) -> Sequence[Reference]:
    """Return the references without these rows of the history. Their ids consist of letters and digits."""
    if not history:
        return references
    others = f"r.id <> ALL ('{{{','.join(history)}}}')"
    return [
        replace(reference, condition=f"{reference.condition} AND {others}")
        if reference.table == CRMStageHistory._meta.db_table
        else reference
        for reference in references
    ]


def _reversal_statement(columns: Sequence[str], connection: BaseDatabaseWrapper) -> str:
    fields = {field.attname: field for field in CRMContact._meta.concrete_fields}
    arrays = array_types([fields[name] for name in columns], connection)
    assignments = ", ".join(f"{column} = seen.{column}" for column in arrays)
    return (
        f"UPDATE crm_contacts c SET {assignments} "
        f"FROM {unnest('seen', {**_SEEN_COLUMNS, **arrays})} "
        f"WHERE {_AS_SEEN} RETURNING c.id"
    )


def _marker_of(entry: Entry, creator: Entry | None) -> str | None:
    """Return the contact's `updatedAt` at the merge; for older entries, the one with which it was created."""
    return entry.contact_updated_at or (creator.written_at if creator else None)


def _is_made_by(run_id: int, entry: Entry | None) -> bool:
    return entry is not None and entry.run_id == run_id


def _named(columns: Iterable[str]) -> str:
    """Return the database's names of columns, separated by commas."""
    return ", ".join(COLUMN.get(column, column) for column in columns)

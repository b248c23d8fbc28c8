"""Undoing a batch of entries: the only place that deletes contacts, one transaction a batch.

entries -> judge (read and compare) -> lock -> delete contacts, take merges back -> delete entries -> counts, heartbeat

Judging takes its time and no locks; what it saw is held to by the version of each row. Then the contacts are locked as
a DELETE locks them, which waits for everybody who is just adding an interaction, and keeps out whoever would. The
DELETE that follows is a statement of its own, so it sees what was committed while it waited: it deletes a contact only
if it is the version that was compared, and no row of any table refers to it. A DELETE alone would wait as well, but
after its look at the other tables, and would take away the interaction that it waited for. All of this needs a snapshot
for each statement: `crm.postgres.session` sees to it that every transaction is READ COMMITTED.
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
from crm.models import CRMContact, CRMStageHistory, LedgerEntry, Rollback
from crm.outcome import Outcome, Totals, UpdateOutcome
from crm.postgres.apart import write_apart
from crm.postgres.facts.foreign_keys import (
    KEEP_FOREIGN_KEYS,
    Reference,
    find_foreign_keys,
    is_unreferenced,
    referring_tables,
)
from crm.postgres.transactions import Timeouts
from crm.rollback.ahead import Page
from crm.rollback.reader import Reader
from crm.rollback.updates import JudgedUpdates, Restored, UpdateRecord, judge_updates
from crm.rules.entry import Entry
from crm.rules.reverting import (
    Assessment,
    KeepReason,
    Rows,
    Verdict,
    before_merge,
    confidence_of,
    differs_from_merge,
    edited_columns,
    is_unchanged,
    maps_to_nothing,
    merges_that_miss,
    why_it_differs,
)
from crm.rules.snapshot import ContactSnapshot
from crm.runs import lease
from crm.runs.other_rules import OtherRules
from crm.try_execute import try_execute

_LOCK_HISTORY = "LOCK TABLE crm_stage_history IN ROW EXCLUSIVE MODE"
_SEEN_COLUMNS = {"id": "text[]", "version": "text[]"}
_SEEN = unnest("seen", _SEEN_COLUMNS)
_AS_SEEN = "c.id = seen.id AND c.xmin = seen.version::xid"
_LOCK = f"SELECT c.id FROM crm_contacts c JOIN {_SEEN} ON {_AS_SEEN} ORDER BY c.id FOR UPDATE OF c"
_DELETE = f"DELETE FROM crm_contacts c USING {_SEEN} WHERE {_AS_SEEN} AND {{unreferenced}} RETURNING c.id"
_WHAT_KEEPS = f"""
SELECT c.id, c.xmin::text = seen.version, {{tables}} FROM crm_contacts c JOIN {_SEEN} ON c.id = seen.id
"""
_FORGET_ENTRIES = "DELETE FROM ledger_entry WHERE id = ANY(%s::text[]) AND former IS NULL"
_FORGET_UPDATES_OF = "DELETE FROM contact_update WHERE contact_id = ANY(%s::text[])"
_FORGET_UPDATES = "DELETE FROM contact_update WHERE id = ANY(%s::bigint[])"
_LOOK_AGAIN_AT = "UPDATE ledger_entry SET seen_updated_at = NULL WHERE id = ANY(%s::text[])"
_LOOK_AGAIN_AT_OTHERS = """
UPDATE ledger_entry SET seen_updated_at = NULL
 WHERE contact_id = ANY(%s::text[]) AND outcome IN ('merged', 'exists')
"""

_ENTRY_COLUMNS = ", ".join(f'"{column.column}"' for column in LedgerEntry._meta.concrete_fields)
_FORMER_ENTRIES = f"""
UPDATE ledger_entry entry SET ({_ENTRY_COLUMNS}) = (
         SELECT {_ENTRY_COLUMNS} FROM jsonb_populate_record(NULL::ledger_entry, entry.former))
 WHERE id = ANY(%s::text[]) AND former IS NOT NULL
"""
_COLUMN = {column.attname: f'"{column.column}"' for column in CRMContact._meta.concrete_fields}

Versions = dict[str, str]


@dataclass(slots=True)
class TakeBack:
    """What merges wrote into a contact and is to be taken out again, with what other runs merged on top of it."""

    version: str
    #: The confidence of the row that made the contact.
    confidence: int
    before: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    later_merges: list[Entry] = field(default_factory=list)

    def put_back(self, merge: Entry) -> None:
        """Let what stood before a merge be there again, as far as no other merge says that it came before.

        An attribution is filled before it is completed: what stood before the first of them is the whole unit.
        """
        before = before_merge(merge, self.confidence)
        self.before = self.before | before if "attribution" in merge.filled else before | self.before


@dataclass(slots=True)
class Judged:
    """A batch of entries: those that are decided, and those whose contact the database is to be asked about."""

    decided: list[Assessment] = field(default_factory=list)
    creators: dict[str, Entry] = field(default_factory=dict)
    deletable: Versions = field(default_factory=dict)
    merges: dict[str, list[Entry]] = field(default_factory=dict)
    updates: dict[str, list[Entry]] = field(default_factory=dict)
    take_backs: dict[str, TakeBack] = field(default_factory=dict)


@dataclass(slots=True)
class Reverted:
    """What became of the entries of a batch, and the merged entries of other runs that went with them."""

    judgements: list[Assessment] = field(default_factory=list)
    later_merges: list[Entry] = field(default_factory=list)

    def reversed_entries(self, outcome: Outcome) -> list[Entry]:
        """The entries of an outcome that are to go."""
        gone = [judgement.entry for judgement in self.judgements if judgement.verdict is Verdict.REVERSED]
        return [entry for entry in gone if entry.outcome is outcome]

    @property
    def reversed_ids(self) -> list[str]:
        """The entries that are to go."""
        gone = [judgement.entry.id for judgement in self.judgements if judgement.verdict is Verdict.REVERSED]
        return gone + [entry.id for entry in self.later_merges]


class RunDeletedError(Exception):
    """The record of the run that is taken back was deleted, and with it what counts the rollback."""

    def __init__(self, run_id: int) -> None:
        super().__init__(f"the record of run {run_id} was deleted meanwhile")


class Undoer(Protocol):
    """Undoes entries: for good, or in a dry run's mind."""

    def undo(self, page: Page) -> Reverted:
        """Undo a batch."""

    def undo_updates(self, records: Sequence[UpdateRecord]) -> Reverted:
        """Undo what --update changed, a batch."""


def judge(page: Page, reader: Reader, restored: Mapping[str, Restored] | None = None) -> Judged:
    """Compare the contacts of a batch of entries with what was written.

    Entries that were merged into a contact of the same run are judged with the entry that made it, and left out. The
    contacts in `restored` are taken to be as they would be without what the run changed with --update.
    """
    entries, restored = page.entries, restored or {}
    gone = {entry for found in restored.values() for entry in (*found.later_merges, *_entries_of(found.records))}
    run_id = reader.run.pk
    created = [entry for entry in entries if entry.outcome is Outcome.CREATED]
    contacts = reader.contacts([entry.contact_id for entry in entries if entry.contact_id])
    contacts |= {
        contact_id: replace(contacts[contact_id], values=found.values) for contact_id, found in restored.items()
    }
    judged = Judged(creators={entry.id: entry for entry in created})
    foreign = [
        entry for entry in entries if entry.outcome is Outcome.MERGED and entry.contact_id not in judged.creators
    ]
    their_creators = reader.creators_of([entry.contact_id for entry in foreign if entry.contact_id])
    foreign = [entry for entry in foreign if not _is_made_by(run_id, their_creators.get(entry.contact_id))]
    merges = reader.merges_into([*judged.creators, *{entry.contact_id for entry in foreign}])
    merges = [merge for merge in merges if merge not in gone]
    for merge in merges:
        judged.merges.setdefault(merge.contact_id, []).append(merge)
    judged.updates = _by_contact(entry for entry in reader.updates_in(list(judged.creators)) if entry not in gone)
    updates = [update for updates in judged.updates.values() for update in updates]
    wanted = {entry.id: entry for entry in (*created, *merges, *foreign, *their_creators.values(), *updates)}
    rows = page.rows_of(wanted)
    rows |= reader.source_rows(entry for entry in wanted.values() if entry.id not in rows)

    for entry in created:
        _judge_created(entry, contacts.get(entry.id), judged, rows, reader.other_rules)
    for entry in foreign:
        creator = their_creators.get(entry.contact_id)
        _judge_merged(entry, contacts.get(entry.contact_id), creator, judged, rows, reader.other_rules)
    for contact_id, take_back in judged.take_backs.items():
        others = [merge for merge in judged.merges[contact_id] if merge.run_id != run_id]
        take_back.later_merges = merges_that_miss(contacts[contact_id], take_back.before, others, rows)
        for merge in take_back.later_merges:
            take_back.put_back(merge)
    for entry in entries:
        if entry.outcome is Outcome.ERROR or (entry.outcome is Outcome.EXISTS and entry.contact_id in contacts):
            judged.decided.append(Assessment(entry, Verdict.REVERSED))
        elif entry.outcome is Outcome.EXISTS:
            judged.decided.append(Assessment(entry, Verdict.KEPT, KeepReason.DELETED))
    return judged


def _by_contact(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.contact_id, []).append(entry)
    return found


def _entries_of(records: Iterable[UpdateRecord]) -> list[Entry]:
    return [record.entry for record in records]


def judge_changes(records: Sequence[UpdateRecord], reader: Reader) -> JudgedUpdates:
    """Compare the contacts of a batch of changes with what was written."""
    contact_ids = sorted({record.entry.contact_id for record in records})
    merges = reader.merges_into(contact_ids)
    rows = reader.source_rows([*merges, *(entry for record in records for entry in record.entries)])
    return judge_updates(records, reader.contacts(contact_ids), _by_contact(merges), rows, reader.other_rules)


def _judge_created(
    entry: Entry, contact: ContactSnapshot | None, judged: Judged, rows: Rows, other_rules: OtherRules
) -> None:
    merges = [merge for merge in judged.merges.get(entry.id, ()) if merge.filled] + judged.updates.get(entry.id, [])
    by_other_rules = other_rules.of(writer.run_id for writer in (entry, *merges)) is not None
    if contact is None:
        judged.decided.append(Assessment(entry, Verdict.KEPT, KeepReason.DELETED))
    elif any(maps_to_nothing(writer, rows) for writer in (entry, *merges)):
        why = KeepReason.OTHER_RULES if by_other_rules else KeepReason.SOURCE_CHANGED
        judged.decided.append(Assessment(entry, Verdict.KEPT, why))
    elif edited := edited_columns(contact, entry, merges, rows):
        why = why_it_differs(contact, entry.written_at, by_other_rules=by_other_rules)
        judged.decided.append(Assessment(entry, Verdict.KEPT, why, _named(edited)))
    else:
        judged.deletable[entry.id] = contact.version


def _judge_merged(
    entry: Entry,
    contact: ContactSnapshot | None,
    creator: Entry | None,
    judged: Judged,
    rows: Rows,
    other_rules: OtherRules,
) -> None:
    if contact is None:
        judged.decided.append(Assessment(entry, Verdict.KEPT, KeepReason.DELETED))
    elif (marker := _marker_of(entry, creator)) and contact.values.updated_at != marker:
        judged.decided.append(Assessment(entry, Verdict.KEPT, KeepReason.EDITED, _named(["updated_at"])))
    elif not entry.filled:
        judged.decided.append(Assessment(entry, Verdict.REVERSED))
    elif not is_unchanged(entry, rows):
        judged.decided.append(Assessment(entry, Verdict.KEPT, KeepReason.SOURCE_CHANGED))
    elif differing := differs_from_merge(contact, entry, rows, judged.merges.get(contact.values.id, ())):
        by_other_rules = other_rules.of([entry.run_id]) is not None
        why = why_it_differs(contact, _marker_of(entry, creator), by_other_rules=by_other_rules)
        judged.decided.append(Assessment(entry, Verdict.KEPT, why, _named(differing)))
    else:
        nothing = TakeBack(contact.version, confidence_of(creator, rows))
        take_back = judged.take_backs.setdefault(contact.values.id, nothing)
        take_back.put_back(entry)
        take_back.entries.append(entry)


class DryRunUndoer:
    """Says what would be undone, and writes nothing at all."""

    def __init__(self, connection: BaseDatabaseWrapper, reader: Reader) -> None:
        self._connection = connection
        self._reader = reader

    def undo(self, page: Page) -> Reverted:
        """What would become of a batch; what the database itself would refuse nobody can tell.

        What --update changed in its contacts would be undone by then.
        """
        records = self._reader.updates_of_run(sorted({entry.contact_id for entry in page.entries if entry.contact_id}))
        restored = judge_changes(records, self._reader).restored if records else {}
        judged = judge(page, self._reader, restored)
        references = _without(find_foreign_keys(self._connection), _history_of(restored.values()))
        kept = _what_keeps(self._connection, references, judged.deletable)
        gone = {contact_id for contact_id in judged.deletable if kept.get(contact_id) == ""}
        undone = Reverted(judged.decided)
        _conclude_created(judged, gone, {}, kept, undone)
        _conclude_take_backs(judged, set(judged.take_backs), {}, undone)
        return undone

    def undo_updates(self, records: Sequence[UpdateRecord]) -> Reverted:
        """What would become of a batch of changes."""
        judged = judge_changes(records, self._reader)
        return _conclude_updates(judged, set(judged.restored), {})


class DatabaseUndoer:
    """Undoes entries for good, and counts them with the run that does it."""

    def __init__(
        self, connection: BaseDatabaseWrapper, reader: Reader, rollback_id: int, timeouts: Timeouts | None = None
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._rollback_id = rollback_id
        self._timeouts = timeouts or Timeouts()

    def undo(self, page: Page) -> Reverted:
        """Undo a batch; contacts, entries, counts and heartbeat commit together.

        Raises lease.LeaseLostError when the rollback is no longer the running run, and django.db.DatabaseError for a
        transient error. Nothing of the batch is undone then.
        """
        judged = judge(page, self._reader)
        with self._batch():
            undone = self._carry_out(judged)
            self._forget_entries(undone.reversed_ids)
            self._execute(_FORGET_UPDATES_OF, [entry.id for entry in undone.reversed_entries(Outcome.CREATED)])
            self._count(undone)
        return undone

    def undo_updates(self, records: Sequence[UpdateRecord]) -> Reverted:
        """Undo what --update changed; contacts, history, records, counts and heartbeat commit together.

        Raises what `undo` does.
        """
        judged = judge_changes(records, self._reader)
        with self._batch(_LOCK_HISTORY):
            restored, refused = self._apart(sorted(judged.restored), lambda ids: self._restore(ids, judged))
            undone = _conclude_updates(judged, restored, refused)
            gone = [record for contact in sorted(restored) for record in judged.restored[contact].records]
            self._execute(_FORGET_UPDATES, [record.number for record in gone])
            # As if they had not been looked at.
            self._execute(_LOOK_AGAIN_AT, list(restored))
            self._execute(_LOOK_AGAIN_AT_OTHERS, list(restored))
            self._forget_entries([entry.id for entry in undone.later_merges])
            self._count(undone)
        return undone

    def _batch(self, *locks: str) -> AbstractContextManager[Totals]:
        return lease.batch(self._connection, self._rollback_id, self._timeouts, KEEP_FOREIGN_KEYS, *locks)

    def _forget_entries(self, ids: list[str]) -> None:
        """Let rows be pending again, or what they were before they were made contacts again: of a contact that is gone.

        So nobody whom people deleted comes back by the next run.
        """
        self._execute(_FORGET_ENTRIES, ids)
        self._execute(_FORMER_ENTRIES, ids)

    def _execute(self, statement: str, keys: list[str] | list[int]) -> None:
        # The ORM would send each of some thousand keys as a parameter of its own.
        with self._connection.cursor() as cursor:
            cursor.execute(statement, [keys])

    def _restore(self, contact_ids: Sequence[str], judged: JudgedUpdates) -> set[str]:
        contacts = {
            contact: (judged.restored[contact].version, judged.restored[contact].values) for contact in contact_ids
        }
        restored = write_contacts(self._connection, contacts)
        if history := _history_of(judged.restored[contact] for contact in restored):
            CRMStageHistory.objects.using(self._connection.alias).filter(pk__in=history).delete()
        return restored

    def _carry_out(self, judged: Judged) -> Reverted:
        undone = Reverted(judged.decided)
        references = find_foreign_keys(self._connection)
        gone, refused = self._apart(sorted(judged.deletable), lambda ids: self._delete(ids, judged, references))
        stay = {contact_id: seen for contact_id, seen in judged.deletable.items() if contact_id not in gone}
        _conclude_created(judged, gone, refused, _what_keeps(self._connection, references, stay), undone)
        taken, refused = self._apart(sorted(judged.take_backs), lambda ids: self._take_back(ids, judged))
        _conclude_take_backs(judged, taken, refused, undone)
        return undone

    def _apart(
        self, contact_ids: Sequence[str], action: Callable[[Sequence[str]], set[str]]
    ) -> tuple[set[str], dict[str, str]]:
        """Do it to the contacts; return those to which it was done, and the SQLSTATE of those that were refused."""
        written = write_apart(self._connection, contact_ids, action)
        done = {contact_id for _, some in written.done for contact_id in some}
        return done, {contact_id: refusal.sqlstate or "" for contact_id, refusal in written.refused}

    def _delete(self, contact_ids: Sequence[str], judged: Judged, references: Sequence[Reference]) -> set[str]:
        seen = [list(contact_ids), [judged.deletable[contact_id] for contact_id in contact_ids]]
        with self._connection.cursor() as cursor:
            cursor.execute(_LOCK, seen)
        return set(try_execute(self._connection, _DELETE.format(unreferenced=is_unreferenced(references)), seen))

    def _take_back(self, contact_ids: Sequence[str], judged: Judged) -> set[str]:
        by_columns: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        for contact_id in contact_ids:
            found = judged.take_backs[contact_id]
            columns = tuple(sorted(found.before))
            by_columns.setdefault(columns, []).append(
                (contact_id, found.version, *(found.before[name] for name in columns))
            )
        taken: set[str] = set()
        lock_contacts(self._connection, contact_ids)
        for columns, contacts in by_columns.items():
            values = as_columns(contacts)
            taken.update(try_execute(self._connection, _take_back_statement(columns, self._connection), values))
        return taken

    def _count(self, undone: Reverted) -> None:
        counts = counted(undone)
        records = Rollback.objects.using(self._connection.alias).select_for_update()
        rollback = records.filter(pk=self._rollback_id).first()
        if rollback is None:
            # With its own record, the rollback has lost the lease.
            lease.renew(self._rollback_id, Totals())
            raise RunDeletedError(self._reader.run.pk)
        for name, count in counts.numbers.items():
            setattr(rollback, name, getattr(rollback, name) + count)
        for reason, count in counts.reasons.items():
            rollback.reasons[reason] = rollback.reasons.get(reason, 0) + count
        rollback.save(using=self._connection.alias)


@dataclass(slots=True)
class Counts:
    """Entries by what became of them, under the names of `crm.models.Rollback`, and why some were not reversed."""

    numbers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add another's counts to these."""
        self.numbers.update(other.numbers)
        self.reasons.update(other.reasons)

    def of(self, verdict: Verdict) -> int:
        """Lines that came to a verdict, of every kind."""
        return sum(self.numbers[f"{kind}_{verdict}"] for kind in set(_KINDS.values()))

    @property
    def failed(self) -> int:
        """Entries that the database would not undo."""
        return self.of(Verdict.FAILED)

    @property
    def remaining(self) -> int:
        """Entries of the run that are still in the ledger."""
        failed = self.numbers["contacts_failed"] + self.numbers["merges_failed"]
        return failed + sum(self.numbers[f"{kind}_kept"] for kind in ("contacts", "merges", "lines"))


_KINDS: Mapping[Outcome | UpdateOutcome, str] = {
    UpdateOutcome.UPDATED: "updates",
    Outcome.CREATED: "contacts",
    Outcome.MERGED: "merges",
    Outcome.EXISTS: "lines",
    Outcome.ERROR: "lines",
}


def counted(undone: Reverted) -> Counts:
    """Count what became of a batch."""
    judgements = undone.judgements
    numbers = Counter(f"{_KINDS[judgement.entry.outcome]}_{judgement.verdict}" for judgement in judgements)
    if undone.later_merges:
        numbers["later_merges"] = len(undone.later_merges)
    return Counts(numbers, Counter(judgement.reason for judgement in judgements if judgement.why))


def _conclude_created(
    judged: Judged, gone: set[str], refused: Mapping[str, str], kept: Mapping[str, str | None], undone: Reverted
) -> None:
    """Say what became of contacts that could be deleted, and of what was merged into any contact of the batch."""
    for contact_id in judged.deletable:
        entry = judged.creators[contact_id]
        if contact_id in gone:
            undone.judgements.append(Assessment(entry, Verdict.REVERSED))
        elif contact_id in refused:
            undone.judgements.append(Assessment(entry, Verdict.FAILED, KeepReason.REFUSED, refused[contact_id]))
        else:
            undone.judgements.append(_stayed(entry, kept, contact_id))
    made = [judgement for judgement in undone.judgements if judgement.entry.outcome is Outcome.CREATED]
    for creator, verdict, *_ in made:
        for merge in judged.merges.get(creator.id, ()):
            if _is_made_by(creator.run_id, merge):
                why = None if verdict is Verdict.REVERSED else KeepReason.WITH_ITS_CONTACT
                undone.judgements.append(Assessment(merge, verdict, why))
            elif verdict is Verdict.REVERSED:
                undone.later_merges.append(merge)


def _stayed(entry: Entry, kept: Mapping[str, str | None], contact_id: str) -> Assessment:
    """Why the DELETE passed a contact by."""
    if contact_id not in kept:
        return Assessment(entry, Verdict.KEPT, KeepReason.DELETED)
    if (tables := kept[contact_id]) is None:
        return Assessment(entry, Verdict.KEPT, KeepReason.EDITED, "meanwhile")
    if tables:
        return Assessment(entry, Verdict.KEPT, KeepReason.REFERENCED, tables)
    # A trigger of the application's can silently swallow a DELETE.
    return Assessment(entry, Verdict.FAILED, KeepReason.REFUSED, "not deleted")


def _conclude_take_backs(judged: Judged, taken: set[str], refused: Mapping[str, str], undone: Reverted) -> None:
    for contact_id, take_back in judged.take_backs.items():
        if contact_id in taken:
            undone.later_merges.extend(take_back.later_merges)
        for entry in take_back.entries:
            if contact_id in taken:
                judgement = Assessment(entry, Verdict.REVERSED)
            elif contact_id in refused:
                judgement = Assessment(entry, Verdict.FAILED, KeepReason.REFUSED, refused[contact_id])
            else:
                judgement = Assessment(entry, Verdict.KEPT, KeepReason.EDITED, "meanwhile")
            undone.judgements.append(judgement)


def _conclude_updates(judged: JudgedUpdates, restored: set[str], refused: Mapping[str, str]) -> Reverted:
    undone = Reverted(judged.decided)
    for contact, found in judged.restored.items():
        if contact in restored:
            undone.later_merges.extend(found.later_merges)
        for record in found.records:
            if contact in restored:
                judgement = Assessment(record.entry, Verdict.REVERSED)
            elif contact in refused:
                judgement = Assessment(record.entry, Verdict.FAILED, KeepReason.REFUSED, refused[contact])
            else:
                judgement = Assessment(record.entry, Verdict.KEPT, KeepReason.EDITED, "meanwhile")
            undone.judgements.append(judgement)
    return undone


def _what_keeps(
    connection: BaseDatabaseWrapper, references: Sequence[Reference], seen: Versions
) -> dict[str, str | None]:
    """For those of these contacts that are there: the tables that refer to it, or None when it is another version."""
    if not seen:
        return {}
    with connection.cursor() as cursor:
        cursor.execute(
            _WHAT_KEEPS.format(tables=referring_tables(references)), [list(seen.keys()), list(seen.values())]
        )
        return {contact: ", ".join(tables) if as_seen else None for contact, as_seen, tables in cursor.fetchall()}


def _history_of(restored: Iterable[Restored]) -> list[str]:
    """The rows of the contacts' history that tell of what is undone."""
    return [
        stage_history_id(found.values.id, record.to_stage)
        for found in restored
        for record in found.records
        if record.to_stage is not None
    ]


def _without(references: Sequence[Reference], history: Sequence[str]) -> Sequence[Reference]:
    """The references, as they are when rows of the history are gone. Their ids are of letters and digits."""
    if not history:
        return references
    others = f"r.id <> ALL ('{{{','.join(history)}}}')"
    return [
        replace(reference, condition=f"{reference.condition} AND {others}")
        if reference.table == CRMStageHistory._meta.db_table
        else reference
        for reference in references
    ]


def _take_back_statement(columns: Sequence[str], connection: BaseDatabaseWrapper) -> str:
    fields = {field.attname: field for field in CRMContact._meta.concrete_fields}
    arrays = array_types([fields[name] for name in columns], connection)
    assignments = ", ".join(f"{_COLUMN[name]} = seen.{_COLUMN[name]}" for name in columns)
    return (
        f"UPDATE crm_contacts c SET {assignments} "
        f"FROM {unnest('seen', {**_SEEN_COLUMNS, **arrays})} "
        f"WHERE {_AS_SEEN} RETURNING c.id"
    )


def _marker_of(entry: Entry, creator: Entry | None) -> str | None:
    """The contact's `updatedAt` when the row was merged into it; of older entries, that of the row that made it."""
    return entry.contact_updated_at or (creator.written_at if creator else None)


def _is_made_by(run_id: int, entry: Entry | None) -> bool:
    return entry is not None and entry.run_id == run_id


def _named(columns: Iterable[str]) -> str:
    """The database's own names of columns."""
    return ", ".join(_COLUMN.get(column, column).strip('"') for column in columns)

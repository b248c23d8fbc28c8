"""Writes what a second look changes: a batch is one transaction, and locks no row before its first write.

rows -> entries, contacts, keys -> decide -> contacts and stage history -> record of changes -> entries -> counts and
heartbeat
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.contacts import ContactIndex
from crm.backfill.update.reader import Present
from crm.backfill.write.upsert import MAX_ATTEMPTS
from crm.backfill.write.writer import first_trigger, lock_contacts
from crm.fields import array_type, array_types, as_columns, unnest
from crm.models import BackfillBatch, CRMContact, CRMStageHistory
from crm.outcome import Refusal, Source, Totals
from crm.postgres.apart import write_apart
from crm.postgres.errors import SettledMeanwhileError
from crm.postgres.refusals import in_words, names_of_the_schema
from crm.postgres.transactions import Timeouts, lock_as_a_writer
from crm.rules.mapping import ATTRIBUTION_UNIT, ContactDraft, MappedRow, Rules, contact_id, referrer
from crm.rules.matching import COMMISSION_UNIT
from crm.rules.updating import EMAIL, FIELDS_OF_CHANGE, REFUSED, Change, Look, decide, rows_of, totals_of
from crm.runs import lease
from crm.try_execute import try_execute

logger = logging.getLogger(__name__)

#: Who moved the contact on, for the people who read its history.
REASON = "CRM contacts backfill"

_FIELDS = {field.attname: field for field in CRMContact._meta.concrete_fields}
_STEP_FIELDS = {field.attname: field for field in CRMStageHistory._meta.concrete_fields}
_WRITTEN = tuple(dict.fromkeys(name for fields in FIELDS_OF_CHANGE.values() for name in fields))
_LOCKS = (lock_as_a_writer("crm_contacts"), lock_as_a_writer("crm_stage_history"))
# Bare: to name the key would take the right to read it.
_HISTORY = """
INSERT INTO crm_stage_history (id, "contactId", "fromStage", "toStage", reason, "createdAt")
SELECT id, contact_id, from_stage, to_stage, %s, entered_at
  FROM {steps}
ON CONFLICT DO NOTHING RETURNING NULL
"""
# Only from what it was when the row was decided: the row may have been settled since.
_SEEN = f"""
UPDATE ledger_entry entry SET seen_updated_at = looked.at::timestamp
  FROM {unnest("looked", dict.fromkeys(("id", "before", "at"), "text[]"))}
 WHERE entry.id = looked.id AND seen_updated_at IS NOT DISTINCT FROM looked.before::timestamp
"""

_RECORDED = {
    **dict.fromkeys(("line_id", "source", "source_id", "contact_id", "columns"), "text[]"),
    **dict.fromkeys(("source_updated_at", "contact_updated_at"), "timestamp[]"),
    **dict.fromkeys(("from_type", "to_type", "from_stage", "to_stage"), "text[]"),
    "stage_entered_before": "timestamp[]",
    "attribution_before": "jsonb[]",
    "placeholder": "text[]",
    "former": "jsonb[]",
}
_RECORD = f"""
INSERT INTO contact_update (run_id, {", ".join(_RECORDED)})
SELECT %s::bigint, change.* FROM {unnest("change", _RECORDED)}
"""


def stage_history_id(contact: str, to_stage: str) -> str:
    """The id of the row that tells of a contact's step to a stage: the same for ever, as contacts have it."""
    return contact_id("crm_stage_history", f"{contact}:{to_stage}")


@dataclass(slots=True)
class _Written:
    """The changes that stand, and the contacts that were another version meanwhile."""

    changes: list[Change] = field(default_factory=list)
    changed_meanwhile: set[str] = field(default_factory=set)


def write_contacts(connection: BaseDatabaseWrapper, contacts: Mapping[str, tuple[str, ContactDraft]]) -> set[str]:
    """Write what contacts are to be, by id with the version on which that was decided.

    Returns those that were written: the others are another version by now.
    """
    rows = [
        (contact, version, *(getattr(values, name) for name in _WRITTEN))
        for contact, (version, values) in contacts.items()
    ]
    lock_contacts(connection, contacts)
    return set(try_execute(connection, _update_statement(connection), as_columns(rows)))


class UpdateWriter:
    """Looks at the rows of one run's batches again, each batch in a transaction of its own."""

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        lookup: ContactIndex,
        present: Present,
        rules: Rules,
        run_id: int,
        timeouts: Timeouts,
    ) -> None:
        self._connection = connection
        self._lookup = lookup
        self._present = present
        self._rules = rules
        self._run_id = run_id
        self._told: set[Refusal] = set()
        self._timeouts = timeouts

    def write(self, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        """Look at a batch again, page by page.

        Contacts, history, record of changes, entries, counts and heartbeat commit together.

        Raises lease.LeaseLostError when the run is no longer the running one, and django.db.DatabaseError for a
        transient error. Nothing of the batch is written then.
        """
        started = time.monotonic()
        with lease.batch(self._connection, self._run_id, self._timeouts, *_LOCKS) as totals:
            for rows in pages:
                changes = self._settle(source, rows)
                self._record(changes)
                self._mark_seen(changes)
                totals.add(totals_of(changes))
            if totals.revisited:
                batch = BackfillBatch.of(self._run_id, source, totals, time.monotonic() - started)
                batch.save(using=self._connection.alias, force_insert=True)
        return totals

    def keep_alive(self) -> None:
        """Renew the heartbeat without a batch. Raises lease.LeaseLostError."""
        lease.renew(self._run_id, Totals())

    def _settle(self, source: Source, rows: Sequence[MappedRow]) -> list[Change]:
        """Decide and write; where a contact changed under our eyes, look at its rows again.

        One that is never written, whoever changes it or swallows the change, counts as refused.
        """
        settled: list[Change] = []
        waiting, attempts = rows, 0
        while waiting:
            attempts += 1
            changes = list(decide(source, waiting, self._look_at(waiting), self._rules))
            if any(EMAIL in change.columns for change in changes):
                # Rare, and nothing takes an address back: look at every spelling that is stored by now.
                changes = list(decide(source, waiting, self._look_at(waiting, anew=True), self._rules))
            written = self._write_apart(changes)
            settled += written.changes
            left = [change for change in changes if change.contact_id in written.changed_meanwhile]
            if left and attempts == MAX_ATTEMPTS:
                self._tell([Refusal(trigger=first_trigger(self._connection, "UPDATE"))])
                return settled + [change.refused() for change in left]
            waiting = [change.row for change in left]
        return settled

    def _look_at(self, rows: Sequence[MappedRow], *, anew: bool = False) -> Look:
        entries = self._present.entries(rows)
        contacts = self._present.contacts({entry.contact_id for entry in entries.values()})
        self._present.add_rows(contacts, self._present.entries_of(contacts))
        others = rows_of(contacts, rows)
        self._lookup.notice(others, anew=anew)
        return Look(entries, contacts, self._lookup.contacts_met_by(others))

    def _write_apart(self, changes: Iterable[Change]) -> _Written:
        """Write; where PostgreSQL refuses a contact, halve until it stands alone, so that the others are written."""
        of_contact: dict[str, list[Change]] = {}
        for change in changes:
            of_contact.setdefault(change.contact_id, []).append(change)
        written = _Written()
        to_write = []
        for contact in sorted(of_contact):
            group = of_contact[contact]
            if any(change.columns for change in group):
                to_write.append(group)
            else:
                written.changes += group
        for groups, ids in (apart := write_apart(self._connection, to_write, self._write_groups)).done:
            for group in groups:
                if group[0].contact_id in ids:
                    written.changes += group
                else:
                    written.changed_meanwhile.add(group[0].contact_id)
        self._tell({refusal for _, refusal in apart.refused})
        for group, _ in apart.refused:
            written.changes += [change.refused() if change.columns else change for change in group]
        return written

    def _tell(self, refusals: Iterable[Refusal]) -> None:
        """Say why contacts were refused; every reason once."""
        for refusal in {names_of_the_schema(self._connection, refusal) for refusal in refusals} - self._told:
            self._told.add(refusal)
            logger.warning(
                "the database refuses what --update writes in a contact (%s): it is kept as it is, counted as refused, "
                "and tried again by the next run; this is told once",
                in_words(refusal),
            )

    def _write_groups(self, groups: Sequence[list[Change]]) -> set[str]:
        written = self._write_contacts(groups)
        self._write_history(change for group in groups for change in group if change.contact_id in written)
        return written

    def _write_contacts(self, groups: Sequence[list[Change]]) -> set[str]:
        """Write the contacts that still are what was decided on; their ids."""
        contacts = {}
        for group in groups:
            after = group[0].before
            for change in group:
                after = after._replace(**change.values)
            contacts[after.id] = (group[0].version, after)
        return write_contacts(self._connection, contacts)

    def _write_history(self, changes: Iterable[Change]) -> None:
        steps = [
            (
                stage_history_id(change.contact_id, change.values["stage"]),
                change.contact_id,
                change.before.stage,
                change.values["stage"],
                change.values["stage_entered_at"],
            )
            for change in changes
            if "stage" in change.values
        ]
        if steps:
            sent = {
                **dict.fromkeys(("id", "contact_id"), "text[]"),
                **{name: array_type(_STEP_FIELDS[name], self._connection) for name in ("from_stage", "to_stage")},
                "entered_at": "timestamp[]",
            }
            statement = _HISTORY.format(steps=unnest("step", sent))
            try_execute(self._connection, statement, [REASON, *as_columns(steps)])

    def _record(self, changes: Iterable[Change]) -> None:
        entries = [recorded for change in changes for recorded in _recorded(change)]
        if entries:
            with self._connection.cursor() as cursor:
                cursor.execute(_RECORD, [self._run_id, *as_columns(entries)])

    def _mark_seen(self, changes: Iterable[Change]) -> None:
        due = [
            change for change in changes if change.entry.is_due(change.row.updated_at) and REFUSED not in change.kept
        ]
        seen = sorted(
            {change.entry.id: (change.entry.seen_updated_at, change.row.updated_at) for change in due}.items()
        )
        if seen:
            with self._connection.cursor() as cursor:
                rows = [(identifier, before, at) for identifier, (before, at) in seen]
                cursor.execute(_SEEN, as_columns(rows))
                if cursor.rowcount < len(seen):
                    raise SettledMeanwhileError


def _recorded(change: Change) -> Iterator[tuple[str | int | None, ...]]:
    """Return what a change writes, as values for the columns of _RECORDED.

    One for each row that something comes from, and what cannot be taken back apart from what can.
    """
    apart: dict[tuple[str, bool], list[str]] = {}
    for name, origin in change.origins.items():
        is_lost = name in change.former and change.former[name] is None
        apart.setdefault((origin.entry.id, is_lost), []).append(name)
    for names in apart.values():
        yield _recorded_together(change, names)


def _recorded_together(change: Change, names: Sequence[str]) -> tuple[str | int | None, ...]:
    before, origin = change.before, change.origins[names[0]]
    written = {each for name in names for each in FIELDS_OF_CHANGE[name]}
    former = {name: change.former[name] for name in names if name in change.former}
    return (
        origin.entry.id,
        origin.source.value,
        origin.row.source_id,
        change.contact_id,
        ",".join(names),
        origin.row.updated_at,
        before.updated_at,
        before.contact_type if "contact_type" in written else None,
        change.values["contact_type"] if "contact_type" in written else None,
        before.stage if "stage" in written else None,
        change.values["stage"] if "stage" in written else None,
        before.stage_entered_at if "stage_entered_at" in written else None,
        _attribution_before(before, written),
        before.email if "email" in written else None,
        json.dumps(former) if former else None,
    )


def _attribution_before(before: ContactDraft, written: Collection[str]) -> str | None:
    """What stood where an attribution is written, as JSON; where it named a referrer, the row tells that has it."""
    replaced = [name for name in ATTRIBUTION_UNIT if name in written]
    if referrer(before.referrer_username) is not None:
        # The username is that of a person: a rate that was missing, and a confidence, are nobody's.
        replaced = [name for name in replaced if name in ("attribution_confidence", *_of_nobody(before))]
    return json.dumps({name: getattr(before, name) for name in replaced}) if replaced else None


def _of_nobody(before: ContactDraft) -> tuple[str, ...]:
    return COMMISSION_UNIT if before.commission_rate is None else ()


def _update_statement(connection: BaseDatabaseWrapper) -> str:
    """Write what a contact is to be, where it still is the version that was decided on."""
    columns = array_types([_FIELDS[name] for name in _WRITTEN], connection)
    return (
        f"UPDATE crm_contacts c SET {', '.join(f'{column} = v.{column}' for column in columns)} "
        f"FROM {unnest('v', {'id': 'text[]', 'version': 'text[]', **columns})} "
        "WHERE c.id = v.id AND c.xmin = v.version::xid RETURNING c.id"
    )

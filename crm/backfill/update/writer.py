"""Writes the changes of --update. A batch is one transaction, and locks no row before its first write.

rows -> entries, contacts, keys -> changes -> contacts and stage history -> record of changes -> entries -> counts and
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
from crm.postgres.transactions import Timeouts
from crm.rules.mapping import ATTRIBUTION_UNIT, ContactDraft, MappedRow, Rules, contact_id, referrer
from crm.rules.matching import COMMISSION_UNIT
from crm.rules.updating import (
    EMAIL,
    FIELDS_OF_CHANGE,
    REFUSED,
    Change,
    RevisitContext,
    find_changes,
    rows_of,
    totals_of,
)
from crm.runs import lease
from crm.try_execute import try_execute

logger = logging.getLogger(__name__)

#: The reason of a step in the stage history.
REASON = "CRM contacts backfill"

_FIELDS = {field.attname: field for field in CRMContact._meta.concrete_fields}
_STEP_FIELDS = {field.attname: field for field in CRMStageHistory._meta.concrete_fields}
_WRITTEN = tuple(dict.fromkeys(name for fields in FIELDS_OF_CHANGE.values() for name in fields))
_INSERTED = ("crm_contacts", "crm_stage_history")
# ON CONFLICT without a target, because naming the key requires the right to read it.
_HISTORY = """
INSERT INTO crm_stage_history (id, "contactId", "fromStage", "toStage", reason, "createdAt")
SELECT id, contact_id, from_stage, to_stage, %s, entered_at
  FROM {steps}
ON CONFLICT DO NOTHING RETURNING NULL
"""
# Only if it is unchanged since the row was read: another writer may have revisited the row meanwhile.
_SEEN = f"""
UPDATE ledger_entry entry SET seen_updated_at = seen.at::timestamp, seen_preparer = seen.preparer
  FROM {unnest("seen", dict.fromkeys(("id", "before", "at", "preparer"), "text[]"))}
 WHERE entry.id = seen.id AND seen_updated_at IS NOT DISTINCT FROM seen.before::timestamp
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
    """Return the id of the history row for a contact's step to a stage. Like a contact id, it never changes."""
    return contact_id("crm_stage_history", f"{contact}:{to_stage}")


@dataclass(slots=True)
class _Written:
    """The changes that were written or need no write, and the contacts that changed since they were read."""

    changes: list[Change] = field(default_factory=list)
    changed_meanwhile: set[str] = field(default_factory=set)


def write_contacts(connection: BaseDatabaseWrapper, contacts: Mapping[str, tuple[str, ContactDraft]]) -> set[str]:
    """Write contacts, if they are unchanged since they were read.

    `contacts` has the row version that was read and the new values by contact id. Returns the ids that were written:
    the other contacts have another version now, or do not exist.
    """
    rows = [
        (contact, version, *(getattr(values, name) for name in _WRITTEN))
        for contact, (version, values) in contacts.items()
    ]
    lock_contacts(connection, contacts)
    return set(try_execute(connection, _update_statement(connection), as_columns(rows)))


class UpdateWriter:
    """Revisits rows in batches of one run, each in its own transaction."""

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
        self._logged: set[Refusal] = set()
        self._timeouts = timeouts

    def write(self, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        """Revisit a batch, page by page, and return its counts.

        Contacts, history, record of changes, entries, counts and heartbeat are committed together.

        Raises lease.LeaseLostError if the run has lost the lease, and django.db.DatabaseError for a transient error.
        Nothing of the batch is written then.
        """
        started = time.monotonic()
        with lease.batch(
            self._connection, self._run_id, self._timeouts, "backfill_batch", "contact_update", inserted=_INSERTED
        ) as totals:
            for rows in pages:
                changes = self._write_rows(source, rows)
                self._record(changes)
                self._mark_seen(changes)
                totals.add(totals_of(changes))
            if totals.revisited:
                batch = BackfillBatch.of(self._run_id, source, totals, time.monotonic() - started)
                batch.save(using=self._connection.alias, force_insert=True)
        return totals

    def keep_alive(self) -> None:
        """Renew the heartbeat without a batch. Raises lease.LeaseLostError."""
        lease.keep_alive(self._run_id)

    def _write_rows(self, source: Source, rows: Sequence[MappedRow]) -> list[Change]:
        """Find and write the changes of rows. If a contact changed concurrently, its rows are revisited.

        A contact that cannot be written after MAX_ATTEMPTS, or whose UPDATE a trigger suppresses, counts as refused.
        """
        settled: list[Change] = []
        waiting, attempts = rows, 0
        while waiting:
            attempts += 1
            changes = list(find_changes(source, waiting, self._read(waiting), self._rules))
            if any(EMAIL in change.columns for change in changes):
                # Rare, and no later run corrects a written address: look up every stored spelling again.
                changes = list(find_changes(source, waiting, self._read(waiting, anew=True), self._rules))
            written = self._write_apart(changes)
            settled += written.changes
            left = [change for change in changes if change.contact_id in written.changed_meanwhile]
            if left and attempts == MAX_ATTEMPTS:
                self._log([Refusal(trigger=first_trigger(self._connection, "UPDATE"))])
                return settled + [change.refused() for change in left]
            waiting = [change.row for change in left]
        return settled

    def _read(self, rows: Sequence[MappedRow], *, anew: bool = False) -> RevisitContext:
        entries = self._present.entries(rows)
        contacts = self._present.contacts({entry.contact_id for entry in entries.values()})
        self._present.add_rows(contacts, self._present.entries_of(contacts))
        others = rows_of(contacts, rows)
        self._lookup.prepare(others, anew=anew)
        return RevisitContext(entries, contacts, self._lookup.contacts_met_by(others))

    def _write_apart(self, changes: Iterable[Change]) -> _Written:
        """Write changes. If PostgreSQL refuses a contact, bisect until it is alone, so that the others are written."""
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
        self._log({refusal for _, refusal in apart.refused})
        for group, _ in apart.refused:
            written.changes += [change.refused() if change.columns else change for change in group]
        return written

    def _log(self, refusals: Iterable[Refusal]) -> None:
        """Log why contacts were refused, each reason once."""
        for refusal in {names_of_the_schema(self._connection, refusal) for refusal in refusals} - self._logged:
            self._logged.add(refusal)
            logger.warning(
                "the database refuses a change of a contact by --update (%s): the contact stays unchanged, counts as "
                "refused, and the next run tries again; this message is logged once",
                in_words(refusal),
            )

    def _write_groups(self, groups: Sequence[list[Change]]) -> set[str]:
        written = self._write_contacts(groups)
        self._write_history(change for group in groups for change in group if change.contact_id in written)
        return written

    def _write_contacts(self, groups: Sequence[list[Change]]) -> set[str]:
        """Write the contacts that are unchanged since they were read, and return their ids."""
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
        seen = {}
        for change in changes:
            entry, row = change.entry, change.row
            if entry.is_due(row.updated_at, row.preparer_id) and REFUSED not in change.kept:
                seen[entry.id] = (entry.id, entry.seen_updated_at, row.updated_at, row.preparer_id)
        if seen:
            with self._connection.cursor() as cursor:
                cursor.execute(_SEEN, as_columns([seen[identifier] for identifier in sorted(seen)]))
                if cursor.rowcount < len(seen):
                    raise SettledMeanwhileError


def _recorded(change: Change) -> Iterator[tuple[str | int | None, ...]]:
    """Yield what a change writes, as values for the columns of _RECORDED.

    One for each source row of a value. Changes that cannot be reversed are separate from those that can.
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
    """Return the replaced attribution as JSON. The values of a referrer are left out: their source row has them."""
    replaced = [name for name in ATTRIBUTION_UNIT if name in written]
    if referrer(before.referrer_username) is not None:
        # Usernames are personal data and are not recorded. A missing rate and a confidence are not personal.
        replaced = [name for name in replaced if name in ("attribution_confidence", *_blank_commission(before))]
    return json.dumps({name: getattr(before, name) for name in replaced}) if replaced else None


def _blank_commission(before: ContactDraft) -> tuple[str, ...]:
    return COMMISSION_UNIT if before.commission_rate is None else ()


def _update_statement(connection: BaseDatabaseWrapper) -> str:
    """Return the UPDATE that writes contacts if they still have the row version that was read."""
    columns = array_types([_FIELDS[name] for name in _WRITTEN], connection)
    return (
        f"UPDATE crm_contacts c SET {', '.join(f'{column} = v.{column}' for column in columns)} "
        f"FROM {unnest('v', {'id': 'text[]', 'version': 'text[]', **columns})} "
        "WHERE c.id = v.id AND c.xmin = v.version::xid RETURNING c.id"
    )

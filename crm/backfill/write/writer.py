"""Writes the batches of a run, each in one transaction.

rows -> upsert -> contacts, fills -> ledger entries -> batch counts and heartbeat -> commit
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from django.db import DatabaseError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.contacts import ContactIndex
from crm.backfill.write.upsert import StillUnmatchedError, UpsertResult, upsert
from crm.fields import array_types, as_columns, unnest
from crm.models import BackfillBatch, CRMContact
from crm.outcome import Outcome, Reason, Refusal, RowOutcome, Source, Totals
from crm.postgres.apart import Bisection, refusal_of_writing, refuses_all
from crm.postgres.errors import RewrittenError, SettledMeanwhileError
from crm.postgres.refusals import MAX_ALIKE, AlikeRefusals, names_of_the_schema
from crm.postgres.transactions import Timeouts
from crm.rules.mapping import ATTRIBUTION_UNIT, ContactDraft, MappedRow, has_no_referrer_sql
from crm.rules.matching import ASSIGNMENT_UNIT, COMMISSION_UNIT, PROFILE_FILLS
from crm.runs import lease
from crm.try_execute import try_execute

_COLUMN = {field.attname: f'"{field.column}"' for field in CRMContact._meta.concrete_fields}
_FILLED_ALONE = (*PROFILE_FILLS, "last_contacted_at")
_FILLED = (*_FILLED_ALONE, *ASSIGNMENT_UNIT, *ATTRIBUTION_UNIT)


_LOCK = "SELECT FROM crm_contacts WHERE id = ANY(%s) ORDER BY id FOR UPDATE"
_FORGET_UPDATES = "DELETE FROM contact_update WHERE contact_id = ANY(%s::text[])"
_NO_REFUSAL = Refusal()
_MET = (Outcome.MERGED, Outcome.EXISTS)
_ENTRY = (
    *("id", "source_id", "outcome", "reason", "contact_id", "source_updated_at", "seen_preparer", "filled"),
    *("sqlstate", '"constraint"', '"column"', '"table"', '"trigger"'),
    *("contact_updated_at", "attribution_before", "identity_keys"),
)
_CASTS = dict.fromkeys(("attribution_before", "identity_keys"), "jsonb")
_CASTS |= dict.fromkeys(("source_updated_at", "contact_updated_at"), "timestamp")
_SENT = ", ".join(f"{name}::{_CASTS[name]}" if name in _CASTS else name for name in _ENTRY)
# Written in SQL: with a model object per entry, the ledger would take a third of the time that Python needs per row.
_LEDGER = f"""
INSERT INTO ledger_entry (source, run_id, {", ".join(_ENTRY)})
SELECT %s, %s::bigint, {_SENT}
  FROM {unnest("entry", dict.fromkeys(_ENTRY, "text[]"))}
"""
# A replaced entry with an outcome other than `error` is stored in the new one, so that a rollback can restore it.
_LEDGER_AGAIN = """
ON CONFLICT (id) DO UPDATE SET (source, run_id, {columns}) = ROW ({excluded}), seen_updated_at = NULL,
   former = CASE WHEN ledger_entry.outcome = 'error' THEN ledger_entry.former ELSE to_jsonb(ledger_entry) END
 WHERE ledger_entry.run_id <> excluded.run_id
""".format(
    columns=", ".join(_ENTRY[1:]),
    excluded=", ".join(f"excluded.{column}" for column in ("source", "run_id", *_ENTRY[1:])),
)


def _fill_statement(connection: BaseDatabaseWrapper) -> str:
    """Return the UPDATE that fills fields which are NULL when it runs; attribution and assignment as units."""
    unassigned = " AND ".join(f"c.{_COLUMN[name]} IS NULL" for name in ASSIGNMENT_UNIT)
    unassigned += f" AND v.{_COLUMN['assigned_preparer_id']} IS NOT NULL"
    referrer, rate, confidence = (
        _COLUMN[name] for name in ("referrer_username", "commission_rate", "attribution_confidence")
    )
    unattributed = f"{has_no_referrer_sql(f'c.{referrer}')} AND v.{confidence} IS NOT NULL"
    # Only the rate is filled if the contact still has the same referrer.
    incomplete = f"c.{rate} IS NULL AND v.{rate} IS NOT NULL AND v.{confidence} IS NULL AND c.{referrer} = v.{referrer}"
    alone = [f"{_COLUMN[name]} = COALESCE(c.{_COLUMN[name]}, v.{_COLUMN[name]})" for name in _FILLED_ALONE]
    conditions = {
        **dict.fromkeys(ASSIGNMENT_UNIT, unassigned),
        **dict.fromkeys(ATTRIBUTION_UNIT, unattributed),
        **dict.fromkeys(COMMISSION_UNIT, f"({unattributed}) OR ({incomplete})"),
    }
    units = [
        f"{_COLUMN[name]} = CASE WHEN {condition} THEN v.{_COLUMN[name]} ELSE c.{_COLUMN[name]} END"
        for name, condition in conditions.items()
    ]
    fields = {field.attname: field for field in CRMContact._meta.concrete_fields}
    sent = {"id": "text[]", **array_types([fields[name] for name in _FILLED], connection)}
    return (
        f"UPDATE crm_contacts c SET {', '.join(alone + units)} FROM {unnest('v', sent)} WHERE c.id = v.id "
        "RETURNING c.id"
    )


def first_trigger(connection: BaseDatabaseWrapper, event: str) -> str | None:
    """Return the name of the first trigger that can change written rows, in firing order, or None.

    `event` is INSERT or UPDATE.
    """
    with connection.cursor() as cursor:
        cursor.execute(_TRIGGERS, [_EVENTS[event]])
        row = cursor.fetchone()
    return row[0] if row else None


def lock_contacts(connection: BaseDatabaseWrapper, ids: Iterable[str]) -> None:
    """Lock contacts that will be updated, in the order of their ids, to prevent deadlocks.

    An UPDATE alone locks rows in the order of its plan, so two of them could wait for each other.
    """
    with connection.cursor() as cursor:
        cursor.execute(_LOCK, [list(ids)])


_EXISTING = "SELECT count(*) FROM crm_contacts WHERE id = ANY(%s)"
# Bits of pg_trigger.tgtype: 2 is BEFORE, 64 is INSTEAD OF.
_TRIGGERS = """
SELECT tgname FROM pg_trigger
 WHERE tgrelid = 'crm_contacts'::regclass AND NOT tgisinternal AND tgenabled <> 'D'
   AND tgtype & 66 <> 0 AND tgtype & %s <> 0
 ORDER BY tgname COLLATE "C" LIMIT 1
"""
_EVENTS = {"INSERT": 4, "UPDATE": 16}
# Only an indication: also returns contacts that other sessions wrote since this transaction began, and contacts that it
# updated itself.
_NEW_HERE = """
SELECT c.id FROM crm_contacts c
 WHERE c.id = ANY(%s) AND pg_catalog.age(c.xmin) <= 0
   AND NOT EXISTS (SELECT FROM ledger_entry entry WHERE entry.id = c.id AND entry.outcome = 'created')
"""


class DatabaseStore:
    """The contacts of the database."""

    def __init__(self, connection: BaseDatabaseWrapper, lookup: ContactIndex) -> None:
        self._connection = connection
        self._lookup = lookup
        self.contacts_met_by = lookup.contacts_met_by
        self.prepare = lookup.prepare

    def is_likely_met(self, row: MappedRow) -> bool:
        """Return whether the row probably has a contact with which an INSERT would not conflict."""
        return self._lookup.is_likely_met(row)

    def insert(self, drafts: Sequence[ContactDraft]) -> set[str]:
        """Insert contacts, and return the ids of those that were inserted. Raises RewrittenError."""
        # Two indexes begin with the address. Inserting in its order accesses neighbouring index pages.
        ordered = sorted(drafts, key=attrgetter("email"))
        ids = {contact.id for contact in self._bulk_create(ordered, ignore_conflicts=True)}
        if not ids <= {draft.id for draft in drafts}:
            raise RewrittenError(first_trigger(self._connection, "INSERT"), "id")
        return ids

    def find_new(self, ids: Collection[str]) -> list[str]:
        """Return those of the contacts that a trigger may have created in this transaction."""
        if not ids or first_trigger(self._connection, "INSERT") is None:
            return []
        with self._connection.cursor() as cursor:
            cursor.execute(_NEW_HERE, [list(ids)])
            return [identifier for (identifier,) in cursor.fetchall()]

    def require_there(self, ids: list[str]) -> None:
        """Raise RewrittenError if one of the contacts does not exist."""
        with self._connection.cursor() as cursor:
            cursor.execute(_EXISTING, [ids])
            if cursor.fetchone() != (len(ids),):
                raise RewrittenError(first_trigger(self._connection, "INSERT"))

    def insert_or_raise(self, draft: ContactDraft) -> None:
        """Insert a contact. Raises django.db.DatabaseError for any conflict."""
        self._bulk_create([draft], ignore_conflicts=False)

    def _bulk_create(self, drafts: Sequence[ContactDraft], *, ignore_conflicts: bool) -> list[CRMContact]:
        contacts = [CRMContact(*draft) for draft in drafts]  # type: ignore[misc] # the draft's fields are the model's
        return CRMContact.bulk.using(self._connection.alias).bulk_create(contacts, ignore_conflicts=ignore_conflicts)

    def fill(self, fills: dict[str, dict[str, Any]]) -> None:
        """Fill the fields of contacts that are NULL when the UPDATE runs. Raises RewrittenError."""
        if not fills:
            return
        rows = [(identifier, *map(values.get, _FILLED)) for identifier, values in sorted(fills.items())]
        lock_contacts(self._connection, fills)
        columns = as_columns(rows)
        filled = set(try_execute(self._connection, _fill_statement(self._connection), columns))
        if filled != fills.keys():
            # The contact was deleted concurrently, or a trigger suppressed the UPDATE.
            with self._connection.cursor() as cursor:
                cursor.execute("SELECT FROM crm_contacts WHERE id = ANY(%s) LIMIT 1", [list(fills.keys() - filled)])
                if filled - fills.keys() or cursor.fetchone() is not None:
                    raise RewrittenError(first_trigger(self._connection, "UPDATE"))


class BatchWriter:
    """Writes batches of one run, each in its own transaction."""

    def __init__(
        self,
        connection: BaseDatabaseWrapper,
        lookup: ContactIndex,
        run_id: int,
        timeouts: Timeouts,
        *,
        replaces_entries: bool = False,
    ) -> None:
        """Create a writer.

        Arguments:
            connection: The connection to write on.
            lookup: Finds existing contacts, on the same connection.
            run_id: The run that holds the lease.
            timeouts: The timeouts of each batch.
            replaces_entries: Whether rows can have a settled entry already, because their contact is missing.
        """
        self._connection = connection
        self._store = DatabaseStore(connection, lookup)
        self._replaces_entries = replaces_entries
        self.run_id = run_id
        self._timeouts = timeouts
        self._alike = AlikeRefusals()

    def write(self, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        """Write a batch and return its counts. Contacts, ledger, counts and heartbeat are committed together.

        The rows are passed page by page, so that a batch of any size needs the memory of one page.

        Raises lease.LeaseLostError if the run has lost the lease, errors.EveryRowRefusedError if PostgreSQL refuses
        every row for the same reason, and django.db.DatabaseError for a transient error. Nothing of the batch is
        written then.
        """
        started = time.monotonic()
        written = ("backfill_batch", *(["contact_update"] if self._replaces_entries else []))
        with lease.batch(self._connection, self.run_id, self._timeouts, *written, inserted=["crm_contacts"]) as totals:
            # A copy, so that a retry of the batch starts with the state after the previous batch.
            alike = replace(self._alike)
            for rows in pages:
                totals.add(self.upsert_page(source, rows, alike))
            self._write_batch(source, totals, time.monotonic() - started)
        self._alike = alike
        return totals

    def upsert_page(self, source: Source, rows: Sequence[MappedRow], alike: AlikeRefusals | None = None) -> Totals:
        """Write rows and their ledger entries in the transaction of the caller, and return their counts."""
        result = self._upsert_apart(rows, alike or AlikeRefusals())
        self._write_ledger(source, result.row_outcomes)
        if self._replaces_entries and result.made:
            # The recorded updates belong to the former contacts with these ids.
            with self._connection.cursor() as cursor:
                cursor.execute(_FORGET_UPDATES, [list(result.made)])
        return Totals.of(result.row_outcomes, result.created_by_type)

    def keep_alive(self) -> None:
        """Renew the heartbeat without a batch. Raises lease.LeaseLostError."""
        lease.keep_alive(self.run_id)

    def _upsert_apart(self, rows: Sequence[MappedRow], alike: AlikeRefusals) -> UpsertResult:
        """Upsert the rows. If PostgreSQL refuses one, bisect until it is alone, so that the others are written.

        Raises EveryRowRefusedError if it seems to refuse all of them for the same reason.
        """
        result = UpsertResult()

        def upsert_or_refusal(some: Sequence[MappedRow]) -> UpsertResult | Refusal:
            found = self._upsert_or_refusal(some, result.made)
            if isinstance(found, Refusal) and len(some) == 1:
                return names_of_the_schema(self._connection, found)
            return found

        parts = Bisection(rows, upsert_or_refusal)
        for some, found in parts:
            if isinstance(found, UpsertResult):
                if any(row_outcome.outcome is not Outcome.ERROR for row_outcome in found.row_outcomes):
                    alike.end()
                result.row_outcomes.extend(found.row_outcomes)
                result.created_by_type.update(found.created_by_type)
                result.made.update(found.made)
                continue
            result.row_outcomes.append(_refused(some[0], found))
            if _is_new(some[0]) and alike.note(found):
                left = [row for row in parts.left if row.draft is not None and _is_new(row)]
                # If no other new row of the page is left to try, the following pages decide.
                if refuses_all(self._connection, left, found, upsert_or_refusal) if left else alike.count > MAX_ALIKE:
                    alike.fail()
        return result

    def _upsert_or_refusal(self, rows: Sequence[MappedRow], made_before: Collection[str]) -> UpsertResult | Refusal:
        try:
            with transaction.atomic(using=self._connection.alias):
                result = upsert(rows, self._store, made_before)
                met = {row_outcome.contact_id for row_outcome in result.row_outcomes if row_outcome.outcome in _MET}
                new = self._store.find_new({identifier for identifier in met if identifier} - result.made)
                transaction.set_rollback(bool(new), using=self._connection.alias)
            if not new:
                return result
            # The INSERT was rolled back: a contact that still exists was not created by it.
            self._store.require_there(new)
            with transaction.atomic(using=self._connection.alias):
                return upsert(rows, self._store, made_before)
        except StillUnmatchedError:
            return self._silent_refusal(rows)
        except DatabaseError as error:
            return refusal_of_writing(error)

    def _silent_refusal(self, rows: Sequence[MappedRow]) -> Refusal:
        """Return why a row was not inserted that matches no contact: an unknown unique index, or a trigger.

        `ON CONFLICT DO NOTHING` reports no reason, so the row is inserted without it, in a savepoint that is rolled
        back.
        """
        drafts = [row.draft for row in rows if row.draft]
        if len(rows) > 1 or not drafts:
            return _NO_REFUSAL
        try:
            with transaction.atomic(using=self._connection.alias):
                self._store.insert_or_raise(drafts[0])
                transaction.set_rollback(True, using=self._connection.alias)
        except DatabaseError as error:
            return refusal_of_writing(error)
        return _NO_REFUSAL

    def _write_ledger(self, source: Source, row_outcomes: Sequence[RowOutcome]) -> None:
        may_have_entry = [
            self._replaces_entries or row_outcome.known_reason is not None for row_outcome in row_outcomes
        ]
        fresh = [row_outcome for row_outcome, may in zip(row_outcomes, may_have_entry, strict=True) if not may]
        again = [row_outcome for row_outcome, may in zip(row_outcomes, may_have_entry, strict=True) if may]
        self._write_entries(_LEDGER, source, fresh)
        if self._write_entries(_LEDGER + _LEDGER_AGAIN, source, again) < len(again):
            raise SettledMeanwhileError

    def _write_entries(self, statement: str, source: Source, row_outcomes: Sequence[RowOutcome]) -> int:
        if not row_outcomes:
            return 0
        columns = as_columns(map(_entry, row_outcomes))
        with self._connection.cursor() as cursor:
            cursor.execute(statement, [source.value, self.run_id, *columns])
            written: int = cursor.rowcount
        return written

    def _write_batch(self, source: Source, totals: Totals, seconds: float) -> None:
        BackfillBatch.of(self.run_id, source, totals, seconds).save(using=self._connection.alias, force_insert=True)


def _entry(row_outcome: RowOutcome) -> tuple[str | int | None, ...]:
    """Return the values of a row's outcome for the columns of _ENTRY."""
    refusal = row_outcome.refusal or _NO_REFUSAL
    return (
        row_outcome.id,
        row_outcome.source_id,
        row_outcome.outcome,
        row_outcome.reason,
        row_outcome.contact_id,
        row_outcome.updated_at,
        row_outcome.preparer_id,
        ",".join(row_outcome.filled) or None,
        *refusal,
        row_outcome.contact_updated_at,
        json.dumps(row_outcome.attribution_before) if row_outcome.attribution_before else None,
        json.dumps(row_outcome.identity_keys) if row_outcome.identity_keys else None,
    )


def _is_new(row: MappedRow) -> bool:
    """Return whether no earlier run recorded that PostgreSQL refused the row."""
    return row.known_reason != Reason.DATA_ERROR


def _refused(row: MappedRow, refusal: Refusal) -> RowOutcome:
    return RowOutcome(
        row.id, row.source_id, row.updated_at, row.known_reason, Outcome.ERROR, Reason.DATA_ERROR, refusal=refusal
    )

"""Every row of a batch is brought to an outcome.

Rows are inserted first and asked about after: whatever did not land has met a contact, is looked up by all of its keys
and decided again. So the common case costs one insert, and nothing is ever skipped silently: PostgreSQL's bare
`ON CONFLICT DO NOTHING` also swallows a clash on another unique key than the one that was thought of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from django.db import DatabaseError

from crm.outcome import RowOutcome
from crm.rules.mapping import ContactDraft, MappedRow
from crm.rules.matching import ExistingContacts, decide

#: A contact that was deleted under our eyes may be met again; more often than this is no coincidence.
MAX_ATTEMPTS = 10


class ContactStore(Protocol):
    """Where contacts are: the database, or a dry run's picture of it."""

    def is_likely_met(self, row: MappedRow) -> bool:
        """Whether the row is to be looked up before an insert is tried."""

    def notice(self, rows: Sequence[MappedRow]) -> None:
        """Take a first look at a batch."""

    def insert(self, drafts: Sequence[ContactDraft]) -> set[str]:
        """Insert what meets no contact; return the ids of those that were inserted."""

    def fill(self, fills: dict[str, dict[str, Any]]) -> None:
        """Fill what is NULL in contacts that are there."""

    def contacts_met_by(self, rows: Sequence[MappedRow]) -> ExistingContacts:
        """The contacts that have a key of one of the rows."""


@dataclass(frozen=True, slots=True)
class UpsertResult:
    """Rows that have an outcome, and the contacts that they made: by type, and their ids."""

    row_outcomes: list[RowOutcome] = field(default_factory=list)
    created_by_type: Counter[str] = field(default_factory=Counter)
    made: set[str] = field(default_factory=set)


def upsert(rows: Sequence[MappedRow], store: ContactStore, made_before: Collection[str] = ()) -> UpsertResult:
    """Bring every row to an outcome. `made_before` are contacts of the same transaction, without an entry as yet."""
    result = UpsertResult(made=set(made_before))
    store.notice(rows)
    at_first = _without_second_accounts(
        [row for row in rows if not (row.draft and (row.resolution or store.is_likely_met(row)))]
    )
    waiting = _insert_and_match(at_first, ExistingContacts(), store, result)
    if len(at_first) < len(rows):
        tried = {row.id for row in at_first} - {row.id for row in waiting}
        waiting = [row for row in rows if row.id not in tried]
    for _ in range(MAX_ATTEMPTS):
        if not waiting:
            return result
        known = store.contacts_met_by(waiting)
        for contact in known:
            # The ledger does not say so yet: its entries are written with the end of the batch.
            contact.ours = contact.ours or contact.id in result.made
        waiting = _insert_and_match(waiting, known, store, result)
    raise StillUnmatchedError(len(waiting))


def _without_second_accounts(rows: Sequence[MappedRow]) -> list[MappedRow]:
    """Leave out accounts whose address an earlier row has: their other keys may be those of a contact that is there."""
    found: list[MappedRow] = []
    addresses: set[str] = set()
    for row in rows:
        if row.draft is not None:
            has_account = row.draft.user_id is not None or row.draft.clerk_user_id is not None
            if has_account and row.draft.email in addresses:
                continue
            addresses.add(row.draft.email)
        found.append(row)
    return found


def _insert_and_match(
    rows: Sequence[MappedRow], known: ExistingContacts, store: ContactStore, result: UpsertResult
) -> list[MappedRow]:
    """Do what the plan says; the rows that met a contact which the plan did not know of."""
    plan = decide(rows, known)
    inserted_ids = store.insert(plan.creates)
    store.fill(plan.fills)
    lost = {draft.id for draft in plan.creates} - inserted_ids if len(inserted_ids) < len(plan.creates) else set()
    result.made.update(inserted_ids)
    result.created_by_type.update(draft.contact_type for draft in plan.creates if draft.id not in lost)
    result.row_outcomes.extend(row_outcome for row_outcome in plan.row_outcomes if row_outcome.contact_id not in lost)
    if not lost:
        return []
    return [row for row, row_outcome in zip(rows, plan.row_outcomes, strict=True) if row_outcome.contact_id in lost]


class StillUnmatchedError(DatabaseError):
    """Contacts came and went faster than they could be looked up."""

    def __init__(self, rows: int) -> None:
        super().__init__(f"{rows} rows kept meeting contacts that vanished again")

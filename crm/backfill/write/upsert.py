"""Determines the outcome of every row of a batch.

Rows are inserted first. A row that was not inserted conflicts with an existing contact, is looked up by all of its keys
and matched again. So the common case needs one INSERT, and no row is skipped silently: `ON CONFLICT DO NOTHING` without
a target also ignores conflicts on unique keys other than the expected one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from django.db import DatabaseError

from crm.outcome import RowOutcome
from crm.rules.mapping import ContactDraft, MappedRow
from crm.rules.matching import ExistingContacts, match_batch

#: Maximum number of attempts to match a row whose contact is deleted or changed concurrently.
MAX_ATTEMPTS = 10


class ContactStore(Protocol):
    """The contacts: in the database, or with the overlay of a dry run."""

    def is_likely_met(self, row: MappedRow) -> bool:
        """Return whether the row should be looked up before an insert is tried."""

    def prepare(self, rows: Sequence[MappedRow]) -> None:
        """Prepare the lookups for a batch."""

    def insert(self, drafts: Sequence[ContactDraft]) -> set[str]:
        """Insert the contacts that conflict with no other, and return their ids."""

    def fill(self, fills: dict[str, dict[str, Any]]) -> None:
        """Fill the NULL fields of existing contacts. `fills` has fields by contact id."""

    def contacts_met_by(self, rows: Sequence[MappedRow]) -> ExistingContacts:
        """Return the contacts that have a key of one of the rows."""


@dataclass(frozen=True, slots=True)
class UpsertResult:
    """The outcomes of rows, and the contacts that they created: their number by type, and their ids."""

    row_outcomes: list[RowOutcome] = field(default_factory=list)
    created_by_type: Counter[str] = field(default_factory=Counter)
    made: set[str] = field(default_factory=set)


def upsert(rows: Sequence[MappedRow], store: ContactStore, made_before: Collection[str] = ()) -> UpsertResult:
    """Insert or match every row, and return the outcomes.

    `made_before` are the ids of contacts that the same transaction created and that have no ledger entry yet. Raises
    StillUnmatchedError if a row cannot be matched after MAX_ATTEMPTS.
    """
    result = UpsertResult(made=set(made_before))
    store.prepare(rows)
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
            # The entries of these contacts are written at the end of the batch.
            contact.ours = contact.ours or contact.id in result.made
        waiting = _insert_and_match(waiting, known, store, result)
    raise StillUnmatchedError(len(waiting))


def _without_second_accounts(rows: Sequence[MappedRow]) -> list[MappedRow]:
    """Exclude rows with an account whose address an earlier row has: their other keys may match another contact."""
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
    """Match the rows with the known contacts and write the result. Returns the rows that another contact blocked."""
    plan = match_batch(rows, known)
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
    """Rows could neither be inserted nor matched in MAX_ATTEMPTS attempts."""

    def __init__(self, rows: int) -> None:
        super().__init__(f"{rows} rows could neither be inserted nor matched with a contact")

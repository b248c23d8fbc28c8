"""Compares a contact with what the backfill wrote, as a whole or for a single merge. Pure: no database.

The stored text of the contact is compared with what its source rows map to now. A source row that is missing or was
changed since its entry was written does not show what was written: its columns are not compared, and the contact's
`updatedAt` alone decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from crm.outcome import ASSIGNMENT
from crm.rules.entry import Entry
from crm.rules.mapping import FULL_CONFIDENCE, ContactDraft, MappedRow
from crm.rules.matching import ACCOUNTS, ASSIGNMENT_UNIT, COMMISSION_UNIT, ExistingContact, fill
from crm.rules.snapshot import ContactSnapshot
from crm.rules.updating import FIELDS_OF_CHANGE


class Status(StrEnum):
    """The result of a rollback for an entry of the run."""

    REVERSED = "reversed"  # undone; the entry is deleted, so the row is pending again
    KEPT = "kept"  # not undone, for a KeepReason
    FAILED = "failed"  # the database refused to undo it


class KeepReason(StrEnum):
    """Why an entry is not reversed."""

    EDITED = "edited"  # the contact was modified since
    REFERENCED = "referenced"  # a row of another table refers to the contact
    DELETED = "deleted"  # the contact was deleted in the CRM, and must not be created again
    SOURCE_CHANGED = "source_changed"  # the source row changed, so it does not show what was written
    OTHER_RULES = "other_rules"  # written by other rules than those of this version, so the rows do not show it
    WITH_ITS_CONTACT = "with_its_contact"  # it was merged into a contact of the same run that is kept
    REFUSED = "refused"  # PostgreSQL refused; the detail is its SQLSTATE


class Assessment(NamedTuple):
    """An entry with the result of its rollback. `detail` names columns, tables or a SQLSTATE, never a value."""

    entry: Entry
    status: Status
    keep_reason: KeepReason | None = None
    detail: str = ""

    @property
    def reason(self) -> str:
        """The reason under which an entry that is not reversed is counted."""
        return f"{self.keep_reason} {self.detail}" if self.keep_reason is KeepReason.REFUSED else str(self.keep_reason)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """The current state of a source row.

    `may_differ` are columns whose former value is unknown although the row is unchanged. `raw_preparer` is the preparer
    before it is resolved to a profile, which can have been added or deleted since.
    """

    mapped: MappedRow
    raw_preparer: str | None = None
    may_differ: frozenset[str] = frozenset()


#: Source rows by entry id.
Rows = Mapping[str, SourceRow]


def edited_columns(contact: ContactSnapshot, creator: Entry, merges: Iterable[Entry], rows: Rows) -> list[str]:
    """Return the columns in which a contact differs from what its creating entry and its merges wrote."""
    if contact.values.updated_at != creator.written_at:
        return ["updated_at"]
    written = _possible_values(creator, ContactDraft._fields, rows)
    # A merge that completes an attribution comes after the one that filled it.
    for merge in sorted(merges, key=completes):
        written |= _possible_values(merge, columns_of(merge), rows)
    return [*_differences(contact, written), *contact.set_elsewhere]


def differs_from_merge(contact: ContactSnapshot, merge: Entry, rows: Rows, others: Iterable[Entry] = ()) -> list[str]:
    """Return the columns in which a contact differs from what a merge wrote and the merges `others` completed."""
    completed = "attribution" in merge.filled and any(map(completes, others))
    columns = [name for name in columns_of(merge) if not (completed and name in COMMISSION_UNIT)]
    return _differences(contact, _possible_values(merge, columns, rows))


def completes(merge: Entry) -> bool:
    """Return whether a merge filled the rate of an attribution that another row had filled without one."""
    return "commission" in merge.filled


def mismatch_reason(contact: ContactSnapshot, written_at: str | None, *, by_other_rules: bool) -> KeepReason:
    """Return why a contact differs: OTHER_RULES if other rules wrote it and it is unmodified since, else EDITED."""
    is_modified = contact.set_elsewhere or contact.values.updated_at != written_at
    return KeepReason.OTHER_RULES if by_other_rules and not is_modified else KeepReason.EDITED


def is_unchanged(entry: Entry, rows: Rows) -> bool:
    """Return whether the source row of an entry is the same as when the entry was written."""
    row = rows.get(entry.id)
    return row is not None and row.mapped.draft is not None and row.mapped.updated_at == entry.source_updated_at


def is_expired(entry: Entry, rows: Rows) -> bool:
    """Return whether the source row of an entry is an intake that the application deleted, as it does when one expires.

    What it wrote can still be reversed, unless the contact was modified or a later row wrote the same columns.
    """
    return entry.table == "tax_intake_leads" and entry.id not in rows


def maps_to_nothing(entry: Entry, rows: Rows) -> bool:
    """Return whether the source row of an entry no longer maps to a contact, although its `updatedAt` is unchanged."""
    row = rows.get(entry.id)
    return row is not None and row.mapped.draft is None and row.mapped.updated_at == entry.source_updated_at


def columns_of(merge: Entry) -> tuple[str, ...]:
    """Return the columns that a merge filled."""
    return _columns_of(merge.filled)


def merges_that_miss(
    contact: ContactSnapshot, emptied: Iterable[str], merges: Iterable[Entry], rows: Rows
) -> list[Entry]:
    """Return the merges that would have filled a column which will be emptied.

    What such a merge filled is emptied too, so the columns of one can be missing in another. Merges that cannot be
    reversed are excluded: their row changed since, or the contact no longer has what they filled.
    """
    gone = set(emptied)
    others = list(merges)
    waiting = [
        merge for merge in others if is_unchanged(merge, rows) and not differs_from_merge(contact, merge, rows, others)
    ]
    found: list[Entry] = []
    while missing := [merge for merge in waiting if _would_fill(contact, gone, rows[merge.id])]:
        found += missing
        gone.update(column for merge in missing for column in columns_of(merge))
        waiting = [merge for merge in waiting if merge not in missing]
    return found


def _would_fill(contact: ContactSnapshot, emptied: set[str], row: SourceRow) -> bool:
    """Return whether a row would fill one of these columns if they were empty."""
    nothing: dict[str, Any] = dict.fromkeys(emptied)
    known = ExistingContact.of_draft(contact.values._replace(**nothing))
    return row.mapped.draft is not None and not emptied.isdisjoint(_columns_of(fill(known, row.mapped.draft)))


def is_written_over(entry: Entry, later: Iterable[Entry]) -> bool:
    """Return whether one of the later entries wrote a column of this one."""
    columns = set(columns_of(entry))
    return any(not columns.isdisjoint(columns_of(other)) for other in later)


def _columns_of(filled: Iterable[str]) -> tuple[str, ...]:
    # A repair names its column, which is no unit of an update.
    return tuple(column for name in filled for column in FIELDS_OF_CHANGE.get(name, (name,)))


def before_merge(merge: Entry, confidence: int = FULL_CONFIDENCE) -> dict[str, Any]:
    """Return the values of the columns that a merge filled from before the merge.

    `confidence` is that of a contact without attribution, for entries of earlier versions, which do not record it.
    """
    before: dict[str, Any] = dict.fromkeys(columns_of(merge))
    if "attribution_confidence" in before:
        before["attribution_confidence"] = confidence
    return before | attribution_of_json(merge.attribution_before)


def attribution_of_json(text: str | None) -> dict[str, Any]:
    """Return the fields of an attribution from the JSON in a ledger entry."""
    return json.loads(text) if text else {}


def confidence_of(creator: Entry | None, rows: Rows) -> int:
    """Return the attribution confidence of the row that created a contact; the default if it is unknown."""
    row = rows.get(creator.id) if creator else None
    return row.mapped.draft.attribution_confidence if row and row.mapped.draft else FULL_CONFIDENCE


def _possible_values(entry: Entry, columns: Iterable[str], rows: Rows) -> dict[str, tuple[Any, ...] | None]:
    """Return by column the values that the entry may have written; None means any value."""
    row = rows.get(entry.id)
    if row is None or row.mapped.draft is None or row.mapped.updated_at != entry.source_updated_at:
        return dict.fromkeys(columns)
    draft = row.mapped.draft
    values: dict[str, tuple[Any, ...] | None] = {column: (getattr(draft, column),) for column in columns}
    was_assigned = ASSIGNMENT in entry.filled
    may_differ = row.may_differ if was_assigned else row.may_differ - {*ASSIGNMENT_UNIT}
    if (
        row.mapped.preparer_id is not None
        and row.mapped.preparer_id == entry.seen_preparer
        and not entry.seen_updated_at
    ):
        may_differ -= {"assigned_preparer_id"}  # the row had this one, and no update can have left the contact without
    values |= {column: None for column in may_differ if column in values}
    if row.mapped.resolution is not None:
        # The resolution leaves an account with the contact that had it.
        values |= {column: (getattr(draft, column), None) for column in ACCOUNTS if column in values}
    if values.get("assigned_preparer_id") is not None:
        # The profile of a preparer may have come or gone since. Earlier versions copied one whom nobody can resolve.
        never = () if was_assigned else (None,)
        values["assigned_preparer_id"] = (draft.assigned_preparer_id, row.raw_preparer, *never)
        if values["assigned_at"] is not None:
            values["assigned_at"] = (draft.assigned_at, draft.updated_at, *never)
    return values


def _differences(contact: ContactSnapshot, written: Mapping[str, tuple[Any, ...] | None]) -> list[str]:
    return [
        column
        for column, possible in written.items()
        if possible is not None and getattr(contact.values, column) not in possible
    ]

"""Whether a contact still is as the backfill wrote it, and what of it a merge wrote. Pure: no database.

What is compared is the contact's stored text with what its source rows map to now. A source row that changed since its
entry was written, or is gone, says nothing about what was written: its columns are taken as they are, and the contact's
`updatedAt` alone decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from crm.rules.entry import Entry
from crm.rules.mapping import FULL_CONFIDENCE, ContactDraft, MappedRow
from crm.rules.matching import ACCOUNTS, COMMISSION_UNIT, ExistingContact, fill
from crm.rules.snapshot import ContactSnapshot
from crm.rules.updating import FIELDS_OF_CHANGE


class Verdict(StrEnum):
    """What becomes of an entry of the run that is taken back."""

    REVERSED = "reversed"  # what it did is undone, and the entry is gone: the row is pending again
    KEPT = "kept"  # somebody relies on what it did
    FAILED = "failed"  # the database would not undo it


class KeepReason(StrEnum):
    """Why an entry is not reversed."""

    EDITED = "edited"  # the contact is no longer as it was written
    REFERENCED = "referenced"  # another table's row refers to the contact
    DELETED = "deleted"  # the contact was deleted in the CRM, and is not to be brought back
    SOURCE_CHANGED = "source_changed"  # its row does not tell any more what was written
    OTHER_RULES = "other_rules"  # by the rules of this version its rows do not tell what was written
    WITH_ITS_CONTACT = "with_its_contact"  # it was merged into a contact of the same run that stays
    REFUSED = "refused"  # PostgreSQL's SQLSTATE is the detail


class Assessment(NamedTuple):
    """An entry with what becomes of it. `detail` names columns, tables or a SQLSTATE, never a value."""

    entry: Entry
    verdict: Verdict
    why: KeepReason | None = None
    detail: str = ""

    @property
    def reason(self) -> str:
        """Why it is not reversed, to be counted by."""
        return f"{self.why} {self.detail}" if self.why is KeepReason.REFUSED else str(self.why)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A source row as it is now.

    `may_differ` are columns of which the row does not tell what they were; `raw_preparer` is the assignment before it
    was resolved to a profile, which may since have come or gone.
    """

    mapped: MappedRow
    raw_preparer: str | None = None
    may_differ: frozenset[str] = frozenset()


Rows = Mapping[str, SourceRow]


def edited_columns(contact: ContactSnapshot, creator: Entry, merges: Iterable[Entry], rows: Rows) -> list[str]:
    """The columns in which the contact is not what the entry that made it, and those merged into it, have written."""
    if contact.values.updated_at != creator.written_at:
        return ["updated_at"]
    written = _possible_values(creator, ContactDraft._fields, rows)
    # What completes an attribution comes after it.
    for merge in sorted(merges, key=completes):
        written |= _possible_values(merge, columns_of(merge), rows)
    return [*_differences(contact, written), *contact.set_elsewhere]


def differs_from_merge(contact: ContactSnapshot, merge: Entry, rows: Rows, others: Iterable[Entry] = ()) -> list[str]:
    """The columns in which the contact is not what the merge has written, nor what others completed."""
    completed = "attribution" in merge.filled and any(map(completes, others))
    columns = [name for name in columns_of(merge) if not (completed and name in COMMISSION_UNIT)]
    return _differences(contact, _possible_values(merge, columns, rows))


def completes(merge: Entry) -> bool:
    """Whether a merge brought the rate of an attribution that another row had filled."""
    return "commission" in merge.filled


def why_it_differs(contact: ContactSnapshot, written_at: str | None, *, by_other_rules: bool) -> KeepReason:
    """Why a contact is not what its entries wrote: by the rules of this version, as long as nobody touched it."""
    is_touched = contact.set_elsewhere or contact.values.updated_at != written_at
    return KeepReason.OTHER_RULES if by_other_rules and not is_touched else KeepReason.EDITED


def is_unchanged(entry: Entry, rows: Rows) -> bool:
    """Whether the row of an entry says what it said when the entry was written."""
    row = rows.get(entry.id)
    return row is not None and row.mapped.draft is not None and row.mapped.updated_at == entry.source_updated_at


def maps_to_nothing(entry: Entry, rows: Rows) -> bool:
    """Whether the row of an entry makes no contact any more, although its `updatedAt` says that it is unchanged."""
    row = rows.get(entry.id)
    return row is not None and row.mapped.draft is None and row.mapped.updated_at == entry.source_updated_at


def columns_of(merge: Entry) -> tuple[str, ...]:
    """The columns that a merge filled."""
    return _columns_of(merge.filled)


def merges_that_miss(
    contact: ContactSnapshot, emptied: Iterable[str], merges: Iterable[Entry], rows: Rows
) -> list[Entry]:
    """The merges that found columns filled which are to be emptied, and would have filled them themselves.

    What one of these filled is to be emptied with it, so others may miss that in turn. Left out is what cannot be taken
    back: its row changed since, or the contact does not have what it filled.
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
    """Whether a row would fill one of these columns, were they empty."""
    nothing: dict[str, Any] = dict.fromkeys(emptied)
    known = ExistingContact.of_draft(contact.values._replace(**nothing))
    return row.mapped.draft is not None and not emptied.isdisjoint(_columns_of(fill(known, row.mapped.draft)))


def _columns_of(filled: Iterable[str]) -> tuple[str, ...]:
    return tuple(column for name in filled for column in FIELDS_OF_CHANGE[name])


def before_merge(merge: Entry, confidence: int = FULL_CONFIDENCE) -> dict[str, Any]:
    """Return what stood in the columns that a merge filled, before it.

    `confidence` is that of a contact without attribution, for an entry of an earlier version that does not say so.
    """
    before: dict[str, Any] = dict.fromkeys(columns_of(merge))
    if "attribution_confidence" in before:
        before["attribution_confidence"] = confidence
    return before | attribution_of_json(merge.attribution_before)


def attribution_of_json(text: str | None) -> dict[str, Any]:
    """Return the fields of an attribution as an entry of the ledger keeps them."""
    return json.loads(text) if text else {}


def confidence_of(creator: Entry | None, rows: Rows) -> int:
    """Return the confidence of the row that made a contact."""
    row = rows.get(creator.id) if creator else None
    return row.mapped.draft.attribution_confidence if row and row.mapped.draft else FULL_CONFIDENCE


def _possible_values(entry: Entry, columns: Iterable[str], rows: Rows) -> dict[str, tuple[Any, ...] | None]:
    """For each column what the entry may have written; None is anything."""
    row = rows.get(entry.id)
    if row is None or row.mapped.draft is None or row.mapped.updated_at != entry.source_updated_at:
        return dict.fromkeys(columns)
    draft = row.mapped.draft
    values: dict[str, tuple[Any, ...] | None] = {column: (getattr(draft, column),) for column in columns}
    values |= {column: None for column in row.may_differ if column in values}
    if row.mapped.resolution is not None:
        # An account that another contact had was left there.
        values |= {column: (getattr(draft, column), None) for column in ACCOUNTS if column in values}
    if draft.assigned_preparer_id is not None and "assigned_preparer_id" in values:
        values["assigned_preparer_id"] = (draft.assigned_preparer_id, row.raw_preparer)
    return values


def _differences(contact: ContactSnapshot, written: Mapping[str, tuple[Any, ...] | None]) -> list[str]:
    return [
        column
        for column, possible in written.items()
        if possible is not None and getattr(contact.values, column) not in possible
    ]

"""Reverses what a run with --update changed in existing contacts. Pure: no database.

A change is reversed if it is still in place: the contact's `updatedAt` is the one after the change, its columns are
what the source row maps to, and the source row is unchanged. Of several changes of a contact, the last is reversed
first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crm.rules.entry import Entry
from crm.rules.mapping import ContactDraft
from crm.rules.reverting import (
    Assessment,
    KeepReason,
    Rows,
    Status,
    attribution_of_json,
    before_merge,
    columns_of,
    differs_from_merge,
    is_expired,
    is_unchanged,
    is_written_over,
    merges_that_miss,
    mismatch_reason,
)
from crm.rules.snapshot import ContactSnapshot
from crm.rules.updating import FIELDS_OF_CHANGE
from crm.runs.other_rules import OtherRules


class UpdateRecord(NamedTuple):
    """A row of `contact_update`. `entry` has it in the form of a ledger entry whose `filled` are the changed units."""

    number: int
    entry: Entry
    #: By replaced unit: the former values, or a reference to the row that they came from; None if no row has them.
    former_values: Mapping[str, Any]
    #: By replaced unit: the row that the former values came from.
    former_entries: Mapping[str, Entry]
    from_type: str | None
    from_stage: str | None
    to_stage: str | None
    stage_entered_before: str | None
    placeholder: str | None
    to_type: str | None

    @property
    def written(self) -> dict[str, Any]:
        """The columns that the change wrote, where it recorded their values."""
        recorded = {unit: what["written"] for unit, what in self.former_values.items() if what and "written" in what}
        return {
            name: value
            for unit, values in recorded.items()
            for name, value in zip(FIELDS_OF_CHANGE[unit], values, strict=True)
        }

    @property
    def entries(self) -> list[Entry]:
        """The source row of the change, and the rows of the replaced values."""
        return [self.entry, *self.former_entries.values()]

    def before(self, rows: Rows) -> dict[str, Any] | None:
        """Return the columns before the change; None if a replaced value came from no row, or its row has changed."""
        was: dict[str, Any] = dict.fromkeys(columns_of(self.entry))
        for unit, what in self.former_values.items():
            fields = FIELDS_OF_CHANGE[unit]
            entry = self.former_entries.get(unit)
            if entry is not None and is_unchanged(entry, rows):
                was |= {name: getattr(rows[entry.id].mapped.draft, name) for name in fields}
            elif what is not None and "values" in what:
                was |= zip(fields, what["values"], strict=True)
            else:
                return None
        known = {
            "contact_type": self.from_type,
            "stage": self.from_stage,
            "stage_entered_at": self.stage_entered_before,
            "email": self.placeholder,
        }
        known |= attribution_of_json(self.entry.attribution_before)
        return was | {name: value for name, value in known.items() if name in was}


@dataclass(slots=True)
class Restored:
    """A contact before changes of the run, with these changes and what other runs merged on top of them.

    `version` is the row version that was assessed; `values` are the contact's values after the reversal.
    """

    version: str
    values: ContactDraft
    records: list[UpdateRecord] = field(default_factory=list)
    later_merges: list[Entry] = field(default_factory=list)


@dataclass(slots=True)
class AssessedUpdates:
    """A batch of changes: the assessments of those to keep, and by contact id the contacts to restore."""

    assessments: list[Assessment] = field(default_factory=list)
    restored: dict[str, Restored] = field(default_factory=dict)


def assess_updates(
    records: Sequence[UpdateRecord],
    contacts: Mapping[str, ContactSnapshot],
    merges: Mapping[str, list[Entry]],
    later: Mapping[str, list[Entry]],
    rows: Rows,
    other_rules: OtherRules,
) -> AssessedUpdates:
    """Assess changes. Those of one contact must be ordered with the last one first.

    `merges` are the merged entries by contact id; `rows` are the source rows by entry id. `later` are the changes by
    later runs to the contacts whose row is missing: without the row, they show whether its change was overwritten.
    """
    assessed = AssessedUpdates()
    for record in records:
        contact = contacts.get(record.entry.contact_id)
        if contact is None:
            assessed.assessments.append(Assessment(record.entry, Status.KEPT, KeepReason.DELETED))
            continue
        restored = assessed.restored.get(contact.values.id) or Restored(contact.version, contact.values)
        stands = ContactSnapshot(restored.values, contact.version)
        theirs, over = merges.get(contact.values.id, ()), later.get(contact.values.id, ())
        if reason := _keep(record, stands, rows, theirs, over, other_rules):
            assessed.assessments.append(reason)
            continue
        assessed.restored[contact.values.id] = restored
        restored.records.append(record)
        _restore(restored, stands, record, theirs, rows)
    return assessed


def _keep(
    record: UpdateRecord,
    contact: ContactSnapshot,
    rows: Rows,
    merges: Iterable[Entry],
    later: Iterable[Entry],
    other_rules: OtherRules,
) -> Assessment | None:
    if contact.values.updated_at != record.entry.contact_updated_at:
        return Assessment(record.entry, Status.KEPT, KeepReason.EDITED, "updatedAt")
    stands = is_expired(record.entry, rows) and not is_written_over(record.entry, later)
    if not (stands or is_unchanged(record.entry, rows)) or record.before(rows) is None:
        return Assessment(record.entry, Status.KEPT, KeepReason.SOURCE_CHANGED)
    if differing := _differing(record, contact, rows, merges):
        by_other_rules = other_rules.of([record.entry.run_id]) is not None
        why = mismatch_reason(contact, record.entry.contact_updated_at, by_other_rules=by_other_rules)
        return Assessment(record.entry, Status.KEPT, why, ", ".join(differing))
    return None


def _differing(record: UpdateRecord, contact: ContactSnapshot, rows: Rows, merges: Iterable[Entry]) -> list[str]:
    """Return the columns in which a contact differs from what a change wrote."""
    written = record.written
    by_rows = tuple(unit for unit in record.entry.filled if written.keys().isdisjoint(FIELDS_OF_CHANGE[unit]))
    return [
        *differs_from_merge(contact, record.entry._replace(filled=by_rows), rows, merges),
        *(name for name, value in written.items() if getattr(contact.values, name) != value),
    ]


def _restore(
    restored: Restored, stands: ContactSnapshot, record: UpdateRecord, merges: Iterable[Entry], rows: Rows
) -> None:
    """Reverse a change, with what was merged on top of it: such a row would have filled the value itself."""
    before = record.before(rows) or {}
    emptied = [name for name, value in before.items() if value is None]
    others = [merge for merge in merges if merge.run_id != record.entry.run_id and merge not in restored.later_merges]
    missing = merges_that_miss(stands, emptied, others, rows)
    nothing: dict[str, Any] = {}
    for merge in missing:
        nothing = before_merge(merge) | nothing
    restored.values = restored.values._replace(**(nothing | before))
    restored.later_merges += missing

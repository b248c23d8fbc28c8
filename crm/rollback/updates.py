"""Taking back what a run with --update changed in contacts that are there. Pure: no database.

A change is taken back where it still stands as it was written: the contact's `updatedAt` is the one that the change
left, its columns are what the row says, and the row says what it said. Of several changes of one contact the last one
is taken back first.
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
    Verdict,
    attribution_of_json,
    before_merge,
    columns_of,
    differs_from_merge,
    is_unchanged,
    merges_that_miss,
    why_it_differs,
)
from crm.rules.snapshot import ContactSnapshot
from crm.rules.updating import FIELDS_OF_CHANGE
from crm.runs.other_rules import OtherRules


class UpdateRecord(NamedTuple):
    """A line of `contact_update`, as a ledger entry of its row in `entry`: what it filled is what was changed."""

    number: int
    entry: Entry
    #: By name of what was replaced: what was there, or the row that has it; None where no row did.
    former_values: Mapping[str, Any]
    #: The rows that have what was replaced, by its name.
    former_entries: Mapping[str, Entry]
    from_type: str | None
    from_stage: str | None
    to_stage: str | None
    stage_entered_before: str | None
    placeholder: str | None

    @property
    def entries(self) -> list[Entry]:
        """The row that it wrote from, and those that have what was there before."""
        return [self.entry, *self.former_entries.values()]

    def before(self, rows: Rows) -> dict[str, Any] | None:
        """What the columns were before it; None where a value was a person's and no row has it any more."""
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
    """A contact as it was before changes of the run, which changes these are, and what other runs merged on top."""

    version: str
    values: ContactDraft
    records: list[UpdateRecord] = field(default_factory=list)
    later_merges: list[Entry] = field(default_factory=list)


@dataclass(slots=True)
class JudgedUpdates:
    """A batch of changes: those that stay, and the contacts from which the others are to be taken."""

    decided: list[Assessment] = field(default_factory=list)
    restored: dict[str, Restored] = field(default_factory=dict)


def judge_updates(
    records: Sequence[UpdateRecord],
    contacts: Mapping[str, ContactSnapshot],
    merges: Mapping[str, list[Entry]],
    rows: Rows,
    other_rules: OtherRules,
) -> JudgedUpdates:
    """Judge changes, of which those of one contact come the last one first."""
    judged = JudgedUpdates()
    for record in records:
        contact = contacts.get(record.entry.contact_id)
        if contact is None:
            judged.decided.append(Assessment(record.entry, Verdict.KEPT, KeepReason.DELETED))
            continue
        restored = judged.restored.get(contact.values.id) or Restored(contact.version, contact.values)
        stands = ContactSnapshot(restored.values, contact.version)
        theirs = merges.get(contact.values.id, ())
        if reason := _why_it_stays(record, stands, rows, theirs, other_rules):
            judged.decided.append(reason)
            continue
        judged.restored[contact.values.id] = restored
        restored.records.append(record)
        _restore(restored, stands, record, theirs, rows)
    return judged


def _why_it_stays(
    record: UpdateRecord, contact: ContactSnapshot, rows: Rows, merges: Iterable[Entry], other_rules: OtherRules
) -> Assessment | None:
    if contact.values.updated_at != record.entry.contact_updated_at:
        return Assessment(record.entry, Verdict.KEPT, KeepReason.EDITED, "updatedAt")
    if not is_unchanged(record.entry, rows) or record.before(rows) is None:
        return Assessment(record.entry, Verdict.KEPT, KeepReason.SOURCE_CHANGED)
    if differing := differs_from_merge(contact, record.entry, rows, merges):
        by_other_rules = other_rules.of([record.entry.run_id]) is not None
        why = why_it_differs(contact, record.entry.contact_updated_at, by_other_rules=by_other_rules)
        return Assessment(record.entry, Verdict.KEPT, why, ", ".join(differing))
    return None


def _restore(
    restored: Restored, stands: ContactSnapshot, record: UpdateRecord, merges: Iterable[Entry], rows: Rows
) -> None:
    """Take a change out, with what was merged on top of it: such a row would have filled it itself."""
    before = record.before(rows) or {}
    emptied = [name for name, value in before.items() if value is None]
    others = [merge for merge in merges if merge.run_id != record.entry.run_id and merge not in restored.later_merges]
    missing = merges_that_miss(stands, emptied, others, rows)
    nothing: dict[str, Any] = {}
    for merge in missing:
        nothing = before_merge(merge) | nothing
    restored.values = restored.values._replace(**(nothing | before))
    restored.later_merges += missing

"""Compares every contact that the backfill created with what its source rows map to now, column by column.

The expected values come from the rows of the contact, unit by unit: from the row whose entry was the last to record
that it wrote the unit, whether it created the contact, was merged or updated it. If no entry recorded the unit, it
comes from the first row that has it. Attribution is one unit: its columns never come from two rows.

If a contact differs from the expectation, `updatedAt` shows what was modified since: in an unmodified contact or
source row it has the recorded value. So `updatedAt` itself is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.rows import NONE_PROVEN, EntriesOfContact, FoundRow, RowReader, entries_of_contacts
from crm.outcome import ASSIGNMENT, Reason
from crm.postgres.facts.columns import COLUMN
from crm.postgres.snapshot import PAGE
from crm.rules.entry import Entry
from crm.rules.mapping import ContactDraft, MappedRow
from crm.rules.matching import ASSIGNMENT_UNIT, ExistingContact, fill
from crm.rules.snapshot import ContactSnapshot
from crm.rules.updating import FIELDS_OF_CHANGE
from crm.runs.other_rules import OtherRules
from crm.verification.findings import Check, Finding, Kind, unexplained
from crm.verification.proof import proven_contacts

_MARKER = "updated_at"
#: The column to report for a row that created a contact and is in error now, by the reason of the error.
_COLUMN_OF_REASON = {
    Reason.INVALID_EMAIL: "email",
    Reason.UNKNOWN_ROLE: "contact_type",
    Reason.UNKNOWN_TYPE: "contact_type",
    Reason.UNKNOWN_STATUS: "stage",
}
_FIELD_OF_COLUMN = {"role": "contact_type", "type": "contact_type", "status": "stage"}
#: Stands for a value of a row that can no longer be read; equal to no value.
_UNKNOWN = object()


@dataclass(slots=True)
class Comparison:
    """How many contacts of the backfill were compared, match their source rows, and were modified since.

    A contact whose source row is missing or excluded now is not compared.
    """

    compared: int = 0
    matching: int = 0
    modified: int = 0


def compare_contacts(
    connection: BaseDatabaseWrapper,
    reader: RowReader,
    other_rules: OtherRules,
    counts: Comparison,
    on_page: Callable[[int], None],
) -> Iterator[Finding]:
    """Compare every contact of the backfill, and yield the findings.

    Contacts that PostgreSQL can prove correct are only counted; the others are compared in Python. Adds to `counts`,
    and calls `on_page` with the number of contacts of each page.
    """
    compared = [name for name, column in COLUMN.items() if column not in reader.missing_columns and name != _MARKER]
    query = (NONE_PROVEN, {}) if reader.missing_columns else proven_contacts(reader.facts, reader.resolutions.by_id)
    proven, others = entries_of_contacts(connection, reader.facts, query)
    counts.compared += proven.contacts
    counts.matching += proven.contacts
    counts.modified += proven.touched
    on_page(proven.contacts)
    while page := list(islice(others, PAGE)):
        contacts = reader.contacts(entries.creator.contact_id for entries in page)
        rows = reader.source_rows(entry for entries in page for entry in (entries.creator, *entries.later))
        for entries in page:
            contact = contacts.get(entries.creator.contact_id)
            if contact is None:
                continue  # deleted in the CRM, which the reconciliation counts
            counts.modified += _is_modified(contact, entries)
            row = rows.get(entries.creator.row)
            if row is None:
                yield _missing_row(contact, entries)
            elif row.mapped is not None:  # the reconciliation reports contacts of excluded rows
                counts.compared += 1
                findings = _compare(contact, row.mapped, entries, rows, compared, other_rules)
                counts.matching += not findings
                yield from findings
        on_page(len(page))


def _missing_row(contact: ContactSnapshot, entries: EntriesOfContact) -> Finding:
    kind = Kind.CRM_CHANGED if _is_modified(contact, entries) else Kind.SOURCE_CHANGED
    return Finding(Check.ROW_GONE, kind, entries.creator.row, entries.creator.contact_id)


def _compare(
    contact: ContactSnapshot,
    mapped: MappedRow,
    entries: EntriesOfContact,
    rows: Mapping[str, FoundRow],
    compared: Collection[str],
    other_rules: OtherRules,
) -> list[Finding]:
    if mapped.draft is not None:
        differing = _differing(contact, _without_left_accounts(mapped, mapped.draft, contact), entries, rows, compared)
    else:
        differing = {_field_of_rejection(mapped): entries.creator}
    return list(_findings(differing, contact, entries, rows, other_rules)) if differing else []


def _field_of_rejection(mapped: MappedRow) -> str:
    """Return the contact's field that belongs to the error that its row has now."""
    column = mapped.refusal.column if mapped.refusal else None
    of_column = next((name for name, its_column in COLUMN.items() if its_column == column), None)
    of_reason = _COLUMN_OF_REASON.get(mapped.rejection, "id") if mapped.rejection else "id"
    return of_column or _FIELD_OF_COLUMN.get(column or "", of_reason)


def _differing(
    contact: ContactSnapshot,
    draft: ContactDraft,
    entries: EntriesOfContact,
    rows: Mapping[str, FoundRow],
    compared: Collection[str],
) -> dict[str, Entry]:
    """Return the fields that are not as expected, each with the entry of the row that its value should come from."""
    origin: dict[str, Entry] = {}
    expected = draft
    if entries.later:
        values, origin = _values_of_rows(contact, draft, entries, rows)
        expected = draft._replace(**values)
    if expected == contact.values:
        return {}
    return {
        name: origin.get(name, entries.creator)
        for name in compared
        if getattr(contact.values, name) != getattr(expected, name)
    }


def _values_of_rows(
    contact: ContactSnapshot, draft: ContactDraft, entries: EntriesOfContact, rows: Mapping[str, FoundRow]
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Return the values that later rows filled or changed in a contact, and for each the entry of its row.

    A unit comes from the row of the last entry that recorded it, otherwise from the first row that has it.
    """
    origin: dict[str, Entry] = {}
    known = ExistingContact.of_draft(draft)
    for entry in entries.merged:
        mapped = _mapped(entry, rows)
        if mapped is not None and mapped.draft is not None:
            filled = fill(known, _without_left_accounts(mapped, mapped.draft, contact))
            origin |= {name: entry for unit in filled for name in FIELDS_OF_CHANGE[unit]}
    values = dict(known.fills)
    for entry in (entries.creator, *entries.later):
        mapped = _mapped(entry, rows)
        # The whole draft: what an entry recorded was written, and not left to another contact.
        theirs = mapped.draft if mapped else None
        for unit in entry.filled:
            for name in FIELDS_OF_CHANGE[unit]:
                values[name] = getattr(theirs, name) if theirs else _UNKNOWN
                origin[name] = entry
    return values, origin


def _without_left_accounts(mapped: MappedRow, draft: ContactDraft, contact: ContactSnapshot) -> ContactDraft:
    """Return the draft without the accounts that a row with a resolution leaves to other contacts, which have them."""
    if mapped.resolution is None:
        return draft
    values = contact.values
    return draft._replace(
        user_id=draft.user_id if values.user_id is not None else None,
        clerk_user_id=draft.clerk_user_id if values.clerk_user_id is not None else None,
    )


def _mapped(entry: Entry, rows: Mapping[str, FoundRow]) -> MappedRow | None:
    row = rows.get(entry.row)
    return row.mapped if row else None


def _may_differ(entry: Entry, row: FoundRow | None, name: str) -> bool:
    """Return whether the value that a row gives to a field may have changed since the row was migrated."""
    if row is None or row.mapped is None or row.updated_at != entry.source_updated_at:
        return True
    if entry.table == "profiles":
        # A profile whose user has an invalid address maps to no contact.
        is_resolved = row.mapped.resolution is not None and row.mapped.resolution.separate_email is not None
        of_address = row.mapped.draft is None or (name == "email" and not is_resolved)
        return row.user_changed and of_address
    return False


def _is_reassigned(
    entry: Entry, row: FoundRow | None, contact: ContactSnapshot, name: str, entries: EntriesOfContact
) -> bool:
    """Return whether an unchanged row has another preparer now, and the contact still the one that the row had.

    Preparers are added, deleted and get other codes, and clients get other preparers, without a trace in the row. The
    ledger has the preparer, but not since when it is that of a client.
    """
    if row is None or row.mapped is None or row.mapped.draft is None:
        return False
    recorded = next((each for each in (entries.creator, *entries.merged) if each.id == entry.id), None)
    if recorded is None:
        return True  # a rollback has reversed the merge of a row that an update wrote from
    seen = recorded.seen_preparer
    if contact.values.assigned_preparer_id != seen:
        # An update records the preparer of the row also if it left the contact as it was.
        is_written = any(each.id == entry.id and ASSIGNMENT in each.filled for each in entries.updates)
        return recorded.seen_updated_at is not None and not is_written
    is_date_of_client = name == "assigned_at" and entry.table == "profiles" and seen is not None
    return is_date_of_client or row.mapped.preparer_id != seen


def _findings(
    differing: Mapping[str, Entry],
    contact: ContactSnapshot,
    entries: EntriesOfContact,
    rows: Mapping[str, FoundRow],
    other_rules: OtherRules,
) -> Iterator[Finding]:
    modified = _is_modified(contact, entries)
    # The runs of all rows, because the rules also determine which row a value comes from.
    written_by = other_rules.of(entry.run_id for entry in (entries.creator, *entries.later))
    of_kind: dict[tuple[Kind, str | None], list[str]] = {}
    for name, entry in differing.items():
        row = rows.get(entry.row)
        by_people = (Kind.CRM_CHANGED if modified else Kind.SOURCE_CHANGED), None
        found = by_people if modified or _may_differ(entry, row, name) else unexplained(written_by)
        if found[0] is Kind.DEFECT and name in ASSIGNMENT_UNIT and _is_reassigned(entry, row, contact, name, entries):
            found = by_people
        of_kind.setdefault(found, []).append(COLUMN[name])
    for (kind, by), columns in of_kind.items():
        yield Finding(Check.FIELDS, kind, entries.creator.row, entries.creator.contact_id, tuple(columns), by)


def _is_modified(contact: ContactSnapshot, entries: EntriesOfContact) -> bool:
    return contact.values.updated_at != entries.creator.written_at

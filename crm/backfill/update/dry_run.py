"""The dry run of --update: finds changes like the writer, and records them in the overlay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from crm.backfill.read.entries import entry_of
from crm.backfill.update.reader import Present
from crm.backfill.write.dry_run import DryRunStore, Overlay
from crm.outcome import Source, Totals
from crm.rules.entry import Entry
from crm.rules.fold import FILLED_UNITS
from crm.rules.mapping import MappedRow, Rules
from crm.rules.snapshot import ContactSnapshot
from crm.rules.updating import Change, RevisitContext, RevisitedContact, find_changes, rows_of, totals_of


class DryRunUpdateWriter:
    """Replaces UpdateWriter in a dry run, after the dry run of the ordinary rows."""

    def __init__(self, store: DryRunStore, overlay: Overlay, present: Present, rules: Rules) -> None:
        self._store = store
        self._overlay = overlay
        self._present = present
        self._rules = rules

    def write(self, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        """Return the counts that a batch would have."""
        totals = Totals()
        with self._overlay.batch():
            for rows in pages:
                totals.add(totals_of(self._revisit(source, rows)))
        return totals

    def keep_alive(self) -> None:
        """Do nothing, because a dry run has no lease."""

    def _revisit(self, source: Source, rows: Sequence[MappedRow]) -> list[Change]:
        entries = self._entries(rows)
        contacts = self._contacts({entry.contact_id for entry in entries.values()})
        rows = [row for row in rows if row.id in entries]
        others = rows_of(contacts, rows)
        self._store.prepare(others)
        known = self._store.contacts_met_by(others)
        changes = list(find_changes(source, rows, RevisitContext(entries, contacts, known), self._rules))
        self._record(changes)
        return changes

    def _entries(self, rows: Iterable[MappedRow]) -> dict[str, Entry]:
        overlay = map(self._entry, self._overlay.entries(row.id for row in rows))
        return self._present.entries(rows) | {entry.id: entry for entry in overlay}

    def _entry(self, values: Sequence[Any]) -> Entry:
        return entry_of(values, self._present.facts.second_digits)

    def _contacts(self, ids: Collection[str]) -> dict[str, RevisitedContact]:
        """Return the contacts as they would be, with the rows that would have created or matched them."""
        contacts = {draft.id: RevisitedContact(ContactSnapshot(draft)) for draft in self._overlay.drafts(ids)}
        contacts |= self._present.contacts(ids)
        for identifier, fields in self._overlay.written_in(contacts):
            contact = contacts[identifier]
            if not contact.given:
                contact.left_at = contact.values.updated_at
            contact.write(fields)
            contact.given.update(unit for unit, names in FILLED_UNITS.items() if fields.keys() & set(names))
        entries = [*self._present.entries_of(contacts), *map(self._entry, self._overlay.entries_of(contacts))]
        self._present.add_rows(contacts, entries)
        return contacts

    def _record(self, changes: Iterable[Change]) -> None:
        written: dict[str, dict[str, Any]] = {}
        for change in changes:
            written.setdefault(change.contact_id, {}).update(change.values)
        written = {contact: values for contact, values in written.items() if values}
        self._overlay.write(written)
        self._overlay.change(written)

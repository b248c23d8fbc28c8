"""What somebody knows who watched: which values people wrote, whom they deleted, which rows say something else now.

None of it is asked of the tables that the backfill writes, nor of `updatedAt`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.machine.world import LedgerEntry, State
from tests.support.reference import SETTLED


@dataclass
class Memory:
    """What happened so far, but for what the backfill did."""

    #: The columns of contacts that have what people wrote, by contact; in it as soon as somebody saved it.
    written: dict[str, set[str]] = field(default_factory=dict)
    #: The columns that people emptied of what a command of ours had written, by contact.
    emptied: dict[str, set[str]] = field(default_factory=dict)
    #: Contacts that people made.
    theirs: set[str] = field(default_factory=set)
    #: Rows whose contact somebody saved since their entry was written.
    saved_since: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    #: Entries of rows whose contact was deleted: as they were then, they stay.
    laid_to_rest: dict[str, LedgerEntry] = field(default_factory=dict)
    #: Rows that map to something else since their entry was written; of those, the ones that do not show it.
    moved: set[str] = field(default_factory=set)
    moved_silently: set[str] = field(default_factory=set)

    def contact_saved(self, contact_id: str, columns: Mapping[str, Any], state: State) -> None:
        """Somebody saved a contact in the application with these values; `state` is from before."""
        written = self.written.setdefault(contact_id, set())
        was = state.contacts[contact_id]
        if contact_id not in self.theirs or state.updates_of(contact_id):
            ours = {name for name, value in columns.items() if value is None and was.get(name) is not None} - written
            self.emptied.setdefault(contact_id, set()).update(ours)
        written.update(columns)
        written.difference_update(name for name, value in columns.items() if value is None)
        self.saved_since.update(entry.row for entry in state.entries.values() if entry.contact_id == contact_id)

    def contact_deleted(self, contact_id: str, state: State) -> None:
        """Somebody deleted a contact; `state` is from before."""
        self.deleted.add(contact_id)
        self.theirs.discard(contact_id)
        self.written.pop(contact_id, None)
        self.emptied.pop(contact_id, None)
        for entry in state.entries.values():
            if entry.contact_id == contact_id and entry.outcome in SETTLED:
                self.laid_to_rest[entry.row] = entry

    def row_changed(self, row: str) -> None:
        """A source row was changed or deleted."""
        self.moved.add(row)

    def account_changed(self, user_id: str, state: State) -> None:
        """An account got another address: its profile does not show it."""
        self.row_changed(f"users:{user_id}")
        self._moved_silently(f"profiles:{row['id']}" for row in state.profiles.values() if row["userId"] == user_id)

    def preparer_came_or_went(self, names: Collection[str | None], state: State) -> None:
        """A profile appeared or vanished that leads may name as their preparer, by its own id or its user's."""
        for table, rows in (("leads", state.leads), ("tax_intake_leads", state.tax_intake_leads)):
            self._moved_silently(f"{table}:{row['id']}" for row in rows.values() if row["assignedPreparerId"] in names)
        for row in state.client_preparers.values():
            if row["preparerId"] in names:
                self.client_assigned(row["clientId"])

    def codes_changed(self, codes: Collection[str | None], state: State) -> None:
        """A profile got, lost or has these codes, and may have become a preparer or ceased to be one."""
        spellings = {code.lower() for code in codes if code}
        for table, rows in (("leads", state.leads), ("tax_intake_leads", state.tax_intake_leads)):
            self._moved_silently(
                f"{table}:{row['id']}"
                for row in rows.values()
                if (row["referrerUsername"] or "").strip().lower() in spellings
            )

    def client_assigned(self, profile: str) -> None:
        """A client got another preparer, or lost one: its profile does not show it."""
        self._moved_silently([f"profiles:{profile}"])

    def intakes_came_or_went(self, *intakes: Mapping[str, Any], state: State) -> None:
        """An intake appeared, changed or vanished: of several of a person the last one names the preparer."""
        emails = {row["email"] for row in intakes}
        profiles = {row.get("profileId") for row in intakes} - {None}
        self._moved_silently(
            f"tax_intake_leads:{row['id']}"
            for row in state.tax_intake_leads.values()
            if row["email"] in emails or row.get("profileId") in profiles
        )

    def _moved_silently(self, rows: Iterable[str]) -> None:
        for row in rows:
            self.moved.add(row)
            self.moved_silently.add(row)

    def entries_written(self, before: State, after: State) -> None:
        """A command of ours ran: rows that have a new entry, or none any more, say what their entry says."""
        for row in before.entries.keys() | after.entries.keys():
            if before.entries.get(row) != after.entries.get(row):
                self.moved.discard(row)
                self.moved_silently.discard(row)
                self.saved_since.discard(row)

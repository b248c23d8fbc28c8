"""An entry of the ledger: what runs did with a source row. Pure: no database."""

from __future__ import annotations

from typing import NamedTuple

from crm.outcome import Outcome, Source, UpdateOutcome

_TABLES = {source.value: source.table for source in Source}


class Entry(NamedTuple):
    """An entry of the ledger, or the changes of an update in the same form: then `filled` is what it changed.

    `contact_id` is empty if there is no contact. `source_updated_at` is None if a row in error has no `updatedAt`.
    """

    id: str
    source: str
    source_id: str
    outcome: Outcome | UpdateOutcome
    contact_id: str
    run_id: int
    source_updated_at: str | None
    filled: tuple[str, ...]
    #: `source_updated_at` with the precision of the contact's column.
    written_at: str | None
    #: The row's preparer when a run last processed the row.
    seen_preparer: str | None = None
    seen_updated_at: str | None = None
    contact_updated_at: str | None = None
    #: The values that a merge replaced when it filled an attribution: JSON, by field.
    attribution_before: str | None = None

    @property
    def table(self) -> str:
        """The application's table that contains the row."""
        return _TABLES.get(self.source, "profiles")

    @property
    def row(self) -> str:
        """The reference of the row."""
        return f"{self.table}:{self.source_id}"

    def is_due(self, updated_at: str | None, preparer_id: str | None) -> bool:
        """Return whether an update revisits the row.

        It does if the row has changed, has another preparer, or matched a contact and was not revisited since. Without
        a preparer there is nothing to assign.

        Arguments:
            updated_at: The current `updatedAt` of the row.
            preparer_id: The current preparer of the row.
        """
        if updated_at is None:
            return False  # without it, the row is an error
        seen = self.seen_updated_at or self.source_updated_at
        return (
            updated_at != seen
            or (preparer_id is not None and preparer_id != self.seen_preparer)
            or (self.seen_updated_at is None and self.outcome is not Outcome.CREATED)
        )

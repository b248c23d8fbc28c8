"""An entry of the ledger as it was read: what runs did with one source row. Pure: no database."""

from __future__ import annotations

from typing import NamedTuple

from crm.outcome import Outcome, Source, UpdateOutcome

_TABLES = {source.value: source.table for source in Source}


class Entry(NamedTuple):
    """A row of the ledger; or what an update changed, in the form of one: `filled` is what it changed then.

    `contact_id` is empty where it names none, and `source_updated_at` None where an error's row had none.
    """

    id: str
    source: str
    source_id: str
    outcome: Outcome | UpdateOutcome
    contact_id: str
    run_id: int
    source_updated_at: str | None
    filled: tuple[str, ...]
    #: `source_updated_at` as a contact keeps it.
    written_at: str | None
    #: The row's preparer when a run last processed the row.
    seen_preparer: str | None = None
    seen_updated_at: str | None = None
    contact_updated_at: str | None = None
    #: What a merge replaced of the attribution that there was not: JSON, by the name of the field.
    attribution_before: str | None = None

    @property
    def table(self) -> str:
        """The application's table that the row is in."""
        return _TABLES.get(self.source, "profiles")

    @property
    def row(self) -> str:
        """The row's reference."""
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
            return False  # nobody can tell, and the row can be no contact
        seen = self.seen_updated_at or self.source_updated_at
        return (
            updated_at != seen
            or (preparer_id is not None and preparer_id != self.seen_preparer)
            or (self.seen_updated_at is None and self.outcome is not Outcome.CREATED)
        )

"""A source row by its name: `profiles:<id>` or `leads:<id>`."""

from __future__ import annotations

from typing import NamedTuple

from crm.errors import OperatorError
from crm.rules.mapping import contact_id

_TABLES = ("profiles", "leads")


class RowReference(NamedTuple):
    """A source row by the name that log lines and reports give it."""

    table: str
    source_id: str

    @classmethod
    def parse(cls, text: str) -> RowReference:
        """The row that `profiles:<id>` or `leads:<id>` names. Raises OperatorError for anything else."""
        table, _, source_id = text.partition(":")
        if table not in _TABLES or not source_id:
            raise OperatorError("That names no row: write profiles:<id> or leads:<id>, as the reports do.")
        return cls(table, source_id)

    def __str__(self) -> str:
        return f"{self.table}:{self.source_id}"

    @property
    def entry_id(self) -> str:
        """The key of the row's entry in the ledger, and of the contact that it makes."""
        return contact_id(self.table, self.source_id)

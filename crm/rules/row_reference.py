"""References to source rows: table and id, such as `profiles:<id>`."""

from __future__ import annotations

from typing import NamedTuple

from crm.errors import OperatorError
from crm.outcome import Source
from crm.rules.mapping import contact_id
from crm.rules.source_rows import SOURCE_TABLES

#: The forms of a row's name, for messages.
FORMS = " or ".join(f"{table}:<id>" for table in SOURCE_TABLES)


class RowReference(NamedTuple):
    """The reference to a source row in logs and reports."""

    table: str
    source_id: str

    @classmethod
    def parse(cls, text: str) -> RowReference:
        """Parse a reference such as `leads:<id>`. Raises OperatorError for any other text."""
        table, _, source_id = text.partition(":")
        if table not in SOURCE_TABLES or not source_id:
            raise OperatorError(f"That names no row: write {FORMS}, as the reports do.")
        return cls(table, source_id)

    def __str__(self) -> str:
        return f"{self.table}:{self.source_id}"

    @property
    def entry_id(self) -> str:
        """The key of the row's ledger entry, and the id of the contact that it creates."""
        return contact_id(self.table, self.source_id)


def table_sql(alias: str) -> str:
    """Return the SQL of the table of the source row of an entry or update `alias`."""
    cases = [f"WHEN '{source}' THEN '{source.table}'" for source in Source if source.table != "profiles"]
    return f"CASE {alias}.source {' '.join(cases)} ELSE 'profiles' END"


def reference_sql(alias: str) -> str:
    """Return the SQL of the name of the source row of an entry or update `alias`."""
    return f"({table_sql(alias)} || ':' || {alias}.source_id)"

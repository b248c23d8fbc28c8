"""The columns that the backfill reads and writes, by table of the application."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from crm.models import CRMContact
from crm.rules.fold import FILLED_UNITS
from crm.rules.mapping import ATTRIBUTION_UNIT
from crm.rules.source_rows import CLIENT_PREPARERS, COLUMNS_OF_CLIENT_PREPARERS, PREPARER_CODES, SOURCE_TABLES
from crm.rules.updating import FIELDS_OF_CHANGE

#: The columns of a contact by the name of the draft's field.
COLUMN = {field.attname: str(field.column) for field in CRMContact._meta.concrete_fields}


def columns_of(units: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return the columns of units of a contact's fields, in the table's order."""
    fields = {name for unit in units for name in unit}
    return tuple(column for name, column in COLUMN.items() if name in fields)


ATTRIBUTION_COLUMNS = tuple(COLUMN[name] for name in ATTRIBUTION_UNIT)
CONTACT_COLUMNS = tuple(COLUMN.values())
#: The columns that a merge may fill in an existing contact, and those that only --update writes there.
FILLED_COLUMNS = columns_of(FILLED_UNITS.values())
PROMOTED_COLUMNS = tuple(name for name in columns_of(FIELDS_OF_CHANGE.values()) if name not in FILLED_COLUMNS)

REQUIRED_COLUMNS: Mapping[str, tuple[str, ...]] = {
    **{name: table.required_columns for name, table in SOURCE_TABLES.items()},
    CLIENT_PREPARERS: COLUMNS_OF_CLIENT_PREPARERS,
    "crm_contacts": tuple(column for column in CONTACT_COLUMNS if column not in ATTRIBUTION_COLUMNS),
}
OPTIONAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    **{name: table.optional_columns for name, table in SOURCE_TABLES.items()},
    "profiles": (*SOURCE_TABLES["profiles"].optional_columns, *PREPARER_CODES),
    "crm_contacts": ATTRIBUTION_COLUMNS,
}
#: The tables that some databases lack.
OPTIONAL_TABLES = frozenset(name for name, table in SOURCE_TABLES.items() if table.is_optional) | {CLIENT_PREPARERS}
COLUMNS_IN_USE: Mapping[str, tuple[str, ...]] = {
    table: (*names, *OPTIONAL_COLUMNS.get(table, ())) for table, names in REQUIRED_COLUMNS.items()
}

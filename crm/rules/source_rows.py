"""The rows that make contacts: for each of the application's tables, one declaration of what is read, and as what.

A field of a row says in its annotation where its value comes from. The SELECT lists of everything that reads rows, the
values that the rules map, and the columns that a database must have all follow from that. Pure: no database.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple, get_type_hints


@dataclass(frozen=True)
class Own:
    """A column of the table itself. Where a generation lacks an optional one, it reads as NULL.

    Nobody bounds how long a text is that `is_long`.
    """

    column: str
    is_optional: bool = False
    is_long: bool = False


@dataclass(frozen=True)
class Joined:
    """An SQL expression over what is joined to the row `r`."""

    expression: str
    is_long: bool = False


@dataclass(frozen=True)
class KnownReason:
    """What an earlier run said of the row; NULL where the ledger is not asked."""


class ProfileRow(NamedTuple):
    """A profile with its user's email.

    Any column but the id may be NULL, whatever the application's own schema says.
    """

    id: Annotated[str, Own("id")]
    created_at: Annotated[str | None, Own("createdAt")]
    updated_at: Annotated[str | None, Own("updatedAt")]
    known_reason: Annotated[str | None, KnownReason()]
    role: Annotated[str | None, Own("role")]
    first_name: Annotated[str | None, Own("firstName", is_long=True)]
    last_name: Annotated[str | None, Own("lastName", is_long=True)]
    phone: Annotated[str | None, Own("phone", is_long=True)]
    company_name: Annotated[str | None, Own("companyName", is_long=True)]
    user_id: Annotated[str | None, Own("userId", is_long=True)]
    clerk_user_id: Annotated[str | None, Own("clerkUserId", is_optional=True)]
    email: Annotated[str | None, Joined("u.email", is_long=True)]


class LeadRow(NamedTuple):
    """A lead, its preparer resolved to a profile's id; NULLs as in a profile."""

    id: Annotated[str, Own("id")]
    created_at: Annotated[str | None, Own("createdAt")]
    updated_at: Annotated[str | None, Own("updatedAt")]
    known_reason: Annotated[str | None, KnownReason()]
    status: Annotated[str | None, Own("status")]
    type: Annotated[str | None, Own("type")]
    email: Annotated[str | None, Own("email", is_long=True)]
    first_name: Annotated[str | None, Own("firstName", is_long=True)]
    last_name: Annotated[str | None, Own("lastName", is_long=True)]
    phone: Annotated[str | None, Own("phone", is_long=True)]
    source: Annotated[str | None, Own("source", is_long=True)]
    last_contacted_at: Annotated[str | None, Own("lastContactedAt")]
    referrer_username: Annotated[str | None, Own("referrerUsername", is_long=True)]
    referrer_type: Annotated[str | None, Own("referrerType", is_long=True)]
    commission_rate: Annotated[str | None, Own("commissionRate")]
    commission_rate_locked_at: Annotated[str | None, Own("commissionRateLockedAt")]
    attribution_method: Annotated[str | None, Own("attributionMethod", is_long=True)]
    attribution_confidence: Annotated[int | None, Own("attributionConfidence")]
    raw_assigned_preparer_id: Annotated[str | None, Own("assignedPreparerId", is_long=True)]
    assigned_preparer_id: Annotated[str | None, Joined('COALESCE(p.id, r."assignedPreparerId")')]


RawRow = ProfileRow | LeadRow


@dataclass(frozen=True)
class SourceTable:
    """A table of the application whose rows make contacts.

    `label` is the field that decides which source a row is of, `join` what a row `r` is joined to, with `{more}` for
    further columns of that. Where `is_sorted_by_creation`, a reader goes by that moment and the id, else by the id.
    """

    name: str
    row: type[ProfileRow | LeadRow]
    label: str
    join: str
    is_sorted_by_creation: bool = False

    @cached_property
    def fields(self) -> dict[str, Own | Joined | KnownReason]:
        """Where the fields of a row come from, in their order."""
        hints = get_type_hints(self.row, include_extras=True)
        return {name: hints[name].__metadata__[0] for name in self.row._fields}

    @cached_property
    def own(self) -> dict[str, Own]:
        """The columns of the table itself, by the fields that they are read as."""
        return {name: origin for name, origin in self.fields.items() if isinstance(origin, Own)}

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The columns that are read in every generation."""
        return tuple(own.column for own in self.own.values() if not own.is_optional)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """The columns that some generations lack."""
        return tuple(own.column for own in self.own.values() if own.is_optional)

    @property
    def label_column(self) -> str:
        """The column of the label."""
        return self.own[self.label].column

    def label_of(self, row: RawRow) -> str | None:
        """The row's label."""
        label: str | None = getattr(row, self.label)
        return label

    def columns(self, missing: Container[str], known_reason: str = "NULL::text") -> str:
        """The SELECT list of the table's own columns, of a row `r`: what `values` is selected from.

        By name and never r.*: the role of the backfill may not read the secret ones. `missing` are the columns that
        the database lacks, as `<table>.<column>`.
        """
        names = [own.column for own in self.own.values()]
        own = (f'NULL::text AS "{name}"' if f"{self.name}.{name}" in missing else f'r."{name}"' for name in names)
        return f"{', '.join(own)}, {known_reason} AS known_reason"

    @property
    def values(self) -> str:
        """The SELECT list of the values of a row in the order of its fields: of the `columns` of `r`, and of `join`."""
        return ", ".join(_value(origin) for origin in self.fields.values())

    @property
    def long_values(self) -> list[str]:
        """Those of them that are texts of any length."""
        return [
            _value(origin) for origin in self.fields.values() if not isinstance(origin, KnownReason) and origin.is_long
        ]


def _value(origin: Own | Joined | KnownReason) -> str:
    match origin:
        case Own(column):
            return f'r."{column}"'
        case Joined(expression):
            return expression
        case _:
            return "r.known_reason"


_USER = """
       LEFT JOIN LATERAL (SELECT email{more} FROM users WHERE users.id = r."userId" LIMIT 1) u ON true"""
# Some rows name their preparer by the user.
_PREPARER = """
       LEFT JOIN LATERAL (
         SELECT id{more} FROM profiles WHERE id = r."assignedPreparerId" OR "userId" = r."assignedPreparerId"
          ORDER BY id <> r."assignedPreparerId" LIMIT 1
       ) p ON r."assignedPreparerId" IS NOT NULL"""

SOURCE_TABLES: Mapping[str, SourceTable] = {
    table.name: table
    for table in (
        SourceTable("profiles", ProfileRow, "role", _USER),
        SourceTable("leads", LeadRow, "status", _PREPARER, is_sorted_by_creation=True),
    )
}

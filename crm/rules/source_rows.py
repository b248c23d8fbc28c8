"""Declares the source rows: for each table of the application, the fields that are read. Pure: no database.

The annotation of a field says where its value comes from. The SELECT lists of all readers, the values that the rules
map, and the required columns are derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple, get_type_hints

#: The characters that str.strip() removes, for PostgreSQL's btrim(): both must have the same result. Below it as SQL.
WHITE_SPACE = "".join(character for character in map(chr, range(0x3001)) if character.isspace())
_WHITE_SPACE = "E'" + "".join(f"\\u{ord(character):04x}" for character in WHITE_SPACE) + "'"


@dataclass(frozen=True)
class Own:
    """A column of the table itself. An optional column that is missing is read as NULL.

    `is_long` is True for a text of unlimited length.
    """

    column: str
    is_optional: bool = False
    is_long: bool = False
    type: str = "text"


@dataclass(frozen=True)
class Label:
    """A label that several columns determine: an SQL expression with their names in braces."""

    expression: str


@dataclass(frozen=True)
class Joined:
    """An SQL expression over the joined tables of a row `r`."""

    expression: str
    is_long: bool = False


@dataclass(frozen=True)
class OfReferrer:
    """The profile of the tax preparer whose code the row's referrer is, for a row without a preparer.

    No join finds it, since the codes have no index without case: `crm.backfill.read.referrers` fills it in, page by
    page. Such a row also has the fields `raw_assigned_preparer_id` and `referrer_username`.
    """


@dataclass(frozen=True)
class KnownReason:
    """The reason of the row's error in an earlier run; NULL if the ledger is not read."""


class ProfileRow(NamedTuple):
    """A profile with its user's email, its own, which newer generations have, and its preparer.

    Any column except the id may be NULL, even if the application's schema declares it NOT NULL.
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
    own_email: Annotated[str | None, Own("email", is_optional=True, is_long=True)]
    raw_assigned_preparer_id: Annotated[str | None, Joined('assigned."preparerId"')]
    assigned_preparer_id: Annotated[str | None, Joined("assigned.profile_id")]
    assigned_at: Annotated[str | None, Joined('assigned."assignedAt"')]


class LeadRow(NamedTuple):
    """A lead. Its preparer is resolved to the id of a profile. Columns may be NULL as in a profile."""

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
    assigned_preparer_id: Annotated[str | None, Joined("p.profile_id")]
    referring_preparer_id: Annotated[str | None, OfReferrer()]


_KIND_OF_INTAKE = """CASE WHEN {unqualified} IS TRUE AND {convertedToClient} IS TRUE THEN 'unqualified_client'
      WHEN {unqualified} IS TRUE THEN 'unqualified' WHEN {convertedToClient} IS TRUE THEN 'converted' ELSE 'open' END"""


class IntakeRow(NamedTuple):
    """What a person entered in the tax form. The preparer is resolved as a lead's; NULLs as in a profile.

    `is_outranked` tells whether another intake of the person names the preparer.
    """

    id: Annotated[str, Own("id")]
    created_at: Annotated[str | None, Own("created_at")]
    updated_at: Annotated[str | None, Own("updated_at")]
    known_reason: Annotated[str | None, KnownReason()]
    kind: Annotated[str, Label(_KIND_OF_INTAKE)]
    email: Annotated[str | None, Own("email", is_long=True)]
    first_name: Annotated[str | None, Own("first_name", is_long=True)]
    last_name: Annotated[str | None, Own("last_name", is_long=True)]
    phone: Annotated[str | None, Own("phone", is_long=True)]
    country_code: Annotated[str | None, Own("country_code", is_optional=True, is_long=True)]
    last_contacted_at: Annotated[str | None, Own("lastContactedAt", is_optional=True, type="timestamp")]
    converted_to_client: Annotated[bool | None, Own("convertedToClient", is_optional=True, type="boolean")]
    converted_at: Annotated[str | None, Own("convertedAt", is_optional=True, type="timestamp")]
    unqualified: Annotated[bool | None, Own("unqualified", is_optional=True, type="boolean")]
    unqualified_at: Annotated[str | None, Own("unqualifiedAt", is_optional=True, type="timestamp")]
    referrer_username: Annotated[str | None, Own("referrerUsername", is_optional=True, is_long=True)]
    referrer_type: Annotated[str | None, Own("referrerType", is_optional=True, is_long=True)]
    attribution_method: Annotated[str | None, Own("attributionMethod", is_optional=True, is_long=True)]
    profile_id: Annotated[str | None, Own("profileId", is_optional=True, is_long=True)]
    raw_assigned_preparer_id: Annotated[str | None, Own("assignedPreparerId", is_optional=True, is_long=True)]
    assigned_preparer_id: Annotated[str | None, Joined("p.profile_id")]
    is_outranked: Annotated[bool, Joined("outranked.is_so")]
    referring_preparer_id: Annotated[str | None, OfReferrer()]


class SignupRow(NamedTuple):
    """A user without a profile, or one that had none when it was migrated; NULLs as in a profile."""

    id: Annotated[str, Own("id")]
    created_at: Annotated[str | None, Own("createdAt")]
    updated_at: Annotated[str | None, Own("updatedAt")]
    known_reason: Annotated[str | None, KnownReason()]
    kind: Annotated[str, Label("'signup'")]
    email: Annotated[str | None, Own("email", is_long=True)]
    name: Annotated[str | None, Own("name", is_optional=True, is_long=True)]


RawRow = ProfileRow | LeadRow | IntakeRow | SignupRow
#: The rows that have a field OfReferrer.
REFERRED_ROWS = (LeadRow, IntakeRow)
Origin = Own | Label | Joined | OfReferrer | KnownReason

#: The preparers of clients, by profile. Some databases lack the table.
CLIENT_PREPARERS = "client_preparers"
#: Its columns that are read. The active row with the latest date counts.
COLUMNS_OF_CLIENT_PREPARERS = ("id", "clientId", "preparerId", "assignedAt", "isActive")
#: The columns of a profile with the codes of a referrer, in order of precedence.
PREPARER_CODES = ("trackingCode", "customTrackingCode", "shortLinkUsername")


@dataclass(frozen=True)
class SourceTable:
    """A table of the application whose rows create contacts.

    `label` is the field that decides which source a row is of, `joining` makes what a row `r` is joined to (`join`).
    Where `is_sorted_by_creation`, a reader goes by that moment and the id, else by the id. A table that `is_optional`
    is not in every database.
    """

    name: str
    row: type[ProfileRow | LeadRow | IntakeRow | SignupRow]
    label: str
    joining: Callable[[Container[str]], str]
    is_sorted_by_creation: bool = False
    is_optional: bool = False

    @cached_property
    def fields(self) -> dict[str, Origin]:
        """The origin of each field of a row, in their order."""
        hints = get_type_hints(self.row, include_extras=True)
        return {name: hints[name].__metadata__[0] for name in self.row._fields}

    @cached_property
    def own(self) -> dict[str, Own]:
        """The columns of the table itself, by field."""
        return {name: origin for name, origin in self.fields.items() if isinstance(origin, Own)}

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The columns that every generation must have."""
        return tuple(own.column for own in self.own.values() if not own.is_optional)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """The columns that some generations lack."""
        return tuple(own.column for own in self.own.values() if own.is_optional)

    @property
    def label_column(self) -> str | None:
        """The column of the label; None where several make it."""
        origin = self.fields[self.label]
        return origin.column if isinstance(origin, Own) else None

    def label_sql(self, missing: Container[str]) -> str:
        """The label of a row `r` of the table itself. `missing` is as in `columns`."""
        origin = self.fields[self.label]
        return _label(origin, self.own_sql(missing)) if isinstance(origin, Label) else f'r."{self.label_column}"'

    @property
    def updated_at(self) -> str:
        """When a row `r` was written last."""
        return f'r."{self.own["updated_at"].column}"'

    def label_of(self, row: RawRow) -> str | None:
        """Return the label of a row."""
        label: str | None = getattr(row, self.label)
        return label

    def join(self, missing: Container[str], more: str = "") -> str:
        """What a row `r` is joined to, with further columns `more` of the user of a profile.

        `missing` are the columns that the database lacks, as in `columns`, and the optional tables.
        """
        return self.joining(missing).format(more=more)

    def own_sql(self, missing: Container[str]) -> dict[str, str]:
        """The SQL of the table's own columns of a row `r`, by their name."""
        return {
            own.column: f"NULL::{own.type}" if f"{self.name}.{own.column}" in missing else f'r."{own.column}"'
            for own in self.own.values()
        }

    def columns(self, missing: Container[str], known_reason: str = "NULL::text") -> str:
        """Return the SELECT list of the table's own columns of a row `r`, from which `values` is selected.

        It names the columns instead of r.*, because the role of the backfill may not read secret ones. `missing` are
        the columns that the database lacks, as `<table>.<column>`.
        """
        own = (f'{sql} AS "{name}"' if sql.startswith("NULL") else sql for name, sql in self.own_sql(missing).items())
        return f"{', '.join(own)}, {known_reason} AS known_reason"

    @property
    def values(self) -> str:
        """The SELECT list of the values of a row in the order of its fields, from the `columns` of `r` and `join`."""
        return ", ".join(self._value(origin) for origin in self.fields.values())

    @property
    def long_values(self) -> list[str]:
        """The values that are texts of unlimited length."""
        return [
            self._value(origin)
            for origin in self.fields.values()
            if isinstance(origin, Own | Joined) and origin.is_long
        ]

    def _value(self, origin: Origin) -> str:
        match origin:
            case Own(column):
                return f'r."{column}"'
            case Joined(expression):
                return expression
            case Label():
                return _label(origin, self.own_sql(()))
            case OfReferrer():
                return "NULL::text"
            case _:
                return "r.known_reason"


def _label(label: Label, columns: Mapping[str, str]) -> str:
    return f"({label.expression.format_map(columns)})"


_USER = """
       LEFT JOIN LATERAL (SELECT email{more} FROM users WHERE users.id = r."userId" LIMIT 1) u ON true"""
# Some rows refer to the user of their preparer. One who has no profile is nobody.
_PROFILE_OF_PREPARER = """
         SELECT id AS profile_id FROM profiles WHERE id = {preparer} OR "userId" = {preparer}
          ORDER BY id <> {preparer} LIMIT 1"""
_PREPARER = f"""
       LEFT JOIN LATERAL ({_PROFILE_OF_PREPARER.format(preparer='r."assignedPreparerId"')}
       ) p ON r."assignedPreparerId" IS NOT NULL"""
_PREPARER_OF_CLIENT = f"""
       LEFT JOIN LATERAL (
         SELECT latest."preparerId", latest."assignedAt", preparer.profile_id
           FROM (SELECT "preparerId", "assignedAt" FROM {CLIENT_PREPARERS} WHERE "clientId" = r.id AND "isActive"
                  ORDER BY "assignedAt" DESC NULLS LAST, id COLLATE "C" LIMIT 1) latest
           LEFT JOIN LATERAL ({_PROFILE_OF_PREPARER.format(preparer='latest."preparerId"')}) preparer ON true
       ) assigned ON true"""
_NO_PREPARER_OF_CLIENT = """
       CROSS JOIN (
         SELECT NULL::text AS "preparerId", NULL::timestamp AS "assignedAt", NULL::text AS profile_id) assigned"""

# An index probe each. What comes besides the key is opaque to the planner: it would walk along another index for it.
_IS_OUTRANKED = """CASE WHEN {is_named} OR {is_referred} THEN COALESCE({by_each_key}, false) ELSE false END"""
_OUTRANKED_BY = """(
           SELECT true FROM tax_intake_leads other WHERE other."{key}" = r."{key}" AND CASE
             WHEN {other_is_named} AND ({is_named} IS NOT TRUE OR (other.created_at, other.id) > (r.created_at, r.id))
              AND {is_one_person} THEN true ELSE false END LIMIT 1)"""


# The intakes of a profile without a contact, such as an administrator's, are those of several people.
_HAS_CONTACT = """(
                    SELECT upper(role::text) IN ('CLIENT', 'TAX_PREPARER', 'AFFILIATE') FROM profiles
                     WHERE profiles.id = r."profileId" LIMIT 1)"""


def is_outranked_sql(missing: Container[str]) -> str:
    """Return the SQL condition that another intake of the person of an intake `r` names the preparer.

    That is the latest one that names one. It is found by the address as it is stored, or by the profile, if that has a
    contact by its role. `missing` is as in `SourceTable.columns`.
    """
    columns = SOURCE_TABLES["tax_intake_leads"].own_sql(missing)
    keys = [key for key in ("email", "profileId") if f"tax_intake_leads.{key}" not in missing]
    if "tax_intake_leads.assignedPreparerId" in missing:
        return "false"

    def is_filled(column: str) -> str:
        return f"(btrim({column}, {_WHITE_SPACE}) <> '')"

    is_named, other_is_named = is_filled(columns["assignedPreparerId"]), is_filled('other."assignedPreparerId"')
    return _IS_OUTRANKED.format(
        is_named=is_named,
        is_referred=is_filled(columns["referrerUsername"]),
        by_each_key=", ".join(
            _OUTRANKED_BY.format(
                key=key,
                is_named=is_named,
                other_is_named=other_is_named,
                is_one_person=_HAS_CONTACT if key == "profileId" else "true",
            )
            for key in keys
        ),
    )


def _of_profile(missing: Container[str]) -> str:
    return _USER + (_NO_PREPARER_OF_CLIENT if CLIENT_PREPARERS in missing else _PREPARER_OF_CLIENT)


def _of_lead(_missing: Container[str]) -> str:
    return _PREPARER


def _of_intake(missing: Container[str]) -> str:
    return f"{_PREPARER}\n       CROSS JOIN LATERAL (SELECT {is_outranked_sql(missing)} AS is_so) outranked"


def _of_signup(_missing: Container[str]) -> str:
    return ""


SOURCE_TABLES: Mapping[str, SourceTable] = {
    table.name: table
    for table in (
        SourceTable("profiles", ProfileRow, "role", _of_profile),
        SourceTable("leads", LeadRow, "status", _of_lead, is_sorted_by_creation=True),
        SourceTable("tax_intake_leads", IntakeRow, "kind", _of_intake, is_sorted_by_creation=True, is_optional=True),
        SourceTable("users", SignupRow, "kind", _of_signup),
    )
}

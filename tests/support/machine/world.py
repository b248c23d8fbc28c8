"""The world around the backfill: the application and the people in the CRM write, and all of it can be looked at.

Every write bumps `updatedAt` to this very moment, as Prisma does. Ids count up, so that an example is the same again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from django.db import connection

from tests.conftest import Database
from tests.support.populations import (
    CODE_COLUMNS,
    HAS_CLERK_USER_ID,
    HAS_CONVERSIONS,
    HAS_TAX_YEARS,
    STAGE_LABELS,
    read_contacts,
)
from tests.support.reference import ATTRIBUTION, Entry, Population, Resolution, Row

#: What we only read, and what people add to contacts. Of the contacts' history only what is not told by an update.
OTHER_TABLES = ("users", "profiles", "leads", "tax_intake_leads", "client_preparers", "crm_interactions")
_OF_AN_UPDATE = "reason = 'CRM contacts backfill'"
_OTHERS_HISTORY = f"SELECT h::text FROM crm_stage_history h WHERE ({_OF_AN_UPDATE}) IS NOT TRUE ORDER BY 1"
_HISTORY = f'SELECT "contactId", "toStage"::text FROM crm_stage_history WHERE {_OF_AN_UPDATE}'

_NOW = "date_trunc('milliseconds', clock_timestamp() AT TIME ZONE 'UTC')"
_COLUMNS = {
    "users": ("id", "email", "createdAt", "updatedAt"),
    "profiles": (
        *("id", "userId", "role", "firstName", "lastName", "phone", "companyName", "createdAt", "updatedAt"),
        *CODE_COLUMNS,
    ),
    "client_preparers": ("id", "clientId", "preparerId", "assignedAt", "isActive"),
    "leads": (
        *("id", "type", "status", "firstName", "lastName", "email", "phone", "source", "assignedPreparerId"),
        *("lastContactedAt", *ATTRIBUTION, "createdAt", "updatedAt"),
    ),
    "tax_intake_leads": (
        *("id", "first_name", "last_name", "email", "phone", "country_code", "referrerUsername", "referrerType"),
        *("attributionMethod", "assignedPreparerId", "lastContactedAt", "created_at", "updated_at"),
    ),
}
_WITHOUT_UPDATED_AT = ("client_preparers", "crm_stage_history")
_CONVERSIONS = ("profileId", "convertedToClient", "convertedAt")
_TAX_YEARS = ("tax_year", "unqualified", "unqualifiedAt")
_TABLE = """CASE WHEN source LIKE '%intakes' THEN 'tax_intake_leads:' WHEN source LIKE '%leads' THEN 'leads:'
            WHEN source = 'signups' THEN 'users:' ELSE 'profiles:' END"""
_ENTRIES = f"""
SELECT {_TABLE} || source_id, id, source, outcome, reason,
       contact_id, identity_keys::text, run_id, source_updated_at, filled, COALESCE(seen_updated_at, source_updated_at),
       seen_updated_at IS NOT NULL, seen_preparer
  FROM ledger_entry
"""
_UPDATES = f"""
SELECT id, {_TABLE} || source_id, contact_id, run_id,
       source_updated_at, contact_updated_at, columns, from_type, from_stage, to_stage, placeholder, former::text
  FROM contact_update ORDER BY id
"""
_RESOLUTIONS = 'SELECT "row", contact_id, separate_email FROM conflict_decision'
_REFERENCED = f"""
SELECT "contactId" FROM crm_interactions
 UNION SELECT "contactId" FROM crm_stage_history WHERE ({_OF_AN_UPDATE}) IS NOT TRUE
"""


class LedgerEntry(NamedTuple):
    """An entry of the ledger, but for what a second look remembers."""

    row: str
    id: str
    source: str
    outcome: str
    reason: str | None
    contact_id: str | None
    keys: str | None
    run: int
    updated_at: datetime
    filled: tuple[str, ...]

    def as_the_reference(self) -> Entry:
        """What the reference knows of an entry."""
        return {
            "source": self.source,
            "outcome": self.outcome,
            "reason": self.reason,
            "contact_id": self.contact_id,
            "keys": json.loads(self.keys) if self.keys else None,
        }


class Update(NamedTuple):
    """What a second look at a row changed in a contact."""

    number: int
    row: str
    contact_id: str
    run: int
    updated_at: datetime
    contact_updated_at: datetime
    filled: tuple[str, ...]
    from_type: str | None
    from_stage: str | None
    to_stage: str | None
    placeholder: str | None
    former: str | None

    @property
    def former_values(self) -> dict[str, Any]:
        """By name of what was replaced: what was there, or the row that has it; None where no row had."""
        return json.loads(self.former) if self.former else {}


@dataclass(frozen=True)
class State:
    """Everything, at one moment. Lines and resolutions are by row reference, other rows by id."""

    generation: str
    users: Mapping[str, Row]
    profiles: Mapping[str, Row]
    leads: Mapping[str, Row]
    tax_intake_leads: Mapping[str, Row]
    client_preparers: Mapping[str, Row]
    contacts: Mapping[str, Row]
    entries: Mapping[str, LedgerEntry]
    seen: Mapping[str, datetime]
    looked: frozenset[str]
    seen_preparer: Mapping[str, str | None]
    updates: Sequence[Update]
    history: frozenset[tuple[str, str]]
    resolutions: Mapping[str, Resolution]
    referenced: frozenset[str]

    @property
    def population(self) -> Population:
        """The same for the reference."""
        return Population(
            generation=self.generation,
            stages=STAGE_LABELS[self.generation],
            has_clerk_user_id=self.generation in HAS_CLERK_USER_ID,
            users=list(self.users.values()),
            profiles=list(self.profiles.values()),
            leads=list(self.leads.values()),
            tax_intake_leads=list(self.tax_intake_leads.values()),
            contacts=list(self.contacts.values()),
            client_preparers=list(self.client_preparers.values()),
        )

    @property
    def ledger(self) -> dict[str, Entry]:
        """The ledger for the reference."""
        return {row: entry.as_the_reference() for row, entry in self.entries.items()}

    def source_row(self, reference: str) -> Row | None:
        """The row of a reference, if it is there."""
        table, _, identifier = reference.partition(":")
        rows: Mapping[str, Row] = getattr(self, table)
        return rows.get(identifier)

    def creators(self) -> dict[str, LedgerEntry]:
        """The entries that made contacts, by contact."""
        return {entry.id: entry for entry in self.entries.values() if entry.outcome == "created"}

    def updates_of(self, contact_id: str) -> list[Update]:
        """What second looks changed in a contact, in their order."""
        return [update for update in self.updates if update.contact_id == contact_id]

    def merged_into(self, contact_id: str) -> list[LedgerEntry]:
        """The entries of the rows that were merged into a contact."""
        return [entry for entry in self.entries.values() if (entry.outcome, entry.contact_id) == ("merged", contact_id)]


class World:
    """The database of one example."""

    def __init__(self, database: Database, generation: str) -> None:
        """Empty tables of a generation."""
        database.use(generation)
        self._database = database
        self.generation = generation
        self.has_clerk_user_id = generation in HAS_CLERK_USER_ID
        self.stages = STAGE_LABELS[generation]
        self._numbers = itertools.count(1)
        self._seen: State | None = None

    def state(self) -> State:
        """Everything, as it was when somebody last looked or wrote by this class."""
        return self._seen or self.look()

    def look(self) -> State:
        """Look at everything again."""
        self._seen = self._read_all()
        return self._seen

    def _read_all(self) -> State:
        profile_columns = _COLUMNS["profiles"] + (("clerkUserId",) if self.has_clerk_user_id else ())
        intake_columns = _COLUMNS["tax_intake_leads"]
        intake_columns += _CONVERSIONS if self.generation in HAS_CONVERSIONS else ()
        intake_columns += _TAX_YEARS if self.generation in HAS_TAX_YEARS else ()
        with connection.cursor() as cursor:
            contacts = read_contacts(cursor)
        entries = [(_entry(row[:-3]), _aware(row[-3]), *row[-2:]) for row in self._rows(_ENTRIES)]
        return State(
            self.generation,
            users=self._read("users", _COLUMNS["users"]),
            profiles=self._read("profiles", profile_columns),
            leads=self._read("leads", _COLUMNS["leads"]),
            tax_intake_leads=self._read("tax_intake_leads", intake_columns),
            client_preparers=self._read("client_preparers", _COLUMNS["client_preparers"]),
            contacts=contacts,
            entries={entry.row: entry for entry, *_ in entries},
            seen={entry.row: seen for entry, seen, *_ in entries},
            looked=frozenset(entry.row for entry, _, looked, _ in entries if looked),
            seen_preparer={entry.row: preparer for entry, *_, preparer in entries},
            updates=[
                Update(*map(_aware, row))._replace(filled=tuple(row[6].split(","))) for row in self._rows(_UPDATES)
            ],
            history=frozenset((contact_id, stage) for contact_id, stage in self._rows(_HISTORY)),
            resolutions={row: (contact_id, email) for row, contact_id, email in self._rows(_RESOLUTIONS)},
            referenced=frozenset(contact_id for (contact_id,) in self._rows(_REFERENCED)),
        )

    def everything(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of every table, to be compared."""
        return self._database.dump()

    def other_tables(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row that no command of ours may write."""
        return self._database.dump(*OTHER_TABLES) | {"crm_stage_history": self._rows(_OTHERS_HISTORY)}

    def runs(self) -> list[int]:
        """Every run of the history, rollbacks as well, the oldest first."""
        return [run for (run,) in self._rows("SELECT id FROM backfill_run ORDER BY id")]

    def add(self, table: str, **columns: Any) -> str:
        """A new row; returns its id."""
        identifier = f"c{table[0]}{next(self._numbers):023d}"
        names = ["id", *columns]
        if table not in _WITHOUT_UPDATED_AT:
            names.append(_updated_at(table))
        values = ["%s"] * (1 + len(columns)) + [_NOW] * (len(names) - 1 - len(columns))
        quoted = ", ".join(f'"{name}"' for name in names)
        self._execute(
            f'INSERT INTO "{table}" ({quoted}) VALUES ({", ".join(values)})',
            identifier,
            *columns.values(),
        )
        return identifier

    def change(self, table: str, identifier: str, **columns: Any) -> None:
        """Write columns of a row."""
        assignments = [f'"{name}" = %s' for name in columns]
        if table not in _WITHOUT_UPDATED_AT:
            assignments.append(f'"{_updated_at(table)}" = {_NOW}')
        self._execute(f'UPDATE "{table}" SET {", ".join(assignments)} WHERE id = %s', *columns.values(), identifier)

    def delete(self, table: str, identifier: str) -> None:
        """Delete a row, and what goes with it by the foreign keys."""
        self._execute(f'DELETE FROM "{table}" WHERE id = %s', identifier)

    def now(self) -> datetime:
        """This moment, as the database tells it."""
        ((moment,),) = self._rows(f"SELECT {_NOW}")
        return moment.replace(tzinfo=UTC)  # type: ignore[no-any-return] # what a cursor returns is Any

    def _read(self, table: str, columns: tuple[str, ...]) -> dict[str, Row]:
        names = ", ".join(f'"{column}"' for column in columns)
        rows = [
            dict(zip(columns, map(_aware, row), strict=True)) for row in self._rows(f'SELECT {names} FROM "{table}"')
        ]
        return {row["id"]: row for row in rows}

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())

    def _execute(self, statement: str, *parameters: Any) -> None:
        self._seen = None
        with connection.cursor() as cursor:
            cursor.execute(statement, [_naive(value) for value in parameters])


def _updated_at(table: str) -> str:
    return "updated_at" if table == "tax_intake_leads" else "updatedAt"


def _entry(row: tuple[Any, ...]) -> LedgerEntry:
    reference, identifier, source, outcome, reason, contact_id, keys, run, updated_at, filled = row
    names = tuple(filled.split(",")) if filled else ()
    return LedgerEntry(reference, identifier, source, outcome, reason, contact_id, keys, run, _aware(updated_at), names)


def _aware(value: Any) -> Any:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) else value


def _naive(value: Any) -> Any:
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) else value

"""What becomes of source rows, and how it is counted. Pure: no database, no Django.

The reconciliation of a run is `read = created + merged + exists + error`; over the tables it is
`rows = excluded + in the ledger + pending`. Rows that --update looks at again have one of their own:
`revisited = updated + kept + unchanged`. A row that changed its contact is updated, whatever it kept besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple, Self


class Source(StrEnum):
    """Where rows come from, in the order in which a run takes them."""

    CLIENTS = "clients"
    PREPARERS = "preparers"
    AFFILIATES = "affiliates"
    CONVERTED_LEADS = "converted_leads"
    ACTIVE_LEADS = "active_leads"

    @property
    def table(self) -> str:
        """The application's table that the rows are in."""
        return "leads" if self in (Source.CONVERTED_LEADS, Source.ACTIVE_LEADS) else "profiles"

    @property
    def title(self) -> str:  # type: ignore[override] # str.title is a method; nobody title-cases a source
        """The name for people."""
        return self.value.replace("_", " ").capitalize()

    @classmethod
    def of_table(cls, table: str) -> list[Source]:
        """The sources whose rows are in `table`."""
        return [source for source in cls if source.table == table]


class Outcome(StrEnum):
    """What became of a row."""

    CREATED = "created"  # it made a contact
    MERGED = "merged"  # it met a contact of ours and filled what was missing there
    EXISTS = "exists"  # it met somebody else's contact, which stays as it is
    ERROR = "error"  # it cannot be a contact: a dead letter, tried again by every run


#: The outcomes whose entry names a contact.
WITH_CONTACT = (Outcome.CREATED, Outcome.MERGED, Outcome.EXISTS)


class UpdateOutcome(StrEnum):
    """What became of a row that was looked at again."""

    UPDATED = "updated"  # its contact has something of it now that it had not
    KEPT = "kept"  # it changed nothing: the contact has another value, which is not ours to change
    UNCHANGED = "unchanged"  # it brings nothing


class Reason(StrEnum):
    """Why a row ended in error."""

    UNKNOWN_ROLE = "unknown_role"
    UNKNOWN_STATUS = "unknown_status"
    UNKNOWN_TYPE = "unknown_type"
    INVALID_EMAIL = "invalid_email"
    CONFLICT = "conflict"
    STALE_DECISION = "stale_decision"
    MISSING_VALUE = "missing_value"
    INVALID_VALUE = "invalid_value"
    DUPLICATE_ID = "duplicate_id"
    UNREADABLE = "unreadable"
    DATA_ERROR = "data_error"


class Refusal(NamedTuple):
    """What is wrong with a row, by names alone; never PostgreSQL's DETAIL, which quotes people's data."""

    sqlstate: str | None = None
    constraint: str | None = None
    column: str | None = None
    table: str | None = None
    trigger: str | None = None


class RowOutcome(NamedTuple):
    """What happens to one source row: an entry of the ledger in the making."""

    id: str
    source_id: str
    updated_at: str | None
    known_reason: str | None
    outcome: Outcome
    reason: Reason | None = None
    contact_id: str | None = None
    filled: tuple[str, ...] = ()
    refusal: Refusal | None = None
    contact_updated_at: str | None = None
    #: What a merge replaced of the attribution that there was not, by the name of the field.
    attribution_before: Mapping[str, str | int | None] | None = None
    identity_keys: Mapping[str, str | None] | None = None

    @property
    def is_new_error(self) -> bool:
        """Whether no earlier run had this error."""
        return self.outcome is Outcome.ERROR and self.reason != self.known_reason


@dataclass(slots=True)
class Totals:
    """Counts of rows by what became of them; of a batch, or of anything that batches add up to."""

    read: int = 0
    created: int = 0
    merged: int = 0
    exists: int = 0
    error: int = 0
    error_new: int = 0
    revisited: int = 0
    updated: int = 0
    kept: int = 0
    unchanged: int = 0
    updated_and_kept: int = 0
    errors_by_reason: Counter[str] = field(default_factory=Counter)
    errors_new_by_reason: Counter[str] = field(default_factory=Counter)
    created_by_type: Counter[str] = field(default_factory=Counter)
    updated_by_column: Counter[str] = field(default_factory=Counter)
    kept_by_column: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, row_outcomes: list[RowOutcome], created_types: Counter[str]) -> Self:
        """Count a batch: its decisions, and the types of the contacts that it created."""
        outcomes = Counter(row_outcome.outcome for row_outcome in row_outcomes)
        by_outcome: dict[str, Any] = {outcome.value: outcomes[outcome] for outcome in Outcome}
        errors = [row_outcome for row_outcome in row_outcomes if row_outcome.outcome is Outcome.ERROR]
        new = Counter(str(row_outcome.reason) for row_outcome in errors if row_outcome.is_new_error)
        return cls(
            read=len(row_outcomes),
            **by_outcome,
            error_new=new.total(),
            errors_by_reason=Counter(str(row_outcome.reason) for row_outcome in errors),
            errors_new_by_reason=new,
            created_by_type=created_types,
        )

    def add(self, other: Totals) -> None:
        """Add another's counts to these."""
        for name, count in other.numbers.items():
            setattr(self, name, getattr(self, name) + count)
        for name, counts in other.breakdowns.items():
            getattr(self, name).update(counts)

    @property
    def numbers(self) -> dict[str, int]:
        """The counts that are one number, by name."""
        return {name: getattr(self, name) for name in NUMBERS}

    @property
    def breakdowns(self) -> dict[str, Counter[str]]:
        """The counts by reason, type or column, by name."""
        return {name: getattr(self, name) for name in BREAKDOWNS}

    @property
    def rows(self) -> int:
        """Rows that were looked at, for the first time or again."""
        return self.read + self.revisited

    @property
    def outcomes(self) -> dict[str, int]:
        """The four outcomes by name."""
        return {outcome.value: getattr(self, outcome.value) for outcome in Outcome}

    @property
    def update_outcomes(self) -> dict[str, int]:
        """The three outcomes of rows that were looked at again, by name."""
        return {outcome.value: getattr(self, outcome.value) for outcome in UpdateOutcome}

    @property
    def update_counts(self) -> dict[str, int]:
        """The same, and of the updated rows those that kept a value as well."""
        return self.update_outcomes | {"updated_and_kept": self.updated_and_kept}

    @property
    def decided(self) -> int:
        """Rows that were decided anew; the others are in the same error as before."""
        return self.read - self.error + self.error_new

    @property
    def balances(self) -> bool:
        """Whether every row that was looked at has an outcome."""
        return self.read == sum(self.outcomes.values()) and self.revisited == sum(self.update_outcomes.values())


#: The names of the counts of rows, which runs and batches have as well: those that are one number, and the others.
NUMBERS = tuple(each.name for each in fields(Totals) if each.default == 0)
BREAKDOWNS = tuple(each.name for each in fields(Totals) if each.name not in NUMBERS)


class Fault(StrEnum):
    """What no entry of the ledger may be, whatever the numbers add up to."""

    UNKNOWN_OUTCOME = "unknown_outcome"
    NO_CONTACT = "no_contact"
    EXCLUDED_ROW = "excluded_row"

    @property
    def statement(self) -> str:
        """What is said of such entries, for people."""
        return _STATEMENTS[self]


_STATEMENTS = {
    Fault.UNKNOWN_OUTCOME: "with an outcome that is none",
    Fault.NO_CONTACT: "that name no contact",
    Fault.EXCLUDED_ROW: "of this run for rows that are not to be migrated",
}


@dataclass(slots=True)
class RowCounts:
    """The source rows as they stand in the tables at one moment. Each term is counted by itself.

    `entries` are the ledger's entries of rows that are to be migrated, by outcome; `faults` those that may not be.
    """

    rows: int
    excluded: dict[str, int]
    settled: dict[Source, int]
    errors: dict[Source, int]
    pending: dict[Source, int]
    entries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    faults: dict[Fault, int] = field(default_factory=dict)

    @property
    def in_ledger(self) -> int:
        """Rows that have an entry with an outcome."""
        return sum(self.settled.values()) + sum(self.errors.values())

    @property
    def balances(self) -> bool:
        """Whether every row is excluded, in the ledger or pending, and every entry is what it may be."""
        return not self.faults and self.rows == (
            sum(self.excluded.values()) + self.in_ledger + sum(self.pending.values())
        )

    @property
    def unstarted(self) -> list[Source]:
        """The sources of which no row has an entry."""
        return [source for source in Source if not self.settled[source] + self.errors[source]]

    def to_read(self, source: Source) -> int:
        """How many rows a run has to look at."""
        return self.errors[source] + self.pending[source]

"""Outcomes of source rows, and their counts. Pure: no database, no Django.

The reconciliation of a run is `read = created + merged + exists + error`, and that of the tables is
`rows = excluded + in the ledger + pending`. For rows that --update revisits, it is
`revisited = updated + kept + unchanged`. A row that changed its contact is updated, even if it also kept values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple, Self


class Source(StrEnum):
    """Source rows that are migrated alike, in the order of a run."""

    CLIENTS = "clients"
    PREPARERS = "preparers"
    AFFILIATES = "affiliates"
    CONVERTED_LEADS = "converted_leads"
    CONVERTED_INTAKES = "converted_intakes"
    ACTIVE_LEADS = "active_leads"
    OPEN_INTAKES = "open_intakes"
    LEAD_PROFILES = "lead_profiles"
    SIGNUPS = "signups"

    @property
    def table(self) -> str:
        """The application's table that contains the rows."""
        return _TABLE_OF_SOURCE.get(self, "profiles")

    @property
    def title(self) -> str:  # type: ignore[override] # str.title is a method, which is not used here
        """The display name."""
        return self.value.replace("_", " ").capitalize()

    @property
    def is_of_signups(self) -> bool:
        """Whether the rows are people who signed up and wait for approval, which only --with-signups migrates."""
        return self in (Source.LEAD_PROFILES, Source.SIGNUPS)

    @classmethod
    def of_table(cls, table: str) -> list[Source]:
        """Return the sources whose rows are in `table`."""
        return [source for source in cls if source.table == table]


_TABLE_OF_SOURCE = {
    **dict.fromkeys((Source.CONVERTED_LEADS, Source.ACTIVE_LEADS), "leads"),
    **dict.fromkeys((Source.CONVERTED_INTAKES, Source.OPEN_INTAKES), "tax_intake_leads"),
    Source.SIGNUPS: "users",
}


class Outcome(StrEnum):
    """The result for a row."""

    CREATED = "created"  # it created a contact
    MERGED = "merged"  # it matched a contact of the backfill and filled its empty fields
    EXISTS = "exists"  # it matched a contact created elsewhere, which stays unchanged
    ERROR = "error"  # it was not migrated; every run retries it


#: The outcomes whose entry names a contact.
WITH_CONTACT = (Outcome.CREATED, Outcome.MERGED, Outcome.EXISTS)


class UpdateOutcome(StrEnum):
    """The result for a row that --update revisited, or for a contact that a repair read."""

    UPDATED = "updated"  # it changed its contact
    KEPT = "kept"  # it changed nothing, because a person may have written the contact's value
    UNCHANGED = "unchanged"  # there was nothing to change


class Repair(StrEnum):
    """What a repair corrects in contacts that were created elsewhere."""

    PREPARER_IDS = "preparer_ids"  # a preparer given by the user id becomes the profile id
    TYPES = "types"  # the type becomes that of the profile's role
    PLACEHOLDERS = "placeholders"  # an invented address becomes the user's, or one that receives no mail

    @property
    def option(self) -> str:
        """The option of `repair_crm_contacts`."""
        return f"--{self.value.replace('_', '-')}"

    @property
    def title(self) -> str:  # type: ignore[override] # str.title is a method, which is not used here
        """The display name."""
        return self.value.replace("_", " ").capitalize()


#: The unit of preparer and date, as counts and ledger entries name it.
ASSIGNMENT = "assignment"


class AssignedBy(StrEnum):
    """The way by which a row has its preparer, or that its preparer has no profile."""

    OWN = "own"  # the row names a profile, or a user that has one
    CLIENT_PREPARERS = "client_preparers"  # the latest active preparer of a client's profile
    REFERRER = "referrer"  # the row names no preparer, and its referrer is a tax preparer
    UNRESOLVED = "unresolved_preparer"  # the preparer has no profile, so the contact is not assigned


class Reason(StrEnum):
    """The reason of an error."""

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
    """Why PostgreSQL refused a row, as code and names. Never contains its DETAIL, which quotes personal data."""

    sqlstate: str | None = None
    constraint: str | None = None
    column: str | None = None
    table: str | None = None
    trigger: str | None = None


class RowOutcome(NamedTuple):
    """The outcome of one source row, from which its ledger entry is written."""

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
    #: The id of the row's preparer, and where the row has it from.
    preparer_id: str | None = None
    assigned_by: AssignedBy | None = None

    @property
    def is_new_error(self) -> bool:
        """Whether the row's ledger entry did not have this reason before."""
        return self.outcome is Outcome.ERROR and self.reason != self.known_reason

    @property
    def assigns(self) -> bool:
        """Whether it assigned its contact, or could not because its preparer has no profile."""
        if self.assigned_by is AssignedBy.UNRESOLVED:
            return self.outcome is not Outcome.ERROR
        return self.assigned_by is not None and ASSIGNMENT in self.filled


@dataclass(slots=True)
class Totals:
    """Counts of rows by outcome, of a batch or a sum of batches."""

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
    assignments: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, row_outcomes: list[RowOutcome], created_types: Counter[str]) -> Self:
        """Return the counts of a batch. `created_types` are the types of the contacts that it created."""
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
            assignments=Counter(str(row_outcome.assigned_by) for row_outcome in row_outcomes if row_outcome.assigns),
        )

    def add(self, other: Totals) -> None:
        """Add other counts to these."""
        for name, count in other.numbers.items():
            setattr(self, name, getattr(self, name) + count)
        for name, counts in other.breakdowns.items():
            getattr(self, name).update(counts)

    @property
    def numbers(self) -> dict[str, int]:
        """The counts that are a single number, by name."""
        return {name: getattr(self, name) for name in NUMBERS}

    @property
    def breakdowns(self) -> dict[str, Counter[str]]:
        """The counts by reason, type or column, by name."""
        return {name: getattr(self, name) for name in BREAKDOWNS}

    @property
    def rows(self) -> int:
        """The number of rows that were read or revisited."""
        return self.read + self.revisited

    @property
    def outcomes(self) -> dict[str, int]:
        """The four outcomes by name."""
        return {outcome.value: getattr(self, outcome.value) for outcome in Outcome}

    @property
    def update_outcomes(self) -> dict[str, int]:
        """The three outcomes of revisited rows, by name."""
        return {outcome.value: getattr(self, outcome.value) for outcome in UpdateOutcome}

    @property
    def update_counts(self) -> dict[str, int]:
        """`update_outcomes`, and the number of updated rows that also kept a value."""
        return self.update_outcomes | {"updated_and_kept": self.updated_and_kept}

    @property
    def decided(self) -> int:
        """The number of rows with a new outcome; the others are in the same error as before."""
        return self.read - self.error + self.error_new

    @property
    def balances(self) -> bool:
        """Whether every row that was read or revisited has an outcome."""
        return self.read == sum(self.outcomes.values()) and self.revisited == sum(self.update_outcomes.values())


#: The names of the counts, which runs and batches have as well: those that are a single number, and the others.
NUMBERS = tuple(each.name for each in fields(Totals) if each.default == 0)
BREAKDOWNS = tuple(each.name for each in fields(Totals) if each.name not in NUMBERS)


class Fault(StrEnum):
    """A kind of invalid ledger entry, which fails the reconciliation even if the numbers add up."""

    UNKNOWN_OUTCOME = "unknown_outcome"
    NO_CONTACT = "no_contact"
    EXCLUDED_ROW = "excluded_row"

    @property
    def statement(self) -> str:
        """The description of such entries in messages."""
        return _STATEMENTS[self]


_STATEMENTS = {
    Fault.UNKNOWN_OUTCOME: "with an unknown outcome",
    Fault.NO_CONTACT: "without a contact",
    Fault.EXCLUDED_ROW: "of this run for excluded rows",
}


@dataclass(slots=True)
class RowCounts:
    """Counts of the source rows in the tables at one moment. Each term is counted separately.

    `entries` counts the ledger entries of rows that are not excluded, by outcome; `faults` counts invalid entries.
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
        """The number of rows that have a ledger entry."""
        return sum(self.settled.values()) + sum(self.errors.values())

    @property
    def balances(self) -> bool:
        """Whether every row is excluded, in the ledger or pending, and no ledger entry is invalid."""
        return not self.faults and self.rows == (
            sum(self.excluded.values()) + self.in_ledger + sum(self.pending.values())
        )

    @property
    def unstarted(self) -> list[Source]:
        """The sources without any ledger entry."""
        return [source for source in Source if not self.settled[source] + self.errors[source]]

    def to_read(self, source: Source) -> int:
        """Return the number of rows of a source that a run reads."""
        return self.errors[source] + self.pending[source]

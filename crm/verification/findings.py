"""The findings of a verification: kinds, checks, and a collector. Pure: no database.

A finding names a row, a contact and columns, but contains no values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

#: Maximum number of findings of one check and kind in the report; the CSV file has all of them.
KEPT = 100


class Kind(StrEnum):
    """The cause of a finding."""

    DEFECT = "defect"  # no change of the source, the CRM or the rules explains it
    RULES_CHANGED = "rules_changed"  # written by a run whose rules differ from those of this version
    SOURCE_CHANGED = "source_changed"  # the source row was changed or deleted since it was migrated
    CRM_CHANGED = "crm_changed"  # the contact or its history was changed since, or another contact was added


def unexplained(written_by: str | None) -> tuple[Kind, str | None]:
    """Return the kind of a finding that no change of the source or the CRM explains, and the other rules, if any."""
    return (Kind.DEFECT if written_by is None else Kind.RULES_CHANGED), written_by


class Check(StrEnum):
    """What was checked. The value is the name in JSON and CSV."""

    COLUMN_MISSING = "column_missing"
    COLUMN_TYPE = "column_type"
    COLUMN_NULLABILITY = "column_nullability"
    INDEX_MISSING = "index_missing"
    INDEX_INVALID = "index_invalid"
    MISSING_ENTRY = "missing_line"
    WRONG_ID = "wrong_id"
    UNKNOWN_OUTCOME = "unknown_outcome"
    NO_CONTACT = "no_contact"
    TWO_CREATORS = "two_creators"
    EXCLUDED_MIGRATED = "excluded_migrated"
    CONTACT_TWICE = "contact_twice"
    HISTORY_GONE = "history_gone"
    ROW_GONE = "row_gone"
    FIELDS = "fields"

    @property
    def statement(self) -> str:
        """The finding as a sentence."""
        return _STATEMENTS[self]


_STATEMENTS = {
    Check.COLUMN_MISSING: "crm_contacts lacks an attribution column",
    Check.COLUMN_TYPE: "an attribution column has the wrong type",
    Check.COLUMN_NULLABILITY: "an attribution column is wrongly NULL or NOT NULL",
    Check.INDEX_MISSING: "crm_contacts lacks the index on its referrers",
    Check.INDEX_INVALID: "the index on the referrers is invalid",
    Check.MISSING_ENTRY: "the row has a contact, but no ledger entry",
    Check.WRONG_ID: "the ledger entry's key does not match its row",
    Check.UNKNOWN_OUTCOME: "the ledger entry's outcome is unknown",
    Check.NO_CONTACT: "the ledger entry names no contact",
    Check.TWO_CREATORS: "the ledger entry claims the contact of another row",
    Check.EXCLUDED_MIGRATED: "the row is excluded, but has a contact",
    Check.CONTACT_TWICE: "the person has a second contact",
    Check.HISTORY_GONE: "the history row of a promotion is missing",
    Check.ROW_GONE: "the contact's source row is missing",
    Check.FIELDS: "the contact differs from its source row",
}


class Finding(NamedTuple):
    """A difference between the database and what it should be."""

    check: Check
    kind: Kind
    row: str | None = None
    contact_id: str | None = None
    columns: tuple[str, ...] = ()
    #: For RULES_CHANGED: the version and the rules that wrote it.
    written_by: str | None = None


@dataclass(slots=True)
class Findings:
    """Counts findings, keeps the first of each check and kind, and passes each to `pass_on`. Memory is constant."""

    pass_on: Callable[[Finding], None] | None = None
    counts: Counter[tuple[Check, Kind]] = field(default_factory=Counter)
    kept: list[Finding] = field(default_factory=list)
    written_by: Counter[str] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        """Add a finding."""
        key = (finding.check, finding.kind)
        if self.counts[key] < KEPT:
            self.kept.append(finding)
        self.counts[key] += 1
        if finding.written_by is not None:
            self.written_by[finding.written_by] += 1
        if self.pass_on is not None:
            self.pass_on(finding)

    def of_kind(self, kind: Kind) -> int:
        """Return the number of findings of a kind."""
        return sum(count for (_, counted), count in self.counts.items() if counted is kind)

    def of_check(self, check: Check) -> dict[Kind, int]:
        """Return the number of findings of a check, by kind."""
        return {kind: self.counts[check, kind] for kind in Kind if self.counts[check, kind]}

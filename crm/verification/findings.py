"""What a verification can find, and the collector of it. Pure.

A finding names a row, a contact and columns; it never holds a value of theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

#: How many findings of one check and kind are kept for the report; all of them go to the CSV file.
KEPT = 100


class Kind(StrEnum):
    """Who has to do with it."""

    DEFECT = "defect"  # neither the source nor the CRM nor the rules changed: it should not be so
    RULES_CHANGED = "rules_changed"  # the run that wrote it went by other rules than this version
    SOURCE_CHANGED = "source_changed"  # the source row changed since it was migrated, or is gone
    CRM_CHANGED = "crm_changed"  # somebody changed the contact or its history since, or added another


def unexplained(written_by: str | None) -> tuple[Kind, str | None]:
    """The kind of what no change of the source or the CRM explains, and the other rules that do, where they do."""
    return (Kind.DEFECT if written_by is None else Kind.RULES_CHANGED), written_by


class Check(StrEnum):
    """What was looked at. The value is the name for machines."""

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
        """What a finding says, for people."""
        return _STATEMENTS[self]


_STATEMENTS = {
    Check.COLUMN_MISSING: "crm_contacts lacks an attribution column",
    Check.COLUMN_TYPE: "an attribution column is of another type",
    Check.COLUMN_NULLABILITY: "an attribution column is wrong about NULL",
    Check.INDEX_MISSING: "crm_contacts lacks the index on its referrers",
    Check.INDEX_INVALID: "the index on the referrers is broken",
    Check.MISSING_ENTRY: "the row's own contact is there, but no ledger entry",
    Check.WRONG_ID: "the ledger entry's key is not that of its row",
    Check.UNKNOWN_OUTCOME: "the ledger entry's outcome is none",
    Check.NO_CONTACT: "the ledger entry names no contact",
    Check.TWO_CREATORS: "the ledger entry claims a contact that another row makes",
    Check.EXCLUDED_MIGRATED: "the row is not to be migrated, but has a contact",
    Check.CONTACT_TWICE: "the person has another contact besides",
    Check.HISTORY_GONE: "the line of the history that told of our promotion is gone",
    Check.ROW_GONE: "the contact's source row is gone",
    Check.FIELDS: "the contact is not what its source row maps to",
}


class Finding(NamedTuple):
    """One thing that was found."""

    check: Check
    kind: Kind
    row: str | None = None
    contact_id: str | None = None
    columns: tuple[str, ...] = ()
    #: Of RULES_CHANGED: the version and the rules that wrote it.
    written_by: str | None = None


@dataclass(slots=True)
class Findings:
    """Counts findings, keeps the first ones, and passes every one on. Memory is constant."""

    pass_on: Callable[[Finding], None] | None = None
    counts: Counter[tuple[Check, Kind]] = field(default_factory=Counter)
    kept: list[Finding] = field(default_factory=list)
    written_by: Counter[str] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        """Take a finding in."""
        of_its_sort = (finding.check, finding.kind)
        if self.counts[of_its_sort] < KEPT:
            self.kept.append(finding)
        self.counts[of_its_sort] += 1
        if finding.written_by is not None:
            self.written_by[finding.written_by] += 1
        if self.pass_on is not None:
            self.pass_on(finding)

    def of_kind(self, kind: Kind) -> int:
        """How many of this kind there are."""
        return sum(count for (_, counted), count in self.counts.items() if counted is kind)

    def of_check(self, check: Check) -> dict[Kind, int]:
        """How many a check found, by kind."""
        return {kind: self.counts[check, kind] for kind in Kind if self.counts[check, kind]}

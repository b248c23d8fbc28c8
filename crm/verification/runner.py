"""Runs a verification."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone

from crm.backfill.read.inventory import count_rows
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.rows import RowReader
from crm.errors import OperatorError
from crm.outcome import RowCounts
from crm.postgres.facts.columns import ATTRIBUTION_COLUMNS
from crm.postgres.facts.schema import examine
from crm.postgres.snapshot import snapshot
from crm.runs.other_rules import OtherRules
from crm.verification.comparison import Comparison, compare_contacts
from crm.verification.figures import FiguresTable, count_contacts
from crm.verification.findings import Finding, Findings, Kind
from crm.verification.reconciliation import History, count_entries, count_rows_gone, history_gone, reconcile
from crm.verification.schema import REFERRER, check_schema, present_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """The result of a verification. `entries`, `deleted` and `rows_gone` count ledger entries by outcome."""

    generation: str
    row_counts: RowCounts
    entries: dict[str, int]
    deleted: dict[str, int]
    rows_gone: dict[str, int]
    comparison: Comparison
    findings: Findings
    figures: FiguresTable
    history_is_hidden: bool
    started_at: datetime
    seconds: float

    @property
    def finished_at(self) -> datetime:
        """The time of its end by the clock of this machine."""
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def defects(self) -> int:
        """The number of findings that no later change explains."""
        return self.findings.of_kind(Kind.DEFECT)

    @property
    def exit_code(self) -> int:
        """The exit code: 0 if there is no defect and the row counts balance, else 1.

        Later changes of rows, contacts and rules are no defects, and neither are pending rows.
        """
        return 1 if self.defects or not self.row_counts.balances else 0


def verify(
    connection: BaseDatabaseWrapper,
    *,
    on_finding: Callable[[Finding], None] | None = None,
    on_page: Callable[[int], None] = lambda _contacts: None,
) -> VerificationReport:
    """Verify the database in one snapshot and return the report. Writes nothing, and only needs the right to SELECT.

    Calls `on_finding` with each finding, and `on_page` with the number of contacts of each page. Raises OperatorError
    if the database is not suitable, and django.db.DatabaseError for a transient error. Like pg_dump, the transaction
    blocks an ALTER TABLE on the application's tables until it ends.
    """
    started_at, started = timezone.now(), time.monotonic()
    findings = Findings(on_finding)
    comparison = Comparison()
    with snapshot(connection):
        facts = examine(connection, for_writing=False)
        if not facts.has_ledger:
            raise OperatorError(
                "There is no ledger that this role may read, so there is nothing to verify: run `python manage.py "
                "migrate` and `python manage.py backfill_crm_contacts` first, or GRANT SELECT on its tables."
            )
        present = present_columns(connection)
        history = History.of(connection)
        missing = [column for column in ATTRIBUTION_COLUMNS if column not in present]
        reader = RowReader(connection, facts, missing, Resolutions.every(connection))
        other_rules = OtherRules.read(connection)
        for found in (
            check_schema(connection, present),
            reconcile(connection, facts, other_rules),
            history_gone(connection, history),
            compare_contacts(connection, reader, other_rules, comparison, on_page),
        ):
            for finding in found:
                findings.add(finding)
        entries, deleted = count_entries(connection)
        return VerificationReport(
            generation=facts.generation,
            row_counts=count_rows(connection, facts),
            entries=entries,
            deleted=deleted,
            rows_gone=count_rows_gone(connection, facts),
            comparison=comparison,
            findings=findings,
            figures=count_contacts(connection, has_referrer=REFERRER in present),
            history_is_hidden=history.is_hidden,
            started_at=started_at,
            seconds=time.monotonic() - started,
        )

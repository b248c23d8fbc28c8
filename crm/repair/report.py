"""The output of a repair: summary, JSON object, and CSV file with the result for each contact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from crm.models.ledger import RunStatus
from crm.outcome import Totals, UpdateOutcome
from crm.output.listing import csv_listing
from crm.output.table import Summary, print_line
from crm.postgres.target import target, target_line
from crm.repair.rules import RepairOutcome
from crm.repair.runner import Listener, RepairReport

CSV_COLUMNS = ("repair", "contact_id", "outcome", "why", "changed", "row")
#: The heading of the runbook under which each cause is explained.
MEANING_OF_CAUSES = "Why a contact keeps its value"


def as_json(report: RepairReport) -> str:
    """Return the report as one JSON object on one line."""
    answer: dict[str, Any] = {
        "run": report.run_id,
        "status": report.status.value,
        "dry_run": report.dry_run,
        "database": target(),
        "generation": report.generation,
        "revisited": report.totals.revisited,
        **report.totals.update_outcomes,
        **{repair.value: _counts(counts) for repair, counts in report.counts.items()},
        "balanced": report.balanced,
        "not_checked": report.not_checked,
        "failure": report.failure,
        "started_at": report.started_at.isoformat(),
        "finished_at": report.finished_at.isoformat(),
        "seconds": round(report.seconds, 3),
    }
    return json.dumps(answer)


def _counts(counts: Totals) -> dict[str, Any]:
    return {
        "revisited": counts.revisited,
        **counts.update_outcomes,
        "updated_by_column": dict(sorted(counts.updated_by_column.items())),
        "kept_by_reason": dict(sorted(counts.kept_by_column.items())),
    }


def print_summary(report: RepairReport, console: Console) -> None:
    """Print the summary."""
    table = Summary(_headline(report))
    row = table.count
    repaired = "would be repaired" if report.dry_run else "repaired"
    for repair, counts in report.counts.items():
        row(repair.title, counts.revisited, "contacts that others created", "bold")
        row("  changed", counts.updated, repaired)
        if len(counts.updated_by_column) > 1:
            for column, count in sorted(counts.updated_by_column.items()):
                row(f"    {column}", count)
        row("  kept", counts.kept, f'see "{MEANING_OF_CAUSES}" in docs/runbook.md' if counts.kept else "")
        for cause, count in sorted(counts.kept_by_column.items()):
            row(f"    {cause}", count)
        row("  unchanged", counts.unchanged, "nothing to repair")
    table.print_on(console)
    totals = report.totals
    parts = f"{totals.updated:,} changed + {totals.kept:,} kept + {totals.unchanged:,} unchanged"
    print_line(console, f"Reconciliation: {totals.revisited:,} read = {parts}{_result(report)}")
    print_line(console, target_line())
    if report.status == RunStatus.FINISHED and totals.updated:
        print_line(console, _next_step(report))


def _result(report: RepairReport) -> str:
    if report.balanced is not None:
        return "  (holds)" if report.balanced else "  (DOES NOT HOLD)"
    return f"  (not checked: {report.not_checked})" if report.not_checked else ""


def _next_step(report: RepairReport) -> str:
    if report.dry_run:
        return "Nothing was written: with --apply, the same command repairs these contacts."
    return f"`python manage.py rollback_crm_backfill {report.run_id} --dry-run` shows how to take this back."


def _headline(report: RepairReport) -> str:
    what = "Dry run, nothing was written: repair" if report.dry_run else f"Run {report.run_id}, repair"
    return f"{what}: {report.status.value} in {report.seconds:,.1f} s on generation {report.generation}"


@contextmanager
def listing(path: Path | None) -> Iterator[Listener | None]:
    """Open a CSV file and yield a listener that writes each repaired or kept contact to it; yield None without a path.

    See `csv_listing`.
    """
    if path is None:
        yield None
        return
    with csv_listing(path, CSV_COLUMNS) as write:
        yield lambda outcomes: write(_rows_of(outcomes))


def _rows_of(outcomes: Iterable[RepairOutcome]) -> Iterator[tuple[str, ...]]:
    for found in outcomes:
        if found.outcome is not UpdateOutcome.UNCHANGED:
            row = f"profiles:{found.profile.id}" if found.profile else ""
            yield found.repair, found.contact.id, found.outcome, found.cause or "", found.changed, row


def news(report: RepairReport) -> list[str]:
    """Return the lines for stderr: at least one unless the exit code is 0."""
    return [line for line in (_advice(report), _refusals(report)) if line]


def _refusals(report: RepairReport) -> str | None:
    if not report.refused:
        return None
    return f"run {report.run_id}: the database refused {report.refused:,} of the repairs; --csv lists them"


def _advice(report: RepairReport) -> str | None:
    """Return why an incomplete repair ended, and how to continue it; None if it is complete."""
    if report.status == RunStatus.FAILED:
        why = report.failure or "the reconciliation does not hold"
        return f"The repair failed: {why}. What is repaired stays so; run the command again to continue."
    if report.status != RunStatus.FINISHED:
        why = f": {report.failure}" if report.failure else ""
        first = ""
        if report.status == RunStatus.PAUSED:
            first = f"unless it was resumed already, `python manage.py backfill_runs resume {report.run_id}`; then "
        return (
            f"The repair was {report.status.value}{why}. What is repaired stays so; {first}run the command again to "
            "continue."
        )
    return None

"""The output of a rollback: summary, JSON object, and CSV file with the result for each row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from crm.models.ledger import RunStatus
from crm.output.listing import csv_listing
from crm.output.table import Summary, print_line
from crm.postgres.target import target, target_line
from crm.rollback.runner import Listener, RollbackReport
from crm.rollback.undo import Reverted
from crm.rules.entry import Entry
from crm.rules.reverting import KeepReason, Status

CSV_COLUMNS = ("row", "was", "contact_id", "outcome", "why", "detail")
LATER_RUN = "merged_by_a_later_run"
#: The heading of the runbook under which each reason is explained.
MEANING_OF_REASONS = "Why a row is kept or failed"


def as_json(report: RollbackReport) -> str:
    """Return the report as one JSON object on one line."""
    numbers = report.counts.numbers
    kinds = {
        kind: {status: numbers[f"{kind}_{status}"] for status in Status} for kind in ("merges", "updates", "lines")
    }
    answer: dict[str, Any] = {
        "run": report.run_id,
        "rolls_back": report.rolls_back,
        "later_runs": report.later_runs,
        "status": report.status.value,
        "dry_run": report.dry_run,
        "database": target(),
        "generation": report.generation,
        **{status.value: numbers[f"contacts_{status}"] for status in Status},
        **kinds,
        "later_merges": numbers["later_merges"],
        "by_reason": dict(sorted(report.counts.reasons.items())),
        "balanced": report.balanced,
        "failure": report.failure,
        "started_at": report.started_at.isoformat(),
        "finished_at": report.finished_at.isoformat(),
        "seconds": round(report.seconds, 3),
    }
    return json.dumps(answer)


def print_summary(report: RollbackReport, console: Console) -> None:
    """Print the summary."""
    numbers = report.counts.numbers
    table = Summary(_headline(report))
    row = table.count

    deleted = "would be deleted" if report.dry_run else "deleted"
    contacts = [numbers[f"contacts_{status}"] for status in Status]
    row("Contacts that the run created", sum(contacts), style="bold")
    row("  reversed", contacts[0], f"{deleted}: unmodified since")
    row("  kept", contacts[1], "modified, deleted or referred to since")
    row("  failed", contacts[2], "the database refused", "red" if contacts[2] else "")
    merges = [numbers[f"merges_{status}"] for status in Status]
    row("Rows that it merged", sum(merges), style="bold")
    row("  reversed", merges[0], "with their contact, or removed from it")
    row("  kept", merges[1])
    row("  failed", merges[2], style="red" if merges[2] else "")
    updates = [numbers[f"updates_{status}"] for status in Status]
    row("Repairs" if report.of_repair else "Changes of --update", sum(updates), style="bold")
    restored = (
        "the former value restored" if report.of_repair else "removed from the contact, with the row of its history"
    )
    row("  reversed", updates[0], restored)
    row("  kept", updates[1])
    row("  failed", updates[2], style="red" if updates[2] else "")
    row("Rows with another contact or error", numbers["lines_reversed"] + numbers["lines_kept"], style="bold")
    row("  reversed", numbers["lines_reversed"])
    row("  kept", numbers["lines_kept"], "their contact was deleted since")
    row(
        "Rows merged by other runs",
        numbers["later_merges"],
        "pending again, like the rows that they were merged into",
    )
    if report.counts.reasons:
        remark = f'see "{MEANING_OF_REASONS}" in docs/runbook.md'
        row("Why rows were kept or failed", report.counts.reasons.total(), remark, "bold")
    for reason, count in sorted(report.counts.reasons.items()):
        row(f"  {reason}", count)
    table.print_on(console)
    print_line(console, target_line())
    if report.status == RunStatus.FINISHED and not report.dry_run:
        for line in _ways_back(report):
            print_line(console, line)


def _ways_back(report: RollbackReport) -> list[str]:
    """Return how to migrate again what was reversed: rows by any run, changes of an update by an update only."""
    numbers = report.counts.numbers
    ways = []
    if any(numbers[kind] for kind in ("contacts_reversed", "merges_reversed", "lines_reversed", "later_merges")):
        recreated = ", except the contacts that the run had created again: those stay deleted"
        exception = recreated if report.of_recreation else ""
        ways.append(
            f"The rows are pending again: `python manage.py backfill_crm_contacts` migrates them again{exception}."
        )
    if numbers["updates_reversed"] and report.of_repair:
        ways.append("The repairs were reversed: `python manage.py repair_crm_contacts` with --apply makes them again.")
    elif numbers["updates_reversed"]:
        ways.append(
            "The changes of the update were reversed: `python manage.py backfill_crm_contacts --update` makes them "
            "again."
        )
    return ways


@contextmanager
def listing(path: Path | None) -> Iterator[Listener | None]:
    """Open a CSV file and yield a listener that writes the result for each row to it; yield None without a path.

    See `csv_listing`.
    """
    if path is None:
        yield None
        return
    with csv_listing(path, CSV_COLUMNS) as write:
        yield lambda reverted: write(_rows_of(reverted))


def _rows_of(reverted: Reverted) -> Iterator[tuple[str, ...]]:
    for assessment in reverted.assessments:
        yield (*_cells(assessment.entry), assessment.status, assessment.keep_reason or "", assessment.detail)
    for entry in reverted.later_merges:
        yield (*_cells(entry), Status.REVERSED, LATER_RUN, f"run {entry.run_id}")


def _cells(entry: Entry) -> tuple[str, str, str]:
    return entry.row, entry.outcome, entry.contact_id


def _headline(report: RollbackReport) -> str:
    what = f"Dry run, nothing was written: rollback of run {report.rolls_back}"
    if not report.dry_run:
        what = f"Run {report.run_id}, rollback of run {report.rolls_back}"
    return f"{what}: {report.status.value} in {report.seconds:,.1f} s on generation {report.generation}"


def news(report: RollbackReport) -> list[str]:
    """Return the lines for stderr; empty if the exit code is 0."""
    return [words for words in (_advice(report), _failures(report)) if words]


def _failures(report: RollbackReport) -> str | None:
    if not report.counts.failed:
        return None
    refusals = [item for item in sorted(report.counts.reasons.items()) if item[0].startswith(KeepReason.REFUSED)]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in refusals)
    what = f"run {report.run_id}: {report.counts.failed:,} of the results of run {report.rolls_back} were not reversed"
    return f"{what} ({reasons}); --csv lists them"


def _advice(report: RollbackReport) -> str | None:
    """Return why an incomplete rollback ended, and how to continue it; None if it is complete."""
    if report.status == RunStatus.FAILED:
        return f"The rollback failed: {report.failure}. What is reversed stays so; run the command again to continue."
    if report.status != RunStatus.FINISHED:
        why = f": {report.failure}" if report.failure else ""
        first = ""
        if report.status == RunStatus.PAUSED:
            first = f"unless it was resumed already, `python manage.py backfill_runs resume {report.run_id}`; then "
        return (
            f"The rollback was {report.status.value}{why}. What is reversed stays so; {first}run the command again to "
            "continue."
        )
    return None

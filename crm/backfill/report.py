"""The output of a run: summary, JSON object, and the lines for stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from crm.backfill.gone_contacts import GoneContacts
from crm.backfill.latecomers import ContactsTwice
from crm.backfill.runner import RunReport
from crm.models.ledger import RunStatus
from crm.outcome import AssignedBy, Source
from crm.output.table import Summary, print_line
from crm.postgres.target import target, target_line
from crm.runs.lost_reports import LostReport

#: Maximum number of contacts that a line names.
MAX_NAMED = 10

#: Aligns the lines of the reconciliation.
_INDENT = " " * len("Reconciliation: ")

_ASSIGNED_BY = {
    AssignedBy.OWN: "named in the row",
    AssignedBy.CLIENT_PREPARERS: "the client's latest active preparer",
    AssignedBy.REFERRER: "the tax preparer who referred the person",
    AssignedBy.UNRESOLVED: "rows whose preparer has no profile: not assigned",
}
_LABELS_OF_TYPE = (("Clients", "CLIENT"), ("Tax Preparers", "PREPARER"), ("Affiliates", "AFFILIATE"), ("Leads", "LEAD"))


def as_json(report: RunReport) -> str:
    """Return the report as one JSON object on one line."""
    totals = report.totals
    answer: dict[str, Any] = {
        "run": report.run_id,
        "status": report.status.value,
        "dry_run": report.options.dry_run,
        "database": target(),
        "generation": report.facts.generation,
        **totals.numbers,
        "already": report.already,
        "recreated": report.recreated,
        "contacts_gone": report.gone and {**report.gone._asdict(), "is_news": report.gone.is_news},
        "contacts_twice": report.twice.contacts,
        "excluded": report.excluded,
        "created_by_type": _sorted(totals.created_by_type),
        "by_source": {source.value: counts.outcomes for source, counts in report.by_source.items()},
        "by_reason": _sorted(totals.errors_by_reason),
        "new_by_reason": _sorted(totals.errors_new_by_reason),
        "updates_by_source": {source.value: counts.update_counts for source, counts in report.by_source.items()},
        "updated_by_column": _sorted(totals.updated_by_column),
        "kept_by_column": _sorted(totals.kept_by_column),
        "assignments": _sorted(totals.assignments),
        "pending": sum(report.row_counts.pending.values()) if report.row_counts else None,
        "rows": report.row_counts.rows if report.row_counts else None,
        "ledger": report.row_counts.entries if report.row_counts else None,
        "faults": report.row_counts.faults if report.row_counts else None,
        "balanced": report.balanced,
        "not_checked": report.not_checked,
        "lost_reports": [lost._asdict() for lost in report.lost_reports],
        "failure": report.failure,
        "started_at": report.started_at.isoformat(),
        "finished_at": report.finished_at.isoformat(),
        "seconds": round(report.seconds, 3),
    }
    return json.dumps(answer)


def print_summary(report: RunReport, console: Console) -> None:
    """Print the summary. The labels are those of the script that this command replaces."""
    totals = report.totals
    table = Summary(_headline(report))
    row = table.count

    rate = f", {totals.read / report.seconds:,.0f} rows/s" if report.seconds else ""
    row("Total Processed", totals.read, f"source rows{rate}", "bold")
    created = "would be created" if report.options.dry_run else "created"
    row("Contacts by type", totals.created, created, "bold")
    for label, contact_type in _LABELS_OF_TYPE:
        row(f"  {label}", totals.created_by_type[contact_type])
    row("Rows by source", totals.read, "read", "bold")
    for source in Source:
        if (counts := report.by_source.get(source)) and counts.read:
            row(f"  {source}", counts.read, f"{counts.created:,} {created}")
    row("Skipped (exists)", report.already + totals.exists + totals.merged, "already + exists + merged")
    row("  already", report.already, "in the ledger from earlier runs")
    unchanged = "" if report.options.update else "; unchanged"
    row("  exists", totals.exists, f"matched a contact created elsewhere{unchanged}")
    row("  merged", totals.merged, "matched and filled a contact of the backfill")
    if report.options.recreate_deleted:
        row("Contact missing", report.recreated, "read again for this reason, and counted above")
    _count_assignments(report, table)
    row("Errors", totals.error, f"{totals.error_new:,} new", "red" if totals.error_new else "")
    for reason, count in sorted(totals.errors_by_reason.items()):
        new = totals.errors_new_by_reason[reason]
        row(f"  {reason}", count, f"{new:,} new, {count - new:,} known")
    of_all = "; of all sources" if report.options.only else ""
    row("Excluded", sum(report.excluded.values()), f"not to be migrated{of_all}")
    for reason, count in sorted(report.excluded.items()):
        row(f"  {reason}", count)
    if report.options.update:
        would = "would be " if report.options.dry_run else ""
        row("Revisited", totals.revisited, "changed since, or matched an existing contact")
        as_well = f"; {totals.updated_and_kept:,} kept a value as well" if totals.updated_and_kept else ""
        row("  changed", totals.updated, f"{would}filled or promoted{as_well}")
        row("  kept only", totals.kept, "the contact keeps another value")
        row("  unchanged", totals.unchanged, "nothing to change")
        for column in sorted(totals.updated_by_column.keys() | totals.kept_by_column.keys()):
            kept = f"{totals.kept_by_column[column]:,} kept" if totals.kept_by_column[column] else ""
            row(f"  {column}", totals.updated_by_column[column], kept)
    table.print_on(console)
    print_line(console, reconciliation_lines(report))
    print_line(console, target_line())


def _count_assignments(report: RunReport, table: Summary) -> None:
    """Add how many contacts got a preparer, and in which way."""
    counts = report.totals.assignments
    assigned = counts.total() - counts[AssignedBy.UNRESOLVED]
    table.count("Assigned", assigned, f"{'would get' if report.options.dry_run else 'got'} a preparer")
    for by, what in _ASSIGNED_BY.items():
        if counts[by]:
            table.count(f"  {by}", counts[by], what)


def reconciliation_lines(report: RunReport) -> str:
    """Return the reconciliation of the run and that of the tables, in figures."""
    totals = report.totals
    parts = " + ".join(f"{count:,} {name}" for name, count in totals.outcomes.items())
    lines = [f"Reconciliation: {totals.read:,} read = {parts}"]
    if (row_counts := report.row_counts) is not None:
        lines.append(
            f"{_INDENT}{row_counts.rows:,} rows = {sum(row_counts.excluded.values()):,} excluded + "
            f"{row_counts.in_ledger:,} in the ledger + {sum(row_counts.pending.values()):,} pending"
        )
    if report.options.update:
        parts = f"{totals.updated:,} changed + {totals.kept:,} kept only + {totals.unchanged:,} unchanged"
        lines.append(f"{_INDENT}{totals.revisited:,} revisited = {parts}")
    if report.balanced is not None:
        lines[-1] += "  (holds)" if report.balanced else "  (DOES NOT HOLD)"
    elif report.not_checked:
        lines[-1] += f"  (not checked: {report.not_checked})"
    return "\n".join(lines)


def _headline(report: RunReport) -> str:
    what = "Dry run, nothing was written" if report.options.dry_run else f"Run {report.run_id}"
    return f"{what}: {report.status.value} in {report.seconds:,.1f} s on generation {report.facts.generation}"


def news(report: RunReport, *, strict: bool) -> list[str]:
    """Return the lines for stderr: at least one unless the exit code is 0."""
    return [text for text in (advice(report), _errors(report, strict=strict)) if text]


def _errors(report: RunReport, *, strict: bool) -> str | None:
    """Return the line about the rows in error that cause exit code 1: new ones, or with `strict` any."""
    totals, is_dry = report.totals, report.options.dry_run
    if totals.error_new:
        count, by_reason, what = totals.error_new, totals.errors_new_by_reason, "newly in error"
    elif strict and totals.error:
        count, by_reason, what = totals.error, totals.errors_by_reason, "in error, none newly"
    else:
        return None
    rows = f"{count:,} {'row' if count == 1 else 'rows'} {'would be ' if is_dry else ''}{what}"
    reasons = ", ".join(f"{reason} {of_reason:,}" for reason, of_reason in sorted(by_reason.items()))
    if is_dry:
        return f"dry run: {rows} ({reasons})"
    return f"run {report.run_id}: {rows} ({reasons}); see export_backfill_errors"


def advice(report: RunReport) -> str | None:
    """Return the other lines for stderr; None if there are none.

    Why the run is incomplete and how to continue, which contacts are missing or duplicates, and which earlier runs
    wrote no report.
    """
    ended = _advice_on_the_end(report)
    gone = _advice_on_gone_contacts(report.gone, report) if report.gone and report.gone.is_news else None
    twice = _advice_on_contacts_twice(report.twice) if report.twice.contacts else None
    lost = map(_lost_report, (lost for lost in report.lost_reports if lost.error_new))
    lines = [*(text for text in (ended, gone, twice) if text), *lost]
    return "\n".join(lines) or None


def _advice_on_gone_contacts(gone: GoneContacts, report: RunReport) -> str:
    since = f", {gone.rows - gone.known:,} of them since run {gone.known_to}" if gone.known_to else ""
    lost = f"{gone.rows:,} of {gone.settled:,} migrated rows have lost their contact: it is not in crm_contacts{since}."
    if report.options.dry_run and report.options.recreate_deleted:
        return f"{lost} This dry run read {report.recreated:,} of them again; the summary includes their outcomes."
    return (
        f"{lost} Deleted contacts stay deleted. If the table was restored or purged, `python manage.py "
        "backfill_crm_contacts --recreate-deleted --dry-run` shows what would be created again."
    )


def _advice_on_contacts_twice(twice: ContactsTwice) -> str:
    count, more = len(twice.contacts), ", ..." if len(twice.contacts) > MAX_NAMED else ""
    return (
        f"{count:,} {'contact has a duplicate' if count == 1 else 'contacts have duplicates'} with the same address in "
        f"another spelling, stored by the application during a run. Both contacts stay, because {twice.why}: "
        f"{', '.join(twice.contacts[:MAX_NAMED])}{more}. Keep one of the two in the CRM: until then, every run reports "
        "them."
    )


def _lost_report(lost: LostReport) -> str:
    return (
        f"Run {lost.run_id} did not write its report. Rows newly in error in it: {lost.error_new:,}; "
        "`python manage.py export_backfill_errors` lists those still in error."
    )


def in_place_of_the_report(report: RunReport) -> str:
    """Return one line with the main results of a report that could not be written."""
    if report.run_id is None:
        return "The report of the dry run could not be written: run it again."
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(report.totals.errors_new_by_reason.items()))
    news = f"{report.totals.error_new:,}" + (f" ({reasons})" if reasons else "")
    again = ", and the next run reports them again" if report.totals.error_new else ""
    return (
        f"Run {report.run_id}: {report.status.value}; rows newly in error: {news}. `python manage.py backfill_runs "
        f"show {report.run_id}` has the figures{again}."
    )


def _advice_on_the_end(report: RunReport) -> str | None:
    if report.status == RunStatus.FAILED:
        why = report.failure or "the reconciliation does not hold"
        return f"The run failed: {why}. Committed batches stay; run the command again to continue."
    if report.status == RunStatus.PAUSED:
        return (
            "The run was paused. Unless it was resumed already, `python manage.py backfill_runs resume "
            f"{report.run_id}` lets the next run continue it."
        )
    if report.status != RunStatus.FINISHED:
        why = f": {report.failure}" if report.failure else ""
        return f"The run was {report.status.value}{why}. Committed batches stay; run the command again to continue."
    return None


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))

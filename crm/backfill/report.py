"""What people see of a run: the summary, with rich; and one JSON object for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from crm.backfill.gone_contacts import GoneContacts
from crm.backfill.latecomers import ContactsTwice
from crm.backfill.runner import RunReport
from crm.models.ledger import RunStatus
from crm.output.table import Summary, print_line
from crm.postgres.target import target, target_line
from crm.runs.lost_reports import LostReport

#: How many contacts a line names.
MAX_NAMED = 10

#: The lines of the reconciliation stand under one another.
_INDENT = " " * len("Reconciliation: ")

_LABELS_OF_TYPE = (("Clients", "CLIENT"), ("Tax Preparers", "PREPARER"), ("Affiliates", "AFFILIATE"), ("Leads", "LEAD"))


def as_json(report: RunReport) -> str:
    """The report as one JSON object on one line."""
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
    """The summary for people, with the labels that the users of the old script know."""
    totals = report.totals
    table = Summary(_headline(report))
    row = table.count

    rate = f", {totals.read / report.seconds:,.0f} rows/s" if report.seconds else ""
    row("Total Processed", totals.read, f"source rows{rate}", "bold")
    row("Contacts by type", totals.created, "would be made" if report.options.dry_run else "made", "bold")
    for label, contact_type in _LABELS_OF_TYPE:
        row(f"  {label}", totals.created_by_type[contact_type])
    row("Skipped (exists)", report.already + totals.exists + totals.merged, "already + exists + merged")
    row("  already", report.already, "in the ledger from earlier runs")
    left = "" if report.options.update else "; untouched"
    row("  exists", totals.exists, f"met a contact that others made{left}")
    row("  merged", totals.merged, "met a contact of ours and filled its gaps")
    if report.options.recreate_deleted:
        row("Contact gone", report.recreated, "rows that were looked at again for that, and are counted above")
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
        row("Looked at again", totals.revisited, "changed since, or came to a contact that was there")
        as_well = f"; {totals.updated_and_kept:,} kept a value as well" if totals.updated_and_kept else ""
        row("  changed", totals.updated, f"{would}filled or promoted{as_well}")
        row("  kept only", totals.kept, "the contact has another value, which stays")
        row("  unchanged", totals.unchanged, "brought nothing")
        for column in sorted(totals.updated_by_column.keys() | totals.kept_by_column.keys()):
            kept = f"{totals.kept_by_column[column]:,} kept" if totals.kept_by_column[column] else ""
            row(f"  {column}", totals.updated_by_column[column], kept)
    table.print_on(console)
    print_line(console, reconciliation_lines(report))
    print_line(console, target_line())


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
        lines.append(f"{_INDENT}{totals.revisited:,} looked at again = {parts}")
    if report.balanced is not None:
        lines[-1] += "  (holds)" if report.balanced else "  (DOES NOT HOLD)"
    elif report.not_checked:
        lines[-1] += f"  (not checked: {report.not_checked})"
    return "\n".join(lines)


def _headline(report: RunReport) -> str:
    what = "Dry run, nothing was written" if report.options.dry_run else f"Run {report.run_id}"
    return f"{what}: {report.status.value} in {report.seconds:,.1f} s on generation {report.facts.generation}"


def news(report: RunReport, *, strict: bool) -> list[str]:
    """What is news for whoever reads stderr alone, a line each: at least one with every exit code but 0."""
    return [words for words in (advice(report), _errors(report, strict=strict)) if words]


def _errors(report: RunReport, *, strict: bool) -> str | None:
    """The rows in error that make the exit code 1, or would: new ones, or any of them."""
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
    """Return what else an operator has to know of a run; None where there is nothing.

    Why it did not get to its end and how to go on, which contacts are gone or there twice, which reports were lost.
    """
    ended = _advice_on_the_end(report)
    gone = _words_on_gone_contacts(report.gone, report) if report.gone and report.gone.is_news else None
    twice = _words_on_contacts_twice(report.twice) if report.twice.contacts else None
    lost = map(_told_again, (lost for lost in report.lost_reports if lost.error_new))
    words = [*(text for text in (ended, gone, twice) if text), *lost]
    return "\n".join(words) or None


def _words_on_gone_contacts(gone: GoneContacts, report: RunReport) -> str:
    since = f", {gone.rows - gone.known:,} of them since run {gone.known_to}" if gone.known_to else ""
    lost = (
        f"{gone.rows:,} of {gone.settled:,} settled rows have lost their contact: it is gone from crm_contacts{since}."
    )
    if report.options.dry_run and report.options.recreate_deleted:
        return (
            f"{lost} This dry run looked at {report.recreated:,} of them again; its summary counts what a run would "
            "make of them."
        )
    return (
        f"{lost} What people deleted stays deleted. If the table was restored or purged, `python manage.py "
        "backfill_crm_contacts --recreate-deleted --dry-run` tells what it would make again."
    )


def _words_on_contacts_twice(twice: ContactsTwice) -> str:
    count, more = len(twice.contacts), ", ..." if len(twice.contacts) > MAX_NAMED else ""
    return (
        f"{count:,} {'contact has' if count == 1 else 'contacts have'} another one beside, with the same address in "
        f"another spelling, which was stored while a run was at work. Both stay, since {twice.why}: "
        f"{', '.join(twice.contacts[:MAX_NAMED])}{more}. Keep one of each two in the CRM: every run reports them "
        "until then."
    )


def _told_again(lost: LostReport) -> str:
    return (
        f"Run {lost.run_id} did not write its report. Rows newly in error in it: {lost.error_new:,}; "
        "`python manage.py export_backfill_errors` lists those that still are."
    )


def in_place_of_the_report(report: RunReport) -> str:
    """The essence of a report that could not be written, in one line."""
    if report.run_id is None:
        return "What the dry run found is not told: run it again."
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
        return f"The run failed: {why}. What was committed stays; run the command again and it goes on from there."
    if report.status == RunStatus.PAUSED:
        return (
            "The run was paused. Unless it is resumed by now, `python manage.py backfill_runs resume "
            f"{report.run_id}` lets the next run go on, from where this one stopped."
        )
    if report.status != RunStatus.FINISHED:
        why = f": {report.failure}" if report.failure else ""
        return (
            f"The run was {report.status.value}{why}. What was committed stays; run the command again and it goes on."
        )
    return None


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))

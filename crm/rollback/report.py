"""What people see of a rollback: the summary, one JSON object for machines, and a list of what became of each row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from django.db import DatabaseError
from rich.console import Console

from crm.errors import OperatorError
from crm.interruption import StoppedError
from crm.models.ledger import RunStatus
from crm.output.files import new_file
from crm.output.spreadsheet import row_writer
from crm.output.table import Summary, print_line
from crm.postgres.target import target, target_line
from crm.rollback.runner import Listener, ListingError, RollbackReport
from crm.rollback.undo import Reverted
from crm.rules.entry import Entry
from crm.rules.reverting import KeepReason, Verdict

CSV_COLUMNS = ("row", "was", "contact_id", "outcome", "why", "detail")
LATER_RUN = "merged_by_a_later_run"
#: The heading of the runbook under which each reason is explained.
MEANING_OF_REASONS = "Why a row is kept or failed"


def as_json(report: RollbackReport) -> str:
    """The report as one JSON object on one line."""
    numbers = report.counts.numbers
    kinds = {
        kind: {verdict: numbers[f"{kind}_{verdict}"] for verdict in Verdict} for kind in ("merges", "updates", "lines")
    }
    answer: dict[str, Any] = {
        "run": report.run_id,
        "rolls_back": report.rolls_back,
        "later_runs": report.later_runs,
        "status": report.status.value,
        "dry_run": report.dry_run,
        "database": target(),
        "generation": report.generation,
        **{verdict.value: numbers[f"contacts_{verdict}"] for verdict in Verdict},
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
    """The summary for people."""
    numbers = report.counts.numbers
    table = Summary(_headline(report))
    row = table.count

    deleted = "would be deleted" if report.dry_run else "deleted"
    contacts = [numbers[f"contacts_{verdict}"] for verdict in Verdict]
    row("Contacts that the run created", sum(contacts), style="bold")
    row("  reversed", contacts[0], f"{deleted}: nobody had touched them")
    row("  kept", contacts[1], "somebody changed or deleted them, or refers to them")
    row("  failed", contacts[2], "the database refused", "red" if contacts[2] else "")
    merges = [numbers[f"merges_{verdict}"] for verdict in Verdict]
    row("Rows that it merged", sum(merges), style="bold")
    row("  reversed", merges[0], "with the contact, or taken out of it")
    row("  kept", merges[1])
    row("  failed", merges[2], style="red" if merges[2] else "")
    updates = [numbers[f"updates_{verdict}"] for verdict in Verdict]
    row("Changes of --update", sum(updates), style="bold")
    row("  reversed", updates[0], "taken out of the contact, with their line of its history")
    row("  kept", updates[1])
    row("  failed", updates[2], style="red" if updates[2] else "")
    row("Rows that met others or had errors", numbers["lines_reversed"] + numbers["lines_kept"], style="bold")
    row("  reversed", numbers["lines_reversed"])
    row("  kept", numbers["lines_kept"], "their contact was deleted since")
    row(
        "Rows merged by other runs",
        numbers["later_merges"],
        "pending again, with what they were merged into",
    )
    if report.counts.reasons:
        remark = f'"{MEANING_OF_REASONS}" in docs/runbook.md says what to do'
        row("Why rows were kept or failed", report.counts.reasons.total(), remark, "bold")
    for reason, count in sorted(report.counts.reasons.items()):
        row(f"  {reason}", count)
    table.print_on(console)
    print_line(console, target_line())
    if report.status == RunStatus.FINISHED and not report.dry_run:
        for line in _ways_back(report):
            print_line(console, line)


def _ways_back(report: RollbackReport) -> list[str]:
    """How to have back what was reversed: rows by any run, what an update changed by an update alone."""
    numbers = report.counts.numbers
    ways = []
    if any(numbers[kind] for kind in ("contacts_reversed", "merges_reversed", "lines_reversed", "later_merges")):
        recreated = ", but for the contacts that it had made again: those are deleted as before"
        but = recreated if report.of_recreation else ""
        ways.append(
            f"The rows are pending again: `python manage.py backfill_crm_contacts` would bring back what they did{but}."
        )
    if numbers["updates_reversed"]:
        ways.append(
            "What an update changed comes back by the next one: `python manage.py backfill_crm_contacts --update`."
        )
    return ways


@contextmanager
def listing(path: Path | None) -> Iterator[Listener | None]:
    """Something that lists what becomes of each row in a CSV file, batch by batch; nothing without a path.

    Raises OperatorError where the file is there already (it may be the list of a rollback that was killed), or cannot
    be written. What lists raises ListingError when it no longer can.
    """
    if path is None:
        yield None
        return
    try:
        # Not renamed at the end: what was taken back is to be read in it should the rollback be killed.
        file = new_file(path)
    except FileExistsError:
        raise OperatorError(f"{path} is there already: name a new file. Nothing was written.") from None
    except OSError as error:
        raise OperatorError(f"{path} cannot be written ({error.strerror}). Nothing was written.") from None

    write_row = row_writer(file)

    def write(rows: Iterable[Iterable[str]]) -> None:
        try:
            for row in rows:
                write_row(row)
            file.flush()
            # What a batch took back is on the disk before the next one is begun.
            os.fsync(file.fileno())
        except OSError as error:
            raise ListingError(error.strerror or type(error).__name__) from None

    try:
        write([CSV_COLUMNS])
        yield lambda undone: write(_rows_of(undone))
    except ListingError as error:
        path.unlink()
        raise OperatorError(f"{path} cannot be written ({error.reason}). Nothing was written.") from None
    except (OperatorError, StoppedError, DatabaseError):
        # Nothing was done, so there is no list; the same name is free for what the operator calls next.
        path.unlink()
        raise
    finally:
        # All was written by then, or it was told that it could not be.
        with suppress(OSError):
            file.close()


def _rows_of(undone: Reverted) -> Iterator[tuple[str, ...]]:
    for judgement in undone.judgements:
        yield (*_cells(judgement.entry), judgement.verdict, judgement.why or "", judgement.detail)
    for entry in undone.later_merges:
        yield (*_cells(entry), Verdict.REVERSED, LATER_RUN, f"run {entry.run_id}")


def _cells(entry: Entry) -> tuple[str, str, str]:
    return entry.row, entry.outcome, entry.contact_id


def _headline(report: RollbackReport) -> str:
    what = f"Dry run, nothing was written: run {report.rolls_back} taken back"
    if not report.dry_run:
        what = f"Run {report.run_id}, taking back run {report.rolls_back}"
    return f"{what}: {report.status.value} in {report.seconds:,.1f} s on generation {report.generation}"


def news(report: RollbackReport) -> list[str]:
    """What whoever reads stderr alone must know, a line each; nothing where the rollback ends with exit code 0."""
    return [words for words in (_advice(report), _failures(report)) if words]


def _failures(report: RollbackReport) -> str | None:
    if not report.counts.failed:
        return None
    refusals = [item for item in sorted(report.counts.reasons.items()) if item[0].startswith(KeepReason.REFUSED)]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in refusals)
    what = f"run {report.run_id}: {report.counts.failed:,} of what run {report.rolls_back} did could not be taken back"
    return f"{what} ({reasons}); --csv lists them"


def _advice(report: RollbackReport) -> str | None:
    """Why a rollback that did not get to its end ended, and how to go on from here."""
    if report.status == RunStatus.FAILED:
        return (
            f"The rollback failed: {report.failure}. What is reversed stays so; run the command again and it goes on."
        )
    if report.status != RunStatus.FINISHED:
        why = f": {report.failure}" if report.failure else ""
        first = ""
        if report.status == RunStatus.PAUSED:
            first = f"unless it is resumed by now, `python manage.py backfill_runs resume {report.run_id}`; then "
        return (
            f"The rollback was {report.status.value}{why}. What is reversed stays so; {first}run the command again and "
            "it goes on."
        )
    return None

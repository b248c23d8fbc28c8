"""`python manage.py backfill_crm_contacts`: migrate everyone who is missing from crm_contacts."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.utils.dateparse import parse_date, parse_datetime

from crm.backfill.capacity import max_workers, require_room_for
from crm.backfill.report import as_json, in_place_of_the_report, news, print_summary
from crm.backfill.runner import RunReport, run_backfill
from crm.errors import OperatorError
from crm.management.arguments import MAX_ROWS, positive
from crm.management.operator_command import OperatorCommand
from crm.outcome import Source
from crm.output.streams import OutputError
from crm.output.table import console_on
from crm.postgres.errors import refusing_to_start
from crm.rules.options import RunOptions
from crm.rules.throttling import FIRST_ROWS, ErrorBudget
from crm.runs.lost_reports import noted
from crm.runs.progress import progress_on_stderr


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Migrate users, profiles, leads and tax intakes that are missing from the CRM into crm_contacts. It can be run "
        "again at any time: it continues where it stopped, migrates new rows and retries rows in error. Exit code 0: "
        "finished; 1: finished, but with new errors, or with a person who has two contacts; 2: wrong usage, or a "
        "database that is unreachable or unsuitable; 3: another run is in progress; 4: stopped; 5: failed."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument("--dry-run", action="store_true", help="report what a run would do; write nothing")
        parser.add_argument(
            "--update",
            action="store_true",
            help="also update contacts from rows that changed or were added since: unmodified contacts become what one "
            "run over all rows would create, in others only empty fields are filled. This pass uses one process, "
            "whatever --workers says",
        )
        parser.add_argument(
            "--recreate-deleted",
            action="store_true",
            help="also recreate contacts that are missing from crm_contacts, whoever deleted them, for a table that "
            "was restored or purged. Use --dry-run first. Not together with --update",
        )
        parser.add_argument(
            "--with-signups",
            action="store_true",
            help="also migrate people who signed up and wait for approval, as leads: users without a profile, and "
            "profiles with the role LEAD",
        )
        parser.add_argument(
            "--batch-size",
            type=positive,
            metavar="ROWS",
            help=f"rows per transaction (default: {FIRST_ROWS} at first, then what the server does in about a second)",
        )
        parser.add_argument(
            "--only",
            nargs="+",
            choices=[source.value for source in Source],
            default=[],
            metavar="SOURCE",
            help=f"only these sources: {', '.join(source.value for source in Source)}",
        )
        parser.add_argument(
            "--limit",
            type=positive,
            metavar="ROWS",
            help="stop after this number of new rows; known errors do not count; requires one worker",
        )
        parser.add_argument(
            "--since",
            type=_moment,
            metavar="TIME",
            help="only rows updated at or after this date or time (UTC)",
        )
        parser.add_argument(
            "--workers",
            type=_workers,
            default=1,
            metavar="N",
            help="number of worker processes; `auto` starts one per processor, as connections allow (default: 1)",
        )
        parser.add_argument("--max-rate", type=positive, metavar="ROWS", help="maximum rows per second")
        parser.add_argument(
            "--max-errors",
            type=_ceiling,
            metavar="N|N%",
            help="stop the run when it has more new errors than this: a number, or a share of the rows read, which is "
            "checked from 1,000 rows on. Errors from earlier runs do not count, so only the run in which they first "
            "appear stops",
        )
        parser.add_argument(
            "--max-replica-lag",
            type=_seconds,
            metavar="SECONDS",
            help="wait while a replica lags more than this; stop if the lag cannot be read",
        )
        parser.add_argument("--strict", action="store_true", help="return exit code 1 for known errors, too")
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
        parser.add_argument("--no-progress", action="store_true", help="show no progress")

    def handle(
        self,
        *_args: Any,
        dry_run: bool,
        update: bool,
        recreate_deleted: bool,
        with_signups: bool,
        batch_size: int | None,
        only: list[str],
        limit: int | None,
        since: str | None,
        workers: int | None,
        max_rate: int | None,
        max_errors: ErrorBudget | None,
        max_replica_lag: float | None,
        strict: bool,
        json: bool,
        no_progress: bool,
        **_options: Any,
    ) -> None:
        """Run the backfill. The exit codes are in the help."""
        if limit is not None and workers != 1:
            raise CommandError("--limit requires one worker: leave --workers out.", returncode=2)
        if signups := [source for source in only if Source(source).is_of_signups and not with_signups]:
            raise CommandError(f"--only {' '.join(signups)} requires --with-signups.", returncode=2)
        if update and recreate_deleted:
            raise CommandError(
                "--recreate-deleted and --update need two runs: run --recreate-deleted first.", returncode=2
            )
        try:
            with refusing_to_start():
                workers = workers or max_workers()
                require_room_for(workers)
            options = RunOptions(
                dry_run=dry_run,
                update=update,
                recreate_deleted=recreate_deleted,
                with_signups=with_signups,
                batch_size=batch_size,
                only=tuple(source for source in Source if source in only),
                limit=limit,
                since=since,
                workers=workers,
                max_rate=max_rate,
                max_errors=max_errors,
                max_replica_lag=max_replica_lag,
            )
            report = run_backfill(options, progress_on_stderr(wanted=not no_progress))
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        try:
            with noted(report.run_id, report.lost_reports):
                self._tell(report, json=json)
        except OutputError:
            self.stderr.write(in_place_of_the_report(report))
            raise
        for line in news(report, strict=strict):
            self.stderr.write(line)
        if code := report.exit_code(strict=strict):
            raise SystemExit(code)

    def _tell(self, report: RunReport, *, json: bool) -> None:
        if json:
            self.stdout.write(as_json(report))
        else:
            print_summary(report, console_on(self.stdout))
        self.stdout.flush()


def _workers(text: str) -> int | None:
    """Return a number of workers; None for as many as the machine and the server allow."""
    if text == "auto":
        return None
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number from 1 to {MAX_ROWS} nor auto") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0")
    return seconds


def _ceiling(text: str) -> ErrorBudget:
    try:
        return ErrorBudget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _moment(text: str) -> str:
    """Return an ISO date or time as a PostgreSQL timestamp in UTC."""
    try:
        moment = parse_datetime(text)
        day = parse_date(text) if moment is None else None
    except ValueError:
        moment = day = None
    if day is not None:
        moment = datetime(day.year, day.month, day.day, tzinfo=UTC)
    if moment is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date or time such as 2025-11-01 or 2025-11-01T22:00:00")
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    try:
        return aware.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ")
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text!r} is before the year 1 or after 9999 in UTC") from None

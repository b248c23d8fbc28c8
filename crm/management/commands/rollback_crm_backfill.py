"""`python manage.py rollback_crm_backfill RUN`: take a run back, except for what people touched since."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser

from crm.errors import OperatorError
from crm.management.arguments import new_file, run_number
from crm.management.operator_command import OperatorCommand
from crm.output.table import console_on
from crm.rollback.report import as_json, listing, news, print_summary
from crm.rollback.runner import DEFAULT_BATCH_SIZE, roll_back
from crm.runs import control
from crm.runs.progress import progress_on_stderr

LEAST_BATCH, LARGEST_BATCH = 1, 5_000


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Take a run of the backfill back: delete the contacts that it created and nobody touched, take out what it "
        "filled in others, and let its rows be pending again. Where later runs stand, a warning gives the order to "
        "roll back in; it does not wait for an answer. Run it again when it was stopped: it goes on. Exit code "
        "0: all is reversed or kept; 1: some of it failed; 2: it cannot be taken back, or the database cannot be "
        "reached; 3: another run is going; 4: stopped; 5: failed."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """What may be asked."""
        parser.add_argument(
            "run",
            type=run_number,
            metavar="RUN",
            help=f"the run's number, as backfill_runs list shows it; `{control.LATEST}` is refused on purpose",
        )
        parser.add_argument("--dry-run", action="store_true", help="tell what would be done, and write nothing at all")
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
        parser.add_argument(
            "--csv", type=new_file, metavar="FILE", help="list in a new file what becomes of each row, by its reference"
        )
        parser.add_argument(
            "--batch-size",
            type=_batch_size,
            default=DEFAULT_BATCH_SIZE,
            metavar="ROWS",
            help=f"rows that commit together, at most {LARGEST_BATCH} (default {DEFAULT_BATCH_SIZE})",
        )
        parser.add_argument("--no-progress", action="store_true", help="show no progress")

    def handle(
        self,
        *_args: Any,
        run: int | str,
        dry_run: bool,
        json: bool,
        csv: Path | None,
        batch_size: int,
        no_progress: bool,
        **_options: Any,
    ) -> None:
        """Take the run back. The exit codes are in the help."""
        progress = progress_on_stderr(wanted=not no_progress)
        try:
            number = _number(run)
            with listing(csv) as listener:
                report = roll_back(number, dry_run=dry_run, batch_size=batch_size, progress=progress, listener=listener)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        # First: whatever becomes of stdout, this was told.
        for line in news(report):
            self.stderr.write(line)
        if json:
            self.stdout.write(as_json(report))
        else:
            print_summary(report, console_on(self.stdout))
        if report.exit_code:
            raise SystemExit(report.exit_code)


def _number(given: int | str) -> int:
    if isinstance(given, int):
        return given
    raise OperatorError(
        f"A rollback takes no `{given}`, so that it takes back what was looked at and no run that began since: give "
        f"the run's number. The latest run is {control.number(given)}; `python manage.py backfill_runs list` shows the "
        "others. Nothing was written."
    )


def _batch_size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not LEAST_BATCH <= int(text) <= LARGEST_BATCH:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {LEAST_BATCH} to {LARGEST_BATCH}")
    return int(text)

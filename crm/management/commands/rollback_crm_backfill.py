"""`python manage.py rollback_crm_backfill RUN`: roll back a run, except for what people changed since."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser

from crm.errors import OperatorError
from crm.management.arguments import new_file, positive, run_number
from crm.management.operator_command import OperatorCommand
from crm.output.table import console_on
from crm.rollback.report import as_json, listing, news, print_summary
from crm.rollback.runner import DEFAULT_BATCH_SIZE, roll_back
from crm.runs import control
from crm.runs.progress import progress_on_stderr

MAX_BATCH_SIZE = 5_000


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Roll back a run of the backfill: delete the contacts that it created and nobody modified, remove what it "
        "filled in others, and make its rows pending again. If later runs exist, a warning gives the order in which "
        "to roll back; the command does not wait for an answer. A stopped rollback continues when it is run again. "
        "Exit code 0: everything is reversed or kept; 1: some of it failed; 2: the run cannot be rolled back, or the "
        "database is unreachable; 3: another run is in progress; 4: stopped; 5: failed."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument(
            "run",
            type=run_number,
            metavar="RUN",
            help=f"the run's number, as shown by `backfill_runs list`; `{control.LATEST}` is refused on purpose",
        )
        parser.add_argument("--dry-run", action="store_true", help="report what would be done; write nothing")
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
        parser.add_argument(
            "--csv", type=new_file, metavar="FILE", help="list the result for each row in this new file"
        )
        parser.add_argument(
            "--batch-size",
            type=partial(positive, maximum=MAX_BATCH_SIZE),
            default=DEFAULT_BATCH_SIZE,
            metavar="ROWS",
            help=f"rows per transaction, at most {MAX_BATCH_SIZE} (default: {DEFAULT_BATCH_SIZE})",
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
        """Roll back the run. The exit codes are in the help."""
        progress = progress_on_stderr(wanted=not no_progress)
        try:
            number = _number(run)
            with listing(csv) as listener:
                report = roll_back(number, dry_run=dry_run, batch_size=batch_size, progress=progress, listener=listener)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        # First, so that it is reported even if stdout cannot be written.
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
        f"A rollback does not accept `{given}`, because another run may have started since you looked: give the run's "
        f"number. The latest run is {control.number(given)}; `python manage.py backfill_runs list` shows the others. "
        "Nothing was written."
    )

"""`python manage.py repair_crm_contacts`: repair contacts that were created elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser

from crm.errors import OperatorError
from crm.management.arguments import new_file, positive
from crm.management.operator_command import OperatorCommand
from crm.outcome import Repair
from crm.output.table import console_on
from crm.repair.report import as_json, listing, news, print_summary
from crm.repair.runner import DEFAULT_BATCH_SIZE, repair_contacts
from crm.runs.progress import progress_on_stderr

_HELP = {
    Repair.PREPARER_IDS: "a preparer given by the id of a user becomes the id of that user's profile, so that the "
    "preparer sees the contact",
    Repair.TYPES: "contacts of the old script (source `backfill`) that nobody modified since get the type of their "
    "profile's role",
    Repair.PLACEHOLDERS: "addresses that the old script invented (<kind>-<profile id>@unknown.com) become the user's "
    "email, or a placeholder that receives no mail",
}


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Repair contacts that the backfill did not create. Without --apply, this is a dry run. Give at least one of "
        "--preparer-ids, --types and --placeholders. Each run is recorded, and rollback_crm_backfill takes it back. "
        "Exit code 0: finished; 1: finished, but the database refused a repair; 2: wrong usage, or a database that is "
        "unreachable or unsuitable; 3: another run is in progress; 4: stopped; 5: failed."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        for repair in Repair:
            parser.add_argument(repair.option, action="store_true", help=_HELP[repair])
        parser.add_argument("--apply", action="store_true", help="write; without it, report what would be repaired")
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
        parser.add_argument(
            "--csv",
            type=new_file,
            metavar="FILE",
            help="list each repaired or kept contact by id, with the reason, in this new file",
        )
        parser.add_argument(
            "--batch-size",
            type=positive,
            default=DEFAULT_BATCH_SIZE,
            metavar="CONTACTS",
            help=f"contacts per transaction (default: {DEFAULT_BATCH_SIZE})",
        )
        parser.add_argument("--no-progress", action="store_true", help="show no progress")

    def handle(
        self,
        *_args: Any,
        apply: bool,
        json: bool,
        csv: Path | None,
        batch_size: int,
        no_progress: bool,
        **options: Any,
    ) -> None:
        """Repair the contacts. The exit codes are in the help."""
        repairs = [repair for repair in Repair if options[repair.value]]
        if not repairs:
            wanted = ", ".join(repair.option for repair in Repair)
            raise CommandError(f"Nothing to repair: give at least one of {wanted}. Nothing was written.", returncode=2)
        progress = progress_on_stderr(wanted=not no_progress)
        try:
            with listing(csv) as listener:
                report = repair_contacts(
                    repairs, apply=apply, batch_size=batch_size, progress=progress, listener=listener
                )
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

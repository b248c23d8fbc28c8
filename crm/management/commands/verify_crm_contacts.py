"""`python manage.py verify_crm_contacts`: prove that the migration is complete and correct."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import connection
from rich.console import Console

from crm.errors import OperatorError
from crm.management.arguments import new_file
from crm.management.operator_command import OperatorCommand
from crm.output.files import file_of_option
from crm.output.table import console_on
from crm.postgres.errors import as_operator_error
from crm.verification import verify
from crm.verification.findings import Finding
from crm.verification.report import as_json, findings_writer, news, print_report


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Prove that every source row is accounted for and that every contact that the backfill created matches its "
        "row. Read-only. Exit code 0: no defect (pending rows and later changes are reported, but are not defects); "
        "1: defects; 2: wrong usage, or a database that is unreachable or cannot be verified; 4: stopped."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object and nothing else on stdout, with the first hundred findings of each kind",
        )
        parser.add_argument(
            "--csv",
            type=new_file,
            metavar="FILE",
            help="write every finding to this new file: kind, check, row, contact id, names of columns",
        )

    def handle(self, *_args: Any, json: bool, csv: Path | None, **_options: Any) -> None:
        """Verify. The exit codes are in the help."""
        try:
            with (
                as_operator_error(
                    "Database error during the verification: {}. Nothing was proven; run the command again."
                ),
                _written_to(csv) as on_finding,
                _counted(Console(stderr=True)) as on_page,
            ):
                report = verify(connection, on_finding=on_finding, on_page=on_page)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        # First, so that it is reported even if stdout cannot be written.
        if line := news(report):
            self.stderr.write(line)
        if json:
            self.stdout.write(as_json(report))
        else:
            print_report(report, console_on(self.stdout))
        if report.exit_code:
            raise SystemExit(report.exit_code)


@contextmanager
def _written_to(path: Path | None) -> Iterator[Callable[[Finding], None] | None]:
    """Yield a function that writes a finding to the file. The file gets its name after the last one."""
    if path is None:
        yield None
        return
    with file_of_option(path, "--csv") as file:
        yield findings_writer(file)


@contextmanager
def _counted(console: Console) -> Iterator[Callable[[int], None]]:
    """On a terminal, show how many contacts have been compared."""
    compared = 0
    with console.status("Counting rows and ledger entries ...") if console.is_terminal else nullcontext() as status:

        def count(contacts: int) -> None:
            nonlocal compared
            compared += contacts
            if status is not None:
                status.update(f"{compared:,} contacts compared ...")

        yield count

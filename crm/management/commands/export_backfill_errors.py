"""`python manage.py export_backfill_errors`: the rows in error, with a remedy for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from django.core.management.base import CommandError, CommandParser
from django.db import connection

from crm.conflicts.dead_letters import DeadLetter, dead_letters
from crm.errors import OperatorError
from crm.management.arguments import new_file
from crm.management.operator_command import OperatorCommand
from crm.output.files import file_of_option
from crm.output.spreadsheet import row_writer
from crm.postgres.errors import as_operator_error


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Export the rows in error as CSV, one line each, with the reason and a remedy. Every run of the backfill "
        "retries these rows. The export has no personal data unless --with-email is given. Read-only. "
        "Exit code 2: wrong usage, or a database that is unreachable or unsuitable; 4: stopped; otherwise 0."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--output",
            type=new_file,
            metavar="FILE",
            help="write to this new file, readable only by the current user, instead of stdout",
        )
        parser.add_argument(
            "--with-email", action="store_true", help="add the stored email address of each row (personal data)"
        )

    def handle(self, *_args: Any, output: Path | None, with_email: bool, **_options: Any) -> None:
        """Export. The exit codes are in the help."""
        columns = [name for name in DeadLetter._fields if with_email or name != "email"]
        try:
            with (
                self._file(output) as file,
                as_operator_error("Database error during the export: {}. Run the command again."),
                closing(dead_letters(connection, with_email=with_email)) as letters,
            ):
                counts = self._write(file, columns, letters)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        gone = f", of which {counts[True]:,} no longer exist in the application" if counts[True] else ""
        self.stderr.write(f"Rows in error: {counts.total():,}{gone}", style_func=str)

    def _write(self, file: IO[str], columns: list[str], letters: Iterator[DeadLetter]) -> Counter[bool]:
        """Write the rows. Return how many no longer exist in the application (True), and how many do (False)."""
        counts: Counter[bool] = Counter()
        write = row_writer(file)
        # If the database refuses the query, nothing has been printed yet.
        first = list(islice(letters, 1))
        write(columns)
        for letter in chain(first, letters):
            write(getattr(letter, name) for name in columns)
            counts[bool(letter.row_gone)] += 1
        return counts

    def _file(self, path: Path | None) -> AbstractContextManager[IO[str]]:
        return nullcontext(cast(IO[str], self.stdout)) if path is None else file_of_option(path, "--output")

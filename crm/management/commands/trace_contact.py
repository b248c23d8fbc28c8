"""`python manage.py trace_contact`: the history of one person."""

from __future__ import annotations

import json as json_module
import sys
from itertools import chain, islice
from typing import Any, TextIO, cast

from django.core.management.base import CommandError, CommandParser
from django.db import connection

from crm.errors import OperatorError
from crm.management.operator_command import OperatorCommand
from crm.postgres.errors import as_operator_error
from crm.rules.row_reference import FORMS
from crm.tracing import as_lines, trace_address, trace_reference

ON_STANDARD_INPUT = "-"


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Show the history of one person: contacts, source rows, ledger entries, updates, resolutions, runs and "
        "rollbacks. The output has ids, outcomes, column names and times, but no personal data. Read-only. Exit code "
        "0: found; 1: nothing found; 2: wrong usage, or a database that is unreachable or unsuitable; 4: stopped."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "reference",
            metavar="CONTACT|ROW|-",
            help=f"a contact's id, {FORMS}; - reads an email address from standard input",
        )
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object and nothing else on stdout, with times in UTC"
        )

    def handle(self, *_args: Any, reference: str, json: bool, **_options: Any) -> None:
        """Trace the person. The exit codes are in the help."""
        try:
            with as_operator_error("Database error during the trace: {}. Run the command again."):
                if reference == ON_STANDARD_INPUT:
                    trace = trace_address(connection, _only_line())
                else:
                    trace = trace_reference(connection, reference)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        if json:
            self.stdout.write(json_module.dumps(trace))
        elif trace["found"]:
            self.stdout.write("\n".join(as_lines(trace)))
        if not trace["found"]:
            self.stderr.write("Nothing found: no row, no contact and no ledger entry.")
            raise SystemExit(1)


def _only_line() -> str:
    # None if the shell closed it.
    if (stdin := cast("TextIO | None", sys.stdin)) is None:
        raise _unreadable("it is closed")
    try:
        # On a terminal, reading to the end would wait.
        lines = [stdin.readline()] if stdin.isatty() else stdin
        address, more = islice(chain(filter(None, map(str.strip, lines)), ("", "")), 2)
    except UnicodeDecodeError:
        raise OperatorError("Standard input is not UTF-8 text.") from None
    except OSError as error:
        raise _unreadable(error.strerror or str(error)) from None
    if more:
        raise OperatorError("Standard input has more than one line: give a single email address.")
    return address


def _unreadable(why: str) -> OperatorError:
    return OperatorError(f"Standard input cannot be read ({why}): pass the email address from a file or a pipe.")

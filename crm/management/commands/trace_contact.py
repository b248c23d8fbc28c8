"""`python manage.py trace_contact`: what happened to one person."""

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
from crm.tracing import as_lines, trace_address, trace_reference

ON_STANDARD_INPUT = "-"


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Tell what happened to one person: contacts, source rows, entries of the ledger, updates, decisions, runs and "
        "rollbacks. Names ids, outcomes, columns and moments, and no one's data. Only reads. Exit code 0: something is "
        "known; 1: nothing is; 2: wrong usage, or a database that cannot be reached or does not fit; 4: stopped."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """What may be asked."""
        parser.add_argument(
            "whom",
            metavar="CONTACT|ROW|-",
            help="a contact's id, profiles:<id> or leads:<id>; - reads an email address from standard input",
        )
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object and nothing else on stdout, every time in UTC"
        )

    def handle(self, *_args: Any, whom: str, json: bool, **_options: Any) -> None:
        """Trace. The exit codes are in the help."""
        try:
            with as_operator_error("The database broke the trace off: {}. Try again."):
                if whom == ON_STANDARD_INPUT:
                    trace = trace_address(connection, _only_line())
                else:
                    trace = trace_reference(connection, whom)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        if json:
            self.stdout.write(json_module.dumps(trace))
        elif trace["found"]:
            self.stdout.write("\n".join(as_lines(trace)))
        if not trace["found"]:
            self.stderr.write("Nothing is known: no row, no contact, no entry of the ledger.")
            raise SystemExit(1)


def _only_line() -> str:
    # Python has none where the shell closed it.
    if (stdin := cast("TextIO | None", sys.stdin)) is None:
        raise _unreadable("it is closed")
    try:
        # On a terminal the end would be waited for.
        lines = [stdin.readline()] if stdin.isatty() else stdin
        address, more = islice(chain(filter(None, map(str.strip, lines)), ("", "")), 2)
    except UnicodeDecodeError:
        raise OperatorError("Standard input is no text in UTF-8.") from None
    except OSError as error:
        raise _unreadable(error.strerror or str(error)) from None
    if more:
        raise OperatorError("There is more than one line on standard input: give one email address alone.")
    return address


def _unreadable(why: str) -> OperatorError:
    return OperatorError(f"Standard input cannot be read ({why}): give the email address on it, from a file or a pipe.")

#!/usr/bin/env python
"""Runs the project's commands. An operator's mistake is one line on stderr and exit code 2, never a traceback."""

import os
import sys
from contextlib import redirect_stderr, suppress
from io import StringIO
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management import ManagementUtility, get_commands
from django.core.management.base import BaseCommand, CommandError, SystemCheckError
from django.db import NotSupportedError, OperationalError, ProgrammingError
from psycopg.errors import InsufficientPrivilege

from crm.errors import OperatorError
from crm.output.streams import OutputError, with_checked_output

#: As that of our own commands: see the table in README.
INTERRUPTED_EXIT_CODE = 4


class Utility(ManagementUtility):
    """Django's own, but for the exit code of wrong usage: 2, as that of our commands and of argparse."""

    def fetch_command(self, subcommand: str) -> BaseCommand:
        """The command of this name. Raises OperatorError where there is none."""
        if subcommand not in get_commands():
            with redirect_stderr(StringIO()) as told, suppress(SystemExit):
                super().fetch_command(subcommand)
            raise OperatorError(". ".join(told.getvalue().splitlines()).replace("?. ", "? "))
        command = super().fetch_command(subcommand)
        execute = command.execute

        def execute_or_refuse(*args: Any, **options: Any) -> str | None:
            try:
                return execute(*args, **options)
            except SystemCheckError:
                # Something to look at, and no wrong usage.
                raise
            except CommandError as error:
                # Django's own commands leave it at 1, whatever they refuse.
                if error.returncode == 1:
                    error.returncode = OperatorError.exit_code
                raise

        vars(command)["execute"] = execute_or_refuse
        return command


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code for the operator's mistakes, otherwise what the command decides."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    try:
        Utility(arguments).execute()
    except OutputError:
        raise
    except KeyboardInterrupt:
        # One of Django's own commands: ours end themselves.
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED_EXIT_CODE
    except (ImproperlyConfigured, OperatorError) as error:
        return _refuse(str(error))
    except NotSupportedError as error:
        # Django's own, of a server that is older than it takes; PostgreSQL's have a cause.
        if error.__cause__ is not None:
            raise
        return _refuse(f"{error}. Nothing was written.")
    except OperationalError as error:
        if not _is_connection_failure(error):
            raise
        return _refuse(
            f"The database cannot be reached: {_reason(error)}. Check DATABASE_URL, the line for it in ~/.pgpass where "
            "the password is kept there, and that the server runs."
        )
    except ProgrammingError as error:
        if not isinstance(error.__cause__, InsufficientPrivilege):
            raise
        return _refuse(
            f"The role of DATABASE_URL may not do this: {error.__cause__.diag.message_primary}. `migrate`, "
            "`createsuperuser`, `runserver` and whatever else the admin needs are not for the role of "
            "docs/least_privilege.sql: give DATABASE_URL the address of the role that owns the schema crm_backfill, "
            "under which `migrate` was run. Nothing was written."
        )
    return 0


def _refuse(message: str) -> int:
    sys.stderr.write(" ".join(message.split()) + "\n")
    return OperatorError.exit_code


def _reason(error: OperationalError) -> str:
    """What libpq says, as sentences of one line; its question whether the server runs is left to our own advice."""
    lines = [line.strip().removesuffix(".") for line in str(error).splitlines()]
    return ". ".join(line for line in lines if line and not line.endswith("?")).replace(":. ", ": ")


def _is_connection_failure(error: OperationalError) -> bool:
    """Whether there never was a connection: only then has libpq no SQLSTATE to give."""
    return getattr(error.__cause__, "sqlstate", None) is None


if __name__ == "__main__":
    sys.exit(with_checked_output(main, sys.argv))

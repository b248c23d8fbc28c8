"""The base class of the operator's commands: signals stop them, and their statements have time limits."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from crm.interruption import StoppedError, stopped_by_signals
from crm.postgres.limits import limited
from crm.version import FULL_VERSION

EPILOG = "Exit code 6, for every command: standard output could not be written (a full disk, a closed pipe)."


class OperatorCommand(BaseCommand):
    """A command that Ctrl-C, SIGTERM and SIGHUP end with exit code 4, and whose statements have limits."""

    def get_version(self) -> str:
        """Return the version of this project and of Django, for `--version`."""
        return FULL_VERSION

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """Return the parser, with the exit code of all commands. Abbreviated options, such as `--up`, are refused."""
        return super().create_parser(prog_name, subcommand, **{"epilog": EPILOG, "allow_abbrev": False, **kwargs})

    def execute(self, *arguments: Any, **options: Any) -> str | None:
        """Run the command."""
        try:
            with stopped_by_signals(), limited():
                return super().execute(*arguments, **options)
        except StoppedError as stopped:
            # Not a CommandError: Django would print its name, but a stop that the operator requested is no error.
            self.stderr.write(str(stopped))
            raise SystemExit(stopped.exit_code) from None

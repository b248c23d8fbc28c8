"""What every command of ours has in common: it ends when it is told to, and it does not wait for ever."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from crm.interruption import StoppedError, stopped_by_signals
from crm.postgres.limits import limited
from crm.version import FULL_VERSION

EPILOG = "Exit code 6, of every command: standard output could not be written (a full disk, a closed pipe)."


class OperatorCommand(BaseCommand):
    """A command that Ctrl-C, SIGTERM and SIGHUP end with exit code 4, and whose statements have limits."""

    def get_version(self) -> str:
        """What `--version` says: ours, and not Django's alone."""
        return FULL_VERSION

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """The parser, with the exit code that all commands have. `--up` is to be no --update."""
        return super().create_parser(prog_name, subcommand, **{"epilog": EPILOG, "allow_abbrev": False, **kwargs})

    def execute(self, *arguments: Any, **options: Any) -> str | None:
        """Run the command."""
        try:
            with stopped_by_signals(), limited():
                return super().execute(*arguments, **options)
        except StoppedError as stopped:
            # No CommandError, whose name Django puts before the message: what the operator asked for is none.
            self.stderr.write(str(stopped))
            raise SystemExit(stopped.exit_code) from None

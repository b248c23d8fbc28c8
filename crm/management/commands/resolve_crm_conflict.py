"""`python manage.py resolve_crm_conflict ROW`: resolve a row in conflict. The next run applies the resolution."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from crm.conflicts import resolving
from crm.errors import OperatorError
from crm.management.operator_command import OperatorCommand
from crm.rules.row_reference import FORMS, RowReference


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "Resolve a row in conflict; export_backfill_errors lists these rows. The resolution is recorded with user and "
        "time, and the next run of the backfill applies it. A new resolution replaces it. Without --contact or "
        "--separate, the command shows the contact that each key of the row matches. Exit code 0: recorded, or shown; "
        "2: this cannot be resolved, or the database is unreachable; 3: a run is in progress; 4: stopped."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments."""
        parser.add_argument("row", metavar="ROW", help=f"the row: {FORMS}")
        resolution = parser.add_mutually_exclusive_group()
        resolution.add_argument("--contact", metavar="ID", help="the row belongs to this contact")
        resolution.add_argument(
            "--separate", metavar="EMAIL", help="the row is another person: create a contact with this address for it"
        )

    def handle(self, *_args: Any, row: str, contact: str | None, separate: str | None, **_options: Any) -> None:
        """Record the resolution, or show the conflict. The exit codes are in the help."""
        try:
            reference = RowReference.parse(row)
            if contact is not None:
                resolving.belongs_to(reference, contact)
                resolved = f"belongs to the contact {contact}"
            elif separate is not None:
                resolving.is_separate(reference, separate)
                resolved = f"gets a contact of its own, {reference.entry_id}"
            else:
                self.stdout.write(resolving.conflict_of(reference))
                return
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None
        self.stdout.write(
            f"{reference} {resolved}. `python manage.py backfill_crm_contacts` applies this; until then, a new "
            "resolution replaces it."
        )

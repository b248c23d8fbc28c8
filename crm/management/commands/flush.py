"""`python manage.py flush`: refused, because it would empty the ledger and keep the contacts."""

from __future__ import annotations

from typing import Any

from django.core.management.commands import flush

from crm.errors import OperatorError


class Command(flush.Command):
    """Refuses Django's flush, which empties the tables of the backfill but not `crm_contacts`, which is unmanaged."""

    help = "Refused, with exit code 2: it would empty the tables of the backfill and keep the contacts."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def handle(self, **_options: Any) -> None:
        """Raise OperatorError."""
        raise OperatorError(
            "flush would empty the tables of the backfill and keep the contacts. Then no run could be rolled back, the "
            "next run would create contacts again that people deleted, and the resolutions of rows in conflict would "
            "be lost. To undo a run, use `python manage.py rollback_crm_backfill RUN`. Nothing was deleted."
        )

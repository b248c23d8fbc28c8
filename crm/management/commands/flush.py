"""`python manage.py flush`: refused, since it would empty the ledger and keep the contacts."""

from __future__ import annotations

from typing import Any

from django.core.management.commands import flush

from crm.errors import OperatorError


class Command(flush.Command):
    """Django's own knows the tables of the backfill and not those of the application, which the contacts are in."""

    help = "Refused, with exit code 2: it would empty the tables of the backfill and keep the contacts."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def handle(self, **_options: Any) -> None:
        """Raise OperatorError, whatever is asked for."""
        raise OperatorError(
            "flush would empty the tables of the backfill and keep the contacts. Then no run could be taken back any "
            "more, contacts that people deleted would come back, and what was decided about rows in conflict would be "
            "lost. To take back what a run did, use `python manage.py rollback_crm_backfill RUN`. Nothing was deleted."
        )

"""`python manage.py migrate`: Django's own, without a warning that concerns the role of the backfill."""

from __future__ import annotations

from typing import Any

from django.core.checks.registry import registry
from django.core.management.commands import migrate

from crm.checks import EXCESS


class Command(migrate.Command):
    """Who migrates owns the tables, and may do more with them than the backfill needs."""

    def check(self, *arguments: Any, **options: Any) -> None:
        """Run all checks but that of rights which the backfill does not need."""
        super().check(*arguments, **options | {"tags": sorted(registry.tags_available() - {EXCESS})})

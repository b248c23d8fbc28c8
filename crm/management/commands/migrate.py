"""`python manage.py migrate`: Django's own, without the checks that concern the role of the backfill and its runs."""

from __future__ import annotations

from typing import Any

from django.core.checks.registry import registry
from django.core.management.commands import migrate

from crm.checks import NOT_FOR_MIGRATE


class Command(migrate.Command):
    """Who migrates owns the tables, and may do more with them than the backfill needs; and makes what a run lacks."""

    def check(self, *arguments: Any, **options: Any) -> None:
        """Run all checks but those of rights which the backfill does not need, and of what a run lacks."""
        super().check(*arguments, **options | {"tags": sorted(registry.tags_available().difference(NOT_FOR_MIGRATE))})

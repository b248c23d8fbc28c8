"""`python manage.py migrate`: Django's command, without the checks of the backfill's role and of a run."""

from __future__ import annotations

from typing import Any

from django.core.checks.registry import registry
from django.core.management.commands import migrate

from crm.checks import NOT_FOR_MIGRATE


class Command(migrate.Command):
    """Skips the checks of excess rights, which an owner has, and of what a run lacks, which `migrate` may add."""

    def check(self, *arguments: Any, **options: Any) -> None:
        """Run all checks except for excess rights and for what a run would refuse."""
        super().check(*arguments, **options | {"tags": sorted(registry.tags_available().difference(NOT_FOR_MIGRATE))})

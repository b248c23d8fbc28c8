"""`python manage.py runserver`: Django's own, which ends in one line where the database cannot be used."""

from __future__ import annotations

import os
from typing import Any

from django.contrib.staticfiles.management.commands import runserver
from django.db import connection, connections
from django.db.migrations.recorder import MigrationRecorder
from django.utils.autoreload import DJANGO_AUTORELOAD_ENV


class Command(runserver.Command):
    """Looks at the database before Django's reloader takes over, in whose thread an error is a traceback."""

    def handle(self, *arguments: Any, **options: Any) -> str | None:
        """Serve the admin."""
        if os.environ.get(DJANGO_AUTORELOAD_ENV) != "true":
            MigrationRecorder(connection).applied_migrations()
            connections.close_all()
        return super().handle(*arguments, **options)

"""`python manage.py runserver`: Django's command, with a one-line error if the database or a setting is missing."""

from __future__ import annotations

import os
from typing import Any

from django.conf import settings
from django.contrib.staticfiles.management.commands import runserver
from django.db import connection, connections
from django.db.migrations.recorder import MigrationRecorder
from django.utils.autoreload import DJANGO_AUTORELOAD_ENV

from crm.errors import OperatorError


class Command(runserver.Command):
    """Checks the database before Django starts its reloader, whose thread would print a traceback."""

    def handle(self, *arguments: Any, **options: Any) -> str | None:
        """Serve the admin."""
        if os.environ.get(DJANGO_AUTORELOAD_ENV) != "true":
            MigrationRecorder(connection).applied_migrations()
            connections.close_all()
        if settings.NOT_SERVED:
            raise OperatorError(settings.NOT_SERVED)
        if not (settings.DEBUG or settings.ALLOWED_HOSTS):
            raise OperatorError(
                "The admin has no host to serve: in the environment or in .env, set DEBUG=on to view it on this "
                "machine, or, on a server, ALLOWED_HOSTS to the names under which it is reached."
            )
        return super().handle(*arguments, **options)

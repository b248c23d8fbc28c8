"""The database that a command uses, for summaries and JSON, without user and password."""

from __future__ import annotations

from django.conf import settings
from django.db import connection


def target() -> dict[str, str]:
    """Return host (or folder of the socket), port and name from DATABASE_URL, and the application's schema."""
    return {
        "host": str(connection.settings_dict["HOST"]),
        "port": str(connection.settings_dict["PORT"]),
        "name": str(connection.settings_dict["NAME"]),
        "schema": settings.LEGACY_SCHEMA,
    }


def target_line() -> str:
    """Return the target as one line of text."""
    return "Database: {name} on {host}:{port}, schema {schema}".format(**target())

"""Which database was worked on, for the summaries and the JSON: where it is, and never the user or the password."""

from __future__ import annotations

from django.conf import settings
from django.db import connection


def target() -> dict[str, str]:
    """Host (of a socket the folder), port and name as DATABASE_URL has them, and the application's schema."""
    return {
        "host": str(connection.settings_dict["HOST"]),
        "port": str(connection.settings_dict["PORT"]),
        "name": str(connection.settings_dict["NAME"]),
        "schema": settings.LEGACY_SCHEMA,
    }


def target_line() -> str:
    """The same in a line, for people."""
    return "Database: {name} on {host}:{port}, schema {schema}".format(**target())

"""Timestamps that Python cannot hold are read as PostgreSQL's own text.

A column may hold `infinity`, a year before Christ or one after 9999. psycopg raises an error for such a value when its
row is fetched, and the page or the command that asked loses all the other rows with it. So every connection of Django's
returns the text instead, and code that shows a timestamp shows what is stored.
"""

from __future__ import annotations

from datetime import UTC
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from psycopg import DataError
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.datetime import TimestampLoader, TimestamptzLoader
from psycopg.types.string import TextLoader


class _TimestampLoader(TimestampLoader):
    """A datetime without a zone, or text."""

    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data)
        except DataError:
            return bytes(data).decode()


class _ZonedLoader(TimestamptzLoader):
    """A datetime in UTC, or text."""

    #: Django compares it with the zone of the connection, and where they differ it registers a loader of its own.
    timezone = UTC

    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data).astimezone(UTC)
        except (DataError, OverflowError):
            return bytes(data).decode()


def read_every_timestamp(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
    """Let a new connection return as text what a datetime cannot hold. A receiver of `connection_created`."""
    if connection.vendor == "postgresql":
        connection.connection.adapters.register_loader("timestamp", _TimestampLoader)
        connection.connection.adapters.register_loader("timestamptz", _ZonedLoader)


class _RateLoader(Loader):
    """A numeric as text, with two decimals or as many as it needs: 5, 5.00 and 5.000000 are one rate."""

    def load(self, data: Buffer) -> str:
        """PostgreSQL's text without the zeros at its end."""
        text = bytes(data).decode()
        whole, point, decimals = text.partition(".")
        if not point:
            return f"{text}.00" if text.lstrip("-").isdigit() else text
        return f"{whole}.{decimals.rstrip('0').ljust(2, '0')}"


class _MomentLoader(Loader):
    """A timestamp with time zone as text, in UTC as the session has it: as one without."""

    def load(self, data: Buffer) -> str:
        """PostgreSQL's text without the zone."""
        return bytes(data).decode().replace("+00", "", 1)


def read_as_text(cursor: CursorWrapper) -> None:
    """Let this cursor return timestamps and numerics as text, one text for one value."""
    cursor.adapters.register_loader("timestamp", TextLoader)
    cursor.adapters.register_loader("timestamptz", _MomentLoader)
    cursor.adapters.register_loader("numeric", _RateLoader)

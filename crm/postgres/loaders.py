"""Reads timestamps that Python cannot represent as text.

A column may contain `infinity`, a year BC or one after 9999. psycopg raises an error when it fetches such a value, and
all other rows of the query are lost, too. So every Django connection returns such a value as PostgreSQL's text.
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

    #: Django registers its own loader if this differs from the time zone of the connection.
    timezone = UTC

    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data).astimezone(UTC)
        except (DataError, OverflowError):
            return bytes(data).decode()


def read_every_timestamp(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
    """Make a new connection return timestamps that datetime cannot represent as text.

    A receiver of `connection_created`.
    """
    if connection.vendor == "postgresql":
        connection.connection.adapters.register_loader("timestamp", _TimestampLoader)
        connection.connection.adapters.register_loader("timestamptz", _ZonedLoader)


class _RateLoader(Loader):
    """A numeric as text, with at least two decimals and no further trailing zeros: 5 and 5.000 are both `5.00`."""

    def load(self, data: Buffer) -> str:
        """Return PostgreSQL's text without trailing zeros."""
        text = bytes(data).decode()
        whole, point, decimals = text.partition(".")
        if not point:
            return f"{text}.00" if text.lstrip("-").isdigit() else text
        return f"{whole}.{decimals.rstrip('0').ljust(2, '0')}"


class _MomentLoader(Loader):
    """A timestamp with time zone as text without the zone. The session's time zone is UTC."""

    def load(self, data: Buffer) -> str:
        """Return PostgreSQL's text without the zone."""
        return bytes(data).decode().replace("+00", "", 1)


def read_as_text(cursor: CursorWrapper) -> None:
    """Make this cursor return timestamps and numerics as text, equal values as equal text."""
    cursor.adapters.register_loader("timestamp", TextLoader)
    cursor.adapters.register_loader("timestamptz", _MomentLoader)
    cursor.adapters.register_loader("numeric", _RateLoader)

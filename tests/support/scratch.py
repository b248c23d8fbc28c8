"""Databases of their own, for tests that change tables, wait for locks or come as another role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
from django.conf import settings
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test.utils import override_settings
from psycopg import sql
from pytest_django import DjangoDbBlocker

from config import embedded
from config.database import parse


@dataclass(frozen=True)
class EmptyDatabase:
    """A database of its own on the embedded server, and a role that may do nothing but connect to it."""

    name: str
    role: str
    address: embedded.Address

    def execute(self, statement: str) -> list[Any]:
        """As its owner; `{role}` and `{name}` stand for the role and the database."""
        with self._connect(self.name) as connection:
            cursor = connection.execute(statement.format(role=self.role, name=self.name).encode())
            return [row[0] for row in cursor] if cursor.description else []

    def url(self, *, role: str = embedded.USER, parameters: str = "") -> str:
        host = quote(self.address.host, safe="")
        return f"postgresql://{role}@localhost:{self.address.port}/{self.name}?host={host}{parameters}"

    def create(self) -> None:
        with self._connect("postgres") as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self.name)))
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(self.role)))

    def drop(self) -> None:
        with self._connect("postgres") as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self.name)))
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(self.role)))

    def _connect(self, name: str) -> psycopg.Connection:
        address = self.address
        return psycopg.connect(host=address.host, port=address.port, user=embedded.USER, dbname=name, autocommit=True)


@contextmanager
def scratch_database(name: str) -> Iterator[EmptyDatabase]:
    """An empty database; it is gone afterwards."""
    database = EmptyDatabase(name, f"{name}_role", embedded.start(settings.EMBEDDED_DATA))
    database.create()
    try:
        yield database
    finally:
        database.drop()


@contextmanager
def django_connection(
    database: EmptyDatabase, blocker: DjangoDbBlocker, *, role: str = embedded.USER, parameters: str = ""
) -> Iterator[BaseDatabaseWrapper]:
    """A connection of Django's, made from a URL as an operator would write it."""
    alias = f"{database.name}_{role}{parameters}"
    url = database.url(role=role, parameters=parameters)
    entry = parse(url, backfill_schema=settings.BACKFILL_SCHEMA).django_entry(settings.BACKFILL_SCHEMA)
    connections.settings[alias] = connections.configure_settings({"default": {}, alias: entry})[alias]
    with blocker.unblock():
        try:
            yield connections[alias]
        finally:
            connections[alias].close()
            del connections[alias], connections.settings[alias]


@contextmanager
def as_the_default(url: str) -> Iterator[None]:
    """Let everything work on another database, and on the application's schema that its address names."""
    parsed = parse(url, backfill_schema=settings.BACKFILL_SCHEMA)
    entry = parsed.django_entry(settings.BACKFILL_SCHEMA)
    before, its_settings = connections["default"], connections.settings["default"]
    connections.settings["default"] = connections.configure_settings({"default": entry})["default"]
    before.close()
    del connections["default"]
    try:
        with override_settings(LEGACY_SCHEMA=parsed.legacy_schema, DATABASE_CONNECTION_LIMIT=parsed.connection_limit):
            yield
    finally:
        connections["default"].close()
        connections["default"], connections.settings["default"] = before, its_settings


@contextmanager
def session(database: EmptyDatabase) -> Iterator[psycopg.Connection]:
    """Somebody else's session, whose transaction stays open until it is ended."""
    connection = _connect(database, database.name)
    try:
        yield connection
    finally:
        connection.close()


def _connect(database: EmptyDatabase, name: str) -> psycopg.Connection:
    return psycopg.connect(
        host=database.address.host,
        port=database.address.port,
        user=embedded.USER,
        dbname=name,
        # Whoever wrongly waits for it makes a test fail, not hang.
        options="-c idle_in_transaction_session_timeout=10s",
    )

"""Databases of their own, for tests that change tables, wait for locks or come as another role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from django.conf import settings
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from pytest_django import DjangoDbBlocker

from config import embedded
from config.database import parse
from tests.integration.test_own_schema import EmptyDatabase


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
    """Let everything work on another database."""
    entry = parse(url, backfill_schema=settings.BACKFILL_SCHEMA).django_entry(settings.BACKFILL_SCHEMA)
    before, its_settings = connections["default"], connections.settings["default"]
    connections.settings["default"] = connections.configure_settings({"default": entry})["default"]
    before.close()
    del connections["default"]
    try:
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

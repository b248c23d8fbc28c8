"""The database of the tests: a real PostgreSQL, the application's tables from their DDL, everything committed.

The backfill commits, opens connections and starts processes, so its tests cannot live inside a transaction that is
rolled back. `database` empties all tables instead, which Django's flush would not do: it skips unmanaged models.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.conf import settings as django_settings
from django.db import connection
from django.db.models.signals import pre_migrate
from django.test.utils import setup_databases, teardown_databases
from django.utils import log
from psycopg.sql import SQL, Identifier
from pytest_django import DjangoDbBlocker

from config import embedded
from crm.legacy_schema import GENERATIONS, create_legacy_tables
from crm.models import (
    BackfillBatch,
    BackfillRun,
    CommittedTransaction,
    ConflictResolution,
    ContactUpdate,
    LedgerEntry,
    Rollback,
)
from crm.runs import retrying
from tests.support import installed_server
from tests.support.populations import add_labels
from tests.support.profiles import left_out, load_profile, share_examples

load_profile()

# The tests have an embedded server of their own. Where several processes share the tests, each has one: roles and
# sessions belong to a server.
data = django_settings.EMBEDDED_DATA or django_settings.BASE_DIR / ".postgres"
data = data.with_name("-".join([data.name, os.environ.get("PYTEST_XDIST_WORKER", "tests")]))
django_settings.EMBEDDED_DATA = data
django_settings.DATABASES["default"]["EMBEDDED_DATA"] = data

installed_server.use_where_asked_for()

LEGACY_TABLES = (
    *("crm_stage_history", "crm_interactions", "crm_contacts"),
    *("client_preparers", "tax_intake_leads", "leads", "profiles", "users"),
)
OWN_MODELS = (LedgerEntry, ContactUpdate, BackfillBatch, Rollback, ConflictResolution, BackfillRun)
#: Tokens of commits say nothing of what was done.
TOKENS = CommittedTransaction._meta.db_table
OWN_TABLES = tuple(model._meta.db_table for model in OWN_MODELS)
DEFAULT_GENERATION = "2025_10"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the samples, share the examples of a property test among its cases, and let the cases of a generation follow
    one another."""
    left = left_out(items)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]
    share_examples(items)
    modules = {module: number for number, module in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (modules[item.path], generation_of(item)))


def generation_of(item: pytest.Item) -> str:
    """The generation that a case is for."""
    callspec = getattr(item, "callspec", None)
    generation = callspec.params.get("generation") if callspec else None
    return generation if generation in GENERATIONS else DEFAULT_GENERATION


class Database:
    """The test database, with the tables of one generation."""

    def __init__(self) -> None:
        self.generation = DEFAULT_GENERATION
        self._has_added_labels = False
        self._is_changed = False

    def use(self, generation: str, *, added_labels: bool = False) -> None:
        """Empty tables of a generation; with labels in its enums that somebody added by hand, if asked for."""
        if (generation, added_labels) != (self.generation, self._has_added_labels) or self._is_changed:
            self.drop_legacy_tables()
            with connection.cursor() as cursor:
                create_legacy_tables(cursor, generation)
                if added_labels:
                    add_labels(cursor)
            self.generation, self._has_added_labels, self._is_changed = generation, added_labels, False
        self.empty()

    def change(self, statement: str) -> None:
        """Change the application's tables by hand; they are made anew for the next test."""
        self._is_changed = True
        with connection.cursor() as cursor:
            cursor.execute(statement)

    def drop_legacy_tables(self) -> None:
        """Drop the application's tables and types."""
        with connection.cursor() as cursor:
            cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        self._is_changed = True

    def empty(self) -> None:
        """Delete every row of every table."""
        with connection.cursor() as cursor:
            cursor.execute("; ".join(f"DELETE FROM {table}" for table in (TOKENS, *OWN_TABLES, *LEGACY_TABLES)))

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """The answer to a query."""
        with connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return list(cursor.fetchall())

    def dump(self, *tables: str) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of the tables (all of them by default), to be compared."""
        return {table: self.rows(f"SELECT t::text FROM {table} t ORDER BY 1") for table in tables or self.tables()}

    def tables(self) -> tuple[str, ...]:
        """All tables that the backfill knows."""
        return (*LEGACY_TABLES, *OWN_TABLES)


_database = Database()


def _load_legacy_tables(**_signal: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('public.crm_contacts') IS NULL")
        if cursor.fetchone() == (True,):
            create_legacy_tables(cursor, DEFAULT_GENERATION)


def _clear_the_server() -> None:
    """Drop the databases and roles that tests which were killed have left behind. Nobody else uses their server."""
    address = embedded.start(data)
    with psycopg.connect(
        host=address.host, port=address.port, user=embedded.USER, dbname="postgres", autocommit=True
    ) as server:
        kept = ["postgres", embedded.DATABASE_NAME]
        query = "SELECT datname FROM pg_database WHERE NOT datistemplate AND datname <> ALL(%s)"
        for (name,) in server.execute(query, [kept]).fetchall():
            server.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))
        query = "SELECT rolname FROM pg_roles WHERE rolname !~ '^pg_' AND rolname <> current_user"
        for (name,) in server.execute(query).fetchall():
            server.execute(SQL("DROP ROLE {}").format(Identifier(name)))


@pytest.fixture(scope="session", autouse=True)
def _logging_is_configured_once() -> Iterator[None]:
    """`manage.py` in this process would tie the log to the standard error of one test, which is closed after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "configure_logging", lambda *_settings: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_variable_is_the_tests_own() -> Iterator[None]:
    """A check warns of every variable that begins as the project's do and is none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(installed_server.VARIABLE, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _retries_are_quick() -> Iterator[None]:
    """Nobody is to wait for another try longer than what is tried takes; the tries are as many as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrying, "FIRST_WAIT", 0.001)
        patch.setattr(retrying, "WAITS_BEFORE_ANOTHER_LOOK", [0.001] * len(retrying.WAITS_BEFORE_ANOTHER_LOOK))
        yield


@pytest.fixture(autouse=True)
def _log_goes_where_it_went() -> Iterator[None]:
    streams = _log_streams()
    yield
    assert _log_streams() == streams


def _log_streams() -> list[object]:
    return [handler.stream for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]


@pytest.fixture(scope="session")
def django_db_setup(django_test_environment: None, django_db_blocker: DjangoDbBlocker) -> Iterator[Database]:
    """The test database, migrated beside the application's tables; in the place of pytest-django's own."""
    _clear_the_server()
    # `migrate` is to find the application's tables, as it does everywhere else.
    pre_migrate.connect(_load_legacy_tables, dispatch_uid="tests.legacy_tables")
    with django_db_blocker.unblock():
        # A connection that a test of a module made before is not ours.
        names = setup_databases(verbosity=0, interactive=False, aliases={"default": False})
        with connection.cursor() as cursor:
            # Nothing is to survive a crash of the server: tests need not wait for the disk.
            cursor.execute(f"ALTER DATABASE {connection.settings_dict['NAME']} SET synchronous_commit = off")
        connection.close()
        yield _database
        teardown_databases(names, verbosity=0)


@pytest.fixture
def database(
    request: pytest.FixtureRequest, django_db_setup: Database, django_db_blocker: DjangoDbBlocker
) -> Iterator[Database]:
    """The database with empty tables of 2025_10, or of the `generation` that a case is for; `database.use(...)` gives
    another one."""
    with django_db_blocker.unblock():
        django_db_setup.use(generation_of(request.node))
        yield django_db_setup
        # A new session costs more than most tests; one that is as it was serves the next test as well.
        if connection.connection is None or _is_idle(connection.connection):
            return
        connection.close()


def _is_idle(session: psycopg.Connection[Any]) -> bool:
    """Whether nothing is open in a session and the server still answers."""
    if session.closed or session.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        return False
    try:
        session.execute("SELECT 1")
    except psycopg.Error:
        return False
    return True

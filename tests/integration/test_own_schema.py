"""Our tables live apart: after `migrate`, the application's schema has no table more than before."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from django.conf import settings
from django.db import connections
from psycopg import sql
from pytest_django import DjangoDbBlocker

from config import embedded
from config.database import parse
from crm.errors import OperatorError
from crm.postgres.own_schema import prepare
from crm.postgres.session import names_in
from tests.process.test_settings import SECRET, run

NUMBERS = itertools.count()


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


@pytest.fixture
def database() -> Iterator[EmptyDatabase]:
    name = f"own_schema_{next(NUMBERS)}"
    database = EmptyDatabase(name, f"{name}_role", embedded.start(settings.EMBEDDED_DATA))
    database.create()
    yield database
    database.drop()


def prepare_as(database: EmptyDatabase, blocker: DjangoDbBlocker, *, role: str, parameters: str = "") -> None:
    """Run the receiver over a connection of its own, made from a URL as an operator would write it."""
    alias = database.name
    url = database.url(role=role, parameters=parameters)
    entry = parse(url, backfill_schema=settings.BACKFILL_SCHEMA).django_entry(settings.BACKFILL_SCHEMA)
    connections.settings[alias] = connections.configure_settings({"default": {}, alias: entry})[alias]
    try:
        with blocker.unblock():
            prepare(using=alias)
    finally:
        with blocker.unblock():
            connections[alias].close()
        del connections[alias], connections.settings[alias]


@pytest.mark.parametrize("schema", ["public", 'the "App" Schema\\'])
def test_migrate_adds_no_table_to_the_schema_of_the_application(database: EmptyDatabase, schema: str) -> None:
    if schema != "public":
        database.execute("CREATE SCHEMA " + sql.Identifier(schema).as_string())
    # All that `migrate` wants to find.
    database.execute(f'CREATE TABLE {sql.Identifier(schema).as_string()}.crm_contacts ("id" text)')
    result = run(
        "manage.py",
        "migrate",
        DATABASE_URL=database.url(parameters=f"&schema={quote(schema)}"),
        SECRET_KEY=SECRET,
    )
    assert result.returncode == 0, result.stderr
    elsewhere = database.execute(
        "SELECT relname::text FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
        "WHERE relkind IN ('r', 'S', 'v') AND nspname !~ '^pg_|^information_schema$|^crm_backfill$'"
    )
    assert elsewhere == ["crm_contacts"]


def test_a_second_time_changes_nothing(database: EmptyDatabase, django_db_blocker: DjangoDbBlocker) -> None:
    find = "SELECT oid FROM pg_namespace WHERE nspname = 'crm_backfill'"
    prepare_as(database, django_db_blocker, role=embedded.USER)
    first = database.execute(find)
    prepare_as(database, django_db_blocker, role=embedded.USER)
    assert len(first) == 1
    assert database.execute(find) == first


def test_a_role_that_may_not_make_it_is_told_what_its_owner_has_to_do(
    database: EmptyDatabase, django_db_blocker: DjangoDbBlocker
) -> None:
    with pytest.raises(OperatorError) as caught:
        prepare_as(database, django_db_blocker, role=database.role)
    statement = f'CREATE SCHEMA "crm_backfill" AUTHORIZATION "{database.role}";'
    assert statement in str(caught.value)

    database.execute(statement)
    prepare_as(database, django_db_blocker, role=database.role)


def test_a_schema_that_this_role_may_not_fill(database: EmptyDatabase, django_db_blocker: DjangoDbBlocker) -> None:
    database.execute("CREATE SCHEMA crm_backfill")
    with pytest.raises(OperatorError) as caught:
        prepare_as(database, django_db_blocker, role=database.role)
    statement = f'ALTER SCHEMA "crm_backfill" OWNER TO "{database.role}";'
    assert statement in str(caught.value)

    database.execute(statement)
    prepare_as(database, django_db_blocker, role=database.role)


def test_behind_pgbouncer_the_role_has_to_have_the_search_path(
    database: EmptyDatabase, django_db_blocker: DjangoDbBlocker
) -> None:
    with pytest.raises(OperatorError) as caught:
        prepare_as(database, django_db_blocker, role=database.role, parameters="&pgbouncer=true")
    statement = (
        f'ALTER ROLE "{database.role}" IN DATABASE "{database.name}" SET search_path = "crm_backfill", "public";'
    )
    assert statement in str(caught.value)
    assert database.execute("SELECT FROM pg_namespace WHERE nspname = 'crm_backfill'") == []

    database.execute(statement)
    database.execute("GRANT CREATE ON DATABASE {name} TO {role}")
    prepare_as(database, django_db_blocker, role=database.role, parameters="&pgbouncer=true")


def test_the_record_of_another_django_is_not_taken_for_ours(
    database: EmptyDatabase, django_db_blocker: DjangoDbBlocker
) -> None:
    database.execute("CREATE TABLE public.django_migrations (id int)")
    with pytest.raises(OperatorError, match="django_migrations of another Django project"):
        prepare_as(database, django_db_blocker, role=embedded.USER)


@pytest.mark.parametrize(
    ("search_path", "names"),
    [
        ('"$user", public', ["$user", "public"]),
        ("crm_backfill, Public", ["crm_backfill", "public"]),
        ('crm_backfill,"My ""App"""', ["crm_backfill", 'My "App"']),
        ('""', [""]),
        ("", []),
    ],
)
def test_a_search_path_is_read_as_postgresql_reads_it(search_path: str, names: list[str]) -> None:
    assert names_in(search_path) == names

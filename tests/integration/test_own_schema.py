"""Our tables live apart: after `migrate`, the application's schema has no table more than before."""

import itertools
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from psycopg import sql
from pytest_django import DjangoDbBlocker

from config import embedded
from crm.errors import OperatorError
from crm.postgres.own_schema import prepare
from crm.postgres.session import names_in
from tests.support.processes import SECRET, python
from tests.support.scratch import EmptyDatabase, django_connection, scratch_database

NUMBERS = itertools.count()


@pytest.fixture
def database() -> Iterator[EmptyDatabase]:
    with scratch_database(f"own_schema_{next(NUMBERS)}") as database:
        yield database


def prepare_as(database: EmptyDatabase, blocker: DjangoDbBlocker, *, role: str, parameters: str = "") -> None:
    """Run the receiver over a connection of its own."""
    with django_connection(database, blocker, role=role, parameters=parameters) as theirs:
        prepare(using=theirs.alias)


@pytest.mark.parametrize("schema", ["public", 'the "App" Schema\\'])
def test_migrate_adds_no_table_to_the_schema_of_the_application(database: EmptyDatabase, schema: str) -> None:
    if schema != "public":
        database.execute("CREATE SCHEMA " + sql.Identifier(schema).as_string())
    # All that `migrate` wants to find.
    database.execute(f'CREATE TABLE {sql.Identifier(schema).as_string()}.crm_contacts ("id" text)')
    result = python(
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

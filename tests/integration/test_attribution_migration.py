"""The attribution columns come without a long lock, where they are missing, and go only where we added them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql
from pytest_django import DjangoDbBlocker, Settings

from crm import attribution
from crm.attribution import COLUMNS, INDEX, MARK, Patience
from crm.errors import OperatorError
from crm.legacy_schema import create_legacy_tables
from tests.support.processes import SECRET, python
from tests.support.scratch import EmptyDatabase, django_connection, scratch_database, session

#: Whoever has to wait at all fails at once.
NONE = Patience(table=0.05, build=0.05, pauses=())
ONE_MORE = Patience(table=0.05, build=0.05, pauses=(0.01,))
TYPES = {
    "referrerUsername": ("text", False, None),
    "referrerType": ("text", False, None),
    "commissionRate": ("numeric(5,2)", False, None),
    "commissionRateLockedAt": ("timestamp(3) without time zone", False, None),
    "attributionMethod": ("text", False, None),
    "attributionConfidence": ("integer", True, "100"),
}
CONTACT = (
    'INSERT INTO {schema}.crm_contacts (id, "contactType", "firstName", "lastName", email, "updatedAt") '
    "VALUES ('{id}', 'CLIENT', 'A', 'B', '{id}@example.com', now())"
)


class Table:
    """`crm_contacts` in a database of its own, as the application has it before it knows of attribution."""

    def __init__(self, database: EmptyDatabase, connection: BaseDatabaseWrapper) -> None:
        self.database = database
        self.connection = connection

    @property
    def schema(self) -> str:
        return sql.Identifier(settings.LEGACY_SCHEMA).as_string()

    def make(self, *, with_columns: tuple[str, ...] = (), with_index: bool = False) -> None:
        self.execute(
            "DROP SCHEMA IF EXISTS {schema} CASCADE; DROP SCHEMA IF EXISTS crm_backfill CASCADE; CREATE SCHEMA {schema}"
        )
        with self.connection.cursor() as cursor:
            create_legacy_tables(cursor, "2025_11")
        if not with_index:
            self.execute(f'DROP INDEX {{schema}}."{INDEX}"')
        for column in COLUMNS:
            if column not in with_columns:
                self.execute(f'ALTER TABLE {{schema}}.crm_contacts DROP COLUMN "{column}"')

    def execute(self, statement: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(statement.replace("{schema}", self.schema))

    def insert(self, identifier: str) -> None:
        self.execute(CONTACT.format(schema=self.schema, id=identifier))

    def query(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(statement.replace("{schema}", self.schema.replace("%", "%%")), parameters)
            return list(cursor.fetchall())

    def columns(self) -> dict[str, tuple[str, bool, str | None]]:
        """Type, NOT NULL and default of the attribution columns."""
        rows = self.query(
            "SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid) "
            "FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum "
            "WHERE attrelid = '{schema}.crm_contacts'::regclass AND attname = ANY(%s)",
            list(COLUMNS),
        )
        return {name: (kind, not_null, default) for name, kind, not_null, default in rows}

    def index(self) -> tuple[str, bool, str | None] | None:
        """Definition, validity and comment."""
        rows = self.query(
            "SELECT pg_get_indexdef(indexrelid), indisvalid, obj_description(indexrelid, 'pg_class') FROM pg_index "
            "JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = '{schema}.crm_contacts'::regclass "
            "AND relname = %s",
            INDEX,
        )
        return rows[0] if rows else None

    def catalogue(self) -> list[list[tuple[Any, ...]]]:
        """All that PostgreSQL knows of the table, with the transaction that wrote it."""
        relations = (
            "(SELECT '{schema}.crm_contacts'::regclass::oid UNION ALL "
            "SELECT indexrelid FROM pg_index WHERE indrelid = '{schema}.crm_contacts'::regclass)"
        )
        return [
            self.query(f"SELECT xmin::text, t::text FROM {catalogue} t WHERE {key} IN {relations} ORDER BY 2")
            for catalogue, key in (
                ("pg_class", "oid"),
                ("pg_attribute", "attrelid"),
                ("pg_index", "indexrelid"),
                ("pg_description", "objoid"),
            )
        ]

    def file(self) -> list[tuple[Any, ...]]:
        return self.query("SELECT pg_relation_filenode('{schema}.crm_contacts')")

    def break_index(self) -> None:
        rows = self.query(
            "UPDATE pg_index SET indisvalid = false FROM pg_class WHERE pg_class.oid = indexrelid AND relname = %s "
            "AND indrelid = '{schema}.crm_contacts'::regclass RETURNING indexrelid",
            INDEX,
        )
        assert len(rows) == 1

    def add(self, patience: Patience = NONE) -> None:
        attribution.add(self.connection, patience)

    def remove(self, patience: Patience = NONE) -> None:
        attribution.remove(self.connection, patience)


@pytest.fixture(scope="module")
def scratch() -> Iterator[EmptyDatabase]:
    with scratch_database("attribution_migration") as database:
        yield database


@pytest.fixture
def table(scratch: EmptyDatabase, django_db_blocker: DjangoDbBlocker) -> Iterator[Table]:
    with django_connection(scratch, django_db_blocker) as connection:
        table = Table(scratch, connection)
        table.make()
        yield table


def in_every_pause(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[float]:
    """Do this instead of sleeping; the pauses that were wished for."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        action()

    monkeypatch.setattr(attribution, "sleep_until_signal", pause)
    return pauses


@pytest.mark.parametrize("schema", ["public", 'the "App" 100% Schema'])
def test_all_columns_and_the_index_are_added(table: Table, settings: Settings, schema: str) -> None:
    settings.LEGACY_SCHEMA = schema
    table.make()
    table.add()
    assert table.columns() == TYPES
    index = table.index()
    assert index is not None
    assert re.fullmatch(rf'CREATE INDEX "{INDEX}" ON .*crm_contacts USING btree \("referrerUsername"\)', index[0]), (
        index[0]
    )
    assert index[1:] == (True, MARK)


def test_they_are_what_prisma_would_have_made(table: Table) -> None:
    table.add()
    ours = (table.columns(), table.index())
    table.make(with_columns=tuple(COLUMNS), with_index=True)
    prisma = (table.columns(), table.index())
    assert ours[0] == prisma[0]
    assert ours[1] is not None
    assert prisma[1] is not None
    assert ours[1][:2] == prisma[1][:2]


def test_nothing_is_rewritten_and_contacts_that_are_there_have_full_confidence(table: Table) -> None:
    table.insert("old")
    file = table.file()
    table.add()
    assert table.file() == file
    assert table.query('SELECT "attributionConfidence", "commissionRate" FROM {schema}.crm_contacts') == [(100, None)]


def test_all_missing_columns_come_with_one_lock(table: Table) -> None:
    table.connection.force_debug_cursor = True
    table.add()
    statements = [query["sql"] for query in table.connection.queries]
    assert len([statement for statement in statements if statement.startswith("ALTER TABLE")]) == 1


def test_where_prisma_was_first_nothing_is_changed_and_no_lock_is_needed(table: Table) -> None:
    table.make(with_columns=tuple(COLUMNS), with_index=True)
    before = table.catalogue()
    with session(table.database) as other:
        other.execute("LOCK TABLE public.crm_contacts IN ACCESS EXCLUSIVE MODE")
        table.add()
        table.remove()
    assert table.catalogue() == before


def test_a_second_time_changes_nothing(table: Table) -> None:
    table.add()
    before = table.catalogue()
    table.add()
    assert table.catalogue() == before


def test_only_the_columns_that_are_missing_are_added_and_taken_back(table: Table) -> None:
    prisma = ("referrerUsername", "attributionConfidence")
    table.make(with_columns=prisma)
    table.execute("""COMMENT ON COLUMN {schema}.crm_contacts."attributionConfidence" IS 'Added by hand'""")
    table.add()
    assert table.columns() == TYPES
    table.remove()
    assert sorted(table.columns()) == sorted(prisma)
    assert table.index() is None


def test_an_index_that_was_there_stays_when_it_is_taken_back(table: Table) -> None:
    table.make(with_columns=("referrerUsername",))
    table.execute(f'CREATE INDEX "{INDEX}" ON {{schema}}.crm_contacts ("referrerUsername")')
    before = table.index()
    table.add()
    assert table.columns() == TYPES
    table.remove()
    assert list(table.columns()) == ["referrerUsername"]
    assert table.index() == before


def test_taking_it_back_leaves_the_table_as_it_was(table: Table) -> None:
    before = table.query("SELECT column_name FROM information_schema.columns WHERE table_name = 'crm_contacts'")
    table.add()
    table.remove()
    after = table.query("SELECT column_name FROM information_schema.columns WHERE table_name = 'crm_contacts'")
    assert (table.columns(), table.index()) == ({}, None)
    assert after == before
    table.remove()


def test_a_broken_index_is_repaired_and_stays_when_it_is_taken_back(table: Table) -> None:
    table.make(with_columns=tuple(COLUMNS), with_index=True)
    table.insert("old")
    whole = table.index()
    table.break_index()
    assert table.index() != whole
    table.add()
    assert table.index() == whole
    table.remove()
    assert table.index() == whole


def test_our_own_broken_index_is_repaired_and_goes_when_it_is_taken_back(table: Table) -> None:
    table.make(with_columns=tuple(COLUMNS))
    table.add()
    table.break_index()
    table.add()
    index = table.index()
    assert index is not None
    assert index[1:] == (True, MARK)
    table.remove()
    assert table.index() is None
    assert table.columns() == TYPES


def test_a_long_reader_is_not_waited_for(table: Table) -> None:
    with session(table.database) as reader:
        reader.execute("SELECT FROM public.crm_contacts")
        began = time.monotonic()
        with pytest.raises(OperatorError) as caught:
            table.add(ONE_MORE)
        assert time.monotonic() - began < 2
        assert str(reader.info.backend_pid) in str(caught.value)
    assert caught.value.exit_code == 2
    assert "all 2 attempts" in str(caught.value)
    assert table.columns() == {}
    table.add()


def test_between_two_attempts_everybody_gets_through(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []
    with session(table.database) as reader, session(table.database) as application:
        reader.execute("SELECT FROM public.crm_contacts")

        def work() -> None:
            application.execute("SET lock_timeout = '1ms'")
            application.execute("SELECT FROM public.crm_contacts FOR UPDATE")
            application.commit()
            passed.append(True)
            if len(passed) == 3:
                reader.rollback()

        pauses = in_every_pause(monkeypatch, work)
        table.add(Patience(table=0.05, build=0.05, pauses=(1, 2, 4, 8)))
    assert pauses == [1, 2, 4]
    assert table.columns() == TYPES


def test_the_waits_grow_and_each_is_short() -> None:
    patience = Patience()
    assert patience.table <= 3
    assert list(patience.pauses) == sorted(set(patience.pauses))
    assert 3 <= len(patience.pauses) <= 6
    assert patience.build <= 60


def test_a_build_that_is_broken_off_is_made_good_by_the_next_attempt(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.make(with_columns=tuple(COLUMNS))
    left_behind = []
    with session(table.database) as writer:
        writer.execute(CONTACT.format(schema="public", id="other").encode())

        def end() -> None:
            left_behind.append(table.index())
            writer.rollback()

        pauses = in_every_pause(monkeypatch, end)
        table.add(ONE_MORE)
    assert len(pauses) == 1
    assert left_behind[0] is not None
    assert left_behind[0][1] is False
    index = table.index()
    assert index is not None
    assert index[1:] == (True, MARK)


def test_a_build_that_cannot_end_is_given_up(table: Table) -> None:
    table.make(with_columns=tuple(COLUMNS))
    with session(table.database) as writer:
        writer.execute(CONTACT.format(schema="public", id="other").encode())
        began = time.monotonic()
        with pytest.raises(OperatorError, match=str(writer.info.backend_pid)):
            table.add(ONE_MORE)
        assert time.monotonic() - began < 2
    assert table.query("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')") == [("0", "0")]
    table.add()
    index = table.index()
    assert index is not None
    assert index[1]


def test_the_application_writes_while_the_index_is_built(table: Table) -> None:
    table.make(with_columns=tuple(COLUMNS))
    with session(table.database) as writer, session(table.database) as application, ThreadPoolExecutor(1) as pool:
        writer.execute(CONTACT.format(schema="public", id="first").encode())

        def write_during_the_build() -> None:
            try:
                wait_for(application, "CREATE INDEX")
                application.execute("SET lock_timeout = '1ms'")
                application.execute(CONTACT.format(schema="public", id="second").encode())
                application.commit()
            finally:
                writer.commit()

        written = pool.submit(write_during_the_build)
        table.add(Patience(table=1, build=20, pauses=()))
        written.result()
    assert table.query("SELECT id FROM {schema}.crm_contacts ORDER BY id") == [("first",), ("second",)]


def wait_for(connection: psycopg.Connection, statement: str) -> None:
    """Until a statement that begins like this is seen waiting for a lock."""
    for _ in range(500):
        waiting = connection.execute(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
            "AND starts_with(query, %s)",
            [statement],
        ).fetchone()
        connection.commit()
        if waiting is not None:
            return
        time.sleep(0.01)
    pytest.fail(f"no {statement} was seen to wait")


def test_taking_it_back_does_not_wait_for_a_long_reader_either(table: Table) -> None:
    table.add()
    with session(table.database) as reader:
        reader.execute("SELECT FROM public.crm_contacts")
        with pytest.raises(OperatorError, match=str(reader.info.backend_pid)):
            table.remove(ONE_MORE)
    assert table.columns() == TYPES
    table.remove()
    assert table.columns() == {}


def test_what_somebody_adds_while_we_wait_for_the_lock_is_theirs(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table.make(with_columns=tuple(COLUMNS)[1:])
    pauses = in_every_pause(monkeypatch, lambda: None)
    with session(table.database) as prisma, session(table.database) as watcher, ThreadPoolExecutor(1) as pool:
        prisma.execute('ALTER TABLE public.crm_contacts ADD COLUMN "referrerUsername" text')

        def commit_while_we_wait() -> None:
            wait_for(watcher, "ALTER TABLE")
            prisma.commit()

        committed = pool.submit(commit_while_we_wait)
        table.add(Patience(table=8, build=8, pauses=(1,)))
        committed.result()
    assert pauses == [1]
    table.remove()
    assert table.columns() == TYPES


def test_a_role_that_does_not_own_the_table_is_told_what_its_owner_has_to_run(
    table: Table, django_db_blocker: DjangoDbBlocker
) -> None:
    table.insert("old")
    table.execute(f"GRANT USAGE, CREATE ON SCHEMA public TO {table.database.role}")
    with django_connection(table.database, django_db_blocker, role=table.database.role) as connection:
        with pytest.raises(OperatorError) as caught:
            attribution.add(connection, NONE)
        assert table.columns() == {}
        for statement in statements_in(caught.value):
            table.execute(statement)
        assert table.columns() == TYPES
        attribution.add(connection, NONE)

        table.make()
        table.add()
        with pytest.raises(OperatorError) as caught:
            attribution.remove(connection, NONE)
        assert table.columns() == TYPES
        for statement in statements_in(caught.value):
            table.execute(statement)
        attribution.remove(connection, NONE)
    assert (table.columns(), table.index()) == ({}, None)


def statements_in(error: OperatorError) -> list[str]:
    """The SQL of a message, to be run as it stands there."""
    statements = re.findall(r"(?:ALTER TABLE|CREATE INDEX|DROP INDEX)[^;]*(?=;)", str(error))
    assert len(statements) == 2
    return statements


def test_behind_pgbouncer_the_index_is_not_touched(table: Table, django_db_blocker: DjangoDbBlocker) -> None:
    # A connection through a pooler cannot choose its search path: the role has it.
    table.database.execute(f"ALTER ROLE postgres IN DATABASE {{name}} SET search_path = crm_backfill, {table.schema}")
    with django_connection(table.database, django_db_blocker, parameters="&pgbouncer=true") as connection:
        with pytest.raises(OperatorError, match="direct address"):
            attribution.add(connection, NONE)
        assert (table.columns(), table.index()) == ({}, None)
        table.add()
        attribution.add(connection, NONE)
        with pytest.raises(OperatorError, match="direct address"):
            attribution.remove(connection, NONE)
        assert table.columns() == TYPES


def test_what_depends_on_a_column_is_not_torn_away(table: Table) -> None:
    table.add()
    table.execute('CREATE VIEW {schema}.rates AS SELECT "commissionRate" FROM {schema}.crm_contacts')
    with pytest.raises(OperatorError, match="depends on"):
        table.remove()
    assert table.columns() == TYPES


def test_a_name_that_something_else_has(table: Table) -> None:
    table.execute(f'CREATE INDEX "{INDEX}" ON {{schema}}.leads ("referrerUsername")')
    with pytest.raises(OperatorError, match="Rename the relation"):
        table.add()


def test_without_the_table_it_is_not_this_database(table: Table) -> None:
    table.execute("DROP TABLE {schema}.crm_contacts CASCADE")
    with pytest.raises(OperatorError, match="public has no table crm_contacts"):
        table.add()
    table.remove()


def test_migrate_adds_and_takes_back(table: Table) -> None:
    migrate = ("manage.py", "migrate", "--verbosity", "0")
    environment = {"DATABASE_URL": table.database.url(), "SECRET_KEY": SECRET}
    result = python(*migrate, **environment)
    assert result.returncode == 0, result.stderr
    assert table.columns() == TYPES
    table.execute("ALTER TABLE {schema}.crm_contacts " + ", ".join(f'DROP COLUMN "{column}"' for column in COLUMNS))
    result = python(*migrate, **environment)
    assert (result.returncode, table.columns()) == (0, TYPES), "what Prisma dropped is added again"
    assert table.index() is not None
    result = python(*migrate, "crm", "0001", **environment)
    assert result.returncode == 0, result.stderr
    assert (table.columns(), table.index()) == ({}, None)

    table.execute("DROP TABLE {schema}.crm_contacts CASCADE")
    result = python(*migrate, **environment)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "no table crm_contacts" in result.stderr

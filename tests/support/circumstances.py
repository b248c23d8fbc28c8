"""What a run may find: a role with few rights, tables that are missing, a server that refuses, a hand that stops it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from django.conf import settings
from django.db import connection

from config import embedded
from crm.models.ledger import RunStatus
from tests.conftest import LEGACY_TABLES, Database
from tests.support.forks import labels_are_watched
from tests.support.processes import SECRET, session
from tests.support.scratch import EmptyDatabase

SECRET_COLUMNS = ("ssn", "dateOfBirth", "address", "bankDetails", "hashedPassword")
#: The first thing that a batch writes, and one of the last.
CONTACTS, COUNTS = 'INSERT INTO "crm_contacts"', 'INSERT INTO "backfill_batch"'

#: As Prisma leaves a database whose relations it keeps by itself.
DROP_FOREIGN_KEYS = """
DO $$ DECLARE k record; BEGIN
  FOR k IN SELECT conrelid::regclass AS of, conname FROM pg_constraint
            WHERE contype = 'f' AND connamespace = 'public'::regnamespace
  LOOP EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', k.of, k.conname); END LOOP;
END $$
"""


@contextmanager
def reading_role(database: Database, *, tables: tuple[str, ...] = LEGACY_TABLES) -> Iterator[str]:
    """A role that may read the application's tables but for their secret columns, and nothing else."""
    role = "crm_reader"
    readable = database.rows(
        """
        SELECT table_name, string_agg(quote_ident(column_name), ', ') FROM information_schema.columns
         WHERE table_schema = 'public' AND table_name = ANY(%s) AND column_name <> ALL(%s) GROUP BY 1
        """,
        list(tables),
        list(SECRET_COLUMNS),
    )
    grants = [f"GRANT SELECT ({columns}) ON public.{table} TO {role}" for table, columns in readable]
    _execute(f"CREATE ROLE {role} LOGIN", f"GRANT USAGE ON SCHEMA public TO {role}", *grants)
    try:
        yield role
    finally:
        _execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@contextmanager
def acting_as(role: str) -> Iterator[None]:
    """Let every connection be the role's, also those that other threads make."""
    connection.close()
    user = connection.settings_dict["USER"]
    connection.settings_dict["USER"] = role
    try:
        yield
    finally:
        connection.close()
        connection.settings_dict["USER"] = user


@contextmanager
def without_own_schema() -> Iterator[None]:
    """The database as it is before `migrate`."""
    _execute("ALTER SCHEMA crm_backfill RENAME TO crm_backfill_aside")
    try:
        yield
    finally:
        _execute("ALTER SCHEMA crm_backfill_aside RENAME TO crm_backfill")


@contextmanager
def refusing_contacts(sqlstate: str) -> Iterator[None]:
    """Every insert of a contact fails with this SQLSTATE, in words that quote the person."""
    with _trigger(
        "crm_contacts",
        f"RAISE EXCEPTION 'no room for %', NEW.email USING ERRCODE = '{sqlstate}', DETAIL = NEW.\"firstName\"",
    ):
        yield


@contextmanager
def losing_ledger_entries() -> Iterator[None]:
    """The ledger takes no entry, and nobody says so."""
    with _trigger("ledger_entry", "RETURN NULL"):
        yield


@contextmanager
def in_batch(number: int, happening: Callable[[], object], *, after: str = CONTACTS) -> Iterator[None]:
    """Call `happening` in the batch of this number, from 1 on, after this statement: nothing of it is committed yet."""
    batches = 0

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        nonlocal batches
        result = execute(sql, parameters, many, context)
        if after in str(sql):
            batches += 1
            if batches == number:
                happening()
        return result

    with connection.execute_wrapper(watch):
        yield
    assert batches >= number, "there was no such batch"


def set_status(status: RunStatus) -> None:
    """Let the running run have another status, from another connection."""
    address = embedded.start(settings.EMBEDDED_DATA)
    with psycopg.connect(
        host=address.host, port=address.port, user=embedded.USER, dbname=connection.settings_dict["NAME"]
    ) as other:
        other.execute("SET lock_timeout = '5s'")
        changed = other.execute(
            "UPDATE crm_backfill.backfill_run SET status = %s WHERE status = 'running'", [status.value]
        )
        assert changed.rowcount == 1


def address_of_the_test_database(*, role: str = embedded.USER) -> dict[str, str]:
    """The environment of a process that works on the test database."""
    database = EmptyDatabase(connection.settings_dict["NAME"], role, embedded.start(settings.EMBEDDED_DATA))
    return {"DATABASE_URL": database.url(role=role), "SECRET_KEY": SECRET}


@contextmanager
def _trigger(table: str, body: str) -> Iterator[None]:
    _execute(
        f"CREATE FUNCTION mishap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NEW; END $$",
        f"CREATE TRIGGER mishap BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION mishap()",
    )
    try:
        yield
    finally:
        _execute("DROP FUNCTION mishap() CASCADE")


def _execute(*statements: str) -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@contextmanager
def passable_folder() -> Iterator[Path]:
    """A folder for a server's data: root's runs as another user, who cannot pass through pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="crm"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def terminated_at(number: int) -> Iterator[None]:
    """The run's backend is terminated just before the statement or commit of this number."""
    count = 0

    def watch(_label: str, send: Callable[[], Any]) -> Any:
        nonlocal count
        count += 1
        if count == number:
            connection.ensure_connection()
            with session() as administrator:
                administrator.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.connection.info.backend_pid])
        return send()

    with labels_are_watched(watch):
        yield
    assert count >= number, "there was no such statement"

"""Through PgBouncer in transaction mode, the real one: every statement may meet another server connection."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from django.conf import settings
from pytest_django import DjangoDbBlocker

from config import embedded
from crm.runs.lease import AnotherRunError
from tests.conftest import Database
from tests.support.pgbouncer import PGBOUNCER, PORT, pgbouncer
from tests.support.processes import start
from tests.support.scratch import EmptyDatabase, scratch_database
from tests.support.sessions import managed

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (Debian: apt-get install pgbouncer)"),
]
OURS = ("ledger_entry", "backfill_batch", "backfill_run", "crm_contacts")


@dataclass(frozen=True)
class Bounced:
    """A database of its own, which its owner reaches directly and through a pool of one connection."""

    database: EmptyDatabase
    folder: Path

    @property
    def direct(self) -> str:
        """The URL past PgBouncer."""
        return self.database.url(role=self.database.role)

    @property
    def pooled(self) -> str:
        """The URL through PgBouncer, as for Prisma."""
        where = f"host={quote(str(self.folder), safe='')}&schema=public&pgbouncer=true&connection_limit=1"
        return f"postgresql://{self.database.role}@localhost:{PORT}/{self.database.name}?{where}"

    def rows(self, query: str) -> list[tuple[object, ...]]:
        """The answer to a query, past PgBouncer."""
        address = self.database.address
        with psycopg.connect(
            host=address.host,
            port=address.port,
            user=embedded.USER,
            dbname=self.database.name,
            options="-c search_path=crm_backfill,public",
            autocommit=True,
        ) as connection:
            cursor = connection.execute(query.encode())
            return list(cursor.fetchall()) if cursor.description else []

    def result(self) -> dict[str, list[tuple[object, ...]]]:
        """Contacts, ledger and counts, but for what no two runs share."""
        return {
            "contacts": self.rows("SELECT t::text FROM crm_contacts t ORDER BY 1"),
            "ledger": self.rows("SELECT to_jsonb(t) - 'run_id' FROM ledger_entry t ORDER BY id"),
            "runs": self.rows("SELECT status, read, created, merged, exists, error, balanced FROM backfill_run"),
        }


@pytest.fixture(scope="module")
def migrated(django_db_setup: Database, django_db_blocker: DjangoDbBlocker) -> Iterator[Bounced]:
    """A database whose owner has the search path, with sample people, migrated through PgBouncer."""
    server = embedded.start(settings.EMBEDDED_DATA)
    with (
        django_db_blocker.unblock(),
        scratch_database("bounced") as database,
        pgbouncer(server, database.role) as folder,
    ):
        bounced = Bounced(database, folder)
        database.execute("ALTER DATABASE {name} OWNER TO {role}")
        database.execute("ALTER SCHEMA public OWNER TO {role}")
        # Django has to set what it needs by itself: nothing of it may be left to the server's defaults.
        database.execute("ALTER DATABASE {name} SET TimeZone = 'America/New_York'")
        loaded = managed("load_sample_data", "--people", "300", url=bounced.direct)
        assert loaded.code == 0, loaded.stderr

        refused = managed("migrate", url=bounced.pooled)
        assert refused.code == 2
        statement = refused.stderr[refused.stderr.index("ALTER ROLE") : refused.stderr.index(";")]
        database.execute(statement)
        recycle(bounced)
        done = managed("migrate", "--verbosity", "0", url=bounced.pooled)
        assert done.code == 0, done.stderr
        yield bounced


def recycle(bounced: Bounced) -> None:
    """End the pooled server connections: a role's search path holds for new ones only."""
    name = bounced.database.name
    bounced.rows(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    )


@pytest.fixture
def bounced(migrated: Bounced) -> Bounced:
    """The same, with nobody in the CRM."""
    for table in (*OURS[:-1], "crm_stage_history", "crm_interactions", "crm_contacts"):
        migrated.rows(f"DELETE FROM {table}")
    return migrated


def backfill(url: str, *arguments: str) -> dict[str, object]:
    finished = managed("backfill_crm_contacts", "--no-progress", "--json", *arguments, url=url)
    assert finished.code in (0, 1), finished.stderr
    answer: dict[str, object] = json.loads(finished.stdout)
    return answer


def test_nothing_lands_in_the_schema_of_the_application(migrated: Bounced) -> None:
    tables = migrated.rows(
        "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename ~ '^(django|auth|backfill|ledger)_'"
    )
    assert tables == [("crm_backfill",)]


def test_a_run_through_it_ends_as_one_past_it(bounced: Bounced) -> None:
    rehearsed = backfill(bounced.pooled, "--dry-run", "--batch-size", "7")
    pooled = backfill(bounced.pooled, "--batch-size", "7")
    through = bounced.result()
    again = backfill(bounced.pooled, "--batch-size", "7")
    assert (again["created"], again["error_new"]) == (0, 0)
    for table in OURS:
        bounced.rows(f"DELETE FROM {table}")
    direct = backfill(bounced.direct, "--batch-size", "7")
    assert through == bounced.result()
    assert len(through["contacts"]) > 200
    assert {*direct} == {*pooled}
    for name in ("read", "created", "merged", "exists", "error", "excluded", "by_source", "by_reason"):
        assert rehearsed[name] == pooled[name] == direct[name]


def test_server_connections_that_are_lost_are_made_anew(bounced: Bounced) -> None:
    run = start("backfill_crm_contacts", "--no-progress", "--batch-size", "2", url=bounced.pooled)
    lost = 0
    while run.poll() is None:
        if bounced.rows("SELECT id FROM backfill_run WHERE read > 0") and lost < 3:
            recycle(bounced)
            lost += 1
        time.sleep(0.1)
    _, stderr = run.communicate()
    assert run.returncode in (0, 1), stderr
    assert lost > 0
    through = bounced.result()
    for table in OURS:
        bounced.rows(f"DELETE FROM {table}")
    backfill(bounced.direct)
    assert through == bounced.result()


def test_the_result_is_verified_through_it(bounced: Bounced) -> None:
    backfill(bounced.pooled)
    verified = managed("verify_crm_contacts", url=bounced.pooled)
    assert verified.code == managed("verify_crm_contacts", url=bounced.direct).code, verified.stderr
    assert verified.code in (0, 1)


def test_a_url_that_does_not_say_so_is_refused_and_not_half_obeyed(bounced: Bounced) -> None:
    refused = managed("backfill_crm_contacts", "--no-progress", url=bounced.pooled.replace("&pgbouncer=true", ""))
    assert refused.code == 2
    assert "unsupported startup parameter: options" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_workers_share_the_pools_one_connection(bounced: Bounced) -> None:
    backfill(bounced.pooled.replace("connection_limit=1", "connection_limit=5"), "--batch-size", "50", "--workers", "2")
    through = bounced.result()
    for table in OURS:
        bounced.rows(f"DELETE FROM {table}")
    backfill(bounced.direct, "--batch-size", "7")
    assert through == bounced.result()


def test_a_run_leaves_no_setting_behind_for_the_next_client_of_the_pool(bounced: Bounced) -> None:
    backfill(bounced.pooled, "--batch-size", "50")
    assert managed("backfill_runs", "pause", "1", url=bounced.pooled).code == 2
    role, name = bounced.database.role, bounced.database.name
    met = {}
    with psycopg.connect(host=str(bounced.folder), port=PORT, user=role, dbname=name, autocommit=True) as client:
        for setting in ("lock_timeout", "statement_timeout", "search_path", "transaction_isolation"):
            met[setting] = client.execute(f"SHOW {setting}".encode()).fetchone()
    assert met == {
        "lock_timeout": ("0",),
        "statement_timeout": ("0",),
        "search_path": ("crm_backfill, public",),
        "transaction_isolation": ("read committed",),
    }


def test_a_run_is_paused_and_resumed_through_it(bounced: Bounced) -> None:
    run = start("backfill_crm_contacts", "--no-progress", "--batch-size", "1", url=bounced.pooled)
    deadline = time.monotonic() + 20
    while bounced.rows("SELECT id FROM backfill_run WHERE read > 0") == []:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ((number,),) = bounced.rows("SELECT id FROM backfill_run")
    paused = managed("backfill_runs", "pause", str(number), url=bounced.pooled)
    assert paused.code == 0, paused.stderr
    _, stderr = run.communicate(timeout=20)
    assert run.returncode == 4, stderr
    ((status, read),) = bounced.rows("SELECT status, read FROM backfill_run")
    assert status == "paused"
    assert bounced.rows("SELECT count(*) FROM ledger_entry") == [(read,)]

    kept_out = managed("backfill_crm_contacts", "--no-progress", url=bounced.pooled)
    assert kept_out.code == AnotherRunError.exit_code
    assert managed("backfill_runs", "resume", str(number), url=bounced.pooled).code == 0
    rest = backfill(bounced.pooled)
    assert rest["pending"] == 0
    assert rest["balanced"] is True
    assert bounced.rows("SELECT count(*) FROM ledger_entry") == bounced.rows(
        "SELECT (census ->> 'rows')::int - (SELECT sum(excluded::int) FROM jsonb_each_text(census -> 'excluded') AS "
        "of_reason(reason, excluded)) FROM backfill_run WHERE status = 'finished'"
    )

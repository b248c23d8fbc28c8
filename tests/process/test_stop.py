"""One signal ends a command behind a lock, whatever the table and the phase; and nothing is left running."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from pytest_django import Settings

from crm.models import BackfillRun, LedgerEntry
from crm.outcome import Outcome
from tests.conftest import Database
from tests.support.builders import add_lead, add_many_leads, add_profile, ledger
from tests.support.commands import backfill, called, each_statement, run, statement_in
from tests.support.processes import database_url, session, start_anew, wait_until
from tests.support.profiles import every, sample

#: What an operator is promised.
AT_MOST_SECONDS = 2.0
every_signal = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
LEGACY = ("users", "profiles", "leads", "crm_contacts")
OWN = ("ledger_entry", "backfill_batch", "backfill_run")


def populate() -> None:
    for number in range(3):
        add_profile(email=f"client-{number}@example.com")
    add_many_leads(12)
    add_lead("not-an-address")


def table_of(name: str) -> str:
    return f"public.{name}" if name in LEGACY else f"crm_backfill.{name}"


@contextmanager
def locked(*tables: str) -> Iterator[psycopg.Connection]:
    """Somebody has locked tables and gone home."""
    with session() as other:
        other.execute("SET lock_timeout = '1s'; SET idle_in_transaction_session_timeout = '60s'")
        other.execute(f"LOCK TABLE {', '.join(map(table_of, tables))}".encode())
        yield other
        # Otherwise it was not behind the lock that it ended.
        assert other.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS


def backends_in_wait() -> int:
    with session() as other:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        (count,) = other.execute(query).fetchone() or (0,)
    return int(count)


@pytest.fixture(scope="module")
def at_most(django_db_setup: Database) -> float:
    """The two seconds, and what a machine that is busy takes to start a process: as much may it take to end one."""
    began = time.monotonic()
    start_anew("backfill_runs", "list", url=database_url()).communicate()
    return AT_MOST_SECONDS + time.monotonic() - began


COMMANDS = {
    "backfill_crm_contacts --no-progress": (*LEGACY[1:], *OWN),
    "backfill_crm_contacts --no-progress --dry-run": LEGACY[1:],
    "backfill_crm_contacts --no-progress --workers 2": ("leads", "crm_contacts", "ledger_entry"),
    "backfill_crm_contacts --no-progress --update": ("leads", "users"),
    "rollback_crm_backfill {run} --no-progress": ("leads", "crm_contacts", "ledger_entry", "backfill_run"),
    "repair_crm_contacts --types --apply --no-progress": ("crm_contacts", "backfill_run"),
    "verify_crm_contacts": ("leads", "crm_contacts", "ledger_entry"),
    "export_backfill_errors --with-email": ("leads", "ledger_entry"),
    "resolve_crm_conflict {row} --separate other@example.com": ("ledger_entry", "backfill_run"),
    "backfill_runs list": ("backfill_run",),
    "backfill_runs show {run}": ("backfill_batch",),
    "backfill_runs watch {run}": ("backfill_batch",),
    "backfill_runs cancel {run}": ("backfill_run",),
}


@pytest.mark.process
@pytest.mark.sampled
@pytest.mark.parametrize(
    ("command", "table"), [(command, table) for command, tables in COMMANDS.items() for table in sample(tables, 3)]
)
def test_one_signal_ends_every_command_behind_a_lock(
    database: Database, at_most: float, command: str, table: str
) -> None:
    populate()
    run()
    number = BackfillRun.objects.get().pk
    row = f"leads:{LedgerEntry.objects.get(outcome=Outcome.ERROR).source_id}"
    add_many_leads(5, first=50)
    stop = signal.SIGINT if len(command) % 2 else signal.SIGTERM
    with locked(table):
        began = time.monotonic()
        process = start_anew(*(word.format(run=number, row=row) for word in command.split()), url=database_url())
        wait_until(lambda: backends_in_wait() > 0 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        sent = time.monotonic()
        # The machine may have become busier since the first test.
        at_most = max(at_most, AT_MOST_SECONDS + sent - began)
        process.send_signal(stop)
        stdout, stderr = process.communicate(timeout=30)
        seconds = time.monotonic() - sent
        assert process.returncode == 4, (stdout, stderr)
        assert "Traceback" not in stderr
        assert "CommandError" not in stderr
        assert seconds < at_most
        wait_until(lambda: backends_in_wait() == 0)
    assert not BackfillRun.objects.running().exists() or table == "backfill_run"
    assert run()["balanced"]


class Happening:
    """Locks tables before a statement, and sends this process a signal as soon as it waits for one of them."""

    def __init__(self, statement: int, number: int, tables: tuple[str, ...]) -> None:
        self.statement, self.number, self.tables = statement, number, tables
        self.sent: list[str] = []
        self.signalled: float | None = None
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def awaited(self) -> Iterator[None]:
        def watch(execute: Any, sql: Any, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
            self.sent.append(" ".join(str(sql).split()))
            if len(self.sent) == self.statement:
                self._lock()
            return execute(sql, parameters, many, context)

        with each_statement(watch):
            try:
                yield
            finally:
                self._is_over.set()
                for thread in self._threads:
                    thread.join()

    def _lock(self) -> None:
        are_locked = threading.Event()
        thread = threading.Thread(target=self._hold, args=[are_locked])
        self._threads.append(thread)
        thread.start()
        are_locked.wait()

    def _hold(self, are_locked: threading.Event) -> None:
        with session() as other:
            other.execute("SET idle_in_transaction_session_timeout = '60s'")
            for table in self.tables:
                # What a transaction of the command has locked already is not to be had.
                with suppress(psycopg.errors.LockNotAvailable), other.transaction():
                    other.execute(f"LOCK TABLE {table_of(table)} NOWAIT".encode())
            are_locked.set()
            while not self._is_over.wait(0.02):
                if self.signalled is None and backends_in_wait():
                    self.signalled = time.monotonic()
                    os.kill(os.getpid(), self.number)


def empty(database: Database) -> None:
    database.empty()
    populate()


@pytest.mark.process
@pytest.mark.sampled(2)
@every_signal
@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--update",)])
def test_one_signal_ends_a_run_behind_a_lock_at_whichever_statement(
    database: Database, at_most: float, number: signal.Signals, arguments: tuple[str, ...]
) -> None:
    arguments = ("--batch-size", "4", "--no-progress", *arguments)
    tables = (*LEGACY, "ledger_entry", "backfill_batch", "contact_update")
    empty(database)
    undisturbed = Happening(0, number, tables)
    with undisturbed.awaited():
        assert backfill(*arguments).code in (0, 1)
    signals = 0
    for statement in range(1 + number % 2, len(undisturbed.sent), every(29)):
        empty(database)
        happening = Happening(statement, number, tables)
        with happening.awaited():
            finished = backfill(*arguments)
            ended = time.monotonic()
        at = f"statement {statement}: {happening.sent[statement - 1][:80]}"
        assert not BackfillRun.objects.running().exists(), at
        if happening.signalled is None:
            assert finished.code in (0, 1), at
            continue
        signals += 1
        assert finished.code == 4, (at, finished)
        assert ended - happening.signalled < at_most, at
        if "--dry-run" not in arguments:
            assert backfill(*arguments).code in (0, 1)
            assert len(ledger()) == 16
    assert signals


@pytest.mark.process
def test_a_run_that_cannot_close_its_record_ends_all_the_same(database: Database, at_most: float) -> None:
    populate()
    happening = Happening(0, signal.SIGTERM, ("backfill_run",))
    with happening.awaited():
        backfill("--batch-size", "4")
    database.empty()
    populate()
    first = next(number for number, sql in enumerate(happening.sent, 1) if "sum(bytes) OVER" in statement_in(sql))
    happening = Happening(first, signal.SIGTERM, ("backfill_run",))
    with happening.awaited():
        finished = backfill("--batch-size", "4", "--no-progress")
        ended = time.monotonic()
    assert happening.signalled is not None
    assert finished.code == 4, finished
    assert ended - happening.signalled < at_most
    BackfillRun.objects.running().update(status="interrupted")
    assert run()["balanced"]


@pytest.mark.process
def test_a_statement_that_reads_waits_for_no_lock_for_ever(database: Database) -> None:
    populate()
    run()
    with locked("ledger_entry"):
        began = time.monotonic()
        finished = called("export_backfill_errors")
    assert (finished.code, finished.stderr.count("\n")) == (2, 1)
    assert "55P03" in finished.stderr
    assert time.monotonic() - began < 20


@pytest.mark.process
def test_how_long_a_statement_may_take_is_the_operators_to_say(database: Database, settings: Settings) -> None:
    add_many_leads(3)
    run()
    settings.CRM_STATEMENT_TIMEOUT = 1
    database.change("ALTER TABLE public.leads RENAME TO slow_leads")
    database.change("CREATE VIEW public.leads AS SELECT * FROM public.slow_leads WHERE pg_sleep(0.5) IS NOT NULL")
    finished = called("verify_crm_contacts")
    assert (finished.code, finished.stderr.count("\n")) == (2, 1)
    assert "57014" in finished.stderr
    settings.CRM_STATEMENT_TIMEOUT = 0
    assert called("verify_crm_contacts").code == 0

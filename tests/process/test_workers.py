"""Several workers: the partition of one that dies is given to another, and there are as many as there may be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import synchronize
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from pytest_django import Settings

from crm.backfill.capacity import max_workers, require_room_for
from crm.backfill.read.readahead import ReadingThread
from crm.backfill.runner import run_backfill
from crm.backfill.workers import MAX_REPLACEMENTS
from crm.backfill.write.dry_run import DryRunWriter
from crm.backfill.write.writer import BatchWriter
from crm.errors import OperatorError
from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.outcome import Source, Totals
from crm.rules.mapping import MappedRow
from crm.rules.options import RunOptions
from crm.runs.progress import Silence
from tests.conftest import Database
from tests.support.builders import add_many_leads, add_profile, ledger
from tests.support.circumstances import acting_as, reading_role
from tests.support.commands import backfill, each_statement, run
from tests.support.processes import session, wait_until
from tests.support.roles import ROLE, role_made_by_script
from tests.support.sessions import managed

MANY_CORES = 1_000
WriteBatch = Callable[[BatchWriter, Source, Iterable[Sequence[MappedRow]]], Totals]


def killed_before(write: WriteBatch, *arguments: object) -> Totals:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def killed_after(write: WriteBatch, *arguments: object) -> Totals:
    """The batch is there, and nobody hears of it."""
    write(*arguments)  # type: ignore[arg-type] # what the writer was given
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, Callable[..., Totals]], None]:
    """Lets so many workers die at a batch."""
    write = BatchWriter.write

    def let_die(times: int, happening: Callable[..., Totals]) -> None:
        def write_or_die(self: BatchWriter, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
            for number in range(times):
                # Made by one of the processes alone.
                try:
                    (tmp_path / f"death {number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                return happening(write, self, source, pages)
            return write(self, source, pages)

        monkeypatch.setattr(BatchWriter, "write", write_or_die)

    return let_die


@pytest.mark.process
@pytest.mark.parametrize("happening", [killed_before, killed_after])
def test_the_partition_of_a_worker_that_dies_is_taken_up_again_by_the_same_run(
    database: Database,
    dying: Callable[[int, Callable[..., Totals]], None],
    happening: Callable[..., Totals],
    caplog: pytest.LogCaptureFixture,
) -> None:
    add_many_leads(40)
    add_profile(email="ann@example.com")
    dying(1, happening)
    answer = run(workers=2, batch_size=5)
    assert (answer["status"], answer["read"], answer["created"], answer["balanced"]) == ("finished", 41, 41, True)
    assert len(ledger()) == 41
    assert caplog.text.count("its partition is given to another worker") == 1


@pytest.mark.process
def test_a_dry_run_whose_worker_dies_fails_rather_than_count_its_rows_twice(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_many_leads(40)
    write = DryRunWriter.write
    batches = 0

    def write_or_die(self: DryRunWriter, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        nonlocal batches
        batches += 1
        if batches > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, source, pages)

    monkeypatch.setattr(DryRunWriter, "write", write_or_die)
    answer = run(workers=2, batch_size=5, dry_run=True)
    assert (answer["status"], answer["read"] <= 10) == ("failed", True)
    assert "a worker died" in answer["failure"]


@pytest.mark.process
def test_a_run_whose_workers_keep_dying_ends_and_the_next_one_goes_on(
    database: Database, dying: Callable[[int, Callable[..., Totals]], None]
) -> None:
    add_many_leads(40)
    dying(MAX_REPLACEMENTS + 1, killed_before)
    ended = backfill("--workers", "2", "--batch-size", "5", "--json")
    assert (ended.code, ended.answer["status"], ended.answer["failure"]) == (5, "failed", "workers kept dying")
    assert BackfillRun.objects.holding().count() == 0
    assert run(workers=2)["status"] == "finished"
    assert len(ledger()) == 40


@pytest.mark.process
def test_no_worker_shares_a_lock_that_it_could_take_with_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: list[object] = []
    make = synchronize.SemLock.__init__

    def note(lock: synchronize.SemLock, *arguments: Any, **options: Any) -> None:
        locks.append(lock)
        make(lock, *arguments, **options)

    monkeypatch.setattr(synchronize.SemLock, "__init__", note)
    add_many_leads(10)
    assert run(workers=2, batch_size=5)["created"] == 10
    assert not locks


class Clockwork(Silence):
    """A progress with a thread of its own, as that on a terminal has."""

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:  # noqa: ARG002 - the progress of a run
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._is_over.wait)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()


@pytest.mark.process
def test_no_worker_and_no_successor_is_forked_while_a_thread_is_running(
    database: Database, dying: Callable[[int, Callable[..., Totals]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = os.fork
    before = threading.active_count()
    others: list[int] = []

    def note() -> int:
        others.append(threading.active_count() - before)
        return fork()

    monkeypatch.setattr(os, "fork", note)
    add_many_leads(40)
    dying(1, killed_before)
    report = run_backfill(RunOptions(workers=2, batch_size=5), Clockwork())
    assert (report.status, report.totals.created) == (RunStatus.FINISHED, 40)
    assert others
    assert set(others) == {0}


def stopped_with_everybody(write: WriteBatch, *arguments: object) -> Totals:
    """What a service manager does, which sends SIGTERM to every process of a group."""
    os.kill(os.getppid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("unreachable")


@pytest.mark.process
def test_a_run_whose_workers_were_stopped_with_it_is_interrupted_and_not_finished(
    database: Database, dying: Callable[[int, Callable[..., Totals]], None]
) -> None:
    add_many_leads(40)
    dying(2, stopped_with_everybody)
    ended = backfill("--workers", "2", "--batch-size", "5", "--json", "--no-progress")
    assert (ended.code, ended.answer["status"]) == (4, "interrupted")
    assert BackfillRun.objects.holding().count() == 0
    assert run(workers=2)["status"] == "finished"
    assert len(ledger()) == 40


@pytest.mark.process
def test_a_limited_rate_is_that_of_all_workers_together_from_the_first_batch_on(database: Database) -> None:
    rate, people = 4, 14
    add_many_leads(people)
    assert run(workers=8, max_rate=rate)["created"] == people
    # A row that says when it was written says so of the beginning of its transaction.
    begun = database.rows(
        "SELECT extract(epoch FROM b.committed_at - r.started_at), b.read FROM backfill_batch b "
        "JOIN backfill_run r ON r.id = b.run_id ORDER BY 1"
    )
    written = 0
    for seconds, rows in begun:
        assert written <= seconds * rate
        written += rows
    assert written == people


@pytest.mark.process
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
@pytest.mark.parametrize("workers", [2, 500])
def test_more_workers_than_there_are_connections_for_are_refused(
    database: Database, settings: Settings, workers: int, arguments: tuple[str, ...]
) -> None:
    add_many_leads(3)
    if workers == 2:
        settings.DATABASE_CONNECTION_LIMIT = 4
    refused = backfill("--workers", str(workers), *arguments)
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert f"{workers} workers need {2 * workers + 1} connections" in refused.stderr
    assert ("connection_limit=4 in DATABASE_URL" if workers == 2 else "max_connections of the server") in refused.stderr
    assert BackfillRun.objects.count() == len(ledger()) == 0
    settings.DATABASE_CONNECTION_LIMIT = 5
    assert backfill("--workers", "2", *arguments).code == 0


@pytest.mark.process
def test_a_run_takes_no_more_connections_than_there_must_be(database: Database, tmp_path: Path) -> None:
    counted = tmp_path / "counted"

    def taken() -> int:
        with session() as observer:
            ((count,),) = observer.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE usename = %s", [ROLE]
            ).fetchall()
        return int(count)

    def watch(execute: Any, sql: Any, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if "SET CONSTRAINTS" in str(sql):
            revisits = "crm_stage_history" in str(sql)
            if revisits:
                # The server needs a moment to see that a connection is gone.
                wait_until(lambda: taken() <= 2 * 2 + 1)
            with counted.open("a") as file:
                file.write(f"{taken()} {revisits}\n")
        return execute(sql, parameters, many, context)

    add_many_leads(20)
    with role_made_by_script(update="on") as url:
        run_of = ("backfill_crm_contacts", "--no-progress", "--batch-size", "5", "--workers", "2")
        assert managed(*run_of, url=url).code == 0
        database.rows("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() RETURNING NULL""")
        add_many_leads(20, first=21)
        with each_statement(watch):
            ended = managed(*run_of, "--update", url=url)
        assert ended.code == 0, ended.stderr
    counts = [line.split() for line in counted.read_text().splitlines()]
    assert {revisits for _, revisits in counts} == {"False", "True"}
    assert max(int(count) for count, _ in counts) <= 2 * 2 + 1


@pytest.mark.process
def test_no_worker_outlives_a_run_that_is_stopped_while_its_reading_ends(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_many_leads(20)
    run()
    database.rows("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() RETURNING NULL""")
    leave = ReadingThread.__exit__

    def stop_twice(self: ReadingThread, *error: object) -> None:
        try:
            if multiprocessing.parent_process() is None:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            leave(self, *error)

    monkeypatch.setattr(ReadingThread, "__exit__", stop_twice)
    ended = backfill("--workers", "2", "--update", "--json")
    assert multiprocessing.active_children() == []
    assert (ended.code, ended.answer["status"]) == (4, "interrupted")
    assert BackfillRun.objects.holding().count() == 0


def test_what_others_have_is_counted_by_a_role_that_may_not_see_what_they_do(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: MANY_CORES)
    with reading_role(database) as role, acting_as(role), ExitStack() as sessions:
        alone = max_workers()
        for _ in range(20):
            sessions.enter_context(session())
        assert max_workers() == alone - 10


def test_a_role_may_have_a_limit_of_its_own(database: Database) -> None:
    with reading_role(database) as role:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER ROLE {role} CONNECTION LIMIT 8")
        with acting_as(role):
            require_room_for(3)
            with pytest.raises(OperatorError, match="CONNECTION LIMIT of the role: 8, of which others have 0"):
                require_room_for(4)


def test_auto_is_one_worker_a_core(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    add_many_leads(3)
    assert backfill("--workers", "auto", "--json").code == 0
    assert BackfillRun.objects.get().options["workers"] == 3


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (4, 1), (5, 2), (9, 4)])
def test_auto_needs_no_more_connections_than_the_url_allows(
    database: Database, monkeypatch: pytest.MonkeyPatch, settings: Settings, limit: int, most: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: MANY_CORES)
    settings.DATABASE_CONNECTION_LIMIT = limit
    assert max_workers() == most


def test_auto_needs_no_more_connections_than_the_server_has_left(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: MANY_CORES)
    alone = max_workers()
    ((connections,),) = database.rows("SELECT current_setting('max_connections')::int")
    assert 1 <= alone < connections / 2
    with ExitStack() as sessions:
        for _ in range(20):
            sessions.enter_context(session())
        assert max_workers() == alone - 10

"""At most one run at a time; one that was stopped or taken over writes nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.contrib.admin import site
from django.db import IntegrityError, connection, transaction
from pytest_django import DjangoDbBlocker

from crm.admin.model_admins import RunAdmin
from crm.backfill.runner import run_backfill
from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.rules.options import RunOptions
from crm.runs import control, lease
from crm.runs.process import ProcessIdentity
from crm.runs.progress import Silence
from tests.conftest import Database
from tests.support import builders
from tests.support.commands import backfill, run
from tests.support.processes import database_url, manage, session, start, start_anew
from tests.support.profiles import SOAKING
from tests.support.runs import a_dead_process, columns_of, make_run, neighbour

TIMES = 20 if SOAKING else 2


def claim() -> BackfillRun:
    return lease.claim(BackfillRun.Kind.BACKFILL, {}, "2025_10")


def statuses() -> dict[int, str]:
    return dict(BackfillRun.objects.order_by("id").values_list("id", "status"))


def let_the_heartbeat_be(run_id: int, age: str) -> None:
    with session() as other:
        other.execute("UPDATE backfill_run SET heartbeat_at = now() - %s::interval WHERE id = %s", [age, run_id])
        other.commit()


@pytest.mark.parametrize("second", ["running", "paused"])
@pytest.mark.parametrize("first", ["running", "paused"])
def test_the_database_takes_no_second_run_that_holds_the_fence(database: Database, first: str, second: str) -> None:
    make_run(first)
    with pytest.raises(IntegrityError) as caught:
        make_run(second)
    assert isinstance(caught.value.__cause__, psycopg.errors.UniqueViolation)
    assert caught.value.__cause__.diag.constraint_name == "at_most_one_run_holds_the_fence"
    for status in ("cancelled", "interrupted", "finished", "finished", "failed"):
        make_run(status)
    with pytest.raises(IntegrityError), transaction.atomic():
        BackfillRun.objects.filter(status="finished").update(status=second)


@pytest.mark.parametrize(("status", "said"), [("running", "in progress"), ("paused", "paused")])
def test_a_run_that_began_and_was_paused_after_another_one_looked_keeps_it_out(
    database: Database, status: str, said: str
) -> None:
    begun: list[int] = []

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if 'INSERT INTO "backfill_run"' in str(sql):
            with session() as other:
                theirs = [status if value == "running" else value for value in parameters]
                (number, *_) = other.execute(sql.encode(), theirs).fetchone() or (0,)
                other.commit()
            begun.append(number)
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch), pytest.raises(lease.AnotherRunError) as refused:
        claim()
    assert str(refused.value).startswith(f"Run {begun[0]} is {said}")
    assert statuses() == {begun[0]: status}


@pytest.mark.sampled
def test_two_that_see_nobody_at_the_same_instant(
    database: Database, django_db_blocker: DjangoDbBlocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_looked = threading.Barrier(2)
    look = type(BackfillRun.objects.all()).holding
    looks = threading.local()

    def look_together(runs: Any) -> Any:
        found = list(look(runs))
        if not getattr(looks, "looked", False):
            looks.looked = True
            both_looked.wait(10)
        return look(runs) if found else _Nothing(look(runs))

    monkeypatch.setattr(type(BackfillRun.objects.all()), "holding", look_together)
    for _ in range(TIMES):
        outcomes: list[BackfillRun | lease.AnotherRunError] = []
        seconds: list[float] = []

        def contend(outcomes: list[Any] = outcomes, seconds: list[float] = seconds) -> None:
            began = time.monotonic()
            with django_db_blocker.unblock():
                try:
                    outcomes.append(claim())
                except lease.AnotherRunError as refused:
                    outcomes.append(refused)
                finally:
                    connection.close()
            seconds.append(time.monotonic() - began)

        looks = threading.local()
        threads = [threading.Thread(target=contend) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (outcome for outcome in outcomes if isinstance(outcome, BackfillRun))
        (loser,) = (outcome for outcome in outcomes if isinstance(outcome, lease.AnotherRunError))
        assert loser.exit_code == 3
        assert str(loser).startswith(f"Run {winner.pk} is in progress: started ")
        assert max(seconds) < 1
        assert list(statuses().values()).count("running") == 1
        assert lease.release(winner.pk, RunStatus.FINISHED)


class _Nothing:
    """What was seen before the other one began; whoever asks for the first one asks anew."""

    def __init__(self, runs: Any) -> None:
        self._runs = runs

    def __iter__(self) -> Iterator[BackfillRun]:
        return iter(())

    def first(self) -> Any:
        return self._runs.first()


@contextmanager
def contacts_locked() -> Iterator[Callable[[], None]]:
    """Nobody can write a contact until it is let go."""
    with session() as other:
        other.execute("LOCK TABLE public.crm_contacts IN SHARE MODE")
        yield other.rollback


@pytest.mark.process
@pytest.mark.sampled
def test_two_processes_that_are_started_at_the_same_instant(database: Database) -> None:
    url = database_url()
    began = time.monotonic()
    idle = [start_anew("backfill_runs", "list", url=url) for _ in range(2)]
    for process in idle:
        process.communicate()
    to_start = time.monotonic() - began
    for number in range(1, TIMES + 1):
        builders.add_many_leads(1, first=number)
        with contacts_locked() as let_go:
            began = time.monotonic()
            pair = [start_anew("backfill_crm_contacts", "--no-progress", "--json", url=url) for _ in range(2)]
            while not (ended := [process for process in pair if process.poll() is not None]):
                assert time.monotonic() - began < 20
                time.sleep(0.005)
            seconds = time.monotonic() - began
            # Nothing can be written yet: whoever has ended was refused.
            loser = ended[0]
            stdout, stderr = loser.communicate()
            assert loser.returncode == 3, stderr
            assert stdout == ""
            (going,) = (run_id for run_id, status in statuses().items() if status == "running")
            assert f"Run {going} is in progress: started " in stderr
            assert stderr.count("\n") == 1
            # The machine of the tests may be busy: what it takes to start is no part of the second.
            assert seconds < 1 + 2 * to_start
            let_go()
            (winner,) = (process for process in pair if process is not loser)
            assert f"(process {winner.pid})" in stderr
            _, stderr = winner.communicate(timeout=30)
            assert (winner.returncode, stderr) == (0, "")
        assert list(statuses().values()) == ["finished"] * number
        assert len(builders.contacts()) == number


def test_a_run_that_is_heard_of_is_not_taken_over(database: Database) -> None:
    going = make_run()
    let_the_heartbeat_be(going.pk, "4 minutes 55 seconds")
    with pytest.raises(lease.AnotherRunError, match=f"Run {going.pk} is in progress: started .* by pat on elsewhere"):
        claim()
    assert statuses() == {going.pk: "running"}


def test_a_run_that_is_silent_for_five_minutes_is_taken_over(database: Database) -> None:
    silent = make_run()
    let_the_heartbeat_be(silent.pk, "5 minutes 1 second")
    taker = claim()
    assert statuses() == {silent.pk: "interrupted", taker.pk: "running"}
    silent.refresh_from_db()
    assert silent.failure == f"taken over by run {taker.pk}: no heartbeat for five minutes"
    assert silent.finished_at is not None


def test_a_dead_process_of_this_machine_is_taken_over_at_once(database: Database) -> None:
    dead = make_run(**neighbour())
    taker = claim()
    assert statuses() == {dead.pk: "interrupted", taker.pk: "running"}
    dead.refresh_from_db()
    assert dead.failure == f"taken over by run {taker.pk}: its process is gone"


def test_a_process_that_was_killed_and_is_not_buried_is_taken_over_at_once(database: Database) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        stat = Path(f"/proc/{child.pid}/stat")
        started = int(stat.read_text().rpartition(")")[2].split()[19])
        made = make_run(**columns_of(ProcessIdentity.own()._replace(process_id=child.pid, started=started)))
        with pytest.raises(lease.AnotherRunError):
            claim()
        child.kill()
        while ") Z " not in stat.read_text():
            time.sleep(0.01)
        assert statuses() == {made.pk: "running"}
        assert claim().pk != made.pk


@pytest.mark.parametrize(
    "differing",
    [
        {"host": "elsewhere"},
        {"boot_id": "another boot, or another machine of this name"},
        {"pid_namespace": "pid:[1]"},
        # Recorded before there were these columns, or where there is no /proc.
        {"boot_id": None, "pid_namespace": None, "process_started": None},
    ],
)
def test_a_process_that_cannot_be_seen_from_here_is_not_thought_dead_by_its_number(
    database: Database, differing: dict[str, Any]
) -> None:
    going = make_run(**neighbour(**differing))
    with pytest.raises(lease.AnotherRunError):
        claim()
    assert statuses() == {going.pk: "running"}
    let_the_heartbeat_be(going.pk, "5 minutes 1 second")
    assert claim().pk != going.pk


def test_a_number_that_another_process_has_by_now_is_not_thought_alive(database: Database) -> None:
    for process_id in (1, os.getpid()):
        gone = make_run(**neighbour(process_id=process_id, process_started=1))
        taker = claim()
        assert statuses()[gone.pk] == "interrupted"
        taker.delete()


def test_a_living_process_of_this_machine_is_left_alone(database: Database) -> None:
    going = make_run(**columns_of(ProcessIdentity.own()))
    with pytest.raises(lease.AnotherRunError):
        claim()
    assert statuses() == {going.pk: "running"}


def test_without_proc_the_heartbeat_alone_tells(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("crm.runs.process.PROC", tmp_path)
    going = claim()
    assert (going.boot_id, going.pid_namespace, going.process_started) == (None, None, None)
    BackfillRun.objects.filter(pk=going.pk).update(process_id=a_dead_process())
    with pytest.raises(lease.AnotherRunError):
        claim()


@contextmanager
def while_the_tables_are_counted(happening: Callable[[], None], *, at: int) -> Iterator[None]:
    """Let something happen while the statement of this number that counts source rows is at work."""
    counts = 0

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        nonlocal counts
        result = execute(sql, parameters, many, context)
        if "count(*) FROM leads r WHERE true" in str(sql):
            counts += 1
            if counts == at:
                happening()
        return result

    with connection.execute_wrapper(watch):
        yield
    assert counts >= at


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_keeps_its_lease_as_long_as_it_counts_the_tables(
    database: Database, django_db_blocker: DjangoDbBlocker, at: int
) -> None:
    builders.add_many_leads(9)
    refused: list[lease.AnotherRunError] = []

    def contend() -> None:
        with django_db_blocker.unblock():
            try:
                claim()
            except lease.AnotherRunError as error:
                refused.append(error)
            finally:
                connection.close()

    def happening() -> None:
        ((counting, _),) = statuses().items()
        let_the_heartbeat_be(counting, "1 hour")
        other = threading.Thread(target=contend)
        other.start()
        other.join()

    with while_the_tables_are_counted(happening, at=at):
        report = run_backfill(RunOptions())
    assert len(refused) == 1
    assert (report.status, report.balanced) == ("finished", True)


def test_a_run_that_counts_the_tables_can_be_cancelled(database: Database) -> None:
    builders.add_many_leads(9)

    def cancel() -> None:
        with session() as other:
            other.execute("SET lock_timeout = '1s'")
            other.execute("UPDATE backfill_run SET status = 'cancelled'")
            other.commit()

    with while_the_tables_are_counted(cancel, at=1):
        report = run_backfill(RunOptions())
    assert (report.status, report.exit_code(strict=False)) == ("cancelled", 4)
    assert not builders.contacts()


def test_a_paused_run_keeps_others_out_however_old_it_is(database: Database) -> None:
    paused = make_run("paused", **neighbour())
    let_the_heartbeat_be(paused.pk, "1 year")
    with pytest.raises(lease.AnotherRunError, match=f"Run {paused.pk} is paused"):
        claim()
    assert statuses() == {paused.pk: "paused"}


class Sleeper(Silence):
    """Sleeps after the first batch for so long that another run takes over."""

    def __init__(self) -> None:
        self.taker: BackfillRun | None = None

    def advance(self, part: str, done: int, result: str = "") -> None:  # noqa: ARG002 - the progress of a run
        """The batch is committed, and the next one not yet begun."""
        if self.taker is None:
            (sleeping,) = statuses()
            let_the_heartbeat_be(sleeping, "5 minutes 1 second")
            self.taker = claim()


def test_a_run_that_wakes_after_it_was_taken_over_writes_nothing_more(database: Database) -> None:
    builders.add_many_leads(9)
    sleeper = Sleeper()
    report = run_backfill(RunOptions(batch_size=3), sleeper)
    assert sleeper.taker is not None
    assert report.run_id is not None
    assert (report.status, report.exit_code(strict=False)) == ("interrupted", 4)
    assert report.totals.read == 3
    assert len(builders.contacts()) == len(builders.ledger()) == 3
    taker = BackfillRun.objects.get(pk=sleeper.taker.pk)
    assert statuses() == {report.run_id: "interrupted", taker.pk: "running"}
    assert (taker.read, taker.batches.count()) == (0, 0)
    failure = f"taken over by run {taker.pk}: no heartbeat for five minutes"
    assert (report.failure, report.balanced) == (failure, None)
    assert BackfillRun.objects.get(pk=report.run_id).failure == failure


@contextmanager
def in_the_middle_of_the_second_batch(happening: str) -> Iterator[None]:
    """Another session does this when the contacts of the second batch are written, and nothing is committed."""
    batches = 0

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        nonlocal batches
        result = execute(sql, parameters, many, context)
        if 'INSERT INTO "crm_contacts"' in sql:
            batches += 1
            if batches == 2:
                with session() as other:
                    other.execute(happening.encode())
                    other.commit()
        return result

    with connection.execute_wrapper(watch):
        yield
    assert batches >= 2


@pytest.mark.parametrize(
    ("happening", "status"),
    [
        ("UPDATE backfill_run SET status = 'paused'", "paused"),
        ("UPDATE backfill_run SET status = 'cancelled'", "cancelled"),
        ("UPDATE backfill_run SET status = 'interrupted'", "interrupted"),
    ],
)
def test_a_run_that_is_stopped_in_the_middle_of_a_batch_rolls_it_back(
    database: Database, happening: str, status: str
) -> None:
    builders.add_many_leads(9)
    with in_the_middle_of_the_second_batch(happening):
        report = run_backfill(RunOptions(batch_size=3))
    assert report.run_id is not None
    assert (report.status, report.exit_code(strict=False)) == (status, 4)
    assert len(builders.contacts()) == len(builders.ledger()) == 3
    stopped = BackfillRun.objects.get(pk=report.run_id)
    assert (stopped.status, stopped.read, stopped.created, stopped.batches.count()) == (status, 3, 3, 1)

    BackfillRun.objects.filter(status="paused").update(status="interrupted")
    assert (run()["created"], len(builders.contacts()), len(builders.ledger())) == (6, 9, 9)


@pytest.mark.parametrize(
    ("status", "actions"),
    [("running", ()), ("running", ("cancel",)), ("running", ("pause", "resume")), ("finished", ())],
)
def test_rows_newly_in_error_in_a_run_that_wrote_no_report_are_news_to_the_next(
    database: Database, status: str, actions: tuple[str, ...]
) -> None:
    builders.add_lead("nobody")
    killed = run_backfill(RunOptions()).run_id
    assert killed is not None
    BackfillRun.objects.filter(pk=killed).update(status=status, **neighbour())
    for action in actions:
        control.act(action, killed)
    ended = backfill("--json", "--no-progress")
    assert (ended.code, ended.answer["error_new"]) == (1, 0)
    assert ended.answer["lost_reports"] == [{"run_id": killed, "error_new": 1}]
    assert f"Run {killed} did not write its report. Rows newly in error in it: 1;" in ended.stderr
    ended = backfill("--json", "--no-progress")
    assert (ended.code, ended.answer["lost_reports"], ended.stderr) == (0, [], "")


def test_a_report_that_a_cancelled_run_is_yet_to_write_is_not_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.add_lead("nobody")
    cancelled = run_backfill(RunOptions()).run_id
    assert cancelled is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", os.getppid)
        alive = ProcessIdentity.own()
    BackfillRun.objects.filter(pk=cancelled).update(status="cancelled", report_lost=True, **columns_of(alive))
    is_lost = RunAdmin(BackfillRun, site).report_is_lost
    assert not is_lost(BackfillRun.objects.get(pk=cancelled))
    ended = backfill("--json", "--no-progress")
    assert (ended.code, ended.answer["lost_reports"], ended.stderr) == (0, [], "")
    # What lives on may do something else by now.
    let_the_heartbeat_be(cancelled, "5 minutes 1 second")
    assert is_lost(BackfillRun.objects.get(pk=cancelled))
    ended = backfill("--json", "--no-progress")
    assert (ended.code, ended.answer["lost_reports"]) == (1, [{"run_id": cancelled, "error_new": 1}])


@pytest.mark.process
def test_a_killed_process_is_taken_over_at_once(database: Database) -> None:
    builders.add_many_leads(3)
    url = database_url()
    with contacts_locked():
        process = start("backfill_crm_contacts", "--no-progress", url=url)
        deadline = time.monotonic() + 20
        while "running" not in statuses().values():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (killed,) = statuses()
    assert statuses() == {killed: "running"}
    after = manage("backfill_crm_contacts", "--no-progress", url=url)
    assert after.returncode == 0, after.stderr
    assert f"run {killed} was taken over: its process is gone" in after.stderr
    assert list(statuses().values()) == ["interrupted", "finished"]
    assert len(builders.contacts()) == len(builders.ledger()) == 3

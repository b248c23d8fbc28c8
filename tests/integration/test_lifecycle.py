"""From the claim of a run to its close, whatever its kind: a signal at any moment leaves no run behind that is
`running`, and the next one goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection
from django.db.backends.postgresql.base import DatabaseWrapper

from crm.errors import OperatorError
from crm.models import BackfillRun
from crm.runs import lease
from crm.runs.lifecycle import Lifecycle
from tests.conftest import Database
from tests.support.builders import add_lead, add_many_leads, contacts, ledger
from tests.support.commands import Finished, backfill, called, run
from tests.support.processes import session
from tests.support.profiles import every

SIZE, PEOPLE = 5, 3
CLAIM = 'INSERT INTO "backfill_run"'


def rollback(run_id: int, *arguments: str) -> Finished:
    return called("rollback_crm_backfill", str(run_id), "--no-progress", "--batch-size", str(SIZE), *arguments)


def populate() -> None:
    """Two batches of leads, and what a second look has to do."""
    add_many_leads(PEOPLE)
    add_lead("person-3@example.com", id="lead0003", createdAt="2025-01-03", referrerUsername="ref")


def a_backfill() -> Callable[[], Finished]:
    return lambda: backfill("--no-progress", "--update", "--batch-size", str(SIZE))


def a_rollback() -> Callable[[], Finished]:
    made = run()["run"]
    return lambda: rollback(made)


COMMANDS = {"backfill": a_backfill, "rollback": a_rollback}


@contextmanager
def at_step(number: int, happening: Callable[[], object]) -> Iterator[list[str]]:
    """Call `happening` once the step of this number is done, counted from the claim on: a statement, or a commit."""
    steps: list[str] = []
    commit = DatabaseWrapper.commit

    def done(step: str) -> None:
        if steps or CLAIM in step:
            steps.append(step)
            if len(steps) - 1 == number:
                happening()

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        result = execute(sql, parameters, many, context)
        done(str(sql))
        return result

    def commit_and_say(wrapper: Any) -> None:
        commit(wrapper)
        if threading.current_thread() is threading.main_thread():
            done("COMMIT")

    with pytest.MonkeyPatch.context() as patch, connection.execute_wrapper(watch):
        patch.setattr(DatabaseWrapper, "commit", commit_and_say)
        yield steps


def signals(times: int) -> Callable[[], None]:
    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)

    return send


def afresh(database: Database) -> None:
    database.empty()
    populate()


def undisturbed(database: Database, kind: str) -> list[str]:
    """The steps of a command from its claim on, when nothing happens."""
    afresh(database)
    command = COMMANDS[kind]()
    with at_step(-1, lambda: None) as steps:
        command()
    return steps


# psycopg warns of a cursor that the signal left open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.sampled
@pytest.mark.parametrize("kind", COMMANDS)
def test_signals_at_any_step_leave_no_run_running_and_the_next_one_goes_on(database: Database, kind: str) -> None:
    steps = undisturbed(database, kind)
    expected = (contacts(), ledger())
    # Most of all the start and the end.
    last = len(steps)
    for number in (*range(0, 6, every(2)), *range(6, last - 8, every(24)), *range(last - 8, last, every(2))):
        afresh(database)
        command = COMMANDS[kind]()
        with at_step(number, signals(1 + number % 3)) as reached:
            finished = command()
        assert "Traceback" not in finished.stderr
        assert finished.code in (0, 4), (number, reached[-1], finished)
        left = BackfillRun.objects.latest("pk")
        assert left.status == ("interrupted" if finished.code == 4 else "finished"), (number, reached[-1])
        assert left.finished_at is not None
        while finished.code == 4:
            finished = command()
        assert finished.code == 0, (number, finished)
        assert (contacts(), ledger()) == expected, (number, reached[-1])


def delete_runs() -> None:
    """From outside, with all that hangs on them; a batch that is just committing keeps its record."""
    with session() as other:
        other.execute("SET lock_timeout = '50ms'")
        try:
            for table in ("rollback", "backfill_batch", "contact_update", "backfill_run"):
                other.execute(f"DELETE FROM {table}")
            other.commit()
        except psycopg.errors.LockNotAvailable:
            other.rollback()


@pytest.mark.sampled
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_record_that_is_deleted_at_any_step_ends_the_run_in_one_line(database: Database, kind: str) -> None:
    steps = undisturbed(database, kind)
    deleted = 0
    for number in range(1, len(steps), every(7)):
        afresh(database)
        command = COMMANDS[kind]()
        with at_step(number, delete_runs) as reached:
            finished = command()
        assert "Traceback" not in finished.stderr + finished.stdout
        assert finished.stderr.count("\n") <= 1
        if BackfillRun.objects.filter(kind=kind).exists():
            assert finished.code in (0, 5), (number, reached[-1], finished)
            continue
        deleted += 1
        # The close comes before the last three, and a statement more or less depends on the clock.
        assert finished.code in ((0, 5) if number >= len(steps) - 4 else (5,)), (number, reached[-1], finished)
        if finished.code == 5:
            assert "was deleted meanwhile" in finished.stderr or "Database error at the start" in finished.stderr
        assert backfill("--no-progress").code == 0
    assert deleted > 2


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_that_was_taken_over_says_so_and_is_not_checked(database: Database, kind: str) -> None:
    steps = undisturbed(database, kind)
    afresh(database)
    command = COMMANDS[kind]()
    takers: list[int] = []

    def take_over() -> None:
        with session() as other:
            other.execute("UPDATE backfill_run SET heartbeat_at = now() - interval '1 hour' WHERE status = 'running'")
            other.commit()
        takers.append(lease.claim(BackfillRun.Kind.BACKFILL, {}, "2025_10").pk)

    # The second and third one of a backfill end its count of the tables: as long as that takes, nobody takes it over.
    commits = [number for number, step in enumerate(steps, 1) if step == "COMMIT"]
    with at_step(commits[2 if kind == "backfill" else 0], take_over):
        finished = command()
    left = BackfillRun.objects.exclude(pk=takers[0]).latest("pk")
    assert (finished.code, left.status, left.balanced) == (4, "interrupted", None)
    assert left.failure == f"taken over by run {takers[0]}: no heartbeat for five minutes"
    assert f"taken over by run {takers[0]}" in finished.stderr
    assert BackfillRun.objects.get(pk=takers[0]).status == "running"


@pytest.mark.parametrize("kind", COMMANDS)
def test_an_error_for_the_operator_ends_a_run_in_its_own_words_with_one_full_stop(
    database: Database, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    populate()
    command = COMMANDS[kind]()

    def refuse(*_arguments: object) -> None:
        raise OperatorError("This session is unfit. Nothing is written from here on.")

    monkeypatch.setattr(lease, "renew", refuse)
    finished = command()
    assert finished.code == 5
    assert "failed: This session is unfit. Nothing is written from here on. " in finished.stderr
    assert BackfillRun.objects.latest("pk").failure == "This session is unfit. Nothing is written from here on"


def test_a_run_that_cannot_be_closed_says_why(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_arguments: object, **_results: object) -> bool:
        raise OperatorError("This session is unfit.")

    monkeypatch.setattr(lease, "release", refuse)
    life = Lifecycle()
    run_id = life.claim(lambda: lease.claim(BackfillRun.Kind.BACKFILL, {}, "2025_10")).pk
    life.abandon(ZeroDivisionError())
    assert caplog.messages == [f"run {run_id} could not be closed: This session is unfit"]

"""From the claim of a run to its close, whatever its kind: a signal at any moment leaves no run behind that is
`running`, and the next one goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection
from django.db.backends.postgresql.base import DatabaseWrapper

from crm.models import BackfillRun
from tests.builders import add_lead, add_many_leads, contacts, ledger
from tests.commands import Finished, backfill, called, run
from tests.conftest import Database

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
    commit = DatabaseWrapper._commit  # type: ignore[attr-defined] # Django's own, which its stubs leave out

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
        patch.setattr(DatabaseWrapper, "_commit", commit_and_say)
        yield steps


def signals(times: int) -> Callable[[], None]:
    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)

    return send


def afresh(database: Database) -> None:
    database.empty()
    populate()


# psycopg warns of a cursor that the signal left open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", COMMANDS)
def test_signals_at_any_step_leave_no_run_running_and_the_next_one_goes_on(database: Database, kind: str) -> None:
    afresh(database)
    with at_step(-1, signals(0)) as steps:
        COMMANDS[kind]()()
    expected = (contacts(), ledger())
    # Every step of the start and the end, and some in between.
    last = len(steps)
    for number in (*range(6), *range(6, last - 8, 5), *range(last - 8, last)):
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

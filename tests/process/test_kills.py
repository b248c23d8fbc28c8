"""A run that is killed, at whatever moment: the next one goes on, and ends as if nobody had disturbed the first."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection

from crm.models import BackfillRun, ContactUpdate
from tests.conftest import Database
from tests.support.commands import run
from tests.support.forks import (
    AT_MOST_SECONDS,
    COMMIT,
    Mishap,
    ended,
    fork,
    kill_everybody,
    kill_the_command,
    kill_this_process,
    labels,
    wait_for_orphans,
)
from tests.support.processes import database_url, start
from tests.support.profiles import SOAKING, every
from tests.support.undisturbed import (
    BATCH_SIZE,
    SEED,
    SIZED,
    Undisturbed,
    after_a_second_look,
    populate,
    populate_with_news,
)

#: How many moments are tried; more of them find more.
MOMENTS, MOMENTS_WITH_WORKERS, MOMENTS_OF_UPDATES = (60, 10, 12) if SOAKING else (10, 2, 4)
#: Seconds after the sending of a statement at which the latest kills come: long enough for its answer to be there.
LATEST = 0.004
KILLED = -signal.SIGKILL


def second_look(labels: list[str]) -> tuple[int, int]:
    """The numbers, from 1 on, of the first and the last statement of its batches."""
    writes = [number for number, label in enumerate(labels) if label.startswith("UPDATE crm_contacts")]
    begin = max(number for number in range(writes[0]) if labels[number].startswith("SET LOCAL"))
    return begin + 1, labels.index(COMMIT, writes[-1]) + 1


def entries(database: Database) -> int:
    ((count,),) = database.rows("SELECT count(*) FROM ledger_entry")
    return int(count)


def moments(count: int, most: int) -> list[tuple[int, float]]:
    """Seeded moments, spread over a run of so many statements: a statement, and seconds after it was sent."""
    chance = random.Random(SEED)  # noqa: S311 - the same moments in every run of the tests
    step = most / count
    return [(1 + int(step * (number + chance.random())), chance.uniform(0, LATEST)) for number in range(count)]


@pytest.mark.process
@pytest.mark.sampled
def test_a_process_killed_at_whatever_moment_leaves_nothing_that_the_next_run_does_not_put_right(
    database: Database,
) -> None:
    populate()
    undisturbed = Undisturbed(database)
    left: list[int] = []
    for statement, delay in moments(MOMENTS, len(undisturbed.labels)):
        process = fork(*SIZED, prepare=Mishap(statement=statement, delay=delay).prepare)
        assert ended(process) == KILLED, "it was still at work"
        left.append(entries(database))
        assert run(batch_size=BATCH_SIZE)["balanced"] is True
        undisturbed.assert_reached()
        undisturbed.reset()
    of_all = len(undisturbed.end[1])
    tenths = {10 * count // of_all for count in left}
    assert len(left) == MOMENTS
    assert tenths >= {*range(0, 10, every(2))}, "all over the run"


@pytest.mark.process
def test_a_process_killed_at_each_statement_boundary_of_a_batch(database: Database) -> None:
    populate(people=60, profiles=12)
    undisturbed = Undisturbed(database)
    first, last = undisturbed.busiest_batch()
    assert undisturbed.labels[last] == COMMIT
    left: list[int] = []
    for statement in range(first, last + 2):
        # Statements are counted from 1 on.
        process = fork(*SIZED, prepare=Mishap(statement=statement + 1).prepare)
        assert ended(process) == KILLED, "it was still at work"
        left.append(entries(database))
        assert run(batch_size=BATCH_SIZE)["balanced"] is True
        undisturbed.assert_reached()
        undisturbed.reset()
    assert len(left) > 8
    assert left[:-1] == [left[0]] * (len(left) - 1)
    assert left[-1] > left[0], "the commit was the last boundary"


@pytest.mark.process
@pytest.mark.sampled
@pytest.mark.parametrize("kill", [kill_the_command, kill_everybody, kill_this_process])
def test_workers_that_are_killed_or_orphaned_do_no_harm_to_the_next_run(
    database: Database, kill: Callable[[int], None]
) -> None:
    populate()
    undisturbed = Undisturbed(database)
    for statement, delay in moments(MOMENTS_WITH_WORKERS, len(undisturbed.labels)):
        mishap = Mishap(statement=statement, delay=delay, happening=kill)
        process = fork(*SIZED, "--workers", "2", prepare=mishap.prepare)
        # A worker alone is not missed: its partition is taken up again.
        assert ended(process) in ([KILLED, 1] if kill is kill_this_process else [KILLED])
        assert mishap.came, "it was still at work"
        # Orphans may still be at their last batch when this one begins.
        answer = run(batch_size=BATCH_SIZE)
        assert (answer["status"], answer["balanced"]) == ("finished", True)
        wait_for_orphans(process)
        undisturbed.assert_reached()
        undisturbed.reset()


@pytest.mark.process
@pytest.mark.sampled
def test_a_process_killed_in_the_middle_of_a_second_look_leaves_nothing_that_the_next_one_does_not_put_right(
    database: Database,
) -> None:
    populate_with_news()
    with labels() as sent:
        run(update=True, batch_size=BATCH_SIZE)
    end = after_a_second_look(database)
    first, last = second_look(sent)
    left: set[int] = set()
    for statement, delay in moments(MOMENTS_OF_UPDATES, last - first + 1):
        database.empty()
        populate_with_news()
        mishap = Mishap(statement=first - 1 + statement, delay=delay)
        assert ended(fork("--update", *SIZED, prepare=mishap.prepare)) == KILLED, "it was still at work"
        left.add(ContactUpdate.objects.count())
        assert run(update=True, batch_size=BATCH_SIZE)["balanced"] is True
        assert after_a_second_look(database) == end
    assert len(left) > MOMENTS_OF_UPDATES // 3, "all over the second look"


@pytest.mark.process
def test_a_run_that_is_killed_again_and_again_gets_to_its_end(database: Database) -> None:
    populate()
    undisturbed = Undisturbed(database)
    for _ in range(6):
        process = fork(*SIZED, prepare=Mishap(statement=len(undisturbed.labels) // 8, delay=0.001).prepare)
        assert ended(process) == KILLED
    assert ended(fork(*SIZED)) == 1, "the rows in error are new"
    undisturbed.assert_reached()


@pytest.mark.process
def test_the_command_as_an_operator_starts_it_is_killed(database: Database) -> None:
    populate()
    undisturbed = Undisturbed(database)
    process = start("backfill_crm_contacts", "--no-progress", *SIZED, url=database_url())
    try:
        end = time.monotonic() + AT_MOST_SECONDS
        while entries(database) == 0 and process.poll() is None:
            assert time.monotonic() < end, "it did not get there"
    finally:
        process.kill()
        process.communicate()
    run(batch_size=BATCH_SIZE)
    undisturbed.assert_reached()


class Killed(BaseException):
    """Nobody catches this, as nobody outlives a kill."""


@contextmanager
def killed_at(statement: int, *, is_done: bool) -> Iterator[list[str]]:
    """End everything at the statement of this number, before it is sent or after it is done."""
    sent: list[str] = []

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        sent.append(str(sql))
        if len(sent) == statement and not is_done:
            raise Killed
        result = execute(sql, parameters, many, context)
        if len(sent) == statement:
            raise Killed
        return result

    with connection.execute_wrapper(watch):
        yield sent


def a_dead_process() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# Whoever is killed closes no cursor.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.sampled
@pytest.mark.parametrize("is_done", [False, True])
def test_killed_at_each_statement_of_a_run(database: Database, is_done: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Each statement of every batch, and those before the first and after the last as well."""
    populate(people=25, profiles=9)
    undisturbed = Undisturbed(database)
    gone = a_dead_process()
    killed = 0
    for statement in itertools.count(1 + is_done, every(18)):
        try:
            with killed_at(statement, is_done=is_done):
                run(batch_size=BATCH_SIZE)
        except Killed:
            killed += 1
        else:
            break
        finally:
            connection.close()
        BackfillRun.objects.running().update(process_id=gone)
        run(batch_size=BATCH_SIZE)
        undisturbed.assert_reached()
        undisturbed.reset()
    assert killed > 40 // every(18), "several batches, and what is around them"

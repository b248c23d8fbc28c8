"""Sessions of the application that update contacts while a run does: nobody waits for ever, and the books hold."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection

from crm.runs import retrying
from tests.conftest import Database
from tests.support.builders import add_lead, add_profile, contacts, ledger
from tests.support.commands import backfill, rollback, run, statement_in
from tests.support.processes import session

#: The first statement of ours that takes locks on contacts which are there.
LOCKS = ("SELECT FROM crm_contacts", "SELECT c.id FROM crm_contacts", "UPDATE crm_contacts c SET")
IS_WAITED_FOR = "SELECT FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
UPDATE = "UPDATE public.crm_contacts SET company = 'Own' WHERE id = %s"
SESSIONS = 4
MAX_TRIES = 5
PEOPLE = 64
#: More than there are tries, and than it takes to come down to one row.
DEADLOCKS = 8
# No statement waits for ever, whatever goes wrong in a test.
AT_MOST = "SET statement_timeout = '20s'"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no try wait for long."""
    monkeypatch.setattr(retrying, "MAX_RETRIES", MAX_TRIES)


class Rival:
    """A session of the application that updates two contacts in one transaction: the second one once it is waited for.

    The deadlock that this may come to is found by the run, as a rule: so it is the run that has to give way.
    """

    def __init__(self, own: psycopg.Connection) -> None:
        self._own = own
        self._own.execute(AT_MOST)
        self._own.execute("SET deadlock_timeout = '20s'")
        self._own.commit()
        self._at_work: threading.Thread | None = None
        self.trouble: Exception | None = None

    def begin(self, first: str, then: str) -> None:
        """Update the first contact, and the other one as soon as somebody waits for this session."""
        self.wait()
        self._own.execute(UPDATE, [first])
        self._at_work = threading.Thread(target=self._go_on, args=(then,))
        self._at_work.start()

    def wait(self) -> None:
        """Wait until the transaction is over."""
        if self._at_work is not None:
            self._at_work.join()

    def _go_on(self, contact: str) -> None:
        try:
            with session() as observer:
                observer.autocommit = True
                while observer.execute(IS_WAITED_FOR, [self._own.info.backend_pid]).fetchone() is None:
                    pass
            self._own.execute(UPDATE, [contact])
            self._own.commit()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is to tell
            self.trouble = error


@contextmanager
def rivals(times: int, *, in_order: bool) -> Iterator[list[int]]:
    """Before locks are taken on more than one contact, so many times, a session of the application is in the way.

    In the order of the ids it updates the lowest of the contacts first, else the highest. The sizes are collected.
    """
    sizes: list[int] = []

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if statement_in(sql).startswith(LOCKS) and len(sizes) < times and len(ids := sorted(parameters[0])) > 1:
            execute("SET LOCAL deadlock_timeout = '250ms'", None, False, context)  # noqa: FBT003 - Django's signature
            lowest, highest = ids[0], ids[-1]
            opponents[len(sizes) % SESSIONS].begin(*((lowest, highest) if in_order else (highest, lowest)))
            sizes.append(len(ids))
        return execute(sql, parameters, many, context)

    with ExitStack() as stack:
        opponents = [Rival(stack.enter_context(session())) for _ in range(SESSIONS)]
        with connection.execute_wrapper(watch):
            yield sizes
        for rival in opponents:
            rival.wait()
            assert rival.trouble is None
    assert sizes, "nothing was locked"


def add_people(database: Database) -> None:
    """Contacts of ours whose place in the table is the reverse of the order of their ids."""
    for _ in range(PEOPLE):
        add_profile(email=None)
    run()
    database.rows(
        """
        WITH gone AS (DELETE FROM crm_contacts RETURNING *)
        INSERT INTO crm_contacts SELECT * FROM gone ORDER BY id DESC RETURNING id
        """
    )


def add_news(database: Database) -> None:
    """A lead for each contact, which fills its phone."""
    for (email,) in database.rows("SELECT email FROM crm_contacts ORDER BY id"):
        add_lead(email, phone="555")


def phones() -> set[str | None]:
    return {contact["phone"] for contact in contacts().values()}


def retries_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "retrying the batch" in record.message]


def test_a_run_that_merges_gets_by_sessions_that_update_in_any_order(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_people(database)
    add_news(database)
    with rivals(DEADLOCKS, in_order=False) as sizes:
        finished = backfill("--no-progress", "--json", "--batch-size", str(PEOPLE))
    assert (finished.code, finished.answer["status"], finished.answer["balanced"]) == (0, "finished", True)
    assert (finished.answer["merged"], len(ledger())) == (PEOPLE, 2 * PEOPLE)
    assert phones() == {"555"}
    assert len(sizes) == DEADLOCKS > MAX_TRIES
    assert len(retries_told(caplog)) >= DEADLOCKS


def test_an_update_gets_by_sessions_that_update_in_any_order(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_people(database)
    database.rows("""UPDATE profiles SET phone = '555', "updatedAt" = now() RETURNING id""")
    with rivals(DEADLOCKS, in_order=False):
        answer = run(update=True, batch_size=PEOPLE)
    assert (answer["status"], answer["balanced"], answer["updated"]) == ("finished", True, PEOPLE)
    assert phones() == {"555"}
    assert len(retries_told(caplog)) >= DEADLOCKS


@pytest.mark.parametrize("with_update", [False, True])
def test_a_rollback_gets_by_sessions_that_update_in_any_order(
    database: Database,
    caplog: pytest.LogCaptureFixture,
    with_update: bool,  # noqa: FBT001 - parametrized
) -> None:
    number = undoable(database, with_update=with_update)
    with rivals(DEADLOCKS, in_order=False):
        finished = rollback(str(number), "--json", "--batch-size", str(PEOPLE))
    assert (finished.answer["status"], finished.answer["balanced"]) == ("finished", True)
    assert phones() <= {None, "555"}
    assert len(retries_told(caplog)) > MAX_TRIES


def undoable(database: Database, *, with_update: bool) -> int:
    """A run that filled the contacts of an earlier one; its number."""
    add_people(database)
    if with_update:
        database.rows("""UPDATE profiles SET phone = '555', "updatedAt" = now() RETURNING id""")
    else:
        add_news(database)
    number = run(update=with_update)["run"]
    assert isinstance(number, int)
    assert phones() == {"555"}
    return number


def test_a_run_and_a_session_that_lock_in_the_same_order_do_not_meet_in_a_deadlock(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    add_people(database)
    add_news(database)
    with rivals(1, in_order=True):
        answer = run()
    assert (answer["merged"], retries_told(caplog)) == (PEOPLE, [])


def test_an_update_and_a_session_that_lock_in_the_same_order_do_not_meet_in_a_deadlock(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_people(database)
    database.rows("""UPDATE profiles SET phone = '555', "updatedAt" = now() RETURNING id""")
    with rivals(1, in_order=True):
        answer = run(update=True)
    # Both of its contacts are another version now, and are looked at again.
    assert (answer["status"], answer["updated"], retries_told(caplog)) == ("finished", PEOPLE, [])


@pytest.mark.parametrize("with_update", [False, True])
def test_a_rollback_and_a_session_that_lock_in_the_same_order_do_not_meet_in_a_deadlock(
    database: Database,
    caplog: pytest.LogCaptureFixture,
    with_update: bool,  # noqa: FBT001 - parametrized
) -> None:
    number = undoable(database, with_update=with_update)
    with rivals(1, in_order=True):
        finished = rollback(str(number), "--json", "--batch-size", str(PEOPLE))
    assert (finished.answer["status"], retries_told(caplog)) == ("finished", [])

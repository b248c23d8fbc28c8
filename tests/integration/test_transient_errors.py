"""Transient errors, when the server has no time, no lock or no connection: the batch is retried, nothing is lost."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection, connections

from crm.backfill import context, runner
from crm.backfill.update.writer import UpdateWriter
from crm.backfill.write.writer import BatchWriter
from crm.models import BackfillRun
from crm.postgres import transactions
from crm.postgres.transactions import Timeouts
from crm.rules.throttling import Pause, RateLimit
from crm.runs import retrying
from tests.conftest import Database
from tests.support.builders import CREATED_AT, add_lead, add_many_leads, contacts, ledger
from tests.support.circumstances import terminated_at
from tests.support.commands import Finished, backfill, rollback, run, statement_in
from tests.support.forks import COMMIT, labels
from tests.support.processes import session
from tests.support.profiles import every
from tests.support.runs import neighbour
from tests.support.undisturbed import (
    BATCH_SIZE,
    PEOPLE,
    after_a_second_look,
    as_an_undisturbed_run_ends,
    populate_with_news,
)

INSERTS_CONTACTS = 'INSERT INTO "crm_contacts"'
CAUSES = {
    "40001": "serialization failure",
    "40P01": "deadlock",
    "53300": "too many connections",
    "55P03": "lock timeout",
    "57014": "statement timeout",
    "57P01": "server shut down the connection",
    "57P02": "server crashed",
    "57P03": "server is starting",
    "57P05": "idle session timeout",
    "25P03": "idle in transaction timeout",
    "25006": "server is read-only",
    "08000": "connection lost",
    "08001": "connection lost",
    "08003": "connection lost",
    "08004": "connection lost",
    "08006": "connection lost",
    "08007": "connection lost",
    "08P01": "connection lost",
}
TOO_MANY_ROWS = {"55P03": "a timeout", "57014": "a timeout", "40P01": "a deadlock"}
#: The statements of a batch, by what they begin with.
PLACES = ("SET LOCAL", "SAVEPOINT", INSERTS_CONTACTS, "INSERT INTO ledger_entry", 'INSERT INTO "backfill_batch"')
MAX_TRIES = 5
#: Of the population of an undisturbed run: one of converted leads, five of the others.
BATCHES = 6
#: Those of a run's claim, of the count of its tables and of the heartbeat after it.
COMMITS_BEFORE = 3

# What fails is tried again in the test that says so, and at no other test's expense.
pytestmark = pytest.mark.usefixtures("impatience")


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no try wait for long."""
    monkeypatch.setattr(retrying, "WAITS_BEFORE_ANOTHER_LOOK", (0.01, 0.01))
    monkeypatch.setattr(retrying, "MAX_RETRIES", MAX_TRIES)


@contextmanager
def when(
    place: str, numbers: Callable[[int], bool], happening: Callable[[Callable[[str], Any]], object]
) -> Iterator[None]:
    """Call `happening` just before statements that begin like `place`; numbered from 1 on. It is given a way to send
    a statement on the run's own connection."""
    count = 0

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        nonlocal count
        if statement_in(sql).startswith(place):
            count += 1
            if numbers(count):
                happening(lambda statement: execute(statement, None, False, context))  # noqa: FBT003 - Django's signature
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        yield
    assert count, "there was no such statement"


def failing_with(sqlstate: str) -> Callable[[Callable[[str], Any]], object]:
    """The server's own error, which quotes what it should not."""
    return lambda send: send(f"DO $$ BEGIN RAISE 'person-3@example.com' USING ERRCODE = '{sqlstate}'; END $$")


def third(number: int) -> bool:
    return number == 3


def retries_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "retrying the batch" in record.getMessage()
    ]


def halvings_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("batch size: ")]


def sizes_of_batches() -> list[int]:
    return [batch.read for batch in BackfillRun.objects.latest("id").batches.order_by("id")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sqlstate", CAUSES)
def test_a_transient_error_is_retried(database: Database, caplog: pytest.LogCaptureFixture, sqlstate: str) -> None:
    with as_an_undisturbed_run_ends(database):
        with when(INSERTS_CONTACTS, third, failing_with(sqlstate)):
            finished = backfill("--batch-size", str(BATCH_SIZE), "--no-progress", "--json")
        assert (finished.code, finished.answer["status"], finished.answer["balanced"]) == (1, "finished", True)
        (told,) = retries_told(caplog)
        assert told.startswith(f"{CAUSES[sqlstate]}: retrying the batch in ")
        assert "(retry 1 of 5)" in told
        if sqlstate in TOO_MANY_ROWS:
            assert halvings_told(caplog) == [
                f"batch size: {BATCH_SIZE} -> {BATCH_SIZE // 2} rows after {TOO_MANY_ROWS[sqlstate]}"
            ]
            assert BATCH_SIZE // 2 in sizes_of_batches()
        else:
            assert halvings_told(caplog) == []
    assert "person-3" not in caplog.text


@pytest.mark.sampled(2)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sqlstate", ["40P01", "57014"])
def test_wherever_in_a_batch_it_comes(database: Database, place: str, sqlstate: str) -> None:
    with as_an_undisturbed_run_ends(database):
        with when(place, third, failing_with(sqlstate)):
            answer = run(batch_size=BATCH_SIZE)
        assert (answer["status"], answer["balanced"]) == ("finished", True)


@pytest.mark.parametrize("place", PLACES)
def test_the_backends_of_a_run_are_terminated(database: Database, caplog: pytest.LogCaptureFixture, place: str) -> None:
    def terminate(_send: object) -> None:
        with session() as administrator:
            administrator.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE application_name = 'crm_backfill' AND datname = current_database()"
            )

    with as_an_undisturbed_run_ends(database):
        with when(place, third, terminate):
            answer = run(batch_size=BATCH_SIZE)
        assert (answer["status"], answer["balanced"]) == ("finished", True)
        told = retries_told(caplog)
        # The reader's connection, which was terminated as well, may need a try of its own.
        assert 1 <= len(told) <= 2
        assert {line.split(":")[0] for line in told} <= {"server shut down the connection", "connection lost"}


@contextmanager
def losing_the_answer_to_commit(number: int, lose: Callable[[Any], object]) -> Iterator[None]:
    """`lose` the commit of this number on the main thread's connection, which it is given; the claim's is the first."""
    wrapper_class = type(connections["default"])
    commit = wrapper_class.commit
    commits = 0

    def lose_the_answer(wrapper: Any) -> None:
        nonlocal commits
        commits += 1
        if commits != number:
            commit(wrapper)
            return
        lost, wrapper.connection = wrapper.connection, None
        lose(lost)
        raise OperationalError("server closed the connection unexpectedly")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper_class, "commit", lose_the_answer)
        yield
    assert commits >= number, "there was no such commit"


def commit_and_close(lost: psycopg.Connection) -> None:
    lost.commit()
    lost.close()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
def test_the_answer_to_a_commit_is_lost(database: Database, caplog: pytest.LogCaptureFixture, batch: int) -> None:
    with as_an_undisturbed_run_ends(database):
        with losing_the_answer_to_commit(COMMITS_BEFORE + batch, commit_and_close):
            answer = run(batch_size=BATCH_SIZE)
        assert (answer["status"], answer["balanced"]) == ("finished", True)
        assert answer["read"] == len(ledger())
        assert len(sizes_of_batches()) == BATCHES
        assert_nothing_was_tried_again(caplog)


@pytest.mark.parametrize("command", [backfill, rollback])
def test_a_run_fails_where_the_session_that_would_ask_after_its_commit_is_not_fit(
    database: Database, command: Callable[..., Finished]
) -> None:
    add_many_leads(2)
    arguments = ["--json"] if command is backfill else [str(run()["run"]), "--json"]

    def commit_and_be_refused(lost: psycopg.Connection) -> None:
        lost.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
        commit_and_close(lost)

    try:
        # A rollback sends no heartbeat before its batch.
        with losing_the_answer_to_commit(COMMITS_BEFORE + (command is backfill), commit_and_be_refused):
            ended = command(*arguments)
    finally:
        with session() as owner:
            owner.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
            owner.commit()
    assert (ended.code, ended.answer["status"]) == (5, "failed")
    assert ended.answer["failure"].startswith("it is not known whether the last transaction was committed")
    assert "Nothing was written" not in ended.stdout + ended.stderr
    assert len(contacts()) == (2 if command is backfill else 0)
    BackfillRun.objects.holding().update(**neighbour())
    assert run()["status"] == "finished"
    assert len(contacts()) == len(ledger()) == 2


@contextmanager
def a_commit_that_comes_through_late(number: int) -> Iterator[None]:
    """The commit of this number is given up for lost, and comes through when somebody has asked for it.

    As when the network is gone while the server waits for its standby.
    """
    committing: list[threading.Thread] = []

    def commit(lost: psycopg.Connection) -> None:
        asking = "SELECT FROM pg_stat_activity WHERE query LIKE 'SELECT pg_xact_status(%'"
        until = time.monotonic() + 20
        with session() as observer:
            observer.autocommit = True
            while observer.execute(asking).fetchone() is None and time.monotonic() < until:
                time.sleep(0.002)
        commit_and_close(lost)

    def lose(lost: psycopg.Connection) -> None:
        committing.append(threading.Thread(target=commit, args=(lost,)))
        committing[0].start()

    with losing_the_answer_to_commit(number, lose):
        yield
    committing[0].join()


@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
def test_a_commit_that_a_crash_lost_is_not_taken_for_the_one_that_got_its_number(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, batch: int
) -> None:
    # What the server says of the number after a crash: another transaction has it by then, and was committed.
    monkeypatch.setattr(transactions, "_STATUS", "SELECT 'committed' FROM (SELECT %s) AS number")
    with as_an_undisturbed_run_ends(database):
        with losing_the_answer_to_commit(COMMITS_BEFORE + batch, psycopg.Connection.close):
            answer = run(batch_size=BATCH_SIZE)
        assert (answer["status"], answer["balanced"]) == ("finished", True)
        assert len(retries_told(caplog)) == 1


def assert_nothing_was_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """The server was asked instead, and said that the commit had come through."""
    assert retries_told(caplog) == []
    assert (
        len([record for record in caplog.records if "during the commit, which succeeded" in record.getMessage()]) == 1
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
def test_a_commit_that_was_given_up_for_lost_comes_through_while_the_server_is_asked(
    database: Database, caplog: pytest.LogCaptureFixture, batch: int
) -> None:
    with as_an_undisturbed_run_ends(database):
        with a_commit_that_comes_through_late(COMMITS_BEFORE + batch):
            answer = run(batch_size=BATCH_SIZE)
        assert (answer["status"], answer["balanced"]) == ("finished", True)
        assert answer["read"] == len(ledger())
        assert_nothing_was_tried_again(caplog)


@pytest.fixture
def news(database: Database) -> tuple[list[int], Any]:
    """A population with news; the numbers of the commits of a second look's batches, and what it ends with."""
    populate_with_news()
    with labels() as sent:
        run(update=True, batch_size=BATCH_SIZE)
    commits = [number for number, label in enumerate(sent) if label == COMMIT]
    writes = [number for number, label in enumerate(sent) if label.startswith("INSERT INTO contact_update")]
    of_batches = [commits.index(sent.index(COMMIT, write)) + 1 for write in writes]
    end = after_a_second_look(database)
    database.empty()
    populate_with_news()
    return of_batches, end


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch", range(3))
@pytest.mark.parametrize("comes_late", [False, True])
def test_a_lost_commit_of_a_second_look_is_counted_once(
    database: Database,
    caplog: pytest.LogCaptureFixture,
    news: tuple[list[int], Any],
    batch: int,
    comes_late: bool,  # noqa: FBT001 - parametrized
) -> None:
    commits, end = news
    number = commits[batch]
    lost = (
        a_commit_that_comes_through_late(number)
        if comes_late
        else losing_the_answer_to_commit(number, commit_and_close)
    )
    with lost:
        answer = run(update=True, batch_size=BATCH_SIZE)
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert_nothing_was_tried_again(caplog)
    assert after_a_second_look(database) == end
    record = BackfillRun.objects.latest("id")
    for name in ("revisited", "updated", "kept", "unchanged", "updated_and_kept"):
        assert answer[name] == getattr(record, name) == sum(getattr(found, name) for found in record.batches.all())


def test_rows_that_change_nothing_are_counted_once_when_their_commit_comes_through_late(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_many_leads(BATCH_SIZE)
    run()
    database.rows("""UPDATE crm_contacts SET phone = 'own', "updatedAt" = now() RETURNING id""")
    database.rows("""UPDATE leads SET "updatedAt" = now() RETURNING id""")
    with a_commit_that_comes_through_late(COMMITS_BEFORE + 1):
        answer = run(update=True, batch_size=BATCH_SIZE)
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert (answer["revisited"], answer["kept"]) == (BATCH_SIZE, BATCH_SIZE)
    assert_nothing_was_tried_again(caplog)


def test_a_late_commit_of_errors_that_are_known_is_not_written_over(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(BATCH_SIZE):
        add_lead("not an address")
    run()
    with a_commit_that_comes_through_late(COMMITS_BEFORE + 1):
        answer = run(batch_size=BATCH_SIZE)
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert (answer["read"], answer["error"], answer["error_new"]) == (BATCH_SIZE, BATCH_SIZE, 0)
    assert_nothing_was_tried_again(caplog)


def test_a_lock_that_somebody_holds(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(context, "Timeouts", lambda: Timeouts(lock=50))
    with as_an_undisturbed_run_ends(database), session() as somebody:
        somebody.execute(
            'INSERT INTO public.crm_contacts (id, "contactType", "firstName", "lastName", email, "updatedAt") '
            "VALUES ('somebody', 'LEAD', '', '', 'person-25@example.com', %s)",
            [CREATED_AT],
        )

        def let_go(record: logging.LogRecord) -> bool:
            if record.getMessage().startswith("lock timeout"):
                somebody.rollback()
            return True

        logger = logging.getLogger("crm.runs.retrying")
        logger.addFilter(let_go)
        try:
            answer = run(batch_size=BATCH_SIZE)
        finally:
            logger.removeFilter(let_go)
        assert (answer["status"], answer["balanced"]) == ("finished", True)
        assert retries_told(caplog)[0].startswith("lock timeout: ")
        assert halvings_told(caplog)[0] == f"batch size: {BATCH_SIZE} -> {BATCH_SIZE // 2} rows after a timeout"


def test_a_batch_that_takes_too_long_is_halved_until_it_gets_through(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(context, "Timeouts", lambda: Timeouts(statement=500))
    database.change(
        """
        CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF (SELECT count(*) FROM new_rows) > 10 THEN PERFORM pg_sleep(30); END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER slow AFTER INSERT ON crm_contacts REFERENCING NEW TABLE AS new_rows
        FOR EACH STATEMENT EXECUTE FUNCTION public.slow()
        """
    )
    add_many_leads(40)
    answer = run(batch_size=40)
    assert (answer["status"], answer["created"]) == ("finished", 40)
    assert halvings_told(caplog)[:2] == [
        "batch size: 40 -> 20 rows after a timeout",
        "batch size: 20 -> 10 rows after a timeout",
    ]
    assert max(sizes_of_batches()) < 20


@pytest.mark.parametrize("sqlstate", ["40P01", "57014", "08006"])
def test_what_does_not_pass_ends_the_run_and_the_next_one_goes_on(
    database: Database, caplog: pytest.LogCaptureFixture, sqlstate: str
) -> None:
    with as_an_undisturbed_run_ends(database):
        with when(INSERTS_CONTACTS, lambda number: number >= 3, failing_with(sqlstate)):
            finished = backfill("--batch-size", str(BATCH_SIZE), "--no-progress", "--json")
        assert (finished.code, finished.answer["status"]) == (5, "failed")
        assert sqlstate in finished.answer["failure"]
        assert finished.stderr.count("\n") == 1
        assert finished.stderr.startswith(f"The run failed: {finished.answer['failure']}.")
        failed = BackfillRun.objects.get()
        assert (failed.status, failed.failure) == ("failed", finished.answer["failure"])
        assert 0 < failed.read == len(ledger()) < PEOPLE
        tries = [int(line.rpartition("(retry ")[2].split()[0]) for line in retries_told(caplog)]
        # A deadlock counts when there is one row left to be tried.
        halvings = math.floor(math.log2(BATCH_SIZE)) if sqlstate == "40P01" else 0
        assert tries == [1] * halvings + list(range(1, MAX_TRIES + 1))
        assert backfill("--batch-size", str(BATCH_SIZE), "--no-progress").code == 1, "the one row in error"
    assert "person-3" not in caplog.text + finished.stderr + finished.stdout


@pytest.mark.parametrize("update", [False, True])
def test_a_connection_that_is_lost_while_a_rate_is_waited_for_is_had_again(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    update: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    add_many_leads(6)
    kind = UpdateWriter if update else BatchWriter
    if update:
        run()
        database.rows('UPDATE leads SET "updatedAt" = now() RETURNING id')
    keep_alive = kind.keep_alive
    lost: list[int] = []

    def lose_it_once(writer: Any) -> None:
        if not lost:
            lost.append(connection.connection.info.backend_pid)
            with session() as administrator:
                administrator.execute("SELECT pg_terminate_backend(%s, 5000)", lost)
        keep_alive(writer)

    monkeypatch.setattr(kind, "keep_alive", lose_it_once)
    monkeypatch.setattr(retrying, "MAX_RETRIES", 5)
    # However long a batch takes here, there is something to wait for.
    pauses = [Pause("a rate", 0)]
    monkeypatch.setattr(RateLimit, "wait_reason", lambda *_: pauses.pop() if pauses else None)
    answer = run(batch_size=2, max_rate=1_000, update=update)
    assert lost
    assert (answer["status"], answer["balanced"], len(contacts())) == ("finished", True, 6)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["backfill", "rollback"])
def test_a_connection_that_is_lost_before_a_run_has_begun(database: Database, name: str) -> None:
    add_many_leads(3)
    number = 0

    def start() -> Finished:
        return rollback(str(number), "--json") if name == "rollback" else backfill("--json", "--no-progress")

    def make_something_to_do() -> None:
        nonlocal number
        number = run()["run"]
        if name == "backfill":
            database.rows("DELETE FROM ledger_entry RETURNING id")

    make_something_to_do()
    with labels() as sent:
        assert start().code == 0
    make_something_to_do()
    before = database.dump()
    for statement in range(1, 2 + sent.index(COMMIT), every(3)):
        with terminated_at(statement):
            finished = start()
        assert (finished.code, finished.stdout) == (5, ""), sent[statement - 1]
        assert finished.stderr.count("\n") == 1
        assert "Database error at the start: OperationalError" in finished.stderr
        assert database.dump() == before
    assert start().code == 0


def test_tries_are_counted_for_each_batch_anew(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    add_many_leads(PEOPLE)
    with when(INSERTS_CONTACTS, lambda number: number % 4 != 0, failing_with("40001")):
        assert run(batch_size=BATCH_SIZE)["status"] == "finished"
    assert len(retries_told(caplog)) == 3 * PEOPLE // BATCH_SIZE
    assert len(contacts()) == PEOPLE


def test_an_error_that_is_nobodys_fault_is_not_tried_again(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_many_leads(PEOPLE)
    with when(INSERTS_CONTACTS, third, failing_with("42501")):
        answer = run(batch_size=BATCH_SIZE)
    assert (answer["status"], retries_told(caplog)) == ("failed", [])
    assert "42501" in answer["failure"]
    assert run(batch_size=BATCH_SIZE)["created"] == PEOPLE - 2 * BATCH_SIZE


def test_a_worker_that_fails_makes_the_run_a_failed_one_though_the_others_are_merely_stopped(
    database: Database,
) -> None:
    database.change(
        """
        CREATE FUNCTION public.deadlocked() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.email = 'person-1@example.com' THEN RAISE 'no' USING ERRCODE = '40P01'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER deadlocked BEFORE INSERT ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.deadlocked()
        """
    )
    add_many_leads(1000)
    finished = backfill("--workers", "2", "--batch-size", "5", "--no-progress", "--json")
    assert (finished.code, finished.answer["status"]) == (5, "failed")
    assert "40P01" in finished.answer["failure"]
    database.change("DROP FUNCTION public.deadlocked() CASCADE")
    assert backfill("--workers", "2", "--no-progress").code == 0
    assert len(contacts()) == 1000


@pytest.mark.parametrize("look", ["take_inventory", "count_rows"])
def test_a_connection_that_is_lost_while_the_rows_are_counted_is_made_anew(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, look: str
) -> None:
    counted = getattr(runner, look)
    is_lost = False

    def lose_it_once(*arguments: Any, **options: Any) -> Any:
        nonlocal is_lost
        if not is_lost:
            is_lost = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return counted(*arguments, **options)

    monkeypatch.setattr(runner, look, lose_it_once)
    add_many_leads(10)
    answer = run()
    assert (answer["status"], answer["created"], answer["balanced"]) == ("finished", 10, True)
    assert any(": retrying in " in record.message for record in caplog.records)

"""Ctrl-C and SIGTERM: the batch is ended, the run is closed, the next one goes on. A second one stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.conf import settings
from django.db import connection

from config import embedded
from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.runs.progress import Silence
from tests.conftest import Database
from tests.support.builders import CREATED_AT, add_many_leads, contacts, ledger
from tests.support.circumstances import CONTACTS, COUNTS, in_batch
from tests.support.commands import Finished, backfill, run
from tests.support.processes import Command, database_url, start, wait_until
from tests.support.undisturbed import BATCH_SIZE, PEOPLE, as_an_undisturbed_run_ends, populate_five_batches

every_signal = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def send(number: int, times: int = 1) -> Callable[[], None]:
    def to_this_process() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return to_this_process


def the_run() -> BackfillRun:
    return BackfillRun.objects.order_by("id")[0]


# In this process, where the moment is exact


@pytest.mark.sampled(2)
@every_signal
@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_is_ended_and_the_next_run_goes_on(database: Database, number: int, batch: int) -> None:
    with as_an_undisturbed_run_ends(database):
        with in_batch(batch, send(number)):
            finished = backfill("--batch-size", str(BATCH_SIZE), "--no-progress")
        assert finished.code == 4
        assert "Committed batches stay; run the command again to continue." in finished.stderr
        interrupted = the_run()
        assert (interrupted.status, interrupted.failure, interrupted.balanced) == (RunStatus.INTERRUPTED, None, True)
        assert interrupted.finished_at is not None
        assert interrupted.read == len(ledger()) == database.rows("SELECT sum(read) FROM backfill_batch")[0][0] > 0
        assert interrupted.batches.count() == batch
        assert backfill("--batch-size", str(BATCH_SIZE)).code == 1, "the one row in error is new"


@pytest.mark.sampled(2)
@every_signal
@pytest.mark.parametrize("after", [CONTACTS, COUNTS])
def test_a_second_signal_stops_at_once_and_nothing_of_the_open_batch_is_written(
    database: Database, number: int, after: str
) -> None:
    with as_an_undisturbed_run_ends(database):
        with in_batch(3, send(number, times=2), after=after):
            finished = backfill("--batch-size", str(BATCH_SIZE), "--no-progress")
        assert finished.code == 4
        assert "run the command again to continue" in finished.stderr
        interrupted = the_run()
        assert (interrupted.status, interrupted.balanced) == (RunStatus.INTERRUPTED, True)
        assert "rolled back" in (interrupted.failure or "")
        assert interrupted.batches.count() == 2
        assert interrupted.read == len(ledger())
        backfill()


def test_json_tells_of_an_interruption(database: Database) -> None:
    populate_five_batches()
    with in_batch(2, send(signal.SIGINT)):
        finished = backfill("--batch-size", str(BATCH_SIZE), "--json", "--no-progress")
    said = "The run was interrupted. Committed batches stay; run the command again to continue.\n"
    assert (finished.code, finished.stderr) == (4, said)
    assert (finished.answer["status"], finished.answer["balanced"]) == ("interrupted", True)
    assert finished.answer["read"] == len(ledger())


def test_a_dry_run_is_interrupted_too(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    populate_five_batches()
    before = database.dump()
    monkeypatch.setattr(Silence, "advance", lambda *_: send(signal.SIGINT)())
    finished = backfill("--dry-run", "--batch-size", str(BATCH_SIZE), "--json", "--no-progress")
    assert (finished.code, finished.answer["status"]) == (4, "interrupted")
    assert database.dump() == before


def test_a_signal_in_the_last_batch_leaves_nothing_to_do(database: Database) -> None:
    add_many_leads(BATCH_SIZE)
    with in_batch(1, send(signal.SIGTERM)):
        backfill("--batch-size", str(BATCH_SIZE))
    assert len(contacts()) == BATCH_SIZE
    assert run()["read"] == 0


@every_signal
def test_signals_mean_what_they_meant_before_once_the_run_is_over(database: Database, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    add_many_leads(1)
    backfill()
    assert signal.getsignal(number) is before


@pytest.fixture
def hangup() -> Iterator[Callable[[Any], None]]:
    """Sets what SIGHUP does when a command starts."""
    before = signal.getsignal(signal.SIGHUP)

    def do(handler: Any) -> None:
        signal.signal(signal.SIGHUP, handler)

    yield do
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 4), (signal.SIG_IGN, 0)])
def test_a_terminal_that_is_gone_ends_a_run_with_its_batch_unless_nohup_was_asked_for(
    database: Database, hangup: Callable[[Any], None], handler: signal.Handlers, code: int
) -> None:
    hangup(handler)
    add_many_leads(3 * BATCH_SIZE)
    with in_batch(1, send(signal.SIGHUP)):
        assert backfill("--batch-size", str(BATCH_SIZE), "--no-progress").code == code
    assert the_run().batches.count() == (1 if code else 3)
    assert signal.getsignal(signal.SIGHUP) == handler
    backfill()
    assert len(contacts()) == 3 * BATCH_SIZE


# In a process of its own, as an operator meets it


@contextmanager
def held_up_in_batch_3(database: Database) -> Iterator[tuple[Command, psycopg.Connection]]:
    """The real command, whose third batch waits for somebody who has not committed yet."""
    add_many_leads(PEOPLE)
    address = embedded.start(settings.EMBEDDED_DATA)
    name = connection.settings_dict["NAME"]
    somebody = psycopg.connect(host=address.host, port=address.port, user=embedded.USER, dbname=name)
    somebody.execute(
        'INSERT INTO public.crm_contacts (id, "contactType", "firstName", "lastName", email, "updatedAt") '
        "VALUES ('somebody', 'LEAD', '', '', 'person-25@example.com', %s)",
        [CREATED_AT],
    )
    arguments = ("backfill_crm_contacts", "--batch-size", str(BATCH_SIZE), "--no-progress")
    command = start(*arguments, url=database_url())
    try:
        wait_until(lambda: is_waiting_for_a_lock(database))
        yield command, somebody
    finally:
        command.kill()
        command.communicate()
        somebody.close()


def is_waiting_for_a_lock(database: Database) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%INSERT INTO%%'"
    return bool(database.rows(query))


def ended(command: Command) -> Finished:
    stdout, stderr = command.communicate(timeout=20)
    return Finished(command.returncode, stdout, stderr)


@pytest.mark.sampled(2)
@pytest.mark.process
@every_signal
def test_the_real_command_ends_its_batch(database: Database, number: signal.Signals) -> None:
    with held_up_in_batch_3(database) as (command, somebody):
        command.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.3)
        somebody.rollback()
        finished = ended(command)
    assert finished.code == 4
    assert "run the command again to continue" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert (the_run().status, the_run().created) == (RunStatus.INTERRUPTED, 3 * BATCH_SIZE)
    assert len(contacts()) == len(ledger()) == 3 * BATCH_SIZE
    assert backfill().code == 0
    assert len(contacts()) == len(ledger()) == PEOPLE


@pytest.mark.sampled(2)
@pytest.mark.process
@every_signal
def test_the_real_command_stops_at_once_when_asked_twice(database: Database, number: signal.Signals) -> None:
    with held_up_in_batch_3(database) as (command, somebody):
        command.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.3)
        command.send_signal(number)
        finished = ended(command)
        somebody.rollback()
    assert finished.code == 4
    assert "run the command again to continue" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert (the_run().status, the_run().created) == (RunStatus.INTERRUPTED, 2 * BATCH_SIZE)
    assert len(contacts()) == len(ledger()) == 2 * BATCH_SIZE
    assert backfill().code == 0
    assert len(contacts()) == len(ledger()) == PEOPLE

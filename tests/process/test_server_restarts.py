"""The server crashes and comes back in the middle of a run: nothing that it had committed is lost, nothing is doubled.

It is a server of these tests' own; nobody else's is stopped.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.core.management import call_command

from config import embedded
from crm.models import BackfillRun
from crm.runs import retrying
from tests.conftest import Database
from tests.support.circumstances import CONTACTS, COUNTS, passable_folder
from tests.support.commands import backfill, run
from tests.support.forks import Mishap, ended, fork, labels_are_watched
from tests.support.processes import wait_until
from tests.support.scratch import as_the_default
from tests.support.undisturbed import BATCH_SIZE, SEED, SIZED, Undisturbed, populate

pytestmark = pytest.mark.process

MOMENTS = 3
MAX_TRIES = 5
#: The tries that a run has, and the first wait; the other tests do not wait.
FIRST_WAIT = 0.5
LEDGER = "INSERT INTO ledger_entry"


class Server:
    """A server that may crash."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._server = embedded._server(data)
        self.address = embedded.start(data)

    @property
    def url(self) -> str:
        """Its database as an operator would write it."""
        host = quote(self.address.host, safe="")
        return f"postgresql://{embedded.USER}@localhost:{self.address.port}/{embedded.DATABASE_NAME}?host={host}"

    def crash(self) -> None:
        """Stop it in immediate mode: no checkpoint, no word to anybody; it recovers from its log when it starts."""
        lock = self._data / "postmaster.pid"
        # What pg_ctl sends; it then takes a postmaster for alive until somebody has buried it.
        os.kill(int(lock.read_text().split()[0]), signal.SIGQUIT)
        wait_until(lambda: not lock.exists())

    def start(self) -> None:
        """Start it again, as soon as the last process of the one that crashed has let go of its memory."""
        wait_until(self._starts)

    def _starts(self) -> bool:
        try:
            self._server.ensure_postgres_running()
        except subprocess.CalledProcessError:
            return False
        return True

    def restart(self, _command: int = 0) -> None:
        """Crash, and start again."""
        self.crash()
        self.start()


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server with the tables of everybody in its database."""
    with passable_folder() as folder:
        server = Server(folder / "data")
        yield server
        server.start()
        embedded.stop(folder / "data")
        # At the end of the tests there is no folder any more that it could look into.
        atexit.unregister(server._server._cleanup)


@pytest.fixture
def crashing(database: Database, own_server: Server) -> Iterator[tuple[Server, Database]]:
    """The server, and its database in the place of that of the other tests."""
    own_server.start()
    with as_the_default(own_server.url):
        call_command("migrate", verbosity=0)
        own = Database()
        own.empty()
        yield own_server, own


@contextmanager
def starting_at_try(number: int, server: Server) -> Iterator[list[str]]:
    """Start the server when a batch is about to be tried for the so manieth time; the causes of all tries."""
    causes: list[str] = []

    def heed(record: logging.LogRecord) -> bool:
        if "retrying the batch" in record.getMessage():
            causes.append(record.getMessage().split(":")[0])
            if len(causes) == number:
                server.start()
        return True

    logger = logging.getLogger("crm.runs.retrying")
    logger.addFilter(heed)
    try:
        yield causes
    finally:
        logger.removeFilter(heed)


@contextmanager
def crashing_at(place: str, server: Server) -> Iterator[None]:
    """Crash before the third statement that begins like this."""
    count = 0

    def watch(label: str, send: Callable[[], Any]) -> Any:
        nonlocal count
        if label.startswith(place):
            count += 1
            if count == 3:
                server.crash()
        return send()

    with labels_are_watched(watch):
        yield
    assert count > 3, "it went on"


@pytest.mark.parametrize("tries", [1, pytest.param(MAX_TRIES, marks=pytest.mark.soak)])
@pytest.mark.parametrize("place", ["SET LOCAL", CONTACTS, LEDGER, COUNTS])
def test_a_crash_is_waited_for_as_long_as_there_are_tries(
    crashing: tuple[Server, Database], monkeypatch: pytest.MonkeyPatch, place: str, tries: int
) -> None:
    server, database = crashing
    monkeypatch.setattr(retrying, "MAX_RETRIES", MAX_TRIES)
    populate()
    undisturbed = Undisturbed(database)
    with crashing_at(place, server), starting_at_try(tries, server) as causes:
        finished = backfill(*SIZED, "--json")
    assert (finished.code, finished.answer["status"], finished.answer["balanced"]) == (1, "finished", True)
    # The reader's connection, which was lost as well, may need a try of its own.
    assert tries <= len(causes) <= max(2, tries)
    assert set(causes) <= {"connection lost", "server shut down the connection", "server crashed"}
    assert BackfillRun.objects.count() == 1
    undisturbed.assert_reached()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_goes_on_after_restarts_with_the_waits_that_it_has(
    crashing: tuple[Server, Database], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    server, database = crashing
    monkeypatch.setattr(retrying, "FIRST_WAIT", FIRST_WAIT)
    populate()
    undisturbed = Undisturbed(database)
    first, last = undisturbed.batches()
    chance = random.Random(SEED)  # noqa: S311 - the same moments in every run of the tests
    for number in range(MOMENTS):
        step = (last - first) / MOMENTS
        statement = first + round(step * (number + chance.random()))
        mishap = Mishap(statement=statement, happening=server.restart)
        process = fork(*SIZED, "--workers", str(workers), prepare=mishap.prepare)
        assert ended(process) == 1, "the rows in error are new"
        assert mishap.came
        assert [run.status for run in BackfillRun.objects.all()] == ["finished"]
        undisturbed.assert_reached()
        undisturbed.reset()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("is_at_its_end", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_stays_away_ends_the_run_and_the_next_one_goes_on(
    crashing: tuple[Server, Database],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    workers: int,
    is_at_its_end: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    server, database = crashing
    monkeypatch.setattr(retrying, "MAX_RETRIES", 2)
    populate()
    undisturbed = Undisturbed(database)
    first, last = undisturbed.batches()
    printed = tmp_path / "printed"
    statement = last + 1 if is_at_its_end else (first + last) // 2
    mishap = Mishap(statement=statement, happening=lambda _command: server.crash())
    process = fork(*SIZED, "--workers", str(workers), prepare=mishap.prepare, printed=printed)
    assert ended(process) == 5
    assert "The run failed: " in printed.read_text()
    assert "Traceback" not in printed.read_text()
    server.start()
    assert [run.status for run in BackfillRun.objects.all()] == ["running"], "nobody could write down how it ended"
    answer = run(batch_size=BATCH_SIZE)
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert answer["already"] > 0
    assert answer["read"] > 0, "what was in error, at the least"
    assert [run.status for run in BackfillRun.objects.order_by("id")] == ["interrupted", "finished"]
    undisturbed.assert_reached()

"""Several workers: one that dies is noticed and its partition taken up again, and there are as many as there may be."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_django import Settings

from crm.backfill.mapping import MappedRow
from crm.backfill.outcome import Source, Totals
from crm.backfill.workers import MOST_REPLACEMENTS, most_workers
from crm.backfill.writer import BatchWriter
from crm.models import BackfillRun
from tests.builders import add_many_leads, add_profile, ledger
from tests.commands import backfill, run
from tests.conftest import Database
from tests.processes import session

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
    assert caplog.text.count("its partition is taken up again") == 1


@pytest.mark.process
def test_a_run_whose_workers_keep_dying_ends_and_the_next_one_goes_on(
    database: Database, dying: Callable[[int, Callable[..., Totals]], None]
) -> None:
    add_many_leads(40)
    dying(MOST_REPLACEMENTS + 1, killed_before)
    ended = backfill("--workers", "2", "--batch-size", "5", "--json")
    assert (ended.code, ended.answer["status"], ended.answer["failure"]) == (5, "failed", "workers kept dying")
    assert BackfillRun.objects.holding().count() == 0
    assert run(workers=2)["status"] == "finished"
    assert len(ledger()) == 40


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
    assert most_workers() == most


def test_auto_needs_no_more_connections_than_the_server_has_left(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: MANY_CORES)
    alone = most_workers()
    ((connections,),) = database.rows("SELECT current_setting('max_connections')::int")
    assert 1 <= alone < connections / 2
    with ExitStack() as sessions:
        for _ in range(20):
            sessions.enter_context(session())
        assert most_workers() == alone - 10

"""What is read ahead: every row once and in order, whatever batches become; and no transaction waits long for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from django.db import connection
from django.db.backends.signals import connection_created

from crm.backfill.read import readahead
from crm.backfill.read.readahead import ReadAhead, ReadingThread
from crm.backfill.read.source import Key, Page, SourceReader
from crm.models import BackfillRun, LedgerEntry
from crm.outcome import Source
from crm.postgres.facts.schema import examine
from crm.rollback.ahead import PagesAhead
from crm.rollback.reader import Reader
from crm.rollback.runner import roll_back
from crm.rules.entry import Entry
from tests.conftest import Database
from tests.support.builders import add_lead, add_many_leads
from tests.support.commands import run


@contextmanager
def ahead(database: Database) -> Iterator[ReadAhead]:
    facts = examine(connection, for_writing=False)
    reader = SourceReader(connection, facts, Source.ACTIVE_LEADS)
    with ReadingThread(connection) as thread, ReadAhead(reader, facts.rules(), thread) as reading:
        yield reading


@contextmanager
def connected(note: Callable[[], object]) -> Iterator[None]:
    """`note` is called for every connection that is made."""

    def receive(**_signal: object) -> None:
        note()

    connection_created.connect(receive)
    try:
        yield
    finally:
        connection_created.disconnect(receive)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the pages that are asked for."""
    sizes: list[int] = []
    page = SourceReader.page

    def noting(self: SourceReader, after: Key | None, size: int, most_new: int | None = None) -> Page:
        sizes.append(size)
        return page(self, after, size, most_new)

    monkeypatch.setattr(SourceReader, "page", noting)
    return sizes


def taken(reading: ReadAhead, after: Key | None, rows: int) -> tuple[list[int], Key | None]:
    """The sizes of the pages of a batch, and the key to go on after."""
    sizes: list[int] = []
    for page in reading.pages(after, rows):
        sizes.append(len(page.rows))
        after = page.key
    return sizes, after


def test_a_batch_comes_in_pages(database: Database, monkeypatch: pytest.MonkeyPatch, reads: list[int]) -> None:
    monkeypatch.setattr(readahead, "PAGE_ROWS", 4)
    add_many_leads(17)
    with ahead(database) as reading:
        first, key = taken(reading, None, 10)
        second, key = taken(reading, key, 10)
        third, key = taken(reading, key, 10)
    assert (first, second, third) == ([4, 4, 2], [4, 3], [])
    # Nothing is read after the last page.
    assert reads == [4, 4, 2, 4, 4]


def test_a_batch_that_has_become_larger_takes_what_was_read_for_it(database: Database, reads: list[int]) -> None:
    add_many_leads(30)
    with ahead(database) as reading:
        first, key = taken(reading, None, 5)
        second, key = taken(reading, key, 15)
    assert (first, second) == ([5], [5, 10])
    # Whether what nobody waits for any more was begun is a matter of chance.
    assert reads[:3] == [5, 5, 10]


def test_a_batch_that_has_become_smaller_reads_anew(database: Database) -> None:
    add_many_leads(30)
    with ahead(database) as reading:
        first, key = taken(reading, None, 20)
        second, _ = taken(reading, key, 5)
    assert (first, second) == ([20], [5])


def test_a_batch_ends_early_rather_than_wait_for_a_page_that_does_not_come(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "PAGE_ROWS", 4)
    monkeypatch.setattr(readahead, "MAX_WAIT", 0.01)
    add_many_leads(12)
    may_go_on = threading.Event()
    page = SourceReader.page

    def held_up(self: SourceReader, after: Key | None, size: int, most_new: int | None = None) -> Page:
        if after is not None:
            assert may_go_on.wait(60)
        return page(self, after, size, most_new)

    monkeypatch.setattr(SourceReader, "page", held_up)
    with ahead(database) as reading:
        first, key = taken(reading, None, 12)
        may_go_on.set()
        monkeypatch.setattr(readahead, "MAX_WAIT", 60)
        rest, _ = taken(reading, key, 12)
    assert (first, rest) == ([4], [4, 4])


@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"update": True}], ids=str)
def test_a_run_and_its_rollback_make_no_second_connection_where_every_source_has_one_page(
    database: Database, options: dict[str, bool]
) -> None:
    add_many_leads(12)
    add_lead("first@example.com", "CONVERTED")
    connection.ensure_connection()
    made: list[object] = []
    with connected(lambda: made.append(1)):
        report = run(**options)
        if report["run"] is not None:
            roll_back(report["run"], dry_run=False)
    assert report["created"] == 13
    assert not made


def test_a_rollback_takes_a_smaller_page_that_was_read_ahead_and_no_larger_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_many_leads(12)
    made = BackfillRun.objects.get(pk=run()["run"])
    reads: list[int] = []
    page = Reader.page

    def noting(self: Reader, after: str, size: int) -> list[Entry]:
        reads.append(size)
        return page(self, after, size)

    monkeypatch.setattr(Reader, "page", noting)
    facts = examine(connection, for_writing=False)
    with ReadingThread(connection) as thread:
        pages = PagesAhead(Reader.of(connection, facts, made), thread)
        sizes, ids, after = [], [], ""
        for size in (2, 4, 4, 1, 9, 9, 9):
            entries = pages.page(after, size).entries
            sizes.append(len(entries))
            ids += [entry.id for entry in entries]
            after = ids[-1]
    assert sizes == [2, 2, 4, 1, 1, 2, 0]
    assert ids == sorted(LedgerEntry.objects.values_list("pk", flat=True))
    # One that is too large is left, nothing is read ahead of the last page, and at the end it is made sure that there
    # is nothing.
    assert reads == [2, 2, 4, 4, 1, 1, 9, 9]

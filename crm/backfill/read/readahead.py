"""Reads and maps the next page in a thread, with its own connection, while the current page is written.

The first page of a source is read before anything is written, so it needs neither. A run with few rows has one page a
source, and makes no second connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Self, TypeVar

from django.db import Error as DjangoDatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.source import Key, SourceReader
from crm.rules.mapping import MappedRow, Rules, map_rows, unmapped

#: What is read, inserted and held in memory at once, however many rows commit together. More are no faster.
PAGE_ROWS = 5_000
#: How long a transaction may wait for its next page; seconds. Where connections are scarce, the page may be waiting for
#: the very connection that the transaction holds.
MAX_WAIT = 1.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class MappedPage:
    """Rows that were read together, mapped; the key to go on after; and whether there are no more."""

    rows: list[MappedRow]
    key: Key | None
    is_last: bool

    @property
    def new_rows(self) -> int:
        """Rows that no run has looked at."""
        return sum(row.known_reason is None for row in self.rows)


class ReadingThread:
    """A thread that reads for another one, on a connection of its own. It starts when it is first asked.

    Used as a context manager, it is gone afterwards, and its connection with it.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        """`connection` is Django's own name for it, which means another connection in every thread."""
        self._connection = connection
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)

    def ask(self, read: Callable[..., Answer], *arguments: object) -> Future[Answer]:
        """Let it read, after what it was asked for before."""
        return self._thread.submit(self._read, read, *arguments)

    def _read(self, read: Callable[..., Answer], *arguments: object) -> Answer:
        try:
            return read(*arguments)
        except DjangoDatabaseError:
            # Whatever is wrong with the connection, the next try begins with a fresh one.
            self._close()
            raise

    def _close(self) -> None:
        # Only here does the name mean the connection of this thread.
        self._connection.close()


class ReadAhead:
    """Hands out a source page by page. The page that comes next is being read meanwhile."""

    def __init__(self, reader: SourceReader, rules: Rules, thread: ReadingThread) -> None:
        self._reader = reader
        self._rules = rules
        self._thread = thread
        self._asked: tuple[Key | None, int, int | None] | None = None
        self._coming: Future[MappedPage] | None = None
        self._end: Key | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let nothing be read any more that nobody waits for."""
        if self._coming is not None and not self._coming.cancel():
            wait([self._coming])

    def pages(self, after: Key | None, rows: int, new_rows: int | None = None) -> Iterator[MappedPage]:
        """The pages of a batch of at most so many rows, and so many that no run has looked at, from after a key on.

        None when the source is at its end. A batch ends early rather than let its transaction wait long for a page.
        Raises what the reading raised.
        """
        left = rows
        timeout = None
        while left and new_rows != 0 and (after is None or after != self._end):
            page = self._page(after, min(left, PAGE_ROWS), new_rows, timeout)
            if page is None or not page.rows:
                return
            left -= len(page.rows)
            after, timeout = page.key, MAX_WAIT
            if new_rows is not None:
                new_rows -= page.new_rows
            if page.is_last:
                self._end = page.key
            elif new_rows != 0:
                self._ask(after, min(left or rows, PAGE_ROWS), new_rows)
            yield page

    def ask_the_ledger(self) -> None:
        """Ask the ledger about every row from now on: something of what was read may be settled by now."""
        self._reader = self._reader.asking_the_ledger()
        self._asked = self._coming = None

    def _page(self, after: Key | None, size: int, new_rows: int | None, timeout: float | None) -> MappedPage | None:
        """A page; None when it does not come within so many seconds. It can be asked for again then."""
        coming, asked = self._coming, self._asked
        # A batch may have become larger since, which is no reason to read its first rows again.
        if coming is None or asked is None or asked[0] != after or asked[1] > size or asked[2] != new_rows:
            if timeout is None:
                return self._read(after, size, new_rows)
            coming = self._ask(after, size, new_rows)
        if timeout is not None and not wait([coming], timeout).done:
            return None
        self._coming = None
        return coming.result()

    def _ask(self, after: Key | None, size: int, new_rows: int | None) -> Future[MappedPage]:
        self._asked = (after, size, new_rows)
        self._coming = self._thread.ask(self._read, after, size, new_rows)
        return self._coming

    def _read(self, after: Key | None, size: int, new_rows: int | None) -> MappedPage:
        page = self._reader.page(after, size, new_rows)
        source = self._reader.source
        rows = map_rows(source, page.rows, self._rules)
        rows += [unmapped(source.table, *fault) for fault in page.faults]
        return MappedPage(rows, page.key, page.is_last)

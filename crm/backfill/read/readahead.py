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

#: The number of rows that are read, inserted and in memory at once, whatever the batch size. More are not faster.
PAGE_ROWS = 5_000
#: The maximum time in seconds that a transaction waits for its next page. If connections are scarce, the page may be
#: waiting for the connection that the transaction has.
MAX_WAIT = 1.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class MappedPage:
    """Mapped rows that were read together, and the key after which the next page begins."""

    rows: list[MappedRow]
    key: Key | None
    is_last: bool

    @property
    def new_rows(self) -> int:
        """The number of rows that no run has read."""
        return sum(row.known_reason is None for row in self.rows)


class ReadingThread:
    """A thread that reads for another one, on its own connection. It starts at the first call of `ask`.

    The context manager ends the thread and closes its connection.
    """

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        """Create the thread. `connection` is Django's proxy, which is another connection in each thread."""
        self._connection = connection
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)

    def ask(self, read: Callable[..., Answer], *arguments: object) -> Future[Answer]:
        """Call `read` on the thread, after earlier calls."""
        return self._thread.submit(self._read, read, *arguments)

    def _read(self, read: Callable[..., Answer], *arguments: object) -> Answer:
        try:
            return read(*arguments)
        except DjangoDatabaseError:
            # The next call gets a new connection, whatever is wrong with this one.
            self._close()
            raise

    def _close(self) -> None:
        # The proxy refers to the connection of this thread only when used on it.
        self._connection.close()


class ReadAhead:
    """Yields a source page by page, and reads the next page meanwhile."""

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
        """Cancel the read of the next page, or wait for its end."""
        if self._coming is not None and not self._coming.cancel():
            wait([self._coming])

    def pages(self, after: Key | None, rows: int, new_rows: int | None = None) -> Iterator[MappedPage]:
        """Yield the pages of a batch after a key: at most `rows` rows, and at most `new_rows` that no run has read.

        Yields nothing at the end of the source. A batch ends early if its transaction would wait longer than MAX_WAIT
        for a page. Raises the errors of reading.
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
        """Read the ledger entry of every row from now on, because rows that were read may be migrated meanwhile."""
        self._reader = self._reader.asking_the_ledger()
        self._asked = None

    def _page(self, after: Key | None, size: int, new_rows: int | None, timeout: float | None) -> MappedPage | None:
        """Return a page, or None if it is not read within `timeout` seconds. Then it can be requested again."""
        coming, asked = self._coming, self._asked
        # If the batch size has grown since, the rows that were read are used.
        if coming is None or asked is None or asked[0] != after or asked[1] > size or asked[2] != new_rows:
            # A page that is no longer wanted may still be read, with the same reader.
            if timeout is None and (coming is None or coming.done() or coming.cancel()):
                self._coming = self._asked = None
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

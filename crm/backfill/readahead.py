"""While the server works on one batch, the next one is read and mapped, on a thread and a connection of its own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from django.db import Error as DjangoDatabaseError

from crm.backfill.mapping import MappedRow, Rules, map_rows
from crm.backfill.source import Key, SourceReader


@dataclass(frozen=True, slots=True)
class MappedPage:
    """A batch, mapped, and the key to go on after; no rows when the source is at its end."""

    rows: list[MappedRow]
    key: Key | None


class ReadAhead:
    """Hands out the batches of a source. The batch that was asked for ahead is being read meanwhile."""

    def __init__(self, reader: SourceReader, rules: Rules) -> None:
        self._reader = reader
        self._rules = rules
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._asked: tuple[Key | None, int] | None = None
        self._coming: Future[MappedPage] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)

    def page(self, after: Key | None, size: int) -> MappedPage:
        """The batch after a key. Raises what the reading of it raised."""
        coming, asked = self._coming, self._asked
        self._coming = None
        if coming is not None and asked == (after, size):
            return coming.result()
        return self._thread.submit(self._read, after, size).result()

    def ask(self, after: Key | None, size: int) -> None:
        """Begin to read the batch after a key."""
        self._asked = (after, size)
        self._coming = self._thread.submit(self._read, after, size)

    def _close(self) -> None:
        # Django gives every thread a connection of its own, which only that thread can close.
        self._reader.connection.close()

    def _read(self, after: Key | None, size: int) -> MappedPage:
        try:
            page = self._reader.page(after, size)
        except DjangoDatabaseError:
            # Whatever is wrong with it, the next try begins with a fresh one.
            self._close()
            raise
        return MappedPage(map_rows(self._reader.source, page.rows, self._rules), page.key)

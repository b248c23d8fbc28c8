"""Reads the next page of entries and their source rows in a thread while the current page is undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from django.db import Error as DjangoDatabaseError

from crm.backfill.read.readahead import ReadingThread
from crm.backfill.read.referrers import Referrers
from crm.outcome import Outcome
from crm.rollback.reader import Reader
from crm.rules.entry import Entry
from crm.rules.reverting import SourceRow


@dataclass(frozen=True, slots=True)
class Page:
    """Entries that are undone together, and their source rows by entry id. False if there are no entries.

    `is_last` means that the run has no more entries.
    """

    entries: Sequence[Entry]
    source_rows: Mapping[str, SourceRow] = field(default_factory=dict)
    is_last: bool = False

    def __bool__(self) -> bool:
        return bool(self.entries)

    def rows_of(self, entries: Mapping[str, Entry]) -> dict[str, SourceRow]:
        """Return the source rows of the given entries by entry id, if they were read as rows of the same source.

        A row that changed its source since, and was revisited, must be read again as a row of the new source.
        """
        return {
            entry.id: self.source_rows[entry.id]
            for entry in self.entries
            if entry.id in entries and entry.id in self.source_rows and entries[entry.id].source == entry.source
        }

    def without(self, gone: set[str]) -> Page:
        """Return the page without the entries that have one of these ids."""
        return replace(self, entries=[entry for entry in self.entries if entry.id not in gone])


class PagesAhead:
    """Returns the entries of a run page by page, and reads one page ahead.

    Only entries and source rows are read ahead, because a rollback changes neither, except for the entries that it
    deletes, which it passes to `note_deleted`. Contacts are read when their page is undone.
    """

    def __init__(self, reader: Reader, thread: ReadingThread) -> None:
        self._reader = reader
        # Both threads read at the same time: each keeps the referrers that it has looked up.
        self._reader_of_thread = replace(reader, referrers=Referrers())
        self._thread = thread
        self._asked: tuple[str, int] | None = None
        self._coming: Future[Page] | None = None
        self._gone: set[str] = set()

    def page(self, after: str, size: int) -> Page:
        """Return at most `size` entries in the order of their ids, those after the id `after`; empty at the end.

        Raises django.db.Error if the page cannot be read. If reading ahead failed, the page is read again first.
        """
        page = self._take(after, size) or _read(self._reader, after, size)
        if page and not page.is_last:
            self._ask(page.entries[-1].id, size)
        return page

    def note_deleted(self, entries: Iterable[str]) -> None:
        """Exclude deleted entries from the page that was read ahead."""
        self._gone = set(entries)

    def _take(self, after: str, size: int) -> Page | None:
        coming, asked = self._coming, self._asked
        self._coming = self._asked = None
        if coming is None:
            return None
        try:
            page = coming.result()
        except DjangoDatabaseError:
            return None
        # A page that was requested with a smaller size can be used, one with a larger size cannot.
        is_usable = asked is not None and asked[0] == after and asked[1] <= size
        return page.without(self._gone) if is_usable else None

    def _ask(self, after: str, size: int) -> None:
        self._asked = (after, size)
        self._coming = self._thread.ask(_read, self._reader_of_thread, after, size)


def _read(reader: Reader, after: str, size: int) -> Page:
    entries = reader.page(after, size)
    written = [entry for entry in entries if entry.outcome in (Outcome.CREATED, Outcome.MERGED)]
    return Page(entries, reader.source_rows(written), is_last=len(entries) < size)

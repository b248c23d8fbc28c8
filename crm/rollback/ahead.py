"""While the server undoes one page of entries, the next one and its source rows are read on a thread of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from django.db import Error as DjangoDatabaseError

from crm.backfill.read.readahead import ReadingThread
from crm.outcome import Outcome
from crm.rollback.reader import Reader
from crm.rules.entry import Entry
from crm.rules.reverting import SourceRow


@dataclass(frozen=True, slots=True)
class Page:
    """Entries that are undone together, and the source rows that were read with them, by the entries' ids."""

    entries: Sequence[Entry]
    source_rows: Mapping[str, SourceRow] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to undo."""
        return bool(self.entries)

    def rows_of(self, entries: Mapping[str, Entry]) -> dict[str, SourceRow]:
        """The source rows of entries, by their ids, as far as they were read as rows of the same source.

        A row that went over to another source since, and was looked at again, has to be read as one of that.
        """
        return {
            entry.id: self.source_rows[entry.id]
            for entry in self.entries
            if entry.id in entries and entry.id in self.source_rows and entries[entry.id].source == entry.source
        }

    def without(self, gone: set[str]) -> Page:
        """The page without the entries of these ids."""
        return Page([entry for entry in self.entries if entry.id not in gone], self.source_rows)


class PagesAhead:
    """Hands out the entries of a run page by page.

    What is read ahead is only entries and source rows: a rollback changes neither, but for entries that it deletes,
    which it tells. Contacts are read when it is their turn.
    """

    def __init__(self, reader: Reader, thread: ReadingThread) -> None:
        self._reader = reader
        self._thread = thread
        self._asked: tuple[str, int] | None = None
        self._coming: Future[Page] | None = None
        self._gone: set[str] = set()

    def page(self, after: str, size: int) -> Page:
        """At most `size` entries, by id, from strictly after one on; none when there are no more.

        Raises django.db.Error for what the reading of this page raised now. What went wrong while it was read ahead is
        no matter: it is read again.
        """
        page = self._taken(after, size) or self._read(after, size)
        if page:
            self._ask(page.entries[-1].id, size)
        return page

    def note_deleted(self, entries: Iterable[str]) -> None:
        """Take note of entries that were deleted: they may have been read ahead."""
        self._gone = set(entries)

    def _taken(self, after: str, size: int) -> Page | None:
        coming, asked = self._coming, self._asked
        self._coming = self._asked = None
        if coming is None:
            return None
        try:
            page = coming.result()
        except DjangoDatabaseError:
            return None
        # A page of an earlier size is good enough, unless a smaller one is asked for.
        is_fit = asked is not None and asked[0] == after and asked[1] <= size
        return page.without(self._gone) if is_fit else None

    def _ask(self, after: str, size: int) -> None:
        self._asked = (after, size)
        self._coming = self._thread.ask(self._read, after, size)

    def _read(self, after: str, size: int) -> Page:
        entries = self._reader.page(after, size)
        written = [entry for entry in entries if entry.outcome in (Outcome.CREATED, Outcome.MERGED)]
        return Page(entries, self._reader.source_rows(written))

"""Reads, maps and writes a source, batch by batch. Retries transient errors, and applies the throttles.

ReadAhead.pages (SourceReader.page -> map_rows) -> writer.write -> Totals
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Protocol

from django.db import Error as DjangoDatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.readahead import ReadAhead, ReadingThread
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.source import Key, SourceReader
from crm.interruption import STOPPED_IN_A_BATCH, InterruptedRunError, StopRequest, sleep_until
from crm.outcome import Source, Totals
from crm.postgres import errors
from crm.rules.mapping import MappedRow, Rules
from crm.rules.throttling import MAX_PAUSE, BatchSizer, Throttle
from crm.runs.retrying import Retries

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Writes the outcomes of a batch to the database, or to the overlay of a dry run."""

    def write(self, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        """Write a batch, page by page, and return its counts."""

    def keep_alive(self) -> None:
        """Renew the heartbeat while the run waits. Raises LeaseLostError."""


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """Processes sources, one batch at a time. Calls `on_batch` after each committed batch.

    `limit` is the maximum number of rows that remain to be processed, in all sources together.
    """

    connection: BaseDatabaseWrapper
    rules: Rules
    reading: ReadingThread
    writer: Writer
    stop: StopRequest
    on_batch: Callable[[Source, Totals], None]
    sizer: BatchSizer
    throttles: Sequence[Throttle] = ()
    resolutions: Resolutions = field(default_factory=Resolutions)
    limit: int | None = None
    _retries: Retries = field(init=False)

    def __post_init__(self) -> None:
        self._retries = Retries(self.connection, self.stop, self.sizer)

    def run(self, reader: SourceReader, turn: int = 0) -> None:
        """Read, map and write every batch of a source.

        With a rate limit, the first batch waits for the first batches of `turn` other processes. Raises
        InterruptedRunError, LeaseLostError, and django.db.Error if retries did not help.
        """
        for throttle in self.throttles:
            throttle.begin(time.monotonic(), min(self.sizer.size, self.limit or self.sizer.size), turn)
        try:
            self._batches(reader)
        except errors.UnknownEndError:
            # It is not known whether the batch was rolled back.
            raise
        except DjangoDatabaseError:
            if self.stop.requested:
                # The stop may have cancelled the statement.
                raise InterruptedRunError(STOPPED_IN_A_BATCH) from None
            raise

    def _batches(self, reader: SourceReader) -> None:
        after: Key | None = None
        with ReadAhead(reader, self.rules, self.reading) as ahead:
            while self.limit is None or self.limit > 0:
                self._check_stop()
                batch = partial(self._batch, ahead, reader.source, after)
                totals, after = self._retries.run(batch, before_retry=ahead.ask_the_ledger)
                if totals is None:
                    return
                if totals.rows:
                    self.on_batch(reader.source, totals)

    def _batch(self, ahead: ReadAhead, source: Source, after: Key | None) -> tuple[Totals | None, Key | None]:
        self._throttle()
        started = time.monotonic()
        pages = ahead.pages(after, self.sizer.size, self.limit)
        first = next(pages, None)
        if first is None:
            return None, after
        reached, new_rows = first.key, 0

        def rows() -> Iterator[Sequence[MappedRow]]:
            nonlocal reached, new_rows
            for page in chain([first], pages):
                reached = page.key
                new_rows += page.new_rows
                yield self.resolutions.applied(page.rows)

        totals = self.writer.write(source, rows())
        if self.limit is not None:
            # With --update, only rows that were revisited count: a page can have others.
            self.limit -= new_rows if totals.read else totals.revisited
        if change := self.sizer.after_batch(totals.rows, time.monotonic() - started):
            logger.info(change)
        for throttle in self.throttles:
            throttle.after_batch(totals.rows, started)
        return totals, reached

    def _throttle(self) -> None:
        for throttle in self.throttles:
            while pause := throttle.wait_reason(time.monotonic()):
                logger.info(pause.reason)
                self._sleep(min(pause.seconds, MAX_PAUSE))
                self._check_stop()
                self.writer.keep_alive()

    def _sleep(self, seconds: float) -> None:
        sleep_until(lambda: self.stop.requested, seconds)

    def _check_stop(self) -> None:
        if self.stop.requested:
            raise InterruptedRunError

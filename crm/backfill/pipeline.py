"""One source, batch by batch: read, map, write. Retries what may pass by itself.

SourceReader.page -> map_rows -> writer.write -> Totals
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from django.db import Error as DjangoDatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill import errors
from crm.backfill.interruption import Interruption
from crm.backfill.mapping import MappedRow, Rules
from crm.backfill.outcome import Source, Totals
from crm.backfill.readahead import ReadAhead
from crm.backfill.source import Key, SourceReader

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Brings the rows of a batch to an outcome: for good, or in a dry run's mind."""

    def write(self, source: Source, rows: Sequence[MappedRow]) -> Totals:
        """Write a batch."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a bad moment is tried again, and the first wait in seconds; each wait is about twice the one before."""

    most: int = 5
    first_wait: float = 0.5


class InterruptedRunError(Exception):
    """The operator asked to stop; everything up to here is committed."""


@dataclass(slots=True)
class Pipeline:
    """Takes sources through to their end, a batch at a time."""

    connection: BaseDatabaseWrapper
    rules: Rules
    writer: Writer
    interruption: Interruption
    on_batch: Callable[[Source, Totals], None]
    batch_size: int
    limit: int | None = None
    retries: Retries = field(default_factory=Retries)

    def work_through(self, reader: SourceReader) -> None:
        """Read, map and write every batch of a source.

        Raises InterruptedRunError, fence.FenceLostError, and django.db.Error for what trying again did not cure.
        """
        after: Key | None = None
        with ReadAhead(reader, self.rules) as ahead:
            while (size := self._next_size()) > 0:
                if self.interruption.requested:
                    raise InterruptedRunError
                totals, after = self._batch_with_retries(ahead, reader.source, after, size)
                if totals is None:
                    return
                self.on_batch(reader.source, totals)

    def _next_size(self) -> int:
        return self.batch_size if self.limit is None else min(self.batch_size, self.limit)

    def _batch_with_retries(
        self, ahead: ReadAhead, source: Source, after: Key | None, size: int
    ) -> tuple[Totals | None, Key | None]:
        for attempt in range(self.retries.most):
            try:
                return self._batch(ahead, source, after, size)
            except DjangoDatabaseError as error:
                cause = errors.bad_moment(error)
                if cause is None:
                    raise
                self._give_way(cause, attempt)
                if errors.is_timeout(error):
                    size = max(1, size // 2)
        return self._batch(ahead, source, after, size)

    def _batch(
        self, ahead: ReadAhead, source: Source, after: Key | None, size: int
    ) -> tuple[Totals | None, Key | None]:
        page = ahead.page(after, size)
        if not page.rows:
            return None, after
        limit = None if self.limit is None else self.limit - len(page.rows)
        if limit is None or limit > 0:
            ahead.ask(page.key, self.batch_size if limit is None else min(self.batch_size, limit))
        totals = self.writer.write(source, page.rows)
        self.limit = limit
        return totals, page.key

    def _give_way(self, cause: str, attempt: int) -> None:
        wait = self.retries.first_wait * 2**attempt * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, not a secret
        logger.warning(
            "%s: trying the batch again in %.1f s (try %d of %d)", cause, wait, attempt + 1, self.retries.most
        )
        if cause != "lock timeout":
            self.connection.close_if_unusable_or_obsolete()
        time.sleep(wait)

"""Retries after transient errors: their number and waits, and the retries of a batch."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from django.db import Error as DjangoDatabaseError
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.interruption import InterruptedRunError, StopRequest, sleep_until
from crm.postgres import errors
from crm.rules.throttling import BatchSizer

#: Maximum number of retries of a batch.
MAX_RETRIES = 5
#: The first wait, in seconds. Each wait is about twice the one before.
FIRST_WAIT = 0.5
#: Waits before the retries of reads at the beginning and the end of a run, in seconds.
WAITS_BEFORE_ANOTHER_LOOK = (0.5, 1.0, 2.0, 4.0)

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backoff:
    """The maximum number of retries, and the first wait in seconds. Each wait is about twice the one before."""

    max_retries: int = field(default_factory=lambda: MAX_RETRIES)
    first_wait: float = field(default_factory=lambda: FIRST_WAIT)

    def announce(self, cause: str, attempt: int) -> float:
        """Log the retry after the attempt of this number, counted from 1, and return the wait in seconds."""
        wait: float = self.first_wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, not a secret
        logger.warning("%s: retrying the batch in %.1f s (retry %d of %d)", cause, wait, attempt, self.max_retries)
        return wait


@dataclass(slots=True)
class Retries:
    """Retries a batch after a transient error: after a wait, and with half the rows if that may help.

    The batch reads its size from `sizer` each time.
    """

    connection: BaseDatabaseWrapper
    stop: StopRequest
    sizer: BatchSizer
    backoff: Backoff = field(default_factory=Backoff)

    def run(self, batch: Callable[[], Answer], before_retry: Callable[[], object] = lambda: None) -> Answer:
        """Run a batch, which is one transaction, until it succeeds, and return its result.

        Raises:
            InterruptedRunError: if a stop was requested during a wait.
            django.db.Error: if the error is not transient, persists, or occurs after a stop was requested.
        """
        attempt = 1
        while True:
            try:
                return batch()
            except DjangoDatabaseError as error:
                cause = errors.transient_cause(error)
                if cause is None or attempt > self.backoff.max_retries or self.stop.requested:
                    raise
                wait = self.backoff.announce(cause, attempt)
                # Sessions that lock rows in another order keep doing so; only a batch of one row cannot deadlock.
                # So halving the batch does not count as an attempt.
                attempt += not (errors.is_deadlock(error) and self.sizer.size > 1)
                if (reason := errors.too_many_rows(error)) and self.sizer.size > 1:
                    logger.warning(self.sizer.halve(reason))
            self.connection.close_if_unusable_or_obsolete()
            sleep_until(lambda: self.stop.requested, wait)
            if self.stop.requested:
                raise InterruptedRunError
            before_retry()

"""How often, and after which waits, a transient error is retried; and the retries of a batch."""

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

#: How often a batch is tried again.
MAX_RETRIES = 5
#: The first wait, in seconds; each one is about twice the one before.
FIRST_WAIT = 0.5
#: How long the beginning and the end of a run wait after a bad moment; seconds.
WAITS_BEFORE_ANOTHER_LOOK = (0.5, 1.0, 2.0, 4.0)

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often a batch is tried again, and the first wait in seconds; each wait is about twice the one before."""

    max_retries: int = field(default_factory=lambda: MAX_RETRIES)
    first_wait: float = field(default_factory=lambda: FIRST_WAIT)

    def announce(self, cause: str, attempt: int) -> float:
        """Log why a batch is tried again after its attempt of this number, from 1 on; return how long to wait."""
        wait: float = self.first_wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, not a secret
        logger.warning("%s: trying the batch again in %.1f s (try %d of %d)", cause, wait, attempt, self.max_retries)
        return wait


@dataclass(slots=True)
class Retries:
    """Retries a batch that met a transient error: after a wait, and with half the rows where that may help.

    The batch reads its size off `sizer` each time.
    """

    connection: BaseDatabaseWrapper
    stop: StopRequest
    sizer: BatchSizer
    backoff: Backoff = field(default_factory=Backoff)

    def run(self, batch: Callable[[], Answer], before_retry: Callable[[], object] = lambda: None) -> Answer:
        """Run a batch, which is one transaction, until it gets through; return what it returns.

        Raises:
            InterruptedRunError: when a stop was requested while it waited.
            django.db.Error: for what no retry can cure, did not cure, or must not try while a stop is requested.
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
                # Sessions that lock in any order go on doing so: what ends their deadlocks is a batch of one row.
                attempt += not (errors.is_deadlock(error) and self.sizer.size > 1)
                if (reason := errors.too_many_rows(error)) and self.sizer.size > 1:
                    logger.warning(self.sizer.halve(reason))
            self.connection.close_if_unusable_or_obsolete()
            sleep_until(lambda: self.stop.requested, wait)
            if self.stop.requested:
                raise InterruptedRunError
            before_retry()

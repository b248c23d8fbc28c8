"""How a batch that met a bad moment is tried again."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field

#: How often a batch is tried again.
MAX_RETRIES = 5
#: The first wait, in seconds; each one is about twice the one before.
FIRST_WAIT = 0.5

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

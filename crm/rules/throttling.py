"""Throttling of a run: batch size, rate limit and error budget. Pure: no database.

Nothing here reads a clock or sleeps: times and durations are seconds of a monotonic clock that the caller reads.
Whatever slows or stops a run is returned as a message with its figures, for the log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import NamedTuple, Protocol, Self

#: Minimum, maximum and first batch size; rows.
MIN_ROWS, MAX_ROWS, FIRST_ROWS = 100, 20_000, 5_000
#: Target duration of a batch; seconds.
TARGET_SECONDS = 1.0
#: Maximum factor by which the batch size changes from one batch to the next.
STEP = 1.5
#: If a batch takes this many times the target, the next size is not limited by STEP.
FAR_OVER = 5.0
#: Minimum number of rows that must be read before a share of errors is checked.
MIN_ROWS_OF_SHARE = 1_000
#: Maximum pause for a rate limit, so that the heartbeat of the run stays fresh; seconds.
MAX_PAUSE = 30.0


class Pause(NamedTuple):
    """A wait before the next batch, and its reason for the log."""

    reason: str
    seconds: float


class Throttle(Protocol):
    """Decides when a run has to wait before its next batch."""

    def begin(self, now: float, rows: int, turn: int) -> None:
        """Record that a source begins with a batch of `rows` rows, after the batches of `turn` other processes."""

    def after_batch(self, rows: int, started: float) -> None:
        """Record a committed batch of `rows` rows and the time when it began."""

    def wait_reason(self, now: float) -> Pause | None:
        """Return the wait that is due, or None. Must be called again after the wait."""


class BatchSizer:
    """Adapts the batch size so that a batch takes about the target time, which limits how long it holds locks.

    The size grows by a factor of STEP at most, because one fast batch can be an exception. It shrinks by the same
    factor, except after a batch far over the target, when it is set to what the measured speed allows. A fixed size
    does not change; after a timeout, it is restored in steps.
    """

    def __init__(
        self, *, fixed: int | None = None, max_rows: int | None = None, target: float = TARGET_SECONDS
    ) -> None:
        """Create a sizer.

        Arguments:
            fixed: The size that the operator set; None adapts the size.
            max_rows: The maximum size that a rate limit allows; None for no limit.
            target: The target duration of a batch in seconds.

        Raises ValueError if a size is less than one row, or `target` is not positive.
        """
        bounds = [bound for bound in (fixed or MAX_ROWS, max_rows) if bound is not None]
        if 0 in (fixed, max_rows) or min(bounds) < 1 or target <= 0:
            raise ValueError("a batch needs at least one row and a positive target duration")
        self._is_fixed = fixed is not None
        self._target = target
        self._max_rows = min(bounds)
        self.size = min(fixed or FIRST_ROWS, self._max_rows)

    def after_batch(self, rows: int, seconds: float) -> str | None:
        """Adapt the size after a batch. Returns a message for the log if the batch was far over the target."""
        if rows < 1:
            return None
        before = self.size
        largest_step, smallest_step = math.ceil(before * STEP), math.floor(before / STEP)
        if self._is_fixed:
            self.size = min(largest_step, self._max_rows)
            return None
        ideal = rows * self._target / seconds if seconds > 0 else math.inf
        if seconds > FAR_OVER * self._target:
            self.size = self._bounded(math.floor(ideal))
            return (
                f"batch size: {rows:,} rows took {seconds:,.1f} s instead of {self._target:g} s: "
                f"{before:,} -> {self.size:,} rows"
            )
        # The last batch of a source is smaller than the size, so its duration is no reason to grow.
        if rows >= before or seconds > self._target:
            self.size = self._bounded(math.floor(max(smallest_step, min(ideal, largest_step))))
        return None

    def halve(self, cause: str) -> str:
        """Halve the size after a timeout, below MIN_ROWS if needed. Returns a message for the log."""
        before, self.size = self.size, max(1, self.size // 2)
        return f"batch size: {before:,} -> {self.size:,} rows after {cause}"

    def _bounded(self, size: int) -> int:
        """Return the size within the bounds. The lower bound is the current size if timeouts reduced it below."""
        return min(self._max_rows, max(size, min(MIN_ROWS, self.size)))


@dataclass(slots=True)
class RateLimit:
    """Limits the rows per second by a pause after each batch.

    Unused time is not saved for later batches, so the limit holds over any sequence of whole batches. If several
    processes share the rate, each has an equal share, and they begin one after another.
    """

    rows_per_second: int
    shares: int = 1
    _free_at: float = field(default=-math.inf, init=False)
    _rows: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError if the rate or the number of shares is less than one."""
        if self.rows_per_second < 1 or self.shares < 1:
            raise ValueError("a rate limit needs at least one row per second and one share")

    @property
    def share(self) -> float:
        """The rows per second of one process."""
        return self.rows_per_second / self.shares

    @property
    def target_rows(self) -> int:
        """The batch size that takes the target duration at this rate, which avoids long pauses."""
        return max(1, math.floor(self.share * TARGET_SECONDS))

    @property
    def max_rows(self) -> int:
        """The maximum batch size, even if the operator set a larger one: the pause would exceed MAX_PAUSE."""
        return max(1, math.floor(self.share * MAX_PAUSE))

    def begin(self, now: float, rows: int, turn: int) -> None:
        """Delay the first batch until the first batches of `turn` other processes have used their time."""
        self._started, self._rows = now, 0
        self._free_at = max(self._free_at, now + turn * rows / self.rows_per_second)

    def after_batch(self, rows: int, started: float) -> None:
        """Record a committed batch and the time when it began."""
        self._rows, self._started = rows, started
        self._free_at = started + rows / self.share

    def wait_reason(self, now: float) -> Pause | None:
        """Return the rest of the pause after the last batch, or None."""
        seconds = self._free_at - now
        if seconds <= 0:
            return None
        elapsed = now - self._started
        if not self._rows:
            return Pause(f"max-rate: waiting {seconds:.1f} s for other workers to begin", seconds)
        speed = f"{self._rows / elapsed:,.0f} rows/s" if elapsed > 0 else f"{self._rows:,} rows in no time"
        of_all = f" (its share of {self.rows_per_second:,})" if self.shares > 1 else ""
        return Pause(f"max-rate: {speed} >= {self.share:,g}{of_all}: waiting {seconds:.1f} s", seconds)


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """The maximum of new errors in a run: a number of rows, or a percentage of the rows that were read.

    Known errors, which earlier runs had with the same reason, do not count.
    """

    maximum: Decimal
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `50` (rows) or `2.5%` (of the rows). Raises ValueError with a message for the operator."""
        number = text.strip()
        is_share = number.endswith("%")
        try:
            maximum = Decimal(number.removesuffix("%").strip())
        except InvalidOperation:
            raise ValueError(_INVALID_BUDGET.format(text)) from None
        is_number = number.isascii() and maximum.is_finite() and "_" not in number and maximum >= 0
        if not is_number or (maximum > 100 if is_share else maximum != maximum.to_integral_value()):
            raise ValueError(_INVALID_BUDGET.format(text))
        return cls(maximum, is_share)

    def __str__(self) -> str:
        """Return the text from which `parse` makes an equal budget."""
        return f"{self.maximum.normalize():f}{'%' if self.is_share else ''}"

    def exceeded(self, read: int, error_new: int) -> str | None:
        """Return why a run with this number of rows read and new errors must end, or None."""
        if not self.is_share:
            if error_new <= self.maximum:
                return None
            return f"max-errors: {error_new:,} new errors in {read:,} rows, more than {self.maximum:,f}"
        if read < MIN_ROWS_OF_SHARE or error_new * 100 <= self.maximum * read:
            return None
        share = Decimal(error_new * 100) / read
        return f"max-errors: {error_new:,} new errors in {read:,} rows, {share:.2f}% and more than {self}"


_INVALID_BUDGET = "{!r} is neither a number of rows, such as 50, nor a share of them, such as 2.5%"

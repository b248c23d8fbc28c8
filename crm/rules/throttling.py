"""How fast a run may go: the size of its batches, rows a second, and how many errors are too many. Pure.

Nothing here reads a clock or sleeps: moments and durations are seconds of a monotonic clock that the caller reads.
Whatever slows a run down or stops it is told in words and with its figure, ready for a log line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import NamedTuple, Protocol, Self

#: The sizes between which batches are adapted, and the one to begin with; rows.
MIN_ROWS, MAX_ROWS, FIRST_ROWS = 100, 20_000, 5_000
#: How long a batch should take; seconds.
TARGET_SECONDS = 1.0
#: What a batch's size is changed by at most from one batch to the next.
STEP = 1.5
#: A batch that takes so many times the target is so far off that its successor is not approached in steps.
FAR_OVER = 5.0
#: A share of errors says nothing before so many rows were read.
ROWS_OF_A_SHARE = 1_000
#: A limited rate never makes a pause longer than this, so that the heartbeat of a run stays fresh; seconds.
MAX_PAUSE = 30.0


class Pause(NamedTuple):
    """A wait before the next batch, and why, with its figure."""

    reason: str
    seconds: float


class Throttle(Protocol):
    """Something that may ask a run to wait."""

    def begin(self, now: float, rows: int, turn: int) -> None:
        """Take note that a source begins with a batch of so many rows, after those of `turn` other processes."""

    def after_batch(self, rows: int, started: float) -> None:
        """Take note of a batch that was committed, and of the moment when it was begun."""

    def wait_reason(self, now: float) -> Pause | None:
        """The wait that is due now, or None. To be asked again after the wait."""


class BatchSizer:
    """Sizes batches so that each takes about the target time: locks are held no longer, and rows come no slower.

    The size grows by STEP at most, since a fast batch may have been a lucky one. It shrinks by the same step, but at
    once to what the measured speed allows when a batch was far over the target. A fixed size stays as it is; after a
    timeout it comes back in steps.
    """

    def __init__(self, *, fixed: int | None = None, most: int | None = None, target: float = TARGET_SECONDS) -> None:
        """`fixed` is the size that the operator asked for, `most` what a limited rate allows a batch to be."""
        bounds = [bound for bound in (fixed or MAX_ROWS, most) if bound is not None]
        if 0 in (fixed, most) or min(bounds) < 1 or target <= 0:
            raise ValueError("a batch has at least one row and some time")
        self._is_fixed = fixed is not None
        self._target = target
        self._most = min(bounds)
        self.size = min(fixed or FIRST_ROWS, self._most)

    def after_batch(self, rows: int, seconds: float) -> str | None:
        """Adapt the size to a batch of so many rows; what was changed and why, where it was far over the target."""
        if rows < 1:
            return None
        before = self.size
        largest_step, smallest_step = math.ceil(before * STEP), math.floor(before / STEP)
        if self._is_fixed:
            self.size = min(largest_step, self._most)
            return None
        ideal = rows * self._target / seconds if seconds > 0 else math.inf
        if seconds > FAR_OVER * self._target:
            self.size = self._bounded(math.floor(ideal))
            return (
                f"batch size: {rows:,} rows took {seconds:,.1f} s instead of {self._target:g} s: "
                f"{before:,} -> {self.size:,} rows"
            )
        # The last batch of a source is smaller than it might have been: that it was fast says nothing.
        if rows >= before or seconds > self._target:
            self.size = self._bounded(math.floor(max(smallest_step, min(ideal, largest_step))))
        return None

    def halve(self, cause: str) -> str:
        """Half the size, below the bounds too: a batch that timed out must get through. What was changed, in words."""
        before, self.size = self.size, max(1, self.size // 2)
        return f"batch size: {before:,} -> {self.size:,} rows after {cause}"

    def _bounded(self, size: int) -> int:
        """The size within the bounds; one that timeouts brought below them comes back step by step."""
        return min(self._most, max(size, min(MIN_ROWS, self.size)))


@dataclass(slots=True)
class RateLimit:
    """Lets no more rows a second through than the operator allows: a batch and the pause after it take their time.

    No batch saves up time for a later one, so the limit holds over any stretch of whole batches. Where several
    processes share the rate, each has an equal share of it, and they begin one after another.
    """

    rows_per_second: int
    shares: int = 1
    _free_at: float = field(default=-math.inf, init=False)
    _rows: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that lets nothing through."""
        if self.rows_per_second < 1 or self.shares < 1:
            raise ValueError("at least one row a second, and one who shares it")

    @property
    def share(self) -> float:
        """The rows a second of one process."""
        return self.rows_per_second / self.shares

    @property
    def rows_of_a_target(self) -> int:
        """The size at which a batch takes about the target time at this rate: no need for long pauses."""
        return max(1, math.floor(self.share * TARGET_SECONDS))

    @property
    def max_rows(self) -> int:
        """What a batch may be at most, whatever size was asked for: its pause would be too long."""
        return max(1, math.floor(self.share * MAX_PAUSE))

    def begin(self, now: float, rows: int, turn: int) -> None:
        """Wait until the batches of those whose turn is before have taken their time at the whole rate."""
        self._started, self._rows = now, 0
        self._free_at = max(self._free_at, now + turn * rows / self.rows_per_second)

    def after_batch(self, rows: int, started: float) -> None:
        """Take note of a batch and of the moment when it was begun."""
        self._rows, self._started = rows, started
        self._free_at = started + rows / self.share

    def wait_reason(self, now: float) -> Pause | None:
        """The rest of the time that the last batch has to take."""
        seconds = self._free_at - now
        if seconds <= 0:
            return None
        elapsed = now - self._started
        if not self._rows:
            return Pause(f"max-rate: waiting {seconds:.1f} s for those who begin before", seconds)
        speed = f"{self._rows / elapsed:,.0f} rows/s" if elapsed > 0 else f"{self._rows:,} rows in no time"
        of_all = f" (its share of {self.rows_per_second:,})" if self.shares > 1 else ""
        return Pause(f"max-rate: {speed} >= {self.share:,g}{of_all}: waiting {seconds:.1f} s", seconds)


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """How many new errors a run may have: a number of rows, or a share of the rows that were read.

    Errors that earlier runs had with the same reason do not count: they say nothing of this run.
    """

    most: Decimal
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `50` (rows) or `2.5%` (of the rows). Raises ValueError, with a message for the operator."""
        number = text.strip()
        is_share = number.endswith("%")
        try:
            most = Decimal(number.removesuffix("%").strip())
        except InvalidOperation:
            raise ValueError(_NO_CEILING.format(text)) from None
        is_number = number.isascii() and most.is_finite() and "_" not in number and most >= 0
        if not is_number or (most > 100 if is_share else most != most.to_integral_value()):
            raise ValueError(_NO_CEILING.format(text))
        return cls(most, is_share)

    def __str__(self) -> str:
        """As the operator may write it."""
        return f"{self.most.normalize():f}{'%' if self.is_share else ''}"

    def exceeded(self, read: int, error_new: int) -> str | None:
        """Why a run with so many rows read and new errors has to end, or None."""
        if not self.is_share:
            if error_new <= self.most:
                return None
            return f"max-errors: {error_new:,} new errors in {read:,} rows, more than {self.most:,f}"
        if read < ROWS_OF_A_SHARE or error_new * 100 <= self.most * read:
            return None
        share = Decimal(error_new * 100) / read
        return f"max-errors: {error_new:,} new errors in {read:,} rows, {share:.2f}% and more than {self}"


_NO_CEILING = "{!r} is neither a number of rows, such as 50, nor a share of them, such as 2.5%"

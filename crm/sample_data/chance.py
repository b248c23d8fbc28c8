"""Random picks, ids and dates from one seed. The same seed gives the same sequence on every machine."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import cache
from random import Random
from typing import Final, TypeVar

T = TypeVar("T")

SECOND: Final = 1000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

_BASE_36: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_BASE_62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PAIRS_36: Final = tuple(a + b for a in _BASE_36 for b in _BASE_36)
_PAIRS_62: Final = tuple(a + b for a in _BASE_62 for b in _BASE_62)
_FOUR_DIGITS: Final = 36**4
# Clerk's ids are KSUIDs: 32 bits of seconds since this time and 128 random bits, in base 62.
_KSUID_BEGINS: Final = 1_400_000_000
# The process part of ids. The application has been started more than once.
_FINGERPRINTS: Final = ("3b6u", "k0qz", "08jw")


def weighted(shares: Mapping[T, int]) -> tuple[T, ...]:
    """Return a tuple that contains each value as often as its share, so that `pick` is weighted."""
    return tuple(value for value, share in shares.items() for _ in range(share))


@cache
def _clock() -> tuple[str, ...]:
    return tuple(
        f"{hour:02d}:{minute:02d}:{second:02d}" for hour in range(24) for minute in range(60) for second in range(60)
    )


def _four(number: int) -> str:
    return _PAIRS_36[number // 1296] + _PAIRS_36[number % 1296]


class Chance:
    """A random generator. Moments are milliseconds since the beginning of the first day."""

    def __init__(self, seed: str, first_day: date, last_day: date) -> None:
        self.random = Random(seed).random  # noqa: S311 - sample data has to be repeatable, not secret
        days = (last_day - first_day).days + 1
        self.end = days * DAY - 1
        self._days = tuple((first_day + timedelta(days=day)).isoformat() for day in range(days))
        self._clock = _clock()
        self._first_moment = (
            int(datetime(first_day.year, first_day.month, first_day.day, tzinfo=UTC).timestamp()) * 1000
        )
        self._serial = 0

    def happens(self, share: float) -> bool:
        """Return true with this probability."""
        return self.random() < share

    def pick(self, values: Sequence[T]) -> T:
        """Return one of the values."""
        return values[int(self.random() * len(values))]

    def maybe(self, share: float, values: Sequence[T]) -> T | None:
        """Return one of the values with the probability `share`, otherwise None."""
        return values[int(self.random() * len(values))] if self.random() < share else None

    def number(self, below: int) -> int:
        """Return an integer from 0 to `below` - 1."""
        return int(self.random() * below)

    def after(self, moment: int, longest: int) -> int:
        """Return a moment up to `longest` later, mostly soon, and not after the end."""
        return min(self.end, moment + int(self.random() * self.random() * longest))

    def before(self, moment: int, longest: int) -> int:
        """Return a moment up to `longest` earlier, and not before the beginning."""
        return max(0, moment - int(self.random() * longest))

    def timestamp(self, moment: int) -> str:
        """Return a moment in PostgreSQL's format."""
        day, rest = divmod(moment, DAY)
        second, millisecond = divmod(rest, SECOND)
        return f"{self._days[day]} {self._clock[second]}.{millisecond:03d}"

    def cuid(self, moment: int) -> str:
        """Return an id as the application creates it: `c`, the time, a counter, the process, and random digits."""
        self._serial += 1
        high, low = divmod(self._first_moment + moment, _FOUR_DIGITS)
        first, second = divmod(int(self.random() * _FOUR_DIGITS * _FOUR_DIGITS), _FOUR_DIGITS)
        counter = _four(self._serial % _FOUR_DIGITS)
        return f"c{_four(high)}{_four(low)}{counter}{_FINGERPRINTS[self._serial % 3]}{_four(first)}{_four(second)}"

    def clerk_id(self, moment: int) -> str:
        """Return an id as Clerk creates it: `user_` and 27 characters of 0-9A-Za-z, of which the first are the time."""
        luck = "".join([_PAIRS_62[int(self.random() * 3844)] for _ in range(13)])
        seconds = (self._first_moment + moment) // SECOND - _KSUID_BEGINS
        high, low = divmod((seconds << 128) // 62**21, 62**4)
        return f"user_{_PAIRS_62[high]}{_PAIRS_62[low // 62**2]}{_PAIRS_62[low % 62**2]}{luck[:21]}"

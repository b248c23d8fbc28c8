"""Items that are attempted together, of which some are refused: each costs itself, and none of its neighbours.

What is refused together is halved until it stands alone, so one refusal among a thousand items costs some twenty
attempts, and what it refused is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from crm.outcome import Refusal

Item = TypeVar("Item")
Result = TypeVar("Result")


class Bisection(Generic[Item, Result]):
    """Attempts items, and yields them in their order: those that were not refused together, and each other one alone.

    Whatever `attempt` raises ends it.
    """

    def __init__(self, items: Sequence[Item], attempt: Callable[[Sequence[Item]], Result | Refusal]) -> None:
        """`attempt` returns a Refusal for items of which at least one is refused; then it must have changed nothing."""
        self._attempt = attempt
        self._waiting = [items] if items else []

    def __iter__(self) -> Iterator[tuple[Sequence[Item], Result | Refusal]]:
        """Each part with what was returned for it; a Refusal is of a single item."""
        while self._waiting:
            some = self._waiting.pop()
            found = self._attempt(some)
            if isinstance(found, Refusal) and len(some) > 1:
                middle = len(some) // 2
                self._waiting += [some[middle:], some[:middle]]
            else:
                yield some, found

    @property
    def left(self) -> list[Item]:
        """The items that were not yielded yet, in their order."""
        return [item for some in reversed(self._waiting) for item in some]

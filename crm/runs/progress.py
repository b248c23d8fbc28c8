"""Who watches a run, and is told of each batch."""

from __future__ import annotations

from typing import Protocol

from crm.outcome import Source, Totals


class Progress(Protocol):
    """Watches a run."""

    def begin(self, rows: dict[Source, int]) -> None:
        """The rows that are to be looked at, by source."""

    def advance(self, source: Source, totals: Totals) -> None:
        """A batch was committed, of rows of the source that were read or looked at again."""

    def end(self) -> None:
        """The run is over."""


class Silence:
    """A progress that shows nothing."""

    def begin(self, rows: dict[Source, int]) -> None:
        """Nothing."""

    def advance(self, source: Source, totals: Totals) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

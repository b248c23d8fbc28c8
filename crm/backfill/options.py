"""What an operator may ask of a run. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from crm.backfill.outcome import Source

DEFAULT_BATCH_SIZE = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What was asked. `since` is an ISO timestamp in UTC; `limit` counts source rows that are looked at."""

    dry_run: bool = False
    batch_size: int = DEFAULT_BATCH_SIZE
    only: tuple[Source, ...] = ()
    limit: int | None = None
    since: str | None = None

    @property
    def sources(self) -> list[Source]:
        """The sources that are asked for, in the order of a run."""
        return [source for source in Source if not self.only or source in self.only]

    @property
    def is_whole(self) -> bool:
        """Whether every row that is pending is to be looked at."""
        return not self.only and self.limit is None and self.since is None

    def recorded(self) -> dict[str, Any]:
        """The options for the run's record."""
        return {name: value for name, value in asdict(self).items() if name != "dry_run"}

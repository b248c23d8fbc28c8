"""The options of a run. Pure: no database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crm.outcome import Source
from crm.rules.throttling import ErrorBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of a run.

    `batch_size` is a number of rows; None adapts the size to the server. `only` are the sources to read, all if empty;
    those of signups only `with_signups`.
    `limit` is the maximum number of source rows to read. `since` is an ISO timestamp in UTC. `max_rate` is in rows per
    second, `max_replica_lag` in seconds.
    """

    dry_run: bool = False
    update: bool = False
    recreate_deleted: bool = False
    batch_size: int | None = None
    only: tuple[Source, ...] = ()
    with_signups: bool = False
    limit: int | None = None
    since: str | None = None
    workers: int = 1
    max_rate: int | None = None
    max_errors: ErrorBudget | None = None
    max_replica_lag: float | None = None

    @property
    def sources(self) -> list[Source]:
        """The sources to read, in the order of a run."""
        asked = self.only or Source
        return [source for source in Source if source in asked and (self.with_signups or not source.is_of_signups)]

    def recorded(self) -> dict[str, Any]:
        """Return the options for the record of the run, as JSON."""
        return {
            "update": self.update,
            "recreate_deleted": self.recreate_deleted,
            "with_signups": self.with_signups,
            "batch_size": self.batch_size,
            "only": [source.value for source in self.only],
            "limit": self.limit,
            "since": self.since,
            "workers": self.workers,
            "max_rate": self.max_rate,
            "max_errors": str(self.max_errors) if self.max_errors else None,
            "max_replica_lag": self.max_replica_lag,
        }


def as_arguments(recorded: Mapping[str, Any]) -> list[str]:
    """Return the command line arguments for the options in the record of a run, without those at their default."""
    flags = [name for name in ("update", "recreate_deleted", "with_signups") if recorded.get(name)]
    arguments = [f"--{name.replace('_', '-')}" for name in flags]
    if recorded.get("only"):
        arguments += ["--only", *recorded["only"]]
    if recorded.get("workers", 1) != 1:
        arguments += ["--workers", str(recorded["workers"])]
    for name in ("batch_size", "limit", "since", "max_rate", "max_errors", "max_replica_lag"):
        if recorded.get(name) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(recorded[name])]
    return arguments

"""Replication lag: a run waits while a replica lags more than the operator allows. Only reads.

From a lagging replica the application reads stale rows, and a failover to it loses rows. Only replicas that stream from
this server are visible, not storage that a cloud provider replicates itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.errors import OperatorError
from crm.rules.throttling import Pause

# Every role sees the rows of pg_stat_replication, but other columns are NULL without pg_read_all_stats; otherwise
# `state` is never NULL. A replica that catches up has no lag until it has replayed a record with a known time.
_REPLICAS = """
SELECT count(*), count(state), count(*) FILTER (WHERE state = 'catchup' AND replay_lag IS NULL),
       COALESCE(max(EXTRACT(EPOCH FROM replay_lag)), 0)::float8
  FROM pg_stat_replication
"""


class NoReplicas:
    """No replica streams from this server."""


class CannotBeRead:
    """There are replicas, but this role may not read their lag."""


@dataclass(frozen=True, slots=True)
class Lag:
    """The largest lag of all replicas, in seconds; infinite if a replica catches up and has no measured lag yet."""

    seconds: float


class BlindThrottleError(OperatorError):
    """A requested throttle cannot read its signal, so the run has to stop instead of continuing unthrottled."""


def read_lag(connection: BaseDatabaseWrapper) -> Lag | NoReplicas | CannotBeRead:
    """Read the lag of the replicas. Raises django.db.Error if the query fails."""
    with connection.cursor() as cursor:
        cursor.execute(_REPLICAS)
        replicas, visible, catching_up, seconds = cursor.fetchone()
    if replicas == 0:
        return NoReplicas()
    if visible < replicas:
        return CannotBeRead()
    return Lag(math.inf if catching_up else seconds)


@dataclass(frozen=True, slots=True)
class ReplicaLagLimit:
    """Makes a run wait while a replica lags more than `most_seconds`. A `throttling.Throttle`."""

    connection: BaseDatabaseWrapper
    most_seconds: float

    MIN_PAUSE: ClassVar[float] = 1.0
    MAX_PAUSE: ClassVar[float] = 10.0

    def begin(self, now: float, rows: int, turn: int) -> None:
        """Do nothing: every process reads the same lag."""

    def after_batch(self, rows: int, started: float) -> None:
        """Do nothing: `wait_reason` reads the lag."""

    def wait_reason(self, now: float) -> Pause | None:  # noqa: ARG002 - the throttle's signature
        """Return a pause about as long as the excess lag, or None. Raises BlindThrottleError if it cannot be read."""
        lag = read_lag(self.connection)
        if isinstance(lag, CannotBeRead):
            raise BlindThrottleError(
                "max-replica-lag: this role may not read the lag of the replicas, so the run stops. As a superuser, "
                "GRANT pg_monitor to it, or omit --max-replica-lag."
            )
        if isinstance(lag, NoReplicas) or lag.seconds <= self.most_seconds:
            return None
        seconds = min(self.MAX_PAUSE, max(self.MIN_PAUSE, lag.seconds - self.most_seconds))
        figure = "a replica is catching up, its lag is unknown" if math.isinf(lag.seconds) else f"{lag.seconds:,.1f} s"
        return Pause(f"max-replica-lag: {figure} > {self.most_seconds:g} s: waiting {seconds:.1f} s", seconds)

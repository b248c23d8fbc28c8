"""Back-pressure from the replicas: a run waits while one of them is too far behind. Only reads.

A replica that lags is one from which the application reads stale rows, and which a failover would lose rows by. Seen
are the replicas that stream from this very server; storage that a cloud provider replicates by itself is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.errors import OperatorError
from crm.rules.throttling import Pause

# A sender is shown to everybody, but all that is known of it only to a role that is in pg_read_all_stats: `state` is
# never NULL otherwise. One that catches up has no measured lag until it has replayed something that was timed.
_REPLICAS = """
SELECT count(*), count(state), count(*) FILTER (WHERE state = 'catchup' AND replay_lag IS NULL),
       COALESCE(max(EXTRACT(EPOCH FROM replay_lag)), 0)::float8
  FROM pg_stat_replication
"""


class NoReplicas:
    """Nothing streams from this server."""


class CannotBeRead:
    """There are replicas, and this role may not see how far behind they are."""


@dataclass(frozen=True, slots=True)
class Lag:
    """The worst of the replicas, in seconds; infinite where one catches up and its lag is not measured yet."""

    seconds: float


class BlindThrottleError(OperatorError):
    """A throttle that was asked for cannot read its signal. The run has to stop: it would go on unthrottled."""


def read_lag(connection: BaseDatabaseWrapper) -> Lag | NoReplicas | CannotBeRead:
    """How far the replicas are behind. Raises django.db.Error where the server cannot be asked."""
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
    """Lets a run wait while a replica is further behind than the operator allows. A pace.Throttle."""

    connection: BaseDatabaseWrapper
    most_seconds: float

    MIN_PAUSE: ClassVar[float] = 1.0
    MAX_PAUSE: ClassVar[float] = 10.0

    def begin(self, now: float, rows: int, turn: int) -> None:
        """Nothing: every process sees the same lag."""

    def after_batch(self, rows: int, started: float) -> None:
        """Nothing: the lag is asked for when it is needed."""

    def wait_reason(self, now: float) -> Pause | None:  # noqa: ARG002 - the throttle's signature
        """A wait of about as long as the replica is too late. Raises BlindThrottleError."""
        lag = read_lag(self.connection)
        if isinstance(lag, CannotBeRead):
            raise BlindThrottleError(
                "max-replica-lag: this role may not see how far the replicas are behind, so the run stops. Let a "
                "superuser GRANT pg_monitor to it, or go without --max-replica-lag."
            )
        if isinstance(lag, NoReplicas) or lag.seconds <= self.most_seconds:
            return None
        seconds = min(self.MAX_PAUSE, max(self.MIN_PAUSE, lag.seconds - self.most_seconds))
        figure = "a replica is catching up, by an unknown lag" if math.isinf(lag.seconds) else f"{lag.seconds:,.1f} s"
        return Pause(f"max-replica-lag: {figure} > {self.most_seconds:g} s: waiting {seconds:.1f} s", seconds)

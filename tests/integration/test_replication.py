"""Back-pressure from replicas, against a replica that streams from the server of the tests.

It is as little of a replica as the server takes for one: it asks for the stream, says how far it has replayed, and
keeps nothing.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from django.db import connection
from psycopg import pq

from config import embedded
from crm.rules.throttling import Pause, Throttle
from crm.runs.replication import (
    BlindThrottleError,
    CannotBeRead,
    Lag,
    NoReplicas,
    ReplicaLagLimit,
    read_lag,
)
from tests.conftest import Database
from tests.support.processes import address, session

ANY_ROLE = "replica_watcher"


class Replica:
    """A replica that replays what it is told to."""

    def __init__(self) -> None:
        listens = address()
        self._connection = pq.PGconn.connect(
            f"host={listens.host} port={listens.port} user={embedded.USER} dbname=postgres replication=true".encode()
        )
        assert self._connection.status == pq.ConnStatus.OK, self._connection.error_message
        system = self._connection.exec_(b"IDENTIFY_SYSTEM")
        timeline, here = (value.decode() for column in (1, 2) if (value := system.get_value(0, column)))
        started = self._connection.exec_(f"START_REPLICATION {here} TIMELINE {timeline}".encode())
        assert started.status == pq.ExecStatus.COPY_BOTH, self._connection.error_message
        self.replayed = _number(here)
        self.report()

    def report(self) -> None:
        """Say that all is received, and how much of it is replayed."""
        everything = 2**62
        message = struct.pack(">cQQQQB", b"r", everything, everything, self.replayed, 0, 0)
        self._connection.put_copy_data(message)
        self._connection.flush()

    def close(self) -> None:
        """Go away."""
        self._connection.finish()


def _number(lsn: str) -> int:
    high, low = lsn.split("/")
    return int(high, 16) << 32 | int(low, 16)


@contextmanager
def replica() -> Iterator[Replica]:
    found = Replica()
    try:
        yield found
    finally:
        found.close()
        deadline = time.monotonic() + 5
        while not isinstance(read_lag(connection), NoReplicas) and time.monotonic() < deadline:
            time.sleep(0.01)


def fall_behind(replica: Replica) -> Lag:
    """Let the replica replay a little, and then nothing while the server writes on."""
    deadline = time.monotonic() + 10
    lag: object = None
    with session() as other:
        other.autocommit = True
        while time.monotonic() < deadline:
            other.execute("SELECT pg_logical_emit_message(true, 'test', 'something to replay', true)")
            replica.report()
            lag = read_lag(connection)
            if isinstance(lag, Lag) and 0.3 < lag.seconds < math.inf:
                return lag
            time.sleep(0.05)
    raise AssertionError(f"the replica never fell behind: {lag}")


def test_a_server_without_replicas_is_not_waited_for(database: Database) -> None:
    assert isinstance(read_lag(connection), NoReplicas)
    limit: Throttle = ReplicaLagLimit(connection, 0)
    assert limit.wait_reason(0) is None


def test_a_run_waits_while_a_replica_is_too_far_behind(database: Database) -> None:
    with replica() as slow:
        behind = fall_behind(slow)
        assert behind.seconds < 60
        assert ReplicaLagLimit(connection, 60).wait_reason(0) is None
        pause = ReplicaLagLimit(connection, 0.1).wait_reason(0)
        assert pause is not None
        assert pause.reason.startswith("max-replica-lag: 0.")
        assert pause.reason.endswith(" s > 0.1 s: waiting 1.0 s")
        assert pause.seconds == 1.0


def test_who_may_not_see_the_lag_is_told_so_and_stops(database: Database) -> None:
    with session() as owner:
        owner.autocommit = True
        owner.execute(f"DROP ROLE IF EXISTS {ANY_ROLE}".encode())
        owner.execute(f"CREATE ROLE {ANY_ROLE}".encode())
        try:
            with replica(), connection.cursor() as cursor:
                cursor.execute(f"SET ROLE {ANY_ROLE}")
                assert isinstance(read_lag(connection), CannotBeRead)
                with pytest.raises(BlindThrottleError, match="GRANT pg_monitor") as caught:
                    ReplicaLagLimit(connection, 1_000).wait_reason(0)
                assert caught.value.exit_code == 2
                owner.execute(f"GRANT pg_monitor TO {ANY_ROLE}".encode())
                assert isinstance(read_lag(connection), Lag)
                cursor.execute("RESET ROLE")
        finally:
            connection.close()
            owner.execute(f"DROP ROLE {ANY_ROLE}".encode())


@pytest.mark.parametrize(
    ("seconds", "pause"),
    [
        (10.0, None),
        (10.5, Pause("max-replica-lag: 10.5 s > 10 s: waiting 1.0 s", 1.0)),
        (14.0, Pause("max-replica-lag: 14.0 s > 10 s: waiting 4.0 s", 4.0)),
        (7_200.0, Pause("max-replica-lag: 7,200.0 s > 10 s: waiting 10.0 s", 10.0)),
        (
            math.inf,
            Pause("max-replica-lag: a replica is catching up, its lag is unknown > 10 s: waiting 10.0 s", 10.0),
        ),
    ],
)
def test_the_pause_follows_the_lag(seconds: float, pause: Pause | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crm.runs.replication.read_lag", lambda _connection: Lag(seconds))
    assert ReplicaLagLimit(connection, 10).wait_reason(0) == pause

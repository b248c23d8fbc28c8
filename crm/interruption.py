"""Ctrl-C, SIGTERM, and SIGHUP from a terminal that is gone.

The first asks a run to end with its batch, the second ends it now.

Neither breaks off what must not be: the claim of a run and the end of its record, see `crm.runs.lifecycle`.

A batch that does not come to its end by itself, because it waits for a lock or for a server that is silent, is not
waited for: after a grace its statement is cancelled, whichever thread sent it, and if that does not help, its
connection is cut. So it ends as any statement ends that fails, and whoever sent it asks then whether to stop.

The clock is the system's, which sends SIGALRM: no thread is needed, and none is running when a worker is forked.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol

import psycopg
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from psycopg.pq import TransactionStatus

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: How long a batch may go on when the run is to stop, before what it is at is cancelled; seconds.
GRACE = 1.0
#: After what time it is cancelled again, and how often in vain before its connection is cut; seconds.
AGAIN_AFTER, MAX_IN_VAIN = 0.15, 3
#: How long a cancellation may take to reach the server; seconds.
TO_REACH_THE_SERVER = 0.2
#: How often whoever waits looks up to see whether the wait is over; seconds.
_POLL_INTERVAL = 0.1


#: Why a run ended that was stopped while a batch was going.
STOPPED_IN_A_BATCH = "stopped in the middle of a batch, which was rolled back"

#: Who takes the signals, which are the process': the last one does.
_heeding: list[Interruption] = []


class InterruptedRunError(Exception):
    """The operator asked to stop; what was committed stays. The message is for the run's record, if there is one."""


class StopRequest(Protocol):
    """Whether a run was asked to stop."""

    @property
    def requested(self) -> bool:
        """Asked between batches and while waiting."""


class Interruption:
    """Whether the operator asked to stop. Ask it between batches."""

    def __init__(self) -> None:
        self._signals = 0
        #: How many signals break off what is being done; None where nothing may.
        self._most: int | None = None
        self._cancelled = 0
        # By thread: each has a connection of its own.
        self._connections: dict[int, BaseDatabaseWrapper] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._signals > 0

    def heed(self) -> None:
        """Raise InterruptedRunError where the operator asked to stop."""
        if self.requested:
            raise InterruptedRunError

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until the next signal."""
        before = self._signals
        sleep_until(lambda: self._signals > before, seconds)

    @contextmanager
    def breakable(self, *, at_once: bool = False) -> Iterator[None]:
        """What is inside may be broken off: by the second signal, or by the next one. Raises KeyboardInterrupt then."""
        self._most = self._signals + 1 if at_once else 2
        try:
            yield
        finally:
            self._most = None

    @contextmanager
    def heeded(self, signals: Collection[signal.Signals] = SIGNALS) -> Iterator[None]:
        """Take the signals while inside, and give them back after."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._note(connections[DEFAULT_DB_ALIAS])
        connection_created.connect(self._note, weak=False)
        before = {number: signal.signal(number, self._request) for number in _heard(signals)}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._cancel)
        _heeding.append(self)
        try:
            yield
        finally:
            _heeding.remove(self)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
            connection_created.disconnect(self._note)
            self._connections.clear()

    def grant(self, seconds: float) -> None:
        """Let what is done from now on take so long, where it is to stop, before it is cancelled."""
        if self.requested:
            self._cancelled = 0
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_AFTER)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._most is not None and self._signals >= self._most:
            # Whoever comes after is not broken off by the next one.
            self._most = None
            # What another thread is at is not ended by the exception.
            self.grant(AGAIN_AFTER)
            raise KeyboardInterrupt(signal.Signals(number).name)
        if self._signals == 1:
            self.grant(GRACE)

    def _note(self, connection: BaseDatabaseWrapper, **_signal: Any) -> None:
        self._connections[threading.get_ident()] = connection

    def _cancel(self, _number: int, _frame: FrameType | None) -> None:
        self._cancelled += 1
        for wrapper in list(self._connections.values()):
            if wrapper.connection is not None:
                with suppress(psycopg.Error, OSError):
                    _end_statement(wrapper.connection, with_connection=self._cancelled > MAX_IN_VAIN)


def _end_statement(connection: psycopg.Connection, *, with_connection: bool) -> None:
    if connection.closed or connection.info.transaction_status != TransactionStatus.ACTIVE:
        return
    if with_connection:
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)
    else:
        connection.cancel_safe(timeout=TO_REACH_THE_SERVER)


def sleep_until(is_over: Callable[[], bool], seconds: float) -> None:
    """Wait so many seconds, or until it is over."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not is_over():
        time.sleep(min(left, _POLL_INTERVAL))


def _heard(signals: Collection[signal.Signals]) -> Iterator[signal.Signals]:
    """All but the SIGHUP that `nohup` has the process ignore."""
    for number in signals:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            yield number


def stop_is_requested() -> bool:
    """Whether the operator asked a run to stop, for whoever does not know which run it is part of."""
    return bool(_heeding) and _heeding[-1].requested


def sleep_until_signal(seconds: float) -> None:
    """Wait, but no longer than until the next signal, also where no run takes it."""
    if _heeding:
        _heeding[-1].sleep(seconds)
    else:
        time.sleep(seconds)


class StoppedError(Exception):
    """The operator stopped a command that had nothing to bring to an end. The message is for the operator."""

    exit_code = 4


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGNALS end what is inside at once: its statement is cancelled. Raises StoppedError."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _heard(SIGNALS)}
    try:
        yield
    except KeyboardInterrupt as stop:
        raise StoppedError(
            f"Interrupted by {stop.args[0] if stop.args else 'SIGINT'}. Run the command again."
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)

"""Handles Ctrl-C, SIGTERM, and SIGHUP from a closed terminal.

The first signal asks a run to stop after its batch, the second stops it immediately. Neither interrupts the claim of a
run or the closing of its record, see `crm.runs.lifecycle`.

A batch that does not end in time, because it waits for a lock or for a server that does not answer, is cancelled: after
a grace period its statement is cancelled, whichever thread sent it, and if that fails repeatedly, its connection is
shut down. The statement then fails like any other, and the code that sent it checks for a stop request.

The timer is SIGALRM of the operating system, so no thread is needed, and none runs when a worker is forked.
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
#: How long a batch may continue after a stop request before its statement is cancelled, in seconds.
GRACE = 1.0
#: Seconds between two cancellations, and their number before the connection is shut down.
AGAIN_AFTER, MAX_IN_VAIN = 0.15, 3
#: Timeout for sending a cancellation to the server, in seconds.
TO_REACH_THE_SERVER = 0.2
#: How often a waiting thread checks whether the wait is over, in seconds.
_POLL_INTERVAL = 0.1


#: The reason recorded for a run that was stopped during a batch.
STOPPED_IN_A_BATCH = "stopped in the middle of a batch, which was rolled back"

#: The interruptions that are active. Signals belong to the process; the last one handles them.
_heeding: list[Interruption] = []


class InterruptedRunError(Exception):
    """The operator requested a stop; committed batches stay. The message, if any, goes into the run's record."""


class StopRequest(Protocol):
    """Whether a stop was requested."""

    @property
    def requested(self) -> bool:
        """Whether a stop was requested. Check it between batches and during waits."""


class Interruption:
    """Handles the stop requests of an operator. Check `requested` between batches."""

    def __init__(self) -> None:
        self._signals = 0
        #: The number of signals that interrupts the current work; None if it must not be interrupted.
        self._most: int | None = None
        self._cancelled = 0
        # By thread: each has its own connection.
        self._connections: dict[int, BaseDatabaseWrapper] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self._signals > 0

    def heed(self) -> None:
        """Raise InterruptedRunError if a stop was requested."""
        if self.requested:
            raise InterruptedRunError

    def sleep(self, seconds: float) -> None:
        """Wait for this time or until the next signal."""
        before = self._signals
        sleep_until(lambda: self._signals > before, seconds)

    @contextmanager
    def breakable(self, *, at_once: bool = False) -> Iterator[None]:
        """Allow the second signal, or with `at_once` the next one, to interrupt the block with KeyboardInterrupt."""
        self._most = self._signals + 1 if at_once else 2
        try:
            yield
        finally:
            self._most = None

    @contextmanager
    def heeded(self, signals: Collection[signal.Signals] = SIGNALS) -> Iterator[None]:
        """Handle the signals during the block, and restore the previous handlers after it."""
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
        """After a stop request, give statements from now on this time before they are cancelled."""
        if self.requested:
            self._cancelled = 0
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_AFTER)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._most is not None and self._signals >= self._most:
            # The next signal must not interrupt the code that handles the exception.
            self._most = None
            # The exception does not end the statements of other threads.
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
    """Wait for this number of seconds, or until `is_over` returns true."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not is_over():
        time.sleep(min(left, _POLL_INTERVAL))


def _heard(signals: Collection[signal.Signals]) -> Iterator[signal.Signals]:
    """Yield all signals, except SIGHUP if `nohup` made the process ignore it."""
    for number in signals:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            yield number


def stop_is_requested() -> bool:
    """Return whether a stop was requested, for code without access to the Interruption."""
    return bool(_heeding) and _heeding[-1].requested


def sleep_until_signal(seconds: float) -> None:
    """Wait for this time or until the next signal, whether or not an Interruption is active."""
    if _heeding:
        _heeding[-1].sleep(seconds)
    else:
        time.sleep(seconds)


class StoppedError(Exception):
    """The operator stopped a command, which had nothing to complete. The message is for the operator."""

    exit_code = 4


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Make SIGNALS end the block immediately, cancelling its statement. Raises StoppedError then."""
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

"""Executes the tasks of a run in this process, or in a pool of processes that each take a partition of the people.

All rows of a person are in the same partition, and a task begins when all partitions of the previous one are done. So
which row creates a contact does not depend on the number of workers or their speed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol, Self

from django.db import Error as DjangoDatabaseError
from django.db import connection, connections

from crm.backfill.context import OnBatch, Phase, RunContext, Task
from crm.backfill.pipeline import Pipeline
from crm.backfill.read.readahead import ReadingThread
from crm.backfill.read.source import EVERYBODY, Partition
from crm.errors import OperatorError
from crm.interruption import InterruptedRunError, Interruption, StopRequest
from crm.postgres import errors
from crm.runs.lease import LeaseLostError

logger = logging.getLogger(__name__)

#: Maximum number of dead workers that are replaced during a run.
MAX_REPLACEMENTS = 3
#: Interval at which the pool checks for a stop while it waits for messages; seconds.
POLL_INTERVAL = 0.05
#: The signal that asks a worker to stop. It terminates a worker that has not installed its handler yet.
STOP = signal.SIGUSR1
#: How long a worker may take to stop before it is killed, including the grace period of its statement: if an operator
#: stopped the run, and otherwise. Seconds.
STOP_TIMEOUT, LONG_STOP_TIMEOUT = 1.4, 10.0


class Executor(Protocol):
    """Runs tasks, one after the other. A context manager, which ends its processes and threads on exit."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, /, *error: object) -> None: ...

    def run(self, task: Task) -> None:
        """Process every row of a task.

        Raises InterruptedRunError, LeaseLostError, OperatorError, and WorkerError or django.db.Error if retries did not
        help. No batch is in progress then.
        """


class InProcess:
    """Runs tasks in this process."""

    def __init__(self, context: RunContext, stop: StopRequest, on_batch: OnBatch) -> None:
        self._context = context
        self._writer = context.writer()
        self._reading = ReadingThread(connection)
        self._pipeline = context.pipeline(self._reading, self._writer, stop, on_batch, limit=context.options.limit)
        self._is_revisiting = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._reading.__exit__(*error)

    def run(self, task: Task) -> None:
        """Run a task, see Executor. After a task of the phase REVISIT, only tasks of that phase are allowed."""
        if task.phase is Phase.REVISIT and not self._is_revisiting:
            self._is_revisiting = True
            self._pipeline.writer = self._context.updater(self._writer)
            self._pipeline.resolutions = self._context.every_resolution
        self._pipeline.run(self._context.reader(task, EVERYBODY))


class WorkerError(Exception):
    """A worker failed or kept dying. The message is stored in the record of the run."""


class _Share(NamedTuple):
    """A partition of the rows of a task for one worker. With a rate limit, `turn` other workers begin before it."""

    task: Task
    partition: Partition
    turn: int = 0


class _Ended(NamedTuple):
    """What a worker sends at the end of its share: the error that ended it early, or None."""

    trouble: Exception | None


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    messages: Connection
    share: _Share | None = None

    def ask_to_stop(self) -> None:
        """Ask the worker to stop after its batch, or to cancel a statement that blocks it."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, STOP)


class WorkerPool:
    """Runs tasks in worker processes. A worker that dies is replaced, and the new one takes over its share.

    All workers are forked before the first one begins, including the spare ones, because forking is only safe while no
    thread is running. The pool shares only a pipe with each worker, which is at its end when the other side dies.
    There is no lock that a killed worker could hold.
    """

    def __init__(self, context: RunContext, stop: StopRequest, on_batch: OnBatch) -> None:
        self._context = context
        self._stop = stop
        self._on_batch = on_batch
        # Starting a new interpreter takes half a second; forking takes almost no time.
        self._processes = multiprocessing.get_context("fork")
        self._at_work: list[_Worker] = []
        self._spare: list[_Worker] = []
        self._kill_at: float | None = None
        self._revisiting: InProcess | None = None
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        # A child process must not share a connection.
        connections.close_all()
        count = self._context.options.workers
        try:
            for _ in range(count + MAX_REPLACEMENTS):
                self._spawn()
        except OSError as error:
            self._end_workers(at_once=True)
            raise WorkerError(f"a worker process could not be started: {error.strerror}") from None
        self._at_work, self._spare = self._spare[:count], self._spare[count:]
        return self

    def __exit__(self, kind: type[BaseException] | None, /, *_error: object) -> None:
        self._end_workers(at_once=kind is KeyboardInterrupt)
        self._exits.close()

    def run(self, task: Task) -> None:
        """Run a task, see Executor.

        A single worker processes rows with a resolution, and this process revisits rows, because the order in which
        these rows match a contact must not depend on the number of workers.
        """
        if task.phase is Phase.REVISIT:
            self._in_process().run(task)
        elif task.phase is Phase.RESOLVED:
            self._dispatch([_Share(task, EVERYBODY)])
        else:
            count = len(self._at_work)
            self._dispatch([_Share(task, Partition(number, count), turn=number) for number in range(count)])

    def _in_process(self) -> InProcess:
        if self._revisiting is None:
            # The workers have no more tasks, and this process needs a second connection for reading.
            self._end_workers(at_once=False)
            self._revisiting = self._exits.enter_context(InProcess(self._context, self._stop, self._on_batch))
        return self._revisiting

    def _dispatch(self, shares: Sequence[_Share]) -> None:
        for worker, share in zip(self._at_work, shares, strict=False):
            self._send(worker, share)
        trouble: Exception | None = None
        while busy := [worker for worker in self._at_work if worker.share]:
            if self._stop.requested or trouble:
                self._ask_to_stop(busy)
            for ready in wait([worker.messages for worker in busy], timeout=POLL_INTERVAL):
                worker = next(worker for worker in busy if worker.messages is ready)
                received = self._receive(worker)
                # The first error is the cause; the other workers end because they are asked to stop.
                trouble = trouble or received
        if trouble is not None:
            raise trouble

    def _ask_to_stop(self, busy: Sequence[_Worker]) -> None:
        """Ask the workers to end their batch, and kill those that do not end in time."""
        now = time.monotonic()
        if self._kill_at is None:
            self._kill_at = now + (STOP_TIMEOUT if self._stop.requested else LONG_STOP_TIMEOUT)
            for worker in busy:
                worker.ask_to_stop()
        elif now > self._kill_at:
            for worker in busy:
                worker.process.kill()

    def _spawn(self) -> None:
        ours, theirs = self._processes.Pipe()
        inherited = [worker.messages for worker in self._spare]
        process = self._processes.Process(
            target=_work,
            args=(self._context, theirs, [*inherited, ours]),
            name=f"worker {len(self._spare) + 1}",
            daemon=True,
        )
        try:
            process.start()
        finally:
            theirs.close()
        self._spare.append(_Worker(process, ours))

    def _send(self, worker: _Worker, share: _Share) -> None:
        worker.share = share
        try:
            worker.messages.send(share)
        except OSError:
            # The worker died while it was idle. `_receive` handles this.
            return

    def _receive(self, worker: _Worker) -> Exception | None:
        """Receive one message. Returns the error that ended the worker's share early, or None."""
        try:
            message = worker.messages.recv()
        except (EOFError, OSError):
            return self._replace(worker)
        if isinstance(message, _Ended):
            worker.share = None
            return message.trouble
        self._on_batch(*message)
        return None

    def _replace(self, dead: _Worker) -> Exception | None:
        dead.process.join()
        dead.messages.close()
        share, dead.share = dead.share, None
        if share is None or self._kill_at is not None:
            return InterruptedRunError("a worker was stopped in the middle of a batch, which was rolled back")
        if self._context.run_id is None:
            # Its overlay is lost, and its rows would be counted twice.
            return WorkerError("a worker died, and its part of the dry run is lost: run the command again")
        if not self._spare:
            return WorkerError("workers kept dying")
        logger.warning(
            "%s died (exit code %s): its partition is given to another worker", dead.process.name, dead.process.exitcode
        )
        successor = self._spare.pop(0)
        self._at_work[self._at_work.index(dead)] = successor
        # It is unknown when the dead worker began its last batch, so the new one waits for the time of a whole batch.
        self._send(successor, share._replace(turn=len(self._at_work)))
        return None

    def _end_workers(self, *, at_once: bool) -> None:
        workers = [*self._at_work, *self._spare]
        for worker in workers:
            if at_once:
                worker.process.kill()
            elif worker.share:
                worker.ask_to_stop()
            worker.messages.close()
        until = time.monotonic() + (STOP_TIMEOUT if self._stop.requested else LONG_STOP_TIMEOUT)
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
        self._at_work, self._spare = [], []


@dataclass(frozen=True, slots=True)
class _StopOfWorker:
    """Whether the parent asked to stop or has died. During a task, only the end of the pipe can be read from it."""

    interruption: Interruption
    messages: Connection

    @property
    def requested(self) -> bool:
        return self.interruption.requested or self.messages.poll()


def _work(context: RunContext, messages: Connection, inherited: Sequence[Connection]) -> None:
    """Run a worker process: receive shares, and send the counts of batches."""
    # Ctrl-C and a closed terminal signal the whole process group; the parent decides what to do.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # While this process has a copy of the parent's end, the pipe would not be at its end when the parent dies.
    for end in inherited:
        end.close()
    interruption = Interruption()
    with interruption.heeded([STOP]), ReadingThread(connection) as reading, suppress(EOFError, OSError):
        # Ends with an EOFError when the parent closes the pipe or dies.
        try:
            stop = _StopOfWorker(interruption, messages)
            pipeline = context.pipeline(
                reading,
                context.writer(),
                stop,
                lambda source, totals: messages.send((source, totals)),
                shares=context.options.workers,
            )
            while True:
                share: _Share = messages.recv()
                messages.send(_run(pipeline, context, share))
        finally:
            connections.close_all()


def _run(pipeline: Pipeline, context: RunContext, share: _Share) -> _Ended:
    """Run a share and return how it ended. Database errors are not sent to the parent, because they can quote rows."""
    try:
        pipeline.run(context.reader(share.task, share.partition), share.turn)
    except (InterruptedRunError, LeaseLostError, OperatorError, errors.EveryRowRefusedError) as error:
        return _Ended(error)
    except DjangoDatabaseError as error:
        return _Ended(WorkerError(errors.describe(error)))
    return _Ended(None)

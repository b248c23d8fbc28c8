"""Executors of a run's tasks: this process, or a pool of processes over partitions of the people.

All rows of one person are in one partition, and the next task begins when every partition of the one before is done.
So who makes a contact does not depend on how many workers there are, nor on which of them is faster.
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

#: How often the partition of a dead worker is given to another one, in all.
MAX_REPLACEMENTS = 3
#: How often the pool looks up from its messages to see whether it is to stop; seconds.
POLL_INTERVAL = 0.05
#: The signal that asks a worker to stop. One that has not come so far as to listen for it ends by it.
STOP = signal.SIGUSR1
#: How long a worker may take to stop, which includes the grace of its statement, before it is killed: where an operator
#: waits for that, and otherwise. Seconds.
STOP_TIMEOUT, LONG_STOP_TIMEOUT = 1.4, 10.0


class Executor(Protocol):
    """Runs tasks, one after the other. A context manager: it lets go of its processes and threads at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, /, *error: object) -> None: ...

    def run(self, task: Task) -> None:
        """Bring every row of a task to an outcome.

        Raises InterruptedRunError, LeaseLostError, OperatorError, and WorkerError or django.db.Error for what trying
        again did not cure. No batch is under way any more then.
        """


class InProcess:
    """This process does everything."""

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
        """See Executor. No task of another phase may come after one that revisits rows."""
        if task.phase is Phase.REVISIT and not self._is_revisiting:
            self._is_revisiting = True
            self._pipeline.writer = self._context.updater(self._writer)
            self._pipeline.resolutions = self._context.every_resolution
        self._pipeline.work_through(self._context.reader(task, EVERYBODY))


class WorkerError(Exception):
    """A worker failed or kept dying; the message is for the run's record."""


class _Share(NamedTuple):
    """What a worker is given: a partition of a task's rows, and how many others begin before it at a limited rate."""

    task: Task
    partition: Partition
    turn: int = 0


class _Ended(NamedTuple):
    """What a worker sends at the end of its share: what ended it early, or None."""

    trouble: Exception | None


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    messages: Connection
    share: _Share | None = None

    def ask_to_stop(self) -> None:
        """Let it end its batch, or end what keeps it from that."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, STOP)


class WorkerPool:
    """Worker processes. One that dies is replaced, and its share given to the next one.

    All of them are there before the first begins, those too that replace others: a fork is safe only as long as no
    thread is running. Nothing is shared but a pipe with each, which reads as closed when the other side is gone: no
    lock that a worker could hold when it is killed.
    """

    def __init__(self, context: RunContext, stop: StopRequest, on_batch: OnBatch) -> None:
        self._context = context
        self._stop = stop
        self._on_batch = on_batch
        # A fork costs nothing where a fresh interpreter costs half a second.
        self._processes = multiprocessing.get_context("fork")
        self._at_work: list[_Worker] = []
        self._spare: list[_Worker] = []
        self._give_up_at: float | None = None
        self._revisiting: InProcess | None = None
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        # No connection may be shared with a child.
        connections.close_all()
        count = self._context.options.workers
        try:
            for _ in range(count + MAX_REPLACEMENTS):
                self._spawn()
        except OSError as error:
            self._dismiss(at_once=True)
            raise WorkerError(f"no process could be started for a worker: {error.strerror}") from None
        self._at_work, self._spare = self._spare[:count], self._spare[count:]
        return self

    def __exit__(self, kind: type[BaseException] | None, /, *_error: object) -> None:
        self._dismiss(at_once=kind is KeyboardInterrupt)
        self._exits.close()

    def run(self, task: Task) -> None:
        """See Executor. One worker takes the rows with a resolution, and this process revisits rows.

        Which row meets a contact first must not depend on the number of workers there.
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
            # Nothing is left for the workers to do, and this process is about to read over a second connection.
            self._dismiss(at_once=False)
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
                # The first is the cause; the others stop because they were asked to.
                trouble = trouble or received
        if trouble is not None:
            raise trouble

    def _ask_to_stop(self, busy: Sequence[_Worker]) -> None:
        """Ask them to end their batch, and kill those that do not come to an end by themselves."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + (STOP_TIMEOUT if self._stop.requested else LONG_STOP_TIMEOUT)
            for worker in busy:
                worker.ask_to_stop()
        elif now > self._give_up_at:
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
            # It died while it had nothing to do; reading its messages shows that.
            return

    def _receive(self, worker: _Worker) -> Exception | None:
        """Receive one message; what ended the worker's share early, if it says so."""
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
        if share is None or self._give_up_at is not None:
            return InterruptedRunError("a worker was stopped in the middle of a batch, which was rolled back")
        if self._context.run_id is None:
            # What it would have made is forgotten, and what it has counted would be counted again.
            return WorkerError("a worker died, and what it knew of this dry run with it: run the command again")
        if not self._spare:
            return WorkerError("workers kept dying")
        logger.warning(
            "%s died (exit code %s): its partition is given to another worker", dead.process.name, dead.process.exitcode
        )
        successor = self._spare.pop(0)
        self._at_work[self._at_work.index(dead)] = successor
        # When the dead one began its last batch is unknown: let the time of a whole one pass.
        self._send(successor, share._replace(turn=len(self._at_work)))
        return None

    def _dismiss(self, *, at_once: bool) -> None:
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
    """Whether the parent asked to stop, or is no more: nothing else is to be read from the pipe during a task."""

    interruption: Interruption
    messages: Connection

    @property
    def requested(self) -> bool:
        return self.interruption.requested or self.messages.poll()


def _work(context: RunContext, messages: Connection, inherited: Sequence[Connection]) -> None:
    """Run shares in a worker process: shares come in, the counts of batches go out."""
    # Ctrl-C and a terminal that is gone reach the whole group of processes; the parent decides what they mean.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # With a copy of the parent's end the pipe would never read as closed.
    for end in inherited:
        end.close()
    interruption = Interruption()
    with interruption.heeded([STOP]), ReadingThread(connection) as reading, suppress(EOFError, OSError):
        # It ends when the parent has closed the pipe, or is gone.
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
    """Run a share; how it ended, as something that may be sent to the parent: no database error, which quotes rows."""
    try:
        pipeline.work_through(context.reader(share.task, share.partition), share.turn)
    except (InterruptedRunError, LeaseLostError, OperatorError, errors.EveryRowRefusedError) as error:
        return _Ended(error)
    except DjangoDatabaseError as error:
        return _Ended(WorkerError(errors.describe(error)))
    return _Ended(None)

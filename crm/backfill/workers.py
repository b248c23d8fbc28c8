"""The hands of a run: this process alone, or several processes over partitions of the people.

All rows of one person are in one partition, and the next source begins when every partition of the one before is done.
So who makes a contact does not depend on how many workers there are, nor on which of them is faster.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import NamedTuple, Self

from django.conf import settings
from django.db import Error as DjangoDatabaseError
from django.db import connection, connections

from crm.backfill import errors
from crm.backfill.fence import FenceLostError
from crm.backfill.known import ContactLookup
from crm.backfill.options import RunOptions
from crm.backfill.outcome import Source, Totals
from crm.backfill.pace import BatchSizer, RateLimit, Throttle
from crm.backfill.pipeline import InterruptedRunError, Pipeline, StopRequest, Writer
from crm.backfill.rehearsal import RehearsalWriter
from crm.backfill.replication import BlindThrottleError, ReplicaLagLimit
from crm.backfill.resolutions import Resolutions
from crm.backfill.schema import DatabaseFacts
from crm.backfill.source import EVERY_ROW, EVERYBODY, UNSETTLED, Apart, Partition, SourceReader
from crm.backfill.update.reader import Present, rows_to_revisit
from crm.backfill.update.rehearsal import UpdateRehearsal
from crm.backfill.update.writer import UpdateWriter
from crm.backfill.writer import BatchWriter, Timeouts
from crm.errors import OperatorError

logger = logging.getLogger(__name__)

#: How often the partition of a dead worker is taken up again, in all.
MOST_REPLACEMENTS = 3
#: How often the crew looks up from its messages to see whether it is to stop; seconds.
LOOK_UP_EVERY = 0.05

OnBatch = Callable[[Source, Totals], None]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a run's hands must know. `left` are the ids of the rows to be looked at, where they are few, and `untouched`
    the sources of which no row has a line."""

    options: RunOptions
    facts: DatabaseFacts
    run_id: int | None
    resolutions: Resolutions
    left: Mapping[Source, Sequence[str]]
    untouched: Collection[Source]

    def writer(self) -> BatchWriter | RehearsalWriter:
        """What brings rows to an outcome, on this process' connection."""
        lookup = ContactLookup(connection, self.facts)
        if self.run_id is None:
            return RehearsalWriter(connection, lookup, with_update=self.options.update)
        return BatchWriter(connection, lookup, self.run_id, Timeouts())

    def updater(self, before: BatchWriter | RehearsalWriter) -> Writer:
        """What looks at rows again; a dry run must know what it would have done `before`."""
        present = Present(connection, self.facts, with_versions=self.run_id is not None)
        if isinstance(before, RehearsalWriter):
            return UpdateRehearsal(before.store, before.imagined, present, self.facts.rules())
        lookup = ContactLookup(connection, self.facts)
        return UpdateWriter(connection, lookup, present, self.facts.rules(), before.run_id, Timeouts())

    def pipeline(self, writer: Writer, stop: StopRequest, on_batch: OnBatch, limit: int | None = None) -> Pipeline:
        """A pipeline on this process' connection."""
        sizer, throttles = self._pace()
        return Pipeline(
            connection=connection,
            rules=self.facts.rules(),
            writer=writer,
            stop=stop,
            on_batch=on_batch,
            sizer=sizer,
            throttles=throttles,
            limit=limit,
            resolutions=self.resolutions,
        )

    def every_resolution(self) -> Resolutions:
        """What people decided, also what was carried out: a second look holds to it as well."""
        try:
            return Resolutions.every(connection)
        except OperatorError:
            if self.run_id is not None:
                raise
            return self.resolutions

    def second_reader(self, source: Source) -> SourceReader:
        """The reader of the rows of a source that are to be looked at again."""
        choice = rows_to_revisit(self.facts, source, with_unsettled=self.options.dry_run)
        return SourceReader(connection, self.facts, source, self.options.since, choice=choice)

    def reader(self, source: Source, partition: Partition) -> SourceReader:
        """The reader of a source's partition, but for the rows that people decided on."""
        decided = self.resolutions.source_ids.get(source.table)
        return self._reader(source, partition, Apart(decided, alone=False) if decided else None)

    def reader_of_decided(self, source: Source) -> SourceReader:
        """The reader of those rows of a source that people decided on, of all partitions."""
        return self._reader(source, EVERYBODY, Apart(self.resolutions.source_ids.get(source.table, ()), alone=True))

    def _reader(self, source: Source, partition: Partition, apart: Apart | None) -> SourceReader:
        return SourceReader(
            connection=connection,
            facts=self.facts,
            source=source,
            since=self.options.since,
            partition=partition,
            run_id=self.run_id,
            apart=apart,
            ids=self.left.get(source),
            choice=EVERY_ROW if source in self.untouched else UNSETTLED,
        )

    def _pace(self) -> tuple[BatchSizer, list[Throttle]]:
        throttles: list[Throttle] = []
        most = None
        if self.options.max_rate is not None:
            rate = RateLimit(max(1, self.options.max_rate // self.options.workers))
            most = rate.most_rows if self.options.batch_size else min(rate.most_rows, rate.rows_of_a_target)
            throttles.append(rate)
        if self.options.max_replica_lag is not None:
            throttles.append(ReplicaLagLimit(connection, self.options.max_replica_lag))
        return BatchSizer(fixed=self.options.batch_size, most=most), throttles


def most_workers() -> int:
    """One a processor, as far as the server's connections allow: a worker reads on one and writes on another."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int "
            "- (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"
        )
        (free,) = cursor.fetchone()
    allowed: int = min(free, settings.DATABASE_CONNECTION_LIMIT or free)
    return max(1, min(os.cpu_count() or 1, (allowed - 1) // 2))


class Alone:
    """This process does everything."""

    def __init__(self, assignment: Assignment, stop: StopRequest, on_batch: OnBatch) -> None:
        self._assignment = assignment
        self._writer = assignment.writer()
        self._pipeline = assignment.pipeline(self._writer, stop, on_batch, assignment.options.limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left behind."""

    def work_through(self, source: Source) -> None:
        """Take a source through to its end. Raises what Pipeline.work_through does."""
        self._pipeline.work_through(self._assignment.reader(source, EVERYBODY))

    def work_through_decided(self, source: Source) -> None:
        """The same for the rows of a source that people decided on."""
        self._pipeline.work_through(self._assignment.reader_of_decided(source))

    def look_again(self, sources: Iterable[Source]) -> None:
        """Look again at the rows of sources, when all are through. Raises what Pipeline.work_through does."""
        self._pipeline.writer = self._assignment.updater(self._writer)
        self._pipeline.resolutions = self._assignment.every_resolution()
        for source in sources:
            self._pipeline.work_through(self._assignment.second_reader(source))


class WorkerError(Exception):
    """A worker failed or kept dying; the message is for the run's record."""


class _Task(NamedTuple):
    """What a worker is given: its partition of a source, or all rows of a source that people decided on."""

    source: Source
    decided: bool = False


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    messages: Connection
    partition: Partition
    is_busy: bool = False


class Crew:
    """Worker processes, one a partition. One that dies is replaced, and its partition taken up again."""

    def __init__(self, assignment: Assignment, stop: StopRequest, on_batch: OnBatch) -> None:
        self._assignment = assignment
        self._stop = stop
        self._on_batch = on_batch
        # A fork costs nothing where a fresh interpreter costs half a second; no thread is running yet.
        self._context = multiprocessing.get_context("fork")
        self._everybody_stop = self._context.Event()
        self._workers: list[_Worker] = []
        self._replacements = 0

    def __enter__(self) -> Self:
        # No connection may be shared with a child.
        connections.close_all()
        count = self._assignment.options.workers
        self._workers = [self._hire(Partition(number, count)) for number in range(count)]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._everybody_stop.set()
        if kind is KeyboardInterrupt:
            for worker in self._workers:
                worker.process.kill()
        for worker in self._workers:
            worker.messages.close()
        for worker in self._workers:
            worker.process.join()

    def work_through(self, source: Source) -> None:
        """Take every partition of a source through to its end.

        Raises InterruptedRunError, FenceLostError, BlindThrottleError, and WorkerError for what a worker could not
        cure. The other workers have ended their batch by then.
        """
        self._share_out(_Task(source), self._workers)

    def work_through_decided(self, source: Source) -> None:
        """Let one worker take the rows of a source that people decided on through to their end. Raises the same."""
        self._share_out(_Task(source, decided=True), self._workers[:1])

    def _share_out(self, task: _Task, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            self._give(worker, task)
        trouble: Exception | None = None
        while busy := [worker for worker in self._workers if worker.is_busy]:
            if self._stop.requested:
                self._everybody_stop.set()
            for ready in wait([worker.messages for worker in busy], timeout=LOOK_UP_EVERY):
                worker = next(worker for worker in busy if worker.messages is ready)
                heard = self._hear(worker, task)
                # The first is the cause; the others stop because they were asked to.
                trouble = trouble or heard
            if trouble is not None:
                self._everybody_stop.set()
        if trouble is not None:
            raise trouble

    def look_again(self, sources: Iterable[Source]) -> None:
        """Let this process look again at the rows of sources: which row fills first must not depend on the workers."""
        Alone(self._assignment, self._stop, self._on_batch).look_again(sources)

    def _hire(self, partition: Partition) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work,
            args=(self._assignment, partition, theirs, self._everybody_stop, os.getpid()),
            name=f"worker {partition.number + 1}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, partition)

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.is_busy = True
        try:
            worker.messages.send(task)
        except OSError:
            # It died while it had nothing to do; that is heard when its messages are read.
            return

    def _hear(self, worker: _Worker, task: _Task) -> Exception | None:
        """Take one message; the trouble that it tells of."""
        try:
            message = worker.messages.recv()
        except (EOFError, ConnectionResetError):
            return self._replace(worker, task)
        if isinstance(message, Totals):
            self._on_batch(task.source, message)
            return None
        worker.is_busy = False
        return message if isinstance(message, Exception) else None

    def _replace(self, worker: _Worker, task: _Task) -> Exception | None:
        worker.process.join()
        worker.messages.close()
        worker.is_busy = False
        if self._everybody_stop.is_set():
            return None
        self._replacements += 1
        if self._replacements > MOST_REPLACEMENTS:
            return WorkerError("workers kept dying")
        logger.warning(
            "%s died (exit code %s): its partition is taken up again", worker.process.name, worker.process.exitcode
        )
        # The parent's connection, if it has one by now, is not to be shared either.
        connections.close_all()
        successor = self._hire(worker.partition)
        self._workers[self._workers.index(worker)] = successor
        self._give(successor, task)
        return None


@dataclass(frozen=True, slots=True)
class _Bell:
    """Asks a worker to stop: the parent did, or is no more."""

    event: Event
    parent: int

    @property
    def requested(self) -> bool:
        return self.event.is_set() or os.getppid() != self.parent


def _work(assignment: Assignment, partition: Partition, messages: Connection, event: Event, parent: int) -> None:
    """A worker's life: tasks in, batches out."""
    # Ctrl-C reaches the whole group of processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bell = _Bell(event, parent)
    pipeline = assignment.pipeline(assignment.writer(), bell, lambda _source, totals: messages.send(totals))
    try:
        while not bell.requested:
            # Asked with a time limit: the other workers hold copies of the parent's end, so it never reads as closed.
            if messages.poll(LOOK_UP_EVERY):
                task = messages.recv()
                reader = (
                    assignment.reader_of_decided(task.source)
                    if task.decided
                    else assignment.reader(task.source, partition)
                )
                messages.send(_outcome_of(pipeline, reader))
    except (EOFError, OSError):
        # The parent has closed the pipe, or is gone.
        return
    finally:
        connections.close_all()


def _outcome_of(pipeline: Pipeline, reader: SourceReader) -> Exception | None:
    """What ended the work, as something that may be sent to the parent: never a database error, which quotes rows."""
    try:
        pipeline.work_through(reader)
    except (InterruptedRunError, FenceLostError, BlindThrottleError) as error:
        return error
    except DjangoDatabaseError as error:
        return WorkerError(errors.described(error))
    return None

"""The hands of a run: this process alone, or several processes over partitions of the people.

All rows of one person are in one partition, and the next source begins when every partition of the one before is done.
So who makes a contact does not depend on how many workers there are, nor on which of them is faster.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Self

from django.conf import settings
from django.db import Error as DjangoDatabaseError
from django.db import connection, connections

from crm.backfill.pipeline import Pipeline, StopRequest, Writer
from crm.backfill.read.contacts import ContactIndex
from crm.backfill.read.readahead import ReadingThread
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.source import (
    EVERY_ROW,
    EVERYBODY,
    UNSETTLED,
    UNSETTLED_OR_GONE,
    Apart,
    Choice,
    Partition,
    SourceReader,
)
from crm.backfill.update.reader import DueReader, Present, rows_to_revisit
from crm.backfill.update.rehearsal import DryRunUpdateWriter
from crm.backfill.update.writer import UpdateWriter
from crm.backfill.write.rehearsal import DryRunWriter
from crm.backfill.write.writer import BatchWriter, Timeouts
from crm.errors import OperatorError
from crm.interruption import InterruptedRunError, Interruption
from crm.outcome import Source, Totals
from crm.postgres import errors
from crm.postgres.facts.schema import DatabaseFacts
from crm.rules.options import RunOptions
from crm.rules.throttling import BatchSizer, RateLimit, Throttle
from crm.runs.lease import LeaseLostError
from crm.runs.replication import ReplicaLagLimit

logger = logging.getLogger(__name__)

#: How often the partition of a dead worker is taken up again, in all.
MAX_REPLACEMENTS = 3
#: How often the crew looks up from its messages to see whether it is to stop; seconds.
POLL_INTERVAL = 0.05
#: What asks a worker to stop. One that has not got so far as to listen for it ends by it.
STOP = signal.SIGUSR1
#: How long a worker may take to stop, which includes the grace of what it is at, before it is killed; and how long
#: where nobody waits for that. Seconds.
PATIENCE, LONG_PATIENCE = 1.4, 10.0
#: A worker reads on one and writes on another.
CONNECTIONS_OF_A_WORKER = 2

OnBatch = Callable[[Source, Totals], None]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a run's hands must know.

    `resolutions` are those to be carried out, and `every_resolution` also those that were: a second look holds to them
    as well. `left` are the ids of the rows to be looked at, where they are few, and `untouched` the sources of which no
    row has a line.
    """

    options: RunOptions
    facts: DatabaseFacts
    run_id: int | None
    resolutions: Resolutions
    every_resolution: Resolutions
    left: Mapping[Source, Sequence[str]]
    untouched: Collection[Source]

    def writer(self) -> BatchWriter | DryRunWriter:
        """What brings rows to an outcome, on this process' connection."""
        lookup = ContactIndex(connection, self.facts)
        if self.run_id is None:
            return DryRunWriter(connection, lookup, with_update=self.options.update)
        return BatchWriter(connection, lookup, self.run_id, Timeouts(), replaces_lines=self.options.recreate_deleted)

    def updater(self, before: BatchWriter | DryRunWriter) -> Writer:
        """What looks at rows again; a dry run must know what it would have done `before`."""
        present = Present(connection, self.facts, self.every_resolution, with_versions=self.run_id is not None)
        if isinstance(before, DryRunWriter):
            return DryRunUpdateWriter(before.store, before.imagined, present, self.facts.rules())
        lookup = ContactIndex(connection, self.facts)
        return UpdateWriter(connection, lookup, present, self.facts.rules(), before.run_id, Timeouts())

    def pipeline(
        self,
        reading: ReadingThread,
        writer: Writer,
        stop: StopRequest,
        on_batch: OnBatch,
        *,
        limit: int | None = None,
        shares: int = 1,
    ) -> Pipeline:
        """A pipeline on this process' connection, which has one of so many shares of a limited rate."""
        sizer, throttles = self._pace(shares)
        return Pipeline(
            connection=connection,
            rules=self.facts.rules(),
            reading=reading,
            writer=writer,
            stop=stop,
            on_batch=on_batch,
            sizer=sizer,
            throttles=throttles,
            limit=limit,
            resolutions=self.resolutions,
        )

    def second_reader(self, source: Source) -> SourceReader:
        """The reader of the rows of a source that are to be looked at again."""
        choice = rows_to_revisit(self.facts, source, with_unsettled=self.options.dry_run)
        # In a dry run, rows without a line are due as well.
        reader = SourceReader if self.options.dry_run else DueReader
        return reader(connection, self.facts, source, self.options.since, choice=choice)

    def reader(self, source: Source, partition: Partition) -> SourceReader:
        """The reader of a source's partition, but for the rows that people decided on."""
        decided = self.resolutions.source_ids.get(source.table)
        return self._reader(source, partition, Apart(decided, alone=False) if decided else None)

    def reader_of_resolved(self, source: Source) -> SourceReader:
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
            choice=self._choice(source),
        )

    def _choice(self, source: Source) -> Choice:
        if source in self.untouched:
            return EVERY_ROW
        return UNSETTLED_OR_GONE if self.options.recreate_deleted and self.facts.has_ledger else UNSETTLED

    def _pace(self, shares: int) -> tuple[BatchSizer, list[Throttle]]:
        throttles: list[Throttle] = []
        most = None
        if self.options.max_rate is not None:
            rate = RateLimit(self.options.max_rate, shares)
            most = rate.max_rows if self.options.batch_size else min(rate.max_rows, rate.rows_of_a_target)
            throttles.append(rate)
        if self.options.max_replica_lag is not None:
            throttles.append(ReplicaLagLimit(connection, self.options.max_replica_lag))
        return BatchSizer(fixed=self.options.batch_size, most=most), throttles


class _Room(NamedTuple):
    """How many more connections somebody allows, and the name of that limit with its figure."""

    connections: int
    limit: str


def _room() -> _Room:
    """For how many connections there is room beside those of others; this process' own counts as free."""
    rooms = []
    if settings.DATABASE_CONNECTION_LIMIT is not None:
        limit = settings.DATABASE_CONNECTION_LIMIT
        rooms.append(_Room(limit, f"connection_limit={limit} in DATABASE_URL"))
    # PgBouncer lends a connection for a transaction: how many clients there are is of no concern to the server.
    if not rooms or not _is_behind_pgbouncer():
        with connection.cursor() as cursor:
            cursor.execute(_ROOM_OF_THE_SERVER)
            rooms += [_Room(free, limit) for free, limit in cursor.fetchall()]
    return min(rooms)


# Whose session it is, everybody may see; of what kind it is, not everybody.
_ROOM_OF_THE_SERVER = """
WITH others AS (
  SELECT datid, usesysid FROM pg_stat_activity
   WHERE usesysid IS NOT NULL AND pid <> pg_backend_pid() AND COALESCE(backend_type, 'client backend') LIKE 'client%'
), limits(name, most, taken) AS (
  SELECT 'max_connections of the server, without those it reserves',
         current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
         - COALESCE(current_setting('reserved_connections', true)::int, 0),
         (SELECT count(*) FROM others)
   UNION ALL
  SELECT 'CONNECTION LIMIT of the database', datconnlimit, (SELECT count(*) FROM others WHERE datid = d.oid)
    FROM pg_database d WHERE datname = current_database() AND datconnlimit >= 0
   UNION ALL
  SELECT 'CONNECTION LIMIT of the role', rolconnlimit, (SELECT count(*) FROM others WHERE usesysid = r.oid)
    FROM pg_roles r WHERE rolname = session_user AND rolconnlimit >= 0
)
SELECT most - taken, name || ': ' || most || ', of which others have ' || taken FROM limits
"""


def _is_behind_pgbouncer() -> bool:
    return bool(connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"))


def max_workers() -> int:
    """One a processor, as far as there are connections: a worker reads on one and writes on another."""
    return max(1, min(os.cpu_count() or 1, (_room().connections - 1) // CONNECTIONS_OF_A_WORKER))


def require_room_for(workers: int) -> None:
    """Raise OperatorError where there are not the connections that so many workers take."""
    # Past PgBouncer, `connection_limit` is Prisma's, and one worker gets along with a single connection of the pool.
    if _is_behind_pgbouncer() and (workers == 1 or settings.DATABASE_CONNECTION_LIMIT is None):
        return
    room = _room()
    # One worker is this process itself; of several it is the one above them.
    needed = workers * CONNECTIONS_OF_A_WORKER + (workers > 1)
    if room.connections < needed:
        fewer = "Give fewer --workers, `auto` for as many as there may be, or raise" if workers > 1 else "Raise"
        raise OperatorError(
            f"{workers} {'workers take' if workers > 1 else 'worker takes'} {needed} connections, since each reads on "
            f"one and writes on another, and there are {max(0, room.connections)} ({room.limit}). {fewer} the limit. "
            "Nothing was written."
        )


class InProcess:
    """This process does everything."""

    def __init__(self, assignment: Assignment, stop: StopRequest, on_batch: OnBatch) -> None:
        self._assignment = assignment
        self._writer = assignment.writer()
        self._reading = ReadingThread(connection)
        limit = assignment.options.limit
        self._pipeline = assignment.pipeline(self._reading, self._writer, stop, on_batch, limit=limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._reading.__exit__(*error)

    def work_through(self, source: Source) -> None:
        """Take a source through to its end. Raises what Pipeline.work_through does."""
        self._pipeline.work_through(self._assignment.reader(source, EVERYBODY))

    def work_through_resolved(self, source: Source) -> None:
        """The same for the rows of a source that people decided on."""
        self._pipeline.work_through(self._assignment.reader_of_resolved(source))

    def look_again(self, sources: Iterable[Source]) -> None:
        """Look again at the rows of sources, when all are through. Raises what Pipeline.work_through does."""
        self._pipeline.writer = self._assignment.updater(self._writer)
        self._pipeline.resolutions = self._assignment.every_resolution
        for source in sources:
            self._pipeline.work_through(self._assignment.second_reader(source))


class WorkerError(Exception):
    """A worker failed or kept dying; the message is for the run's record."""


class _Task(NamedTuple):
    """What a worker is given: a partition of a source, or all rows of a source that people decided on.

    `turn` is how many others begin before it where the rate is limited.
    """

    source: Source
    partition: Partition
    decided: bool = False
    turn: int = 0


class _Heard(NamedTuple):
    """What a worker says at the end of a task: what ended it early, or None."""

    trouble: Exception | None


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    messages: Connection
    task: _Task | None = None

    def ask_to_stop(self) -> None:
        """Let it end its batch, or end what keeps it from that."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, STOP)


class WorkerPool:
    """Worker processes. One that dies is replaced, and its task given to the next one.

    All of them are there before the first begins, those too that replace others: a fork is safe only as long as no
    thread is running. Nothing is shared but a pipe with each, which reads as closed when the other side is no more: no
    lock that somebody could take with him when he is killed.
    """

    def __init__(self, assignment: Assignment, stop: StopRequest, on_batch: OnBatch) -> None:
        self._assignment = assignment
        self._stop = stop
        self._on_batch = on_batch
        # A fork costs nothing where a fresh interpreter costs half a second.
        self._context = multiprocessing.get_context("fork")
        self._at_work: list[_Worker] = []
        self._spare: list[_Worker] = []
        self._give_up_at: float | None = None

    def __enter__(self) -> Self:
        # No connection may be shared with a child.
        connections.close_all()
        count = self._assignment.options.workers
        try:
            for _ in range(count + MAX_REPLACEMENTS):
                self._hire()
        except OSError as error:
            self._dismiss(at_once=True)
            raise WorkerError(f"no process could be started for a worker: {error.strerror}") from None
        self._at_work, self._spare = self._spare[:count], self._spare[count:]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._dismiss(at_once=kind is KeyboardInterrupt)

    def work_through(self, source: Source) -> None:
        """Take every partition of a source through to its end.

        Raises InterruptedRunError, LeaseLostError, OperatorError, and WorkerError for what a worker could not
        cure. The other workers have ended their batch by then.
        """
        count = len(self._at_work)
        self._share_out([_Task(source, Partition(number, count), turn=number) for number in range(count)])

    def work_through_resolved(self, source: Source) -> None:
        """Let one worker take the rows of a source that people decided on through to their end. Raises the same."""
        self._share_out([_Task(source, EVERYBODY, decided=True)])

    def look_again(self, sources: Iterable[Source]) -> None:
        """Let this process look again at the rows of sources: which row fills first must not depend on the workers."""
        with InProcess(self._assignment, self._stop, self._on_batch) as alone:
            alone.look_again(sources)

    def _share_out(self, tasks: Sequence[_Task]) -> None:
        for worker, task in zip(self._at_work, tasks, strict=False):
            self._give(worker, task)
        trouble: Exception | None = None
        while busy := [worker for worker in self._at_work if worker.task]:
            if self._stop.requested or trouble:
                self._ask_to_stop(busy)
            for ready in wait([worker.messages for worker in busy], timeout=POLL_INTERVAL):
                worker = next(worker for worker in busy if worker.messages is ready)
                heard = self._hear(worker)
                # The first is the cause; the others stop because they were asked to.
                trouble = trouble or heard
        if trouble is not None:
            raise trouble

    def _ask_to_stop(self, busy: Sequence[_Worker]) -> None:
        """Ask them to end their batch, and kill those that do not come to an end by themselves."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + (PATIENCE if self._stop.requested else LONG_PATIENCE)
            for worker in busy:
                worker.ask_to_stop()
        elif now > self._give_up_at:
            for worker in busy:
                worker.process.kill()

    def _hire(self) -> None:
        ours, theirs = self._context.Pipe()
        inherited = [worker.messages for worker in self._spare]
        process = self._context.Process(
            target=_work,
            args=(self._assignment, theirs, [*inherited, ours]),
            name=f"worker {len(self._spare) + 1}",
            daemon=True,
        )
        try:
            process.start()
        finally:
            theirs.close()
        self._spare.append(_Worker(process, ours))

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.task = task
        try:
            worker.messages.send(task)
        except OSError:
            # It died while it had nothing to do; that is heard when its messages are read.
            return

    def _hear(self, worker: _Worker) -> Exception | None:
        """Take one message; the trouble that it tells of."""
        try:
            message = worker.messages.recv()
        except (EOFError, OSError):
            return self._replace(worker)
        if isinstance(message, _Heard):
            worker.task = None
            return message.trouble
        self._on_batch(*message)
        return None

    def _replace(self, dead: _Worker) -> Exception | None:
        dead.process.join()
        dead.messages.close()
        task, dead.task = dead.task, None
        if task is None or self._give_up_at is not None:
            return InterruptedRunError("a worker was stopped in the middle of a batch, which was rolled back")
        if self._assignment.run_id is None:
            # What it would have made is forgotten, and what it has counted would be counted again.
            return WorkerError("a worker died, and what it knew of this dry run with it: run the command again")
        if not self._spare:
            return WorkerError("workers kept dying")
        logger.warning(
            "%s died (exit code %s): its partition is taken up again", dead.process.name, dead.process.exitcode
        )
        successor = self._spare.pop(0)
        self._at_work[self._at_work.index(dead)] = successor
        # Nobody knows when it began its last batch: the time of a whole one is let pass.
        self._give(successor, task._replace(turn=len(self._at_work)))
        return None

    def _dismiss(self, *, at_once: bool) -> None:
        everybody = [*self._at_work, *self._spare]
        for worker in everybody:
            if at_once:
                worker.process.kill()
            elif worker.task:
                worker.ask_to_stop()
            worker.messages.close()
        until = time.monotonic() + (PATIENCE if self._stop.requested else LONG_PATIENCE)
        for worker in everybody:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()


@dataclass(frozen=True, slots=True)
class _StopOfWorker:
    """Whether the parent asked to stop, or is no more: nothing else is to be read from the pipe during a task."""

    interruption: Interruption
    messages: Connection

    @property
    def requested(self) -> bool:
        return self.interruption.requested or self.messages.poll()


def _work(assignment: Assignment, messages: Connection, inherited: Sequence[Connection]) -> None:
    """A worker's life: tasks in, batches out."""
    # Ctrl-C reaches the whole group of processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # With a copy of the parent's end the pipe would never read as closed.
    for end in inherited:
        end.close()
    interruption = Interruption()
    with interruption.heeded([STOP]), ReadingThread(connection) as reading, suppress(EOFError, OSError):
        # It ends when the parent has closed the pipe, or is gone.
        try:
            stop = _StopOfWorker(interruption, messages)
            pipeline = assignment.pipeline(
                reading,
                assignment.writer(),
                stop,
                lambda source, totals: messages.send((source, totals)),
                shares=assignment.options.workers,
            )
            while True:
                task: _Task = messages.recv()
                reader = (
                    assignment.reader_of_resolved(task.source)
                    if task.decided
                    else assignment.reader(task.source, task.partition)
                )
                messages.send(_outcome_of(pipeline, reader, task.turn))
        finally:
            connections.close_all()


def _outcome_of(pipeline: Pipeline, reader: SourceReader, turn: int) -> _Heard:
    """What ended the work, as something that may be sent to the parent: never a database error, which quotes rows."""
    try:
        pipeline.work_through(reader, turn)
    except (InterruptedRunError, LeaseLostError, OperatorError, errors.EveryRowRefusedError) as error:
        return _Heard(error)
    except DjangoDatabaseError as error:
        return _Heard(WorkerError(errors.describe(error)))
    return _Heard(None)

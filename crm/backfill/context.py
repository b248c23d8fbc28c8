"""What the parts of a run share: the options, the facts, what is left to do, and how the parts are made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from django.db import connection

from crm.backfill.pipeline import Pipeline, Writer
from crm.backfill.read.contacts import ContactIndex
from crm.backfill.read.readahead import ReadingThread
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.source import (
    EVERY_ROW,
    UNSETTLED,
    UNSETTLED_OR_GONE,
    Apart,
    Choice,
    Partition,
    SourceReader,
)
from crm.backfill.update.dry_run import DryRunUpdateWriter
from crm.backfill.update.reader import DueReader, Present, rows_to_revisit
from crm.backfill.update.writer import UpdateWriter
from crm.backfill.write.dry_run import DryRunWriter
from crm.backfill.write.writer import BatchWriter
from crm.interruption import StopRequest
from crm.outcome import Source, Totals
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.transactions import Timeouts
from crm.rules.options import RunOptions
from crm.rules.throttling import BatchSizer, RateLimit, Throttle
from crm.runs.replication import ReplicaLagLimit

OnBatch = Callable[[Source, Totals], None]


class Phase(StrEnum):
    """Which rows of a source a task takes, in the order in which a run takes them."""

    PENDING = "pending"  # rows without an outcome, but for the next ones
    RESOLVED = "resolved"  # rows whose conflicts people resolved
    REVISIT = "revisit"  # rows with an outcome, for --update


class Task(NamedTuple):
    """A part of a run that ends before the next one begins."""

    source: Source
    phase: Phase


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every part of a run needs to know.

    `resolutions` are those that this run applies; `every_resolution` has also those that earlier runs applied, which
    the second pass needs. `pending_ids` are the ids of the rows to read, where they are few. `unstarted` are the
    sources of which no row has an entry in the ledger.
    """

    options: RunOptions
    facts: DatabaseFacts
    run_id: int | None
    resolutions: Resolutions
    every_resolution: Resolutions
    pending_ids: Mapping[Source, Sequence[str]]
    unstarted: Collection[Source]

    def writer(self) -> BatchWriter | DryRunWriter:
        """What brings rows to an outcome, on this process' connection."""
        lookup = ContactIndex(connection, self.facts)
        if self.run_id is None:
            return DryRunWriter(connection, lookup, with_update=self.options.update)
        return BatchWriter(connection, lookup, self.run_id, Timeouts(), replaces_entries=self.options.recreate_deleted)

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
        """Return a pipeline on this process' connection, with one of `shares` equal shares of a limited rate."""
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

    def reader(self, task: Task, partition: Partition) -> SourceReader:
        """The reader of a task's rows in a partition."""
        source = task.source
        if task.phase is Phase.REVISIT:
            choice = rows_to_revisit(self.facts, source, with_unsettled=self.options.dry_run)
            # In a dry run, rows without an entry are due as well.
            reader = SourceReader if self.options.dry_run else DueReader
            return reader(connection, self.facts, source, self.options.since, choice=choice)
        resolved = self.resolutions.source_ids.get(source.table)
        if task.phase is Phase.RESOLVED:
            return self._reader(source, partition, Apart(resolved or (), alone=True))
        return self._reader(source, partition, Apart(resolved, alone=False) if resolved else None)

    def _reader(self, source: Source, partition: Partition, apart: Apart | None) -> SourceReader:
        return SourceReader(
            connection=connection,
            facts=self.facts,
            source=source,
            since=self.options.since,
            partition=partition,
            run_id=self.run_id,
            apart=apart,
            ids=self.pending_ids.get(source),
            choice=self._choice(source),
        )

    def _choice(self, source: Source) -> Choice:
        if source in self.unstarted:
            return EVERY_ROW
        return UNSETTLED_OR_GONE if self.options.recreate_deleted and self.facts.has_ledger else UNSETTLED

    def _pace(self, shares: int) -> tuple[BatchSizer, list[Throttle]]:
        throttles: list[Throttle] = []
        most = None
        if self.options.max_rate is not None:
            rate = RateLimit(self.options.max_rate, shares)
            most = rate.max_rows if self.options.batch_size else min(rate.max_rows, rate.target_rows)
            throttles.append(rate)
        if self.options.max_replica_lag is not None:
            throttles.append(ReplicaLagLimit(connection, self.options.max_replica_lag))
        return BatchSizer(fixed=self.options.batch_size, max_rows=most), throttles

"""What the parts of a run share: options, facts about the database, pending rows, and how the parts are created."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Which rows of a source a task processes. The phases run in this order."""

    PENDING = "pending"  # rows without an outcome, except those of RESOLVED
    RESOLVED = "resolved"  # rows with a resolution
    REVISIT = "revisit"  # rows with an outcome, for --update


class Task(NamedTuple):
    """The rows of a source in a phase. A task is complete before the next one begins."""

    source: Source
    phase: Phase


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every part of a run needs.

    `run_id` is None for a dry run. `resolutions` are those that this run applies; `every_resolution` also has those
    that earlier runs applied, which --update needs. `pending_ids` are the ids of the rows to read, for sources with few
    of them. `unstarted` are the sources without a ledger entry. `due` stores the ids that --update found in each table.
    """

    options: RunOptions
    facts: DatabaseFacts
    run_id: int | None
    resolutions: Resolutions
    every_resolution: Resolutions
    pending_ids: Mapping[Source, Sequence[str]]
    unstarted: Collection[Source]
    due: dict[str, Sequence[str] | None] = field(default_factory=dict)

    def writer(self) -> BatchWriter | DryRunWriter:
        """Return the writer for rows without an outcome, on the connection of this process."""
        lookup = self._lookup()
        if self.run_id is None:
            return DryRunWriter(connection, lookup, with_update=self.options.update)
        return BatchWriter(connection, lookup, self.run_id, Timeouts(), replaces_entries=self.options.recreate_deleted)

    def updater(self, before: BatchWriter | DryRunWriter) -> Writer:
        """Return the writer for --update. In a dry run, it includes what the writer `before` would have written."""
        present = Present(connection, self.facts, self.every_resolution, with_versions=self.run_id is not None)
        if isinstance(before, DryRunWriter):
            return DryRunUpdateWriter(before.store, before.overlay, present, self.facts.rules())
        lookup = self._lookup()
        return UpdateWriter(connection, lookup, present, self.facts.rules(), before.run_id, Timeouts())

    def _lookup(self) -> ContactIndex:
        return ContactIndex(connection, self.facts, has_signups=Source.SIGNUPS not in self.unstarted)

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
        """Return a pipeline on the connection of this process, with one of `shares` equal shares of a rate limit."""
        sizer, throttles = self._throttling(shares)
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
        """Return the reader for the rows of a task in a partition."""
        source = task.source
        if task.phase is Phase.REVISIT:
            choice = rows_to_revisit(self.facts, source, with_unsettled=self.options.dry_run)
            # In a dry run, rows without an entry are due too: the run would have given them one.
            if self.options.dry_run:
                return SourceReader(connection, self.facts, source, self.options.since, choice=choice)
            return DueReader(connection, self.facts, source, self.options.since, choice=choice, listed=self.due)
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

    def _throttling(self, shares: int) -> tuple[BatchSizer, list[Throttle]]:
        throttles: list[Throttle] = []
        max_rows = None
        if self.options.max_rate is not None:
            rate = RateLimit(self.options.max_rate, shares)
            max_rows = rate.max_rows if self.options.batch_size else min(rate.max_rows, rate.target_rows)
            throttles.append(rate)
        if self.options.max_replica_lag is not None:
            throttles.append(ReplicaLagLimit(connection, self.options.max_replica_lag))
        return BatchSizer(fixed=self.options.batch_size, max_rows=max_rows), throttles

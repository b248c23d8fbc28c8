"""Runs a repair.

    examine -> claim the lease -> count contacts -> batches of contacts, by id: decide, write, commit
            -> compare the counts with the record of changes -> close -> RepairReport

A dry run takes the same steps with a writer that writes nothing, and claims no lease.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

from django.db import connection
from django.db.models import Count
from django.utils import timezone

from crm.models import BackfillBatch, BackfillRun, ContactUpdate
from crm.models.ledger import RunStatus
from crm.outcome import Repair, Totals
from crm.output.listing import ListingError
from crm.postgres import errors
from crm.postgres.facts.rights import OPERATION_OF_REPAIR, Operation, require_rights
from crm.postgres.facts.schema import DatabaseFacts, examine
from crm.postgres.snapshot import in_pages
from crm.repair.reader import Reader
from crm.repair.rules import KeepCause, RepairOutcome, totals_by_repair
from crm.repair.writer import DatabaseWriter, DryRunWriter, Writer
from crm.rules.throttling import BatchSizer
from crm.runs import lease
from crm.runs.lifecycle import Checked, Ending, Lifecycle, lifecycle
from crm.runs.progress import Progress, Silence
from crm.runs.retrying import Retries

DEFAULT_BATCH_SIZE = 1_000
#: Is called with the results of each batch after its commit. Raises ListingError.
Listener = Callable[[Iterable[RepairOutcome]], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """The result of a repair. `run_id` is None for a dry run.

    `counts` has the contacts by repair. `balanced` is None if the reconciliation was not checked; `not_checked` has the
    reason.
    """

    run_id: int | None
    status: RunStatus
    counts: dict[Repair, Totals]
    generation: str
    balanced: bool | None
    started_at: datetime
    seconds: float
    failure: str | None = None
    not_checked: str | None = None

    @property
    def dry_run(self) -> bool:
        """Whether nothing was written."""
        return self.run_id is None

    @property
    def totals(self) -> Totals:
        """The counts of all repairs."""
        everything = Totals()
        for counts in self.counts.values():
            everything.add(counts)
        return everything

    @property
    def refused(self) -> int:
        """The number of repairs that the database refused."""
        return self.totals.kept_by_column[KeepCause.REFUSED]

    @property
    def finished_at(self) -> datetime:
        """The time of its end by the clock of this machine."""
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def exit_code(self) -> int:
        """The exit code: 0 finished, 1 the database refused a repair, 4 stopped, 5 failed."""
        if self.status == RunStatus.FAILED:
            return 5
        if self.status != RunStatus.FINISHED:
            return 4
        return 1 if self.refused else 0


def repair_contacts(
    repairs: Collection[Repair],
    *,
    apply: bool,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress | None = None,
    listener: Listener | None = None,
) -> RepairReport:
    """Repair contacts that were created elsewhere, and return the report. Without `apply`, write nothing.

    `batch_size` is the maximum number of contacts in a transaction. `listener` is called after each batch.

    Raises OperatorError before anything is written: if the database does not meet the requirements, if this role lacks
    rights, or (AnotherRunError) if another run is in progress. Later errors are in the report.
    """
    started_at, started = timezone.now(), time.monotonic()
    wanted = [repair for repair in Repair if repair in repairs]
    with errors.refusing_to_start():
        facts = examine(connection, for_writing=apply)
        if facts.has_ledger:
            operations = dict.fromkeys(OPERATION_OF_REPAIR[repair] for repair in wanted)
            require_rights(connection, Operation.RUN, *operations, dry_run=not apply, writes_with_apply=True)
        else:
            logger.warning(
                "there is no ledger that this role may read: the dry run takes contacts of the backfill for contacts "
                "that were created elsewhere"
            )
    with lifecycle() as life:
        if apply:
            with errors.refusing_to_start():
                life.claim(lambda: _claim(wanted, batch_size, facts))
        work = _Work(Reader(connection, facts, wanted, apply), batch_size, progress or Silence(), listener, life)
        ending = work.close(life.carry_out(work.run, ListingError))
    return RepairReport(
        run_id=life.run.pk if life.run else None,
        status=ending.status,
        counts=work.counts,
        generation=facts.generation,
        balanced=ending.balanced,
        started_at=started_at,
        seconds=time.monotonic() - started,
        failure=ending.failure,
        not_checked=ending.not_checked,
    )


def _claim(repairs: Sequence[Repair], batch_size: int, facts: DatabaseFacts) -> BackfillRun:
    options = {"repairs": [repair.value for repair in repairs], "batch_size": batch_size}
    return lease.claim(BackfillRun.Kind.REPAIR, options, facts.generation)


class _Done(NamedTuple):
    """The results of a batch, the number of its contacts, and the id after which the next batch begins."""

    outcomes: Sequence[RepairOutcome]
    contacts: int
    last: str


@dataclass(slots=True)
class _Work:
    """The state of a repair."""

    reader: Reader
    batch_size: int
    progress: Progress
    listener: Listener | None
    life: Lifecycle
    counts: dict[Repair, Totals] = field(init=False)
    _retries: Retries = field(init=False)

    def __post_init__(self) -> None:
        self.counts = {repair: Totals() for repair in self.reader.repairs}
        self._retries = Retries(connection, self.life.interruption, BatchSizer(fixed=self.batch_size))

    def run(self) -> None:
        """Repair every contact. Raises the error that ends the run early."""
        rules, run = self.reader.facts.rules(), self.life.run
        writer: Writer = (
            DatabaseWriter(connection, self.reader, rules, run.pk) if run else DryRunWriter(self.reader, rules)
        )
        try:
            contacts = self.life.keeping_the_lease(self.reader.count)
            self.progress.begin("contacts", {self._title: contacts})
            after: str | None = None
            while True:
                self.life.interruption.heed()
                done = self._retries.run(partial(self._batch, writer, after))
                if done is None:
                    return
                self._retries.sizer.after_batch(done.contacts, seconds=0)
                after = done.last
                for repair, counts in totals_by_repair(done.outcomes).items():
                    self.counts[repair].add(counts)
                self.progress.advance(self._title, done.contacts, self._result())
                if self.listener:
                    self.listener(done.outcomes)
        finally:
            self.progress.end()

    def _batch(self, writer: Writer, after: str | None) -> _Done | None:
        with lease.kept(self.life.run.pk if self.life.run else None):
            # Reading a page may scan the whole table.
            page = self.reader.page(after, self._retries.sizer.size)
        return _Done(writer.repair(page), len(page), page[-1]) if page else None

    @property
    def _title(self) -> str:
        return "Repairing" if self.life.run else "Repairing (dry run)"

    def _result(self) -> str:
        updated, kept = (sum(getattr(counts, name) for counts in self.counts.values()) for name in ("updated", "kept"))
        return f"{updated:,} repaired, {kept:,} kept"

    def close(self, ending: Ending) -> Ending:
        """Close the record of the run."""
        run = self.life.run
        if run is None:
            return ending._replace(balanced=all(counts.balances for counts in self.counts.values()))
        return self.life.close(ending, lambda: self._count(run), lambda: self._check(run))

    def _count(self, run: BackfillRun) -> None:
        """Read the counts of the committed batches, which are correct even if the answer to a commit was lost."""
        counts = {repair: Totals() for repair in self.reader.repairs}
        for batch in in_pages(BackfillBatch.objects.filter(run=run)):
            counts[Repair(batch.source)].add(batch.totals())
        self.counts = counts

    def _check(self, run: BackfillRun) -> Checked:
        """Compare the counts of the batches with the record of changes."""
        if not_checked := lease.why_not_held(run.pk):
            return Checked(None, not_checked=not_checked)
        everything = Totals()
        for counts in self.counts.values():
            everything.add(counts)
        changes = ContactUpdate.objects.filter(run=run).values_list("columns").annotate(Count("id"))
        holds = everything.balances and Counter(dict(changes)) == everything.updated_by_column
        failure = None if holds else "the record of changes differs from the counts of the batches"
        return Checked(holds, failure)

"""Runs the backfill once.

    examine -> claim the lease -> count rows -> for each task: an executor -> Pipeline (page -> map -> upsert)
            -> count rows again and reconcile -> close the run -> RunReport

A dry run takes the same steps with a writer that writes nothing, and claims no lease.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from django.db import Error as DjangoDatabaseError
from django.db import connection, transaction
from django.db.models import Count
from django.utils import timezone

from crm.backfill.context import OnBatch, Phase, RunContext, Task
from crm.backfill.gone_contacts import RECORDED, GoneContacts, count_gone_contacts
from crm.backfill.latecomers import NONE_TWICE, ContactsTwice, Latecomers
from crm.backfill.latecomers import RECORDED as RECORDED_TWICE
from crm.backfill.read.inventory import count_rows, take_inventory
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.workers import Executor, InProcess, WorkerError, WorkerPool
from crm.errors import OperatorError
from crm.interruption import Interruption
from crm.models import BackfillBatch, BackfillRun, ContactUpdate, LedgerEntry
from crm.models.ledger import RunStatus
from crm.outcome import RowCounts, Source, Totals
from crm.postgres import errors
from crm.postgres.facts.schema import DatabaseFacts, examine
from crm.postgres.snapshot import in_pages
from crm.rules.options import RunOptions
from crm.runs import lease
from crm.runs.lifecycle import Checked, Ending, Lifecycle, lifecycle
from crm.runs.lost_reports import LostReport, lost_reports
from crm.runs.progress import Progress, Silence

#: Maximum wait for a lock on a table to count, in a run that was stopped.
MAX_STOP_WAIT = "500ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The result of a run. `run_id` is None for a dry run.

    `row_counts` are the counts at the end; None if the tables could not be counted. `balanced` is None if the
    reconciliation was not checked; `not_checked` has the reason. `recreated` is the number of rows that were read again
    because their contact is missing. `gone` are the rows whose contact is missing at the end; None if not checked.
    `twice` are contacts of the backfill whose address another contact has in another spelling.
    """

    run_id: int | None
    status: RunStatus
    options: RunOptions
    facts: DatabaseFacts
    totals: Totals
    by_source: dict[Source, Totals]
    already: int
    excluded: dict[str, int]
    row_counts: RowCounts | None
    balanced: bool | None
    started_at: datetime
    seconds: float
    failure: str | None = None
    not_checked: str | None = None
    recreated: int = 0
    gone: GoneContacts | None = None
    twice: ContactsTwice = NONE_TWICE
    lost_reports: Sequence[LostReport] = ()

    @property
    def finished_at(self) -> datetime:
        """The time of its end by the clock of this machine."""
        return self.started_at + timedelta(seconds=self.seconds)

    def exit_code(self, *, strict: bool) -> int:
        """Return the exit code: 0 clean, 1 new errors or a person twice, 4 stopped, 5 failed.

        With `strict`, known errors return 1 too.
        """
        if self.status == RunStatus.FAILED:
            return 5
        if self.status != RunStatus.FINISHED:
            return 4
        news = self.totals.error_new + sum(report.error_new for report in self.lost_reports)
        return 1 if news or self.twice.contacts or (strict and self.totals.error) else 0


@dataclass(slots=True)
class _Tally:
    """The counts of a run by source."""

    by_source: dict[Source, Totals] = field(default_factory=dict)

    def add(self, source: Source, totals: Totals) -> None:
        self.by_source.setdefault(source, Totals()).add(totals)

    @property
    def totals(self) -> Totals:
        everything = Totals()
        for totals in self.by_source.values():
            everything.add(totals)
        return everything


def run_backfill(options: RunOptions, progress: Progress | None = None) -> RunReport:
    """Run the backfill once and return the report, also if the run failed, was stopped or was taken over.

    Raises:
        OperatorError: Before anything is written. AnotherRunError if another run is in progress, BrokenStartError if
            the connection to the database fails.
    """
    started_at, started = timezone.now(), time.monotonic()
    with errors.refusing_to_start():
        facts = examine(
            connection,
            for_writing=not options.dry_run,
            for_inserting=True,
            for_updating=options.update,
            for_recreating=options.recreate_deleted,
        )
    _require_tables_of(options, facts)
    watcher = progress or Silence()
    with lifecycle() as life:
        if not options.dry_run:
            with errors.refusing_to_start():
                life.claim(lambda: _claim(options, facts))
        work = _Work(options, facts, life, watcher)
        with _closing(watcher):
            ending = life.carry_out(work.run, WorkerError, ErrorBudgetError, errors.EveryRowRefusedError)
        report = work.close(ending)
    return replace(report, started_at=started_at, seconds=time.monotonic() - started)


def _require_tables_of(options: RunOptions, facts: DatabaseFacts) -> None:
    if missing := [source for source in options.only if source not in facts.sources]:
        raise OperatorError(
            f"--only {' '.join(missing)}: this database has no table {missing[0].table}. Leave the source out. Nothing "
            "was written."
        )


def _claim(options: RunOptions, facts: DatabaseFacts) -> BackfillRun:
    return lease.claim(BackfillRun.Kind.BACKFILL, options.recorded(), facts.generation)


@contextmanager
def _closing(watcher: Progress) -> Iterator[None]:
    try:
        yield
    finally:
        watcher.end()


@dataclass(slots=True)
class _Work:
    """The state of a run."""

    options: RunOptions
    facts: DatabaseFacts
    life: Lifecycle
    watcher: Progress
    tally: _Tally = field(default_factory=_Tally)
    before: RowCounts | None = None
    after: RowCounts | None = None
    recreated: int = 0
    gone: GoneContacts | None = None
    twice: ContactsTwice = NONE_TWICE
    lost_reports: Sequence[LostReport] = ()

    def run(self) -> None:
        """Process every row. Raises the error that ends the run early."""
        before, pending_ids, gone = self.life.keeping_the_lease(
            lambda: take_inventory(
                connection,
                self.facts,
                with_gone=self.options.recreate_deleted,
                with_signups=self.options.with_signups,
            )
        )
        self.before = before
        self.recreated = sum(gone[source] for source in self.options.sources)
        self.life.interruption.heed()
        to_read = {source: before.to_read(source) + gone[source] for source in self.options.sources}
        rows = {source: count for source, count in to_read.items() if count}
        resolutions, every = self.life.retrying(self._resolutions)
        run_id = self.life.run.pk if self.life.run else None
        context = RunContext(self.options, self.facts, run_id, resolutions, every, pending_ids, before.unstarted)
        with _executor(context, self.life.interruption, self._on_batch) as executor:
            self.watcher.begin("source rows", {source.title: count for source, count in rows.items()})
            for source in rows:
                executor.run(Task(source, Phase.PENDING))
            for source in resolutions.among(rows):
                executor.run(Task(source, Phase.RESOLVED))
            if self.options.update:
                # Before the updates, so that they fill the right contacts; and below, because they write addresses.
                self.life.retrying(self._remove_latecomers)
                for source in self.options.sources:
                    if source in self.facts.sources:
                        executor.run(Task(source, Phase.REVISIT))
            self.life.retrying(self._remove_latecomers)
        if run_id is None and self.facts.has_ledger:
            self.gone = self.life.retrying(lambda: self._count_gone_contacts(before))

    def _count_gone_contacts(self, row_counts: RowCounts) -> GoneContacts:
        settled = sum(row_counts.settled.values())
        return count_gone_contacts(connection, settled, run_id=self.life.run.pk if self.life.run else None)

    def _resolutions(self) -> tuple[Resolutions, Resolutions]:
        """Return the resolutions to apply, and all of them if --update or --recreate-deleted needs them."""
        due = Resolutions.pending(connection, self.facts)
        if not (self.options.update or self.options.recreate_deleted):
            return due, due
        try:
            every = Resolutions.every(connection)
        except OperatorError:
            if not self.options.dry_run:
                raise
            return due, due
        # The resolution of a row whose contact is missing also applies to the contact that is created now.
        return every if self.options.recreate_deleted else due, every

    def _remove_latecomers(self) -> None:
        """Remove duplicates that the application stored during the run. `_count` includes the counts of its batches."""
        if self.life.run is None:
            return
        latecomers = Latecomers(connection, self.facts, self.life.run.pk)
        if latecomers.are_possible(self.tally.totals.created):
            for _ in latecomers.remove():
                self.life.interruption.heed()
        self.twice = latecomers.twice

    def _on_batch(self, source: Source, totals: Totals) -> None:
        self.tally.add(source, totals)
        if totals.revisited:
            self.watcher.advance(f"{source.title}: again", totals.revisited)
        else:
            self.watcher.advance(source.title, totals.read)
        _check_error_budget(self.options, self.tally.totals)

    def close(self, ending: Ending) -> RunReport:
        """Close the record of the run and return the report."""
        run, before = self.life.run, self.before
        if run is None:
            self.after = before
            ending = ending._replace(balanced=self.tally.totals.balances and (before is None or before.balances))
        else:
            ending = self.life.close(ending, lambda: self._count(run), lambda: self._check(run, ending))
        return RunReport(
            run_id=run.pk if run else None,
            status=ending.status,
            options=self.options,
            facts=self.facts,
            totals=self.tally.totals,
            by_source=self.tally.by_source,
            already=sum(before.settled[source] for source in self.options.sources) - self.recreated if before else 0,
            excluded=before.excluded if before else {},
            row_counts=self.after,
            balanced=ending.balanced,
            started_at=timezone.now(),
            seconds=0.0,
            failure=ending.failure,
            not_checked=ending.not_checked,
            recreated=self.recreated,
            gone=self.gone,
            twice=self.twice,
            lost_reports=self.lost_reports,
        )

    def _count(self, run: BackfillRun) -> None:
        """Read the counts of the committed batches, which are correct even if the answer to a commit was lost."""
        counted = _Tally()
        for batch in in_pages(BackfillBatch.objects.filter(run=run)):
            counted.add(Source(batch.source), batch.totals())
        self.tally = counted

    def _check(self, run: BackfillRun, ending: Ending) -> Checked:
        """Check the reconciliation against the tables."""
        totals = self.tally.totals
        # If no row got an outcome, the ledger is unchanged.
        is_changed = self.before is None or totals.decided
        self.after = after = self._count_at_the_end(run, ending) if is_changed else self.before
        faults = list(_faults_of(after)) if after else []
        self.lost_reports = lost_reports(run.pk)
        not_checked = lease.why_not_held(run.pk) or (None if after else "the tables are locked")
        if not_checked is None:
            faults += _faults_of_run(run, totals)
        if after and ending.status == RunStatus.FINISHED:
            self.gone = self._count_gone_contacts(after)
        return Checked(
            balanced=False if faults else None if not_checked else True,
            failure=f"the reconciliation does not hold: {'; '.join(faults)}"
            if faults and not_checked is None
            else None,
            not_checked=not_checked,
            recorded={"census": _recorded(after, self.gone, self.twice) if after else None},
        )

    def _count_at_the_end(self, run: BackfillRun, ending: Ending) -> RowCounts | None:
        """Count the rows after the last batch; None if the run was stopped and a table is locked."""
        if ending.status == RunStatus.FINISHED:
            return count_rows(connection, self.facts, run.pk, with_signups=self.options.with_signups)
        try:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute(f"SET LOCAL lock_timeout = '{MAX_STOP_WAIT}'")
                return count_rows(connection, self.facts, run.pk, with_signups=self.options.with_signups)
        except DjangoDatabaseError as error:
            if errors.sqlstate(error) not in errors.TIMEOUTS:
                raise
            return None


def _executor(context: RunContext, interruption: Interruption, on_batch: OnBatch) -> Executor:
    names_profiles = context.facts.names_profiles and any(
        source.table == "tax_intake_leads" for source in context.options.sources
    )
    if context.run_id is None and (context.resolutions.by_id or context.options.update or names_profiles):
        # The overlay of a dry run is local to a process, so these dry runs use one process.
        context = replace(context, options=replace(context.options, workers=1))
    executor = WorkerPool if context.options.workers > 1 else InProcess
    return executor(context, interruption, on_batch)


class ErrorBudgetError(Exception):
    """The run has more new errors than --max-errors allows."""


def _check_error_budget(options: RunOptions, totals: Totals) -> None:
    reason = options.max_errors and options.max_errors.exceeded(totals.read, totals.error_new)
    if reason:
        raise ErrorBudgetError(reason)


def _faults_of(row_counts: RowCounts) -> Iterator[str]:
    """Yield what is wrong with the tables."""
    for fault, count in row_counts.faults.items():
        yield f"{count:,} ledger entries {fault.statement}"
    if not row_counts.faults and not row_counts.balances:
        yield "the source rows are not the sum of those excluded, in the ledger and pending"


def _faults_of_run(run: BackfillRun, totals: Totals) -> Iterator[str]:
    """Yield where the batches of the run, its ledger entries and its record of changes disagree."""
    if not totals.balances:
        yield "the outcomes of the batches do not add up"
    entries = Counter(
        dict(LedgerEntry.objects.filter(run=run).values_list("outcome").annotate(Count("id"))) if totals.read else {}
    )
    if entries != Counter(totals.outcomes):
        yield f"the batches counted {totals.read:,} rows, the ledger has {entries.total():,} entries of this run"
    columns: Counter[str] = Counter()
    if totals.revisited:
        changes = ContactUpdate.objects.filter(run=run).values_list("columns").annotate(Count("id"))
        for names, count in changes:
            columns.update(dict.fromkeys(names.split(","), count))
    if columns != totals.updated_by_column:
        yield "the record of changes differs from the counts of the batches"


def _recorded(row_counts: RowCounts, gone: GoneContacts | None, twice: ContactsTwice) -> dict[str, object]:
    return {
        **({RECORDED: gone.rows} if gone else {}),
        **({RECORDED_TWICE: list(twice.contacts)} if twice.contacts else {}),
        "rows": row_counts.rows,
        "excluded": row_counts.excluded,
        "settled": row_counts.settled,
        "errors": row_counts.errors,
        "pending": row_counts.pending,
        "lines": row_counts.entries,
        "faults": row_counts.faults,
    }

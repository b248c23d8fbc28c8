"""One run, from the first look at the database to the report.

    examine -> claim the fence -> census -> for each source: Alone or Crew -> Pipeline (page -> map -> settle -> commit)
            -> census and identity -> close the run -> RunReport

A dry run takes the same way with a writer that writes nothing, and claims no fence.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from django.conf import settings
from django.db import Error as DjangoDatabaseError
from django.db import connection, transaction
from django.db.models import Count

from crm.backfill import errors, fence
from crm.backfill.census import survey, take_census
from crm.backfill.fence import FenceLostError
from crm.backfill.garbage import seldom_collected
from crm.backfill.interruption import Interruption
from crm.backfill.options import RunOptions
from crm.backfill.outcome import Census, Source, Totals
from crm.backfill.pipeline import InterruptedRunError
from crm.backfill.replication import BlindThrottleError
from crm.backfill.resolutions import Resolutions
from crm.backfill.schema import DatabaseFacts, examine
from crm.backfill.snapshot import in_pages
from crm.backfill.workers import Alone, Assignment, Crew, OnBatch, WorkerError
from crm.models import BackfillBatch, BackfillRun, ContactUpdate, LedgerEntry
from crm.models.ledger import RunStatus

logger = logging.getLogger(__name__)

#: How long the beginning and the end of a run wait after a bad moment; seconds.
WAITS_BEFORE_ANOTHER_LOOK = (0.5, 1.0, 2.0, 4.0)
#: How long a run that was stopped waits for a table that it counts.
LONGEST_WAIT_OF_A_STOP = "500ms"
Answer = TypeVar("Answer")


class Progress(Protocol):
    """Watches a run."""

    def begin(self, rows: dict[Source, int]) -> None:
        """The rows that are to be looked at, by source."""

    def advance(self, source: Source, totals: Totals) -> None:
        """A batch was committed, of rows of the source that were read or looked at again."""

    def end(self) -> None:
        """The run is over."""


class Silence:
    """A progress that shows nothing."""

    def begin(self, rows: dict[Source, int]) -> None:
        """Nothing."""

    def advance(self, source: Source, totals: Totals) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How a run went. `run_id` is None for a dry run.

    `census` is of its end, and None where nothing could be counted any more. `balanced` is None where the identity was
    not checked; `not_checked` says why.
    """

    run_id: int | None
    status: RunStatus
    options: RunOptions
    facts: DatabaseFacts
    totals: Totals
    by_source: dict[Source, Totals]
    already: int
    excluded: dict[str, int]
    census: Census | None
    balanced: bool | None
    seconds: float
    failure: str | None = None
    not_checked: str | None = None

    def exit_code(self, *, strict: bool) -> int:
        """What cron is told: 0 clean, 1 rows in error, 4 stopped, 5 failed."""
        if self.status == RunStatus.FAILED:
            return 5
        if self.status != RunStatus.FINISHED:
            return 4
        return 1 if (self.totals.error if strict else self.totals.error_new) else 0


@dataclass(slots=True)
class _Tally:
    """The counts of a run as its batches come in."""

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
    """Run once. Raises OperatorError before anything is written: AnotherRunError when another run is going,
    BrokenStartError when the database breaks off.

    Everything that happens later is in the report: a run that failed, was stopped or was taken over.
    """
    started = time.monotonic()
    with errors.beginning():
        facts = examine(connection, for_writing=not options.dry_run, for_updating=options.update)
    watcher = progress or Silence()
    interruption = Interruption()
    tally = _Tally()
    # From the claim to the close, a signal never leaves a run behind that nobody runs.
    with interruption.heeded(), _no_query_log(), seldom_collected():
        with errors.beginning():
            run = None if options.dry_run else _claim(options, facts)
        with _closing(watcher):
            status, failure, before = _work(options, facts, run, watcher, interruption, tally)
        report = _report(options, facts, run, tally, before, status, failure)
    return replace(report, seconds=time.monotonic() - started)


def _claim(options: RunOptions, facts: DatabaseFacts) -> BackfillRun:
    return fence.claim(BackfillRun.Kind.BACKFILL, options.recorded(), facts.generation)


@contextmanager
def _no_query_log() -> Iterator[None]:
    """With DEBUG on, Django would keep the statement of every batch in memory, with all of its parameters."""
    debug, settings.DEBUG = settings.DEBUG, False
    try:
        yield
    finally:
        settings.DEBUG = debug


@contextmanager
def _closing(watcher: Progress) -> Iterator[None]:
    try:
        yield
    finally:
        watcher.end()


def _work(
    options: RunOptions,
    facts: DatabaseFacts,
    run: BackfillRun | None,
    watcher: Progress,
    interruption: Interruption,
    tally: _Tally,
) -> tuple[RunStatus, str | None, Census | None]:
    before: Census | None = None

    def on_batch(source: Source, totals: Totals) -> None:
        tally.add(source, totals)
        watcher.advance(source, totals)
        _heed_ceiling(options, tally.totals)

    try:
        before, left = _patiently(lambda: survey(connection, facts))
        rows = {source: before.to_read(source) for source in options.sources if before.to_read(source)}
        resolutions = Resolutions.to_be_carried_out(connection, facts)
        assignment = Assignment(options, facts, run.pk if run else None, resolutions, left, before.untouched)
        with _hands(assignment, interruption, on_batch) as hands:
            watcher.begin(rows)
            for source in rows:
                hands.work_through(source)
            for source in resolutions.among(rows):
                hands.work_through_decided(source)
            if options.update:
                hands.look_again(options.sources)
    except InterruptedRunError as stopped:
        connection.close()
        return RunStatus.INTERRUPTED, str(stopped) or None, before
    except KeyboardInterrupt:
        connection.close()
        return RunStatus.INTERRUPTED, "stopped in the middle of a batch, which was rolled back", before
    except FenceLostError as lost:
        return lost.status, None, before
    except (WorkerError, CeilingReachedError, BlindThrottleError) as error:
        return RunStatus.FAILED, str(error), before
    except DjangoDatabaseError as error:
        connection.close()
        return RunStatus.FAILED, errors.described(error), before
    return RunStatus.FINISHED, None, before


def _hands(assignment: Assignment, interruption: Interruption, on_batch: OnBatch) -> Alone | Crew:
    if assignment.run_id is None and (assignment.resolutions.by_id or assignment.options.update):
        # What a dry run would have made is known to the process alone that would have made it.
        assignment = replace(assignment, options=replace(assignment.options, workers=1))
    hands = Crew if assignment.options.workers > 1 else Alone
    return hands(assignment, interruption, on_batch)


def _patiently(look: Callable[[], Answer]) -> Answer:
    """Look over a fresh connection again when a bad moment came in between; a batch has its own way to try again."""
    for wait in WAITS_BEFORE_ANOTHER_LOOK:
        try:
            return look()
        except DjangoDatabaseError as error:
            cause = errors.bad_moment(error)
            if cause is None:
                raise
            logger.warning("%s: looking again in %.1f s", cause, wait)
            connection.close()
            time.sleep(wait)
    return look()


class CeilingReachedError(Exception):
    """The run goes wrong: it has more new errors than it may."""


def _heed_ceiling(options: RunOptions, totals: Totals) -> None:
    reason = options.max_errors and options.max_errors.exceeded(totals.read, totals.error_new)
    if reason:
        raise CeilingReachedError(reason)


def _report(
    options: RunOptions,
    facts: DatabaseFacts,
    run: BackfillRun | None,
    tally: _Tally,
    before: Census | None,
    status: RunStatus,
    failure: str | None,
) -> RunReport:
    """Close the run's record and put the report together."""
    report = RunReport(
        run_id=run.pk if run else None,
        status=status,
        options=options,
        facts=facts,
        totals=tally.totals,
        by_source=tally.by_source,
        already=sum(before.settled[source] for source in options.sources) if before else 0,
        excluded=before.excluded if before else {},
        census=None,
        balanced=None,
        seconds=0.0,
        failure=failure,
    )
    if run is None:
        return replace(report, balanced=report.totals.balances and (before is None or before.balances), census=before)
    try:
        return _patiently(lambda: _close(run, report, before))
    except DjangoDatabaseError as error:
        why = errors.described(error)
        return replace(report, status=RunStatus.FAILED, failure=failure or why, not_checked=why)


def _close(run: BackfillRun, report: RunReport, before: Census | None) -> RunReport:
    """Check the identity against the tables and store it with the run."""
    by_source = _counted_batches(run)
    totals = _Tally(by_source).totals
    # Where nothing was decided anew, the ledger is as it was.
    after = _census_of_the_end(run, report) if before is None or totals.decided else before
    faults = list(_faults_of(after)) if after else []
    not_checked = _why_not_checked(run) or (None if after else "the tables are locked")
    if not_checked is None:
        faults += _faults_of_run(run, totals)
    balanced = False if faults else None if not_checked else True
    report = replace(
        report, by_source=by_source, totals=totals, census=after, balanced=balanced, not_checked=not_checked
    )
    if faults and not_checked is None:
        failure = f"the identity does not hold: {'; '.join(faults)}"
        failure = f"{report.failure}; {failure}" if report.failure else failure
        report = replace(report, status=RunStatus.FAILED, failure=failure)
    results = {"census": _recorded(after) if after else None, "balanced": balanced}
    released = fence.release(run.pk, report.status, failure=report.failure, **results)
    if not released:
        # Whoever ended it meanwhile did not count.
        BackfillRun.objects.filter(pk=run.pk).update(**results)
    if not released and report.status == RunStatus.FINISHED:
        # Somebody paused or cancelled it between its last batch and here; what the record says is what happened.
        run.refresh_from_db(fields=["status"])
        return replace(report, status=RunStatus(run.status))
    return report


def _census_of_the_end(run: BackfillRun, report: RunReport) -> Census | None:
    """The census after the run's last batch; None where somebody who stops a run would have to wait for a lock."""
    if report.status == RunStatus.FINISHED:
        return take_census(connection, report.facts, run.pk)
    try:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = '{LONGEST_WAIT_OF_A_STOP}'")
            return take_census(connection, report.facts, run.pk)
    except DjangoDatabaseError as error:
        if errors.sqlstate(error) not in errors.TIMEOUTS:
            raise
        return None


def _counted_batches(run: BackfillRun) -> dict[Source, Totals]:
    """What the run's committed batches add up to: the truth, also when a commit's answer was lost."""
    tally = _Tally()
    for batch in in_pages(BackfillBatch.objects.filter(run=run)):
        tally.add(Source(batch.source), batch.totals())
    return tally.by_source


def _why_not_checked(run: BackfillRun) -> str | None:
    """Why the run's lines cannot be held against its counts: without the fence, another run may be at work on them."""
    status = BackfillRun.objects.filter(pk=run.pk).values_list("status", flat=True).first()
    return None if status == RunStatus.RUNNING else f"the run was {status or 'deleted'} before its end"


def _faults_of(census: Census) -> Iterator[str]:
    """What is wrong with the tables, in words."""
    for fault, count in census.faults.items():
        yield f"{count:,} ledger lines {fault.statement}"
    if not census.faults and not census.balances:
        yield "the source rows are not those that are excluded, in the ledger or pending"


def _faults_of_run(run: BackfillRun, totals: Totals) -> Iterator[str]:
    """Where the batches of the run, its lines in the ledger and its record of changes disagree, in words."""
    if not totals.balances:
        yield "the outcomes of the batches do not add up"
    lines = Counter(
        dict(LedgerEntry.objects.filter(run=run).values_list("outcome").annotate(Count("id"))) if totals.read else {}
    )
    if lines != Counter(totals.outcomes):
        yield f"the batches counted {totals.read:,} rows, the ledger has {lines.total():,} lines of this run"
    columns: Counter[str] = Counter()
    if totals.revisited:
        changes = ContactUpdate.objects.filter(run=run).values_list("columns").annotate(Count("id"))
        for names, count in changes:
            columns.update(dict.fromkeys(names.split(","), count))
    if columns != totals.updated_by_column:
        yield "the record of changes is not what the batches counted"


def _recorded(census: Census) -> dict[str, object]:
    return {
        "rows": census.rows,
        "excluded": census.excluded,
        "settled": census.settled,
        "errors": census.errors,
        "pending": census.pending,
        "lines": census.lines,
        "faults": census.faults,
    }

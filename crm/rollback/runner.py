"""Runs a rollback.

    find the run -> examine -> claim the lease -> batches of the run's entries, by id: assess, undo, commit
            -> compare the counts with the ledger -> close -> RollbackReport

A dry run takes the same steps with an undoer that writes nothing, and claims no lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple, Protocol

from django.db import connection
from django.utils import timezone

from crm.backfill.read.readahead import ReadingThread
from crm.errors import OperatorError
from crm.models import BackfillRun, ContactUpdate, LedgerEntry, Rollback
from crm.models.ledger import RunStatus
from crm.outcome import Outcome, Repair
from crm.output.listing import ListingError
from crm.postgres import errors
from crm.postgres.facts.foreign_keys import find_foreign_keys
from crm.postgres.facts.rights import OPERATION_OF_REPAIR, Operation, require_rights
from crm.postgres.facts.schema import DatabaseFacts, examine
from crm.postgres.trust import require_still_trusted
from crm.rollback.ahead import PagesAhead
from crm.rollback.reader import Reader
from crm.rollback.undo import Counts, DatabaseUndoer, DryRunUndoer, Reverted, RunDeletedError, Undoer, counted
from crm.rules.entry import Entry
from crm.rules.reverting import Status
from crm.rules.throttling import BatchSizer
from crm.runs import control, lease
from crm.runs.lifecycle import Checked, Ending, Lifecycle, lifecycle
from crm.runs.progress import Progress, Silence
from crm.runs.retrying import Retries

DEFAULT_BATCH_SIZE = 2_000
#: Maximum number of later runs that a warning names.
MAX_NAMED = 10

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Is called with the result of each batch after its commit. Raises ListingError."""

    def __call__(self, reverted: Reverted) -> None:
        """Write the result of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackReport:
    """The result of a rollback. `run_id` is None for a dry run; `balanced` is None if it is incomplete.

    `later_runs` are the later runs that made or changed contacts and were not rolled back when it began, the last one
    first: rows of the run can be in conflict with their contacts. A run that was rolled back is excluded even if
    something of it was kept, because another rollback would keep the same. `of_recreation` is True if the run that was
    rolled back created missing contacts again, `of_repair` if it repaired contacts.
    """

    run_id: int | None
    rolls_back: int
    later_runs: Sequence[int]
    status: RunStatus
    dry_run: bool
    generation: str
    counts: Counts
    balanced: bool | None
    started_at: datetime
    seconds: float
    failure: str | None = None
    of_recreation: bool = False
    of_repair: bool = False

    @property
    def finished_at(self) -> datetime:
        """The time of its end by the clock of this machine."""
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def exit_code(self) -> int:
        """The exit code: 0 all reversed or kept, 1 some failed, 4 stopped, 5 failed."""
        if self.status == RunStatus.FAILED:
            return 5
        if self.status != RunStatus.FINISHED:
            return 4
        return 1 if self.counts.failed else 0


def roll_back(
    run_id: int,
    *,
    dry_run: bool = False,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress | None = None,
    listener: Listener | None = None,
) -> RollbackReport:
    """Roll back a run as described in `crm.rollback`, and return the report.

    `batch_size` is the maximum number of entries in a transaction. `listener` is called after each batch.

    Raises OperatorError before anything is written: if the run does not exist, is running or is a rollback, if the
    ledger has no entry of it, if this role lacks rights, or (AnotherRunError) if another run is in progress. Later
    errors are in the report.
    """
    started_at, started = timezone.now(), time.monotonic()
    with errors.refusing_to_start():
        facts = examine(connection, for_writing=not dry_run)
        run = _require_run(run_id, facts, may_take_over=not dry_run)
        entries = _require_entries(run)
        later_runs, kept_of = _later_runs(run)
        require_still_trusted(connection, "crm_contacts")
        find_foreign_keys(connection)
        reader = Reader.of(connection, facts, run)
        _require_rights(run, dry_run=dry_run)
    if later_runs or kept_of:
        logger.warning(_later_runs_stand(run, later_runs, kept_of))
    with lifecycle() as life:
        if not dry_run:
            with errors.refusing_to_start():
                life.claim(lambda: _claim(run, facts))
        work = _Work(reader, batch_size, progress or Silence(), listener, life)
        ending = work.close(life.carry_out(lambda: work.run(entries), ListingError, RunDeletedError))
    return RollbackReport(
        run_id=life.run.pk if life.run else None,
        rolls_back=run_id,
        later_runs=later_runs,
        status=ending.status,
        dry_run=dry_run,
        generation=facts.generation,
        counts=work.counts,
        balanced=ending.balanced,
        started_at=started_at,
        seconds=time.monotonic() - started,
        failure=ending.failure,
        of_recreation=bool(run.options.get("recreate_deleted")),
        of_repair=run.kind == BackfillRun.Kind.REPAIR,
    )


class _Done(NamedTuple):
    """A batch, its result, and the key after which the next batch begins."""

    entries: Sequence[Entry]
    reverted: Reverted
    last: str


#: Undoes the batch after a key, with the given maximum number of entries; None if there are no more.
_Batch = Callable[[str, int], _Done | None]


@dataclass(slots=True)
class _Work:
    """The state of a rollback."""

    reader: Reader
    batch_size: int
    progress: Progress
    listener: Listener | None
    life: Lifecycle
    counts: Counts = field(default_factory=Counts)
    _retries: Retries = field(init=False)

    def __post_init__(self) -> None:
        self._retries = Retries(connection, self.life.interruption, BatchSizer(fixed=self.batch_size))

    def run(self, entries: int) -> None:
        """Undo every change by --update and every entry. Raises the error that ends the rollback early."""
        rollback = self.life.run
        undoer: Undoer = (
            DatabaseUndoer(connection, self.reader, rollback.pk) if rollback else DryRunUndoer(connection, self.reader)
        )
        try:
            self.progress.begin("entries", {self._title: entries})
            # Changes by --update are undone first, so that the contacts of the run are as the run created them.
            self._undo_all(partial(self._batch_of_updates, undoer))
            with ReadingThread(connection) as thread:
                self._undo_all(partial(self._batch, undoer, PagesAhead(self.reader, thread)))
        finally:
            self.progress.end()

    def close(self, ending: Ending) -> Ending:
        """End the rollback's record."""
        rollback = self.life.run
        if rollback is None:
            return ending
        return self.life.close(ending, lambda: self._count(rollback), lambda: self._check(rollback, ending))

    def _count(self, rollback: BackfillRun) -> None:
        """Read the counts of the committed batches, which are correct even if the answer to a commit was lost."""
        if (record := Rollback.objects.filter(pk=rollback.pk).first()) is not None:
            self.counts = _counts_of(record)

    def _check(self, rollback: BackfillRun, ending: Ending) -> Checked:
        """Compare the counts of a complete rollback with the ledger."""
        if ending.status != RunStatus.FINISHED or lease.why_not_held(rollback.pk):
            return Checked(None)
        agree = self.counts.remaining == LedgerEntry.objects.filter(run=self.reader.run).count()
        return Checked(agree, None if agree else "the counts do not agree with the ledger")

    def _undo_all(self, batch: _Batch) -> None:
        after = ""
        while True:
            self.life.interruption.heed()
            done = self._retries.run(partial(self._batch_after, batch, after))
            if done is None:
                return
            self._retries.sizer.after_batch(len(done.entries), seconds=0)
            after = done.last
            counts = counted(done.reverted)
            self.counts.add(counts)
            self.progress.advance(self._title, sum(map(counts.of, Status)), self._result())
            if self.listener:
                self.listener(done.reverted)

    @property
    def _title(self) -> str:
        dry = "" if self.life.run else " (dry run)"
        return f"Rolling back run {self.reader.run.pk}{dry}"

    def _result(self) -> str:
        counts = {status: self.counts.of(status) for status in Status}
        return ", ".join(
            f"{count:,} {status}" for status, count in counts.items() if count or status is not Status.FAILED
        )

    def _batch_after(self, batch: _Batch, after: str) -> _Done | None:
        return batch(after, self._retries.sizer.size)

    def _batch_of_updates(self, undoer: Undoer, after: str, size: int) -> _Done | None:
        records = self.reader.updates(after, size)
        if not records:
            return None
        entries = [record.entry for record in records]
        return _Done(entries, undoer.undo_updates(records), max(entry.contact_id for entry in entries))

    def _batch(self, undoer: Undoer, ahead: PagesAhead, after: str, size: int) -> _Done | None:
        page = ahead.page(after, size)
        if not page:
            return None
        reverted = undoer.undo(page)
        ahead.note_deleted(reverted.reversed_ids)
        return _Done(page.entries, reverted, page.entries[-1].id)


def _require_run(run_id: int, facts: DatabaseFacts, *, may_take_over: bool) -> BackfillRun:
    """Return the run. Raises OperatorError if it cannot be rolled back."""
    if not facts.has_ledger:
        raise OperatorError(
            f"There is no ledger that this role may read, so run {run_id} cannot be found: run `python manage.py "
            "migrate` first, or GRANT SELECT on its tables. Nothing was written."
        )
    run = control.find(run_id)
    if run.kind == BackfillRun.Kind.ROLLBACK:
        raise OperatorError(
            f"Run {run_id} is a rollback. To migrate again what it reversed, run `python manage.py "
            "backfill_crm_contacts`, with --update if it reversed an update. Nothing was written."
        )
    if run.status == RunStatus.RUNNING and not (may_take_over and lease.take_over_if_dead(run)):
        raise OperatorError(
            f"Run {run_id} is in progress. Wait for it, or stop it with "
            f"`python manage.py backfill_runs cancel {run_id}`. Nothing was written."
        )
    return run


def _require_entries(run: BackfillRun) -> int:
    """Return the number of entries and changes of the run.

    Raises OperatorError if there are none, unless an earlier rollback of the run has to be completed.
    """
    entries = sum(model.objects.filter(run=run).count() for model in (LedgerEntry, ContactUpdate))
    if not entries and not _is_to_be_closed(run):
        raise OperatorError(_nothing_left(run))
    return entries


def _later_runs(run: BackfillRun) -> tuple[list[int], dict[int, int]]:
    """Return the later runs that made or changed contacts and were not rolled back, the last one first.

    And those that were rolled back with something kept, each with its last complete rollback.
    """
    entries = LedgerEntry.objects.filter(run_id__gt=run.pk, outcome__in=(Outcome.CREATED, Outcome.MERGED))
    updates = ContactUpdate.objects.filter(run_id__gt=run.pk)
    found = {number for stands in (entries, updates) for number in stands.values_list("run_id", flat=True).distinct()}
    finished = Rollback.objects.filter(of__in=found, run__status=RunStatus.FINISHED).order_by("run_id")
    taken_back = dict(finished.values_list("of_id", "run_id"))
    return sorted(found - taken_back.keys(), reverse=True), taken_back


def _later_runs_stand(run: BackfillRun, later: Sequence[int], kept_of: Mapping[int, int]) -> str:
    parts = []
    if later:
        parts.append(
            f"Later runs made or changed contacts, and were not rolled back ({len(later)}). To roll back the last one "
            f"first, use this order: {_shortened(list(map(str, later)))}, and then {run.pk}."
        )
    if kept_of:
        named = _shortened([f"{of} (rolled back by {by})" for of, by in sorted(kept_of.items(), reverse=True)])
        parts.append(f"Later rollbacks kept a part of their runs, and another one would keep it as well: {named}.")
    ways_out = "the conflict can be resolved (`resolve_crm_conflict`)"
    if later:
        ways_out = f"a later run can be rolled back afterwards, and {ways_out}"
    return (
        f"{' '.join(parts)} When the rows of run {run.pk} are migrated again, they may be in conflict with the "
        f"contacts of later runs. Such a row is not lost: {ways_out}."
    )


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= MAX_NAMED else [*names[: MAX_NAMED - 1], "...", names[-1]])


def _is_to_be_closed(run: BackfillRun) -> bool:
    """Return whether the latest rollback of the run is incomplete."""
    latest = Rollback.objects.filter(of=run).order_by("-run_id").select_related("run").first()
    return latest is not None and latest.run.status != RunStatus.FINISHED


def _nothing_left(run: BackfillRun) -> str:
    by = Rollback.objects.filter(of=run, run__status=RunStatus.FINISHED).order_by("-run_id").first()
    why = f"run {by.run_id} has rolled it back" if by else "it has no outcomes, or later runs replaced them"
    return f"The ledger has no entry of run {run.pk}: {why}. There is nothing to roll back."


def _require_rights(run: BackfillRun, *, dry_run: bool) -> None:
    more: Iterable[Operation] = ()
    if run.kind == BackfillRun.Kind.REPAIR:
        more = dict.fromkeys(OPERATION_OF_REPAIR[Repair(repair)] for repair in run.options["repairs"])
    elif ContactUpdate.objects.filter(run=run).exists():
        more = [Operation.ROLLBACK_OF_UPDATE]
    require_rights(connection, Operation.ROLLBACK, *more, dry_run=dry_run)


def _claim(run: BackfillRun, facts: DatabaseFacts) -> BackfillRun:
    return lease.claim(
        BackfillRun.Kind.ROLLBACK,
        {"rolls_back": run.pk},
        facts.generation,
        lambda rollback: Rollback.objects.create(run=rollback, of=run),
        "rollback",
    )


def _counts_of(record: Rollback) -> Counts:
    counts = Counts()
    for column in Rollback._meta.concrete_fields:
        if isinstance(value := getattr(record, column.name), int):
            counts.numbers[column.name] = value
    counts.reasons.update(record.reasons)
    return counts

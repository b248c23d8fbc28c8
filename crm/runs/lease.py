"""The lease: at most one run is in progress, and each batch checks that it still belongs to that run.

The lease is a partial unique index over the runs that are `running` or `paused`. It is not a session lock, because
session locks do not work through PgBouncer. Each batch renews the heartbeat `WHERE status = 'running'` in its own
transaction. If that updates no row, the run was paused, cancelled or taken over: the batch is rolled back and the run
stops.
"""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from django.db import IntegrityError, connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F, Value
from django.db.models.functions import Now, Replace

from crm import sqlstates
from crm.errors import OperatorError
from crm.models import BackfillRun, CommittedTransaction
from crm.models.ledger import RunStatus
from crm.outcome import Totals
from crm.postgres import errors
from crm.postgres.transactions import Timeouts, WrittenTables, certain_transaction, require_trusted_writes
from crm.runs.process import ProcessIdentity
from crm.version import RULES, VERSION

HEARTBEAT_LASTS = timedelta(minutes=5)
#: Minimum age at which the tokens of committed transactions are deleted.
TOKENS_LAST = timedelta(days=1)
_TAKEN_OVER = "taken over"
#: What is written where only the run changes.
RUNS = WrittenTables(("backfill_run",))

logger = logging.getLogger(__name__)


class AnotherRunError(OperatorError):
    """Another run is in progress or paused."""

    exit_code = 3


class LeaseLostError(Exception):
    """The run no longer holds the lease: it was paused, cancelled or taken over, or its record was deleted."""


def claim(
    kind: BackfillRun.Kind,
    options: Mapping[str, Any],
    generation: str,
    also: Callable[[BackfillRun], object] = lambda _run: None,
    *written: str,
) -> BackfillRun:
    """Create and return the record of a run, which takes the lease; call `also` with it in the same transaction.

    `written` are the tables that `also` writes.

    A run whose process is dead is taken over. Raises AnotherRunError if any other run holds the lease.
    """
    process = ProcessIdentity.own()
    run = BackfillRun(
        kind=kind,
        options=dict(options),
        version=VERSION,
        rules=RULES,
        generation=generation,
        # Cleared when the report is written. If the run ends before, the next run reports its new errors.
        report_lost=kind == BackfillRun.Kind.BACKFILL,
        operator=operator(),
        host=process.host,
        process_id=process.process_id,
        boot_id=process.boot_id,
        pid_namespace=process.pid_namespace,
        process_started=process.started,
    )
    try:
        with certain_transaction(connection, WrittenTables(("backfill_run", *written))):
            dead = []
            for holder in BackfillRun.objects.holding():
                if not take_over_if_dead(holder):
                    raise AnotherRunError(_who_holds(BackfillRun.objects.holding().first() or holder))
                dead.append(holder.pk)
            run.save(force_insert=True)
            also(run)
            CommittedTransaction.objects.filter(committed_at__lt=Now() - TOKENS_LAST).delete()
            by = Replace("failure", Value(_TAKEN_OVER), Value(f"{_TAKEN_OVER} by run {run.pk}"))
            if dead:
                BackfillRun.objects.filter(pk__in=dead).update(failure=by)
    except IntegrityError as error:
        if errors.sqlstate(error) != sqlstates.UNIQUE_VIOLATION:
            raise
        holding = BackfillRun.objects.holding().first()
        raise AnotherRunError(
            _who_holds(holding) if holding else "Another run started at the same time and has ended: run this again."
        ) from None
    return run


@contextmanager
def between_runs(*written: str) -> Iterator[None]:
    """Open a transaction during which no run is in progress and none can start.

    `written` are the tables that the block writes. A run whose process is dead is ended first.

    Raises AnotherRunError if another run is in progress.
    """
    no_other = "LOCK TABLE backfill_run IN SHARE ROW EXCLUSIVE MODE"
    with certain_transaction(connection, WrittenTables(("backfill_run", *written)), None, no_other):
        for run in BackfillRun.objects.running():
            if not take_over_if_dead(run):
                raise AnotherRunError(_who_holds(run))
        yield


@contextmanager
def batch(
    connection: BaseDatabaseWrapper, run_id: int, timeouts: Timeouts, *written: str, inserted: Iterable[str] = ()
) -> Iterator[Totals]:
    """Run one batch in its own transaction, which also commits the counts and the heartbeat of the run.

    Yields the counts, to which the batch adds. `written` and `inserted` are the tables that it writes besides the
    ledger and the run, as for `WrittenTables`.

    Raises LeaseLostError if the run has lost the lease, and the errors of `certain_transaction`. Nothing of the batch
    is written then.
    """
    tables = WrittenTables(("backfill_run", "ledger_entry", *written), tuple(inserted))
    with certain_transaction(connection, tables, timeouts):
        totals = Totals()
        yield totals
        renew(run_id, totals)


def renew(run_id: int, totals: Totals) -> None:
    """Renew the heartbeat and add a batch's counts to the run, in the transaction of the batch.

    Raises LeaseLostError if the run is not `running` any more.
    """
    updated = (
        BackfillRun.objects.running()
        .filter(pk=run_id)
        .update(
            heartbeat_at=Now(),
            **{name: F(name) + count for name, count in totals.numbers.items()},
        )
    )
    if not updated:
        raise LeaseLostError(run_id)


def keep_alive(run_id: int) -> None:
    """Renew the heartbeat between two batches. Raises LeaseLostError, and UntrustedCodeError as a batch does."""
    with transaction.atomic():
        require_trusted_writes(connection, RUNS)
        renew(run_id, Totals())


def why_not_held(run_id: int) -> str | None:
    """Return why a run has lost the lease, or None if it still holds it."""
    status = BackfillRun.objects.filter(pk=run_id).values_list("status", flat=True).first()
    return None if status == RunStatus.RUNNING else f"the run was {status or 'deleted'} before it ended"


def release(run_id: int, status: RunStatus, **results: Any) -> bool:
    """End a run with a status and results. Returns False, with nothing changed, if it has lost the lease."""
    with certain_transaction(connection, RUNS):
        ended = BackfillRun.objects.running().filter(pk=run_id).update(status=status, finished_at=Now(), **results)
    return bool(ended)


@contextmanager
def kept(run_id: int | None) -> Iterator[None]:
    """Keep the lease of a run during a long statement in the block, such as a count of whole tables.

    The connection is busy during that time, and behind a pooler it may be the only one, so no heartbeat can be sent.
    Instead, the transaction locks the run's record FOR KEY SHARE: another process that would take over a silent run
    skips locked ones, and pausing or cancelling the run is not blocked. The heartbeat is renewed at the end.

    Does nothing if `run_id` is None.
    """
    if run_id is None:
        yield
        return
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM backfill_run WHERE id = %s FOR KEY SHARE", [run_id])
        yield
    with transaction.atomic():
        require_trusted_writes(connection, RUNS)
        BackfillRun.objects.running().filter(pk=run_id).update(heartbeat_at=Now())


def take_over_if_dead(run: BackfillRun) -> bool:
    """End a running run whose process is gone or has no heartbeat for five minutes; return whether it did."""
    gone = process_is_gone(run)
    running = BackfillRun.objects.running().filter(pk=run.pk)
    why = "its process is gone" if gone else "no heartbeat for five minutes"
    with transaction.atomic():
        require_trusted_writes(connection, RUNS)
        if not gone:
            # A locked record belongs to a run that is counting (see `kept`) or committing a batch.
            silent = running.filter(heartbeat_at__lt=Now() - HEARTBEAT_LASTS).select_for_update(skip_locked=True)
            running = running.filter(pk__in=[found.pk for found in silent])
        taken = running.update(status=RunStatus.INTERRUPTED, finished_at=Now(), failure=f"{_TAKEN_OVER}: {why}")
    if taken:
        logger.warning("run %s was taken over: %s", run.pk, why)
    return bool(taken)


def process_is_gone(run: BackfillRun) -> bool:
    """Return whether the process of a run has certainly ended. False if this machine cannot know."""
    return _process_of(run).is_gone()


def may_be_at_work(run: BackfillRun) -> bool:
    """Whether another process than this one may still have a run to end, whatever the status that others gave it."""
    process = _process_of(run)
    if process == ProcessIdentity.own() or process.is_gone():
        return False
    return BackfillRun.objects.filter(pk=run.pk, heartbeat_at__gte=Now() - HEARTBEAT_LASTS).exists()


def is_silent(run: BackfillRun) -> bool:
    """Return whether the heartbeat of a running run is old enough for the next run to take it over."""
    return BackfillRun.objects.running().filter(pk=run.pk, heartbeat_at__lt=Now() - HEARTBEAT_LASTS).exists()


def _process_of(run: BackfillRun) -> ProcessIdentity:
    return ProcessIdentity(run.host, run.process_id, run.boot_id, run.pid_namespace, run.process_started)


def _who_holds(run: BackfillRun) -> str:
    if run.status == RunStatus.PAUSED:
        return (
            f"Run {run.pk} is paused, so no other run can start. "
            f"`python manage.py backfill_runs resume {run.pk}` allows the next run to continue it, "
            f"`cancel {run.pk}` ends it."
        )
    return (
        f"Run {run.pk} is in progress: started {run.started_at:%Y-%m-%d %H:%M:%S} UTC by {run.operator} on {run.host} "
        f"(process {run.process_id}), last heartbeat {run.heartbeat_at:%H:%M:%S} UTC. Wait for it, or stop it with "
        f"`python manage.py backfill_runs cancel {run.pk}`."
    )


def operator() -> str:
    """Return the name of the operating system user who runs this process, or `uid <number>` if it has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"

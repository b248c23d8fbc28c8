"""At most one run at a time, and every batch asks whether it is still the one.

The lease is a partial unique index over the runs that are `running` or `paused`, not a session lock: those do not
survive PgBouncer. Each batch renews the heartbeat `WHERE status = 'running'` in its own transaction. When no row is
updated, the run was paused, cancelled or taken over: the batch is rolled back and the run stops.
"""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import Callable, Iterator, Mapping
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
from crm.postgres.transactions import Timeouts, certain_transaction
from crm.postgres.trust import require_still_trusted
from crm.runs.process import ProcessIdentity
from crm.version import RULES, VERSION

HEARTBEAT_LASTS = timedelta(minutes=5)
#: How long the tokens of committed transactions are kept, at least.
TOKENS_LAST = timedelta(days=1)
_TAKEN_OVER = "taken over"

logger = logging.getLogger(__name__)


class AnotherRunError(OperatorError):
    """Another run is going, or is paused."""

    exit_code = 3


class LeaseLostError(Exception):
    """The run is no longer the running one: it was paused, cancelled, taken over, or its record was deleted."""


def claim(
    kind: BackfillRun.Kind,
    options: Mapping[str, Any],
    generation: str,
    also: Callable[[BackfillRun], object] = lambda _run: None,
) -> BackfillRun:
    """Begin a run, and do `also` what belongs to its record, in the same transaction.

    Raises AnotherRunError when another one holds the lease; a dead one is taken over.
    """
    process = ProcessIdentity.own()
    run = BackfillRun(
        kind=kind,
        options=dict(options),
        version=VERSION,
        rules=RULES,
        generation=generation,
        # Cleared when the report is written: whatever ends the run before, the next one reports its new errors.
        report_lost=kind == BackfillRun.Kind.BACKFILL,
        operator=operator(),
        host=process.host,
        process_id=process.process_id,
        boot_id=process.boot_id,
        pid_namespace=process.pid_namespace,
        process_started=process.started,
    )
    try:
        with certain_transaction(connection):
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
            _who_holds(holding) if holding else "Another run began at the same moment and has just ended: try again."
        ) from None
    return run


@contextmanager
def between_runs() -> Iterator[None]:
    """A transaction of its own during which no run is going, nor begins.

    Raises AnotherRunError while one is going; a dead one is ended.
    """
    with certain_transaction(connection, None, "LOCK TABLE backfill_run IN SHARE ROW EXCLUSIVE MODE"):
        for run in BackfillRun.objects.running():
            if not take_over_if_dead(run):
                raise AnotherRunError(_who_holds(run))
        yield


@contextmanager
def batch(connection: BaseDatabaseWrapper, run_id: int, timeouts: Timeouts, *first: str) -> Iterator[Totals]:
    """A batch of a run in a transaction of its own: what is written inside, counts and heartbeat commit together.

    Yields the counts, to be added to. `first` are statements that begin it. They must lock the tables that are written,
    as whoever writes does: then no trigger or foreign key of an untrusted role can be added until the end.

    Raises LeaseLostError when the run is no longer the running one, UntrustedCodeError where such a one is there, and
    what `certain_transaction` does. Nothing of the batch is written then.
    """
    with certain_transaction(connection, timeouts, *first):
        require_still_trusted(connection)
        totals = Totals()
        yield totals
        renew(run_id, totals)


def renew(run_id: int, totals: Totals) -> None:
    """Renew the heartbeat and add a batch to the run's counters. Raises LeaseLostError. In the batch's transaction."""
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


def why_not_held(run_id: int) -> str | None:
    """Why a run is no longer the running one, in words; None while it is."""
    status = BackfillRun.objects.filter(pk=run_id).values_list("status", flat=True).first()
    return None if status == RunStatus.RUNNING else f"the run was {status or 'deleted'} before its end"


def release(run_id: int, status: RunStatus, **results: Any) -> bool:
    """End the run, if it still is the running one."""
    with certain_transaction(connection):
        ended = BackfillRun.objects.running().filter(pk=run_id).update(status=status, finished_at=Now(), **results)
    return bool(ended)


@contextmanager
def kept(run_id: int | None) -> Iterator[None]:
    """Keep the lease of a run as long as what is inside takes, which may be a count of whole tables.

    The connection is busy all the while, and behind a pooler it may be the only one. So the run's record is locked in
    the transaction of the count, as somebody locks it who refers to it: whoever would take over sees that, and whoever
    pauses or cancels the run is not kept from it. The heartbeat is renewed at the end.
    """
    if run_id is None:
        yield
        return
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM backfill_run WHERE id = %s FOR KEY SHARE", [run_id])
        yield
    BackfillRun.objects.running().filter(pk=run_id).update(heartbeat_at=Now())


def take_over_if_dead(run: BackfillRun) -> bool:
    """End a running run whose process is gone or has not been heard of for five minutes; whether it was ended."""
    gone = process_is_gone(run)
    running = BackfillRun.objects.running().filter(pk=run.pk)
    why = "its process is gone" if gone else "no heartbeat for five minutes"
    with transaction.atomic():
        if not gone:
            # A record that is locked is that of a run which counts, see `kept`, or is committing a batch.
            silent = running.filter(heartbeat_at__lt=Now() - HEARTBEAT_LASTS).select_for_update(skip_locked=True)
            running = running.filter(pk__in=[found.pk for found in silent])
        taken = running.update(status=RunStatus.INTERRUPTED, finished_at=Now(), failure=f"{_TAKEN_OVER}: {why}")
    if taken:
        logger.warning("run %s was taken over: %s", run.pk, why)
    return bool(taken)


def process_is_gone(run: BackfillRun) -> bool:
    """Whether the process of a run has ended for certain, as far as this machine can tell."""
    return _process_of(run).is_gone()


def may_be_at_work(run: BackfillRun) -> bool:
    """Whether another process than this one may still have a run to end, whatever the status that others gave it."""
    process = _process_of(run)
    if process == ProcessIdentity.own() or process.is_gone():
        return False
    return BackfillRun.objects.filter(pk=run.pk, heartbeat_at__gte=Now() - HEARTBEAT_LASTS).exists()


def is_silent(run: BackfillRun) -> bool:
    """Whether the heartbeat of a running run is so old that the next one may take it over."""
    return BackfillRun.objects.running().filter(pk=run.pk, heartbeat_at__lt=Now() - HEARTBEAT_LASTS).exists()


def _process_of(run: BackfillRun) -> ProcessIdentity:
    return ProcessIdentity(run.host, run.process_id, run.boot_id, run.pid_namespace, run.process_started)


def _who_holds(run: BackfillRun) -> str:
    if run.status == RunStatus.PAUSED:
        return (
            f"Run {run.pk} is paused, and no other may start meanwhile. "
            f"`python manage.py backfill_runs resume {run.pk}` lets the next one go on, "
            f"`cancel {run.pk}` ends it for good."
        )
    return (
        f"Run {run.pk} is going: started {run.started_at:%Y-%m-%d %H:%M:%S} UTC by {run.operator} on {run.host} "
        f"(process {run.process_id}), last heartbeat {run.heartbeat_at:%H:%M:%S} UTC. Wait for it, or stop it with "
        f"`python manage.py backfill_runs cancel {run.pk}`."
    )


def operator() -> str:
    """The operating system's user who works here."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"

"""Reports that were not written: the next run tells what was news in them, so that no error is known unseen.

A run owes its report from its claim on. So one that is killed, or whose output is full, needs no note of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from django.db import DatabaseError, connection, transaction

from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.runs import lease

#: How long the note of a report waits for whoever has locked the run's record.
MAX_WAIT = "100ms"


class LostReport(NamedTuple):
    """A run whose report was lost, and how many rows were newly in error in it."""

    run_id: int
    error_new: int


def lost_reports(run_id: int) -> list[LostReport]:
    """Return the reports of earlier runs that were lost and that no run has reported since.

    A run that was rolled back has no rows in error any more: those that are still wrong are new in the next run. One
    that was cancelled or paused may be at its last batch, with its report to come.
    """
    lost = BackfillRun.objects.filter(pk__lt=run_id, report_lost=True).order_by("pk")
    lost = lost.exclude(rollbacks__run__status=RunStatus.FINISHED)
    return [LostReport(run.pk, run.error_new) for run in lost if not lease.may_be_at_work(run)]


@contextmanager
def noted(run_id: int | None, told: Sequence[LostReport]) -> Iterator[None]:
    """Write the report of a run inside. Notes then that it is not lost, nor are those that it told of.

    A note that cannot be made at once, or that a signal breaks off, changes nothing for a run that is over: what was
    written is told twice then.
    """
    yield
    # Without a connection the record could not be ended, and a new one may have to wait for the same lock.
    if run_id is not None and connection.connection is not None:
        with suppress(DatabaseError, KeyboardInterrupt), transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = '{MAX_WAIT}'")
            BackfillRun.objects.filter(pk__in=[run_id, *(lost.run_id for lost in told)]).update(report_lost=False)

"""Lost reports: the next run reports the new errors of runs whose report was not written.

A run is marked `report_lost` from its claim until its report is written. So a run that is killed, or whose output is
full, does not have to write anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from django.db import DatabaseError, connection, transaction

from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.postgres.transactions import require_trusted_writes
from crm.postgres.trust import UntrustedCodeError
from crm.runs import lease

#: How long `noted` waits for a lock on the run's record.
MAX_WAIT = "100ms"


class LostReport(NamedTuple):
    """A run whose report was lost, and its number of new errors."""

    run_id: int
    error_new: int


def lost_reports(run_id: int) -> list[LostReport]:
    """Return the lost reports of earlier runs that no run has reported since.

    Excludes runs that were rolled back: their rows have no ledger entries any more, so rows that are still wrong count
    as new errors in the next run. Excludes cancelled and paused runs that may still be at their last batch, because
    these write their report later.
    """
    lost = BackfillRun.objects.filter(pk__lt=run_id, report_lost=True).order_by("pk")
    lost = lost.exclude(rollbacks__run__status=RunStatus.FINISHED)
    return [LostReport(run.pk, run.error_new) for run in lost if not lease.may_be_at_work(run)]


@contextmanager
def noted(run_id: int | None, reported: Sequence[LostReport]) -> Iterator[None]:
    """Write the report of a run in the block; then clear `report_lost` of the run and of the `reported` ones.

    If that fails, or a signal interrupts it, the error is suppressed, because the run has ended: the next run reports
    the same again.
    """
    yield
    # Without a connection, closing the record failed as well, and a new connection may have to wait for the same lock.
    if run_id is not None and connection.connection is not None:
        with suppress(DatabaseError, UntrustedCodeError, KeyboardInterrupt), transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = '{MAX_WAIT}'")
            require_trusted_writes(connection, lease.RUNS)
            BackfillRun.objects.filter(pk__in=[run_id, *(lost.run_id for lost in reported)]).update(report_lost=False)

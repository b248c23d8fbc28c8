"""Shows the progress of a run in another terminal. Only reads.

It shows committed data only: the run's record, its batches by source, and the counts of a rollback.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from django.db.models import Count, Max, Sum
from django.utils import timezone

from crm.models import BackfillBatch, BackfillRun, Rollback
from crm.models.ledger import RunStatus
from crm.outcome import Outcome, Repair, Source
from crm.runs import control, lease

#: Seconds between two reads.
POLL_INTERVAL = 1.0

_COUNTS_OF_ROLLBACK = [
    (f"{kind}_{status}", f"{kind} {status}")
    for kind in ("contacts", "merges", "updates", "lines")
    for status in ("reversed", "kept", "failed")
    if (kind, status) != ("lines", "failed")
]


def watch(run_id: int, wait: Callable[[], object]) -> Generator[str, None, BackfillRun]:
    """Yield a line for each change of a run; return the run when it has ended or its process is gone.

    Calls `wait` between two reads. Raises OperatorError if there is no such run, and for database errors.
    """
    shown: dict[str, str] = {}
    beginning: str | None = None
    while True:
        with control.as_operator_error():
            # Read the run before its batches, so that none of them is missing if it has ended.
            run = control.find(run_id)
            progress = dict(_progress(run))
            is_dead = lease.process_is_gone(run) and control.find(run_id).status == RunStatus.RUNNING
            is_first = beginning is None
            beginning = beginning or _beginning(run)
        if is_first:
            yield beginning
        yield from (line for name, line in progress.items() if shown.get(name) != line)
        shown = progress
        if run.status != RunStatus.RUNNING:
            yield _end(run)
            return run
        if is_dead:
            yield f"Run {run.pk} is dead: its process is gone. The next run takes it over and continues from there."
            return run
        wait()


def _beginning(run: BackfillRun) -> str:
    rollback = control.rollback_of(run)
    of = f" of run {rollback.of_id}" if rollback is not None else ""
    return f"Run {run.pk}: {run.kind}{of}, started {_moment(run.started_at)} UTC by {run.operator} on {run.host}"


def _progress(run: BackfillRun) -> Iterator[tuple[str, str]]:
    """Yield a name and a line for each source, in the order of a run, and for a missing heartbeat."""
    if lease.is_silent(run):
        since = f"No heartbeat since {_moment(run.heartbeat_at)} UTC"
        yield "silence", f"{since}: it is counting large tables or is dead. The next run finds out which."
    if run.kind == BackfillRun.Kind.ROLLBACK:
        counts: dict[str, Any] = dict(Rollback.objects.filter(pk=run.pk).values().first() or {})
        done = [f"{counts[name]:,} {words}" for name, words in _COUNTS_OF_ROLLBACK if counts.get(name)]
        if done:
            yield "rollback", f"{_moment(run.heartbeat_at)}  {', '.join(done)}"
        return
    batches = (
        BackfillBatch.objects.filter(run=run)
        .values("source")
        .annotate(count=Count("pk"), rows=Sum("read"), again=Sum("revisited"), last=Max("committed_at"))
    )
    by_source: dict[str, dict[str, Any]] = {batch["source"]: dict(batch) for batch in batches}
    for source in (*Source, *Repair):
        if (done_of := by_source.get(source)) is not None:
            again = f", {done_of['again']:,} revisited" if done_of["again"] else ""
            in_batches = f"in {done_of['count']:,} {'batch' if done_of['count'] == 1 else 'batches'}"
            rows = f"{_rows(done_of['rows'])}{again} {in_batches}"
            if isinstance(source, Repair):
                rows = f"{done_of['again']:,} read {in_batches}"
            yield source, f"{_moment(done_of['last'])}  {source.title:<16}{rows}"


def _end(run: BackfillRun) -> str:
    why = f": {run.failure}" if run.failure else ""
    seconds = ((run.finished_at or timezone.now()) - run.started_at).total_seconds()
    counts = ""
    if run.kind == BackfillRun.Kind.BACKFILL:
        outcomes = ", ".join(f"{getattr(run, outcome):,} {outcome}" for outcome in Outcome)
        counts = f" {_rows(run.read)} read: {outcomes}; {run.error_new:,} newly in error."
        if run.revisited:
            counts += (
                f" {run.revisited:,} revisited: {run.updated:,} changed, {run.kept:,} kept only, "
                f"{run.unchanged:,} unchanged."
            )
    elif run.kind == BackfillRun.Kind.REPAIR:
        counts = f" {run.revisited:,} read: {run.updated:,} changed, {run.kept:,} kept, {run.unchanged:,} unchanged."
    return f"Run {run.pk} is {run.status} after {seconds:,.1f} s{why}.{counts}"


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def _moment(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"

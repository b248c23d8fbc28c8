"""Read, pause, resume and cancel runs, for the command line and the admin.

Each change is one UPDATE with a condition on the current status, so concurrent changes, and a run that ends meanwhile,
cannot conflict. The process of a run notices the change at its next batch: the update of its heartbeat matches no
running run, so it rolls the batch back and stops.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.models import Prefetch, QuerySet
from django.db.models.functions import Coalesce, Now

from crm import sqlstates
from crm.errors import OperatorError
from crm.models import BackfillBatch, BackfillRun, Rollback
from crm.models.ledger import RunStatus
from crm.outcome import NUMBERS
from crm.postgres import errors
from crm.postgres.snapshot import in_pages
from crm.postgres.transactions import Timeouts, certain_transaction
from crm.runs import lease

#: The statuses that an operator may give a run, by its current status. Only the run's own process sets `finished` and
#: `failed`.
TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = {
    RunStatus.RUNNING: frozenset({RunStatus.PAUSED, RunStatus.CANCELLED}),
    RunStatus.PAUSED: frozenset({RunStatus.INTERRUPTED, RunStatus.CANCELLED}),
    RunStatus.CANCELLED: frozenset(),
    RunStatus.INTERRUPTED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.FINISHED: frozenset(),
}
#: The status that each action sets. A resumed run becomes `interrupted`, as if a signal had stopped it: the next run
#: continues from there.
ACTIONS: Mapping[str, RunStatus] = {
    "pause": RunStatus.PAUSED,
    "resume": RunStatus.INTERRUPTED,
    "cancel": RunStatus.CANCELLED,
}
#: Stands for the number of the run that started last.
LATEST = "latest"
#: How long an action waits for a batch that is committing, in seconds.
PATIENCE = 5.0

_PAST = {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}

logger = logging.getLogger(__name__)


def latest(count: int) -> list[BackfillRun]:
    """Return the latest runs, newest first.

    Raises OperatorError before `migrate`, and if this role may not read the runs.
    """
    with as_operator_error():
        return list(with_rollbacks(BackfillRun.objects.all())[:count])


def with_rollbacks(runs: QuerySet[BackfillRun]) -> QuerySet[BackfillRun]:
    """Prefetch what `rollback_of` and `rolled_back_by` need, in one query for all runs."""
    return runs.select_related("rollback").prefetch_related(
        Prefetch("rollbacks", Rollback.objects.select_related("run").order_by("run_id"))
    )


def rollback_of(run: BackfillRun) -> Rollback | None:
    """Return the counts of a run that is a rollback, or None for any other run."""
    return getattr(run, "rollback", None)


def rolled_back_by(run: BackfillRun) -> list[int]:
    """Return the numbers of the rollbacks of a run, complete or partial, oldest first."""
    return sorted(rollback.pk for rollback in run.rollbacks.all())


def took_back(rollback: Rollback) -> dict[str, int]:
    """Return the number of rows that a rollback reversed, by kind, and of those that it kept or failed on."""
    return {
        "contacts": rollback.contacts_reversed,
        "merges": rollback.merges_reversed,
        "updates": rollback.updates_reversed,
        "lines": rollback.lines_reversed,
        "later_merges": rollback.later_merges,
        "kept": rollback.contacts_kept + rollback.merges_kept + rollback.updates_kept + rollback.lines_kept,
        "failed": rollback.contacts_failed + rollback.merges_failed + rollback.updates_failed,
    }


def number(given: int | str) -> int:
    """Return the number of a run, given by number or as LATEST. Raises OperatorError if there is no run yet."""
    if given != LATEST:
        return int(given)
    found = latest(1)
    if not found:
        raise OperatorError("There is no run yet.")
    return found[0].pk


def find(run_id: int) -> BackfillRun:
    """Return a run by its number. Raises OperatorError if there is none, and lets database errors through."""
    run = BackfillRun.objects.filter(pk=run_id).first()
    if run is None:
        raise OperatorError(f"There is no run {run_id}. `python manage.py backfill_runs list` lists the runs.")
    return run


def possible_actions(status: str) -> list[str]:
    """Return the actions that are possible for a run with this status."""
    return [action for action, target in ACTIONS.items() if target in TRANSITIONS[RunStatus(status)]]


def pause(run_id: int) -> BackfillRun:
    """Stop a run at its next batch, and prevent other runs from starting. Raises OperatorError; see `act`."""
    return act("pause", run_id)


def resume(run_id: int) -> BackfillRun:
    """Allow the next run to continue where a paused run stopped. Raises OperatorError; see `act`."""
    return act("resume", run_id)


def cancel(run_id: int) -> BackfillRun:
    """End a running run at its next batch, or a paused run at once. Raises OperatorError; see `act`."""
    return act("cancel", run_id)


def act(action: str, run_id: int) -> BackfillRun:
    """Apply one of ACTIONS to a run, and return the changed run.

    Raises OperatorError, with nothing changed, if there is no such run, if its status does not allow the action, and
    if a batch takes longer than PATIENCE to commit.
    """
    target = ACTIONS[action]
    allowed = [status for status, targets in TRANSITIONS.items() if target in targets]
    timeouts = Timeouts(lock=round(PATIENCE * 1000))
    with as_operator_error(run_id), certain_transaction(connection, lease.RUNS, timeouts):
        changed = BackfillRun.objects.filter(pk=run_id, status__in=allowed).update(
            status=target, finished_at=Coalesce("finished_at", Now())
        )
        run = find(run_id)
        if not changed:
            raise OperatorError(
                f"Run {run_id} is {run.status}: only a run that is {' or '.join(allowed)} can be {_PAST[action]}."
            )
    logger.info("run %s was %s by an operator", run_id, _PAST[action])
    return run


def taken_back(run: BackfillRun) -> str:
    """Describe what a rollback reversed, or which rollbacks reversed a run; empty if neither applies."""
    if (rollback := rollback_of(run)) is not None:
        counts = took_back(rollback)
        figures = "; ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts.items() if count)
        return f"of run {rollback.of_id}: {figures or 'nothing'}"
    by = ", ".join(map(_rollback_summary, run.rollbacks.all()))
    return by and f"by run {by}"


def _rollback_summary(rollback: Rollback) -> str:
    """Return a rollback's number, with its status if it did not finish and the rows that it did not reverse."""
    remarks = [f"{count:,} {kind}" for kind in ("kept", "failed") if (count := took_back(rollback)[kind])]
    if rollback.run.status != RunStatus.FINISHED:
        remarks.insert(0, rollback.run.status)
    return f"{rollback.pk} ({', '.join(remarks)})" if remarks else str(rollback.pk)


def summary(run: BackfillRun) -> dict[str, Any]:
    """Return a run as JSON values, with the keys of a run's report and times in ISO format."""
    rollback = rollback_of(run)
    return {
        "run": run.pk,
        "kind": run.kind,
        "status": run.status,
        "started_at": run.started_at.isoformat(),
        "heartbeat_at": run.heartbeat_at.isoformat(),
        "finished_at": run.finished_at and run.finished_at.isoformat(),
        **{name: getattr(run, name) for name in NUMBERS},
        "balanced": run.balanced,
        "rolls_back": rollback and rollback.of_id,
        "took_back": rollback and took_back(rollback),
        "rolled_back_by": rolled_back_by(run),
        "failure": run.failure,
    }


def details(run_id: int) -> dict[str, Any]:
    """Return a run as JSON values, with its options, operator and process, and the totals of its batches.

    Raises OperatorError if there is no such run, and if this role may not read it.
    """
    by_source: dict[str, Counter[str]] = {}
    by_reason: Counter[str] = Counter()
    new_by_reason: Counter[str] = Counter()
    updated_by_column: Counter[str] = Counter()
    kept_by_column: Counter[str] = Counter()
    batches = 0
    with as_operator_error():
        run = find(run_id)
        overview = summary(run)
        for batch in in_pages(BackfillBatch.objects.filter(run=run)):
            batches += 1
            totals = batch.totals()
            outcomes = totals.update_outcomes if run.kind == BackfillRun.Kind.REPAIR else totals.outcomes
            by_source.setdefault(batch.source, Counter()).update(outcomes)
            by_reason.update(totals.errors_by_reason)
            new_by_reason.update(totals.errors_new_by_reason)
            updated_by_column.update(totals.updated_by_column)
            kept_by_column.update(totals.kept_by_column)
    return {
        **overview,
        "options": run.options,
        "version": run.version,
        "rules": run.rules,
        "generation": run.generation,
        "operator": run.operator,
        "host": run.host,
        "process_id": run.process_id,
        "batches": batches,
        "by_source": {source: dict(counts) for source, counts in by_source.items()},
        "by_reason": dict(sorted(by_reason.items())),
        "new_by_reason": dict(sorted(new_by_reason.items())),
        "updated_by_column": dict(sorted(updated_by_column.items())),
        "kept_by_column": dict(sorted(kept_by_column.items())),
        "census": run.census,
        "actions": possible_actions(run.status),
    }


def as_operator_error(run_id: int | None = None) -> AbstractContextManager[None]:
    """Raise database errors as OperatorError, with a remedy for those that an operator can fix."""
    known = {
        sqlstates.LOCK_NOT_AVAILABLE: (
            f"Run {run_id} has been committing a batch for {PATIENCE:g} s. Nothing was changed: run the command again."
        ),
    }
    if run_id is None:
        known[sqlstates.UNDEFINED_TABLE] = (
            "There are no runs that this role can read: run `python manage.py migrate` first, or GRANT SELECT on the "
            f"tables in {settings.BACKFILL_SCHEMA} to this role."
        )
    return errors.as_operator_error("Database error: {}. Nothing was changed: run the command again.", known=known)

"""What people do to runs from outside, in the terminal and in the admin: look, pause, resume, cancel.

Each change is one UPDATE of a run that still has a status from which the change may be made, so nothing goes wrong
when two people do it at once or the run ends meanwhile. The process of a run notices at its next batch: its heartbeat
finds no running run, the batch is rolled back, and it ends.
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

#: What people may make of a run, by what it is. A process alone ends its own run as finished, failed or interrupted.
TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = {
    RunStatus.RUNNING: frozenset({RunStatus.PAUSED, RunStatus.CANCELLED}),
    RunStatus.PAUSED: frozenset({RunStatus.INTERRUPTED, RunStatus.CANCELLED}),
    RunStatus.CANCELLED: frozenset(),
    RunStatus.INTERRUPTED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.FINISHED: frozenset(),
}
#: What each action makes of a run. A resumed one is interrupted, like one that was stopped by a signal: the next run
#: goes on where it stopped.
ACTIONS: Mapping[str, RunStatus] = {
    "pause": RunStatus.PAUSED,
    "resume": RunStatus.INTERRUPTED,
    "cancel": RunStatus.CANCELLED,
}
#: Names the run that began last.
LATEST = "latest"
#: How long an action waits for the batch that is just committing; seconds.
PATIENCE = 5.0

_PAST = {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}

logger = logging.getLogger(__name__)


def latest(count: int) -> list[BackfillRun]:
    """The last runs, the newest first. Raises OperatorError before `migrate`, and where they may not be read."""
    with as_operator_error():
        return list(with_rollbacks(BackfillRun.objects.all())[:count])


def with_rollbacks(runs: QuerySet[BackfillRun]) -> QuerySet[BackfillRun]:
    """The same runs, each with what `rollback_of` and `rolled_back_by` tell of it, in one query for all."""
    return runs.select_related("rollback").prefetch_related(
        Prefetch("rollbacks", Rollback.objects.select_related("run").order_by("run_id"))
    )


def rollback_of(run: BackfillRun) -> Rollback | None:
    """What a run that is a rollback took back, and of which run; None for any other run."""
    return getattr(run, "rollback", None)


def rolled_back_by(run: BackfillRun) -> list[int]:
    """The rollbacks that took a run back, whole or in part, the first one first."""
    return sorted(rollback.pk for rollback in run.rollbacks.all())


def took_back(rollback: Rollback) -> dict[str, int]:
    """How many rows a rollback took back: which made contacts, were merged, updated contacts, or met others.

    And how many of the run's rows it kept, and on how many it failed.
    """
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
    """The number of the run that is given by it, or by LATEST. Raises OperatorError where there has been none."""
    if given != LATEST:
        return int(given)
    found = latest(1)
    if not found:
        raise OperatorError("There has been no run.")
    return found[0].pk


def find(run_id: int) -> BackfillRun:
    """A run by its number. Raises OperatorError where there is none, and django.db.Error for a transient error."""
    run = BackfillRun.objects.filter(pk=run_id).first()
    if run is None:
        raise OperatorError(f"There is no run {run_id}. `python manage.py backfill_runs list` shows those there are.")
    return run


def possible_actions(status: str) -> list[str]:
    """What may be done to a run of this status."""
    return [action for action, target in ACTIONS.items() if target in TRANSITIONS[RunStatus(status)]]


def pause(run_id: int) -> BackfillRun:
    """Stop a run at its next batch, and let no other one start. Raises OperatorError; see `act`."""
    return act("pause", run_id)


def resume(run_id: int) -> BackfillRun:
    """Let the next run go on where a paused one stopped. Raises OperatorError; see `act`."""
    return act("resume", run_id)


def cancel(run_id: int) -> BackfillRun:
    """Stop a run at its next batch, or a paused one, for good. Raises OperatorError; see `act`."""
    return act("cancel", run_id)


def act(action: str, run_id: int) -> BackfillRun:
    """Do one of ACTIONS to a run; the run as it is then.

    Raises OperatorError, and changes nothing, where there is no such run, where it is not one to which that may be
    done, and where a batch is committing for longer than PATIENCE.
    """
    target = ACTIONS[action]
    allowed = [status for status, targets in TRANSITIONS.items() if target in targets]
    timeouts = Timeouts(lock=round(PATIENCE * 1000))
    with as_operator_error(run_id), certain_transaction(connection, timeouts):
        changed = BackfillRun.objects.filter(pk=run_id, status__in=allowed).update(
            status=target, finished_at=Coalesce("finished_at", Now())
        )
        run = find(run_id)
        if not changed:
            raise OperatorError(
                f"Run {run_id} is {run.status}: only one that is {' or '.join(allowed)} can be {_PAST[action]}."
            )
    logger.info("run %s was %s from outside", run_id, _PAST[action])
    return run


def taken_back(run: BackfillRun) -> str:
    """What a rollback took back, or by which one a run was taken back, for people."""
    if (rollback := rollback_of(run)) is not None:
        counts = took_back(rollback)
        figures = "; ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts.items() if count)
        return f"of run {rollback.of_id}: {figures or 'nothing'}"
    by = ", ".join(map(_as_far_as_it_came, run.rollbacks.all()))
    return by and f"by run {by}"


def _as_far_as_it_came(rollback: Rollback) -> str:
    """A rollback's number; where something of the run stands, how much, or that it did not come to its end."""
    stands = [f"{count:,} {kind}" for kind in ("kept", "failed") if (count := took_back(rollback)[kind])]
    if rollback.run.status != RunStatus.FINISHED:
        stands.insert(0, rollback.run.status)
    return f"{rollback.pk} ({', '.join(stands)})" if stands else str(rollback.pk)


def summary(run: BackfillRun) -> dict[str, Any]:
    """A run for machines: names as in the report of a run, moments in ISO form."""
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
    """A run for machines, with who started it and how, and what its batches add up to.

    Raises OperatorError where there is none, and where it may not be read.
    """
    by_source: dict[str, Counter[str]] = {}
    by_reason: Counter[str] = Counter()
    new_by_reason: Counter[str] = Counter()
    updated_by_column: Counter[str] = Counter()
    batches = 0
    with as_operator_error():
        run = find(run_id)
        told = summary(run)
        for batch in in_pages(BackfillBatch.objects.filter(run=run)):
            batches += 1
            totals = batch.totals()
            by_source.setdefault(batch.source, Counter()).update(totals.outcomes)
            by_reason.update(totals.errors_by_reason)
            new_by_reason.update(totals.errors_new_by_reason)
            updated_by_column.update(totals.updated_by_column)
    return {
        **told,
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
        "census": run.census,
        "actions": possible_actions(run.status),
    }


def as_operator_error(run_id: int | None = None) -> AbstractContextManager[None]:
    """Turn what the database refuses into what can be done about it."""
    known = {
        sqlstates.LOCK_NOT_AVAILABLE: (
            f"Run {run_id} has been committing for {PATIENCE:g} s. Nothing was changed: try again."
        ),
    }
    if run_id is None:
        known[sqlstates.UNDEFINED_TABLE] = (
            "There are no runs that this role can see: run `python manage.py migrate` first, or GRANT SELECT on the "
            f"tables in {settings.BACKFILL_SCHEMA}."
        )
    return errors.as_operator_error("The database broke off: {}. Nothing was changed: try again.", known=known)

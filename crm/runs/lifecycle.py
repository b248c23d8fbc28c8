"""The lifecycle of a run, from claim to close, for backfills and rollbacks.

    with lifecycle() as life: claim -> carry_out(work) -> close(check)

A signal never leaves a run that is `running` without a process. Signals cancel the work and the check of the
reconciliation, but neither the claim nor the closing of the record, which are short. Claim and close are retried after
transient errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from django.conf import settings
from django.db import Error as DjangoDatabaseError
from django.db import connection, transaction

from crm.errors import OperatorError
from crm.interruption import STOPPED_IN_A_BATCH, InterruptedRunError, Interruption, StoppedError
from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.postgres import errors
from crm.postgres.errors import UnknownEndError
from crm.postgres.transactions import require_trusted_writes
from crm.runs import lease, retrying
from crm.runs.garbage import seldom_collected
from crm.runs.lease import LeaseLostError

logger = logging.getLogger(__name__)

#: How long the check of the reconciliation and the closing of the record may take after a stop request, in seconds.
#: Together with the grace of the batch, an operator waits two seconds.
GRACE_OF_THE_CHECK, GRACE_OF_THE_END = 0.3, 0.6
Answer = TypeVar("Answer")


class Ending(NamedTuple):
    """The status with which a run ended, and the reason if it did not finish.

    `balanced` is None if the reconciliation was not checked; `not_checked` is the reason.
    """

    status: RunStatus
    failure: str | None = None
    balanced: bool | None = None
    not_checked: str | None = None


class Checked(NamedTuple):
    """The result of checking the reconciliation. `recorded` has the columns of the run's record to set.

    `failure` is set if the run fails because of the result.
    """

    balanced: bool | None
    failure: str | None = None
    not_checked: str | None = None
    recorded: Mapping[str, Any] = {}


@dataclass(slots=True)
class Lifecycle:
    """One run. `run` is None for a dry run, and until it is claimed."""

    interruption: Interruption = field(default_factory=Interruption)
    run: BackfillRun | None = None

    def claim(self, claim: Callable[[], BackfillRun]) -> BackfillRun:
        """Claim and return the run.

        Raises the errors of `lease.claim`, and StoppedError if the operator stopped the command during the claim.
        """
        try:
            self.run = claim()
        except DjangoDatabaseError:
            if self.interruption.requested:
                # Any error may be the effect of the cancelled statement.
                raise StoppedError("Interrupted at the start. Nothing was changed; run the command again.") from None
            raise
        return self.run

    def carry_out(self, work: Callable[[], None], *failures: type[Exception]) -> Ending:
        """Run `work`, and return how it ended. `failures` are errors whose text goes into the run's record."""
        try:
            with self.interruption.breakable():
                self.interruption.heed()
                work()
        except InterruptedRunError as stopped:
            connection.close()
            return Ending(RunStatus.INTERRUPTED, str(stopped) or None)
        except KeyboardInterrupt:
            connection.close()
            return Ending(RunStatus.INTERRUPTED, STOPPED_IN_A_BATCH)
        except LeaseLostError:
            # `_end` reads the status from the record.
            return Ending(RunStatus.INTERRUPTED)
        except failures as error:
            return Ending(RunStatus.FAILED, str(error))
        except OperatorError as error:
            # Such as a new connection that is refused during the run.
            return Ending(RunStatus.FAILED, errors.describe(error))
        except UnknownEndError as error:
            connection.close()
            status = RunStatus.INTERRUPTED if self.interruption.requested else RunStatus.FAILED
            return Ending(status, errors.describe(error))
        except DjangoDatabaseError as error:
            if self.interruption.requested:
                # Any error may be the effect of the cancelled statement.
                connection.close()
                return Ending(RunStatus.INTERRUPTED, STOPPED_IN_A_BATCH)
            logger.error("the run failed: %s", errors.describe(error))  # noqa: TRY400 - a traceback may quote people's data
            connection.close()
            return Ending(RunStatus.FAILED, errors.describe(error))
        return Ending(RunStatus.FINISHED)

    def close(self, ending: Ending, count: Callable[[], None], check: Callable[[], Checked]) -> Ending:
        """Check the reconciliation, close the run's record and return how the run ended.

        `count` reads the committed counts, `check` checks the reconciliation.
        """
        recorded: Mapping[str, Any] = {}
        self.interruption.grant(GRACE_OF_THE_CHECK)
        try:
            with self.interruption.breakable(at_once=True):
                self.keeping_the_lease(count)
                checked = self.keeping_the_lease(check)
                ending, recorded = _with_check(ending, checked), checked.recorded
        except KeyboardInterrupt:
            connection.close()
            ending = _stopped_before_the_check(ending)
        except (DjangoDatabaseError, OperatorError) as error:
            connection.close()
            if self.interruption.requested:
                ending = _stopped_before_the_check(ending)
            else:
                ending = _failed(ending, errors.describe(error))
        try:
            return self._end_with_retries(ending, recorded)
        except (DjangoDatabaseError, OperatorError) as error:
            if self._was_cancelled(error):
                return _stopped_before_the_end(ending)
            return _failed(ending, errors.describe(error))

    def _was_cancelled(self, error: Exception) -> bool:
        return self.interruption.requested and errors.sqlstate(error) in errors.TIMEOUTS

    def keeping_the_lease(self, read: Callable[[], Answer]) -> Answer:
        """Call `read` like `retrying` does, and keep the lease meanwhile."""

        def counted() -> Answer:
            with lease.kept(self.run.pk if self.run else None):
                return read()

        return self.retrying(counted)

    def _end_with_retries(self, ending: Ending, recorded: Mapping[str, Any]) -> Ending:
        def end() -> Ending:
            # If another session has locked the record, the next run takes this one over.
            self.interruption.grant(GRACE_OF_THE_END)
            return self._end(ending, recorded)

        return self.retrying(end, even_if_stopped=True)

    def _end(self, ending: Ending, recorded: Mapping[str, Any]) -> Ending:
        """Close the record. If another process has closed or deleted it, return the ending that it recorded."""
        if self.run is None:
            return ending
        results = {"balanced": ending.balanced, **recorded}
        if lease.release(self.run.pk, ending.status, failure=ending.failure, **results):
            return ending
        record = BackfillRun.objects.filter(pk=self.run.pk)
        found = record.values_list("status", "failure").first()
        if found is None:
            return _failed(ending._replace(failure=None), f"the record of run {self.run.pk} was deleted meanwhile")
        # The process that ended it did not count.
        with transaction.atomic():
            require_trusted_writes(connection, lease.RUNS)
            record.update(**results)
        if ending.status == RunStatus.FAILED:
            return ending
        status, failure = found
        return ending._replace(status=RunStatus(status), failure=failure)

    def retrying(self, read: Callable[[], Answer], *, even_if_stopped: bool = False) -> Answer:
        """Call `read`, again over a new connection after a transient error. For anything but batches; see `Retries`.

        Raises django.db.Error if the error is not transient or persists, or if a stop was requested.
        """
        for wait in retrying.WAITS_BEFORE_ANOTHER_LOOK:
            try:
                return read()
            except DjangoDatabaseError as error:
                cause = errors.transient_cause(error)
                if cause is None or self._was_cancelled(error) or (self.interruption.requested and not even_if_stopped):
                    raise
                logger.warning("%s: retrying in %.1f s", cause, wait)
                connection.close()
                self.interruption.sleep(wait)
        return read()

    def abandon(self, error: BaseException) -> None:
        """Close a run that an unexpected error has ended."""
        if self.run is not None:
            ending = Ending(RunStatus.FAILED, f"an error in the program ({type(error).__name__})")
            connection.close()
            try:
                self._end_with_retries(ending, {})
            except (DjangoDatabaseError, OperatorError) as refusal:
                logger.warning("run %s could not be closed: %s", self.run.pk, errors.describe(refusal))


@contextmanager
def lifecycle() -> Iterator[Lifecycle]:
    """Handle signals from before the claim of a run until after its close, and close it if an error ends it."""
    life = Lifecycle()
    with life.interruption.heeded(), _no_query_log(), seldom_collected():
        try:
            yield life
        except BaseException as error:
            life.abandon(error)
            raise


@contextmanager
def _no_query_log() -> Iterator[None]:
    """Turn DEBUG off: Django would keep every statement in memory, with its parameters."""
    debug, settings.DEBUG = settings.DEBUG, False
    try:
        yield
    finally:
        settings.DEBUG = debug


def _with_check(ending: Ending, checked: Checked) -> Ending:
    ending = ending._replace(balanced=checked.balanced, not_checked=checked.not_checked)
    if checked.failure is None:
        return ending
    failure = f"{ending.failure}; {checked.failure}" if ending.failure else checked.failure
    return ending._replace(status=RunStatus.FAILED, failure=failure)


def _stopped_before_the_check(ending: Ending) -> Ending:
    ending = ending._replace(not_checked="the run was stopped")
    if ending.status == RunStatus.FINISHED:
        return ending._replace(status=RunStatus.INTERRUPTED, failure="stopped before its reconciliation was checked")
    return ending


def _stopped_before_the_end(ending: Ending) -> Ending:
    status = RunStatus.INTERRUPTED if ending.status == RunStatus.FINISHED else ending.status
    why = "its record is locked and could not be ended; the next run takes it over"
    return ending._replace(status=status, failure=f"{ending.failure}; {why}" if ending.failure else why)


def _failed(ending: Ending, why: str) -> Ending:
    return ending._replace(status=RunStatus.FAILED, failure=ending.failure or why, balanced=None, not_checked=why)

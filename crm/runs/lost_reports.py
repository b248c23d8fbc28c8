"""Reports that could not be written: the next run tells what was news in them, so that no error is known unseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from django.db import DatabaseError

from crm.models import BackfillRun
from crm.output.streams import OutputError


class LostReport(NamedTuple):
    """A run whose report was lost, and how many rows were newly in error in it."""

    run_id: int
    error_new: int


def lost_reports() -> list[LostReport]:
    """The reports that were lost and that no run has told of since."""
    lost = BackfillRun.objects.filter(report_lost=True).order_by("pk")
    return [LostReport(*run) for run in lost.values_list("pk", "error_new")]


@contextmanager
def noted(run_id: int | None, told: Sequence[LostReport]) -> Iterator[None]:
    """Write the report of a run inside. Notes whether it was lost; if not, those that it told of are no longer.

    Raises what comes from inside. A note that cannot be made is no reason to fail: what was lost is told twice then, or
    by standard error and the exit code alone.
    """
    try:
        yield
    except OutputError:
        _note([run_id] if run_id else [], lost=True)
        raise
    _note([report.run_id for report in told], lost=False)


def _note(run_ids: Sequence[int], *, lost: bool) -> None:
    if run_ids:
        with suppress(DatabaseError):
            BackfillRun.objects.filter(pk__in=run_ids).update(report_lost=lost)

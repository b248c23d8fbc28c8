"""In whatever order the batches of the workers commit, the end is the reference's.

What one process does here by turns, workers do at the same time: each takes its own partition of a source through, and
nobody begins the next source before all are through with this one. Chance says whose batch is next, so no clock does.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from random import Random
from typing import Any, Self

import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from crm.backfill import runner
from crm.backfill.pipeline import Pipeline, StopRequest
from crm.backfill.read.readahead import ReadingThread
from crm.backfill.read.source import Partition
from crm.backfill.workers import Assignment, InProcess, OnBatch
from crm.outcome import Source, Totals
from tests.conftest import Database
from tests.property.test_backfill import assert_as_the_reference, load, run
from tests.support import reference
from tests.support.populations import aftermaths, populations, replace_population
from tests.support.profiles import against_the_database


class ByTurns:
    """The hands of as many workers, in one process: a batch of one of them, then of another one, as chance has it."""

    def __init__(self, chance: Random, assignment: Assignment, stop: StopRequest, on_batch: OnBatch) -> None:
        self._chance = chance
        self._assignment = assignment
        self._stop = stop
        self._on_batch = on_batch
        self._has_written = False
        count = assignment.options.workers
        self._threads = [ReadingThread(connection) for _ in range(count)]
        self._workers = [
            (Partition(number, count), assignment.pipeline(thread, assignment.writer(), stop, self._note))
            for number, thread in enumerate(self._threads)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.__exit__(*error)

    def work_through(self, source: Source) -> None:
        """Take every partition of a source through to its end, batch by batch."""
        at_work = list(self._workers)
        while at_work:
            worker = self._chance.choice(at_work)
            if not self._writes_a_batch(source, *worker):
                at_work.remove(worker)

    def work_through_resolved(self, source: Source) -> None:
        """As the crew does."""
        with InProcess(self._assignment, self._stop, self._on_batch) as alone:
            alone.work_through_resolved(source)

    def look_again(self, sources: Iterable[Source]) -> None:
        """As the crew does."""
        with InProcess(self._assignment, self._stop, self._on_batch) as alone:
            alone.look_again(sources)

    def _writes_a_batch(self, source: Source, partition: Partition, pipeline: Pipeline) -> bool:
        self._has_written = False
        pipeline.limit = self._assignment.options.batch_size
        pipeline.work_through(self._assignment.reader(source, partition))
        return self._has_written

    def _note(self, source: Source, totals: Totals) -> None:
        self._has_written = True
        self._on_batch(source, totals)


def run_by_turns(chance: Random, **options: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "WorkerPool", partial(ByTurns, chance))
        return run(**options)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("generation", ["2025_10", "2025_11"])
@against_the_database(25)
@given(data=st.data(), chance=st.randoms(), batch_size=st.sampled_from([1, 2, 7]))
def test_the_end_is_the_same_in_whatever_order_the_batches_of_workers_commit(
    database: Database, generation: str, workers: int, data: st.DataObject, chance: Random, batch_size: int
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    load(population)
    expected = reference.backfill(population)
    assert_as_the_reference(run_by_turns(chance, workers=workers, batch_size=batch_size), expected)

    later = data.draw(aftermaths(population, expected))
    with connection.cursor() as cursor:
        replace_population(cursor, later)
    again = reference.backfill(later, ledger=expected.ledger)
    assert_as_the_reference(run_by_turns(chance, workers=workers, batch_size=batch_size), again)

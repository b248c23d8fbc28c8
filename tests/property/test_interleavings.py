"""In whatever order the batches of the workers commit, the end is the reference's.

What one process does here by turns, workers do at the same time: each takes its own partition of a source through, and
nobody begins the next source before all are through with this one. Chance says whose batch is next, so no clock does.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any, Self

import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from crm.backfill import runner
from crm.backfill.context import OnBatch, Phase, RunContext, Task
from crm.backfill.pipeline import Pipeline
from crm.backfill.read.readahead import ReadingThread
from crm.backfill.read.source import Partition
from crm.backfill.workers import InProcess
from crm.interruption import StopRequest
from crm.outcome import Source, Totals
from tests.conftest import Database
from tests.support import reference
from tests.support.commands import run
from tests.support.comparison import assert_as_the_reference, load
from tests.support.populations import aftermaths, populations, replace_population
from tests.support.profiles import against_the_database


class ByTurns:
    """An executor with as many workers, in one process: a batch of one, then of another, as chance has it."""

    def __init__(self, chance: Random, context: RunContext, stop: StopRequest, on_batch: OnBatch) -> None:
        self._chance = chance
        self._context = context
        self._on_batch = on_batch
        self._has_written = False
        count = context.options.workers
        self._exits = ExitStack()
        self._threads = [self._exits.enter_context(ReadingThread(connection)) for _ in range(count)]
        self._workers = [
            (Partition(number, count), context.pipeline(thread, context.writer(), stop, self._note))
            for number, thread in enumerate(self._threads)
        ]
        self._in_process = self._exits.enter_context(InProcess(context, stop, on_batch))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._exits.close()

    def run(self, task: Task) -> None:
        """Run every partition of pending rows to its end, batch by batch; what one process does, as the pool does."""
        if task.phase is not Phase.PENDING:
            self._in_process.run(task)
            return
        at_work = list(self._workers)
        while at_work:
            worker = self._chance.choice(at_work)
            if not self._writes_a_batch(task, *worker):
                at_work.remove(worker)

    def _writes_a_batch(self, task: Task, partition: Partition, pipeline: Pipeline) -> bool:
        self._has_written = False
        pipeline.limit = self._context.options.batch_size
        pipeline.run(self._context.reader(task, partition))
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
@against_the_database(8)
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

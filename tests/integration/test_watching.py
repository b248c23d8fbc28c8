"""Somebody watches a run from another terminal: sees its batches and its end, and the run knows nothing of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable

import pytest

from crm.errors import OperatorError
from crm.models import BackfillRun
from crm.rollback.runner import roll_back
from crm.runs import watching
from crm.runs.process import ProcessIdentity
from tests.conftest import Database
from tests.support import builders
from tests.support.commands import called, run
from tests.support.processes import database_url, start
from tests.support.runs import make_run


def watched(run_id: int, *happenings: Callable[[], object]) -> tuple[list[str], BackfillRun]:
    """The lines that a watch shows, where this happens between one look and the next; and the run at the end."""
    steps = iter(happenings)
    following = watching.watch(run_id, lambda: next(steps)())
    lines = []
    while True:
        try:
            lines.append(next(following))
        except StopIteration as end:
            return lines, end.value


def stable(line: str) -> str:
    """A line without its moments and durations."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|[\d.]+ s\b", "<moment>", line)


def test_what_is_new_is_shown_source_by_source_and_then_the_end(database: Database) -> None:
    builders.add_many_leads(9)
    builders.add_profile(email="not an address")
    run(batch_size=4)
    finished = BackfillRun.objects.latest("pk")
    BackfillRun.objects.filter(pk=finished.pk).update(status="running", host="elsewhere", finished_at=None)

    def one_more() -> None:
        batch = finished.batches.latest("pk")
        batch.pk, batch.read, batch.created = None, 3, 3
        batch.save(force_insert=True)

    def it_ends() -> None:
        BackfillRun.objects.filter(pk=finished.pk).update(status="finished", read=13, created=12)

    lines, at_the_end = watched(finished.pk, lambda: None, one_more, lambda: None, it_ends)
    outcomes = "13 rows read: 12 created, 0 merged, 0 exists, 1 error"
    assert [stable(line) for line in lines] == [
        f"Run {finished.pk}: backfill, started <moment> UTC by {finished.operator} on elsewhere",
        "<moment>  Clients         1 row in 1 batch",
        "<moment>  Active leads    9 rows in 3 batches",
        "<moment>  Active leads    12 rows in 4 batches",
        f"Run {finished.pk} is finished after <moment>. {outcomes}; 1 newly in error.",
    ]
    assert at_the_end.status == "finished"


def test_the_end_says_what_became_of_the_rows_that_were_looked_at_again(database: Database) -> None:
    updating = make_run("finished", read=1, created=1, revisited=1234, updated=1200, kept=30, unchanged=4)
    lines, _ = watched(updating.pk)
    assert lines[-1].endswith(
        " 1 row read: 1 created, 0 merged, 0 exists, 0 error; 0 newly in error. "
        "1,234 revisited: 1,200 changed, 30 kept only, 4 unchanged."
    )


@pytest.mark.parametrize(
    ("status", "code"), [("finished", 0), ("paused", 4), ("cancelled", 4), ("interrupted", 4), ("failed", 5)]
)
def test_the_exit_code_is_that_of_the_runs_end(database: Database, status: str, code: int) -> None:
    run_of_somebody = make_run(status, failure="why" if status == "failed" else None)
    ended = called("backfill_runs", "watch", str(run_of_somebody.pk))
    assert (ended.code, ended.stderr) == (code, "")
    assert f"Run {run_of_somebody.pk} is {status}" in ended.stdout
    assert ("why" in ended.stdout) == (status == "failed")
    assert called("backfill_runs", "watch", "latest").code == code


def test_a_run_whose_process_is_gone_is_not_watched_for_ever(database: Database) -> None:
    gone = subprocess.Popen(["true"])  # noqa: S607 - whatever ends at once
    gone.wait()
    own = ProcessIdentity.own()
    dead = make_run(
        "running", host=own.host, process_id=gone.pid, boot_id=own.boot_id, pid_namespace=own.pid_namespace,
        process_started=1,
    )  # fmt: skip
    ended = called("backfill_runs", "watch", str(dead.pk))
    assert ended.code == 5
    assert f"Run {dead.pk} is dead: its process is gone." in ended.stdout
    dead.refresh_from_db()
    assert dead.status == "running", "that is the next run's to settle"


def test_a_run_that_is_silent_for_long_is_said_to_be_once(database: Database) -> None:
    silent = make_run("running")
    database.rows("UPDATE backfill_run SET heartbeat_at = now() - interval '6 minutes' RETURNING id")

    def it_ends() -> None:
        BackfillRun.objects.filter(pk=silent.pk).update(status="finished")

    lines, _ = watched(silent.pk, lambda: None, it_ends)
    assert ["No heartbeat since" in line for line in lines] == [False, True, False]


def test_a_rollback_is_watched_by_what_it_took_back(database: Database) -> None:
    builders.add_many_leads(3)
    roll_back(run()["run"])
    ended = called("backfill_runs", "watch", "latest")
    assert ended.code == 0
    assert "3 contacts reversed" in ended.stdout
    of = BackfillRun.objects.earliest("pk").pk
    assert f": rollback of run {of}, started" in ended.stdout


def test_a_run_that_is_not_there_cannot_be_watched(database: Database) -> None:
    with pytest.raises(OperatorError, match="There is no run 7"):
        watched(7)
    assert called("backfill_runs", "watch", "latest").stderr.endswith("There is no run yet.\n")


@pytest.mark.process
def test_ctrl_c_ends_the_watching_and_leaves_the_run_alone(database: Database) -> None:
    going = make_run("running", process_id=os.getpid())
    process = start("backfill_runs", "watch", "latest", url=database_url())
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"Run {going.pk}: backfill, started ")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (4, "")
    assert stderr == (
        f"Interrupted. Run {going.pk} continues; `python manage.py backfill_runs pause {going.pk}` stops it.\n"
    )
    going.refresh_from_db()
    assert going.status == "running"

"""Runs from outside: list, show, pause, resume, cancel."""

from __future__ import annotations

import json
import shlex
import threading
from itertools import product

import pytest
from django.core.management import load_command_class
from django.db import connection

from crm.backfill.report import advice
from crm.backfill.runner import run_backfill
from crm.errors import OperatorError
from crm.models import BackfillRun, Rollback
from crm.models.ledger import RunStatus
from crm.outcome import Source
from crm.rules.options import RunOptions
from crm.rules.throttling import ErrorBudget
from crm.runs import control
from crm.runs.progress import Silence
from tests.conftest import Database
from tests.support import builders, commands
from tests.support.commands import Finished, backfill, called, statements
from tests.support.processes import session
from tests.support.runs import make_run, neighbour

#: What an action makes of a run, and of which runs: the promise, written down a second time.
MADE_OF = {
    ("pause", "running"): "paused",
    ("cancel", "running"): "cancelled",
    ("resume", "paused"): "interrupted",
    ("cancel", "paused"): "cancelled",
}
PAST = {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}


EVERYTHING_ASKED = (
    "backfill_crm_contacts --update --only clients preparers --workers 2 --batch-size 500 "
    "--since '2025-11-01 22:00:00' --max-rate 100 --max-errors 5% --max-replica-lag 1.5"
)


def backfill_runs(*arguments: str) -> Finished:
    """`manage.py backfill_runs` with these arguments, in this process."""
    return called("backfill_runs", *arguments)


def status_of(run: BackfillRun) -> str:
    return str(BackfillRun.objects.values_list("status", flat=True).get(pk=run.pk))


@pytest.mark.parametrize(("action", "status"), list(product(control.ACTIONS, RunStatus.values)))
def test_an_action_is_done_to_the_runs_it_is_for_and_refused_to_others(
    database: Database, action: str, status: str
) -> None:
    run = make_run(status)
    finished = backfill_runs(action, str(run.pk))
    made = MADE_OF.get((action, status))
    assert status_of(run) == (made or status)
    assert (action in control.possible_actions(status)) == (made is not None)
    if made is None:
        assert finished.code == 2
        assert finished.stdout == ""
        wanted = " or ".join(start for (name, start) in MADE_OF if name == action)
        said = f"Run {run.pk} is {status}: only a run that is {wanted} can be {PAST[action]}.\n"
        assert finished.stderr.endswith(said)
        assert finished.stderr.count("\n") == 1
    else:
        assert finished.code == 0
        assert finished.stdout.startswith(f"Run {run.pk} is {made}")
        assert control.find(run.pk).finished_at is not None


def test_the_transitions_name_every_status() -> None:
    assert set(control.TRANSITIONS) == set(RunStatus)


@pytest.mark.parametrize("action", ["show", "watch", *control.ACTIONS])
@pytest.mark.parametrize("number", ["7", "-7", "9" * 30])
def test_a_run_that_is_not_there(database: Database, action: str, number: str) -> None:
    finished = backfill_runs(action, "--", number)
    assert finished.code == 2
    assert finished.stderr.endswith(
        f"There is no run {number}. `python manage.py backfill_runs list` lists the runs.\n"
    )


def test_latest_names_the_run_that_began_last(database: Database) -> None:
    old, going = make_run("finished"), make_run("running")
    assert json.loads(backfill_runs("show", "latest", "--json").stdout)["run"] == going.pk
    for action, made in (("pause", "paused"), ("resume", "interrupted")):
        assert backfill_runs(action, "latest").stdout.startswith(f"Run {going.pk} is {made}")
    refused = backfill_runs("cancel", "latest")
    assert (refused.code, f"Run {going.pk} is interrupted: only a run that is" in refused.stderr) == (2, True)
    assert (status_of(old), status_of(going)) == ("finished", "interrupted")
    unknown = backfill_runs("show", "last")
    assert (unknown.code, "'last' is not a run: give its number" in unknown.stderr) == (2, True)


@pytest.mark.parametrize("action", ["show", "watch", *control.ACTIONS])
def test_there_is_no_latest_run_before_the_first(database: Database, action: str) -> None:
    finished = backfill_runs(action, "latest")
    assert (finished.code, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert "There is no run yet." in finished.stderr


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (RunOptions(), "backfill_crm_contacts"),
        (
            RunOptions(
                update=True, batch_size=500, only=(Source.CLIENTS, Source.PREPARERS), since="2025-11-01 22:00:00",
                workers=2, max_rate=100, max_errors=ErrorBudget.parse("5%"), max_replica_lag=1.5,
            ),
            EVERYTHING_ASKED,
        ),
    ],
)  # fmt: skip
def test_resume_says_that_nothing_runs_yet_and_how_to_go_on(
    database: Database, options: RunOptions, command: str
) -> None:
    said = backfill_runs("resume", str(make_run("paused", options=options.recorded()).pk)).stdout
    assert "Nothing is running yet" in said
    assert f"`python manage.py {command}`" in said
    parser = load_command_class("crm", "backfill_crm_contacts").create_parser("manage.py", "backfill_crm_contacts")
    asked = vars(parser.parse_args(shlex.split(command)[1:]))
    for name, value in options.recorded().items():
        given = asked[name]
        assert (str(given) if name == "max_errors" and given else given) == value


def test_nobody_waits_for_the_next_batch_of_a_dead_run(database: Database) -> None:
    dead = make_run("running", **neighbour())
    assert "running (dead)" in backfill_runs("list").stdout
    told = backfill_runs("pause", str(dead.pk)).stdout
    assert told.startswith(f"Run {dead.pk} is paused. Its process was already dead, and now no other run can start. ")
    assert f"backfill_runs resume {dead.pk}`" in told
    assert "next batch" not in told
    assert "(dead)" not in backfill_runs("list").stdout


def test_resume_of_a_rollback_names_its_command(database: Database) -> None:
    paused = make_run("paused", kind="rollback", options={"rolls_back": 3})
    said = backfill_runs("resume", str(paused.pk)).stdout
    assert "only `python manage.py rollback_crm_backfill 3` continues it" in said
    assert "wait for the nightly run" not in said
    assert "A nightly backfill would recreate what was reversed" in said


def test_numbers_of_runs_and_of_processes_are_no_counts(database: Database) -> None:
    run = make_run("finished", process_id=12_350, read=12_350, created=12_350)
    lines = dict(line.split(maxsplit=1) for line in backfill_runs("show", str(run.pk)).stdout.splitlines())
    assert (lines["process_id"], lines["read"]) == ("12350", "12,350")


class Meddler(Silence):
    """Does something to the run after its first batch."""

    def __init__(self, action: str) -> None:
        self._action: str | None = action

    def advance(self, part: str, done: int, result: str = "") -> None:  # noqa: ARG002 - the progress of a run
        """The batch is committed, and the next one not yet begun."""
        if self._action:
            control.act(self._action, control.latest(1)[0].pk)
            self._action = None


def test_a_run_that_was_resumed_before_it_noticed_the_pause_does_not_ask_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.add_many_leads(9)
    pause, resume = Meddler("pause"), Meddler("resume")

    def pause_and_resume(_progress: Silence, part: str, done: int) -> None:
        pause.advance(part, done)
        resume.advance(part, done)

    monkeypatch.setattr(Silence, "advance", pause_and_resume)
    ended = backfill("--batch-size", "3", "--no-progress")
    assert (ended.code, "resume" in ended.stderr, "run the command again" in ended.stderr) == (4, False, True)


@pytest.mark.parametrize(("action", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_run_ends_at_its_next_batch(database: Database, action: str, status: str) -> None:
    builders.add_many_leads(9)
    report = run_backfill(RunOptions(batch_size=3), Meddler(action))
    assert report.status == status
    assert report.exit_code(strict=False) == 4
    assert ("Unless it was resumed already" in (advice(report) or "")) == (action == "pause")
    assert report.totals.created == 3
    assert len(builders.contacts()) == len(builders.ledger()) == 3
    (run,) = control.latest(1)
    assert (run.status, run.read, run.batches.count()) == (status, 3, 1)


def test_a_paused_run_keeps_others_out_until_it_is_resumed(database: Database) -> None:
    builders.add_many_leads(9)
    run_backfill(RunOptions(batch_size=3), Meddler("pause"))
    (paused,) = control.latest(1)
    for _ in range(2):
        refused = backfill("--no-progress", "--json")
        assert refused.code == 3
        assert f"Run {paused.pk} is paused" in refused.stderr
        assert f"resume {paused.pk}" in refused.stderr
    assert len(builders.contacts()) == 3

    assert backfill_runs("resume", str(paused.pk)).code == 0
    finished = backfill("--no-progress", "--json")
    assert (finished.code, finished.answer["created"], finished.answer["already"]) == (0, 6, 3)
    assert len(builders.contacts()) == 9
    assert status_of(paused) == "interrupted"


def test_a_cancelled_run_keeps_nobody_out(database: Database) -> None:
    builders.add_many_leads(2)
    paused = make_run("paused")
    assert backfill("--no-progress").code == 3
    assert backfill_runs("cancel", str(paused.pk)).code == 0
    assert backfill("--no-progress").code == 0
    assert status_of(paused) == "cancelled"


def test_a_batch_that_commits_for_long_is_waited_for_but_not_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PATIENCE", 0.2)
    run = make_run("running")
    with session() as batch:
        batch.execute("UPDATE backfill_run SET read = 0")
        finished = backfill_runs("pause", str(run.pk))
    assert finished.code == 2
    assert finished.stderr.endswith(
        f"Run {run.pk} has been committing a batch for 0.2 s. Nothing was changed: run the command again.\n"
    )
    assert status_of(run) == "running"
    assert backfill_runs("pause", str(run.pk)).code == 0


def act_while_another_session(statement: str, action: str, run: BackfillRun) -> None:
    """Do it while another session has changed the run, and commits only when this one waits for it."""
    with session() as other:
        (backend,) = other.execute("SELECT pg_backend_pid()").fetchone() or (0,)
        other.execute(statement.encode())

        def commit_when_waited_for() -> None:
            with session() as watcher:
                watcher.autocommit = True
                waiting = "SELECT FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
                while watcher.execute(waiting, [backend]).fetchone() is None:
                    pass
            other.commit()

        thread = threading.Thread(target=commit_when_waited_for)
        thread.start()
        try:
            control.act(action, run.pk)
        finally:
            thread.join()


def test_a_batch_that_is_just_committing_is_counted_and_then_the_run_is_paused(database: Database) -> None:
    run = make_run("running")
    act_while_another_session("UPDATE backfill_run SET read = 3, created = 3", "pause", run)
    found = control.find(run.pk)
    assert (found.status, found.read) == ("paused", 3)


@pytest.mark.parametrize(
    ("status", "meanwhile", "action"),
    [("paused", "cancelled", "resume"), ("running", "finished", "pause"), ("running", "finished", "cancel")],
)
def test_who_comes_second_changes_nothing(database: Database, status: str, meanwhile: str, action: str) -> None:
    run = make_run(status)
    with pytest.raises(OperatorError, match=f"Run {run.pk} is {meanwhile}: only a run that is"):
        act_while_another_session(f"UPDATE backfill_run SET status = '{meanwhile}'", action, run)
    assert status_of(run) == meanwhile


def test_runs_are_listed_for_people(database: Database) -> None:
    assert backfill_runs("list").stdout == "There is no run yet.\n"
    old = make_run("finished", read=1234567, created=1234560, error=7, error_new=6)
    going = make_run("running")
    lines = backfill_runs("list").stdout.splitlines()
    assert lines[0].split() == [
        *("run", "kind", "status", "started", "(UTC)", "read", "created", "merged", "exists", "error"),
        *("new", "errors", "changed", "last", "heartbeat", "(UTC)", "rollback"),
    ]
    assert [line.split()[:3] for line in lines[1:]] == [
        [str(going.pk), "backfill", "running"],
        [str(old.pk), "backfill", "finished"],
    ]
    assert lines[2].split()[5:] == ["1,234,567", "1,234,560", "0", "0", "7", "6", "0"]
    assert len(backfill_runs("list", "--last", "1").stdout.splitlines()) == 2


def test_runs_are_listed_and_shown_for_machines(database: Database) -> None:
    assert json.loads(backfill_runs("list", "--json").stdout) == []
    builders.add_many_leads(5)
    builders.add_profile(email="not an address")
    finished = backfill("--no-progress", "--json", "--batch-size", "3")
    (listed,) = json.loads(backfill_runs("list", "--json").stdout)
    shown = backfill_runs("show", str(listed["run"]), "--json").answer
    counts = ("run", "status", "read", "created", "merged", "exists", "error", "error_new", "balanced", "failure")
    for name in counts:
        assert listed[name] == shown[name] == finished.answer[name]
    for name in ("by_source", "by_reason", "new_by_reason", "generation"):
        assert shown[name] == finished.answer[name]
    assert shown["batches"] == 3
    assert shown["options"]["batch_size"] == 3
    assert shown["census"]["rows"] == 6
    assert shown["actions"] == []

    lines = dict(line.split(maxsplit=1) for line in backfill_runs("show", str(listed["run"])).stdout.splitlines())
    assert (lines["status"], lines["read"], lines["balanced"]) == ("finished", "6", "true")
    assert "failure" not in lines
    taken = called("rollback_crm_backfill", str(listed["run"]), "--json").answer["run"]
    names = [line.split()[0] for line in backfill_runs("show", str(taken)).stdout.splitlines()]
    assert {"status", "took_back"} <= set(names), "and no line of what a backfill counts"
    assert not {"read", "created", "error_new", "unchanged", "batches", "by_source"} & set(names)


def test_runs_say_of_which_something_stands_and_which_rollback_did_not_come_to_its_end(database: Database) -> None:
    builders.add_many_leads(3)
    made = commands.run()["run"]
    database.rows("UPDATE crm_contacts SET company = 'Ours' WHERE email = 'person-1@example.com' RETURNING id")
    taken = called("rollback_crm_backfill", str(made), "--json").answer["run"]
    said = [" ".join(line.split()[11:]) for line in backfill_runs("list").stdout.splitlines()[1:]]
    assert said == [f"0 of run {made}: contacts 2; kept 1", f"0 by run {taken} (1 kept)"]
    BackfillRun.objects.filter(pk=taken).update(status="interrupted")
    assert f"by run {taken} (interrupted, 1 kept)" in backfill_runs("list").stdout
    again = called("rollback_crm_backfill", str(made), "--json").answer["run"]
    assert f"by run {taken} (interrupted, 1 kept), {again} (1 kept)" in backfill_runs("list").stdout
    assert backfill_runs("show", str(made), "--json").answer["rolled_back_by"] == [taken, again]


def test_runs_say_what_an_update_changed_and_what_was_taken_back_by_which(database: Database) -> None:
    builders.add_many_leads(2)
    builders.add_lead("person-1@example.com", createdAt="2025-06-01")
    first = commands.run()["run"]
    database.rows("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() WHERE id LIKE 'new%%' RETURNING id""")
    update = commands.run(update=True)["run"]
    taken = [called("rollback_crm_backfill", str(number), "--json").answer["run"] for number in (update, first)]
    lines = backfill_runs("list").stdout.splitlines()[1:]
    said = [" ".join(line.split()[11:]) for line in lines]
    assert said == [
        f"0 of run {first}: contacts 2; merges 1",
        f"0 of run {update}: updates 2",
        f"2 by run {taken[0]}",
        f"0 by run {taken[1]}",
    ]
    shown = {number: backfill_runs("show", str(number), "--json").answer for number in (first, update, *taken)}
    assert [answer["rolled_back_by"] for answer in shown.values()] == [[taken[1]], [taken[0]], [], []]
    assert [answer["rolls_back"] for answer in shown.values()] == [None, None, update, first]
    nothing = {"contacts": 0, "merges": 0, "updates": 0, "lines": 0, "later_merges": 0, "kept": 0, "failed": 0}
    assert shown[taken[0]]["took_back"] == nothing | {"updates": 2}
    assert shown[taken[1]]["took_back"] == nothing | {"contacts": 2, "merges": 1}
    assert shown[update]["updated_by_column"] == {"contact_type": 2, "stage": 2}
    listed = json.loads(backfill_runs("list", "--json").stdout)
    assert [{name: shown[answer["run"]][name] for name in answer} for answer in listed] == listed


def test_a_list_asks_as_much_for_many_rollbacks_as_for_few(database: Database) -> None:
    def asked() -> int:
        with statements() as sent:
            assert backfill_runs("list", "--json").code == 0
        return len(sent)

    for _ in range(2):
        make_run("finished")
    few = asked()
    for _ in range(3):
        rollback = make_run("finished", kind="rollback")
        Rollback.objects.create(run=rollback, of=make_run("finished"))
    assert asked() == few


@pytest.mark.parametrize("arguments", [("list",), ("show", "1"), ("pause", "1")])
def test_before_migrate(database: Database, arguments: tuple[str, ...]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE backfill_run RENAME TO elsewhere")
    try:
        finished = backfill_runs(*arguments)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO backfill_run")
    assert finished.code == 2
    assert "`python manage.py migrate`" in finished.stderr
    assert "this role" in finished.stderr, "it may as well be a lack of rights"


def test_without_an_action_the_usage_is_shown() -> None:
    finished = backfill_runs()
    assert finished.code == 2
    assert "usage:" in finished.stderr

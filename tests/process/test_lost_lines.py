"""The line to the server is cut before and after every statement, and each command ends as if it had not been.

Nothing is done twice, nothing is counted twice or not at all, and no list lacks a row: the hard case is the answer to
a commit.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.postgres import transactions
from tests.conftest import Database
from tests.support.builders import add_many_leads, contacts
from tests.support.commands import called, run
from tests.support.trials import BACKFILL, PAUSE, SCENARIOS, Bench, Scenario, bench, carried_out, impatience, is_refusal
from tests.support.wire import Commit, Cut, Moment, wired

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


def what_goes_wrong(ready: Bench, cuts: Iterable[Cut]) -> list[str]:
    """Every cut after which a command does not come to what it comes to undisturbed."""
    with impatience():
        trials = [(cut, ready.trial(cut)) for cut in cuts]
    return [f"{cut.moment} {cut.place}: {wrong}" for cut, wrong in trials if wrong]


@every_scenario
def test_a_line_that_is_cut_around_a_commit_or_the_end_changes_nothing(database: Database, scenario: Scenario) -> None:
    with bench(database, scenario) as ready:
        assert what_goes_wrong(ready, _sample(ready)) == []


def _sample(ready: Bench) -> list[Cut]:
    """After the first commit and the last one, whose answers are lost; before one, and before the end."""
    commits = [place for place, text in sorted(ready.places.items()) if text == "COMMIT"]
    ends = [place for place, text in sorted(ready.places.items()) if text.startswith(_END)]
    cuts = [Cut(place, Moment.AFTER) for place in (*commits[:1], *commits[-1:])]
    cuts += [Cut(place, Moment.BEFORE) for place in (*commits[1:2], *ends[-1:])]
    cuts += [Cut(place, Moment.LATE) for place in commits[1:2] or commits[:1]]
    return list(dict.fromkeys(cuts)) or [Cut(max(ready.places), moment) for moment in (Moment.BEFORE, Moment.AFTER)]


_END = 'UPDATE "backfill_run" SET "status"'


@pytest.mark.process
def test_workers_ask_what_became_of_their_commits(database: Database) -> None:
    with bench(database, BACKFILL) as ready:
        assert ready.trial_of_processes(Cut(Commit(3), Moment.AFTER), "--workers", "2") is None


@pytest.mark.process
@pytest.mark.soak
@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("number", range(1, 10))
def test_workers_end_as_if_no_commit_had_been_lost(database: Database, number: int, moment: Moment) -> None:
    with bench(database, BACKFILL) as ready:
        wrong = ready.trial_of_processes(Cut(Commit(number), moment), "--workers", "2")
        assert wrong is None or (number, moment) == (1, Moment.BEFORE), wrong


def test_signals_at_a_commit_lose_no_row_of_a_list(database: Database, tmp_path: Path) -> None:
    add_many_leads(9)
    number = run()["run"]
    path = tmp_path / "list.csv"
    commit = BaseDatabaseWrapper.commit
    commits = 0

    def commit_and_be_interrupted(wrapper: BaseDatabaseWrapper) -> None:
        nonlocal commits
        commit(wrapper)
        # What is read ahead meanwhile commits nothing.
        if threading.current_thread() is not threading.main_thread():
            return
        commits += 1
        # That of a batch: the claim's came before.
        if commits == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseDatabaseWrapper, "commit", commit_and_be_interrupted)
        command = ["rollback_crm_backfill", str(number), "--batch-size", "3", "--csv", str(path)]
        finished = called(*command, "--json", "--no-progress")
    assert (finished.code, finished.answer["status"], finished.answer["failure"]) == (4, "interrupted", None)
    gone = finished.answer["reversed"]
    assert 0 < gone < 9
    assert len(contacts()) == 9 - gone
    assert len(path.read_text().splitlines()) == 1 + gone


def test_what_nobody_can_know_is_not_said_to_be_known(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "WAITS", (0.001, 0.001))
    with bench(database, PAUSE) as ready:
        commit = next(place for place, text in ready.places.items() if text == "COMMIT")
        with wired(Cut(commit, Moment.AFTER, for_good=True)):
            finished, _ = carried_out(ready.command)
        assert is_refusal(finished)
        assert "it is not known whether the last transaction was committed" in finished.stderr
        assert "Nothing was" not in finished.stderr


@pytest.mark.parametrize("scenario", [BACKFILL, PAUSE], ids=str)
def test_a_signal_ends_the_wait_for_what_became_of_a_commit(
    database: Database, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "WAITS", (600.0, 600.0))
    sleep = time.sleep

    def be_interrupted_once(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(time, "sleep", sleep)
            signal.raise_signal(signal.SIGINT)
        else:
            sleep(seconds)

    with bench(database, scenario) as ready, impatience():
        # The first batch's, after those of the claim, the count and the heartbeat; a command without batches has one.
        commit = [place for place, text in sorted(ready.places.items()) if text == "COMMIT"][:4][-1]
        with wired(Cut(commit, Moment.AFTER, for_good=True)):
            monkeypatch.setattr(time, "sleep", be_interrupted_once)
            finished, _ = carried_out(ready.command)
        assert finished.code in (2, 5)
        assert "it is not known whether the last transaction was committed" in finished.stderr + finished.stdout
        assert "rolled back" not in finished.stderr + finished.stdout


@pytest.mark.soak
@every_scenario
def test_a_line_that_is_cut_before_or_after_any_statement_changes_nothing(
    database: Database, scenario: Scenario
) -> None:
    with bench(database, scenario) as ready:
        cuts = [
            Cut(place, moment)
            for place in sorted(ready.places)
            for moment in Moment
            if moment is not Moment.LATE or ready.places[place] == "COMMIT"
        ]
        assert what_goes_wrong(ready, cuts) == []

"""The line to the server is cut before and after every statement, and each command ends as if it had not been.

Nothing is done twice, nothing is counted twice or not at all, and no list lacks a row: the hard case is the answer to
a commit.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.conftest import Database
from tests.trials import SCENARIOS, Bench, Scenario, bench, impatience
from tests.wire import Cut, Moment

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


def what_goes_wrong(ready: Bench, cuts: Iterable[Cut]) -> list[str]:
    """Every cut after which a command does not come to what it comes to undisturbed."""
    with impatience():
        trials = [(cut, ready.trial(cut)) for cut in cuts]
    return [
        f"{cut.moment} {tuple(cut.place)} {ready.places[cut.place][:60]}: {wrong}" for cut, wrong in trials if wrong
    ]


@every_scenario
def test_a_line_that_is_cut_around_a_commit_or_the_end_changes_nothing(database: Database, scenario: Scenario) -> None:
    with bench(database, scenario) as ready:
        assert what_goes_wrong(ready, _sample(ready)) == []


def _sample(ready: Bench) -> list[Cut]:
    """After the first commits and the last one, whose answers are lost; before one; and before and after the end."""
    commits = [place for place, text in sorted(ready.places.items()) if text == "COMMIT"]
    ends = [place for place, text in sorted(ready.places.items()) if text.startswith(_END)]
    cuts = [Cut(place, Moment.AFTER) for place in (*commits[:2], *commits[-1:], *ends[-1:])]
    cuts += [Cut(place, Moment.BEFORE) for place in (*commits[1:2], *ends[-1:])]
    return list(dict.fromkeys(cuts)) or [Cut(max(ready.places), moment) for moment in Moment]


_END = 'UPDATE "backfill_run" SET "status"'


@pytest.mark.soak
@every_scenario
def test_a_line_that_is_cut_before_or_after_any_statement_changes_nothing(
    database: Database, scenario: Scenario
) -> None:
    with bench(database, scenario) as ready:
        cuts = [Cut(place, moment) for place in sorted(ready.places) for moment in Moment]
        assert what_goes_wrong(ready, cuts) == []

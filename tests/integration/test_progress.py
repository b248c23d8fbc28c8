"""What stderr says while a run is going, of either kind, with a terminal and without one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from io import StringIO

import pytest
from django.db import connection
from rich.console import Console

from crm.rollback.runner import roll_back
from crm.runs import progress
from crm.runs.progress import LineProgress, Silence, TerminalProgress, progress_on_stderr
from tests.conftest import Database
from tests.support.builders import add_lead, add_many_leads
from tests.support.commands import backfill, called, run


@pytest.fixture
def a_line_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)


def change(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def on_a_terminal(show: Callable[[TerminalProgress], object]) -> list[str]:
    """What stands on a terminal at the end."""
    console = Console(file=StringIO(), force_terminal=True, width=110, color_system=None)
    show(TerminalProgress(console))
    assert isinstance(console.file, StringIO)
    shown = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", console.file.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", shown) if line.strip()]


def test_the_progress_of_a_rollback_says_which_run_is_rolled_back_and_what_became_of_its_entries(
    database: Database, a_line_each_batch: None
) -> None:
    add_many_leads(5)
    made = run()["run"]
    change("""UPDATE crm_contacts SET "firstName" = 'Bo', "updatedAt" = now() WHERE email = 'person-1@example.com'""")
    dry = called("rollback_crm_backfill", str(made), "--dry-run", "--batch-size", "5")
    assert dry.stderr.splitlines() == [
        f"Rolling back run {made} (dry run): 5 entries to process",
        f"Rolling back run {made} (dry run): 5 of 5 entries, 4 reversed, 1 kept",
    ]
    shown = on_a_terminal(lambda bars: roll_back(made, batch_size=5, progress=bars))
    assert shown[0] == "5 entries to process"
    assert f"Rolling back run {made}" in shown[-1]
    assert "5 / 5 4 reversed, 1 kept" in shown[-1]


def test_what_an_update_changed_counts_among_the_entries_of_its_rollback(
    database: Database, a_line_each_batch: None
) -> None:
    for number in range(3):
        add_lead(f"ann-{number}@example.com")
    run()
    change("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now()""")
    updated = run(update=True)["run"]
    assert called("rollback_crm_backfill", str(updated)).stderr.splitlines() == [
        f"Rolling back run {updated}: 3 entries to process",
        f"Rolling back run {updated}: 3 of 3 entries, 3 reversed, 0 kept",
    ]


def test_the_progress_of_a_backfill_says_which_source_it_is_at(database: Database, a_line_each_batch: None) -> None:
    add_many_leads(4)
    add_many_leads(2, "CONVERTED", first=9)
    lines = backfill().stderr.splitlines()
    assert [line.rpartition(", ")[0] or line for line in lines] == [
        "6 source rows to process",
        "Converted leads: 2 of 6 source rows",
        "Active leads: 6 of 6 source rows",
    ]
    assert all(line.endswith(" rows/s") for line in lines[1:])


def test_a_part_that_was_not_announced_gets_a_bar_of_its_own() -> None:
    def revisit(bars: TerminalProgress) -> None:
        bars.begin("source rows", {"Clients": 3})
        bars.advance("Clients", 4)
        bars.advance("Clients: again", 2)
        bars.end()

    *_, clients, again = on_a_terminal(revisit)
    assert "4 / 4" in clients
    assert again.startswith("Clients: again")
    assert "2 / 2" in again


def test_the_rate_of_a_log_counts_from_the_start_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=StringIO(), width=110)
    lines = LineProgress(console)
    now += 3_600
    lines.begin("source rows", {"Clients": 30, "Preparers": 10})
    now += 5
    lines.advance("Clients", 10)
    now += 5
    lines.advance("Clients", 20)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().splitlines() == [
        "40 source rows to process",
        "Clients: 30 of 40 source rows, 3 rows/s",
    ]


def test_without_a_terminal_progress_is_lines_and_nothing_where_none_is_wanted() -> None:
    assert isinstance(progress_on_stderr(wanted=True), LineProgress)
    assert isinstance(progress_on_stderr(wanted=False), Silence)

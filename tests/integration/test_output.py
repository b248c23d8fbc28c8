"""A standard output that is full or closed has an exit code of its own, and what was news is not lost with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from io import StringIO
from typing import TextIO, cast

import pytest
from django.core.management import get_commands, load_command_class
from rich.console import Console

from crm.models import BackfillRun
from crm.output.streams import OutputError, with_checked_output
from tests.conftest import Database
from tests.support import builders
from tests.support.commands import Finished, backfill, called, run

COMMANDS = sorted(name for name, application in get_commands().items() if application == "crm")
FULL = "No space left on device"


def command(arguments: list[str]) -> int:
    """A command as manage.py runs it, without setting up Django again."""
    name = arguments[1]
    load_command_class(get_commands()[name], name).run_from_argv(arguments)
    return 0


def with_full_output(*arguments: str, stderr: TextIO | None = None) -> tuple[int, str]:
    """`manage.py` with these arguments in this process, to a full disk; exit code and what stderr got."""
    told = stderr or StringIO()
    with pytest.MonkeyPatch.context() as patch, open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123 - a device
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", told)
        code = with_checked_output(command, ["manage.py", *arguments])
        with suppress(OSError):
            full.flush()
    return code, told.getvalue() if isinstance(told, StringIO) else ""


@pytest.mark.parametrize("name", [*COMMANDS, "migrate"])
def test_every_command_ends_with_it(name: str) -> None:
    code, told = with_full_output(name, "--help")
    assert (code, told.count("\n"), FULL in told) == (6, 1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["backfill_crm_contacts", "--no-progress"],
        ["backfill_crm_contacts", "--json", "--no-progress"],
        ["backfill_crm_contacts", "--dry-run", "--json", "--no-progress"],
        ["backfill_runs", "list"],
        ["export_backfill_errors"],
        ["verify_crm_contacts"],
        ["rollback_crm_backfill", "RUN", "--no-progress"],
        ["repair_crm_contacts", "--types", "--apply", "--no-progress"],
    ],
    ids=" ".join,
)
def test_what_a_command_did_stays_done(database: Database, arguments: Sequence[str]) -> None:
    builders.add_lead("nobody")
    builders.add_lead("ann@example.com")
    number = str(run()["run"])
    builders.add_lead("bob@example.com")
    code, told = with_full_output(*[number if argument == "RUN" else argument for argument in arguments])
    assert (code, FULL in told) == (6, True)
    assert "Traceback" not in told
    made = {"backfill_crm_contacts": 2, "rollback_crm_backfill": 0}.get(arguments[0], 1)
    assert len(builders.contacts()) == (made if "--dry-run" not in arguments else 1)
    assert not BackfillRun.objects.exclude(status="finished").exists()


def test_errors_whose_report_was_lost_are_news_to_the_next_run(database: Database) -> None:
    builders.add_lead("nobody")
    code, told = with_full_output("backfill_crm_contacts", "--json", "--no-progress")
    lost = BackfillRun.objects.latest("pk")
    assert (code, f"Run {lost.pk}: finished; rows newly in error: 1 (invalid_email 1)." in told) == (6, True)

    assert with_full_output("backfill_crm_contacts", "--json", "--no-progress", "--dry-run")[0] == 6
    assert with_full_output("backfill_crm_contacts", "--no-progress")[0] == 6
    ended: Finished = backfill("--json", "--no-progress")
    assert (ended.code, ended.answer["error_new"]) == (1, 0)
    assert ended.answer["lost_reports"][0] == {"run_id": lost.pk, "error_new": 1}
    assert ended.stderr.startswith(f"Run {lost.pk} did not write its report. Rows newly in error in it: 1;")

    ended = backfill("--json", "--no-progress")
    assert (ended.code, ended.answer["lost_reports"], ended.stderr) == (0, [], "")


def test_a_lost_report_without_anything_newly_in_error_is_no_news(database: Database) -> None:
    builders.add_lead("ann@example.com")
    assert with_full_output("backfill_crm_contacts", "--json", "--no-progress")[0] == 6
    ended: Finished = backfill("--json", "--no-progress")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.answer["lost_reports"] == [{"run_id": BackfillRun.objects.earliest("pk").pk, "error_new": 0}]


def test_a_lost_report_of_a_run_that_was_rolled_back_is_no_news(database: Database) -> None:
    builders.add_lead("nobody")
    assert with_full_output("backfill_crm_contacts", "--no-progress")[0] == 6
    lost = BackfillRun.objects.latest("pk")
    assert called("rollback_crm_backfill", str(lost.pk), "--no-progress").code == 0
    database.rows("UPDATE leads SET email = 'ann@example.com' RETURNING id")
    ended: Finished = backfill("--json", "--no-progress")
    assert (ended.code, ended.answer["lost_reports"], ended.stderr) == (0, [], "")


def test_an_error_output_that_is_full_changes_nothing(database: Database) -> None:
    builders.add_lead("ann@example.com")
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123 - a device
        assert with_full_output("backfill_crm_contacts", stderr=full)[0] == 6
    assert BackfillRun.objects.get().status == "finished"
    assert len(builders.contacts()) == 1


@pytest.mark.parametrize("way_out", [0, 3, None])
def test_an_exit_code_is_what_it_is_where_all_could_be_written(
    monkeypatch: pytest.MonkeyPatch, way_out: int | None
) -> None:
    monkeypatch.setattr(sys, "stdout", out := StringIO())
    monkeypatch.setattr(sys, "stderr", StringIO())

    def main(_arguments: list[str]) -> int:
        sys.stdout.write("all of it")
        raise SystemExit(way_out)

    assert (with_checked_output(main, []), out.getvalue()) == (way_out or 0, "all of it")


def test_a_stream_that_was_closed_before_is_told_by_whoever_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", cast(TextIO, None))
    monkeypatch.setattr(sys, "stderr", cast(TextIO, None))

    def silent(_arguments: list[str]) -> int:
        sys.stderr.write("nobody hears this")
        return 0

    def loud(_arguments: list[str]) -> int:
        with pytest.raises(OutputError, match="it is closed"):
            Console(file=sys.stdout).print("something")
        raise OutputError("again")

    assert with_checked_output(silent, []) == 0
    sys.stdout = cast(TextIO, None)
    assert with_checked_output(loud, []) == 6

"""What is written is true: options, exit codes, commands, versions and links."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings
from django.core.management import get_commands, load_command_class
from django.core.management.base import BaseCommand

from crm.management.operator_command import OperatorCommand
from crm.models.ledger import RunStatus
from crm.outcome import Reason, Repair
from crm.repair.report import MEANING_OF_CAUSES
from crm.repair.rules import KeepCause
from crm.rollback.report import MEANING_OF_REASONS
from crm.rules.reverting import KeepReason
from crm.version import VERSION
from tests.support.documents import DOCUMENTS, README, ROOT, RUNBOOK, first_cells, section

COMMANDS = sorted(name for name, application in get_commands().items() if application == "crm")
EXIT_CODES = {"0", "1", "2", "3", "4", "5", "6"}
DJANGOS_OWN = {
    name
    for action in BaseCommand().create_parser("manage.py", "any")._actions
    for name in (action.option_strings or [action.dest])
}


def parser_of(command: str) -> argparse.ArgumentParser:
    return load_command_class("crm", command).create_parser("manage.py", command)


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option, those of the parser's own commands too, but for what Django gives every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions_of(inner)
        elif action.option_strings and not DJANGOS_OWN & set(action.option_strings):
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_each_of_its_options_have_help(command: str) -> None:
    parser = parser_of(command)
    assert parser.description
    assert [action.option_strings for action in actions_of(parser) if not action.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_printed(command: str) -> None:
    assert "%%" not in parser_of(command).format_help()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_names_every_command(command: str) -> None:
    assert f"`{command}" in README or f"manage.py {command}" in README


def test_the_readmes_options_are_those_of_the_command() -> None:
    documented = [cell.split()[0] for cell in first_cells(section("Options"))]
    actions = list(actions_of(parser_of("backfill_crm_contacts")))
    assert documented == [action.option_strings[0] for action in actions]


def test_the_readmes_options_take_a_value_where_the_command_does() -> None:
    documented = {cell.split()[0]: len(cell.split()) > 1 for cell in first_cells(section("Options"))}
    actions = actions_of(parser_of("backfill_crm_contacts"))
    assert documented == {action.option_strings[0]: action.nargs != 0 for action in actions}


def test_the_runbook_names_each_exit_code() -> None:
    assert set(first_cells(section("Nightly run", RUNBOOK))) == EXIT_CODES


def test_the_readme_and_each_help_name_the_exit_code_of_a_lost_output() -> None:
    assert first_cells(section("Exit codes")) == sorted(EXIT_CODES)
    operators = [name for name in COMMANDS if isinstance(load_command_class("crm", name), OperatorCommand)]
    assert set(COMMANDS) - set(operators) <= {"flush", "load_sample_data", "migrate", "runserver"}
    assert [name for name in operators if "Exit code 6" not in parser_of(name).format_help()] == []


def test_the_runbook_has_a_remedy_for_each_reason_of_an_error() -> None:
    assert first_cells(section("Rows in error", RUNBOOK)) == [reason.value for reason in Reason]


def test_the_readme_has_the_runbooks_line_for_cron_and_makes_the_folder_of_its_log() -> None:
    (line,) = re.findall(r"^15 2 \* \* \* .*$", RUNBOOK, re.MULTILINE)
    before, found, _ = README.partition(f"\n{line}\n")
    assert found
    (log,) = re.findall(r">> (\S+)", line)
    assert re.search(rf"^install -d .* {Path(log).parent}$", before, re.MULTILINE)


def test_the_help_the_readme_and_the_runbook_say_that_max_errors_counts_new_errors_alone() -> None:
    said = "errors from earlier runs do not count"
    options = actions_of(parser_of("backfill_crm_contacts"))
    (help_text,) = [action.help for action in options if "--max-errors" in action.option_strings]
    for text in (help_text or "", section("Options"), section("Nightly run", RUNBOOK)):
        assert said in " ".join(text.lower().split())


def test_the_runbook_explains_each_reason_for_which_a_rollback_keeps_a_row() -> None:
    assert first_cells(section(MEANING_OF_REASONS, RUNBOOK)) == [why.value for why in KeepReason]


def test_the_runbook_explains_each_option_of_a_repair_and_each_reason_for_which_a_contact_keeps_its_value() -> None:
    of_options, _, _ = section("Repairs", RUNBOOK).partition("####")
    assert first_cells(of_options) == [repair.option for repair in Repair]
    assert first_cells(section(MEANING_OF_CAUSES, RUNBOOK)) == [cause.value for cause in KeepCause]


def test_no_command_of_the_runbook_has_a_password() -> None:
    assert re.findall(r"postgresql://\w+:[^@\s]*@", RUNBOOK) == []


def test_the_runbook_knows_each_status_of_a_run() -> None:
    told = " ".join(first_cells(section("Troubleshooting", RUNBOOK)))
    assert set(re.findall(r"\w+", told)) >= {status.value for status in RunStatus}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_commands_that_a_document_gives_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert set(re.findall(r"manage\.py ([a-z_]+)", text)) <= set(get_commands())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^(?:\$ )?make ([a-z-]+)|`make ([a-z-]+)", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def anchors_of(document: Path) -> set[str]:
    """The anchors of a document's headings, as they are made of them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION
    assert f"\n## [{VERSION}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_setting_of_the_environment_is_explained() -> None:
    read = (ROOT / "config" / "settings.py").read_text(encoding="utf-8")
    names = set(re.findall(r'(?:_seconds|_domain|env\.\w+)\("([A-Z_]+)"', read))
    assert {"CRM_STATEMENT_TIMEOUT", "CRM_PLACEHOLDER_DOMAIN", "SECRET_KEY", "ALLOWED_HOSTS"} <= names
    assert sorted(name for name in names if name.startswith("CRM_")) == sorted(settings.CRM_VARIABLES)
    explained = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"#{name}=" not in explained] == []


def test_the_runbook_tells_that_a_view_which_cannot_be_evaluated_logs_the_value() -> None:
    rows = [line for line in section("PostgreSQL's log", RUNBOOK).splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if "view" in row]
    assert "correct the view" in row
    assert "log_min_error_statement" not in row, "that leaves out the statement, and the value is in the message"

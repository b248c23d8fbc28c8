"""A database that refuses or is not there: every command says so in one line, and never with a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from django.db import DatabaseError, InternalError, OperationalError, connection

import manage
from crm.errors import OperatorError
from crm.models import BackfillRun, ConflictResolution
from crm.models.ledger import RunStatus
from crm.postgres import errors
from tests.conftest import Database
from tests.support.builders import add_contact, add_many_leads, add_profile, add_user
from tests.support.circumstances import acting_as, reading_role, terminated_at
from tests.support.commands import Finished, ended, run
from tests.support.forks import labels
from tests.support.processes import SECRET, python
from tests.support.profiles import every

#: With the exit code for a database that breaks off, as the runbook has it, and a table that the command cannot do
#: without. The first run is the one that `somebody_in_conflict` made.
COMMANDS = {
    "backfill_crm_contacts --no-progress": (5, "backfill_run"),
    "backfill_crm_contacts --no-progress --workers auto": (5, "backfill_run"),
    "backfill_runs list": (2, "backfill_run"),
    "backfill_runs show RUN": (2, "backfill_batch"),
    "backfill_runs watch RUN": (2, "backfill_batch"),
    "backfill_runs cancel RUN": (2, "backfill_run"),
    "trace_contact CONTACT": (2, "contact_update"),
    "verify_crm_contacts": (2, "ledger_entry"),
    "export_backfill_errors --with-email": (2, "ledger_entry"),
    "resolve_crm_conflict ROW --separate nobody@example.com": (2, "conflict_decision"),
    "resolve_crm_conflict ROW --contact CONTACT": (2, "ledger_entry"),
    "rollback_crm_backfill RUN --dry-run": (5, "ledger_entry"),
    "rollback_crm_backfill RUN": (5, "rollback"),
    "repair_crm_contacts --types --apply --no-progress": (5, "backfill_run"),
}
every_command = pytest.mark.parametrize("command", COMMANDS)
#: What a run or a rollback does when the connection is lost in the middle is another story.
SHORT_COMMANDS = [command for command, (code, _) in COMMANDS.items() if code == OperatorError.exit_code]


@pytest.fixture(autouse=True)
def one_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Django is set up already; a second time, it would take the log lines away from the tests."""
    monkeypatch.setattr("django.setup", lambda: None)


def managed(*arguments: str) -> Finished:
    """`manage.py` with these arguments, from its first line to its last, in this process."""
    return ended(lambda: manage.main(["manage.py", *arguments]))


class Written:
    """A command with the names of what is there."""

    def __init__(self) -> None:
        add_many_leads(3)
        account = add_user("elsewhere@example.com")
        self.contact = add_contact("ann@example.com", userId=account)
        self.row = f"profiles:{add_profile(email='ann@example.com')}"
        self.run = str(run()["run"])

    def out(self, command: str) -> list[str]:
        named = {"RUN": self.run, "ROW": self.row, "CONTACT": self.contact}
        return [named.get(word, word) for word in command.split()]


def assert_one_line(finished: Finished, code: int) -> None:
    assert finished.code == code, finished.stderr
    assert finished.stderr.count("\n") == 1
    assert "Traceback" not in finished.stderr
    assert "example.com" not in finished.stderr


@contextmanager
def without_table(table: str) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO aside")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE aside RENAME TO {table}")


@pytest.mark.sampled
@pytest.mark.parametrize("command", SHORT_COMMANDS)
def test_a_connection_that_is_lost_at_any_statement(database: Database, command: str) -> None:
    def somebody_at_work() -> list[str]:
        database.empty()
        arguments = Written().out(command)
        if "cancel" in arguments:
            BackfillRun.objects.update(status=RunStatus.PAUSED)
        return arguments

    arguments = somebody_at_work()
    with labels() as sent:
        finished = managed(*arguments)
    assert finished.code == 0, finished.stderr
    for statement in range(1, 1 + len(sent), every(9)):
        arguments = somebody_at_work()
        with terminated_at(statement):
            finished = managed(*arguments)
        assert_one_line(finished, 2)
        assert "Database error" in finished.stderr


@every_command
def test_a_role_that_has_no_rights(database: Database, command: str) -> None:
    arguments = Written().out(command)
    with reading_role(database, tables=()) as role, acting_as(role):
        finished = managed(*arguments)
    assert_one_line(finished, 2)
    assert "Try again" not in finished.stderr
    assert "GRANT" in finished.stderr or "least_privilege.sql" in finished.stderr or "migrate" in finished.stderr


@every_command
def test_a_role_that_may_only_see_the_tables_of_the_application(database: Database, command: str) -> None:
    arguments = Written().out(command)
    with reading_role(database) as role:
        with connection.cursor() as cursor:
            cursor.execute(f"GRANT USAGE ON SCHEMA crm_backfill TO {role}")
        with acting_as(role):
            finished = managed(*arguments)
    assert_one_line(finished, 2)
    assert "Try again" not in finished.stderr


@every_command
def test_a_table_of_ours_that_is_missing(database: Database, command: str) -> None:
    arguments = Written().out(command)
    with without_table(COMMANDS[command][1]):
        finished = managed(*arguments)
    assert_one_line(finished, 2)
    assert "manage.py migrate" in finished.stderr
    assert not ConflictResolution.objects.exists()


@every_command
def test_a_role_that_the_server_does_not_know(database: Database, command: str) -> None:
    arguments = Written().out(command)
    with acting_as("nobody"):
        finished = managed(*arguments)
    assert_one_line(finished, 2)
    assert finished.stderr.startswith("The database cannot be reached: ")
    assert '"nobody"' in finished.stderr
    assert "DATABASE_URL" in finished.stderr


@pytest.mark.sampled(3)
@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [
        ("backfill_runs", "list"),
        ("verify_crm_contacts",),
        ("export_backfill_errors",),
        ("resolve_crm_conflict", "leads:1", "--contact", "c"),
        ("rollback_crm_backfill", "1"),
        ("load_sample_data",),
    ],
    ids=lambda command: command[0],
)
def test_a_server_that_is_away(command: tuple[str, ...]) -> None:
    url = "postgresql://crm:hunter2@127.0.0.1:1/tax"
    result = python("manage.py", *command, DATABASE_URL=url, SECRET_KEY=SECRET)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("The database cannot be reached: ")
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr


def test_a_connection_that_was_never_made_is_none_that_was_lost() -> None:
    def error(cause: psycopg.Error) -> DatabaseError:
        raised = OperationalError()
        raised.__cause__ = cause
        return raised

    assert errors.never_connected(error(psycopg.errors.ConnectionTimeout()))
    assert not errors.never_connected(error(psycopg.OperationalError("server closed the connection unexpectedly")))
    assert not errors.never_connected(error(psycopg.errors.AdminShutdown()))


def test_an_answer_that_makes_no_sense_is_a_connection_that_was_lost() -> None:
    error = InternalError()
    error.__cause__ = psycopg.InternalError("received 0 results from command 'COMMIT'")
    assert errors.transient_cause(error) == errors.LOST_CONNECTION
    error.__cause__ = psycopg.errors.InFailedSqlTransaction()
    assert errors.transient_cause(error) is None


def test_what_the_operator_can_put_right_is_never_a_failure_of_the_run() -> None:
    with pytest.raises(OperatorError) as told, errors.refusing_to_start():
        raise OperationalError from psycopg.errors.InsufficientPrivilege()
    assert told.value.exit_code == 2

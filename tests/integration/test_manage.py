"""How `manage.py` ends: what the operator can put right is one line and exit code 2."""

from collections.abc import Callable
from functools import partial

import django
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import SystemCheckError
from django.core.management.commands.check import Command as Check
from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper
from pytest_django import Settings

import manage
from crm import checks
from crm.errors import OperatorError
from crm.version import VERSION
from tests.conftest import Database
from tests.support.builders import add_lead
from tests.support.commands import ended, run
from tests.support.processes import SECRET, database_url, python
from tests.support.sessions import managed, role_with


def raiser(error: Exception) -> Callable[..., None]:
    def execute(*_args: object, **_options: object) -> None:
        raise error

    return execute


@pytest.mark.parametrize("error", [ImproperlyConfigured("Not\n  so."), OperatorError("Not\n  so.")])
def test_an_operators_mistake(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(manage.Utility, "execute", raiser(error))
    assert manage.main(["manage.py", "migrate"]) == 2
    assert capsys.readouterr() == ("", "Not so.\n")


def test_what_is_no_mistake_of_the_operator_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class LockTimeoutError(Exception):
        sqlstate = "55P03"

    error = OperationalError("canceling statement due to lock timeout")
    error.__cause__ = LockTimeoutError()
    monkeypatch.setattr(manage.Utility, "execute", raiser(error))
    with pytest.raises(OperationalError):
        manage.main(["manage.py", "migrate"])


def test_a_database_that_does_not_answer() -> None:
    result = python("manage.py", "migrate", DATABASE_URL="postgresql://crm:hunter2@127.0.0.1:1/tax", SECRET_KEY=SECRET)
    assert result.returncode == 2
    assert result.stderr.startswith("The database cannot be reached: ")
    assert "Connection refused. Check DATABASE_URL" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr


def test_a_command_of_ours_says_our_version_and_djangos() -> None:
    told = ended(partial(manage.main, ["manage.py", "backfill_crm_contacts", "--version"]))
    assert told == (0, f"crm-contacts-backfill {VERSION}, Django {django.get_version()}\n", "")


def test_help_needs_no_database() -> None:
    result = python("manage.py", "--help")
    assert result.returncode == 0
    assert "migrate" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["backfill_run"],
            "Unknown command: 'backfill_run'. Did you mean backfill_runs? Type 'manage.py help' for usage.",
        ),
        (["nonsense"], "Unknown command: 'nonsense'. Type 'manage.py help' for usage."),
        (["help", "nonsense"], "Unknown command: 'nonsense'. Type 'manage.py help' for usage."),
        (["check", "--tag", "nonsense"], 'CommandError: There is no system check with the "nonsense" tag.'),
        (["migrate", "nonsense"], "CommandError: No installed app with label 'nonsense'."),
    ],
)
def test_wrong_usage_of_whatever_command_is_one_line_and_exit_code_2(
    database: Database, arguments: list[str], told: str
) -> None:
    assert ended(partial(manage.main, ["manage.py", *arguments])) == (2, "", f"{told}\n")


def test_runserver_without_debug_and_hosts_says_which_variables_to_set(database: Database, settings: Settings) -> None:
    settings.DEBUG, settings.ALLOWED_HOSTS = False, []
    refused = ended(partial(manage.main, ["manage.py", "runserver", "--noreload"]))
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith("The admin has no host to serve: ")
    for named in ("DEBUG=on", "ALLOWED_HOSTS"):
        assert named in refused.stderr


def test_flush_is_refused_since_the_contacts_would_stay(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()
    database.rows("DELETE FROM crm_contacts RETURNING id")
    before = database.dump()
    with role_with() as role:
        refused = managed("flush", "--no-input", url=database_url(role=role))
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "rollback_crm_backfill" in refused.stderr
    assert database.dump() == before
    assert made["created"] == 1
    assert run()["created"] == 0, "a contact that was deleted comes back without its line"


def test_what_a_check_found_is_no_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Check, "check", raiser(SystemCheckError("Something is to be looked at.")))
    assert ended(partial(manage.main, ["manage.py", "check"])).code == 1


def test_ctrl_c_in_one_of_djangos_own_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_interrupted(_utility: manage.Utility) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manage.Utility, "execute", be_interrupted)
    assert manage.main(["manage.py", "migrate"]) == 4
    assert capsys.readouterr() == ("", "Interrupted.\n")


@pytest.mark.parametrize("asked", ["find_misfits", "_lacking", "_excessive"])
def test_a_server_that_breaks_off_a_check(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    def break_off(connection: BaseDatabaseWrapper, *_rights: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 'a value'::integer")

    monkeypatch.setattr(checks, asked, break_off)
    assert manage.main(["manage.py", "check", "--database", "default"]) == 2
    assert capsys.readouterr().err == "Database error during the check: DataError (22P02). Run the command again.\n"

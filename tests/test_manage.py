"""How `manage.py` ends: what the operator can put right is one line and exit code 2."""

from collections.abc import Callable

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

import manage
from crm import checks
from crm.errors import OperatorError
from tests.conftest import Database
from tests.test_settings import SECRET, run


def raiser(error: Exception) -> Callable[[list[str]], None]:
    def execute(_arguments: list[str]) -> None:
        raise error

    return execute


@pytest.mark.parametrize("error", [ImproperlyConfigured("Not\n  so."), OperatorError("Not\n  so.")])
def test_an_operators_mistake(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(manage, "execute_from_command_line", raiser(error))
    assert manage.main(["manage.py", "migrate"]) == 2
    assert capsys.readouterr() == ("", "Not so.\n")


def test_what_is_no_mistake_of_the_operator_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class LockTimeoutError(Exception):
        sqlstate = "55P03"

    error = OperationalError("canceling statement due to lock timeout")
    error.__cause__ = LockTimeoutError()
    monkeypatch.setattr(manage, "execute_from_command_line", raiser(error))
    with pytest.raises(OperationalError):
        manage.main(["manage.py", "migrate"])


def test_a_database_that_does_not_answer() -> None:
    result = run("manage.py", "migrate", DATABASE_URL="postgresql://crm:hunter2@127.0.0.1:1/tax", SECRET_KEY=SECRET)
    assert result.returncode == 2
    assert result.stderr.startswith("The database cannot be reached: ")
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr


def test_help_needs_no_database() -> None:
    result = run("manage.py", "--help")
    assert result.returncode == 0
    assert "migrate" in result.stdout


def test_ctrl_c_in_one_of_djangos_own_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_interrupted(_arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manage, "execute_from_command_line", be_interrupted)
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
    assert capsys.readouterr().err == "The database broke the check off: DataError (22P02). Try again.\n"

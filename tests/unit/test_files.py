"""Files that commands write: for their owner alone, complete or not there, and never through a link."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.core.checks import CheckMessage
from pytest_django import Settings

from config.environment import Env
from config.settings import CRM_VARIABLES, _read_dotenv
from crm.file_checks import check_dotenv, check_variables
from crm.output.files import complete_file, new_file
from tests.support.modules import calls_of, imports_of, modules


@pytest.fixture(params=[0o000, 0o022, 0o277], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_for_its_owner_alone_whatever_the_umask(umask: None, tmp_path: Path) -> None:
    with new_file(tmp_path / "new.csv") as file, complete_file(tmp_path / "whole.csv"):
        assert {mode(path) for path in tmp_path.iterdir()} == {0o600}
        file.write("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv", "whole.csv"]
    assert {mode(path) for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_a_new_file_is_made_in_the_place_of_nothing(tmp_path: Path, kind: str) -> None:
    path, theirs = tmp_path / "list.csv", tmp_path / "theirs"
    if kind != "dangling":
        theirs.write_text("theirs")
    if kind == "file":
        path.write_text("theirs")
    else:
        path.symlink_to(theirs)
    with pytest.raises(FileExistsError):
        new_file(path)
    assert kind == "dangling" or path.read_text() == "theirs"
    assert theirs.exists() == (kind != "dangling")


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "pipe", "folder"])
def test_a_complete_file_takes_the_place_of_nothing(tmp_path: Path, kind: str) -> None:
    path, theirs = tmp_path / "list.csv", tmp_path / "theirs"
    if kind in ("link", "dangling"):
        path.symlink_to(theirs)
    if kind == "link":
        theirs.write_text("theirs")
    if kind == "file":
        path.write_text("theirs")
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    before = sorted(found.name for found in tmp_path.iterdir())
    with pytest.raises(FileExistsError), complete_file(path):
        pytest.fail("nothing is to be written")
    assert sorted(found.name for found in tmp_path.iterdir()) == before


def test_a_complete_file_gets_its_name_at_the_end_and_only_where_it_is_free_then(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    with complete_file(path) as file:
        file.write("new")
        assert not path.exists()
    assert (path.read_text(), mode(path), len(list(tmp_path.iterdir()))) == ("new", 0o600, 1)
    late = tmp_path / "late.csv"
    with pytest.raises(FileExistsError), complete_file(late):
        late.write_text("theirs")
    assert (late.read_text(), len(list(tmp_path.iterdir()))) == ("theirs", 2)


def test_a_file_that_is_not_completed_leaves_nothing(tmp_path: Path) -> None:
    def write_to_a_full_disk() -> None:
        with complete_file(tmp_path / "list.csv") as file, open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
            file.write("new")
            os.dup2(full.fileno(), file.fileno())

    with pytest.raises(OSError, match="No space"):
        write_to_a_full_disk()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_can_have_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / "missing" / "list.csv"):
        with pytest.raises(OSError, match=str(tmp_path.name)), complete_file(path):
            pytest.fail("nothing is to be written")
    assert list(tmp_path.iterdir()) == []


def calls_in_crm(*names: str) -> set[str]:
    """The modules of the application that call a function or a method of one of these names."""
    return {
        module
        for module in modules()
        if module.startswith("crm.")
        for node in calls_of(module)
        if getattr(node.func, "attr", getattr(node.func, "id", None)) in names
    }


def test_every_file_and_every_csv_of_the_application_is_written_by_one_module() -> None:
    assert calls_in_crm("open", "write_text", "write_bytes", "touch") <= {"crm.output.files", "crm.output.streams"}
    assert {module for module in modules() if "csv" in imports_of(module)} == {"crm.output.spreadsheet"}


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_what_holds_secrets_or_peoples_data_is_never_committed(tmp_path: Path) -> None:
    private = [".env", ".env.local", ".env.production", ".env~", "docs/.env.bak", "a.jsonl"]
    private += ["a.csv", "a.dump", "a.csv.gz", "a.dump.gz", "a.sql.gz"]
    shutil.copy(Path(__file__).parents[2] / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)  # noqa: S607 - the user's git
    ended = subprocess.run(  # noqa: S603 - our own arguments
        ["git", "check-ignore", "--", ".env.example", "docs/least_privilege.sql", *private],  # noqa: S607 - the user's git
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.splitlines() == private


# The file .env


def warnings_of(settings: Settings, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[CheckMessage]:
    settings.BASE_DIR = folder
    monkeypatch.delenv("CRM_DOTENV", raising=False)
    return check_dotenv()


@pytest.mark.parametrize("readable", [0o640, 0o604, 0o602, 0o644])
def test_a_dotenv_that_others_can_read_is_a_warning_with_what_mends_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, readable: int
) -> None:
    assert warnings_of(settings, monkeypatch, tmp_path) == []
    (tmp_path / ".env").touch()
    (tmp_path / ".env").chmod(readable)
    (warning,) = warnings_of(settings, monkeypatch, tmp_path)
    assert (warning.id, warning.hint) == ("crm.W010", f"chmod 600 {tmp_path / '.env'}")
    (tmp_path / ".env").chmod(0o600)
    assert warnings_of(settings, monkeypatch, tmp_path) == []


US = 12_345


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives a file to somebody else")
def test_a_dotenv_of_another_user_is_a_warning_with_what_mends_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / ".env"
    path.touch(mode=0o600)
    assert warnings_of(settings, monkeypatch, tmp_path) == []
    monkeypatch.setattr(os, "geteuid", lambda: US)
    assert warnings_of(settings, monkeypatch, tmp_path) == [], "whoever owns the folder may change everything in it"
    os.chown(path, US + 1, -1)
    (warning,) = warnings_of(settings, monkeypatch, tmp_path)
    assert (warning.id, warning.hint) == ("crm.W010", f"chown {US} {path}")
    path.chmod(0o640)
    (warning,) = warnings_of(settings, monkeypatch, tmp_path)
    assert warning.hint == f"chown {US} {path} && chmod 600 {path}"


# Variables of the environment


def test_a_variable_that_no_setting_reads_is_a_warning_with_the_nearest_name_and_without_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict.fromkeys(CRM_VARIABLES, "off"))
    assert check_variables() == []
    os.environ |= {"CRM_STATMENT_TIMEOUT": "hunter2", "CRM_ZZZ": "hunter2", "PATH": "/bin"}
    misspelled, unlike = check_variables()
    assert (misspelled.id, unlike.id) == ("crm.W011", "crm.W011")
    assert misspelled.msg == "No setting reads the variable CRM_STATMENT_TIMEOUT, so it has no effect."
    assert misspelled.hint == "Use CRM_STATEMENT_TIMEOUT, or remove it."
    assert unlike.hint == f"Use one of {', '.join(CRM_VARIABLES)}, or remove it."
    assert "hunter2" not in f"{misspelled}{unlike}"


def test_a_misspelled_variable_of_dotenv_is_warned_of_by_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / ".env"
    path.write_text("DATABASE_URL=postgresql://nowhere\nCRM_PLACEHOLDER_DOMAINS=example.com\n")
    environment = {"CRM_DOTENV": "on"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(Env, "ENVIRON", environment)
    _read_dotenv(path)
    (warning,) = check_variables()
    assert warning.hint == "Use CRM_PLACEHOLDER_DOMAIN, or remove it."

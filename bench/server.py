"""The databases of the bench: one template a size, and a fresh copy of it for every measurement."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql

from config import embedded

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
#: Room for a bulk load, and WAL files that are used again, as on a server that has been up for a while.
SETTINGS = {"shared_buffers": "2GB", "max_wal_size": "4GB", "min_wal_size": "4GB"}


@dataclass(frozen=True, slots=True)
class Server:
    """The embedded server that the bench has to itself."""

    address: embedded.Address

    @classmethod
    def start(cls, data: Path) -> Server:
        """Start it on the data folder, with the settings of the bench."""
        server = cls(embedded.start(data))
        if server.settings(*SETTINGS) == SETTINGS:
            return server
        for name, value in SETTINGS.items():
            server.execute("postgres", f"ALTER SYSTEM SET {name} = '{value}'")
        return cls(embedded.restart(data))

    def settings(self, *names: str) -> dict[str, str]:
        """The values of settings, as they are in force."""
        query = "SELECT name, current_setting(name) FROM unnest(%s::text[]) AS name"
        return dict(self.rows("postgres", query, [list(names)]))

    def connect(self, database: str) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection of its own, in autocommit."""
        return psycopg.connect(
            host=self.address.host,
            port=self.address.port,
            user=embedded.USER,
            dbname=database,
            autocommit=True,
            options="-c search_path=crm_backfill,public",
        )

    def url(self, database: str) -> str:
        """The DATABASE_URL of one of its databases."""
        socket = quote(self.address.host, safe="")
        return f"postgresql://{embedded.USER}@localhost:{self.address.port}/{database}?host={socket}"

    def databases(self) -> set[str]:
        """The names of its databases."""
        with self.connect("postgres") as connection:
            return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}

    def execute(self, database: str, *statements: str) -> None:
        """Run statements, each committed on its own."""
        with self.connect(database) as connection:
            for statement in statements:
                connection.execute(statement)

    def rows(self, database: str, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The answer to a query."""
        with self.connect(database) as connection:
            return list(connection.execute(query, parameters))

    @contextmanager
    def copy_of(self, template: str, name: str) -> Iterator[str]:
        """A database that is a copy of another one, flushed to disk, and dropped afterwards."""
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        with self.connect("postgres") as connection:
            connection.execute(drop)
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
                    sql.Identifier(name), sql.Identifier(template)
                )
            )
            connection.execute("CHECKPOINT")
        try:
            yield name
        finally:
            with self.connect("postgres") as connection:
                connection.execute(drop)

    def cpu_seconds(self) -> float:
        """The processor time of all of its processes, living and dead, since it started."""
        with self.connect("postgres") as connection:
            postmaster = _parent(connection.info.backend_pid)
            while True:
                before = _ticks(postmaster)
                children = [_ticks(child) for child in _processes() if _parent(child) == postmaster]
                # A child that ends meanwhile would be in neither: not alive any more, and not yet the postmaster's.
                if _ticks(postmaster)[2:] == before[2:]:
                    return (sum(before) + sum(user + system for user, system, *_ in children)) / CLOCK_TICKS


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _ticks(pid: int) -> tuple[int, int, int, int]:
    """User and system time of a process, then those of its children that have ended."""
    fields = _stat(pid)
    if not fields:
        return (0, 0, 0, 0)
    user, system, children_user, children_system = map(int, fields[11:15])
    return (user, system, children_user, children_system)

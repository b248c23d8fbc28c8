"""Finds stored addresses by their canonical form where no index does. Only reads.

They are kept in a temporary SQLite database on this machine, so that any number of them needs no memory. It contains
only ids and hashes. A result is a hint that must be looked up by id. The application keeps writing, so the table is
read again from time to time, for a bounded share of the time.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.rules.addresses import canonical_address, may_be_noncanonical_sql, trimmed_address_sql

#: The number of rows that are fetched at a time.
PAGE = 2_000
#: The table is read again after this many seconds, or after this many times the duration of reading, if that is more.
MIN_AGE, READINGS = 5.0, 50
_NONCANONICAL = f"SELECT id, email FROM {{table}} WHERE {may_be_noncanonical_sql('email')}"
# Profiles have no index on it. Those whose users have an address go by that, which are nearly all: looking at users
# first spares a join of whole tables.
_OF_PROFILES = f"""
SELECT p.id, p.email FROM users u JOIN profiles p ON p."userId" = u.id
 WHERE position('@' IN u.email) = 0 AND {trimmed_address_sql("u.email")} = '' AND p.email <> ''
 UNION ALL
SELECT id, email FROM profiles WHERE "userId" IS NULL AND email <> ''
"""


class NoncanonicalAddresses:
    """The rows of a table whose `email` was not in its canonical form a short time ago."""

    def __init__(self, connection: BaseDatabaseWrapper, table: str) -> None:
        self._connection = connection
        self._table = table
        self._database: sqlite3.Connection | None = None
        self._is_empty = False
        self._read_again_at = 0.0

    def find(self, addresses: Iterable[str], *, anew: bool = False) -> dict[str, set[str]]:
        """Return by canonical address the ids of rows that probably have it.

        `anew` reads the table again first.
        """
        started = time.monotonic()
        if self._database is None or anew or started >= self._read_again_at:
            # An incomplete database is discarded: after a failure, the next call reads the table again.
            self._database = self._filled()
            self._is_empty = not self._database.execute("SELECT EXISTS (SELECT 1 FROM spelling)").fetchone()[0]
            ended = time.monotonic()
            self._read_again_at = ended + max(MIN_AGE, READINGS * (ended - started))
        if self._is_empty:
            return {}
        by_hash = {_hash(address): address for address in addresses}
        rows = self._database.execute(
            "SELECT hash, id FROM spelling WHERE hash IN (SELECT value FROM json_each(?))", [json.dumps(list(by_hash))]
        )
        found: dict[str, set[str]] = {}
        for number, identifier in rows:
            found.setdefault(by_hash[number], set()).add(identifier)
        return found

    def _filled(self) -> sqlite3.Connection:
        # An empty name creates a temporary file that is deleted with the connection.
        database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -2048;
            CREATE TABLE spelling (hash INTEGER, id TEXT);
            """
        )
        for page in self._pages():
            database.executemany("INSERT INTO spelling VALUES (?, ?)", [(_hash(a), i) for i, a in page])
        database.execute("CREATE INDEX spelling_hash ON spelling (hash)")
        return database

    def _pages(self) -> Iterator[list[tuple[str, str]]]:
        return noncanonical_addresses(self._connection, self._table)


class OwnAddresses(NoncanonicalAddresses):
    """The profiles that go by an address of their own, because their users have none, in whatever spelling."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        super().__init__(connection, "profiles")

    def _pages(self) -> Iterator[list[tuple[str, str]]]:
        for page in _addresses(self._connection, "own_addresses", _OF_PROFILES):
            yield [(identifier, canonical_address(email)) for identifier, email in page]


def noncanonical_addresses(connection: BaseDatabaseWrapper, table: str) -> Iterator[list[tuple[str, str]]]:
    """Yield the rows of a table whose `email` is not in its canonical form, page by page: id and canonical address."""
    for rows in _addresses(connection, f"noncanonical_{table}", _NONCANONICAL.format(table=table)):
        page = [(identifier, address) for identifier, email in rows if (address := canonical_address(email)) != email]
        if page:
            yield page


def _addresses(connection: BaseDatabaseWrapper, name: str, query: str) -> Iterator[list[tuple[str, str]]]:
    """The ids and addresses of a query, page by page.

    The cursor is declared in SQL and lives in a transaction, so it takes no memory and works through PgBouncer as well.
    """
    with transaction.atomic(using=connection.alias, savepoint=False), connection.cursor() as cursor:
        cursor.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {query}")
        while True:
            cursor.execute(f"FETCH FORWARD {PAGE} FROM {name}")
            rows = cursor.fetchall()
            yield rows
            if len(rows) < PAGE:
                break
        cursor.execute(f"CLOSE {name}")


def _hash(address: str) -> int:
    return int.from_bytes(blake2b(address.encode(), digest_size=8).digest(), signed=True)

"""How many workers there may be: one a processor, as far as the server has connections for them."""

from __future__ import annotations

import os
from typing import NamedTuple

from django.conf import settings
from django.db import connection

from crm.errors import OperatorError

#: A worker reads on one and writes on another.
CONNECTIONS_OF_A_WORKER = 2


class _Room(NamedTuple):
    """How many more connections a limit allows, and the name of that limit with its figure."""

    connections: int
    limit: str


def _room() -> _Room:
    """For how many connections there is room beside those of others; this process' own counts as free."""
    rooms = []
    if settings.DATABASE_CONNECTION_LIMIT is not None:
        limit = settings.DATABASE_CONNECTION_LIMIT
        rooms.append(_Room(limit, f"connection_limit={limit} in DATABASE_URL"))
    # PgBouncer lends a connection for a transaction: how many clients there are is of no concern to the server.
    if not rooms or not _is_behind_pgbouncer():
        with connection.cursor() as cursor:
            cursor.execute(_ROOM_OF_THE_SERVER)
            rooms += [_Room(free, limit) for free, limit in cursor.fetchall()]
    return min(rooms)


# Every role may see whose session it is; only some may see of what kind.
_ROOM_OF_THE_SERVER = """
WITH others AS (
  SELECT datid, usesysid FROM pg_stat_activity
   WHERE usesysid IS NOT NULL AND pid <> pg_backend_pid() AND COALESCE(backend_type, 'client backend') LIKE 'client%'
), limits(name, most, taken) AS (
  SELECT 'max_connections of the server, without those it reserves',
         current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
         - COALESCE(current_setting('reserved_connections', true)::int, 0),
         (SELECT count(*) FROM others)
   UNION ALL
  SELECT 'CONNECTION LIMIT of the database', datconnlimit, (SELECT count(*) FROM others WHERE datid = d.oid)
    FROM pg_database d WHERE datname = current_database() AND datconnlimit >= 0
   UNION ALL
  SELECT 'CONNECTION LIMIT of the role', rolconnlimit, (SELECT count(*) FROM others WHERE usesysid = r.oid)
    FROM pg_roles r WHERE rolname = session_user AND rolconnlimit >= 0
)
SELECT most - taken, name || ': ' || most || ', of which others have ' || taken FROM limits
"""


def _is_behind_pgbouncer() -> bool:
    return bool(connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"))


def max_workers() -> int:
    """One a processor, as far as there are connections: a worker reads on one and writes on another."""
    return max(1, min(os.cpu_count() or 1, (_room().connections - 1) // CONNECTIONS_OF_A_WORKER))


def require_room_for(workers: int) -> None:
    """Raise OperatorError where the connections do not suffice for this number of workers."""
    # Past PgBouncer, `connection_limit` is Prisma's, and one worker gets along with a single connection of the pool.
    if _is_behind_pgbouncer() and (workers == 1 or settings.DATABASE_CONNECTION_LIMIT is None):
        return
    room = _room()
    # One worker is this process itself; of several it is the one above them, which reads only when they are gone.
    needed = workers * CONNECTIONS_OF_A_WORKER + (workers > 1)
    if room.connections < needed:
        fewer = "Give fewer --workers, `auto` for as many as there may be, or raise" if workers > 1 else "Raise"
        raise OperatorError(
            f"{workers} {'workers take' if workers > 1 else 'worker takes'} {needed} connections, since each reads on "
            f"one and writes on another, and there are {max(0, room.connections)} ({room.limit}). {fewer} the limit. "
            "Nothing was written."
        )

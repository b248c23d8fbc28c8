"""The number of workers: one per processor, limited by the available database connections."""

from __future__ import annotations

import os
from typing import NamedTuple

from django.conf import settings
from django.db import connection

from crm.errors import OperatorError

#: A worker reads on one connection and writes on another.
CONNECTIONS_PER_WORKER = 2


class _Available(NamedTuple):
    """The number of connections that a limit still allows, and the description of the limit."""

    connections: int
    limit: str


def _available() -> _Available:
    """Return the smallest number of connections that a limit allows. The connection of this process counts as free."""
    found = []
    if settings.DATABASE_CONNECTION_LIMIT is not None:
        limit = settings.DATABASE_CONNECTION_LIMIT
        found.append(_Available(limit, f"connection_limit={limit} in DATABASE_URL"))
    # PgBouncer assigns a server connection per transaction, so the limits of the server do not limit its clients.
    if not found or not _is_behind_pgbouncer():
        with connection.cursor() as cursor:
            cursor.execute(_AVAILABLE_ON_SERVER)
            found += [_Available(free, limit) for free, limit in cursor.fetchall()]
    return min(found)


# Every role may read the user of a session in pg_stat_activity, but not every role its backend_type.
_AVAILABLE_ON_SERVER = """
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
    """Return one worker per processor, or fewer if the connections do not suffice; at least 1."""
    return max(1, min(os.cpu_count() or 1, (_available().connections - 1) // CONNECTIONS_PER_WORKER))


def require_room_for(workers: int) -> None:
    """Raise OperatorError if the connections do not suffice for this number of workers."""
    # Behind PgBouncer, `connection_limit` is meant for Prisma, and one worker works with one connection of the pool.
    if _is_behind_pgbouncer() and (workers == 1 or settings.DATABASE_CONNECTION_LIMIT is None):
        return
    available = _available()
    # One worker runs in this process. With several, this process needs one connection, and reads after they have ended.
    needed = workers * CONNECTIONS_PER_WORKER + (workers > 1)
    if available.connections < needed:
        fewer = "Use fewer --workers, `--workers auto` for the maximum, or raise" if workers > 1 else "Raise"
        raise OperatorError(
            f"{workers} {'workers need' if workers > 1 else 'worker needs'} {needed} connections, because each reads "
            f"on one and writes on another, but only {max(0, available.connections)} are available "
            f"({available.limit}). {fewer} the limit. Nothing was written."
        )

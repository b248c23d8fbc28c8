"""Lock and statement timeouts for all statements of a command outside the batches.

A batch sets shorter ones in its own transaction. These limits ensure that no other statement waits forever for a
session that keeps a table locked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from psycopg.pq import TransactionStatus

#: How long a statement waits for a lock, in milliseconds.
LOCK_TIMEOUT = 5_000


@contextmanager
def limited() -> Iterator[None]:
    """Apply the limits to every statement in the block, on any connection and thread."""
    wrapper = connections[DEFAULT_DB_ALIAS]
    # An open session has no limits. The next statement opens a new one, and handles the errors of that.
    wrapper.close()
    connection_created.connect(_limit, weak=False)
    try:
        yield
    finally:
        connection_created.disconnect(_limit)
        # A later session must not keep the limits.
        wrapper.close()
        if _locally in wrapper.execute_wrappers:
            wrapper.execute_wrappers.remove(_locally)


def statement_timeout() -> int:
    """Return the timeout of a statement outside the batches, in milliseconds; 0 means no limit."""
    return int(settings.CRM_STATEMENT_TIMEOUT) * 1_000


def _limit(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
    if not connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        with connection.cursor() as cursor:
            cursor.execute(_limits(local=False))
    elif _locally not in connection.execute_wrappers:
        # PgBouncer assigns a session for one transaction; a setting for longer would affect other clients.
        connection.execute_wrappers.append(_locally)


def _limits(*, local: bool) -> str:
    scope = "LOCAL" if local else "SESSION"
    return f"SET {scope} lock_timeout = {LOCK_TIMEOUT}; SET {scope} statement_timeout = {statement_timeout()}"


def _locally(
    execute: Callable[..., Any],
    sql: str,
    parameters: Any,
    many: bool,  # noqa: FBT001 - Django's signature
    context: Mapping[str, Any],
) -> Any:
    """Set the limits at the start of each transaction, and wrap a statement outside of one in a transaction."""
    wrapper: BaseDatabaseWrapper = context["connection"]
    session = wrapper.connection
    if session is None or session.info.transaction_status != TransactionStatus.IDLE:
        return execute(sql, parameters, many, context)
    with wrapper.wrap_database_errors:
        if not session.autocommit:
            session.execute(_limits(local=True))
            return execute(sql, parameters, many, context)
        with session.transaction():
            session.execute(_limits(local=True))
            return execute(sql, parameters, many, context)

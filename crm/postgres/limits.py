"""How long a statement of a command may wait for a lock, and how long it may take, whichever it is.

What a batch allows itself is less, and is set in its own transaction. Here is what holds for all the rest: what is read
before, beside and after. Nothing of it may wait for ever for somebody who has locked a table and gone home.
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

#: How long a statement waits for a lock; milliseconds.
LOCK_TIMEOUT = 5_000


@contextmanager
def limited() -> Iterator[None]:
    """Let every statement inside have the two limits, whichever connection and thread it comes from."""
    wrapper = connections[DEFAULT_DB_ALIAS]
    # A session from before has none. Whoever needs the next one asks for it, and answers for what goes wrong then.
    wrapper.close()
    connection_created.connect(_limit, weak=False)
    try:
        yield
    finally:
        connection_created.disconnect(_limit)
        # A session that is used for something else afterwards has them no more.
        wrapper.close()
        if _locally in wrapper.execute_wrappers:
            wrapper.execute_wrappers.remove(_locally)


def statement_timeout() -> int:
    """How long a statement may take that is none of a batch's; milliseconds, 0 for as long as it likes."""
    return int(settings.CRM_STATEMENT_TIMEOUT) * 1_000


def _limit(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
    if not connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        with connection.cursor() as cursor:
            cursor.execute(_limits(local=False))
    elif _locally not in connection.execute_wrappers:
        # PgBouncer lends a session for a transaction only, and what is set for longer is set for somebody else.
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
    """Begin a transaction with the limits, and one for a statement that would be outside of any."""
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

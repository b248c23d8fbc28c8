"""Whom a new session can trust, asked in few words where nobody but the server's first superuser has a say.

Every connection asks it, and PostgreSQL plans the question anew each time, which takes longer than most tests. Where
that superuser asks, where no other role owns anything in the database or was granted anything, and where PUBLIC may
create in no schema, there is nobody who would not be trusted. Otherwise it is asked in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg
import pytest

from crm.postgres.trust import require_trusted

# PostgreSQL keeps what depends on a role in pg_shdepend, but for its first superuser, who cannot be dropped.
_NOBODY_ELSE = """
SELECT (SELECT oid FROM pg_roles WHERE rolname = current_user) = 10
   AND NOT EXISTS (SELECT FROM pg_shdepend
                    WHERE refclassid = 'pg_authid'::regclass
                      AND dbid IN (0, (SELECT oid FROM pg_database WHERE datname = current_database())))
   AND NOT EXISTS (SELECT FROM pg_namespace, aclexplode(nspacl) WHERE grantee = 0 AND privilege_type = 'CREATE')
"""


def nobody_else_has_a_say(session: psycopg.Connection) -> bool:
    """Whether the server's first superuser is the only role that there is to be trusted."""
    with psycopg.RawCursor(session) as cursor:
        return cursor.execute(_NOBODY_ELSE.encode()).fetchone() == (True,)


@contextmanager
def asked_in_few_words() -> Iterator[None]:
    """Ask in full only where somebody else has a say."""

    def ask(session: psycopg.Connection, schemas: Sequence[str], legacy_schema: str) -> None:
        if not nobody_else_has_a_say(session):
            require_trusted(session, schemas, legacy_schema)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crm.postgres.session.require_trusted", ask)
        yield

"""What people decide about rows in conflict: recorded here, carried out by the next run.

A row is in conflict when its keys name two accounts, which no rule can sort out. A person says either whose contact it
is, or that it gets one of its own with another address. The next run then does as it does with every row: it merges
into a contact of ours and leaves somebody else's alone, and nothing is overwritten. Accounts that another contact has
are left to that contact.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from django.db import DatabaseError, connection
from django.db.models.functions import Now

from crm.backfill import errors
from crm.backfill.mapping import contact_id, normalised_email
from crm.backfill.outcome import Outcome, Reason
from crm.backfill.source import WHITE_SPACE
from crm.errors import OperatorError
from crm.models import ConflictDecision, CRMContact, LedgerEntry

_TABLES = ("profiles", "leads")
# The row itself and its own account are not somebody else.
_WHOSE = """
SELECT 'contact ' || id FROM crm_contacts WHERE lower(btrim(email, %(white_space)s)) = %(email)s AND id <> %(id)s
 UNION ALL
SELECT 'user ' || u.id FROM users u
 WHERE lower(btrim(u.email, %(white_space)s)) = %(email)s
   AND NOT EXISTS (SELECT FROM profiles WHERE id = %(profile)s AND "userId" = u.id)
 UNION ALL
SELECT 'leads:' || id FROM leads
 WHERE lower(btrim(email, %(white_space)s)) = %(email)s AND id IS DISTINCT FROM %(lead)s
 UNION ALL
SELECT 'the decision on another row' FROM conflict_decision WHERE separate_email = %(email)s AND id <> %(id)s
 LIMIT 1
"""
_INSUFFICIENT_PRIVILEGE, _NO_SUCH_TABLE = "42501", "42P01"


class RowReference(NamedTuple):
    """A source row by the name that log lines and reports give it."""

    table: str
    source_id: str

    @classmethod
    def parse(cls, text: str) -> RowReference:
        """The row that `profiles:<id>` or `leads:<id>` names. Raises OperatorError for anything else."""
        table, _, source_id = text.partition(":")
        if table not in _TABLES or not source_id:
            raise OperatorError("That names no row: write profiles:<id> or leads:<id>, as the reports do.")
        return cls(table, source_id)

    def __str__(self) -> str:
        return f"{self.table}:{self.source_id}"

    @property
    def line_id(self) -> str:
        """The key of the row's line in the ledger, and of the contact that it makes."""
        return contact_id(self.table, self.source_id)


def belongs_to(row: RowReference, contact: str) -> None:
    """Record that a row in conflict belongs to a contact; a decision that was made before is replaced.

    Raises OperatorError where the row is not in conflict and where there is no such contact.
    """
    with _told_to_the_operator():
        _require_conflict(row)
        if not CRMContact.objects.filter(pk=contact).exists():
            raise OperatorError(f"There is no contact {contact}. Nothing was recorded.")
        _record(row, contact, None)


def is_separate(row: RowReference, address: str) -> None:
    """Record that a row in conflict gets a contact of its own; a decision that was made before is replaced.

    Raises OperatorError where the row is not in conflict, and where the address is none or somebody else's.
    """
    email = normalised_email(address)
    if email is None:
        raise OperatorError("That is not a valid email address. Nothing was recorded.")
    with _told_to_the_operator():
        _require_conflict(row)
        if owner := _whose(email, row):
            raise OperatorError(f"That address is taken by {owner}: name one that is nobody's. Nothing was recorded.")
        _record(row, None, email)


def _require_conflict(row: RowReference) -> None:
    line = LedgerEntry.objects.filter(pk=row.line_id).first()
    if line is None:
        raise OperatorError(f"The ledger has no row {row}: it is pending, excluded or not there. Nothing was recorded.")
    if line.outcome != Outcome.ERROR or line.reason != Reason.CONFLICT:
        what = line.outcome if line.outcome != Outcome.ERROR else f"an error ({line.reason})"
        raise OperatorError(f"The row {row} is not in conflict, it is {what}. Nothing was recorded.")


def _whose(email: str, row: RowReference) -> str | None:
    parameters = {
        "email": email,
        "white_space": WHITE_SPACE,
        "id": row.line_id,
        "profile": row.source_id if row.table == "profiles" else None,
        "lead": row.source_id if row.table == "leads" else None,
    }
    with connection.cursor() as cursor:
        cursor.execute(_WHOSE, parameters)
        found = cursor.fetchone()
    return str(found[0]) if found else None


def _record(row: RowReference, contact: str | None, email: str | None) -> None:
    ConflictDecision.objects.update_or_create(
        id=row.line_id,
        defaults={"contact_id": contact, "separate_email": email, "decided_by": _person(), "decided_at": Now()},
    )


def _person() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


@contextmanager
def _told_to_the_operator() -> Iterator[None]:
    """Turn what the database refuses into what can be done about it, without the address that it quotes."""
    try:
        yield
    except DatabaseError as error:
        messages = {
            _NO_SUCH_TABLE: "This database has no decisions: `python manage.py migrate` makes the table.",
            _INSUFFICIENT_PRIVILEGE: "This role may not look for the row or record a decision. Let the owner grant it.",
        }
        message = messages.get(errors.sqlstate(error) or "")
        if message is None:
            raise OperatorError(f"The decision was not recorded: {errors.described(error)}. Try again.") from None
        raise OperatorError(message) from None

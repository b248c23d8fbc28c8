"""What people say about rows in conflict: recorded here, carried out by the next run.

A row is in conflict when its keys name two accounts, which no rule can sort out. A person says either whose contact it
is, or that it gets one of its own with another address. The next run then does as it does with every row: it merges
into a contact of ours and leaves somebody else's alone, and nothing is overwritten. Accounts that another contact has
are left to that contact.

Resolutions are made between runs, never during one: what is settled has been settled by those that there are, or
without any, and whoever compares rows with contacts afterwards can rely on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from django.conf import settings
from django.db import connection

from crm import sqlstates
from crm.conflicts.dead_letters import shown_resolution
from crm.conflicts.remedies import named_contacts, remedy
from crm.errors import OperatorError
from crm.models import ConflictResolution, CRMContact, LedgerEntry
from crm.outcome import Outcome, Reason
from crm.postgres import errors
from crm.rules.addresses import canonical_address_sql
from crm.rules.mapping import normalised_email
from crm.rules.row_reference import RowReference
from crm.runs import lease
from crm.try_execute import try_execute

# The row itself and its own account are not somebody else.
_WHOSE = f"""
SELECT 'contact ' || id FROM crm_contacts WHERE {canonical_address_sql("email")} = %(email)s AND id <> %(id)s
 UNION ALL
SELECT 'user ' || u.id FROM users u
 WHERE {canonical_address_sql("u.email")} = %(email)s
   AND NOT EXISTS (SELECT FROM profiles WHERE id = %(profile)s AND "userId" = u.id)
 UNION ALL
SELECT 'leads:' || id FROM leads
 WHERE {canonical_address_sql("email")} = %(email)s AND id IS DISTINCT FROM %(lead)s
 UNION ALL
SELECT 'the decision on another row' FROM conflict_decision WHERE separate_email = %(email)s AND id <> %(id)s
 LIMIT 1
"""
_RECORD = """
INSERT INTO conflict_decision (id, "row", contact_id, separate_email, decided_by, decided_at)
VALUES (%s, %s, %s, %s, %s, statement_timestamp())
    ON CONFLICT (id) DO UPDATE SET ("row", contact_id, separate_email, decided_by, decided_at) =
       ROW (excluded."row", excluded.contact_id, excluded.separate_email, excluded.decided_by, excluded.decided_at)
RETURNING id
"""


def belongs_to(row: RowReference, contact: str) -> None:
    """Record that a row in conflict belongs to a contact; a resolution that was made before is replaced.

    Raises OperatorError where the row is not in conflict and where there is no such contact, and AnotherRunError while
    a run is going.
    """
    with _between_runs():
        _require_conflict(row)
        if not CRMContact.objects.filter(pk=contact).exists():
            raise OperatorError(f"There is no contact {contact}.")
        _record(row, contact, None)


def is_separate(row: RowReference, address: str) -> None:
    """Record that a row in conflict gets a contact of its own; a resolution that was made before is replaced.

    Raises OperatorError where the row is not in conflict, and where the address is none or somebody else's, and
    AnotherRunError while a run is going.
    """
    email = normalised_email(address)
    if email is None:
        raise OperatorError("That is not a valid email address. Nothing was recorded.")
    with _between_runs():
        _require_conflict(row)
        if owner := _whose(email, row):
            raise OperatorError(f"That address is taken by {owner}: name one that is nobody's.")
        _record(row, None, email)


def conflict_of(row: RowReference) -> str:
    """A row in conflict for people: the contacts to which its keys lead, what can be decided, and what has been.

    Raises OperatorError where the row is not in conflict.
    """
    with _as_operator_error("Try again."):
        entry = _require_conflict(row)
        resolution = ConflictResolution.objects.filter(pk=row.entry_id).first()
        whose = resolution and resolution.contact_id
        is_gone = whose is not None and not CRMContact.objects.filter(pk=whose).exists()
    gone = f"The contact {whose} is gone since: decide again, unless a rollback deleted it and the next run makes it."
    if entry is None:
        what = f". {gone}" if is_gone else ": the next run carries the decision out."
        return f"{row} is pending, and decided on{what}"
    named = named_contacts(entry.contact_id, entry.identity_keys)
    if resolution is not None and entry.reason == Reason.CONFLICT:
        shown = shown_resolution(f"{resolution.decided_at:%Y-%m-%d %H:%M}", resolution.contact_id)
        what = gone if is_gone else "The next run carries that out. To change it, decide again."
        return f"{row}: {named}\nDecided by {resolution.decided_by} {shown}. {what}"
    return f"{row}: {named}\n{remedy(str(row), entry.reason, entry.contact_id, entry.identity_keys)}"


def _require_conflict(row: RowReference) -> LedgerEntry | None:
    """The entry of a row in conflict; None where a resolution is there and the entry is gone."""
    entry = LedgerEntry.objects.filter(pk=row.entry_id).first()
    if (
        entry is not None
        and entry.outcome == Outcome.ERROR
        and entry.reason in (Reason.CONFLICT, Reason.STALE_DECISION)
    ):
        return entry
    if entry is not None:
        what = entry.outcome if entry.outcome != Outcome.ERROR else f"an error ({entry.reason})"
        raise OperatorError(f"The row {row} is not in conflict, it is {what}.")
    # Without an entry, but resolved: the run that carried the resolution out was taken back, perhaps because of it.
    if not ConflictResolution.objects.filter(pk=row.entry_id).exists():
        raise OperatorError(f"The ledger has no row {row}: it is pending, excluded or not there.")
    return None


def _whose(email: str, row: RowReference) -> str | None:
    parameters = {
        "email": email,
        "id": row.entry_id,
        "profile": row.source_id if row.table == "profiles" else None,
        "lead": row.source_id if row.table == "leads" else None,
    }
    with connection.cursor() as cursor:
        cursor.execute(_WHOSE, parameters)
        found = cursor.fetchone()
    return str(found[0]) if found else None


def _record(row: RowReference, contact: str | None, email: str | None) -> None:
    try_execute(connection, _RECORD, [row.entry_id, str(row), contact, email, lease.operator()])


@contextmanager
def _between_runs() -> Iterator[None]:
    """A transaction in which no run is going or begins; what is refused in it says that nothing was recorded."""
    with _as_operator_error("Nothing was recorded: try again."), lease.between_runs():
        try:
            yield
        except OperatorError as error:
            raise OperatorError(f"{error} Nothing was recorded.") from None


def _as_operator_error(what_now: str) -> AbstractContextManager[None]:
    """Turn what the database refuses into what can be done about it, without the address that it quotes."""
    known = {
        sqlstates.UNDEFINED_TABLE: (
            "A table is missing that this role would see: run `python manage.py migrate`, or let the owner GRANT USAGE "
            f"on the schema {settings.BACKFILL_SCHEMA}."
        ),
        sqlstates.UNDEFINED_FUNCTION: "This database lacks a function that this takes: run `python manage.py migrate`.",
        sqlstates.INSUFFICIENT_PRIVILEGE: (
            "This role may not look for the row or record a decision: docs/least_privilege.sql gives the rights."
        ),
    }
    return errors.as_operator_error(f"The database broke off: {{}}. {what_now}", known=known)

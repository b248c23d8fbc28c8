"""Records resolutions of rows in conflict, which the next run applies.

A row is in conflict if its keys belong to two accounts, which no rule can decide. An operator either assigns the row to
a contact, or gives it its own contact with another address. The next run then treats it like any other row: it merges
it into a contact of the backfill, leaves a contact created elsewhere unchanged, and overwrites nothing. An account that
another contact has stays there.

Resolutions are recorded only between runs. So all migrated rows were migrated with the current resolutions, and a
verification or rollback can use these.
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
from crm.postgres.facts.catalog import read_tables
from crm.rules.addresses import canonical_address_sql
from crm.rules.mapping import normalised_email
from crm.rules.row_reference import RowReference
from crm.rules.source_rows import SOURCE_TABLES
from crm.runs import lease
from crm.try_execute import try_execute

_OF_TABLE = """
SELECT '{table}:' || id FROM {table}
 WHERE {address} = %(email)s AND (%(table)s <> '{table}' OR id <> %(source_id)s)
 UNION ALL
"""
# The owner of an address, other than the row itself and its own account.
_WHOSE = f"""
SELECT 'contact ' || id FROM crm_contacts WHERE {canonical_address_sql("email")} = %(email)s AND id <> %(id)s
 UNION ALL
SELECT 'user ' || u.id FROM users u
 WHERE {canonical_address_sql("u.email")} = %(email)s
   AND NOT (%(table)s = 'users' AND u.id = %(source_id)s)
   AND NOT EXISTS (SELECT FROM profiles WHERE %(table)s = 'profiles' AND id = %(source_id)s AND "userId" = u.id)
 UNION ALL
{{rows}}
SELECT 'the resolution of another row' FROM conflict_decision WHERE separate_email = %(email)s AND id <> %(id)s
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
    """Assign a row in conflict to a contact, replacing any earlier resolution.

    Raises OperatorError if the row is not in conflict or there is no such contact, and AnotherRunError if a run is in
    progress.
    """
    with _between_runs():
        _require_conflict(row)
        if not CRMContact.objects.filter(pk=contact).exists():
            raise OperatorError(f"There is no contact {contact}.")
        _record(row, contact, None)


def is_separate(row: RowReference, address: str) -> None:
    """Give a row in conflict its own contact with this address, replacing any earlier resolution.

    Raises OperatorError if the row is not in conflict, or if the address is invalid or already used, and
    AnotherRunError if a run is in progress.
    """
    email = normalised_email(address)
    if email is None:
        raise OperatorError("That is not a valid email address. Nothing was recorded.")
    with _between_runs():
        _require_conflict(row)
        if owner := _whose(email, row):
            raise OperatorError(f"That address is already used by {owner}: give another address.")
        _record(row, None, email)


def conflict_of(row: RowReference) -> str:
    """Describe a row in conflict: the contacts that its keys match, and its resolution or the possible ones.

    Raises OperatorError if the row is not in conflict.
    """
    with _as_operator_error("Run the command again."):
        entry = _require_conflict(row)
        resolution = ConflictResolution.objects.filter(pk=row.entry_id).first()
        whose = resolution and resolution.contact_id
        is_gone = whose is not None and not CRMContact.objects.filter(pk=whose).exists()
    gone = (
        f"The contact {whose} no longer exists: resolve the conflict again, unless a rollback deleted the contact and "
        "the next run recreates it."
    )
    if entry is None:
        what = f". {gone}" if is_gone else ": the next run applies the resolution."
        return f"{row} is pending and has a resolution{what}"
    named = named_contacts(entry.contact_id, entry.identity_keys)
    if resolution is not None and entry.reason == Reason.CONFLICT:
        shown = shown_resolution(f"{resolution.decided_at:%Y-%m-%d %H:%M}", resolution.contact_id)
        what = gone if is_gone else "The next run applies this. To change it, resolve the conflict again."
        return f"{row}: {named}\nResolved by {resolution.decided_by} {shown}. {what}"
    return f"{row}: {named}\n{remedy(str(row), entry.reason, entry.contact_id, entry.identity_keys)}"


def _require_conflict(row: RowReference) -> LedgerEntry | None:
    """Return the entry of a row in conflict, or None if the row has a resolution and no entry."""
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
    # A resolved row has no entry if the run that applied the resolution was rolled back, perhaps because of it.
    if not ConflictResolution.objects.filter(pk=row.entry_id).exists():
        raise OperatorError(f"The ledger has no row {row}: it is pending, excluded or does not exist.")
    return None


def _whose(email: str, row: RowReference) -> str | None:
    parameters = {"email": email, "id": row.entry_id, "table": row.table, "source_id": row.source_id}
    columns = read_tables(connection, SOURCE_TABLES.keys() - {"users"})
    tables = [table for table in columns if "email" in columns[table].columns]
    rows = "".join(_OF_TABLE.format(table=table, address=canonical_address_sql("email")) for table in tables)
    with connection.cursor() as cursor:
        cursor.execute(_WHOSE.replace("{rows}", rows), parameters)
        found = cursor.fetchone()
    return str(found[0]) if found else None


def _record(row: RowReference, contact: str | None, email: str | None) -> None:
    try_execute(connection, _RECORD, [row.entry_id, str(row), contact, email, lease.operator()])


@contextmanager
def _between_runs() -> Iterator[None]:
    """Open a transaction between runs, and add to errors raised in it that nothing was recorded."""
    with (
        _as_operator_error("Nothing was recorded: run the command again."),
        lease.between_runs(ConflictResolution._meta.db_table),
    ):
        try:
            yield
        except OperatorError as error:
            raise OperatorError(f"{error} Nothing was recorded.") from None


def _as_operator_error(what_now: str) -> AbstractContextManager[None]:
    """Raise database errors as OperatorError with a remedy, without the text, which may quote the address."""
    known = {
        sqlstates.UNDEFINED_TABLE: (
            "A table is missing, or this role may not see it: run `python manage.py migrate`, or, as the owner, GRANT "
            f"USAGE on the schema {settings.BACKFILL_SCHEMA}."
        ),
        sqlstates.UNDEFINED_FUNCTION: "This database lacks a function that this takes: run `python manage.py migrate`.",
        sqlstates.INSUFFICIENT_PRIVILEGE: (
            "This role may not read the row or record a resolution: docs/least_privilege.sql grants the rights."
        ),
    }
    return errors.as_operator_error(f"Database error: {{}}. {what_now}", known=known)

"""Streams the rows in error, each with its remedy. Only reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.resolutions import is_readable
from crm.backfill.read.source import address_of_profile
from crm.conflicts.remedies import REMEDY_OF_GONE, REMEDY_OF_RESOLVED, named_contacts, remedy
from crm.errors import OperatorError
from crm.outcome import Outcome, Reason, Source
from crm.postgres.facts.schema import examine
from crm.postgres.snapshot import snapshot, stream
from crm.rules.addresses import trimmed_address_sql
from crm.rules.row_reference import table_sql

logger = logging.getLogger(__name__)

#: The value of `row_gone` for a row that no longer exists; otherwise it is empty.
GONE = "gone"

_ORDER = ", ".join(f"'{source}'" for source in Source)
_DEAD_LETTERS = f"""
SELECT entry.source, entry.source_id, entry.reason, entry.contact_id, entry.sqlstate, entry.constraint, entry.column,
       entry.table, entry.trigger, {{is_gone}}, {{email}}, entry.identity_keys, {{resolution}}
  FROM ledger_entry entry {{joins}}
 WHERE entry.outcome = '{Outcome.ERROR}'
 ORDER BY array_position(ARRAY[{_ORDER}], entry.source), entry.source_id
"""
# One value, even if several rows have the id. A table that does not exist has no rows.
_IS_GONE = "CASE {table} {cases} ELSE true END"
_IS_GONE_OF = "WHEN '{table}' THEN NOT EXISTS (SELECT FROM {table} WHERE id = entry.source_id)"
_EMAIL = "CASE {table} {cases} END"
_EMAIL_OF = "WHEN '{table}' THEN (SELECT {address} FROM {table} r WHERE r.id = entry.source_id LIMIT 1)"
_RESOLUTION = """
       to_char(resolution.decided_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), resolution.contact_id,
       resolution.contact_id IS NOT NULL AND NOT EXISTS (SELECT FROM crm_contacts WHERE id = resolution.contact_id)
"""
_RESOLUTIONS = " LEFT JOIN conflict_decision resolution ON resolution.id = entry.id"


class DeadLetter(NamedTuple):
    """A row in error.

    `row_gone` is GONE if the row no longer exists. `decision` is the resolution, without the address that it may
    contain. `email` is the stored address, or None unless requested.
    """

    source: str
    row: str
    id: str
    reason: str
    what_to_do: str
    contact_id: str | None
    contacts: str
    sqlstate: str | None
    constraint: str | None
    column: str | None
    table: str | None
    trigger: str | None
    row_gone: str | None
    decision: str | None
    email: str | None


def dead_letters(connection: BaseDatabaseWrapper, *, with_email: bool) -> Generator[DeadLetter, None, None]:
    """Yield all rows in error, source by source. Contains no personal data unless `with_email`.

    Raises OperatorError if the database does not meet the requirements, or if there is no readable ledger.
    """
    with snapshot(connection):
        facts = examine(connection, for_writing=False)
        if not facts.has_ledger:
            raise OperatorError(
                "There is no ledger that this role may read, so there are no rows in error to export: run `python "
                "manage.py migrate` and `backfill_crm_contacts` first, or GRANT SELECT on its tables."
            )
        readable = is_readable(connection)
        if readable is False:
            logger.warning("this role may not read conflict_decision: the export contains no resolutions")
        resolution, resolutions = (_RESOLUTION, _RESOLUTIONS) if readable else ("NULL, NULL, false", "")
        addresses = dict.fromkeys(facts.tables, "r.email")
        addresses["profiles"] = address_of_profile(trimmed_address_sql, facts.missing)
        emails = " ".join(_EMAIL_OF.format(table=table, address=address) for table, address in addresses.items())
        gone = " ".join(_IS_GONE_OF.format(table=table) for table in facts.tables)
        query = _DEAD_LETTERS.format(
            email=_EMAIL.format(table=table_sql("entry"), cases=emails) if with_email else "NULL",
            is_gone=_IS_GONE.format(table=table_sql("entry"), cases=gone),
            resolution=resolution,
            joins=resolutions,
        )
        for row in stream(connection, "dead_letters", query):
            yield _dead_letter(*row)


def shown_resolution(decided_at: str, contact_id: str | None) -> str:
    """Describe a resolution: its time, in UTC, and its contact, without the address of a separate contact."""
    whose = f"it belongs to the contact {contact_id}" if contact_id else "it gets its own contact"
    return f"at {decided_at} (UTC): {whose}"


def _dead_letter(source: str, source_id: str, reason: str, contact_id: str | None, *rest: Any) -> DeadLetter:
    *refusal, is_gone, email, keys, decided_at, resolved_contact, resolved_contact_is_gone = rest
    row = f"{Source(source).table}:{source_id}"
    identity_keys = json.loads(keys) if keys else None
    resolution = f"Resolved {shown_resolution(decided_at, resolved_contact)}" if decided_at else None
    if is_gone:
        what_to_do = REMEDY_OF_GONE
    elif resolution and reason == Reason.CONFLICT and not resolved_contact_is_gone:
        what_to_do = REMEDY_OF_RESOLVED.format(row=row)
    else:
        what_to_do = remedy(row, reason, contact_id, identity_keys)
    contacts = named_contacts(contact_id, identity_keys)
    gone = GONE if is_gone else None
    columns = (source, row, source_id, reason, what_to_do, contact_id, contacts, *refusal, gone, resolution, email)
    return DeadLetter._make(columns)

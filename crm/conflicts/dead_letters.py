"""The rows in error, one after another, and what a person can do about each. Only reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.resolutions import is_readable
from crm.errors import OperatorError
from crm.outcome import Outcome, Reason, Source
from crm.postgres.facts.schema import examine
from crm.postgres.snapshot import snapshot, stream

logger = logging.getLogger(__name__)

#: One sentence a reason. What the row's own application is to do is said in its words.
REMEDIES = {
    Reason.UNKNOWN_ROLE: (
        "Give the profile a role that is known here (client, tax_preparer, affiliate), or one that is not to be "
        "migrated (lead, admin, super_admin)."
    ),
    Reason.UNKNOWN_STATUS: (
        "Give the lead a status that is known here (NEW, CONTACTED, QUALIFIED, CONVERTED, DISQUALIFIED)."
    ),
    Reason.UNKNOWN_TYPE: "Give the lead a type that is known here (CUSTOMER, TAX_PREPARER, AFFILIATE).",
    Reason.INVALID_EMAIL: "Correct the email address in the application.",
    Reason.CONFLICT: (
        "Decide whose contact it is, with resolve_crm_conflict {row}: --contact {contacts} when that is this person's, "
        "--separate and another address when it is somebody else's."
    ),
    Reason.STALE_DECISION: (
        "Decide again, with resolve_crm_conflict {row}: since it was decided, contact {contact} was deleted or has got "
        "the address."
    ),
    Reason.MISSING_VALUE: "Give the row a value in the column that is named.",
    Reason.INVALID_VALUE: "Correct the value in the column that is named: the application cannot read such a one.",
    Reason.DUPLICATE_ID: "Give each row of the table an id of its own: several have this one.",
    Reason.UNREADABLE: "Have the row looked at by whoever keeps the database: PostgreSQL cannot read it.",
    Reason.DATA_ERROR: "Correct the row in the application: the database refused it as the other columns say.",
}
REMEDY_OF_RESOLVED = (
    "Nothing: the next run carries the decision out. To change it, decide again with resolve_crm_conflict {row}."
)
REMEDY_OF_OTHERS = "Look the row up in the application."
REMEDY_OF_GONE = "Nothing: the row is gone from the application, and no run tries it again."
#: What the export says of a row that is gone; of any other it says nothing.
GONE = "gone"
#: The keys by which a row finds its contact: columns of `crm_contacts`. The id is the one that the row itself makes.
IDENTITY_KEYS = ("email", "userId", "clerkUserId", "id")

_ORDER = ", ".join(f"'{source}'" for source in Source)
_DEAD_LETTERS = f"""
SELECT entry.source, entry.source_id, entry.reason, entry.contact_id, entry.sqlstate, entry.constraint, entry.column,
       entry.table, entry.trigger, {{is_gone}}, {{email}}, entry.identity_keys, {{resolution}}
  FROM ledger_entry entry {{joins}}
 WHERE entry.outcome = '{Outcome.ERROR}'
 ORDER BY array_position(ARRAY[{_ORDER}], entry.source), entry.source_id
"""
_LEAD_SOURCES = ", ".join(f"'{source}'" for source in Source.of_table("leads"))
_IS_GONE = f"""
       CASE WHEN entry.source IN ({_LEAD_SOURCES}) THEN NOT EXISTS (SELECT FROM leads WHERE id = entry.source_id)
            ELSE NOT EXISTS (SELECT FROM profiles WHERE id = entry.source_id) END
"""
# One each, whatever the number of rows with the id.
_PEOPLE = f"""
  LEFT JOIN LATERAL (
    SELECT email FROM leads WHERE entry.source IN ({_LEAD_SOURCES}) AND leads.id = entry.source_id LIMIT 1
  ) lead ON true
  LEFT JOIN LATERAL (
    SELECT users.email FROM profiles JOIN users ON users.id = profiles."userId"
     WHERE entry.source NOT IN ({_LEAD_SOURCES}) AND profiles.id = entry.source_id LIMIT 1
  ) profile ON true
"""
_RESOLUTION = """
       to_char(resolution.decided_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), resolution.contact_id,
       resolution.contact_id IS NOT NULL AND NOT EXISTS (SELECT FROM crm_contacts WHERE id = resolution.contact_id)
"""
_RESOLUTIONS = " LEFT JOIN conflict_decision resolution ON resolution.id = entry.id"


class DeadLetter(NamedTuple):
    """A row in error.

    `row_gone` is true for a row that is no longer there. `decision` is what a person said, without the address of a
    contact of the row's own. `email` is as it is stored, and None unless it was asked for.
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
    """Every row in error, source by source, streamed. Raises OperatorError where the database does not fit.

    Names nobody but by id, unless `with_email` asks for the address.
    """
    email, people = ("COALESCE(lead.email, profile.email)", _PEOPLE) if with_email else ("NULL", "")
    with snapshot(connection):
        if not examine(connection, for_writing=False).has_ledger:
            raise OperatorError(
                "There is no ledger that this role may read, so no row is in error: run `python manage.py migrate` "
                "and `backfill_crm_contacts` first, or GRANT SELECT on its tables."
            )
        readable = is_readable(connection)
        if readable is False:
            logger.warning("this role may not read conflict_decision: the export shows no decision")
        resolution, resolutions = (_RESOLUTION, _RESOLUTIONS) if readable else ("NULL, NULL, false", "")
        query = _DEAD_LETTERS.format(email=email, is_gone=_IS_GONE, resolution=resolution, joins=people + resolutions)
        for row in stream(connection, "dead_letters", query):
            yield _dead_letter(*row)


def keys_by_contact(
    contact_id: str | None, identity_keys: Mapping[str, str | None] | None
) -> dict[str | None, list[str]]:
    """The contacts that a ledger entry in error names, each with the keys of the row that lead to it.

    `identity_keys` are those of the entry; earlier versions wrote none. The contact of a resolution that holds no more
    may have no key. Keys that no contact has are under None.
    """
    keys = identity_keys or {}
    found: dict[str | None, list[str]] = {}
    for key in IDENTITY_KEYS:
        if key in keys:
            found.setdefault(keys[key], []).append(key)
    if contact_id is not None:
        found.setdefault(contact_id, [])
    return found


def named_contacts(contact_id: str | None, identity_keys: Mapping[str, str | None] | None) -> str:
    """The contacts that a ledger entry in error names, each with its keys, for people: `c1 (email), c2 (userId)`."""
    return ", ".join(
        ("no contact" if contact is None else contact) + (f" ({', '.join(keys)})" if keys else "")
        for contact, keys in keys_by_contact(contact_id, identity_keys).items()
    )


def remedy(row: str, reason: str | None, contact_id: str | None, identity_keys: Mapping[str, str | None] | None) -> str:
    """What a person can do about a row in error."""
    if reason not in set(Reason):
        return REMEDY_OF_OTHERS
    by_contact = keys_by_contact(contact_id, identity_keys)
    contacts = " or ".join(contact for contact in by_contact if contact is not None)
    return REMEDIES[Reason(reason)].format(row=row, contact=contact_id, contacts=contacts)


def shown_resolution(decided_at: str, contact_id: str | None) -> str:
    """When a person resolved the conflict of a row, in UTC, and how; without the address of a contact of its own."""
    whose = f"the contact {contact_id} is its person's" if contact_id else "it is another person"
    return f"at {decided_at} (UTC): {whose}"


def _dead_letter(source: str, source_id: str, reason: str, contact_id: str | None, *rest: Any) -> DeadLetter:
    *refusal, is_gone, email, keys, decided_at, resolved_contact, resolved_contact_is_gone = rest
    row = f"{Source(source).table}:{source_id}"
    identity_keys = json.loads(keys) if keys else None
    resolution = f"Decided {shown_resolution(decided_at, resolved_contact)}" if decided_at else None
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

"""Remedies for rows in error, by reason, and the contacts that the keys of a row match."""

from __future__ import annotations

from collections.abc import Mapping

from crm.outcome import Reason

#: A sentence for each reason. Roles, statuses and types are spelled as in the application.
REMEDIES = {
    Reason.UNKNOWN_ROLE: (
        "Set a known role for the profile (client, tax_preparer, affiliate), or one that is not migrated (lead, admin, "
        "super_admin)."
    ),
    Reason.UNKNOWN_STATUS: "Set a known status for the lead (NEW, CONTACTED, QUALIFIED, CONVERTED, DISQUALIFIED).",
    Reason.UNKNOWN_TYPE: "Set a known type for the lead (CUSTOMER, TAX_PREPARER, AFFILIATE).",
    Reason.INVALID_EMAIL: "Correct the email address in the application.",
    Reason.CONFLICT: (
        "Resolve the conflict with resolve_crm_conflict {row}: --contact {contacts} if that is the same person, "
        "--separate with another address if none is."
    ),
    Reason.STALE_DECISION: (
        "Resolve the conflict again with resolve_crm_conflict {row}: since the resolution, contact {contact} was "
        "deleted or got the address."
    ),
    Reason.MISSING_VALUE: "Set a value in the named column.",
    Reason.INVALID_VALUE: "Correct the value in the named column, which the application cannot read.",
    Reason.DUPLICATE_ID: "Give each row of the table its own id: several rows have this one.",
    Reason.UNREADABLE: "Ask the database administrator: PostgreSQL cannot read the row.",
    Reason.DATA_ERROR: "Correct the row in the application: the database refused it, see the other columns.",
}
REMEDY_OF_RESOLVED = "Nothing: the next run applies the resolution. To change it, use resolve_crm_conflict {row} again."
REMEDY_OF_OTHERS = "Check the row in the application."
REMEDY_OF_GONE = "Nothing: the row no longer exists in the application, and no run retries it."
#: The keys by which a row matches a contact: columns of `crm_contacts`. The id is derived from the row.
IDENTITY_KEYS = ("email", "userId", "clerkUserId", "id")


def keys_by_contact(
    contact_id: str | None, identity_keys: Mapping[str, str | None] | None
) -> dict[str | None, list[str]]:
    """Return the contacts that a ledger entry in error names, each with the keys of the row that match it.

    `identity_keys` are those of the entry, or None if an earlier version wrote it. The contact of an obsolete
    resolution may have no keys. Keys that match no contact are under None.
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
    """Return `keys_by_contact` as text, such as `c1 (email), c2 (userId)`."""
    return ", ".join(
        ("no contact" if contact is None else contact) + (f" ({', '.join(keys)})" if keys else "")
        for contact, keys in keys_by_contact(contact_id, identity_keys).items()
    )


def remedy(row: str, reason: str | None, contact_id: str | None, identity_keys: Mapping[str, str | None] | None) -> str:
    """Return the remedy for a row in error, given by its reference, such as `leads:<id>`."""
    if reason not in set(Reason):
        return REMEDY_OF_OTHERS
    by_contact = keys_by_contact(contact_id, identity_keys)
    contacts = " or ".join(contact for contact in by_contact if contact is not None)
    return REMEDIES[Reason(reason)].format(row=row, contact=contact_id, contacts=contacts)

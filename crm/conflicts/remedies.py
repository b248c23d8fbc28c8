"""What a person can do about a row in error, by its reason, and which contacts the row's keys lead to."""

from __future__ import annotations

from collections.abc import Mapping

from crm.outcome import Reason

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
#: The keys by which a row finds its contact: columns of `crm_contacts`. The id is the one that the row itself makes.
IDENTITY_KEYS = ("email", "userId", "clerkUserId", "id")


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

"""The judge: what a backfill must do, one row after another, on plain dicts.

It is slow, short and meant to be read beside the rules. It shares no code with the project, so that agreement means
something. Timestamps are aware (UTC), rates are Decimals, columns carry the names that the database gives them.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.core.exceptions import ValidationError
from django.core.validators import validate_email

Row = dict[str, Any]
Entry = dict[str, Any]
#: What a person says about a row in conflict: whose contact it is, or the address of one of its own.
Resolution = tuple[str | None, str | None]

PLACEHOLDER_DOMAIN = "crm-backfill.invalid"
SOURCES = (
    *("clients", "preparers", "affiliates"),
    *("converted_leads", "converted_intakes", "active_leads", "open_intakes"),
    *("lead_profiles", "signups"),
)
TABLES = ("profiles", "leads", "tax_intake_leads", "users")
SETTLED = ("created", "merged", "exists")

PROFILE_SOURCES = {
    "CLIENT": "clients",
    "TAX_PREPARER": "preparers",
    "AFFILIATE": "affiliates",
    "LEAD": "lead_profiles",
}
EXCLUDED_ROLES = {"SUPER_ADMIN": "super_admin", "ADMIN": "admin"}
# People who signed up and wait for approval: migrated only if asked for, and else excluded for this reason.
SIGNUP_SOURCES = {"lead_profiles": "lead", "signups": "no_profile"}
INTAKE_SOURCES = ("converted_intakes", "open_intakes")
PROFILE_TYPES = {"clients": "CLIENT", "preparers": "PREPARER", "affiliates": "AFFILIATE", "lead_profiles": "LEAD"}
#: The sources whose rows bring an account.
OF_ACCOUNTS = (*PROFILE_TYPES, "signups")
LEAD_TYPES = {"CUSTOMER": "LEAD", "TAX_PREPARER": "PREPARER", "AFFILIATE": "AFFILIATE"}
# The first of these stages that the database has. Without one, the row is excluded.
STAGES = {
    "NEW": ("NEW",),
    "CONTACTED": ("CONTACTED",),
    "QUALIFIED": ("QUALIFIED", "CONTACTED"),
    "CONVERTED": ("COMPLETE", "CLOSED"),
    "DISQUALIFIED": ("LOST",),
}

NULLABLE_ATTRIBUTION = (
    "referrerUsername",
    "referrerType",
    "commissionRate",
    "commissionRateLockedAt",
    "attributionMethod",
)
ATTRIBUTION = (*NULLABLE_ATTRIBUTION, "attributionConfidence")
COMMISSION = ("commissionRate", "commissionRateLockedAt")
CONTACT_COLUMNS = (
    *("id", "userId", "clerkUserId", "contactType", "firstName", "lastName", "email", "phone", "company"),
    *("stage", "stageEnteredAt", "source", "assignedPreparerId", "assignedAt"),
    *ATTRIBUTION,
    *("createdAt", "updatedAt", "lastContactedAt"),
)


@dataclass(frozen=True)
class Population:
    """The rows before a run, and what the run must know of their database."""

    generation: str
    stages: tuple[str, ...]
    has_clerk_user_id: bool
    users: list[Row] = field(default_factory=list)
    profiles: list[Row] = field(default_factory=list)
    leads: list[Row] = field(default_factory=list)
    tax_intake_leads: list[Row] = field(default_factory=list)
    contacts: list[Row] = field(default_factory=list)
    client_preparers: list[Row] = field(default_factory=list)
    assigns_to_referrer: bool = True


@dataclass
class Counts:
    """What one run counts. Dicts hold no zeros."""

    read: int = 0
    created: int = 0
    merged: int = 0
    exists: int = 0
    error: int = 0
    error_new: int = 0
    already: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    created_by_type: Counter[str] = field(default_factory=Counter)
    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    by_reason: Counter[str] = field(default_factory=Counter)
    assignments: Counter[str] = field(default_factory=Counter)


@dataclass
class Result:
    """Everything after a run: contacts by id, ledger entries by row reference, counts of this run; by contact the
    columns that merges filled."""

    contacts: dict[str, Row]
    ledger: dict[str, Entry]
    counts: Counts
    filled: dict[str, set[str]] = field(default_factory=dict)


class Rejected(Exception):  # noqa: N818 - a verdict on a row, not a failure of the program
    """The row ends in the ledger as an error."""

    def __init__(self, reason: str, contact_id: str | None = None, keys: dict[str, str | None] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.contact_id = contact_id
        self.keys = keys


def backfill(
    population: Population,
    *,
    ledger: Mapping[str, Entry] | None = None,
    only: Collection[str] | None = None,
    limit: int | None = None,
    resolutions: Mapping[str, Resolution] | None = None,
    placeholder_domain: str = PLACEHOLDER_DOMAIN,
    with_signups: bool = False,
) -> Result:
    """Run once: `ledger` is what earlier runs left, `only` the sources that are asked for (all, if None).

    Those of signups are read only `with_signups`; what earlier runs made of them stays accounted for.

    The run ends with the row of number `limit` of those without an entry; rows that are settled are not looked at. Rows
    with a resolution come last.
    """
    resolutions = resolutions or {}
    result = Result(
        contacts={contact["id"]: dict(contact) for contact in population.contacts},
        ledger={reference: dict(entry) for reference, entry in (ledger or {}).items()},
        counts=Counts(),
    )
    sources = _rows_by_source(population, result, with_signups=with_signups)
    new = 0
    for is_resolved in (False, True):
        for source, rows in sources.items():
            for table, row in rows if only is None or source in only else ():
                reference = f"{table}:{row['id']}"
                if (reference in resolutions) != is_resolved:
                    continue
                if _is_settled(result, reference):
                    result.counts.already += 1
                elif limit is None or new < limit:
                    new += reference not in (ledger or {})
                    _one_row(result, population, source, reference, row, placeholder_domain, resolutions.get(reference))
    return result


def _rows_by_source(population: Population, result: Result, *, with_signups: bool) -> dict[str, list[tuple[str, Row]]]:
    """The rows that a run of all sources looks at, in order. Counts the others, but those that are in the ledger."""
    without_profile = {user["id"] for user in users_without_profile(population)}
    sources: dict[str, list[tuple[str, Row]]] = {source: [] for source in SOURCES}
    for table, row in _rows_in_order(population):
        if table == "users" and not (row["id"] in without_profile or f"users:{row['id']}" in result.ledger):
            continue  # its profile stands for it
        excluded = exclusion(table, row, population.stages)
        if excluded:
            result.counts.excluded[excluded] += 1
            continue
        source = source_of(table, row)
        if with_signups or source not in SIGNUP_SOURCES:
            sources[source].append((table, row))
        elif f"{table}:{row['id']}" not in result.ledger:
            result.counts.excluded[SIGNUP_SOURCES[source]] += 1
    return sources


def _is_settled(result: Result, reference: str) -> bool:
    return reference in result.ledger and result.ledger[reference]["outcome"] in SETTLED


def _rows_in_order(population: Population) -> Iterator[tuple[str, Row]]:
    for profile in sorted(population.profiles, key=lambda row: row["id"]):
        yield "profiles", profile
    for lead in sorted(population.leads, key=lambda row: (row["createdAt"], row["id"])):
        yield "leads", lead
    for intake in sorted(population.tax_intake_leads, key=lambda row: (row["created_at"], row["id"])):
        yield "tax_intake_leads", intake
    for user in sorted(population.users, key=lambda row: row["id"]):
        yield "users", user


def updated_at_of(row: Row) -> Any:
    """When a source row was written last; an intake's column has another name."""
    return row["updated_at"] if "updated_at" in row else row["updatedAt"]


def users_without_profile(population: Population) -> list[Row]:
    """The users for whom no profile stands."""
    theirs = {profile["userId"] for profile in population.profiles}
    return [user for user in population.users if user["id"] not in theirs]


def exclusion(table: str, row: Row, stages: Collection[str]) -> str | None:
    """Why this row is not to be migrated, or None if it is."""
    if table == "profiles":
        return EXCLUDED_ROLES.get(label(row["role"]))
    if table == "tax_intake_leads":
        return "unqualified" if row.get("unqualified") and "LOST" not in stages else None
    if table == "users":
        return None
    return "disqualified" if label(row["status"]) == "DISQUALIFIED" and "LOST" not in stages else None


def source_of(table: str, row: Row) -> str:
    """Which of the sources a row that is to be migrated belongs to."""
    if table == "profiles":
        return PROFILE_SOURCES.get(label(row["role"]), "clients")
    if table == "tax_intake_leads":
        return "converted_intakes" if row.get("convertedToClient") else "open_intakes"
    if table == "users":
        return "signups"
    return "converted_leads" if label(row["status"]) == "CONVERTED" else "active_leads"


def _one_row(
    result: Result,
    population: Population,
    source: str,
    reference: str,
    row: Row,
    domain: str,
    resolution: Resolution | None,
) -> None:
    before = result.ledger.get(reference)
    try:
        draft = contact_of(population, source, row, domain)
        held = {key: contact["assignedPreparerId"] for key, contact in result.contacts.items()}
        outcome, contact_id = _land(result, population, source, row, draft, resolution)
        by = assignment_of(population, source, row)[2]
        if by and (by == UNRESOLVED[2] or result.contacts[contact_id]["assignedPreparerId"] != held.get(contact_id)):
            result.counts.assignments[by] += 1
        entry: Entry = {"source": source, "outcome": outcome, "reason": None, "contact_id": contact_id, "keys": None}
    except Rejected as error:
        entry = {"source": source, "outcome": "error", "reason": error.reason, "contact_id": error.contact_id}
        entry["keys"] = error.keys
    result.ledger[reference] = entry
    _count(result, before, entry)


def contact_of(population: Population, source: str, row: Row, domain: str = PLACEHOLDER_DOMAIN) -> Row:
    """The contact that a row makes if it meets none. Raises Rejected."""
    if source in PROFILE_TYPES:
        return contact_of_profile(population, source, row, domain)
    if source in INTAKE_SOURCES:
        return contact_of_intake(population, source, row)
    if source == "signups":
        return contact_of_signup(row)
    return contact_of_lead(population, source, row)


def _land(
    result: Result, population: Population, source: str, row: Row, draft: Row, resolution: Resolution | None
) -> tuple[str, str]:
    is_lead = source not in OF_ACCOUNTS
    if resolution is None:
        contact = find_of_row(population, result.ledger, result.contacts, source, row, draft)
    else:
        contact = find_resolved(draft, result.contacts, resolution)
        for key in ("userId", "clerkUserId"):
            if _holder(result.contacts, key, draft[key]) not in (None, contact):
                draft[key] = None
    if contact is None:
        result.contacts[draft["id"]] = draft
        return "created", draft["id"]
    made_here = {contact_id_of(ref) for ref, entry in result.ledger.items() if entry["outcome"] == "created"}
    if contact["id"] not in made_here and contact["id"] != draft["id"]:
        return "exists", contact["id"]
    before = dict(contact)
    if is_lead:
        fill_from_lead(contact, draft)
    else:
        fill_from_profile(contact, draft)
    result.filled.setdefault(contact["id"], set()).update(
        column for column in before if contact[column] != before[column]
    )
    return "merged", contact["id"]


def _count(result: Result, before: Entry | None, entry: Entry) -> None:
    counts, outcome, reason = result.counts, str(entry["outcome"]), entry["reason"]
    counts.read += 1
    setattr(counts, outcome, getattr(counts, outcome) + 1)
    counts.by_source.setdefault(str(entry["source"]), Counter())[outcome] += 1
    if outcome == "created":
        counts.created_by_type[result.contacts[str(entry["contact_id"])]["contactType"]] += 1
    if outcome == "error":
        counts.by_reason[str(reason)] += 1
        counts.error_new += not (before and before["outcome"] == "error" and before["reason"] == reason)


def contact_of_profile(population: Population, source: str, row: Row, domain: str) -> Row:
    """The contact that a profile makes if it meets none."""
    if label(row["role"]) not in PROFILE_SOURCES:
        raise Rejected("unknown_role")
    raw_email = raw_email_of(population, row)
    if not address_of(raw_email):
        email = f"{placeholder_name(PROFILE_TYPES[source].lower(), row['id'])}@{domain}"
    else:
        email = valid_email(raw_email)
    preparer, assigned_at, _ = assignment_of_profile(population, source, row)
    return {
        "id": contact_id_of(f"profiles:{row['id']}"),
        "userId": row["userId"],
        "clerkUserId": row["clerkUserId"] if population.has_clerk_user_id else None,
        "contactType": PROFILE_TYPES[source],
        "firstName": trimmed(row["firstName"]) or "Unknown",
        "lastName": trimmed(row["lastName"]) or "Unknown",
        "email": email,
        "phone": trimmed(row["phone"]),
        "company": trimmed(row["companyName"]),
        "stage": "NEW",
        "stageEnteredAt": row["createdAt"],
        "source": "signup" if source in SIGNUP_SOURCES else "backfill",
        "assignedPreparerId": preparer,
        "assignedAt": assigned_at,
        **dict.fromkeys(NULLABLE_ATTRIBUTION),
        "attributionConfidence": 100,
        "createdAt": row["createdAt"],
        "updatedAt": row["updatedAt"],
        "lastContactedAt": None,
    }


def raw_email_of(population: Population, row: Row) -> str:
    """A profile's email as it is stored: its user's, else its own, which some generations have; blank for none."""
    of_user = next((user["email"] for user in population.users if user["id"] == row["userId"]), "")
    return of_user if address_of(of_user) else row.get("email") or ""


def contact_of_signup(row: Row) -> Row:
    """The contact that a user without a profile makes if it meets none. A name's first word is the first name."""
    first_name, *others = (row.get("name") or "").split(maxsplit=1)[:2] or [""]
    return {
        **dict.fromkeys(CONTACT_COLUMNS),
        "id": contact_id_of(f"users:{row['id']}"),
        "userId": row["id"],
        "contactType": "LEAD",
        "firstName": first_name or "Unknown",
        "lastName": trimmed("".join(others)) or "Unknown",
        "email": valid_email(row["email"]),
        "stage": "NEW",
        "stageEnteredAt": row["createdAt"],
        "source": "signup",
        "attributionConfidence": 100,
        "createdAt": row["createdAt"],
        "updatedAt": row["updatedAt"],
    }


def contact_of_lead(population: Population, source: str, row: Row) -> Row:
    """The contact that a lead makes if it meets none."""
    if label(row["status"]) not in STAGES:
        raise Rejected("unknown_status")
    contact_type = "CLIENT" if source == "converted_leads" else LEAD_TYPES.get(label(row["type"]))
    if contact_type is None:
        raise Rejected("unknown_type")
    stage = next(stage for stage in STAGES[label(row["status"])] if stage in population.stages)
    preparer, assigned_at, _ = assignment_of_lead(population, row)
    return {
        "id": contact_id_of(f"leads:{row['id']}"),
        "userId": None,
        "clerkUserId": None,
        "contactType": contact_type,
        "firstName": trimmed(row["firstName"]) or "Unknown",
        "lastName": trimmed(row["lastName"]) or "Unknown",
        "email": valid_email(row["email"]),
        "phone": trimmed(row["phone"]),
        "company": None,
        "stage": stage,
        "stageEnteredAt": stage_entered_at(stage, row),
        "source": trimmed(row["source"]) or "lead_form",
        "assignedPreparerId": preparer,
        "assignedAt": assigned_at,
        **{column: row[column] for column in ATTRIBUTION},
        "createdAt": row["createdAt"],
        "updatedAt": row["updatedAt"],
        "lastContactedAt": row["lastContactedAt"],
    }


def contact_of_intake(population: Population, source: str, row: Row) -> Row:
    """The contact that an intake makes if it meets none. Columns that its generation lacks are not in the row."""
    converted, unqualified = source == "converted_intakes", row.get("unqualified")
    if unqualified:
        stage, entered = "LOST", row.get("unqualifiedAt") or row["updated_at"]
    elif converted:
        stage = next(stage for stage in STAGES["CONVERTED"] if stage in population.stages)
        entered = row.get("convertedAt") or row["updated_at"]
    elif row.get("lastContactedAt"):
        stage, entered = "CONTACTED", row["lastContactedAt"]
    else:
        stage, entered = "NEW", row["created_at"]
    phone, country = trimmed(row["phone"]), trimmed(row.get("country_code"))
    if phone and country and country != "+1" and "+" not in phone:
        phone = f"{country} {phone}"
    preparer, assigned_at, _ = assignment_of_intake(population, row)
    is_referred = trimmed(row.get("referrerUsername")) is not None
    method = row.get("attributionMethod") if is_referred else None
    return {
        "id": contact_id_of(f"tax_intake_leads:{row['id']}"),
        "userId": None,
        "clerkUserId": None,
        "contactType": "CLIENT" if converted else "LEAD",
        "firstName": trimmed(row["first_name"]) or "Unknown",
        "lastName": trimmed(row["last_name"]) or "Unknown",
        "email": valid_email(row["email"]),
        "phone": phone,
        "company": None,
        "stage": stage,
        "stageEnteredAt": entered,
        "source": "tax_intake_form",
        "assignedPreparerId": preparer,
        "assignedAt": assigned_at,
        "referrerUsername": row["referrerUsername"] if is_referred else None,
        "referrerType": row.get("referrerType") if is_referred else None,
        "commissionRate": None,
        "commissionRateLockedAt": None,
        "attributionMethod": method,
        "attributionConfidence": {"email_match": 90, "phone_match": 85}.get(str(method), 100),
        "createdAt": row["created_at"],
        "updatedAt": row["updated_at"],
        "lastContactedAt": row.get("lastContactedAt"),
    }


def find_of_row(
    population: Population, ledger: Mapping[str, Entry], contacts: Mapping[str, Row], source: str, row: Row, draft: Row
) -> Row | None:
    """The contact that a row's person already has. Raises Rejected if the keys name two accounts."""
    is_named = source in INTAKE_SOURCES and row.get("profileId") in {profile["id"] for profile in population.profiles}
    if is_named and (contact := _settled(ledger, contacts, f"profiles:{row['profileId']}")) is not None:
        return contact
    if source in OF_ACCOUNTS:
        return find(draft, contacts, _settled(ledger, contacts, f"users:{draft['userId']}"))
    return find(draft, contacts, contact_of_the_profile(population, ledger, contacts, draft))


def contact_of_the_profile(
    population: Population, ledger: Mapping[str, Entry], contacts: Mapping[str, Row], draft: Row
) -> Row | None:
    """What a profile met, or made, that has the address of a lead or an intake: another address may be there.

    So it is with users who were migrated without a profile, which come after the profiles.
    """
    emails = [(f"profiles:{profile['id']}", raw_email_of(population, profile)) for profile in population.profiles]
    emails += [(f"users:{user['id']}", user["email"]) for user in population.users]
    theirs = [(raw != draft["email"], reference) for reference, raw in emails if address_of(raw) == draft["email"]]
    found = (_settled(ledger, contacts, reference) for _, reference in sorted(theirs))
    return next((contact for contact in found if contact is not None), None)


def _settled(ledger: Mapping[str, Entry], contacts: Mapping[str, Row], reference: str) -> Row | None:
    """The contact that a row met or made, if it is still there."""
    entry = ledger.get(reference)
    return contacts.get(str(entry["contact_id"])) if entry and entry["outcome"] in SETTLED else None


def find(draft: Row, contacts: Mapping[str, Row], of_the_profile: Row | None = None) -> Row | None:
    """The contact that this draft's person already has. Raises Rejected if the keys name two accounts."""
    by_user = _holder(contacts, "userId", draft["userId"])
    by_clerk = _holder(contacts, "clerkUserId", draft["clerkUserId"])
    keys = keys_of(draft, contacts)
    if by_user and by_clerk and by_user is not by_clerk:
        raise Rejected("conflict", by_user["id"], keys)
    same_email = _with_the_address(draft["email"], contacts)
    candidate = by_user or by_clerk
    if candidate and same_email and candidate not in same_email:
        raise Rejected("conflict", same_email[0]["id"], keys)
    if same_email:
        candidate = candidate or same_email[0]
        for key in ("userId", "clerkUserId"):
            if None not in (candidate[key], draft[key]) and candidate[key] != draft[key]:
                raise Rejected("conflict", candidate["id"], keys)
    # The row's own contact under keys that people changed since: a row never yields two contacts. Then the profile's.
    return candidate or contacts.get(draft["id"]) or of_the_profile


def keys_of(draft: Row, contacts: Mapping[str, Row]) -> dict[str, str | None]:
    """By key of this draft's person: the contact that has it, None where there is none. The own id only if there is."""
    keys: dict[str, str | None] = {}
    for key in ("userId", "clerkUserId"):
        if draft[key]:
            holder = _holder(contacts, key, draft[key])
            keys[key] = holder["id"] if holder else None
    same_email = [contact["id"] for contact in _with_the_address(draft["email"], contacts)]
    # Another key may tell which of several spellings is meant.
    keys["email"] = next((found for found in same_email if found in keys.values()), (*same_email, None)[0])
    return keys | ({"id": draft["id"]} if draft["id"] in contacts else {})


def _with_the_address(email: str, contacts: Mapping[str, Row]) -> list[Row]:
    return sorted(
        (contact for contact in contacts.values() if address_of(contact["email"]) == email),
        key=lambda contact: (contact["email"] != email, contact["createdAt"], contact["id"]),
    )


def find_resolved(draft: Row, contacts: Mapping[str, Row], resolution: Resolution) -> Row | None:
    """The contact of the resolution. Raises Rejected if it is gone, or the address of its own taken."""
    contact_id, email = resolution
    if contact_id is not None:
        if contact_id not in contacts:
            raise Rejected("stale_decision", contact_id, keys_of(draft, contacts))
        return contacts[contact_id]
    draft["email"] = email
    for contact in _with_the_address(str(email), contacts):
        if contact["id"] != draft["id"]:
            raise Rejected("stale_decision", contact["id"], keys_of(draft, contacts))
    return contacts.get(draft["id"])


def _holder(contacts: Mapping[str, Row], key: str, value: str | None) -> Row | None:
    return next((contact for contact in contacts.values() if value is not None and contact[key] == value), None)


def fill_from_profile(contact: Row, draft: Row) -> None:
    """A profile merges: identity keys, phone, company and the assignment as a unit, where there is nothing."""
    for column in ("userId", "clerkUserId", "phone", "company"):
        if contact[column] is None:
            contact[column] = draft[column]
    _fill_assignment(contact, draft)


def fill_from_lead(contact: Row, draft: Row) -> None:
    """A lead merges: attribution and assignment as units, phone and last contact, where there is nothing.

    An attribution is there where it names a referrer; one that has no rate as yet is completed by the same referrer's.
    """
    _fill_assignment(contact, draft)
    if referrer(draft) and not referrer(contact):
        contact.update({column: draft[column] for column in ATTRIBUTION})
    elif (
        referrer(draft)
        and referrer(draft) == referrer(contact)
        and contact["commissionRate"] is None
        and draft["commissionRate"] is not None
    ):
        contact.update({column: draft[column] for column in COMMISSION})
    for column in ("phone", "lastContactedAt"):
        if contact[column] is None:
            contact[column] = draft[column]


def referrer(row: Row) -> str:
    """Who referred the person, without case; empty for nobody."""
    return (row["referrerUsername"] or "").strip().lower()


def _fill_assignment(contact: Row, draft: Row) -> None:
    unassigned = contact["assignedPreparerId"] is None and contact["assignedAt"] is None
    if unassigned and draft["assignedPreparerId"] is not None:
        contact.update({column: draft[column] for column in ("assignedPreparerId", "assignedAt")})


def contact_id_of(reference: str) -> str:
    """The id of the contact that a row, given as `<table>:<id>`, makes."""
    return "c" + hashlib.sha256(reference.encode()).hexdigest()[:24]


def label(raw: str) -> str:
    """A role, status or type without its spelling."""
    return raw.upper().replace("-", "_").replace(" ", "_")


def trimmed(raw: str | None) -> str | None:
    """Text without white space around it; None if nothing is left."""
    return (raw or "").strip() or None


def placeholder_name(kind: str, profile_id: str) -> str:
    """What stands before the @ where a profile has no address; an id that is not in lower case brings its hash."""
    hashed = hashlib.sha256(profile_id.encode()).hexdigest()[:12]
    return f"{kind}-{profile_id}" if profile_id == profile_id.lower() else f"{kind}-{profile_id.lower()}-{hashed}"


#: What nobody sees and Unicode does not count among its spaces, controls and format characters.
_BLANKS = {
    chr(code)
    for code in (
        *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x2800, 0x3164, 0xFFA0),
        *(*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFFE), *range(0xE0000, 0xE1000)),
        *range(0x13439, 0x13440),  # format characters since Unicode 15
    )
}


def _is_seen(character: str) -> bool:
    return character not in _BLANKS and unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp")


def address_of(raw: str) -> str:
    """The address by which people are told apart: without what nobody sees at its ends, without case."""
    seen = [number for number, character in enumerate(raw) if _is_seen(character)]
    folded = ((character, character.lower()) for character in (raw[seen[0] : seen[-1] + 1] if seen else ""))
    return "".join(
        low if len(low) == 1 and low.isascii() == character.isascii() else character for character, low in folded
    )


def valid_email(raw: str) -> str:
    """The address. Raises Rejected if it is none."""
    email = address_of(raw)
    if not all(_is_seen(character) or character == " " for character in email):
        raise Rejected("invalid_email")
    try:
        validate_email(email)
    except ValidationError:
        raise Rejected("invalid_email") from None
    if not email.rpartition("@")[0].isascii():
        raise Rejected("invalid_email")
    return email


#: The preparer, since when, and where the row has it from: nothing at all, or one whom nobody can resolve.
Assignment = tuple[str | None, Any, str | None]
UNASSIGNED: Assignment = (None, None, None)
UNRESOLVED: Assignment = (None, None, "unresolved_preparer")


def assignment_of(population: Population, source: str, row: Row) -> Assignment:
    """The preparer that a row gives to a contact."""
    if source in PROFILE_TYPES:
        return assignment_of_profile(population, source, row)
    if source in INTAKE_SOURCES:
        return assignment_of_intake(population, row)
    return UNASSIGNED if source == "signups" else assignment_of_lead(population, row)


def assignment_of_profile(population: Population, source: str, row: Row) -> Assignment:
    """Of a client's active preparers the one who was assigned last."""
    active = [
        each
        for each in population.client_preparers
        if source == "clients" and label(row["role"]) == "CLIENT" and each["clientId"] == row["id"] and each["isActive"]
    ]
    active.sort(key=lambda each: each["id"])
    for latest in sorted(active, key=lambda each: each["assignedAt"], reverse=True):
        if trimmed(latest["preparerId"]) is None:
            return UNASSIGNED
        preparer = preparer_of(population, latest["preparerId"])
        return (preparer, latest["assignedAt"], "client_preparers") if preparer else UNRESOLVED
    return UNASSIGNED


def assignment_of_lead(population: Population, row: Row) -> Assignment:
    """The lead's own preparer; without one, whoever referred it, if that is a tax preparer."""
    updated_at = updated_at_of(row)
    if trimmed(row.get("assignedPreparerId")) is not None:
        preparer = preparer_of(population, row["assignedPreparerId"])
        return (preparer, updated_at, "own") if preparer else UNRESOLVED
    preparer = referring_preparer(population, row.get("referrerUsername"))
    return (preparer, updated_at, "referrer") if preparer else UNASSIGNED


def assignment_of_intake(population: Population, row: Row) -> Assignment:
    """As a lead's; but of a person's intakes the latest that names a preparer stands for all of them.

    A person's are those with the same address as stored, or the same profile, if its role makes it a contact.
    """
    profile = next((profile for profile in population.profiles if profile["id"] == row.get("profileId")), None)
    is_person = profile is not None and label(profile["role"]) in ("CLIENT", "TAX_PREPARER", "AFFILIATE")
    theirs = [
        other
        for other in population.tax_intake_leads
        if other["email"] == row["email"] or (is_person and other.get("profileId") == row["profileId"])
    ]
    naming = [other for other in theirs if trimmed(other.get("assignedPreparerId")) is not None]
    latest = max(naming, key=lambda other: (other["created_at"], other["id"]), default=row)
    return assignment_of_lead(population, row) if latest is row else UNASSIGNED


def preparer_of(population: Population, raw: str) -> str | None:
    """A profile's id, also where a user's was stored; what is neither is nobody."""
    if any(profile["id"] == raw for profile in population.profiles):
        return raw
    return next((profile["id"] for profile in population.profiles if profile["userId"] == raw), None)


def referring_preparer(population: Population, username: str | None) -> str | None:
    """The tax preparer who has this code: whoever has it exactly, or else, without case and space around it."""
    name = trimmed(username)
    if name is None or not population.assigns_to_referrer:
        return None
    columns = ("trackingCode", "customTrackingCode", "shortLinkUsername")
    coded = [
        (rank, profile["id"], profile[column], label(profile["role"]) == "TAX_PREPARER")
        for profile in population.profiles
        for rank, column in enumerate(columns)
        if profile.get(column) is not None
    ]
    meant = [each for each in coded if each[2] == name] or [each for each in coded if _folded(each[2]) == _folded(name)]
    preparers = [(rank, identifier) for rank, identifier, _, is_preparer in meant if is_preparer]
    return min(preparers)[1] if preparers else None


def _folded(username: str) -> str:
    return "".join(letter.lower() if letter.isascii() else letter for letter in username.strip())


def stage_entered_at(stage: str, row: Row) -> Any:
    """The closest recorded truth."""
    if stage == "NEW":
        return row["createdAt"]
    return (stage == "CONTACTED" and row["lastContactedAt"]) or row["updatedAt"]

"""What `repair_crm_contacts` corrects in a contact that was created elsewhere. Pure: no database.

The CRM shows a preparer only the contacts that are assigned to the id of the preparer's profile; some are assigned to
the user's id. The script that the backfill replaces gave contacts the wrong type where it did not recognise the role,
and invented addresses in a real domain for profiles without one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from crm.outcome import Repair, Totals, UpdateOutcome
from crm.rules.addresses import canonical_address
from crm.rules.mapping import (
    CONTACT_TYPE_OF_SOURCE,
    EXCLUDED_ROLES,
    PROFILE_ORIGIN,
    SOURCE_OF_ROLE,
    ContactDraft,
    Rules,
    email_of_profile,
    normalised,
    normalised_email,
    placeholder_name,
)
from crm.rules.source_rows import ProfileRow

#: The domain of the addresses that the script invented: `<kind>-<profile id>@unknown.com`.
OLD_DOMAIN = "unknown.com"
_INVENTED = re.compile(r"([a-z_]+)-(.+)@([^@]+)", re.IGNORECASE | re.DOTALL)
#: A role whose people have a type, although the backfill excludes them: they wait for approval.
_LEAD = "LEAD"

#: What a record of a repair names as changed. An invented address is replaced by a real one or by a placeholder.
PREPARER, TYPE, EMAIL, PLACEHOLDER = "assigned_preparer_id", "contact_type", "email", "placeholder"
#: The column that is written, by that name.
COLUMN_OF_CHANGE = {PREPARER: PREPARER, TYPE: TYPE, EMAIL: EMAIL, PLACEHOLDER: EMAIL}


class KeepCause(StrEnum):
    """Why a contact keeps a value that a repair is about."""

    NO_PROFILE = "no_profile"  # no profile has the id or the keys
    AMBIGUOUS = "ambiguous"  # they lead to several profiles
    INVALID_PROFILE = "invalid_profile"  # the profile cannot be read, or has no updatedAt
    MODIFIED = "modified"  # a person may have changed the contact since the script created it
    EXCLUDED_ROLE = "excluded_role"  # the backfill creates no contact for the profile's role
    UNKNOWN_ROLE = "unknown_role"
    CONFLICT = "conflict"  # another contact has the address
    REFUSED = "refused"  # PostgreSQL refused the change


class RepairOutcome(NamedTuple):
    """The result of a repair for a contact: `changed` and `value` are set if it is to be written.

    `changed` names the change, as in its record; `value` is that of its column. `profile` is the profile that it comes
    from, if there is one.
    """

    repair: Repair
    contact: ContactDraft
    outcome: UpdateOutcome = UpdateOutcome.UNCHANGED
    cause: KeepCause | None = None
    profile: ProfileRow | None = None
    changed: str = ""
    value: str = ""

    @property
    def column(self) -> str:
        """The field of the contact that is written."""
        return COLUMN_OF_CHANGE[self.changed]

    def kept(self, cause: KeepCause) -> RepairOutcome:
        """Return the result with the contact left unchanged."""
        return self._replace(outcome=UpdateOutcome.KEPT, cause=cause, changed="", value="")


class _KeptError(Exception):
    def __init__(self, cause: KeepCause) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(slots=True)
class Profiles:
    """The profiles that contacts of a batch may refer to, by each of their keys.

    `invalid` are the ids of profiles that cannot be used. Profiles of several rows with one id are among them.
    """

    by_id: dict[str, ProfileRow] = field(default_factory=dict)
    invalid: Collection[str] = ()
    _by_user: dict[str, set[str]] = field(default_factory=dict)
    _by_clerk: dict[str, set[str]] = field(default_factory=dict)
    _by_email: dict[str, set[str]] = field(default_factory=dict)

    def add(self, profile: ProfileRow) -> None:
        """Add a profile."""
        self.by_id[profile.id] = profile
        if profile.user_id:
            self._by_user.setdefault(profile.user_id, set()).add(profile.id)
        if profile.clerk_user_id:
            self._by_clerk.setdefault(profile.clerk_user_id, set()).add(profile.id)
        if email := email_of_profile(profile):
            self._by_email.setdefault(canonical_address(email), set()).add(profile.id)

    def has(self, profile_id: str) -> bool:
        """Return whether a profile has this id, also one that cannot be used."""
        return profile_id in self.by_id or profile_id in self.invalid

    def of_user(self, user_id: str) -> ProfileRow:
        """Return the profile of a user."""
        return self._only(self._by_user.get(user_id, set()))

    def of_id(self, profile_id: str) -> ProfileRow:
        """Return the profile with this id."""
        return self._only({profile_id} if self.has(profile_id) else set())

    def of_person(self, contact: ContactDraft, domain: str) -> ProfileRow:
        """Return the profile of a contact: by its accounts, or for a contact without any by its address.

        `domain` is that of the placeholders of the backfill.
        """
        if is_without_account(contact):
            name = invented(contact.email, OLD_DOMAIN, domain)
            if name is not None and self.has(name.profile_id):
                return self.of_id(name.profile_id)
            return self._only(self._by_email.get(canonical_address(contact.email or ""), set()))
        by_user = self._by_user.get(contact.user_id or "", set())
        return self._only(by_user | self._by_clerk.get(contact.clerk_user_id or "", set()))

    def _only(self, ids: Collection[str]) -> ProfileRow:
        if not ids:
            raise _KeptError(KeepCause.NO_PROFILE)
        if len(ids) > 1:
            raise _KeptError(KeepCause.AMBIGUOUS)
        (profile_id,) = ids
        profile = self.by_id.get(profile_id)
        if profile is None or profile_id in self.invalid or profile.updated_at is None:
            raise _KeptError(KeepCause.INVALID_PROFILE)
        return profile


class Given(Protocol):
    """A set of addresses. That of a dry run may be of any size."""

    def __contains__(self, address: object) -> bool:
        """Return whether the address was added."""

    def add(self, address: str) -> None:
        """Add an address."""


class Invented(NamedTuple):
    """The parts of an address that was made up for a profile without one."""

    kind: str
    profile_id: str


def invented(email: str | None, *domains: str) -> Invented | None:
    """Return the parts of an address that was made up in one of these domains, or None for any other address."""
    found = _INVENTED.fullmatch(email or "")
    return Invented(found[1].lower(), found[2]) if found and found[3].lower() in domains else None


def old_placeholder(email: str | None) -> Invented | None:
    """Return the parts of an address that the script made up, or None for any other address."""
    return invented(email, OLD_DOMAIN)


def is_without_account(contact: ContactDraft) -> bool:
    """Return whether a contact has neither of the keys by which its profile is found."""
    return not contact.user_id and not contact.clerk_user_id


def is_untouched(contact: ContactDraft, rules: Rules) -> bool:
    """Return whether a contact seems to be as the script created it.

    Prisma sets `createdAt` and `updatedAt` of a new row to the same time, and moves `updatedAt` with every write. The
    newest version of the application does not, so a contact that has left the first stage counts as modified, too.
    """
    return contact.updated_at == contact.created_at and contact.stage == rules.stages["NEW"]


def type_of_role(label: str | None) -> str:
    """Return the contact type of a profile with this role."""
    role = normalised(label or "")
    if role == _LEAD:
        return _LEAD
    if (source := SOURCE_OF_ROLE.get(role)) is not None:
        return CONTACT_TYPE_OF_SOURCE[source]
    raise _KeptError(KeepCause.EXCLUDED_ROLE if role in EXCLUDED_ROLES else KeepCause.UNKNOWN_ROLE)


def real_address(profile: ProfileRow) -> str | None:
    """Return the email address of a profile in canonical form, as the mapping does, or None if it has no valid one."""
    email = email_of_profile(profile)
    return normalised_email(email) if email else None


def placeholder_of(profile: ProfileRow, old_kind: str, domain: str) -> str:
    """Return the placeholder that the backfill gives to this profile, so that the profile finds this contact by it.

    For a role without contacts, the kind is that of the address that the script invented.
    """
    source = SOURCE_OF_ROLE.get(normalised(profile.role or ""))
    kind = CONTACT_TYPE_OF_SOURCE[source].lower() if source else old_kind
    return f"{placeholder_name(kind, profile.id)}@{domain}"


def is_placeholder_of(profile_id: str, email: str, old: str | None) -> bool:
    """Return whether an address is a placeholder that a repair gave a profile, whatever its role and the domain were.

    `old` is the address that the script invented.
    """
    kinds = [contact_type.lower() for contact_type in CONTACT_TYPE_OF_SOURCE.values()]
    if (before := old_placeholder(old)) is not None:
        kinds.append(before.kind)
    return email != old and email.rpartition("@")[0] in {placeholder_name(kind, profile_id) for kind in kinds}


def decide(
    contacts: Iterable[ContactDraft], repairs: Collection[Repair], profiles: Profiles, rules: Rules
) -> list[RepairOutcome]:
    """Return the result of each repair that applies to a contact, before `keep_conflicts`."""
    found = (_RULES[repair](contact, profiles, rules) for contact in contacts for repair in Repair if repair in repairs)
    return [outcome for outcome in found if outcome is not None]


def keep_conflicts(
    outcomes: Iterable[RepairOutcome], owners: Mapping[str, Collection[str]], given: Given
) -> list[RepairOutcome]:
    """Return the results, where a contact keeps its invented address if another contact has or gets the real one.

    `owners` are the ids of the contacts that have an address, by its canonical form. `given` are the addresses that
    earlier contacts get; those of this call are added.
    """
    settled = []
    for found in outcomes:
        outcome = found
        if found.changed and found.column == EMAIL:
            if found.value in given or set(owners.get(found.value, ())) - {found.contact.id}:
                outcome = found.kept(KeepCause.CONFLICT)
            else:
                given.add(found.value)
        settled.append(outcome)
    return settled


def _repair_preparer_id(contact: ContactDraft, profiles: Profiles, _rules: Rules) -> RepairOutcome | None:
    preparer = contact.assigned_preparer_id
    if preparer is None or not preparer.strip():
        return None
    found = RepairOutcome(Repair.PREPARER_IDS, contact)
    if profiles.has(preparer):
        return found
    try:
        profile = profiles.of_user(preparer)
    except _KeptError as error:
        return found.kept(error.cause)
    return _to_write(found, profile, PREPARER, profile.id)


def _repair_type(contact: ContactDraft, profiles: Profiles, rules: Rules) -> RepairOutcome | None:
    if contact.source != PROFILE_ORIGIN:
        return None
    found = RepairOutcome(Repair.TYPES, contact)
    try:
        profile = profiles.of_person(contact, rules.placeholder_domain)
        found = found._replace(profile=profile)
        wanted = type_of_role(profile.role)
    except _KeptError as error:
        return found.kept(error.cause)
    if contact.contact_type == wanted:
        return found
    return _to_write(found, profile, TYPE, wanted) if is_untouched(contact, rules) else found.kept(KeepCause.MODIFIED)


def _repair_placeholder(contact: ContactDraft, profiles: Profiles, rules: Rules) -> RepairOutcome | None:
    old = old_placeholder(contact.email)
    if old is None:
        return None
    found = RepairOutcome(Repair.PLACEHOLDERS, contact)
    try:
        profile = profiles.of_id(old.profile_id)
    except _KeptError as error:
        return found.kept(error.cause)
    found = found._replace(profile=profile)
    address, changed = real_address(profile), EMAIL
    if address is None:
        address, changed = placeholder_of(profile, old.kind, rules.placeholder_domain), PLACEHOLDER
    return found if address == contact.email else _to_write(found, profile, changed, address)


def _to_write(found: RepairOutcome, profile: ProfileRow, changed: str, value: str) -> RepairOutcome:
    return found._replace(outcome=UpdateOutcome.UPDATED, profile=profile, changed=changed, value=value)


_Rule = Callable[[ContactDraft, Profiles, Rules], RepairOutcome | None]
_RULES: Mapping[Repair, _Rule] = {
    Repair.PREPARER_IDS: _repair_preparer_id,
    Repair.TYPES: _repair_type,
    Repair.PLACEHOLDERS: _repair_placeholder,
}


def totals_by_repair(outcomes: Iterable[RepairOutcome]) -> dict[Repair, Totals]:
    """Return the counts of results by repair: those that change a contact by column, the kept ones by cause."""
    by_repair: dict[Repair, list[RepairOutcome]] = {}
    for outcome in outcomes:
        by_repair.setdefault(outcome.repair, []).append(outcome)
    return {repair: _totals_of(by_repair[repair]) for repair in Repair if repair in by_repair}


def _totals_of(outcomes: Collection[RepairOutcome]) -> Totals:
    counts = Counter(found.outcome for found in outcomes)
    return Totals(
        revisited=len(outcomes),
        updated=counts[UpdateOutcome.UPDATED],
        kept=counts[UpdateOutcome.KEPT],
        unchanged=counts[UpdateOutcome.UNCHANGED],
        updated_by_column=Counter(found.changed for found in outcomes if found.changed),
        kept_by_column=Counter(found.cause.value for found in outcomes if found.cause),
    )

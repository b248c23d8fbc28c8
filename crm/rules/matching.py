"""Matches mapped rows with existing contacts, and returns the outcome of each row. Pure: no database.

Rows are matched one after another: later rows find what earlier rows created or filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crm.outcome import ASSIGNMENT, Outcome, Reason, Refusal, RowOutcome
from crm.rules.addresses import canonical_address
from crm.rules.mapping import ATTRIBUTION_UNIT, ContactDraft, MappedRow, Resolution, referrer

#: The accounts of a person. At most one contact has each.
ACCOUNTS = ("user_id", "clerk_user_id")
#: The empty fields that a profile fills in a contact of the backfill.
PROFILE_FILLS = (*ACCOUNTS, "phone", "company")
#: The fields that complete an attribution without a rate.
COMMISSION_UNIT = ("commission_rate", "commission_rate_locked_at")
#: The parts of an attribution that a row can fill, by the name under which they are reported.
ATTRIBUTION_PARTS: Mapping[str, tuple[str, ...]] = {"attribution": ATTRIBUTION_UNIT, "commission": COMMISSION_UNIT}
ASSIGNMENT_UNIT = ("assigned_preparer_id", "assigned_at")
_FILLED_ALONE = (*PROFILE_FILLS, "last_contacted_at")


@dataclass(slots=True)
class ExistingContact:
    """An existing contact, with the fields that matching needs. `ours` is True if the backfill created it."""

    id: str
    email: str
    user_id: str | None
    clerk_user_id: str | None
    ours: bool
    phone: str | None = None
    company: str | None = None
    has_assignment: bool = False
    last_contacted_at: str | None = None
    #: The values of ATTRIBUTION_UNIT.
    attribution: tuple[Any, ...] = (None,) * len(ATTRIBUTION_UNIT)
    updated_at: str | None = None
    fills: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_draft(cls, draft: ContactDraft) -> ExistingContact:
        """Return the contact that a draft of this batch becomes."""
        return cls(
            draft.id,
            draft.email,
            draft.user_id,
            draft.clerk_user_id,
            ours=True,
            phone=draft.phone,
            company=draft.company,
            has_assignment=draft.assigned_preparer_id is not None or draft.assigned_at is not None,
            last_contacted_at=draft.last_contacted_at,
            attribution=attribution_of(draft),
            updated_at=draft.updated_at,
        )

    @property
    def referrer(self) -> str | None:
        """The username of the referrer in its compared spelling; None if there is none."""
        return referrer(self.attribution[ATTRIBUTION_UNIT.index("referrer_username")])

    @property
    def has_rate(self) -> bool:
        """Whether the attribution has a rate."""
        return self.attribution[ATTRIBUTION_UNIT.index("commission_rate")] is not None

    def take(self, values: Mapping[str, Any]) -> None:
        """Set these values in empty fields."""
        for name in _FILLED_ALONE:
            if getattr(self, name) is None:
                setattr(self, name, values.get(name))
        self.has_assignment = self.has_assignment or any(values.get(name) is not None for name in ASSIGNMENT_UNIT)
        if self.referrer is None:
            self.attribution = tuple(map(values.get, ATTRIBUTION_UNIT, self.attribution))
        elif not self.has_rate:
            self.attribute({name: values[name] for name in COMMISSION_UNIT if name in values})

    def attribute(self, values: Mapping[str, Any]) -> None:
        """Set these fields of the attribution."""
        self.attribution = tuple(map(values.get, ATTRIBUTION_UNIT, self.attribution))


class Conflict(Exception):  # noqa: N818 - an outcome of a row, not a failure of the program
    """The row's keys belong to two accounts, or its resolution is stale: a person must resolve it."""

    def __init__(
        self, contact_id: str, identity_keys: Mapping[str, str | None], reason: Reason = Reason.CONFLICT
    ) -> None:
        super().__init__(reason)
        self.contact_id = contact_id
        self.identity_keys = identity_keys
        self.reason = reason


class ProfileOfAddress(NamedTuple):
    """A migrated profile whose user has an address. In order, the one whose user has the canonical form is first."""

    address: str
    is_spelled_otherwise: bool
    profile_id: str
    contact_id: str

    @classmethod
    def of(cls, raw_email: str, profile_id: str, contact_id: str) -> ProfileOfAddress:
        """Return the profile with this id and the stored address of its user."""
        address = canonical_address(raw_email)
        return cls(address, raw_email != address, profile_id, contact_id)


class ExistingContacts:
    """The contacts that a batch can match, by each of their keys."""

    def __init__(
        self,
        contacts: Iterable[ExistingContact] = (),
        profiles: Iterable[ProfileOfAddress] = (),
        contacts_of_profiles: Mapping[str, str] | None = None,
        contacts_of_signups: Mapping[str, str] | None = None,
    ) -> None:
        """Create the index.

        Arguments:
            contacts: The contacts, ordered by creation: of several spellings of an address, the oldest is first.
            profiles: The profiles whose users have an address of the rows of the batch.
            contacts_of_profiles: The contacts of the migrated profiles to which the rows refer, by profile id.
            contacts_of_signups: The contacts of the rows' users who were migrated without a profile, by user id.
        """
        self._contacts_of_profiles = contacts_of_profiles or {}
        self._contacts_of_signups = contacts_of_signups or {}
        self._by_id: dict[str, ExistingContact] = {}
        self._by_user: dict[str, ExistingContact] = {}
        self._by_clerk: dict[str, ExistingContact] = {}
        self._by_email: dict[str, list[ExistingContact]] = {}
        self._by_profile: dict[str, list[str]] = {}
        for profile in sorted(profiles):
            self._by_profile.setdefault(profile.address, []).append(profile.contact_id)
        for contact in contacts:
            self.add(contact)

    def add(self, contact: ExistingContact) -> None:
        """Add a contact, or replace it."""
        if contact.id in self._by_id:
            self._forget(self._by_id[contact.id])
        self._by_id[contact.id] = contact
        self.note_accounts(contact)
        if not contact.email:  # the column may be nullable
            return
        address = canonical_address(contact.email)
        spellings = self._by_email.get(address)
        if spellings is None:
            self._by_email[address] = [contact]
        else:
            # The canonical spelling is first.
            spellings.insert(0 if contact.email == address else len(spellings), contact)

    def note_accounts(self, contact: ExistingContact) -> None:
        """Index the current accounts of a contact."""
        if contact.user_id is not None:
            self._by_user[contact.user_id] = contact
        if contact.clerk_user_id is not None:
            self._by_clerk[contact.clerk_user_id] = contact

    def _forget(self, contact: ExistingContact) -> None:
        if self._by_user.get(contact.user_id or "") is contact:
            del self._by_user[contact.user_id or ""]
        if self._by_clerk.get(contact.clerk_user_id or "") is contact:
            del self._by_clerk[contact.clerk_user_id or ""]
        if contact.email:
            self._by_email[canonical_address(contact.email)].remove(contact)

    def __iter__(self) -> Iterator[ExistingContact]:
        """Return the contacts."""
        return iter(self._by_id.values())

    def find(self, draft: ContactDraft, profile_id: str | None = None) -> ExistingContact | None:
        """Return the contact of the draft's person, or None. Raises Conflict if its keys belong to two contacts.

        If the row refers to a profile that has a contact, it is that contact.
        """
        if profile_id and (contact := self._by_id.get(self._contacts_of_profiles.get(profile_id, ""))):
            return contact
        by_user = self._by_user.get(draft.user_id) if draft.user_id else None
        by_clerk = self._by_clerk.get(draft.clerk_user_id) if draft.clerk_user_id else None
        by_email = self._by_email.get(draft.email)
        if by_user and by_clerk and by_user is not by_clerk:
            raise Conflict(by_user.id, self._identity_keys(draft))
        candidate = by_user or by_clerk
        if by_email:
            if candidate and candidate not in by_email:
                raise Conflict(by_email[0].id, self._identity_keys(draft))
            candidate = candidate or by_email[0]
            if _is_another(candidate.user_id, draft.user_id) or _is_another(
                candidate.clerk_user_id, draft.clerk_user_id
            ):
                raise Conflict(candidate.id, self._identity_keys(draft))
        # Then the contact that the row created before, whose keys people may have changed: a row never creates two
        # contacts. Last the contact of the person's profile, which may have another address.
        return candidate or self._by_id.get(draft.id) or self._of_profile(draft)

    def _identity_keys(self, draft: ContactDraft) -> dict[str, str | None]:
        """Return by column the id of the contact that has the key of the draft; None if no contact has it."""
        accounts = {"userId": (draft.user_id, self._by_user), "clerkUserId": (draft.clerk_user_id, self._by_clerk)}
        found = {column: known.get(value) for column, (value, known) in accounts.items() if value}
        by_email = self._by_email.get(draft.email, [])
        # Of several spellings, prefer the contact that another key belongs to.
        first = min(by_email, key=lambda contact: contact not in found.values(), default=None)
        by_key = {"email": first, **found}
        if draft.id in self._by_id:
            by_key["id"] = self._by_id[draft.id]
        return {column: contact.id if contact else None for column, contact in by_key.items()}

    def _of_profile(self, draft: ContactDraft) -> ExistingContact | None:
        """Return the contact of the profile whose user has the address of a draft without an account.

        For a draft with an account, return the contact of its user if that was migrated before it had a profile.
        """
        if draft.user_id is not None:
            return self._by_id.get(self._contacts_of_signups.get(draft.user_id, ""))
        theirs = map(self._by_id.get, self._by_profile.get(draft.email, ()))
        return next((contact for contact in theirs if contact is not None), None)

    def find_resolved(self, draft: ContactDraft, resolution: Resolution) -> ExistingContact | None:
        """Return the contact of the resolution; None if the row gets its own contact.

        Raises Conflict if that contact is missing, or if another contact has the separate address now.
        """
        if resolution.contact_id is None:
            for contact in self._by_email.get(draft.email, ()):
                if contact.id != draft.id:
                    raise Conflict(contact.id, self._identity_keys(draft), Reason.STALE_DECISION)
            return self._by_id.get(draft.id)
        if resolution.contact_id not in self._by_id:
            raise Conflict(resolution.contact_id, self._identity_keys(draft), Reason.STALE_DECISION)
        return self._by_id[resolution.contact_id]

    def without_others_accounts(self, draft: ContactDraft, contact: ExistingContact | None) -> ContactDraft:
        """Return the draft of a row with a resolution, without accounts that other contacts have."""
        by_user = self._by_user.get(draft.user_id or "", contact)
        by_clerk = self._by_clerk.get(draft.clerk_user_id or "", contact)
        return draft._replace(
            user_id=draft.user_id if by_user is contact else None,
            clerk_user_id=draft.clerk_user_id if by_clerk is contact else None,
        )


@dataclass(slots=True)
class MatchPlan:
    """The outcomes of the rows of a batch, the drafts to insert, and the values to fill by contact id."""

    row_outcomes: list[RowOutcome] = field(default_factory=list)
    creates: list[ContactDraft] = field(default_factory=list)
    fills: dict[str, dict[str, Any]] = field(default_factory=dict)


def match_batch(rows: Iterable[MappedRow], known: ExistingContacts) -> MatchPlan:
    """Return the outcome of each row, and what to write. Adds the new contacts to `known`."""
    plan = MatchPlan()
    made: dict[str, ExistingContact] = {}
    for row in rows:
        draft = row.draft
        if draft is None:
            plan.row_outcomes.append(_outcome_of(row, Outcome.ERROR, reason=row.rejection, refusal=row.refusal))
            continue
        try:
            contact = (
                known.find_resolved(draft, row.resolution) if row.resolution else known.find(draft, row.profile_id)
            )
        except Conflict as conflict:
            row_outcome = _outcome_of(row, Outcome.ERROR, reason=conflict.reason, contact_id=conflict.contact_id)
            plan.row_outcomes.append(row_outcome._replace(identity_keys=conflict.identity_keys))
            continue
        if row.resolution:
            draft = known.without_others_accounts(draft, contact)
        if contact is None:
            made[draft.id] = contact = ExistingContact.of_draft(draft)
            known.add(contact)
            plan.creates.append(draft)
            plan.row_outcomes.append(_outcome_of(row, Outcome.CREATED, contact_id=draft.id, filled=_filled_in(contact)))
        elif contact.ours or contact.id == draft.id:
            before = contact.attribution
            filled = fill(contact, draft)
            known.note_accounts(contact)
            row_outcome = _outcome_of(row, Outcome.MERGED, contact_id=contact.id, filled=filled)
            plan.row_outcomes.append(_with_what_was(row_outcome, contact, before))
            if contact.fills and contact.id not in made:
                plan.fills[contact.id] = contact.fills
        else:
            plan.row_outcomes.append(_outcome_of(row, Outcome.EXISTS, contact_id=contact.id))
    plan.creates = [draft._replace(**made[draft.id].fills) if made[draft.id].fills else draft for draft in plan.creates]
    return plan


def fill(contact: ExistingContact, draft: ContactDraft) -> tuple[str, ...]:
    """Fill the empty fields of a contact from a draft of its person, and return the filled fields and units.

    Only profiles have accounts. Only leads and intakes have an attribution.
    """
    filled: dict[str, Any] = {}
    names: list[str] = []
    for name in _FILLED_ALONE:
        if getattr(contact, name) is None and (value := getattr(draft, name)) is not None:
            filled[name] = value
            names.append(name)
            setattr(contact, name, value)
    if not contact.has_assignment and draft.assigned_preparer_id is not None:
        filled |= {name: getattr(draft, name) for name in ASSIGNMENT_UNIT}
        names.append(ASSIGNMENT)
        contact.has_assignment = True
    if unit := _attribution_to_fill(contact, draft):
        contact.attribute({name: getattr(draft, name) for name in ATTRIBUTION_PARTS[unit]})
        there = dict(zip(ATTRIBUTION_UNIT, contact.attribution, strict=True))
        # The referrer is included, because a rate is only written if the contact still has that referrer.
        filled |= {name: there[name] for name in ("referrer_username", *ATTRIBUTION_PARTS[unit])}
        names.append(unit)
    contact.fills |= filled
    return tuple(names)


def _filled_in(contact: ExistingContact) -> tuple[str, ...]:
    """Return the fields and units that a new contact has. Its other fields were not emptied by a person."""
    names = [name for name in _FILLED_ALONE if getattr(contact, name) is not None]
    if contact.has_assignment:
        names.append(ASSIGNMENT)
    if contact.referrer is not None:
        names.append("attribution")
    return tuple(names)


def _attribution_to_fill(contact: ExistingContact, draft: ContactDraft) -> str | None:
    """Return which of ATTRIBUTION_PARTS a draft fills in a contact: all if it has no referrer, or the rate."""
    theirs = referrer(draft.referrer_username)
    if theirs is None:
        return None
    if contact.referrer is None:
        return "attribution"
    if contact.referrer == theirs and not contact.has_rate and draft.commission_rate is not None:
        return "commission"
    return None


def attribution_of(draft: ContactDraft) -> tuple[Any, ...]:
    """Return the attribution of a draft, in the order of ATTRIBUTION_UNIT."""
    return tuple(getattr(draft, name) for name in ATTRIBUTION_UNIT)


def _is_another(theirs: str | None, ours: str | None) -> bool:
    return theirs is not None and ours is not None and theirs != ours


def _with_what_was(row_outcome: RowOutcome, contact: ExistingContact, before: tuple[Any, ...]) -> RowOutcome:
    """Add what a rollback of the fill needs: the contact's `updatedAt`, and the replaced attribution."""
    parts = {name for unit in row_outcome.filled for name in ATTRIBUTION_PARTS.get(unit, ())}
    replaced = {name: value for name, value in zip(ATTRIBUTION_UNIT, before, strict=True) if name in parts}
    return row_outcome._replace(contact_updated_at=contact.updated_at, attribution_before=replaced or None)


def _outcome_of(
    row: MappedRow,
    outcome: Outcome,
    *,
    reason: Reason | None = None,
    contact_id: str | None = None,
    filled: tuple[str, ...] = (),
    refusal: Refusal | None = None,
) -> RowOutcome:
    return RowOutcome(
        row.id,
        row.source_id,
        row.updated_at,
        row.known_reason,
        outcome,
        reason,
        contact_id,
        filled,
        refusal,
        preparer_id=row.preparer_id,
        assigned_by=row.assigned_by,
    )

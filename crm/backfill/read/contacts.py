"""Looks up existing contacts by each of their keys. Only reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.noncanonical_emails import NoncanonicalAddresses, OwnAddresses
from crm.postgres.facts.columns import COLUMN
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.rules.addresses import canonical_address, trimmed_address, trimmed_address_sql
from crm.rules.mapping import ATTRIBUTION_UNIT, MappedRow, contact_id, contact_id_sql
from crm.rules.matching import ExistingContact, ExistingContacts, ProfileOfAddress

# One subquery per key uses the index of the key; with OR, the planner may scan the table.
_CONTACTS = """
SELECT c.id, c.email, c."userId", c."clerkUserId", {ours}, c.phone, c.company, {assignment}, c."lastContactedAt",
       {attribution}, c."updatedAt"
  FROM crm_contacts c
 WHERE c.id IN (SELECT id FROM crm_contacts WHERE email = ANY(%(emails)s)
          UNION SELECT id FROM crm_contacts WHERE "userId" = ANY(%(user_ids)s)
          UNION SELECT id FROM crm_contacts WHERE "clerkUserId" = ANY(%(clerk_user_ids)s)
          UNION SELECT id FROM crm_contacts WHERE id = ANY(%(ids)s))
 ORDER BY c."createdAt", c.id
"""
_OURS = "EXISTS (SELECT FROM ledger_entry entry WHERE entry.id = c.id AND entry.outcome = 'created')"
# A unit is missing only if all of it is: a person may have removed the preparer but not the date.
_ASSIGNMENT = '(c."assignedPreparerId" IS NOT NULL OR c."assignedAt" IS NOT NULL)'
_ATTRIBUTION = ", ".join(f'c."{COLUMN[name]}"' for name in ATTRIBUTION_UNIT)
_NO_ATTRIBUTION = ", ".join(["NULL"] * len(ATTRIBUTION_UNIT))
#: Before the id of a user among those of profiles.
SIGNUP = "users:"
_SPELLED = "SELECT email, id, NULL AS profile_id FROM crm_contacts WHERE email = ANY(%(spellings)s)"
# LATERAL with LIMIT is always one index probe, whatever the planner estimates.
_AND_PROFILES = f"""
 UNION ALL
SELECT p.email, entry.contact_id, p.id
  FROM (SELECT u.email, p.id
          FROM (SELECT id, email FROM users WHERE email = ANY(%(emails)s)
                 UNION SELECT id, email FROM users WHERE id = ANY(%(user_ids)s)) u
         CROSS JOIN LATERAL (SELECT id FROM profiles WHERE "userId" = u.id LIMIT 1) p{{by_own_address}}) p
 CROSS JOIN LATERAL (
   SELECT contact_id FROM ledger_entry WHERE id = {contact_id_sql("'profiles:' || p.id")} AND outcome <> 'error' LIMIT 1
 ) entry
"""
# And of users who were migrated without a profile. They come after the profiles.
_AND_SIGNUPS = f"""
 UNION ALL
SELECT u.email, entry.contact_id, '{SIGNUP}' || u.id
  FROM (SELECT id, email FROM users WHERE email = ANY(%(emails)s)
         UNION SELECT id, email FROM users WHERE id = ANY(%(user_ids)s)) u
 CROSS JOIN LATERAL (
   SELECT contact_id FROM ledger_entry WHERE id = {contact_id_sql("'users:' || u.id")} AND outcome <> 'error' LIMIT 1
 ) entry
"""
_OF_SIGNUPS = "SELECT source_id, contact_id FROM ledger_entry WHERE id = ANY(%s) AND outcome <> 'error'"
# The contacts of the profiles that rows name. Without an address, which distinguishes them from those above.
_AND_NAMED_PROFILES = f"""
 UNION ALL
SELECT NULL, entry.contact_id, p.id
  FROM (SELECT id FROM profiles WHERE id = ANY(%(profile_ids)s)) p
 CROSS JOIN LATERAL (
   SELECT contact_id FROM ledger_entry WHERE id = {contact_id_sql("'profiles:' || p.id")} AND outcome <> 'error' LIMIT 1
 ) entry
"""
# Those whose users have no address go by their own.
_BY_OWN_ADDRESS = f"""
         UNION
        SELECT email, id FROM profiles WHERE id = ANY(%(addressed_ids)s)
           AND (SELECT NULLIF({trimmed_address_sql("users.email")}, '') FROM users
                 WHERE users.id = profiles."userId" LIMIT 1) IS NULL"""


class ContactIndex:
    """Finds the contacts that rows of a batch can match, in any spelling of their stored email.

    There is no index on lower(email), and none may be added to a table that Prisma owns. The canonical form is looked
    up by the unique index. Stored addresses in other forms are read at the beginning, and again from time to time. Each
    batch also looks up, by the unique index, the spellings in which the application most likely stored its addresses
    since. `crm.backfill.latecomers` handles other spellings that are stored during the run.
    """

    def __init__(self, connection: BaseDatabaseWrapper, facts: DatabaseFacts, *, has_signups: bool = True) -> None:
        """Create an index. `has_signups` says whether the ledger may have signups."""
        self._connection = connection
        self._facts = facts
        self._has_signups = has_signups and facts.has_ledger
        self._contacts = NoncanonicalAddresses(connection, "crm_contacts")
        self._users = NoncanonicalAddresses(connection, "users")
        self._own_addresses = None if "profiles.email" in facts.missing else OwnAddresses(connection)
        self._spelled: dict[str, set[str]] = {}
        self._profiles: list[ProfileOfAddress] = []
        self._with_profile: set[str] = set()
        self._of_named: dict[str, str] = {}
        self._of_signups: dict[str, str] = {}

    def prepare(self, rows: Sequence[MappedRow], *, anew: bool = False) -> None:
        """Look up the contacts that have addresses of a batch in another spelling. Call it before the other methods.

        `anew` reads the addresses of the whole table again.
        """
        addresses = {row.draft.email for row in rows if row.draft}
        spellings = {spelling for row in rows if row.draft for spelling in likely_spellings(row)}
        of_profiles = without_account(rows) if self._facts.has_ledger else set()
        named = named_profiles(rows) if self._facts.has_ledger else []
        parameters = {"spellings": sorted(spellings - addresses), "emails": sorted(of_profiles), "profile_ids": named}
        query = _SPELLED
        if of_profiles:
            parameters["user_ids"] = _ids(self._users.find(of_profiles))
            query += _AND_PROFILES.format(by_own_address=_BY_OWN_ADDRESS if self._own_addresses else "")
            if self._own_addresses:
                parameters["addressed_ids"] = _ids(self._own_addresses.find(of_profiles))
            query += _AND_SIGNUPS if self._has_signups else ""
        query += _AND_NAMED_PROFILES if named else ""
        self._spelled, self._profiles, self._of_named = self._contacts.find(addresses, anew=anew), [], {}
        accounts = {row.draft.user_id for row in rows if row.draft and row.draft.user_id} if self._has_signups else ()
        with self._connection.cursor() as cursor:
            if accounts:
                cursor.execute(_OF_SIGNUPS, [[contact_id("users", account) for account in accounts]])
                self._of_signups = dict(cursor.fetchall())
            cursor.execute(query, parameters)
            for email, contact, profile_id in cursor.fetchall():
                if profile_id is None:
                    self._spelled.setdefault(canonical_address(email), set()).add(contact)
                elif email is None:
                    self._of_named[profile_id] = contact
                else:
                    self._profiles.append(ProfileOfAddress.of(email, profile_id, contact))
        self._with_profile = {profile.address for profile in self._profiles}

    def is_likely_met(self, row: MappedRow) -> bool:
        """Return whether a row of the batch must be looked up before an insert is tried."""
        if row.draft is None:
            return False
        address = row.draft.email
        has_contact = row.profile_id in self._of_named or row.draft.user_id in self._of_signups
        return has_contact or address in self._spelled or address in self._with_profile

    def contacts_met_by(self, rows: Sequence[MappedRow]) -> ExistingContacts:
        """Return the current contacts that have a key of one of the rows, which are of the prepared batch."""
        profiles, named = self.profiles_of(rows), self.contacts_of_named(rows)
        signups = self.contacts_of_signups(rows)
        others = {profile.contact_id for profile in profiles} | {*named.values(), *signups.values()}
        return ExistingContacts(self.contacts(rows, others), profiles, named, signups)

    def contacts_of_named(self, rows: Iterable[MappedRow]) -> dict[str, str]:
        """Return the contacts of the migrated profiles to which the rows refer, by profile id."""
        return {name: self._of_named[name] for name in named_profiles(rows) if name in self._of_named}

    def contacts_of_signups(self, rows: Iterable[MappedRow]) -> dict[str, str]:
        """Return the contacts of the rows' users who were migrated without a profile, by user id."""
        accounts = (row.draft.user_id for row in rows if row.draft)
        return {account: self._of_signups[account] for account in accounts if account in self._of_signups}

    def profiles_of(self, rows: Iterable[MappedRow]) -> list[ProfileOfAddress]:
        """Return the migrated profiles whose users have the address of one of the rows without an account."""
        addresses = without_account(rows)
        return [profile for profile in self._profiles if profile.address in addresses]

    def contacts(self, rows: Sequence[MappedRow], ids: Iterable[str] = ()) -> list[ExistingContact]:
        """Return the contacts that have a key of one of the rows, or one of these ids, the oldest first."""
        drafts = [row.draft for row in rows if row.draft]
        emails = {draft.email for draft in drafts}
        spelled = [identifier for email in emails for identifier in self._spelled.get(email, ())]
        query = _CONTACTS.format(
            ours=_OURS if self._facts.has_ledger else "false",
            assignment=_ASSIGNMENT,
            attribution=_ATTRIBUTION if self._facts.has_attribution else _NO_ATTRIBUTION,
        )
        parameters = {
            "emails": sorted(emails),
            "user_ids": [draft.user_id for draft in drafts if draft.user_id],
            "clerk_user_ids": [draft.clerk_user_id for draft in drafts if draft.clerk_user_id],
            "ids": [*(draft.id for draft in drafts), *resolved_contacts(rows), *spelled, *ids],
        }
        with self._connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            return [_contact(row) for row in cursor.fetchall()]


def _ids(found: Mapping[str, Iterable[str]]) -> list[str]:
    return sorted(identifier for ids in found.values() for identifier in ids)


def _contact(row: tuple[Any, ...]) -> ExistingContact:
    *values, updated_at = row
    contact = ExistingContact(*values[: -len(ATTRIBUTION_UNIT)])
    contact.attribution = tuple(values[-len(ATTRIBUTION_UNIT) :])
    contact.updated_at = updated_at
    return contact


def likely_spellings(row: MappedRow) -> Iterable[str]:
    """Yield the spellings in which the application may have stored the address of a row with a draft."""
    email = row.draft.email if row.draft else ""
    yield email.upper()
    yield email.capitalize()
    if row.raw_email:
        yield row.raw_email
        yield trimmed_address(row.raw_email)


def without_account(rows: Iterable[MappedRow]) -> set[str]:
    """Return the addresses of rows without an account: leads, and profiles without a user, which get a placeholder."""
    return {row.draft.email for row in rows if row.draft and row.draft.user_id is None}


def named_profiles(rows: Iterable[MappedRow]) -> list[str]:
    """Return the ids of the profiles that rows name."""
    return sorted({row.profile_id for row in rows if row.draft and row.profile_id})


def resolved_contacts(rows: Iterable[MappedRow]) -> list[str]:
    """Return the ids of the contacts to which resolutions assign rows."""
    return [row.resolution.contact_id for row in rows if row.resolution and row.resolution.contact_id]

"""Reads what a repair decides on: contacts that were created elsewhere, profiles, and the owners of addresses."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.noncanonical_emails import NoncanonicalAddresses
from crm.backfill.read.profiles import read_profiles
from crm.backfill.read.snapshots import VERSION, SnapshotReader, missing_columns
from crm.outcome import Repair
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.repair.rules import OLD_DOMAIN, Profiles, invented, is_without_account
from crm.rules.addresses import canonical_address
from crm.rules.mapping import PROFILE_ORIGIN, ContactDraft
from crm.rules.snapshot import ContactSnapshot

#: The number of ids that are listed at a time: a list may take a pass over the whole table.
MAX_LISTED = 20_000
_CONDITIONS: Mapping[Repair, str] = {
    Repair.PREPARER_IDS: 'c."assignedPreparerId" IS NOT NULL',
    Repair.TYPES: f"c.source = '{PROFILE_ORIGIN}'",
    Repair.PLACEHOLDERS: f"c.email::text ILIKE '%%@{OLD_DOMAIN}'",
}
_CREATED_ELSEWHERE = "NOT EXISTS (SELECT FROM ledger_entry entry WHERE entry.id = c.id AND entry.outcome = 'created')"
_PROFILES = (
    'SELECT id FROM profiles WHERE id = ANY(%(ids)s) UNION SELECT id FROM profiles WHERE "userId" = ANY(%(users)s)'
)
_PROFILES_OF_CLERK = 'UNION SELECT id FROM profiles WHERE "clerkUserId" = ANY(%(clerk)s)'
_USERS = "SELECT id FROM users WHERE email = ANY(%s)"
_OWNERS = """
SELECT email, id FROM crm_contacts WHERE email = ANY(%s) UNION SELECT email, id FROM crm_contacts WHERE id = ANY(%s)
"""


@dataclass(slots=True)
class Reader:
    """Reads for some repairs. `with_versions` needs the right to read `xmin`, which a dry run may not have."""

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    repairs: Collection[Repair]
    with_versions: bool
    _listed: list[str] = field(init=False, default_factory=list)
    _contacts: NoncanonicalAddresses = field(init=False)
    _users: NoncanonicalAddresses = field(init=False)

    def __post_init__(self) -> None:
        self._contacts = NoncanonicalAddresses(self.connection, "crm_contacts")
        self._users = NoncanonicalAddresses(self.connection, "users")

    def count(self) -> int:
        """Return the number of contacts to read."""
        ((count,),) = self._rows(f"SELECT count(*) FROM crm_contacts c WHERE {self._condition}", {})
        return int(count)

    def page(self, after: str | None, size: int) -> list[str]:
        """Return the ids of at most `size` contacts in the order of their ids, those after the id `after`."""
        found = self._listed[self._listed.index(after) + 1 :] if after in self._listed else []
        if not found:
            found = self._listed = self._list(after)
        return found[:size]

    def _list(self, after: str | None) -> list[str]:
        later = "" if after is None else "AND c.id > %(after)s"
        query = f"SELECT c.id FROM crm_contacts c WHERE {self._condition} {later} ORDER BY c.id LIMIT {MAX_LISTED}"
        return [contact for (contact,) in self._rows(query, {"after": after})]

    @property
    def _condition(self) -> str:
        wanted = " OR ".join(_CONDITIONS[repair] for repair in self.repairs)
        return f"({wanted}) AND {_CREATED_ELSEWHERE}" if self.facts.has_ledger else f"({wanted})"

    def contacts(self, ids: Sequence[str]) -> dict[str, ContactSnapshot]:
        """Return the contacts with these ids in their order, by id, without those that do not exist."""
        version = VERSION if self.with_versions else "''"
        found = SnapshotReader(self.connection, missing_columns(self.facts), version=version).read(ids)
        return {contact: found[contact] for contact in ids if contact in found}

    def profiles(self, contacts: Collection[ContactDraft]) -> Profiles:
        """Return the profiles that contacts refer to by their accounts, preparers and addresses."""
        preparers = {contact.assigned_preparer_id for contact in contacts if contact.assigned_preparer_id}
        domains = (OLD_DOMAIN, self.facts.rules().placeholder_domain)
        names = {found.profile_id for contact in contacts if (found := invented(contact.email, *domains))}
        users = {contact.user_id for contact in contacts if contact.user_id} | preparers | self._users_of(contacts)
        clerk = {contact.clerk_user_id for contact in contacts if contact.clerk_user_id}
        query = _PROFILES if "profiles.clerkUserId" in self.facts.missing else _PROFILES + _PROFILES_OF_CLERK
        keys = {"ids": sorted(preparers | names), "users": sorted(users), "clerk": sorted(clerk)}
        ids = [profile for (profile,) in self._rows(query, keys)]
        rows, invalid = read_profiles(self.connection, self.facts, ids)
        profiles = Profiles(invalid=invalid)
        for row in rows.values():
            profiles.add(row)
        return profiles

    def _users_of(self, contacts: Collection[ContactDraft]) -> set[str]:
        """Return the users with the addresses of the old script's contacts that have no account."""
        if Repair.TYPES not in self.repairs:
            return set()
        addresses = {
            canonical_address(contact.email)
            for contact in contacts
            if contact.source == PROFILE_ORIGIN and contact.email and is_without_account(contact)
        }
        if not addresses:
            return set()
        found = {user for (user,) in self._rows(_USERS, [sorted(addresses)])}
        return found.union(*self._users.find(addresses).values())

    def owners(self, addresses: Collection[str], *, anew: bool) -> dict[str, set[str]]:
        """Return the ids of the contacts that have these canonical addresses in any spelling, by address.

        `anew` reads the whole table for other spellings that were stored until now.
        """
        if not addresses:
            return {}
        spelled = self._contacts.find(addresses, anew=anew)
        ids = sorted(contact for contacts in spelled.values() for contact in contacts)
        found: dict[str, set[str]] = {}
        for email, contact in self._rows(_OWNERS, [sorted(addresses), ids]):
            found.setdefault(canonical_address(email or ""), set()).add(contact)
        return found

    def _rows(self, query: str, parameters: Any) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            return list(cursor.fetchall())


class AddressesOnDisk:
    """The addresses that a dry run would give to contacts: hashes in a temporary file, to keep the memory constant."""

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE given (hash BLOB PRIMARY KEY)"
        )
        for address in addresses:
            self.add(address)

    def __contains__(self, address: object) -> bool:
        """Return whether the address was added."""
        found = self._database.execute("SELECT 1 FROM given WHERE hash = ?", [_hash(str(address))])
        return found.fetchone() is not None

    def add(self, address: str) -> None:
        """Add an address."""
        self._database.execute("INSERT OR IGNORE INTO given VALUES (?)", [_hash(address)])


def _hash(address: str) -> bytes:
    return blake2b(address.encode(), digest_size=16).digest()

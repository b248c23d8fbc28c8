"""A dry run: the way of a run up to the write. Needs nothing but SELECT, and writes nothing at all.

What the run would have made by then is kept in memory, by address: a later row of the same person meets it. The memory
is that of one partition of the people, and is forgotten with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.arrays import use_fast_arrays
from crm.backfill.known import ContactLookup
from crm.backfill.mapping import ContactDraft, MappedRow
from crm.backfill.outcome import Source, Totals
from crm.backfill.plan import KnownContact, KnownContacts
from crm.backfill.settle import settle

_KEYS_TAKEN = """
SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE id = ANY(%(ids)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE email = ANY(%(emails)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE "userId" = ANY(%(user_ids)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE "clerkUserId" = ANY(%(clerk_user_ids)s)
"""


class RehearsalStore:
    """The contacts of the database, and those that the run would have made by now."""

    def __init__(self, connection: BaseDatabaseWrapper, lookup: ContactLookup) -> None:
        self._connection = connection
        self._lookup = lookup
        self._made: dict[str, KnownContact] = {}
        self._accounts: dict[str, dict[str, str]] = {}
        self.notice = lookup.notice_spellings

    def is_likely_met(self, row: MappedRow) -> bool:
        """Whether a contact has the row's address in another spelling, or would have been made with it."""
        if row.draft is None:
            return False
        return row.draft.email in self._made or bool(self._lookup.spellings_of(row.draft.email))

    def insert(self, drafts: Sequence[ContactDraft]) -> set[str]:
        """Remember what would be made; the ids of the drafts that would land."""
        if not drafts:
            return set()
        taken = self._keys_taken(drafts)
        landed = [
            draft
            for draft in drafts
            if taken.isdisjoint((("id", draft.id), ("email", draft.email), *_account_keys(draft)))
        ]
        self._made.update((draft.email, KnownContact.of_draft(draft)) for draft in landed)
        return {draft.id for draft in landed}

    def fill(self, fills: dict[str, dict[str, Any]]) -> None:
        """Remember the accounts that contacts would get: the next row with their address may be another account's."""
        for identifier, values in fills.items():
            accounts: dict[str, str] = {name: values[name] for name in ("user_id", "clerk_user_id") if name in values}
            if accounts:
                self._accounts.setdefault(identifier, {}).update(accounts)

    def contacts_met_by(self, rows: Sequence[MappedRow]) -> KnownContacts:
        """The contacts that have a key of one of the rows, made or to be made."""
        known = self._lookup.contacts_met_by(rows)
        for email in {row.draft.email for row in rows if row.draft}:
            if email in self._made:
                known.add(self._made[email])
        for contact in known:
            for name, value in self._accounts.get(contact.id, {}).items():
                setattr(contact, name, value)
        return known

    def _keys_taken(self, drafts: Sequence[ContactDraft]) -> set[tuple[str, str]]:
        parameters = {
            "ids": [draft.id for draft in drafts],
            "emails": [draft.email for draft in drafts],
            "user_ids": [draft.user_id for draft in drafts if draft.user_id],
            "clerk_user_ids": [draft.clerk_user_id for draft in drafts if draft.clerk_user_id],
        }
        with self._connection.cursor() as cursor:
            cursor.execute(_KEYS_TAKEN, parameters)
            names = ("id", "email", "user_id", "clerk_user_id")
            return {(name, value) for row in cursor.fetchall() for name, value in zip(names, row, strict=True)}


class RehearsalWriter:
    """Takes the place of the writer in a dry run."""

    def __init__(self, connection: BaseDatabaseWrapper, lookup: ContactLookup) -> None:
        self._connection = connection
        self._store = RehearsalStore(connection, lookup)

    def write(self, source: Source, rows: Sequence[MappedRow]) -> Totals:  # noqa: ARG002 - the writer's signature
        """Bring the rows to the outcome that they would have."""
        use_fast_arrays(self._connection)
        settled = settle(rows, self._store)
        return Totals.of(settled.decisions, Counter(settled.created_by_type))


def _account_keys(draft: ContactDraft) -> list[tuple[str, str | None]]:
    keys = (("user_id", draft.user_id), ("clerk_user_id", draft.clerk_user_id))
    return [(name, value) for name, value in keys if value]

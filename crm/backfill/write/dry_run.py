"""The dry run: the same steps as a run up to the write. Only needs the right to SELECT, and writes nothing.

Later rows of a person match the contact that the run would have created, so the dry run records it in an overlay: a
temporary SQLite database on this machine, because memory must not grow with the number of rows.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.contacts import SIGNUP, ContactIndex, named_profiles, resolved_contacts, without_account
from crm.backfill.write.upsert import upsert
from crm.outcome import Outcome, RowOutcome, Source, Totals
from crm.rules.mapping import ContactDraft, MappedRow, contact_id
from crm.rules.matching import ExistingContact, ExistingContacts, ProfileOfAddress

_KEYS = ("email", "user_id", "clerk_user_id")
_OF_ENTRY = "id, source, source_id, outcome, contact_id, 0, source_updated_at, filled, seen_preparer"
_KEYS_TAKEN = """
SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE id = ANY(%(ids)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE email = ANY(%(emails)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE "userId" = ANY(%(user_ids)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE "clerkUserId" = ANY(%(clerk_user_ids)s)
"""


class Overlay:
    """The contacts and entries that a run would have written so far.

    What is recorded inside `batch` is discarded if the batch fails.
    """

    def __init__(self, *, with_update: bool) -> None:
        """Create an empty overlay. `with_update` records whole contacts and the entries of their rows too."""
        self._with_update = with_update
        # The empty name makes a temporary file, which is deleted with the connection.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            """
            PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA cache_size = -16384;
            CREATE TABLE made (email TEXT PRIMARY KEY, id TEXT, user_id TEXT, clerk_user_id TEXT, is_assigned INTEGER)
                   WITHOUT ROWID;
            CREATE TABLE changed (id TEXT PRIMARY KEY, email TEXT, user_id TEXT, clerk_user_id TEXT) WITHOUT ROWID;
            CREATE INDEX changed_email ON changed (email);
            CREATE TABLE profile (email TEXT, otherwise INTEGER, id TEXT, contact_id TEXT, PRIMARY KEY (email, id))
                   WITHOUT ROWID;
            CREATE INDEX profile_id ON profile (id);
            CREATE TABLE draft (id TEXT PRIMARY KEY, fields TEXT) WITHOUT ROWID;
            CREATE TABLE entry (id TEXT PRIMARY KEY, source TEXT, source_id TEXT, outcome TEXT, contact_id TEXT,
                                source_updated_at TEXT, filled TEXT, seen_preparer TEXT) WITHOUT ROWID;
            CREATE INDEX entry_contact_id ON entry (contact_id);
            CREATE TABLE written (id TEXT, fields TEXT);
            CREATE INDEX written_id ON written (id);
            """
        )

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Record everything in the block, or nothing if it raises."""
        self._database.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def make(self, drafts: Sequence[ContactDraft]) -> None:
        """Record contacts that would be created."""
        self._database.executemany(
            "INSERT INTO made VALUES (?, ?, ?, ?, ?)",
            [
                (draft.email, draft.id, draft.user_id, draft.clerk_user_id, draft.assigned_preparer_id is not None)
                for draft in drafts
            ],
        )
        if self._with_update:
            self._database.executemany(
                "INSERT OR IGNORE INTO draft VALUES (?, ?)", [(draft.id, json.dumps(draft)) for draft in drafts]
            )

    def change(self, contacts: Mapping[str, dict[str, Any]]) -> None:
        """Record the keys that would be written into existing contacts. `contacts` has fields by contact id."""
        self._database.executemany(
            "INSERT INTO changed VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
            "email = COALESCE(excluded.email, email), user_id = COALESCE(user_id, excluded.user_id), "
            "clerk_user_id = COALESCE(clerk_user_id, excluded.clerk_user_id)",
            [
                (identifier, *map(fields.get, _KEYS))
                for identifier, fields in contacts.items()
                if not fields.keys().isdisjoint(_KEYS)
            ],
        )

    def made_with(self, emails: Iterable[str]) -> list[ExistingContact]:
        """Return the contacts that would have been created with one of the addresses."""
        return self._made("SELECT * FROM made WHERE email", emails)

    def made_as(self, contacts: Iterable[str]) -> list[ExistingContact]:
        """Return the contacts that would have been created with one of the ids."""
        # Most dry runs never ask by id, so the index is created on demand.
        self._database.execute("CREATE INDEX IF NOT EXISTS made_id ON made (id)")
        return self._made("SELECT * FROM made WHERE id", contacts)

    def _made(self, query: str, values: Iterable[str]) -> list[ExistingContact]:
        return [
            ExistingContact(identifier, email, user_id, clerk_user_id, ours=True, has_assignment=bool(is_assigned))
            for email, identifier, user_id, clerk_user_id, is_assigned in self._rows(query, values)
        ]

    def changed(self, contacts: Iterable[str]) -> dict[str, tuple[str | None, str | None, str | None]]:
        """Return the address, user id and Clerk id that would have been written into contacts, by contact id."""
        return {row[0]: row[1:] for row in self._rows("SELECT * FROM changed WHERE id", contacts)}

    def changed_to(self, emails: Iterable[str]) -> dict[str, str]:
        """Return the ids of the contacts into which one of the addresses would have been written, by address."""
        return dict(self._rows("SELECT email, id FROM changed WHERE email", emails))

    def profiles_with(self, addresses: Iterable[str]) -> list[ProfileOfAddress]:
        """Return the profiles that would have matched a contact, and whose user has one of the addresses."""
        rows = self._rows("SELECT email, otherwise, id, contact_id FROM profile WHERE email", addresses)
        return [ProfileOfAddress(address, bool(otherwise), *ids) for address, otherwise, *ids in rows]

    def contacts_of_profiles(self, profile_ids: Collection[str]) -> dict[str, str]:
        """Return the contacts that profiles would have matched or created, by profile id."""
        by_contact = {contact_id("profiles", profile_id): profile_id for profile_id in profile_ids}
        made = {by_contact[contact.id]: contact.id for contact in self.made_as(by_contact)} if by_contact else {}
        return made | dict(self._rows("SELECT id, contact_id FROM profile WHERE id", profile_ids))

    def note_profiles(self, rows: Iterable[MappedRow], row_outcomes: Iterable[RowOutcome], *, of_signups: bool) -> None:
        """Record the profiles or signups that would have matched a contact, which can have another address."""
        by_id = {row.id: row for row in rows}
        met = [row_outcome for row_outcome in row_outcomes if row_outcome.outcome in (Outcome.MERGED, Outcome.EXISTS)]
        profiles = ((row_outcome, by_id[row_outcome.id]) for row_outcome in met)
        self._database.executemany(
            "INSERT OR REPLACE INTO profile VALUES (?, ?, ?, ?)",
            [
                # A profile with a resolution is found only by its id: its address can belong to another contact.
                (
                    "" if row.resolution else row.draft.email,
                    row.raw_email != row.draft.email,
                    f"{SIGNUP}{row.source_id}" if of_signups else row.source_id,
                    row_outcome.contact_id,
                )
                for row_outcome, row in profiles
                if row.draft
            ],
        )

    def note(self, source: Source, row_outcomes: Iterable[RowOutcome]) -> None:
        """Record the ledger entries that --update would find."""
        if not self._with_update:
            return
        self._database.executemany(
            "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    row_outcome.id,
                    source,
                    row_outcome.source_id,
                    row_outcome.outcome,
                    row_outcome.contact_id,
                    row_outcome.updated_at,
                    ",".join(row_outcome.filled),
                    row_outcome.preparer_id,
                )
                for row_outcome in row_outcomes
                if row_outcome.outcome is not Outcome.ERROR
            ],
        )

    def write(self, contacts: Mapping[str, dict[str, Any]]) -> None:
        """Record what would be written into contacts. `contacts` has fields by contact id."""
        self._database.executemany(
            "INSERT INTO written VALUES (?, ?)",
            [(identifier, json.dumps(fields)) for identifier, fields in contacts.items()],
        )

    def entries(self, ids: Iterable[str]) -> list[tuple[Any, ...]]:
        """Return the entries of rows, as values for the first columns of an entry. Their run id is 0."""
        return self._rows(f"SELECT {_OF_ENTRY} FROM entry WHERE id", ids)

    def entries_of(self, contacts: Iterable[str]) -> list[tuple[Any, ...]]:
        """Return the entries of the rows that would have created or matched the contacts."""
        return self._rows(f"SELECT {_OF_ENTRY} FROM entry WHERE contact_id", contacts)

    def drafts(self, contacts: Iterable[str]) -> list[ContactDraft]:
        """Return the contacts with these ids that would have been created, as they would have been inserted."""
        return [
            ContactDraft._make(json.loads(fields))
            for (fields,) in self._rows("SELECT fields FROM draft WHERE id", contacts)
        ]

    def written_in(self, contacts: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
        """Return what would have been written into the contacts, as id and fields, in the order of writing."""
        rows = self._rows("SELECT id, fields FROM written WHERE id", contacts, " ORDER BY rowid")
        return [(identifier, json.loads(fields)) for identifier, fields in rows]

    def _rows(self, query: str, values: Iterable[str], order: str = "") -> list[tuple[Any, ...]]:
        return self._database.execute(
            f"{query} IN (SELECT value FROM json_each(?)){order}", [json.dumps(list(values))]
        ).fetchall()


class DryRunStore:
    """The contacts of the database, and those that the run would have created so far."""

    def __init__(self, connection: BaseDatabaseWrapper, lookup: ContactIndex, overlay: Overlay) -> None:
        self._connection = connection
        self._lookup = lookup
        self._overlay = overlay
        self._met: set[str] = set()
        self._of_named: dict[str, str] = {}

    def prepare(self, rows: Sequence[MappedRow]) -> None:
        """Look up which addresses of the batch would have a contact."""
        self._lookup.prepare(rows)
        emails = _emails(rows)
        self._met = {contact.email for contact in self._overlay.made_with(emails)}
        self._met |= self._overlay.changed_to(emails).keys()
        self._met |= {profile.address for profile in self._overlay.profiles_with(without_account(rows))}
        self._of_named = self._overlay.contacts_of_profiles(named_profiles(rows))

    def is_likely_met(self, row: MappedRow) -> bool:
        """Return whether a contact has the row's address in another spelling, or would have been created with it."""
        if row.draft is None:
            return False
        is_met = row.draft.email in self._met or row.profile_id in self._of_named
        return is_met or self._lookup.is_likely_met(row)

    def insert(self, drafts: Sequence[ContactDraft]) -> set[str]:
        """Record the contacts that would be inserted, and return their ids."""
        if not drafts:
            return set()
        taken = self._keys_taken(drafts)
        inserted = [draft for draft in drafts if not taken or taken.isdisjoint(_keys(draft))]
        self._overlay.make(inserted)
        return {draft.id for draft in inserted}

    def fill(self, fills: dict[str, dict[str, Any]]) -> None:
        """Record what would be filled, keys included: the next row with the address can be of another account."""
        self._overlay.write(fills)
        self._overlay.change(fills)

    def contacts_met_by(self, rows: Sequence[MappedRow]) -> ExistingContacts:
        """Return the contacts that have, or would have, a key of one of the rows, with the keys they would have."""
        emails = _emails(rows)
        profiles = self._lookup.profiles_of(rows) + self._overlay.profiles_with(without_account(rows))
        named = {name: self._of_named[name] for name in named_profiles(rows) if name in self._of_named}
        named |= self._lookup.contacts_of_named(rows)
        others = {profile.contact_id for profile in profiles} | set(self._overlay.changed_to(emails).values())
        signups = self._lookup.contacts_of_signups(rows)
        others |= {*named.values(), *signups.values()}
        contacts = self._lookup.contacts(rows, others) + self._overlay.made_with(emails)
        if missing := (others | set(resolved_contacts(rows))) - {contact.id for contact in contacts}:
            contacts += self._overlay.made_as(missing)
        changed = self._overlay.changed(contact.id for contact in contacts)
        for contact in contacts:
            email, user_id, clerk_user_id = changed.get(contact.id, (None, None, None))
            contact.email = email or contact.email
            contact.user_id = contact.user_id or user_id
            contact.clerk_user_id = contact.clerk_user_id or clerk_user_id
        self._add_values(contacts)
        return ExistingContacts(contacts, profiles, named, signups)

    def _add_values(self, found: Iterable[ExistingContact]) -> None:
        """Add the recorded values of other fields: --update needs to know which row filled them."""
        contacts = {contact.id: contact for contact in found}
        made = [(draft.id, draft._asdict()) for draft in self._overlay.drafts(contacts)]
        for identifier, fields in (*made, *self._overlay.written_in(contacts)):
            contacts[identifier].take(fields)

    def _keys_taken(self, drafts: Sequence[ContactDraft]) -> set[tuple[str, str | None]]:
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


class DryRunWriter:
    """Replaces BatchWriter in a dry run."""

    def __init__(self, connection: BaseDatabaseWrapper, lookup: ContactIndex, *, with_update: bool = False) -> None:
        """Create a writer. `with_update` says that the dry run of an update follows."""
        self.overlay = Overlay(with_update=with_update)
        self.store = DryRunStore(connection, lookup, self.overlay)

    def write(self, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        """Return the counts that the rows of a batch would have."""
        totals = Totals()
        with self.overlay.batch():
            for rows in pages:
                result = upsert(rows, self.store)
                if source.table in ("profiles", "users"):
                    self.overlay.note_profiles(rows, result.row_outcomes, of_signups=source.table == "users")
                self.overlay.note(source, result.row_outcomes)
                totals.add(Totals.of(result.row_outcomes, result.created_by_type))
        return totals

    def keep_alive(self) -> None:
        """Do nothing, because a dry run has no lease."""


def _emails(rows: Iterable[MappedRow]) -> set[str]:
    return {row.draft.email for row in rows if row.draft}


def _keys(draft: ContactDraft) -> list[tuple[str, str | None]]:
    accounts = (("user_id", draft.user_id), ("clerk_user_id", draft.clerk_user_id))
    return [("id", draft.id), ("email", draft.email), *((name, value) for name, value in accounts if value)]

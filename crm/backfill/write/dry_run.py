"""A dry run: the way of a run up to the write. Needs nothing but SELECT, and writes nothing to the database at all.

What the run would have made by then must be known, since a later row of the same person meets it. It is kept in a
temporary SQLite database on this machine, which grows with the rows where memory may not.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.contacts import ContactIndex, resolved_contacts, without_account
from crm.backfill.write.upsert import upsert
from crm.outcome import Outcome, RowOutcome, Source, Totals
from crm.rules.mapping import ContactDraft, MappedRow
from crm.rules.matching import ExistingContact, ExistingContacts, ProfileOfAddress

_KEYS = ("email", "user_id", "clerk_user_id")
_OF_ENTRY = "id, source, source_id, outcome, contact_id, 0, source_updated_at, filled"
_KEYS_TAKEN = """
SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE id = ANY(%(ids)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE email = ANY(%(emails)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE "userId" = ANY(%(user_ids)s)
 UNION SELECT id, email, "userId", "clerkUserId" FROM crm_contacts WHERE "clerkUserId" = ANY(%(clerk_user_ids)s)
"""


class Imagined:
    """What a run would have made and changed by now.

    What is remembered inside `batch` is forgotten again when the batch fails.
    """

    def __init__(self, *, with_update: bool) -> None:
        """`with_update` remembers whole contacts, and the entries of their rows."""
        self._with_update = with_update
        # No name: a temporary file that goes with the connection.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            """
            PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA cache_size = -16384;
            CREATE TABLE made (email TEXT PRIMARY KEY, id TEXT, user_id TEXT, clerk_user_id TEXT) WITHOUT ROWID;
            CREATE TABLE changed (id TEXT PRIMARY KEY, email TEXT, user_id TEXT, clerk_user_id TEXT) WITHOUT ROWID;
            CREATE INDEX changed_email ON changed (email);
            CREATE TABLE profile (email TEXT, otherwise INTEGER, id TEXT, contact_id TEXT, PRIMARY KEY (email, id))
                   WITHOUT ROWID;
            CREATE TABLE draft (id TEXT PRIMARY KEY, fields TEXT) WITHOUT ROWID;
            CREATE TABLE entry (id TEXT PRIMARY KEY, source TEXT, source_id TEXT, outcome TEXT, contact_id TEXT,
                                source_updated_at TEXT, filled TEXT) WITHOUT ROWID;
            CREATE INDEX entry_contact_id ON entry (contact_id);
            CREATE TABLE written (id TEXT, fields TEXT);
            CREATE INDEX written_id ON written (id);
            """
        )

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Remember all of what comes inside, or nothing."""
        self._database.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def make(self, drafts: Sequence[ContactDraft]) -> None:
        """Remember contacts that would be made."""
        self._database.executemany(
            "INSERT INTO made VALUES (?, ?, ?, ?)",
            [(draft.email, draft.id, draft.user_id, draft.clerk_user_id) for draft in drafts],
        )
        if self._with_update:
            self._database.executemany(
                "INSERT OR IGNORE INTO draft VALUES (?, ?)", [(draft.id, json.dumps(draft)) for draft in drafts]
            )

    def change(self, contacts: Mapping[str, dict[str, Any]]) -> None:
        """Remember the keys that contacts would get, which are there: fields by id."""
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
        """The contacts that would have been made with one of the addresses."""
        return [
            ExistingContact(identifier, email, user_id, clerk_user_id, ours=True)
            for email, identifier, user_id, clerk_user_id in self._rows("SELECT * FROM made WHERE email", emails)
        ]

    def made_as(self, contacts: Iterable[str]) -> list[ExistingContact]:
        """The contacts that would have been made with one of the ids. Reads all of them: few rows ask for this."""
        return [
            ExistingContact(identifier, email, user_id, clerk_user_id, ours=True)
            for email, identifier, user_id, clerk_user_id in self._rows("SELECT * FROM made WHERE id", contacts)
        ]

    def changed(self, contacts: Iterable[str]) -> dict[str, tuple[str | None, str | None, str | None]]:
        """The address and the accounts that contacts would have got, by contact id."""
        return {row[0]: row[1:] for row in self._rows("SELECT * FROM changed WHERE id", contacts)}

    def changed_to(self, emails: Iterable[str]) -> dict[str, str]:
        """The ids of the contacts that would have got one of the addresses, by address."""
        return dict(self._rows("SELECT email, id FROM changed WHERE email", emails))

    def profiles_with(self, addresses: Iterable[str]) -> list[ProfileOfAddress]:
        """The profiles that would have met a contact, and whose user has one of the addresses."""
        rows = self._rows("SELECT email, otherwise, id, contact_id FROM profile WHERE email", addresses)
        return [ProfileOfAddress(address, bool(otherwise), *ids) for address, otherwise, *ids in rows]

    def note_profiles(self, rows: Iterable[MappedRow], row_outcomes: Iterable[RowOutcome]) -> None:
        """Remember the profiles that would have met a contact: it may have another address than they."""
        by_id = {row.id: row for row in rows}
        met = [row_outcome for row_outcome in row_outcomes if row_outcome.outcome in (Outcome.MERGED, Outcome.EXISTS)]
        profiles = ((row_outcome, by_id[row_outcome.id]) for row_outcome in met)
        self._database.executemany(
            "INSERT OR REPLACE INTO profile VALUES (?, ?, ?, ?)",
            [
                (row.draft.email, row.raw_email != row.draft.email, row.source_id, row_outcome.contact_id)
                for row_outcome, row in profiles
                if row.draft and not row.resolution
            ],
        )

    def note(self, source: Source, row_outcomes: Iterable[RowOutcome]) -> None:
        """Remember the entries that --update would find."""
        if not self._with_update:
            return
        self._database.executemany(
            "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    row_outcome.id,
                    source,
                    row_outcome.source_id,
                    row_outcome.outcome,
                    row_outcome.contact_id,
                    row_outcome.updated_at,
                    ",".join(row_outcome.filled),
                )
                for row_outcome in row_outcomes
                if row_outcome.outcome is not Outcome.ERROR
            ],
        )

    def write(self, contacts: Mapping[str, dict[str, Any]]) -> None:
        """Remember what would be written into contacts: fields by id."""
        self._database.executemany(
            "INSERT INTO written VALUES (?, ?)",
            [(identifier, json.dumps(fields)) for identifier, fields in contacts.items()],
        )

    def entries(self, ids: Iterable[str]) -> list[tuple[Any, ...]]:
        """The entries of rows, as values of the first columns of an entry. Their run has the number 0."""
        return self._rows(f"SELECT {_OF_ENTRY} FROM entry WHERE id", ids)

    def entries_of(self, contacts: Iterable[str]) -> list[tuple[Any, ...]]:
        """The entries of the rows that would have made contacts or come to them."""
        return self._rows(f"SELECT {_OF_ENTRY} FROM entry WHERE contact_id", contacts)

    def drafts(self, contacts: Iterable[str]) -> list[ContactDraft]:
        """The contacts with these ids that would have been made, as they would have been then."""
        return [
            ContactDraft._make(json.loads(fields))
            for (fields,) in self._rows("SELECT fields FROM draft WHERE id", contacts)
        ]

    def written_in(self, contacts: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
        """What would have been written into contacts, in its order."""
        rows = self._rows("SELECT id, fields FROM written WHERE id", contacts, " ORDER BY rowid")
        return [(identifier, json.loads(fields)) for identifier, fields in rows]

    def _rows(self, query: str, values: Iterable[str], order: str = "") -> list[tuple[Any, ...]]:
        return self._database.execute(
            f"{query} IN (SELECT value FROM json_each(?)){order}", [json.dumps(list(values))]
        ).fetchall()


class DryRunStore:
    """The contacts of the database, and those that the run would have made by now."""

    def __init__(self, connection: BaseDatabaseWrapper, lookup: ContactIndex, imagined: Imagined) -> None:
        self._connection = connection
        self._lookup = lookup
        self._imagined = imagined
        self._met: set[str] = set()

    def notice(self, rows: Sequence[MappedRow]) -> None:
        """Look up which addresses of the batch would have a contact by now."""
        self._lookup.notice(rows)
        emails = _emails(rows)
        self._met = {contact.email for contact in self._imagined.made_with(emails)}
        self._met |= self._imagined.changed_to(emails).keys()
        self._met |= {profile.address for profile in self._imagined.profiles_with(without_account(rows))}

    def is_likely_met(self, row: MappedRow) -> bool:
        """Whether a contact has the row's address in another spelling, or would have been made with it."""
        if row.draft is None:
            return False
        return row.draft.email in self._met or self._lookup.is_likely_met(row.draft.email)

    def insert(self, drafts: Sequence[ContactDraft]) -> set[str]:
        """Remember what would be made; the ids of the drafts that would land."""
        if not drafts:
            return set()
        taken = self._keys_taken(drafts)
        inserted = [draft for draft in drafts if not taken or taken.isdisjoint(_keys(draft))]
        self._imagined.make(inserted)
        return {draft.id for draft in inserted}

    def fill(self, fills: dict[str, dict[str, Any]]) -> None:
        """Remember what contacts would get: the next row with their address may be another account's."""
        self._imagined.write(fills)
        self._imagined.change(fills)

    def contacts_met_by(self, rows: Sequence[MappedRow]) -> ExistingContacts:
        """The contacts that have a key of one of the rows, made or to be made, with the keys that they would have."""
        emails = _emails(rows)
        profiles = self._lookup.profiles_of(rows) + self._imagined.profiles_with(without_account(rows))
        others = {profile.contact_id for profile in profiles} | set(self._imagined.changed_to(emails).values())
        contacts = self._lookup.contacts(rows, others) + self._imagined.made_with(emails)
        if missing := (others | set(resolved_contacts(rows))) - {contact.id for contact in contacts}:
            contacts += self._imagined.made_as(missing)
        changed = self._imagined.changed(contact.id for contact in contacts)
        for contact in contacts:
            email, user_id, clerk_user_id = changed.get(contact.id, (None, None, None))
            contact.email = email or contact.email
            contact.user_id = contact.user_id or user_id
            contact.clerk_user_id = contact.clerk_user_id or clerk_user_id
        self._add_values(contacts)
        return ExistingContacts(contacts, profiles)

    def _add_values(self, found: Iterable[ExistingContact]) -> None:
        """What else the contacts would have by now, as far as it is remembered: --update must know who filled what."""
        contacts = {contact.id: contact for contact in found}
        made = [(draft.id, draft._asdict()) for draft in self._imagined.drafts(contacts)]
        for identifier, fields in (*made, *self._imagined.written_in(contacts)):
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
    """Takes the place of the writer in a dry run."""

    def __init__(self, connection: BaseDatabaseWrapper, lookup: ContactIndex, *, with_update: bool = False) -> None:
        """`with_update`: the dry run of an update comes after."""
        self.imagined = Imagined(with_update=with_update)
        self.store = DryRunStore(connection, lookup, self.imagined)

    def write(self, source: Source, pages: Iterable[Sequence[MappedRow]]) -> Totals:
        """Bring the rows to the outcome that they would have."""
        totals = Totals()
        with self.imagined.batch():
            for rows in pages:
                result = upsert(rows, self.store)
                if source.table == "profiles":
                    self.imagined.note_profiles(rows, result.row_outcomes)
                self.imagined.note(source, result.row_outcomes)
                totals.add(Totals.of(result.row_outcomes, result.created_by_type))
        return totals

    def keep_alive(self) -> None:
        """Nothing: a dry run claims no lease."""


def _emails(rows: Iterable[MappedRow]) -> set[str]:
    return {row.draft.email for row in rows if row.draft}


def _keys(draft: ContactDraft) -> list[tuple[str, str | None]]:
    accounts = (("user_id", draft.user_id), ("clerk_user_id", draft.clerk_user_id))
    return [("id", draft.id), ("email", draft.email), *((name, value) for name, value in accounts if value)]

"""The contacts that are already there, looked up by every key of identity. Only reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.mapping import MappedRow
from crm.backfill.plan import KnownContact, KnownContacts
from crm.backfill.schema import DatabaseFacts
from crm.backfill.source import read_as_text

_ODD_SPELLINGS = r"""
SELECT email FROM crm_contacts
 WHERE email <> lower(email) OR email ~ '\s' OR octet_length(email) <> char_length(email)
"""
# A contact is found by index under each key; one OR over all of them would be left to the planner's luck.
_CONTACTS = """
SELECT c.id, c.email, c."userId", c."clerkUserId", {ours}, c.phone, c.company, {rest}
  FROM crm_contacts c
 WHERE c.id IN (SELECT id FROM crm_contacts WHERE email = ANY(%(emails)s)
          UNION SELECT id FROM crm_contacts WHERE "userId" = ANY(%(user_ids)s)
          UNION SELECT id FROM crm_contacts WHERE "clerkUserId" = ANY(%(clerk_user_ids)s)
          UNION SELECT id FROM crm_contacts WHERE id = ANY(%(ids)s))
 ORDER BY c."createdAt", c.id
"""
_OURS = "EXISTS (SELECT FROM ledger_entry line WHERE line.id = c.id AND line.outcome = 'created')"
# A person may have taken the preparer away and left the date: a unit is missing when all of it is.
_ASSIGNMENT = '(c."assignedPreparerId" IS NOT NULL OR c."assignedAt" IS NOT NULL), c."lastContactedAt"'
_ATTRIBUTION = f"""
{_ASSIGNMENT}, COALESCE(c."referrerUsername", c."referrerType", c."commissionRate"::text,
c."commissionRateLockedAt"::text, c."attributionMethod") IS NOT NULL, c."updatedAt", c."attributionConfidence"
"""
_NO_ATTRIBUTION = f'{_ASSIGNMENT}, false, c."updatedAt", NULL'


class ContactLookup:
    """Finds the contacts that rows of a batch may meet, whatever the case of their stored email.

    There is no index on lower(email) and none is added to a table that Prisma owns. So the lower-cased and the given
    form are looked up by the unique index, and the few stored addresses that are not in lower case are kept in memory,
    read once.
    """

    def __init__(self, connection: BaseDatabaseWrapper, facts: DatabaseFacts) -> None:
        self._connection = connection
        self._facts = facts
        self._odd_spellings: dict[str, set[str]] | None = None

    def spellings_of(self, email: str) -> set[str]:
        """The stored addresses that are this one in another spelling."""
        if self._odd_spellings is None:
            self._odd_spellings = {}
            with self._connection.cursor() as cursor:
                cursor.execute(_ODD_SPELLINGS)
                for (stored,) in cursor.fetchall():
                    self._remember(stored)
        return self._odd_spellings.get(email, set())

    def notice_spellings(self, rows: Iterable[MappedRow]) -> None:
        """Ask for the rows' addresses as given, where that is another form: the application may just have stored it."""
        given = [row.raw_email for row in rows if row.draft and row.raw_email and row.raw_email != row.draft.email]
        given = [raw for raw in given if raw not in self.spellings_of(raw.lower())]
        if not given:
            return
        with self._connection.cursor() as cursor:
            cursor.execute("SELECT email FROM crm_contacts WHERE email = ANY(%s)", [given])
            for (stored,) in cursor.fetchall():
                self._remember(stored)

    def contacts_met_by(self, rows: Sequence[MappedRow]) -> KnownContacts:
        """The contacts that have a key of one of the rows, as they are now."""
        drafts = [row.draft for row in rows if row.draft]
        emails = {draft.email for draft in drafts}
        odd = {spelling for email in emails for spelling in self.spellings_of(email)}
        query = _CONTACTS.format(
            ours=_OURS if self._facts.has_ledger else "false",
            rest=_ATTRIBUTION if self._facts.has_attribution else _NO_ATTRIBUTION,
        )
        parameters = {
            "emails": sorted(emails | odd),
            "user_ids": [draft.user_id for draft in drafts if draft.user_id],
            "clerk_user_ids": [draft.clerk_user_id for draft in drafts if draft.clerk_user_id],
            "ids": [draft.id for draft in drafts] + decided_contacts(rows),
        }
        with self._connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            return KnownContacts(KnownContact(*row) for row in cursor.fetchall())

    def _remember(self, stored: str) -> None:
        if self._odd_spellings is not None:
            self._odd_spellings.setdefault(stored.strip().lower(), set()).add(stored)


def decided_contacts(rows: Iterable[MappedRow]) -> list[str]:
    """The contacts that people decided on for rows of a batch."""
    return [row.resolution.contact_id for row in rows if row.resolution and row.resolution.contact_id]

"""What is to be looked at again, and how it stands now. Only reads.

The condition is asked of every row that has a settled line, so each part of it costs no more than an index probe a row.
A scalar subquery with a LIMIT stays one, whatever the planner believes. Each part says no again once what it asks for
is done: a second look at the same rows finds nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.mapping import ATTRIBUTION, CONTACT_TYPE_OF_SOURCE, ContactDraft, MappedRow
from crm.backfill.outcome import Outcome, Source
from crm.backfill.schema import ATTRIBUTION_COLUMNS, DatabaseFacts
from crm.backfill.source import UNSETTLED, Choice, read_as_text
from crm.backfill.update.changes import LEAD, SeenLine, StandingContact
from crm.models import CRMContact

_JOIN = UNSETTLED.join.replace("SELECT outcome,", "SELECT outcome, contact_id, {seen},")
_SEEN = "COALESCE(seen_updated_at, source_updated_at)"
_CONTACT = "FROM crm_contacts c WHERE c.id = line.contact_id LIMIT 1"
# Newer, as a rule. Put back to what it was before, it has changed as well.
_CHANGED = f"""(r."updatedAt" <> line.seen AND (SELECT true {_CONTACT}))"""
_FILLS_ANOTHERS = """
(line.outcome = 'exists' AND (
  SELECT {blanks} FROM crm_contacts c
   CROSS JOIN LATERAL (SELECT COALESCE(string_to_array(string_agg(columns, ','), ','), '{{}}') AS columns
                         FROM contact_update WHERE contact_id = c.id) given
   WHERE c.id = line.contact_id LIMIT 1))
"""
_PROMOTES = f"""
(line.outcome = 'merged' AND (
  SELECT c."contactType"::text = '{LEAD}' AND c."updatedAt" = made.source_updated_at
    FROM crm_contacts c JOIN ledger_entry made ON made.id = c.id AND made.outcome = 'created'
   WHERE c.id = line.contact_id LIMIT 1))
"""
_PLACEHOLDERS = ", ".join(f"'{kind.lower()}-' || lower(r.id)" for kind in CONTACT_TYPE_OF_SOURCE.values())
_TELLING = [column for column in ATTRIBUTION_COLUMNS if column != "attributionConfidence"]
_ADDRESS = "lower(btrim(u.email, %(white_space)s))"
_HAS_EMAIL_NOW = f"""
(SELECT split_part(c.email, '@', 1) IN ({_PLACEHOLDERS}) AND (
   SELECT {_ADDRESS} <> '' AND NOT EXISTS (SELECT FROM crm_contacts WHERE email = {_ADDRESS})
     FROM users u WHERE u.id = r."userId" LIMIT 1)
 {_CONTACT})
"""


def _is_there(column: str) -> str:
    return f"btrim({column}, %(white_space)s) <> ''"


def _blanks(facts: DatabaseFacts, table: str) -> str:
    """The condition that somebody else's contact `c` has a blank which row `r` could fill, and never was filled."""
    if table == "profiles":
        brings = {"user_id": 'c."userId" IS NULL AND r."userId" IS NOT NULL'}
        if facts.has_clerk_user_id:
            brings["clerk_user_id"] = """c."clerkUserId" IS NULL AND r."clerkUserId" <> ''"""
        brings["company"] = "c.company IS NULL AND " + _is_there('r."companyName"')
    else:
        brings = {
            "last_contacted_at": 'c."lastContactedAt" IS NULL AND r."lastContactedAt" IS NOT NULL',
            "assignment": f"""c."assignedPreparerId" IS NULL AND c."assignedAt" IS NULL
                              AND {_is_there('r."assignedPreparerId"')}""",
        }
        if facts.has_attribution:
            theirs, ours = (", ".join(f'{where}."{column}"' for column in _TELLING) for where in "rc")
            brings["attribution"] = f"num_nonnulls({ours}) = 0 AND num_nonnulls({theirs}) > 0"
    brings["phone"] = f"c.phone IS NULL AND {_is_there('r.phone')}"
    return " OR ".join(f"({brought} AND '{unit}' <> ALL (given.columns))" for unit, brought in brings.items())


def rows_to_revisit(facts: DatabaseFacts, source: Source, *, with_unsettled: bool) -> Choice:
    """The rows of a source that are to be looked at again.

    `with_unsettled` adds those that have no settled line: in a dry run, they would have one by now.
    """
    if not facts.has_ledger:
        return UNSETTLED
    parts = [_CHANGED, _FILLS_ANOTHERS.format(blanks=_blanks(facts, source.table))]
    if source.table == "profiles":
        parts += [_PROMOTES, _HAS_EMAIL_NOW]
    condition = f"line.outcome <> 'error' AND ({' OR '.join(parts)})"
    if with_unsettled:
        condition = f"{UNSETTLED.condition} OR {condition}"
    return Choice(_JOIN.replace("{seen}", f"{_SEEN} AS seen"), f"({condition})")


_LINES = f"SELECT id, outcome, contact_id, {_SEEN} FROM ledger_entry WHERE id = ANY(%s) AND outcome <> 'error'"
_CONTACTS = """
SELECT {version}, {made}, {columns} FROM crm_contacts c {joins} WHERE c.id = ANY(%s)
"""
_MADE = "made.source_updated_at, given.columns"
_JOINS = """
  LEFT JOIN ledger_entry made ON made.id = c.id AND made.outcome = 'created'
  LEFT JOIN LATERAL (
    SELECT string_agg(columns, ',') AS columns FROM contact_update WHERE contact_id = c.id
  ) given ON true
"""
# The ledger has no index on the contact: this reads all of it.
_GIVEN = "SELECT contact_id, filled FROM ledger_entry WHERE filled IS NOT NULL AND contact_id = ANY(%s)"


class Present:
    """Lines and contacts as they are now."""

    def __init__(self, connection: BaseDatabaseWrapper, facts: DatabaseFacts, *, with_versions: bool) -> None:
        """`with_versions` needs the right to read `xmin`, which a dry run may not have."""
        self._connection = connection
        self._facts = facts
        missing = () if facts.has_attribution else (*ATTRIBUTION, "attribution_confidence")
        columns = [
            "NULL" if field.attname in missing else f'c."{field.column}"' for field in CRMContact._meta.concrete_fields
        ]
        self._contacts = _CONTACTS.format(
            version="c.xmin::text" if with_versions else "''",
            made=_MADE if facts.has_ledger else "NULL, NULL",
            columns=", ".join(columns),
            joins=_JOINS if facts.has_ledger else "",
        )

    def lines(self, rows: Iterable[MappedRow]) -> dict[str, SeenLine]:
        """The settled lines of rows, by their id."""
        if not self._facts.has_ledger:
            return {}
        found = self._rows(_LINES, [row.id for row in rows])
        return {key: SeenLine(key, Outcome(outcome), contact, seen) for key, outcome, contact, seen in found}

    def contacts(self, ids: Collection[str]) -> dict[str, StandingContact]:
        """Those of these contacts that are there, by their id."""
        found: dict[str, StandingContact] = {}
        for version, made_at, given, *values in self._rows(self._contacts, list(ids)):
            draft = ContactDraft._make(values)
            found[draft.id] = StandingContact(version, draft, made_at, set(given.split(",")) if given else set())
        self._add_given(found)
        return found

    def _add_given(self, found: Mapping[str, StandingContact]) -> None:
        """What the first runs filled is asked only where it matters: in contacts of ours that somebody touched."""
        touched = [key for key, contact in found.items() if contact.made_at and not contact.is_as_written]
        for contact_id, filled in self._rows(_GIVEN, touched) if touched else ():
            found[contact_id].given.update(filled.split(","))

    def _rows(self, query: str, ids: list[str]) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, [ids])
            return list(cursor.fetchall())

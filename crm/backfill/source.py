"""Pages of source rows by keyset. Only reads.

A row whose ledger line says created, merged or exists is not read again. That is an anti-join on the ledger's key and
no watermark, so no row is ever missed; where no row has a line as yet, there is nothing to be asked. Every look-up
beside the paged table is a LATERAL with a LIMIT, and what is asked of it is opaque to the planner: a page stays a walk
along an index, with one probe a row, whatever the planner believes of tables that this very run is filling.

Timestamps and rates are fetched as PostgreSQL's own text: they are carried over, so nothing is gained by parsing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from psycopg.types.string import TextLoader

from crm.backfill.outcome import Source
from crm.backfill.schema import DatabaseFacts

Key = tuple[str, ...]

#: What Python's str.strip() takes away, for PostgreSQL's btrim(): both must see the same address.
WHITE_SPACE = "".join(character for character in map(chr, range(0x3001)) if character.isspace())

_LINE_OF_ROW = """
       LEFT JOIN LATERAL (
         SELECT outcome, reason, run_id FROM ledger_entry
          WHERE id = 'c' || left(encode(sha256(convert_to('{table}:' || r.id, 'UTF8')), 'hex'), 24) LIMIT 1
       ) line ON true"""


class Choice(NamedTuple):
    """Which rows a reader looks at: what is joined to a row `r` of `{table}`, and the condition."""

    join: str
    condition: str


#: The rows that have no settled line in the ledger.
UNSETTLED = Choice(_LINE_OF_ROW, "(line.outcome IS NULL OR line.outcome = 'error')")
_NO_LINE = " CROSS JOIN (SELECT NULL::text AS outcome, NULL::text AS reason, NULL::bigint AS run_id) line"
#: Every row, and the ledger is not asked: for a source of which no row had a line when the run began. Should one have
#: got a line since, the ledger's key refuses a second, and the batch is read again, asking.
EVERY_ROW = Choice(_NO_LINE, "true")

# The columns by name and never r.*: the role of the backfill may not read the secret ones.
_PROFILES = """
SELECT r.*, u.email
  FROM (SELECT r.id, r."createdAt", r."updatedAt", line.reason, r.role, r."firstName", r."lastName", r.phone,
               r."companyName", r."userId", {clerk_user_id} AS "clerkUserId"
          FROM profiles r {line}
         WHERE r.role = ANY(%(labels)s::"UserRole"[]) {conditions}
         ORDER BY r.id LIMIT %(size)s) r
       LEFT JOIN LATERAL (SELECT email FROM users WHERE users.id = r."userId" LIMIT 1) u ON true
 ORDER BY r.id
"""
_LEADS = """
SELECT r.*, COALESCE(p.id, r."assignedPreparerId")
  FROM (SELECT r.id, r."createdAt", r."updatedAt", line.reason, r.status, r.type, r.email, r."firstName", r."lastName",
               r.phone, r.source, r."lastContactedAt", r."referrerUsername", r."referrerType", r."commissionRate",
               r."commissionRateLockedAt", r."attributionMethod", r."attributionConfidence", r."assignedPreparerId"
          FROM leads r {line}
         WHERE r.status = ANY(%(labels)s::"LeadStatus"[]) {conditions}
         ORDER BY r."createdAt", r.id LIMIT %(size)s) r
       LEFT JOIN LATERAL (
         SELECT id FROM profiles WHERE id = r."assignedPreparerId" OR "userId" = r."assignedPreparerId"
          ORDER BY id <> r."assignedPreparerId" LIMIT 1
       ) p ON r."assignedPreparerId" IS NOT NULL
 ORDER BY r."createdAt", r.id
"""
_AFTER = {"profiles": "r.id > %(id)s", "leads": '(r."createdAt", r.id) > (%(created_at)s::timestamp, %(id)s)'}

# One person's rows are all in one partition, so that who comes first is the same for any number of them. The part of
# an address before the @ is ASCII, or the row is an error: the "C" collation lower-cases it exactly as Python does.
_PERSON = {
    "profiles": """COALESCE(
        (SELECT NULLIF(btrim(users.email, %(white_space)s), '') FROM users WHERE users.id = r."userId"), r.id)""",
    "leads": "btrim(r.email, %(white_space)s)",
}
_IN_PARTITION = """abs(hashtext(lower(split_part({person}, '@', 1) COLLATE "C")) %% %(partitions)s) = %(partition)s"""

# What the planner takes for half of the rows, since it does not look into it. It would take them for next to none, by
# statistics that know of no row without a line, or by none at all; and then it would sort whole tables for every page,
# instead of walking along the index until the page is full.
_OPAQUE = "CASE WHEN {} THEN true ELSE false END"


@dataclass(frozen=True, slots=True)
class Partition:
    """One of `count` shares of the people."""

    number: int
    count: int


EVERYBODY = Partition(0, 1)


@dataclass(frozen=True, slots=True)
class Apart:
    """Rows by id that are taken apart from the others: either these alone are read, or all but these."""

    source_ids: Sequence[str]
    alone: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Source rows that were read at once, as they came from the database, and the key to go on after."""

    rows: list[tuple[Any, ...]]
    key: Key | None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class SourceReader:
    """Reads one source by keyset: profiles by id, leads by creation and id.

    `ids` are those of the rows that are to be looked at, where they are known, so that the others are passed over.
    """

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    source: Source
    since: str | None = None
    partition: Partition = EVERYBODY
    run_id: int | None = None
    apart: Apart | None = None
    choice: Choice = UNSETTLED
    ids: Sequence[str] | None = None

    def asking_the_ledger(self) -> SourceReader:
        """The same reader, which asks the ledger about every row where that was spared up to now."""
        return replace(self, choice=UNSETTLED) if self.choice == EVERY_ROW else self

    def page(self, after: Key | None, size: int) -> Page:
        """At most `size` rows that are to be looked at, from strictly after a key on.

        An error is tried again by every run, and once by each: a batch may have been committed though nobody heard so.
        """
        table = self.source.table
        parameters: dict[str, Any] = {
            "labels": self.facts.labels_of(self.source),
            "size": size,
            "white_space": WHITE_SPACE,
        }
        conditions = [_OPAQUE.format(self.choice.condition)]
        if self.run_id is not None:
            conditions.append(_OPAQUE.format("line.run_id IS DISTINCT FROM %(run_id)s"))
            parameters["run_id"] = self.run_id
        if after is not None:
            conditions.append(_AFTER[table])
            parameters |= dict(zip(("id", "created_at"), reversed(after), strict=False))
        if self.ids is not None:
            conditions.append("r.id = ANY(%(ids)s)")
            parameters["ids"] = self.ids
        if self.since is not None:
            conditions.append('r."updatedAt" >= %(since)s::timestamp')
            parameters["since"] = self.since
        if self.apart is not None:
            conditions.append("r.id = ANY(%(apart)s)" if self.apart.alone else "r.id <> ALL(%(apart)s)")
            parameters["apart"] = list(self.apart.source_ids)
        if self.partition.count > 1:
            conditions.append(_OPAQUE.format(_IN_PARTITION.format(person=_PERSON[table])))
            parameters |= {"partition": self.partition.number, "partitions": self.partition.count}
        query = (_PROFILES if table == "profiles" else _LEADS).format(
            line=self.choice.join.format(table=table) if self.facts.has_ledger else _NO_LINE,
            clerk_user_id='r."clerkUserId"' if self.facts.has_clerk_user_id else "NULL",
            conditions="".join(f" AND {condition}" for condition in conditions),
        )
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            rows = cursor.fetchall()
        return Page(rows, self._key(rows[-1]) if rows else None)

    def _key(self, row: tuple[Any, ...]) -> Key:
        identifier, created_at = row[0], row[1]
        return (identifier,) if self.source.table == "profiles" else (created_at, identifier)


def read_as_text(cursor: CursorWrapper) -> None:
    """Let this cursor return timestamps and numerics as the text that PostgreSQL sends."""
    for type_name in ("timestamp", "timestamptz", "numeric"):
        cursor.adapters.register_loader(type_name, TextLoader)

"""Reads pages of source rows by keyset. Only reads.

A migrated row is not read again. This is an anti-join on the key of the ledger instead of a watermark, so no row is
missed. If no row of a source has an entry, the ledger is not read. Each lookup in another table is a LATERAL with a
LIMIT, and its conditions are opaque to the planner. So a page is always an index scan with one probe per row, whatever
the planner estimates for tables that this run is filling.

Timestamps and rates are read as PostgreSQL's text. They are copied, so they need not be parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from django.db import DatabaseError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.referrers import Referrers, preparer_labels
from crm.outcome import Outcome, Reason, Refusal, Source
from crm.postgres.apart import read_in_parts, refusal_of_reading
from crm.postgres.facts.schema import SOURCE_OF_STRAYS, DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.rules.addresses import trimmed_address_sql
from crm.rules.mapping import contact_id, contact_id_sql
from crm.rules.source_rows import SOURCE_TABLES, RawRow, SourceTable

Key = tuple[str | None, ...]

#: The maximum size of the texts of a page in bytes. A single row may be larger.
BYTES_OF_PAGE = 4_000_000
#: The first part of the key of a page of ids that several rows have. A text of PostgreSQL contains no NUL.
_REPEATED = "\0repeated"


def address_of_profile(spelled: Callable[[str], str], missing: Container[str], profile: str = "r") -> str:
    """Return the address of a `profile` in SQL: its user's, else its own; NULL where neither has one.

    `spelled` gives the form of an address, in which a blank one is ''. `missing` are the columns that the database
    lacks.
    """
    of_user = f"SELECT NULLIF({spelled('users.email')}, '') FROM users WHERE users.id = {profile}.\"userId\" LIMIT 1"
    own = "NULL" if "profiles.email" in missing else f"NULLIF({spelled(f'{profile}.email')}, '')"
    return f"COALESCE(({of_user}), {own})"


def entry_of_row(columns: str = "outcome, reason, run_id") -> str:
    """Return the SQL that joins to a row `r` of `{table}` its ledger entry, as `entry` with these columns."""
    return f"""
       LEFT JOIN LATERAL (
         SELECT {columns} FROM ledger_entry WHERE id = {contact_id_sql("'{table}:' || r.id")} LIMIT 1
       ) entry ON true"""


class Choice(NamedTuple):
    """Which rows a reader reads: the SQL of the join to a row `r` of `{table}`, and the condition."""

    join: str
    condition: str


#: The rows that are not migrated.
UNSETTLED = Choice(entry_of_row(), "(entry.outcome IS NULL OR entry.outcome = 'error')")
#: These, and rows whose contact is missing, or was created again under its old id since the row matched it.
UNSETTLED_OR_GONE = Choice(
    entry_of_row("outcome, contact_id, reason, run_id"),
    f"""({UNSETTLED.condition} OR (SELECT true FROM crm_contacts c WHERE c.id = entry.contact_id LIMIT 1) IS NULL
         OR (SELECT made.run_id > entry.run_id FROM ledger_entry made
              WHERE made.id = entry.contact_id AND made.outcome = 'created' LIMIT 1))""",
)
_NO_ENTRY = " CROSS JOIN (SELECT NULL::text AS outcome, NULL::text AS reason, NULL::bigint AS run_id) entry"
#: Every row, without reading the ledger, for a source without entries at the start of the run. If a row got an entry
#: since, the key of the ledger refuses a second one, and the batch is read again with the ledger.
EVERY_ROW = Choice(_NO_ENTRY, "true")
#: These rows, which had an entry a moment ago. No ids that several rows have: those have no contact.
ROWS_WITH_ENTRY = Choice(_NO_ENTRY, "r.id IS NOT NULL")
# For a user with a profile the profile stands; but what was migrated before it came stays a row of its contact.
_IS_SIGNUP = """
((SELECT true FROM profiles WHERE profiles."userId" = r.id LIMIT 1) IS NULL OR entry.outcome IS NOT NULL)"""

_PAGE = """
SELECT {values}, {bytes} AS bytes
  FROM (SELECT {columns} FROM {table} r {entry} WHERE {labels} {conditions} ORDER BY {order} LIMIT %(size)s) r {join}
"""
# The rows up to the maximum size of a page, but at least one row.
_BOUNDED = """
SELECT * FROM (
  SELECT page.*, sum(bytes) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) AS through FROM ({page}) page
) page WHERE through - bytes < %(bytes)s ORDER BY {order}
"""
# The keys of a page without its values, used if a value cannot be read.
_KEYS = "SELECT r.id, {moment}, entry.reason FROM {table} r {entry} WHERE {labels} {conditions}"
_AFTER_ID = "r.id > %(id)s"
_AFTER_MOMENT = "({moment}, r.id) > (%(created_at)s::timestamp, %(id)s)"
_NO_MOMENT = "{moment} IS NULL"
_BYTES = "COALESCE(octet_length({}::text), 0)"
_ENTRIES = "SELECT id, outcome, reason, run_id FROM ledger_entry WHERE id = ANY(%s)"

# All rows of a person are in one partition, so that their order does not depend on the number of partitions. The local
# part of an address is ASCII, otherwise the row is an error: the "C" collation converts it to lower case like Python.
_OF_ADDRESS = f"COALESCE({trimmed_address_sql('r.email')}, r.id)"
# An intake belongs to its profile if that has a contact. Profiles are migrated before the first intake is read.
_OF_INTAKE = f"""COALESCE(
        (SELECT {{of_profile}}
           FROM profiles p
          WHERE p.id = r."profileId" AND (
            SELECT (SELECT true FROM crm_contacts c WHERE c.id = settled.contact_id LIMIT 1)
              FROM ledger_entry settled
             WHERE settled.id = {contact_id_sql("'profiles:' || p.id")} AND settled.outcome <> 'error' LIMIT 1)
          LIMIT 1),
        {_OF_ADDRESS})"""
_IN_PARTITION = """abs(hashtext(lower(split_part({person}, '@', 1) COLLATE "C")) %% %(partitions)s) = %(partition)s"""

# The planner estimates that half of the rows satisfy this, because it does not look into a CASE. By statistics without
# rows that have no entry, or without statistics, it would estimate nearly none, and sort whole tables for each page
# instead of scanning the index until the page is full.
_OPAQUE = "CASE WHEN {} THEN true ELSE false END"


@dataclass(frozen=True, slots=True)
class Partition:
    """One of `count` disjoint shares of the people."""

    number: int
    count: int


EVERYBODY = Partition(0, 1)


@dataclass(frozen=True, slots=True)
class Apart:
    """Rows by id that are read separately: only these if `alone`, otherwise all others."""

    source_ids: Sequence[str]
    alone: bool


class Fault(NamedTuple):
    """A row of which only the id is known, the reason of its error in earlier runs, and the current reason."""

    source_id: str
    known_reason: str | None
    reason: Reason
    refusal: Refusal = Refusal()


@dataclass(frozen=True, slots=True)
class Page:
    """Source rows that were read together, as they came from the database.

    The next page begins after `key`. `faults` have no position among the other rows.
    """

    rows: list[RawRow]
    key: Key | None
    is_last: bool
    faults: list[Fault] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) + len(self.faults)


@dataclass(frozen=True, slots=True)
class SourceReader:
    """Reads one source by keyset.

    `ids` are the ids of the rows to read, if they are known; other rows are skipped. `referrers` keeps the preparers of
    referrers from one page to the next.
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
    referrers: Referrers = field(default_factory=Referrers, compare=False)

    def asking_the_ledger(self) -> SourceReader:
        """Return this reader, but with the ledger entry of every row read if it skipped the ledger."""
        return replace(self, choice=UNSETTLED) if self.choice == EVERY_ROW else self

    def page(self, after: Key | None, size: int, most_new: int | None = None) -> Page:
        """Return at most `size` of the rows to read that follow a key; fewer if they are long.

        At most `most_new` of them are rows that no run has read.

        Each run retries a row in error once, even if the answer to the commit of its batch was lost. A row that cannot
        be read is a fault of the page. Ids that several rows have are last, as faults.
        """
        if after is not None and after[0] == _REPEATED:
            return self._repeated(str(after[1]), size, most_new)
        page = self._cut_page(after, size, most_new)
        # Rows without a creation time are last, and do not follow from the key of another row.
        if self._may_lack_moments and page.is_last and after is not None and after[0] is not None:
            page = self._joined(page, partial(self._cut_page, (None, None)), size, most_new)
        if self._takes_repeated and page.is_last:
            page = self._joined(page, partial(self._repeated, ""), size, most_new)
        return page

    def _joined(self, page: Page, read: Callable[[int, int | None], Page], size: int, most_new: int | None) -> Page:
        """Return the page with more rows if it has room for them."""
        room = size - len(page)
        if most_new is not None:
            most_new -= sum(row.known_reason is None for row in page.rows) + sum(
                not fault.known_reason for fault in page.faults
            )
        if room < 1 or most_new == 0:
            return replace(page, is_last=False)
        more = read(room, most_new)
        return Page(page.rows + more.rows, more.key or page.key, more.is_last, page.faults + more.faults)

    @property
    def _table(self) -> SourceTable:
        return SOURCE_TABLES[self.source.table]

    def _order(self, alias: str = "r") -> str:
        """Return the ORDER BY list."""
        return f"{self._moment(alias)}, {alias}.id" if self._table.is_sorted_by_creation else f"{alias}.id"

    def _moment(self, alias: str = "r") -> str:
        return f'{alias}."{self._table.own["created_at"].column}"'

    @property
    def _may_lack_moments(self) -> bool:
        created_at = f"{self.source.table}.{self._table.own['created_at'].column}"
        return self._table.is_sorted_by_creation and created_at in self.facts.nullable

    @property
    def _takes_repeated(self) -> bool:
        """Whether this reader returns the ids that several rows have."""
        is_home = self.source is SOURCE_OF_STRAYS[self.source.table] and self.partition.number == 0
        return (
            is_home
            and self.choice in (UNSETTLED, UNSETTLED_OR_GONE, EVERY_ROW)
            and not (self.apart and self.apart.alone)
        )

    def _page(self, after: Key | None, size: int) -> Page:
        try:
            return self._read(after, size)
        except (DatabaseError, UnicodeDecodeError) as error:
            if refusal_of_reading(error) is None:
                raise
        return self._read_apart(after, size)

    def _read(self, after: Key | None, size: int) -> Page:
        table = self._table
        query, parameters = self._query(
            _PAGE,
            after,
            values=table.values,
            bytes=" + ".join(map(_BYTES.format, table.long_values)),
            columns=table.columns(self.facts.missing, "entry.reason"),
            order=self._order(),
            join=table.join(self.facts.missing),
        )
        bounded = _BOUNDED.format(page=query, order=self._order("page"))
        with self._guarded(), self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(bounded, {**parameters, "size": size, "bytes": BYTES_OF_PAGE})
            found = cursor.fetchall()
        rows: list[RawRow] = [table.row._make(row[:-2]) for row in found]
        rows = self.referrers.add_to(self.connection, self.facts, rows)
        is_cut = bool(found) and found[-1][-1] >= BYTES_OF_PAGE
        key = self._key(rows[-1].id, rows[-1].created_at) if rows else None
        return Page(rows, key, len(rows) < size and not is_cut)

    def _guarded(self) -> AbstractContextManager[None]:
        """Use a savepoint in a transaction, so that a failed statement does not abort it."""
        if not self.connection.in_atomic_block:
            return nullcontext()
        guard: AbstractContextManager[None] = transaction.atomic(using=self.connection.alias)
        return guard

    def _read_apart(self, after: Key | None, size: int) -> Page:
        """Read a page; rows that cannot be read become faults. Raises the errors of `read_in_parts`."""
        moment = self._moment() if self._table.is_sorted_by_creation else "NULL"
        query, parameters = self._query(_KEYS, after, moment=moment)
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(f"{query} ORDER BY {self._order()} LIMIT %(size)s", {**parameters, "size": size})
            keys = cursor.fetchall()
        page = Page([], None, len(keys) < size)

        def read(some: Sequence[tuple[Any, ...]]) -> Page:
            return replace(self, ids=[key[0] for key in some])._read(after, len(some))

        for some, result in read_in_parts(keys, read):
            if isinstance(result, Refusal):
                ((identifier, created_at, known_reason),) = some
                fault = Fault(identifier, known_reason, Reason.UNREADABLE, result)
                found = Page([], self._key(identifier, created_at), is_last=False, faults=[fault])
            else:
                found = result
            is_cut = len(found) < len(some)
            is_last = page.is_last and not is_cut
            page = Page(page.rows + found.rows, found.key or page.key, is_last, page.faults + found.faults)
            if is_cut and found.rows:
                break
        return page

    def _query(self, form: str, after: Key | None, **parts: str) -> tuple[str, dict[str, Any]]:
        """Return a query of `form` for the rows that follow a key, and its parameters."""
        table = self.source.table
        parameters: dict[str, Any] = {
            "labels": self.facts.labels_of(self.source),
            "preparer_labels": preparer_labels(self.facts),
        }
        conditions = [_OPAQUE.format(self.choice.condition), *self._start(after, parameters)]
        if self.run_id is not None:
            conditions.append(_OPAQUE.format("entry.run_id IS DISTINCT FROM %(run_id)s"))
            parameters["run_id"] = self.run_id
        if self.source is Source.SIGNUPS and self.choice != ROWS_WITH_ENTRY:
            conditions.append(_OPAQUE.format(_IS_SIGNUP))
        if self.ids is not None:
            conditions.append("r.id = ANY(%(ids)s)")
            parameters["ids"] = self.ids
        if self.since is not None:
            updated_at = self._table.own["updated_at"].column
            is_new = f'r."{updated_at}" >= %(since)s::timestamp'
            may_be_null = f"{table}.{updated_at}" in self.facts.nullable
            conditions.append(f'({is_new} OR r."{updated_at}" IS NULL)' if may_be_null else is_new)
            parameters["since"] = self.since
        if self.apart is not None:
            conditions.append("r.id = ANY(%(apart)s)" if self.apart.alone else "r.id <> ALL(%(apart)s)")
            parameters["apart"] = list(self.apart.source_ids)
        if self.partition.count > 1:
            conditions.append(_OPAQUE.format(_IN_PARTITION.format(person=self._person())))
            parameters |= {"partition": self.partition.number, "partitions": self.partition.count}
        query = form.format(
            entry=self.choice.join.format(table=table) if self.facts.has_ledger else _NO_ENTRY,
            table=table,
            labels=self._labels(),
            conditions="".join(f" AND {condition}" for condition in conditions),
            **parts,
        )
        return query, parameters

    def _person(self) -> str:
        """Return the SQL of the address, or id, that determines the partition of a row."""
        if self.source.table == "profiles":
            return self._person_of_profile("r")
        if self.source.table == "tax_intake_leads" and self.facts.names_profiles and self.facts.has_ledger:
            return _OF_INTAKE.format(of_profile=self._person_of_profile("p"))
        return _OF_ADDRESS

    def _person_of_profile(self, profile: str) -> str:
        return f"COALESCE({address_of_profile(trimmed_address_sql, self.facts.missing, profile)}, {profile}.id)"

    def _labels(self) -> str:
        """Return the condition of the rows with a label of this source. One source also reads those without a label."""
        table = self.source.table
        label = self._table.label_sql(self.facts.missing)
        condition = f"{label} = ANY(%(labels)s::{self.facts.label_types[table]}[])"
        if self._table.label_column is None:
            return _OPAQUE.format(condition)
        is_nullable = f"{table}.{self._table.label_column}" in self.facts.nullable
        return (
            f"({condition} OR {label} IS NULL)" if self.source is SOURCE_OF_STRAYS[table] and is_nullable else condition
        )

    def _start(self, after: Key | None, parameters: dict[str, Any]) -> list[str]:
        """Return the conditions of the rows with a unique id that follow a key."""
        table = self.source.table
        conditions = []
        if after is not None:
            *created_at, identifier = after
            has_moment = created_at not in ([], [None])
            conditions += [_NO_MOMENT.format(moment=self._moment())] if created_at == [None] else []
            if identifier is not None:
                conditions.append(_AFTER_MOMENT.format(moment=self._moment()) if has_moment else _AFTER_ID)
            parameters |= {"id": identifier, "created_at": created_at[0] if created_at else None}
        if f"{table}.id" in self.facts.nullable:
            conditions.append("r.id IS NOT NULL")
        if repeated := self.facts.repeated_ids.get(table):
            conditions.append("r.id <> ALL(%(repeated)s)")
            parameters["repeated"] = list(repeated)
        return conditions

    def _repeated(self, after: str, size: int, most_new: int | None) -> Page:
        """Return the ids that several rows have, each as one error, because the rows cannot be distinguished."""
        table = self.source.table
        waiting = {contact_id(table, identifier): identifier for identifier in self.facts.repeated_ids.get(table, ())}
        entries = {}
        if self.facts.has_ledger and waiting:
            with self.connection.cursor() as cursor:
                cursor.execute(_ENTRIES, [list(waiting)])
                entries = {key: (outcome, reason, run_id) for key, outcome, reason, run_id in cursor.fetchall()}
        faults = []
        for key, identifier in waiting.items():
            outcome, known_reason, run_id = entries.get(key, (None, None, None))
            if outcome in (None, Outcome.ERROR) and (run_id is None or run_id != self.run_id):
                faults.append(Fault(identifier, known_reason, Reason.DUPLICATE_ID))
        found = sorted(fault for fault in faults if not after or fault.source_id > after)
        some = found[:size]
        if most_new is not None:
            news = [number for number, fault in enumerate(some) if fault.known_reason is None]
            some = some[: news[most_new - 1] + 1] if len(news) >= most_new else some
        return Page([], (_REPEATED, some[-1].source_id) if some else None, len(some) == len(found), some)

    def _cut_page(self, after: Key | None, size: int, most_new: int | None) -> Page:
        """Return a page with at most `most_new` rows that no run has read."""
        page = self._page(after, size)
        if most_new is None:
            return page
        if page.faults:
            # They have no position, so the page cannot be cut.
            return self._page(after, min(size, most_new))
        news = [number for number, row in enumerate(page.rows) if row.known_reason is None]
        if len(news) < most_new:
            return page
        rows = page.rows[: news[most_new - 1] + 1]
        return Page(rows, self._key(rows[-1].id, rows[-1].created_at), is_last=False)

    def _key(self, identifier: str, created_at: str | None) -> Key:
        return (created_at, identifier) if self._table.is_sorted_by_creation else (identifier,)

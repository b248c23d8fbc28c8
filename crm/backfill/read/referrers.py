"""Finds the tax preparers who referred people, for rows that name no preparer. Only reads.

A referrer is the `trackingCode`, `customTrackingCode` or `shortLinkUsername` of a profile. It means the profiles that
have it in this spelling or, if there are none, the tax preparers who have it in another case or with white space around
it. Of several tax preparers, the first counts by column, in this order, then by id.

Each code has an index, but not its lower case. So the unknown referrers of a page are looked up together: by the
indexes, and those that no profile has in this spelling by one scan of the tax preparers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from django.conf import settings
from django.db import DatabaseError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.postgres.apart import read_apart, refusal_of_reading
from crm.postgres.facts.schema import DatabaseFacts
from crm.rules.mapping import canonical_username, canonical_username_sql, trimmed_username_sql
from crm.rules.source_rows import PREPARER_CODES, REFERRED_ROWS, RawRow

#: Maximum number of referrers in memory.
MAX_KNOWN = 20_000

_PROFILES = "SELECT id, {is_preparer}, {codes} FROM profiles WHERE {condition}"
_IS_PREPARER = "role = ANY(%(labels)s::{label_type}[])"


class _Coded(NamedTuple):
    """A profile with its codes (None: it lacks the code)."""

    id: str
    is_preparer: bool
    codes: tuple[str | None, ...]


@dataclass(slots=True)
class Referrers:
    """The referrers that were looked up, with the id of the tax preparer's profile (None: no tax preparer)."""

    known: dict[str, str | None] = field(default_factory=dict)

    def add_to(self, connection: BaseDatabaseWrapper, facts: DatabaseFacts, rows: list[RawRow]) -> list[RawRow]:
        """Return the rows of a page, with the tax preparer who referred them in those that name no preparer."""
        if not settings.CRM_ASSIGN_TO_REFERRER:
            return rows
        referred = [(number, row, name) for number, row in enumerate(rows) if (name := referrer_of(row))]
        self._look_up(_Profiles(connection, facts), {name for _, _, name in referred})
        found = list(rows)
        for number, row, name in referred:
            if (preparer := self.known[name]) is not None and isinstance(row, REFERRED_ROWS):
                found[number] = row._replace(referring_preparer_id=preparer)
        return found

    def _look_up(self, profiles: _Profiles, names: set[str]) -> None:
        wanted = names - self.known.keys()
        if not wanted:
            return
        if len(self.known) + len(wanted) > MAX_KNOWN:
            self.known.clear()
            wanted = names
        exact = _by_code(profiles.with_a_code(wanted), str)
        others = {canonical_username(name) for name in wanted - exact.keys()}
        by_canonical = _by_code(profiles.preparers_with_a_code(others), canonical_username) if others else {}
        for name in wanted:
            candidates = exact[name] if name in exact else by_canonical.get(canonical_username(name), ())
            preparers = [(rank, profile.id) for rank, profile in candidates if profile.is_preparer]
            self.known[name] = min(preparers)[1] if preparers else None


def preparer_labels(facts: DatabaseFacts) -> list[str]:
    """Return the labels of the role TAX_PREPARER in the database."""
    return list(facts.roles.get("TAX_PREPARER", ()))


def codes_of_preparers(facts: DatabaseFacts) -> str:
    """Return the SELECT of the tax preparers' profile ids and codes; without rows if referrers are not assigned.

    Its parameter `preparer_labels` has the value of the function of this name.
    """
    codes = ", ".join(f'p."{code}"' for code in _codes_of(facts))
    return f"""
        SELECT p.id, code FROM profiles p CROSS JOIN LATERAL unnest(ARRAY[{codes}]::text[]) AS code
         WHERE {str(settings.CRM_ASSIGN_TO_REFERRER).lower()} AND {trimmed_username_sql("code")} <> ''
           AND p.role = ANY(%(preparer_labels)s::{facts.label_types["profiles"]}[])"""


def _codes_of(facts: DatabaseFacts) -> list[str]:
    """Return the columns of codes that the database has."""
    return [code for code in PREPARER_CODES if f"profiles.{code}" not in facts.missing]


def referrer_of(row: RawRow) -> str | None:
    """Return the trimmed referrer of a row that names no preparer, or None."""
    if not isinstance(row, REFERRED_ROWS) or row.referrer_username is None:
        return None
    if row.raw_assigned_preparer_id and row.raw_assigned_preparer_id.strip():
        return None
    return row.referrer_username.strip() or None


def _by_code(profiles: Iterable[_Coded], spelling: Callable[[str], str]) -> dict[str, list[tuple[int, _Coded]]]:
    """Return the profiles by each of their codes in a spelling, with the rank of the code."""
    found: dict[str, list[tuple[int, _Coded]]] = {}
    for profile in profiles:
        for rank, code in enumerate(profile.codes):
            if code is not None:
                found.setdefault(spelling(code), []).append((rank, profile))
    return found


@dataclass(frozen=True, slots=True)
class _Profiles:
    """Reads profiles by their codes."""

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts

    @property
    def _codes(self) -> list[str]:
        return _codes_of(self.facts)

    def with_a_code(self, names: Iterable[str]) -> Iterable[_Coded]:
        """Return the profiles that have one of these codes in this spelling."""
        # One query per column, so that each uses its index. For an OR of the columns, the planner may not.
        found = [self._read(f'"{code}" = ANY(%(names)s)', list(names)) for code in self._codes]
        return {profile for profiles in found for profile in profiles}

    def preparers_with_a_code(self, canonical: Iterable[str]) -> Iterable[_Coded]:
        """Return the tax preparers who have one of these codes in canonical spelling."""
        if not self._codes:
            return ()
        # Every version of PostgreSQL hashes a subquery, but not every one an array.
        is_one = " OR ".join(
            f"""{canonical_username_sql(f'"{code}"')} IN (SELECT unnest(%(names)s::text[]))""" for code in self._codes
        )
        return self._read(f"{self._is_preparer} AND ({is_one})", list(canonical))

    @property
    def _is_preparer(self) -> str:
        return _IS_PREPARER.format(label_type=self.facts.label_types["profiles"])

    def _read(self, condition: str, names: Sequence[str]) -> list[_Coded]:
        codes = ", ".join(f'"{code}"' if code in self._codes else "NULL::text" for code in PREPARER_CODES)
        query = _PROFILES.format(is_preparer=self._is_preparer, codes=codes, condition=condition)
        try:
            with self._guarded():
                return self._rows(query, names=names)
        except (DatabaseError, UnicodeDecodeError) as error:
            if refusal_of_reading(error) is None:
                raise
        # A profile with an unreadable code counts as no referrer; the others are read without it.
        with self.connection.cursor() as cursor:
            cursor.execute(
                f"SELECT id FROM profiles WHERE {self._is_preparer}", {"labels": preparer_labels(self.facts)}
            )
            ids = [identifier for (identifier,) in cursor.fetchall() if identifier is not None]
        query = f"{query} AND id = ANY(%(ids)s)"
        return read_apart(self.connection, ids, lambda some: self._rows(query, names=names, ids=list(some)))[0]

    def _guarded(self) -> AbstractContextManager[None]:
        """Return a savepoint inside a transaction, so that it continues after a statement that fails."""
        if not self.connection.in_atomic_block:
            return nullcontext()
        guard: AbstractContextManager[None] = transaction.atomic(using=self.connection.alias)
        return guard

    def _rows(self, query: str, **parameters: Any) -> list[_Coded]:
        with self.connection.cursor() as cursor:
            cursor.execute(query, {"labels": preparer_labels(self.facts), **parameters})
            return [_Coded(identifier, bool(is_preparer), tuple(codes)) for identifier, is_preparer, *codes in cursor]

"""The tax preparers who referred people: a row without a preparer gets the one whose code its referrer is. Only reads.

A referrer is a profile's `trackingCode`, `customTrackingCode` or `shortLinkUsername`. Whoever has it in this very
spelling is meant; where no profile has, a tax preparer who has it in another case or with white space around it. Of
several preparers one counts by the column of the code, in this order, then by the id.

There is an index on each code and none on its lower case. So the referrers of a page that are not known yet are looked
up together: by the indexes, and those that no profile has in this spelling by one pass over the preparers.
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

#: How many referrers are remembered.
MAX_KNOWN = 20_000

_PROFILES = "SELECT id, {is_preparer}, {codes} FROM profiles WHERE {condition}"
_IS_PREPARER = "role = ANY(%(labels)s::{label_type}[])"


class _Coded(NamedTuple):
    """A profile with its codes, None for one that it lacks."""

    id: str
    is_preparer: bool
    codes: tuple[str | None, ...]


@dataclass(slots=True)
class Referrers:
    """Who referred people, as far as it was asked: by referrer the id of a tax preparer's profile, None for nobody."""

    known: dict[str, str | None] = field(default_factory=dict)

    def add_to(self, connection: BaseDatabaseWrapper, facts: DatabaseFacts, rows: list[RawRow]) -> list[RawRow]:
        """The rows of a page, those without a preparer with the tax preparer who referred them, if one did."""
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
    """The role of tax preparers, as the database spells it."""
    return list(facts.roles.get("TAX_PREPARER", ()))


def codes_of_preparers(facts: DatabaseFacts) -> str:
    """The SELECT of the tax preparers' codes, with the ids of their profiles; none where referrers are not assigned.

    Its parameter `preparer_labels` is what the function of this name returns.
    """
    codes = ", ".join(f'p."{code}"' for code in _codes_of(facts))
    return f"""
        SELECT p.id, code FROM profiles p CROSS JOIN LATERAL unnest(ARRAY[{codes}]::text[]) AS code
         WHERE {str(settings.CRM_ASSIGN_TO_REFERRER).lower()} AND {trimmed_username_sql("code")} <> ''
           AND p.role = ANY(%(preparer_labels)s::{facts.label_types["profiles"]}[])"""


def _codes_of(facts: DatabaseFacts) -> list[str]:
    """The columns of codes that the database has."""
    return [code for code in PREPARER_CODES if f"profiles.{code}" not in facts.missing]


def referrer_of(row: RawRow) -> str | None:
    """The referrer of a row that names no preparer, without white space around it; None where there is none."""
    if not isinstance(row, REFERRED_ROWS) or row.referrer_username is None:
        return None
    if row.raw_assigned_preparer_id and row.raw_assigned_preparer_id.strip():
        return None
    return row.referrer_username.strip() or None


def _by_code(profiles: Iterable[_Coded], spelling: Callable[[str], str]) -> dict[str, list[tuple[int, _Coded]]]:
    """The profiles by each of their codes in a spelling, with the rank of the code."""
    found: dict[str, list[tuple[int, _Coded]]] = {}
    for profile in profiles:
        for rank, code in enumerate(profile.codes):
            if code is not None:
                found.setdefault(spelling(code), []).append((rank, profile))
    return found


@dataclass(frozen=True, slots=True)
class _Profiles:
    """Profiles by their codes."""

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts

    @property
    def _codes(self) -> list[str]:
        return _codes_of(self.facts)

    def with_a_code(self, names: Iterable[str]) -> Iterable[_Coded]:
        """The profiles that have one of these codes in this very spelling."""
        # Each by its own index; one OR over all of them would be left to the planner's luck.
        found = [self._read(f'"{code}" = ANY(%(names)s)', list(names)) for code in self._codes]
        return {profile for profiles in found for profile in profiles}

    def preparers_with_a_code(self, canonical: Iterable[str]) -> Iterable[_Coded]:
        """The tax preparers who have one of these codes in canonical spelling."""
        if not self._codes:
            return ()
        # A subquery is looked up in a hash table in every version of PostgreSQL.
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
        # A profile of which a code cannot be read referred nobody; it costs the others nothing.
        with self.connection.cursor() as cursor:
            cursor.execute(
                f"SELECT id FROM profiles WHERE {self._is_preparer}", {"labels": preparer_labels(self.facts)}
            )
            ids = [identifier for (identifier,) in cursor.fetchall() if identifier is not None]
        query = f"{query} AND id = ANY(%(ids)s)"
        return read_apart(self.connection, ids, lambda some: self._rows(query, names=names, ids=list(some)))[0]

    def _guarded(self) -> AbstractContextManager[None]:
        """Keep a statement that fails from being the last one of a transaction."""
        if not self.connection.in_atomic_block:
            return nullcontext()
        guard: AbstractContextManager[None] = transaction.atomic(using=self.connection.alias)
        return guard

    def _rows(self, query: str, **parameters: Any) -> list[_Coded]:
        with self.connection.cursor() as cursor:
            cursor.execute(query, {"labels": preparer_labels(self.facts), **parameters})
            return [_Coded(identifier, bool(is_preparer), tuple(codes)) for identifier, is_preparer, *codes in cursor]

"""Counts the contacts by type and by source, and how many have an attribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.postgres.loaders import read_as_text
from crm.rules.mapping import has_no_referrer_sql

#: The source of contacts that the backfill did not create.
OTHERS = "others"

_REFERRER = 'c."referrerUsername"'
_WITH_REFERRER = f"count(*) FILTER (WHERE NOT {has_no_referrer_sql(_REFERRER)})"
_FIGURES = """
SELECT CASE WHEN GROUPING(c."contactType") = 0 THEN c."contactType"::text END,
       CASE WHEN GROUPING(entry.source) = 0 THEN COALESCE(entry.source, %(others)s) END,
       count(*), {with_attribution}, min(c."createdAt"), max(c."createdAt")
  FROM crm_contacts c LEFT JOIN ledger_entry entry ON entry.id = c.id AND entry.outcome = 'created'
 GROUP BY GROUPING SETS ((c."contactType", entry.source), (c."contactType"), (entry.source), ())
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts of the contacts of one type, one source, or both.

    `with_attribution` counts those with a referrer; None if the table has no such column. `oldest` and `newest` are
    the first and last time of creation, in UTC; None if there is no contact.
    """

    total: int
    with_attribution: int | None
    oldest: str | None
    newest: str | None

    @property
    def percent(self) -> float | None:
        """The percentage of contacts with an attribution, rounded to one decimal; None if there is no contact."""
        if self.with_attribution is None or not self.total:
            return None
        return round(100 * self.with_attribution / self.total, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "total": self.total,
            "with_attribution": self.with_attribution,
            "percent": self.percent,
            "oldest": self.oldest,
            "newest": self.newest,
        }


#: Figures by contact type and source; None stands for all.
FiguresTable = dict[tuple[str | None, str | None], Figures]


def count_contacts(connection: BaseDatabaseWrapper, *, has_referrer: bool) -> FiguresTable:
    """Return the figures of all contacts, including those created elsewhere. Reads the table once.

    `has_referrer` says whether the table has the column `referrerUsername`.
    """
    query = _FIGURES.format(with_attribution=_WITH_REFERRER if has_referrer else "NULL")
    with connection.cursor() as cursor:
        read_as_text(cursor)
        cursor.execute(query, {"others": OTHERS})
        return {(contact_type, source): Figures(*figures) for contact_type, source, *figures in cursor.fetchall()}

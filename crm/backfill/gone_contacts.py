"""Counts migrated rows whose contact is missing from `crm_contacts`.

Single missing contacts are normal: people delete them. Many at once mean that the table was restored from an old backup
or purged, which must not pass as deletions. Counting all of them requires a scan of the ledger and the contacts, so a
run checks a sample first: consecutive ledger entries from a random position in the order of their keys. The keys are
hashes, so the sample has entries of every age and source. All rows are only counted if the sample has more missing
contacts than expected from the last count.

If one contact in 200 is missing, a sample of 2,000 entries misses all of them in one of 20,000 runs; if one in 1,000
is missing, in one of seven. If the ledger has no more entries than that, the sample is the count.
"""

from __future__ import annotations

import math
import secrets
from typing import NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.models import BackfillRun
from crm.outcome import WITH_CONTACT

#: Number of ledger entries in the sample.
SAMPLE = 2_000
#: Minimum increase since the last count that is reported: rows, and their share of all migrated rows.
MIN_NEWS, MIN_SHARE_OF_NEWS = 10, 0.001
#: The key under which the record of a run stores the last count.
RECORDED = "contacts_gone"

_WITH_CONTACT = ", ".join(f"'{outcome}'" for outcome in WITH_CONTACT)
_ENTRIES = f"SELECT contact_id FROM ledger_entry WHERE id {{}} %(start)s AND outcome IN ({_WITH_CONTACT})"
# Ordered by the primary key, so that only the sample is read. PostgreSQL cannot turn a scalar subquery with a LIMIT
# into a join, so it remains one index lookup per entry.
_OF_SAMPLE = f"""
SELECT count(*), count(*) FILTER (
         WHERE (SELECT true FROM crm_contacts c WHERE c.id = entry.contact_id LIMIT 1) IS NULL)
  FROM (SELECT * FROM (({_ENTRIES.format(">=")} ORDER BY id LIMIT %(size)s)
                       UNION ALL
                       ({_ENTRIES.format("<")} ORDER BY id LIMIT %(size)s)) entry LIMIT %(size)s) entry
"""
_OF_ALL = f"""
SELECT count(*) FROM ledger_entry entry
 WHERE entry.outcome IN ({_WITH_CONTACT}) AND NOT EXISTS (SELECT FROM crm_contacts c WHERE c.id = entry.contact_id)
"""


class GoneContacts(NamedTuple):
    """The number of migrated rows whose contact is missing.

    `rows` is the current count, or the last one if the sample gave no reason to count. `settled` is the number of all
    migrated rows. `known` is the count of an earlier run, and `known_to` that run; 0 and None if there is none.
    """

    rows: int
    settled: int
    known: int
    known_to: int | None

    @property
    def is_news(self) -> bool:
        """Whether more are missing since the last count than people normally delete."""
        return self.rows - self.known >= max(MIN_NEWS, self.settled * MIN_SHARE_OF_NEWS)


def count_gone_contacts(
    connection: BaseDatabaseWrapper, settled: int, *, run_id: int | None, size: int = SAMPLE
) -> GoneContacts:
    """Check a sample of `size` entries, and count all rows if it gives a reason to. Only reads.

    `settled` is the number of rows with an outcome that has a contact. `run_id` is None for a dry run, which may lack
    the right to read the records of runs and so knows no last count.
    """
    known_to, known = _last_count() if run_id is not None else (None, 0)
    with connection.cursor() as cursor:
        cursor.execute(_OF_SAMPLE, {"start": f"c{secrets.token_hex(12)}", "size": size})
        taken, gone = cursor.fetchone()
        if taken < size:
            return GoneContacts(gone, settled, known, known_to)
        if not is_more_than_expected(gone, taken * known / max(settled, known, 1)):
            return GoneContacts(known, settled, known, known_to)
        cursor.execute(_OF_ALL)
        (rows,) = cursor.fetchone()
    return GoneContacts(rows, settled, known, known_to)


def is_more_than_expected(found: int, expected: float) -> bool:
    """Return whether a sample has more than expected by more than two standard deviations."""
    return found > expected + 2 * math.sqrt(expected)


def _last_count() -> tuple[int | None, int]:
    counted = BackfillRun.objects.filter(kind=BackfillRun.Kind.BACKFILL, census__has_key=RECORDED).order_by("-pk")
    return counted.values_list("pk", f"census__{RECORDED}").first() or (None, 0)

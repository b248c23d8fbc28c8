"""Rows that have lost their contact: it was there when they were settled, and is gone from `crm_contacts`.

People delete contacts one by one, and that is no news. A table that was restored from an old backup, or was purged, is:
nobody meant the backfill to take that for deletions. To count all such rows takes a pass over the ledger and the
contacts. So a run looks at a sample: as many entries of the ledger as a look-up each costs next to nothing, from a
place in the order of their keys that is drawn anew each time. The keys are digests, so these are entries of every age
and source alike. Only where more of them have lost their contact than the last count lets expect, all are counted.

Of a loss of one contact in 200, a sample of 2,000 entries misses everything once in 20,000 nights; of one in 1,000,
once in seven. Where there are no more entries than that, the sample is the count.
"""

from __future__ import annotations

import math
import secrets
from typing import NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.models import BackfillRun
from crm.outcome import WITH_CONTACT

SAMPLE = 2_000
#: So many more than at the last count are news: rows, and their share of all that had a contact.
MIN_NEWS, MIN_SHARE_OF_NEWS = 10, 0.001
#: The name under which a run's record keeps the last count.
RECORDED = "contacts_gone"

_WITH_CONTACT = ", ".join(f"'{outcome}'" for outcome in WITH_CONTACT)
_ENTRIES = f"SELECT contact_id FROM ledger_entry WHERE id {{}} %(start)s AND outcome IN ({_WITH_CONTACT})"
# The order is that of the index, so that no more is read than is taken. A scalar subquery with a LIMIT stays a probe.
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
    """How many rows have lost their contact, of all that had one.

    `rows` is a count where there was reason to count, and else that of the last count. `known` is what an earlier run
    counted, `known_to` that run; None where none did.
    """

    rows: int
    settled: int
    known: int
    known_to: int | None

    @property
    def is_news(self) -> bool:
        """Whether so many are gone since the last count that no person will have deleted them one by one."""
        return self.rows - self.known >= max(MIN_NEWS, self.settled * MIN_SHARE_OF_NEWS)


def look_for_gone_contacts(
    connection: BaseDatabaseWrapper, settled: int, *, run_id: int | None, size: int = SAMPLE
) -> GoneContacts:
    """Take the sample, and count where that gives reason to. Only reads.

    `settled` is how many rows have an outcome with a contact. A dry run, without a number, may have no right to read
    the record of the runs: for it nothing is known.
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
    """Whether a sample has so many that chance alone hardly explains it: two standard deviations more."""
    return found > expected + 2 * math.sqrt(expected)


def _last_count() -> tuple[int | None, int]:
    counted = BackfillRun.objects.filter(kind=BackfillRun.Kind.BACKFILL, census__has_key=RECORDED).order_by("-pk")
    return counted.values_list("pk", f"census__{RECORDED}").first() or (None, 0)

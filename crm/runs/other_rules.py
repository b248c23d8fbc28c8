"""The runs that went by other rules than this version.

What such a run wrote may differ from what its rows map to now, although neither the row nor the contact was changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.version import RULES

_OTHERS = "SELECT id, version, rules FROM backfill_run WHERE rules IS DISTINCT FROM %s ORDER BY id"


@dataclass(frozen=True, slots=True)
class OtherRules:
    """These runs by number, each with the version and the rules that it went by, in words."""

    runs: Mapping[int, str]

    @classmethod
    def read(cls, connection: BaseDatabaseWrapper) -> OtherRules:
        """Ask the runs' records. A run whose record is gone is none of these."""
        with connection.cursor() as cursor:
            cursor.execute(_OTHERS, [RULES])
            return cls({run: _named(version, rules) for run, version, rules in cursor.fetchall()})

    def of(self, run_ids: Iterable[int | None]) -> str | None:
        """The latest of these runs that went by other rules, in words; None where none did."""
        theirs = [run for run in run_ids if run is not None and run in self.runs]
        return self.runs[max(theirs)] if theirs else None


def _named(version: str, rules: int | None) -> str:
    return f"version {version}, rules {'not recorded' if rules is None else rules}"

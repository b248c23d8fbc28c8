"""Runs that applied other rules than this version.

A contact that such a run wrote may differ from what its row maps to now, although neither of them was changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.version import RULES

_OTHERS = "SELECT id, version, rules FROM backfill_run WHERE rules IS DISTINCT FROM %s ORDER BY id"


@dataclass(frozen=True, slots=True)
class OtherRules:
    """Runs by number, each with a description of its version and rules."""

    runs: Mapping[int, str]

    @classmethod
    def read(cls, connection: BaseDatabaseWrapper) -> OtherRules:
        """Read the records of the runs. Runs whose record was deleted are not included."""
        with connection.cursor() as cursor:
            cursor.execute(_OTHERS, [RULES])
            return cls({run: _named(version, rules) for run, version, rules in cursor.fetchall()})

    def of(self, run_ids: Iterable[int | None]) -> str | None:
        """Return the version and rules of the latest of these runs with other rules, or None if there is none."""
        theirs = [run for run in run_ids if run is not None and run in self.runs]
        return self.runs[max(theirs)] if theirs else None


def _named(version: str, rules: int | None) -> str:
    return f"version {version}, rules {'not recorded' if rules is None else rules}"

"""The attribution columns of `crm_contacts` and the index on the referrers, as the catalogue has them."""

from __future__ import annotations

from collections.abc import Iterator

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.schema import ATTRIBUTION_COLUMNS
from crm.backfill.verification.findings import Check, Finding, Kind

REFERRER = "referrerUsername"
#: The type as the catalogue prints it, and whether the column must be NOT NULL.
WANTED: dict[str, tuple[str, bool]] = {
    REFERRER: ("text", False),
    "referrerType": ("text", False),
    "commissionRate": ("numeric(5,2)", False),
    "commissionRateLockedAt": ("timestamp(3) without time zone", False),
    "attributionMethod": ("text", False),
    "attributionConfidence": ("integer", True),
}

_COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), attnotnull
  FROM pg_attribute
 WHERE attrelid = to_regclass(quote_ident(%s) || '.crm_contacts') AND attname = ANY(%s) AND NOT attisdropped
"""
# Whatever its name: an index serves when it is whole, holds every row, and the referrer stands first in it.
_INDEXES = """
SELECT i.indisvalid AND i.indisready
  FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
 WHERE i.indrelid = to_regclass(quote_ident(%s) || '.crm_contacts') AND a.attname = %s AND i.indpred IS NULL
"""


def present_columns(connection: BaseDatabaseWrapper) -> dict[str, tuple[str, bool]]:
    """The attribution columns that are there, with type and whether they are NOT NULL."""
    with connection.cursor() as cursor:
        cursor.execute(_COLUMNS, [settings.LEGACY_SCHEMA, list(ATTRIBUTION_COLUMNS)])
        return {name: (type_name, not_null) for name, type_name, not_null in cursor.fetchall()}


def check_schema(connection: BaseDatabaseWrapper, present: dict[str, tuple[str, bool]]) -> Iterator[Finding]:
    """What is wrong with the columns and the index."""
    for name, (type_name, not_null) in WANTED.items():
        if name not in present:
            yield Finding(Check.COLUMN_MISSING, Kind.DEFECT, columns=(name,))
            continue
        if present[name][0] != type_name:
            yield Finding(Check.COLUMN_TYPE, Kind.DEFECT, columns=(name,))
        if present[name][1] != not_null:
            yield Finding(Check.COLUMN_NULLABILITY, Kind.DEFECT, columns=(name,))
    with connection.cursor() as cursor:
        cursor.execute(_INDEXES, [settings.LEGACY_SCHEMA, REFERRER])
        whole = [is_whole for (is_whole,) in cursor.fetchall()]
    if not any(whole):
        yield Finding(Check.INDEX_INVALID if whole else Check.INDEX_MISSING, Kind.DEFECT, columns=(REFERRER,))

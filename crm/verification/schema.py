"""Checks the attribution columns of `crm_contacts` and the index on the referrers in the system catalogs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.postgres.facts.catalog import Column, read_tables
from crm.postgres.facts.columns import ATTRIBUTION_COLUMNS
from crm.postgres.facts.requirements import CONFIDENCE, CONTACTS, RATE, types_of
from crm.verification.findings import Check, Finding, Kind

REFERRER = "referrerUsername"
#: By column whether it must be NOT NULL. The types are those that a run accepts; a rate must store cents.
WANTED: dict[str, bool] = {column: column == CONFIDENCE for column in ATTRIBUTION_COLUMNS}
CENTS = 2

# An index of any name is accepted if it is not partial and the referrer is its first column.
_INDEXES = """
SELECT i.indisvalid AND i.indisready
  FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
 WHERE i.indrelid = to_regclass(quote_ident(%s) || '.crm_contacts') AND a.attname = %s AND i.indpred IS NULL
"""


def present_columns(connection: BaseDatabaseWrapper) -> dict[str, Column]:
    """Return the attribution columns that exist, by name."""
    columns = read_tables(connection, [CONTACTS])[CONTACTS].columns
    return {name: columns[name] for name in WANTED if name in columns}


def check_schema(connection: BaseDatabaseWrapper, present: Mapping[str, Column]) -> Iterator[Finding]:
    """Yield a finding for each fault of the columns and the index."""
    for name, not_null in WANTED.items():
        if name not in present:
            yield Finding(Check.COLUMN_MISSING, Kind.DEFECT, columns=(name,))
            continue
        column = present[name]
        keeps_cents = name != RATE or column.scale is None or column.scale >= CENTS
        if column.type not in types_of(CONTACTS, name)[1] or not keeps_cents:
            yield Finding(Check.COLUMN_TYPE, Kind.DEFECT, columns=(name,))
        if column.not_null != not_null:
            yield Finding(Check.COLUMN_NULLABILITY, Kind.DEFECT, columns=(name,))
    with connection.cursor() as cursor:
        cursor.execute(_INDEXES, [settings.LEGACY_SCHEMA, REFERRER])
        indexes = [is_valid for (is_valid,) in cursor.fetchall()]
    if not any(indexes):
        yield Finding(Check.INDEX_INVALID if indexes else Check.INDEX_MISSING, Kind.DEFECT, columns=(REFERRER,))

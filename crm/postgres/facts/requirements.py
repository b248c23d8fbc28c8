"""Checks whether a database meets the requirements of the backfill, and describes each misfit with a remedy.

Runs and dry runs check this before anything else, and so does `manage.py check --database default`. Deviations that the
code can handle are not refused: text instead of an enum, any precision of timestamps, any scale of rates, domains,
citext, and views as sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from config.database import quoted_name
from crm.models import BackfillBatch, BackfillRun, ContactUpdate, CRMStageHistory
from crm.postgres.facts.catalog import MOMENT_TYPES, TEXT_TYPES, WHOLE_TYPES, Column, Table
from crm.postgres.facts.columns import ATTRIBUTION_COLUMNS, CONTACT_COLUMNS
from crm.rules.source_rows import CLIENT_PREPARERS

CONTACTS, HISTORY = "crm_contacts", "crm_stage_history"
LABELS: Mapping[str, tuple[str, ...]] = {
    "profiles": ("role",),
    "leads": ("status", "type"),
    CONTACTS: ("contactType", "stage"),
    HISTORY: ("fromStage", "toStage"),
}
MOMENTS = (
    *("createdAt", "updatedAt", "lastContactedAt", "commissionRateLockedAt", "stageEnteredAt", "assignedAt"),
    *("created_at", "updated_at", "convertedAt", "unqualifiedAt"),
)
SWITCHES = ("convertedToClient", "unqualified", "isActive")
RATE, CONFIDENCE = "commissionRate", "attributionConfidence"
#: Columns by which rows are found.
KEYS: Mapping[str, tuple[str, ...]] = {
    "users": ("id", "email"),
    "profiles": ("id", "userId", "clerkUserId"),
    "leads": ("id", "email"),
    "tax_intake_leads": ("id", "email"),
    CONTACTS: ("id", "email", "userId", "clerkUserId"),
}
#: The keys and the columns that refer to them. Different spellings must compare as different, and all of these columns
#: must be comparable with each other.
COMPARED: Mapping[str, tuple[str, ...]] = {
    **KEYS,
    "leads": (*KEYS["leads"], "assignedPreparerId"),
    "tax_intake_leads": (*KEYS["tax_intake_leads"], "assignedPreparerId", "profileId"),
    CONTACTS: (*KEYS[CONTACTS], "assignedPreparerId"),
    CLIENT_PREPARERS: ("clientId", "preparerId"),
}
#: Columns for which some source has no value, so they must accept NULL.
LEFT_BLANK = (
    *("userId", "clerkUserId", "company", "assignedPreparerId", "assignedAt", "lastContactedAt"),
    *(name for name in ATTRIBUTION_COLUMNS if name != CONFIDENCE),
)
#: Columns that are written, by table.
WRITTEN: Mapping[str, tuple[str, ...]] = {
    CONTACTS: CONTACT_COLUMNS,
    HISTORY: tuple(str(field.column) for field in CRMStageHistory._meta.concrete_fields if field.column != "changedBy"),
}
#: The lengths of values that do not come from a row, such as the derived id and the names of stages.
_LENGTHS: Mapping[str, Mapping[str, int]] = {
    CONTACTS: {"id": 25, "source": len("tax_intake_form"), "contactType": len("AFFILIATE"), "stage": len("CONTACTED")},
    HISTORY: {"id": 25, "contactId": 25, "toStage": len("CONTACTED")},
}
_NUMBERED = tuple(model._meta.db_table for model in (BackfillRun, BackfillBatch, ContactUpdate))

_UNIQUE = """
SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
 WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indisready AND i.indnkeyatts = 1
   AND i.indpred IS NULL AND i.indexprs IS NULL
   AND NOT COALESCE((to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false)
"""
_DEFERRABLE = "SELECT conname FROM pg_constraint WHERE conrelid = %s AND contype IN ('p', 'u', 'x') AND condeferrable"
_RULES = "SELECT rulename FROM pg_rewrite WHERE ev_class = %s AND ev_type IN ('2', '3', '4') ORDER BY 1"
_CHILDREN = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = %s ORDER BY 1"
# Labels of a contact's stage that the stage history could not store.
_LACKING_LABELS = """
SELECT enumlabel::text FROM pg_enum WHERE enumtypid = %s
EXCEPT SELECT enumlabel::text FROM pg_enum WHERE enumtypid = %s ORDER BY 1
"""
# Row-level BEFORE INSERT triggers, which may fill columns that the backfill omits.
_FILLING_TRIGGERS = """
SELECT tgname FROM pg_trigger
 WHERE tgrelid = %s AND NOT tgisinternal AND tgenabled IN ('O', 'A') AND tgtype & 7 = 7
"""
_MEANT = """
SELECT c.oid::bigint, format('%%I.%%I', nspname, relname)
  FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = to_regclass(quote_ident(%s))
"""
_SEQUENCES = """
SELECT c.relname, pg_get_serial_sequence(c.oid::regclass::text, 'id')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = ANY(%s) AND has_schema_privilege(n.oid, 'USAGE')
   AND has_table_privilege(c.oid, 'SELECT')
"""
_IS_BEHIND = """
SELECT COALESCE((SELECT max(id) FROM {table}), 0) > COALESCE(pg_sequence_last_value(sequence), 0)
  FROM (SELECT %s::regclass AS sequence) s WHERE has_sequence_privilege(sequence, 'USAGE, SELECT')
"""


@dataclass(frozen=True, slots=True)
class Unfit:
    """A property of the database that the backfill cannot handle, and its remedy."""

    problem: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.problem} {self.way_out} Nothing was written."


def misfits(
    connection: BaseDatabaseWrapper,
    tables: Mapping[str, Table],
    columns: Mapping[str, Sequence[str]],
    *,
    for_inserting: bool,
    for_updating: bool,
) -> Iterator[Unfit]:
    """Yield the misfits of a database, lazily: each check is made when the caller asks for the next misfit.

    `columns` are those that are read or written, by table; some may not exist. `for_inserting` includes the
    requirements for creating contacts, which verifications and rollbacks do not need, and `for_updating` those of
    --update.
    """
    yield from _of_encoding(connection)
    yield from _of_names(connection, tables)
    yield from _of_types(tables, {**columns, HISTORY: WRITTEN[HISTORY]} if for_updating else columns)
    yield from _of_collations(tables)
    yield from _of_mixed_collations(tables)
    yield from _of_sequences(connection)
    if not for_inserting:
        return
    yield from _of_contacts(connection, tables[CONTACTS])
    yield from _of_written_table(connection, CONTACTS, tables[CONTACTS])
    if for_updating and HISTORY in tables:
        yield from _of_history(connection, tables[HISTORY], tables[CONTACTS])
        yield from _of_written_table(connection, HISTORY, tables[HISTORY])


def _rows(connection: BaseDatabaseWrapper, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return list(cursor.fetchall())


def _of_encoding(connection: BaseDatabaseWrapper) -> Iterator[Unfit]:
    ((encoding,),) = _rows(connection, "SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        yield Unfit(
            f"The encoding of this database is {encoding}, but the backfill supports only UTF8.",
            "Move it to a database with the encoding UTF8 (pg_dump, CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE "
            "template0).",
        )


def _of_names(connection: BaseDatabaseWrapper, tables: Mapping[str, Table]) -> Iterator[Unfit]:
    """Refuse tables with the same name that come first in the search path, or are temporary."""
    for name, table in tables.items():
        meant = _rows(connection, _MEANT, name)
        if meant and meant[0][0] != table.oid:
            yield Unfit(
                f"The name {name} refers to {meant[0][1]} in this session, instead of the table in the schema "
                f"{settings.LEGACY_SCHEMA}.",
                f"Rename or drop {meant[0][1]}.",
            )


def types_of(table: str, column: str) -> tuple[str, tuple[str, ...]]:
    """Return the required type of a column, as a description and as the names of the accepted types."""
    if column in MOMENTS:
        return "a timestamp", MOMENT_TYPES
    if column == RATE:
        return "numeric", ("numeric",)
    if column == CONFIDENCE:
        return "an integer", WHOLE_TYPES
    if column in SWITCHES:
        return "a boolean", ("bool",)
    if column in LABELS.get(table, ()):
        return "an enum or text", TEXT_TYPES
    return "text", TEXT_TYPES


def _of_types(tables: Mapping[str, Table], columns: Mapping[str, Sequence[str]]) -> Iterator[Unfit]:
    for table, names in columns.items():
        for name in names:
            column = tables[table].columns.get(name) if table in tables else None
            if column is None:
                continue
            words, types = types_of(table, name)
            is_label = column.is_enum and name in LABELS.get(table, ())
            if column.type not in types and not is_label:
                yield Unfit(
                    f"The column {table}.{name} is of the type {column.declared_type}, but the backfill needs {words}.",
                    "Its generation of the application is unknown to this version. As the table's owner, change the "
                    f"type of {table}.{name}, or do not use the backfill on this database.",
                )


def _of_collations(tables: Mapping[str, Table]) -> Iterator[Unfit]:
    names = [
        f"{table}.{name}"
        for table, keys in COMPARED.items()
        for name in keys
        if table in tables and (column := tables[table].columns.get(name)) and not column.is_deterministic
    ]
    if names:
        yield Unfit(
            f"The collation of {', '.join(names)} is not deterministic, so different keys may compare as equal.",
            "As the owner, give the column a deterministic collation (ALTER TABLE ... ALTER COLUMN ... TYPE text "
            'COLLATE "default").',
        )


def _of_mixed_collations(tables: Mapping[str, Table]) -> Iterator[Unfit]:
    """Refuse keys with different collations, which PostgreSQL does not compare."""
    found = {
        f"{table}.{name}": column.collation
        for table, keys in COMPARED.items()
        for name in keys
        if table in tables and (column := tables[table].columns.get(name)) and column.collation
    }
    if len(set(found.values())) > 1:
        yield Unfit(
            f"The collations of {', '.join(f'{name} ({collation})' for name, collation in found.items())} differ, and "
            "PostgreSQL does not compare columns of different collations.",
            "As the owner, give them the same one (ALTER TABLE ... ALTER COLUMN ... TYPE text COLLATE ...).",
        )


def _of_contacts(connection: BaseDatabaseWrapper, table: Table) -> Iterator[Unfit]:
    if table.kind not in ("r", "p"):
        yield Unfit(
            f"{CONTACTS} is {_kind(table)}, but contacts can only be inserted safely into a table.",
            "Set DATABASE_URL to the database and the schema of the table itself.",
        )
        return
    if table.kind == "r" and (children := [name for (name,) in _rows(connection, _CHILDREN, table.oid)]):
        yield Unfit(
            f"{', '.join(children)} inherits from {CONTACTS}, whose unique keys do not apply there, so a person could "
            "get two contacts.",
            f"As the owner, move the rows into {CONTACTS} and run ALTER TABLE {children[0]} NO INHERIT {CONTACTS}.",
        )
    unique = {name for (name,) in _rows(connection, _UNIQUE, table.oid)}
    if missing := [name for name in KEYS[CONTACTS] if name in table.columns and name not in unique]:
        first = quoted_name(missing[0])
        yield Unfit(
            f"{CONTACTS} has no unique key on {', '.join(missing)}, so a person could get two contacts. The key must "
            "be valid, on this column alone, without a condition and without NULLS NOT DISTINCT.",
            f"As the owner, run CREATE UNIQUE INDEX CONCURRENTLY ON {CONTACTS} ({first}).",
        )
    if deferrable := [name for (name,) in _rows(connection, _DEFERRABLE, table.oid)]:
        yield Unfit(
            f"The constraint {', '.join(deferrable)} of {CONTACTS} is deferrable, and PostgreSQL does not support such "
            "constraints with ON CONFLICT.",
            "As the owner, drop it and create it again as NOT DEFERRABLE.",
        )
    if filled := [name for name in LEFT_BLANK if name in table.columns and table.columns[name].not_null]:
        yield Unfit(
            f"The column {', '.join(f'{CONTACTS}.{name}' for name in filled)} is NOT NULL, but not every person has a "
            "value for it.",
            f"As the owner, run ALTER TABLE {CONTACTS} ALTER COLUMN {quoted_name(filled[0])} DROP NOT NULL.",
        )


def _of_history(connection: BaseDatabaseWrapper, history: Table, contacts: Table) -> Iterator[Unfit]:
    """Refuse a stage history that cannot record changes: every --update would fail to promote the same contacts."""
    if history.kind not in ("r", "p"):
        yield Unfit(
            f"{HISTORY} is {_kind(history)}, but --update can record changed stages only in a table.",
            "Run without --update.",
        )
        return
    if missing := [f"{HISTORY}.{name}" for name in sorted(WRITTEN[HISTORY]) if name not in history.columns]:
        yield Unfit(
            f"This database has no column {', '.join(missing)}, in which --update records changed stages: its "
            "generation of the application is unknown to this version.",
            "Run without --update.",
        )
    for name in LABELS[HISTORY]:
        column, stage = history.columns.get(name), contacts.columns["stage"]
        if column is None or not column.is_enum or not stage.is_enum or column.type_oid == stage.type_oid:
            continue
        if lacking := _rows(connection, _LACKING_LABELS, stage.type_oid, column.type_oid):
            yield Unfit(
                f"The column {HISTORY}.{name} is of the type {column.declared_type}, which lacks the label "
                f"{', '.join(label for (label,) in lacking)} of {CONTACTS}.stage: --update could not record changes of "
                "that stage.",
                f"As the owner, run ALTER TABLE {HISTORY} ALTER COLUMN {quoted_name(name)} TYPE {stage.declared_type}, "
                "or run without --update.",
            )


def _kind(table: Table) -> str:
    return {"v": "a view", "m": "a materialized view", "f": "a foreign table"}.get(table.kind, "no table")


def _of_written_table(connection: BaseDatabaseWrapper, name: str, table: Table) -> Iterator[Unfit]:
    written = WRITTEN[name]
    if rules := [rule for (rule,) in _rows(connection, _RULES, table.oid)]:
        yield Unfit(
            f"The rule {', '.join(rules)} rewrites statements that write {name}, and PostgreSQL does not support ON "
            "CONFLICT with such rules.",
            f"As the owner, run DROP RULE {quoted_name(rules[0])} ON {name} and use a trigger instead.",
        )
    if generated := [column for column in written if _is(table.columns.get(column), "is_generated")]:
        yield Unfit(
            f"The column {', '.join(f'{name}.{column}' for column in generated)} is generated by PostgreSQL, but the "
            "backfill writes it.",
            f"As the owner, run ALTER TABLE {name} ALTER COLUMN {quoted_name(generated[0])} DROP EXPRESSION, or DROP "
            "IDENTITY.",
        )
    for column, length in _LENGTHS[name].items():
        found = table.columns.get(column)
        if found is not None and found.room is not None and found.room < length:
            yield Unfit(
                f"The column {name}.{column} has room for {found.room} characters, but the backfill writes {length}.",
                f"As the owner, run ALTER TABLE {name} ALTER COLUMN {quoted_name(column)} TYPE text.",
            )
    lacking = [
        column.name
        for column in table.columns.values()
        if column.name not in written
        and column.not_null
        and not (column.has_default or column.is_generated or column.is_identity)
    ]
    if lacking and not _rows(connection, _FILLING_TRIGGERS, table.oid):
        yield Unfit(
            f"The column {', '.join(f'{name}.{column}' for column in lacking)} is NOT NULL without a default, but the "
            "backfill does not fill it.",
            f"As the owner, run ALTER TABLE {name} ALTER COLUMN {quoted_name(lacking[0])} SET DEFAULT with a value.",
        )


def _is(column: Column | None, attribute: str) -> bool:
    return column is not None and bool(getattr(column, attribute))


def _of_sequences(connection: BaseDatabaseWrapper) -> Iterator[Unfit]:
    """Refuse sequences that are behind their tables, as after a manual restore: they would repeat numbers."""
    schema = quoted_name(settings.BACKFILL_SCHEMA)
    for table, sequence in _rows(connection, _SEQUENCES, settings.BACKFILL_SCHEMA, list(_NUMBERED)):
        where = f"{schema}.{table}"
        if sequence and _rows(connection, _IS_BEHIND.format(table=where), sequence) == [(True,)]:
            yield Unfit(
                f"The sequence {sequence} is behind the rows of {where}, so its next numbers already exist.",
                f"Run SELECT setval('{sequence}', (SELECT max(id) FROM {where}));",
            )

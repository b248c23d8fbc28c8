"""Facts about this database: tables, columns, enum labels, rights, generation. Read before anything is written.

Several generations of the application are in use (`crm.legacy_schema.GENERATIONS`), and databases between them. One
code path supports all: a missing optional column is read as NULL, and a missing required column prevents the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from config.database import quoted_name
from crm import try_execute
from crm.errors import OperatorError
from crm.models import (
    BackfillBatch,
    BackfillRun,
    CommittedTransaction,
    ConflictResolution,
    ContactUpdate,
    LedgerEntry,
)
from crm.outcome import Source
from crm.postgres.facts.catalog import Column, read_tables
from crm.postgres.facts.columns import (
    ATTRIBUTION_COLUMNS,
    COLUMNS_IN_USE,
    OPTIONAL_COLUMNS,
    OPTIONAL_TABLES,
    REQUIRED_COLUMNS,
)
from crm.postgres.facts.repeated_ids import find_repeated_ids
from crm.postgres.facts.requirements import HISTORY, MOMENTS, RATE, Unfit, misfits
from crm.postgres.facts.rights import OUR_TABLES, Operation, require_rights
from crm.postgres.own_schema import require_writable
from crm.rules.mapping import (
    CONTACT_TYPE_OF_LEAD_TYPE,
    CONTACT_TYPE_OF_SOURCE,
    DISQUALIFIED,
    EXCLUDED_ROLES,
    EXCLUDED_SIGNUPS,
    KINDS_OF_INTAKES,
    SOURCE_OF_ROLE,
    STAGES_OF_STATUS,
    UNQUALIFIED,
    Rules,
    normalised,
)
from crm.rules.source_rows import SOURCE_TABLES

logger = logging.getLogger(__name__)

#: The source of rows without a role or status, and of ids that several rows have. All of them are errors.
SOURCE_OF_STRAYS: Mapping[str, Source] = {
    "profiles": Source.CLIENTS,
    "leads": Source.ACTIVE_LEADS,
    "tax_intake_leads": Source.OPEN_INTAKES,
    "users": Source.SIGNUPS,
}
REQUIRED_CONTACT_TYPES = sorted({*CONTACT_TYPE_OF_SOURCE.values(), *CONTACT_TYPE_OF_LEAD_TYPE.values()})
#: The stages of a pipeline if the column is text and not an enum.
STAGES_OF_2025_10 = ("NEW", "CONTACTED", "DOCUMENTS", "PREPARING", "COMPLETE")
STAGES_SINCE = ("NEW", "CONTACTED", "QUALIFIED", "DOCUMENTS", "FILED", "CLOSED", "LOST")
#: The decimals of the rate column that `migrate` adds if it is missing.
DECIMALS_OF_OURS = 2
#: The tables of the ledger for readers: the outcomes of rows, and the changes by updates.
LEDGER_TABLES = (LedgerEntry._meta.db_table, ContactUpdate._meta.db_table)
_OUR_COLUMNS = [
    (model._meta.db_table, str(field.column))
    for model in (BackfillBatch, BackfillRun, CommittedTransaction, ConflictResolution, ContactUpdate, LedgerEntry)
    for field in model._meta.concrete_fields
]
#: A column that identifies each generation, newest first.
MARKS_OF_GENERATION = (
    ("2026_01", "profiles", "supabaseUserId"),
    ("2025_12_c", "profiles", "googleDriveFolderId"),
    ("2025_12_b", "profiles", "affiliateGroupId"),
    ("2025_12", "profiles", "crmEmailAutomation"),
    ("2025_11", "crm_contacts", "leadScore"),
)


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """What the backfill knows about the database."""

    generation: str
    has_attribution: bool
    has_ledger: bool
    roles: Mapping[str, tuple[str, ...]]
    statuses: Mapping[str, tuple[str, ...]]
    stages: Mapping[str, str]
    #: The types to cast labels to before comparing them with the roles of profiles and the statuses of leads.
    label_types: Mapping[str, str]
    #: The fractional digits that all timestamps of a contact store, and the decimals of its rate (None: unlimited).
    second_digits: int
    rate_decimals: int | None
    #: The columns that may be NULL, and the optional columns that are missing, as `table.column`; with the latter the
    #: optional tables that are missing.
    nullable: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    #: By table, the ids that several rows have.
    repeated_ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def rules(self) -> Rules:
        """Return the mapping rules for this database."""
        return Rules(
            stages=self.stages,
            placeholder_domain=settings.CRM_PLACEHOLDER_DOMAIN,
            second_digits=self.second_digits,
            rate_decimals=self.rate_decimals,
        )

    @property
    def tables(self) -> list[str]:
        """The existing tables whose rows make contacts."""
        return [table for table in SOURCE_TABLES if table not in self.missing]

    @property
    def sources(self) -> list[Source]:
        """The sources whose table exists, in the order of a run."""
        return [source for source in Source if source.table in self.tables]

    @property
    def names_profiles(self) -> bool:
        """Whether intakes have a `profileId`."""
        return "tax_intake_leads" in self.tables and "tax_intake_leads.profileId" not in self.missing

    def source_of_role(self, label: str) -> Source | None:
        """Return the source of a profile with this role, or None if it is excluded. Unknown roles are clients."""
        role = normalised(label)
        return None if role in EXCLUDED_ROLES else SOURCE_OF_ROLE.get(role, Source.CLIENTS)

    def source_of_status(self, label: str) -> Source | None:
        """Return the source of a lead with this status, or None if it is excluded."""
        status = normalised(label)
        if status in STAGES_OF_STATUS and self.rules().stage_of(status) is None:
            return None
        return Source.CONVERTED_LEADS if status == "CONVERTED" else Source.ACTIVE_LEADS

    def source_of_kind(self, kind: str) -> Source | None:
        """Return the source of an intake of this kind, or None if it is excluded."""
        source, status = KINDS_OF_INTAKES[kind]
        return None if self.rules().stage_of(status) is None else source

    def exclusion(self, table: str, label: str | None) -> str:
        """Return the reason why rows of `table` with this label are excluded, if no run migrated them as signups."""
        source = self.source_of(table, label)
        if source in EXCLUDED_SIGNUPS:
            return EXCLUDED_SIGNUPS[source]
        if table == "profiles":
            return EXCLUDED_ROLES[normalised(str(label))]
        return DISQUALIFIED if table == "leads" else UNQUALIFIED

    def source_of(self, table: str, label: str | None) -> Source | None:
        """Return the source of a row of `table` with this role, status or kind, or None if it is excluded."""
        if label is None or table == "users":
            return SOURCE_OF_STRAYS[table]
        if table == "profiles":
            return self.source_of_role(label)
        return self.source_of_status(label) if table == "leads" else self.source_of_kind(label)

    def labels(self, table: str) -> list[str]:
        """Return the roles, statuses or kinds of a table, as the database spells them."""
        if table == "users":
            return ["signup"]
        if table == "tax_intake_leads":
            return list(KINDS_OF_INTAKES)
        by_name = self.roles if table == "profiles" else self.statuses
        return [label for spellings in by_name.values() for label in spellings]

    def labels_of(self, source: Source) -> list[str]:
        """Return the labels of its table whose rows a source reads."""
        return [label for label in self.labels(source.table) if self.source_of(source.table, label) is source]


def examine(
    connection: BaseDatabaseWrapper,
    *,
    for_writing: bool,
    for_inserting: bool = False,
    for_updating: bool = False,
    for_recreating: bool = False,
) -> DatabaseFacts:
    """Read the facts. Raises OperatorError with the first requirement that this database does not meet.

    `for_inserting` checks the requirements of a backfill, `for_updating` also those of --update, and `for_recreating`
    those of --recreate-deleted. The rights of a rollback depend on its run, and are not checked here.

    A dry run (not `for_writing`) needs SELECT only, and works before `migrate`. After it, the dry run logs a warning
    with the rights that a run would lack.
    """
    _require_schema(connection)
    tables = read_tables(connection, (*REQUIRED_COLUMNS, HISTORY))
    columns = {name: table.columns for name, table in tables.items()}
    _require_tables(columns, for_updating=for_updating)
    _require_columns(columns)
    _require_all_rows(connection, [table for table in tables if table != HISTORY or for_updating])
    for misfit in misfits(connection, tables, COLUMNS_IN_USE, for_inserting=for_inserting, for_updating=for_updating):
        raise OperatorError(str(misfit))
    has_attribution = all(column in columns["crm_contacts"] for column in ATTRIBUTION_COLUMNS)
    ledger_is_readable = _ledger_is_readable(connection)
    if for_writing:
        require_writable(connection)
        _require_migrations(has_attribution=has_attribution, has_ledger=ledger_is_readable is not None)
    elif for_inserting and ledger_is_readable is False:
        logger.warning(
            "this role may not read the ledger: the dry run counts every row as new, also those of earlier runs"
        )
    if for_inserting and ledger_is_readable is not None:
        _require_rights(connection, for_updating=for_updating, for_recreating=for_recreating, dry_run=not for_writing)
    if for_writing:
        _require_tables_of_ours(connection)
    roles = _labels(connection, columns, "profiles", "role")
    statuses = _labels(connection, columns, "leads", "status")
    source_tables = {name: table for name, table in SOURCE_TABLES.items() if name in columns}
    generation = _generation(columns, roles)
    contact_types = _labels_of_contacts(connection, columns, generation, "contactType")
    stages = _labels_of_contacts(connection, columns, generation, "stage")
    _require_labels(contact_types, stages)
    contact = columns["crm_contacts"]
    return DatabaseFacts(
        generation=generation,
        has_attribution=has_attribution,
        has_ledger=bool(ledger_is_readable),
        roles=roles,
        statuses=statuses,
        stages={stage: spellings[0] for stage, spellings in stages.items()},
        label_types={
            name: columns[name][table.label_column].cast if table.label_column else "text"
            for name, table in source_tables.items()
        },
        second_digits=min(contact[name].second_digits for name in MOMENTS if name in contact),
        rate_decimals=contact[RATE].scale if RATE in contact else DECIMALS_OF_OURS,
        nullable=frozenset(
            f"{table}.{name}"
            for table, of_table in columns.items()
            for name, column in of_table.items()
            if not column.not_null
        ),
        missing=frozenset(
            f"{table}.{name}"
            for table, names in OPTIONAL_COLUMNS.items()
            for name in names
            if table in columns and name not in columns[table]
        ).union(OPTIONAL_TABLES - columns.keys()),
        repeated_ids=find_repeated_ids(connection, source_tables),
    )


def find_misfits(connection: BaseDatabaseWrapper) -> list[Unfit]:
    """Return all misfits for which `examine` refuses this database, except missing rights and migrations."""
    tables = read_tables(connection, (*REQUIRED_COLUMNS, HISTORY))
    if not tables.keys() >= REQUIRED_COLUMNS.keys() - OPTIONAL_TABLES:
        return []
    return list(misfits(connection, tables, COLUMNS_IN_USE, for_inserting=True, for_updating=HISTORY in tables))


def _require_schema(connection: BaseDatabaseWrapper) -> None:
    """Require USAGE on the application's schema. Without it, names of tables in it cannot be resolved."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT quote_ident(current_user) FROM pg_namespace "
            "WHERE nspname = %s AND NOT has_schema_privilege(oid, 'USAGE')",
            [settings.LEGACY_SCHEMA],
        )
        row = cursor.fetchone()
    if row is not None:
        raise OperatorError(
            f"This role may not use the schema {settings.LEGACY_SCHEMA}. As its owner, run GRANT USAGE ON SCHEMA "
            f"{quoted_name(settings.LEGACY_SCHEMA)} TO {row[0]}. Nothing was written."
        )


def _require_tables(columns: Mapping[str, Mapping[str, Column]], *, for_updating: bool) -> None:
    if missing := [table for table in REQUIRED_COLUMNS if table not in columns and table not in OPTIONAL_TABLES]:
        raise OperatorError(
            f"The schema {settings.LEGACY_SCHEMA} has no table {', '.join(missing)}: this is not the application's "
            "database, or its tables are in another schema. Correct DATABASE_URL, or name the schema in it (?schema=)."
        )
    if for_updating and HISTORY not in columns:
        raise OperatorError(
            f"The schema {settings.LEGACY_SCHEMA} has no table {HISTORY}, in which --update records changed stages. "
            "The application creates it. Run without --update. Nothing was written."
        )


def _require_columns(columns: Mapping[str, Mapping[str, Column]]) -> None:
    wanted = [(table, column) for table, names in REQUIRED_COLUMNS.items() if table in columns for column in names]
    if missing := [f"{table}.{column}" for table, column in wanted if column not in columns[table]]:
        raise OperatorError(
            f"This database has no column {', '.join(missing)}, which the backfill needs: its generation of the "
            "application is unknown to this version. Nothing was written."
        )
    optional = [(table, column) for table, names in OPTIONAL_COLUMNS.items() if table in columns for column in names]
    unreadable = [
        f"{table}.{column}"
        for table, column in [*wanted, *optional]
        if column in columns[table] and not columns[table][column].readable
    ]
    if unreadable:
        raise OperatorError(
            f"This role may not read {', '.join(unreadable)}. As the tables' owner, GRANT SELECT on them. "
            "Nothing was written."
        )


def _require_all_rows(connection: BaseDatabaseWrapper, tables: Sequence[str]) -> None:
    """Refuse row-level security that applies to this role: hidden rows would be missing silently."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT name FROM unnest(%s::text[]) AS name WHERE row_security_active(quote_ident(%s) || '.' || name)",
            [list(tables), settings.LEGACY_SCHEMA],
        )
        hidden = [name for (name,) in cursor.fetchall()]
    if hidden:
        raise OperatorError(
            f"The row-level security of {', '.join(hidden)} decides which rows this role sees, so rows may be missed. "
            "As a superuser, run ALTER ROLE ... BYPASSRLS, or use the tables' owner. Nothing was written."
        )


def _labels(
    connection: BaseDatabaseWrapper, columns: Mapping[str, Mapping[str, Column]], table: str, name: str
) -> dict[str, tuple[str, ...]]:
    """Return the labels of a column and their spellings: those of its enum in order, or the values of the text."""
    column = columns[table][name]
    query, parameters = "SELECT enumlabel FROM pg_enum WHERE enumtypid = %s ORDER BY enumsortorder", [column.type_oid]
    if not column.is_enum:
        query, parameters = f'SELECT DISTINCT "{name}"::text FROM {table} WHERE "{name}" IS NOT NULL ORDER BY 1', []
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return _spellings(label for (label,) in cursor.fetchall())


def _labels_of_contacts(
    connection: BaseDatabaseWrapper, columns: Mapping[str, Mapping[str, Column]], generation: str, name: str
) -> dict[str, tuple[str, ...]]:
    """Return the labels that a contact's column may contain. For a text column, those of the generation's enum."""
    if columns["crm_contacts"][name].is_enum:
        return _labels(connection, columns, "crm_contacts", name)
    if name == "contactType":
        return _spellings(REQUIRED_CONTACT_TYPES)
    return _spellings(STAGES_OF_2025_10 if generation.startswith("2025_10") else STAGES_SINCE)


def _spellings(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for label in labels:
        found[normalised(label)] = (*found.get(normalised(label), ()), label)
    return found


def _require_labels(contact_types: Mapping[str, Sequence[str]], stages: Mapping[str, object]) -> None:
    # The exact spelling is required, because these labels are written.
    missing = [
        f'"ContactType" {label}' for label in REQUIRED_CONTACT_TYPES if label not in contact_types.get(label, ())
    ]
    for status in ("NEW", "CONTACTED", "CONVERTED"):
        wanted = STAGES_OF_STATUS[status]
        if not any(stage in stages for stage in wanted):
            missing.append(f'"PipelineStage" {" or ".join(wanted)}')
    if missing:
        raise OperatorError(
            f"This database lacks the enum label {', '.join(missing)}, which contacts of the backfill need: its "
            "generation of the application is unknown to this version. Nothing was written."
        )


def _ledger_is_readable(connection: BaseDatabaseWrapper) -> bool | None:
    """Return whether this role may read the ledger; None if it does not exist, as in a dry run before `migrate`."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT bool_and(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'))
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = %s AND c.relname = ANY(%s)
            HAVING count(*) = %s
            """,
            [settings.BACKFILL_SCHEMA, list(LEDGER_TABLES), len(LEDGER_TABLES)],
        )
        row = cursor.fetchone()
    return None if row is None else bool(row[0])


def _require_migrations(*, has_attribution: bool, has_ledger: bool) -> None:
    if not has_attribution or not has_ledger:
        missing = "the ledger" if not has_ledger else "the attribution columns of crm_contacts"
        raise OperatorError(
            f"This database lacks {missing}: run `python manage.py migrate` first. "
            "Only --dry-run works without. Nothing was written."
        )


def _require_rights(
    connection: BaseDatabaseWrapper, *, for_updating: bool, for_recreating: bool, dry_run: bool
) -> None:
    operations = [Operation.RUN]
    if for_updating:
        operations.append(Operation.UPDATE)
    if for_recreating:
        operations.append(Operation.RECREATE)
    require_rights(connection, *operations, dry_run=dry_run)


def _require_tables_of_ours(connection: BaseDatabaseWrapper) -> None:
    with connection.cursor() as cursor:
        # A table with the same name in the application's schema does not count.
        cursor.execute(
            """
            WITH wanted(t, name) AS (
              SELECT t, NULL FROM unnest(%(tables)s::text[]) AS t
               UNION ALL
              SELECT * FROM unnest(%(of)s::text[], %(columns)s::text[])
            ), meant AS (
              SELECT t, name, to_regclass(quote_ident(%(ours)s) || '.' || t) AS oid FROM wanted
            )
            SELECT 'table ' || t FROM meant WHERE oid IS NULL AND name IS NULL
             UNION ALL
            SELECT 'column ' || t || '.' || name FROM meant
             WHERE oid IS NOT NULL AND name IS NOT NULL
               AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = oid AND attname = name)
             UNION ALL
            SELECT 'function ' || %(function)s WHERE to_regprocedure(%(function)s) IS NULL
            """,
            {
                **dict(zip(("of", "columns"), map(list, zip(*_OUR_COLUMNS, strict=True)), strict=True)),
                "tables": list(OUR_TABLES),
                "ours": settings.BACKFILL_SCHEMA,
                "function": try_execute.SIGNATURE,
            },
        )
        missing = [name for (name,) in cursor.fetchall()]
    if missing:
        raise OperatorError(
            f"This database lacks the {', '.join(missing)}, which came with this version: run `python manage.py "
            "migrate` first. Nothing was written."
        )


def _generation(columns: Mapping[str, Mapping[str, Column]], roles: Mapping[str, tuple[str, ...]]) -> str:
    if "clerkUserId" in columns["profiles"]:
        return "2025_10" if all(len(spellings) == 1 for spellings in roles.values()) else "2025_10_mixed"
    return next(
        (generation for generation, table, mark in MARKS_OF_GENERATION if mark in columns[table]),
        "unknown",
    )

"""Fills the application's tables with sample people by COPY, in one transaction."""

from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic

import psycopg
from django.conf import settings
from django.db import DatabaseError, connection, transaction
from django.db.backends.utils import CursorWrapper
from psycopg import sql

from crm.errors import OperatorError
from crm.legacy_schema import create_legacy_tables
from crm.sample_data.people import Row
from crm.sample_data.population import generate
from crm.sample_data.shapes import SHAPES, TABLES

_ELSEWHERE = (
    "Sample data goes into empty tables only: use another database, or set CRM_EMBEDDED_DATA in the place of "
    "DATABASE_URL for the embedded one."
)


@dataclass(frozen=True)
class Loaded:
    """The number of written rows by table, and the duration."""

    rows: dict[str, int]
    seconds: float

    @property
    def total(self) -> int:
        """The number of rows in all tables."""
        return sum(self.rows.values())


def load(people: int, generation: str, seed: int) -> Loaded:
    """Create the tables of `generation` if they are missing, and fill them with this number of people.

    Raises OperatorError, with nothing written, if `people` is less than 1, if a table contains rows, if the tables are
    incomplete or of another generation, and if the database refuses the rows. Raises django.db.OperationalError if the
    connection fails.
    """
    if people < 1:
        raise OperatorError(f"--people {people} creates no people: give a number of at least 1.")
    started = monotonic()
    connection.ensure_connection()
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            _prepare_tables(cursor, generation)
            rows = _fill(cursor, people, generation, seed)
    except (DatabaseError, psycopg.Error) as error:  # Django passes the errors of COPY on as they are
        raise OperatorError(
            f"The database refused the sample data, and nothing was written: {_first_line(error)} "
            "Correct that, or use another database."
        ) from error
    return Loaded(rows, monotonic() - started)


def _first_line(error: Exception) -> str:
    """Return the first line of an error, without those that quote rows."""
    return str(error).strip().partition("\n")[0].rstrip(".") + "."


def _prepare_tables(cursor: CursorWrapper, generation: str) -> None:
    there = _columns_there(cursor)
    if not there:
        create_legacy_tables(cursor, generation)
        return
    if missing := [table for table in TABLES if table not in there]:
        raise OperatorError(
            f"The schema {settings.LEGACY_SCHEMA} has only some of the application's tables: {', '.join(missing)} "
            f"missing. {_ELSEWHERE}"
        )
    if filled := [table for table in TABLES if _holds_rows(cursor, table)]:
        raise OperatorError(
            f"The schema {settings.LEGACY_SCHEMA} already holds rows, in {', '.join(filled)}. {_ELSEWHERE}"
        )
    _check_generation(cursor, there, generation)


def _columns_there(cursor: CursorWrapper) -> dict[str, set[str]]:
    """Return the columns of the application's tables that exist, by table."""
    cursor.execute(
        "SELECT relname, array_agg(attname::text) FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid "
        "WHERE relnamespace = to_regnamespace(quote_ident(%s)) AND relname = ANY(%s) "
        "AND relkind IN ('r', 'p', 'v', 'm', 'f') AND attnum > 0 AND NOT attisdropped GROUP BY relname",
        [settings.LEGACY_SCHEMA, list(TABLES)],
    )
    return {table: set(columns) for table, columns in cursor.fetchall()}


def _holds_rows(cursor: CursorWrapper, table: str) -> bool:
    cursor.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(_qualified(table)))
    return bool(cursor.fetchone()[0])


def _check_generation(cursor: CursorWrapper, there: dict[str, set[str]], generation: str) -> None:
    """Refuse tables that lack columns, and tables of another generation that happen to have them."""
    lacking = [
        f"{table}.{column}"
        for table, columns in SHAPES[generation].columns.items()
        for column in columns
        if column not in there[table]
    ]
    if lacking:
        raise OperatorError(
            f"The tables in the schema {settings.LEGACY_SCHEMA} are not of generation {generation}: they have no "
            f"{', '.join(lacking)}. Choose their generation with --generation, or use another database."
        )
    found = _generation_of(_spelling_of_roles(cursor), there)
    if found != generation:
        raise OperatorError(
            f"The tables in the schema {settings.LEGACY_SCHEMA} are of {found or 'no known generation'}, not of "
            f"{generation}. Choose their generation with --generation, or use another database."
        )


def _spelling_of_roles(cursor: CursorWrapper) -> str:
    cursor.execute(
        "SELECT bool_or(enumlabel = upper(enumlabel)), bool_or(enumlabel = lower(enumlabel)) FROM pg_enum "
        "JOIN pg_attribute ON atttypid = enumtypid "
        "JOIN pg_class ON pg_class.oid = attrelid AND relname = 'profiles' "
        "WHERE attname = 'role' AND relnamespace = to_regnamespace(quote_ident(%s))",
        [settings.LEGACY_SCHEMA],
    )
    upper, lower = cursor.fetchone()
    if upper and lower:
        return "both"
    return "upper" if upper else "lower"


def _generation_of(roles: str, there: dict[str, set[str]]) -> str | None:
    """Return the newest generation with this spelling of roles whose columns all exist."""
    for generation, shape in reversed(SHAPES.items()):
        if shape.roles == roles and all(there[table].issuperset(columns) for table, columns in shape.columns.items()):
            return generation
    return None


def _fill(cursor: CursorWrapper, people: int, generation: str, seed: int) -> dict[str, int]:
    copies = {table: _copy_statement(table, columns) for table, columns in SHAPES[generation].columns.items()}
    counts = dict.fromkeys(TABLES, 0)
    for chunk in generate(people, generation, seed):
        for table, rows in chunk.items():
            _copy(cursor, copies[table], rows)
            counts[table] += len(rows)
    for table in TABLES:
        # Without statistics, the planner assumes empty tables until autovacuum runs.
        cursor.execute(sql.SQL("ANALYZE {}").format(_qualified(table)))
    return counts


def _copy_statement(table: str, columns: Iterable[str]) -> sql.Composed:
    return sql.SQL("COPY {} ({}) FROM STDIN").format(
        _qualified(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )


def _copy(cursor: CursorWrapper, statement: sql.Composed, rows: Iterable[Row]) -> None:
    with cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _qualified(table: str) -> sql.Identifier:
    return sql.Identifier(settings.LEGACY_SCHEMA, table)

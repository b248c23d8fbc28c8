"""The application's tables as its own migrations make them, one SQL file for each generation in the field.

The application owns these tables. The files are here for tests and sample data, which need real tables to stand on;
a production database already has them.
"""

from importlib.resources import files

from django.conf import settings
from django.db.backends.utils import CursorWrapper
from psycopg import sql

#: Oldest first. `2025_10_mixed` is a database half-way to `2025_11`, whose roles are spelt both ways; `2025_10_21`,
#: `2025_12_b` and `2025_12_c` are steps of the application's own migrations that a database may have stopped at.
GENERATIONS: tuple[str, ...] = (
    *("2025_10", "2025_10_21", "2025_10_mixed", "2025_11", "2025_12"),
    *("2025_12_b", "2025_12_c", "2026_01"),
)


def ddl(generation: str) -> str:
    """Return the SQL that makes the types, tables, indexes and foreign keys of `generation`.

    Its names are unqualified: everything lands in the current schema. Raises ValueError for a generation that is not
    one of GENERATIONS.
    """
    if generation not in GENERATIONS:
        raise ValueError(f"unknown generation {generation!r}: choose one of {', '.join(GENERATIONS)}")
    return files(__name__).joinpath(f"{generation}.sql").read_text(encoding="utf-8")


def create_legacy_tables(cursor: CursorWrapper, generation: str) -> None:
    """Make the tables of `generation` in the schema `settings.LEGACY_SCHEMA`, and that schema where it is missing.

    All or nothing, in the caller's transaction if there is one. The session's search path is what it was afterwards.
    Raises django.db.ProgrammingError when a table or type of the same name is already there.
    """
    schema = sql.Identifier(settings.LEGACY_SCHEMA)
    cursor.execute(
        "SELECT to_regnamespace(quote_ident(%s)) IS NULL, current_setting('search_path')",
        [settings.LEGACY_SCHEMA],
    )
    schema_is_missing, search_path = cursor.fetchone()
    statements = [
        sql.SQL("CREATE SCHEMA {};").format(schema) if schema_is_missing else sql.SQL(""),
        sql.SQL("SET LOCAL search_path TO {};").format(schema),
        sql.SQL(ddl(generation)),
        sql.SQL("SELECT set_config('search_path', {}, true);").format(sql.Literal(search_path)),
    ]
    # Sent as one string without parameters, PostgreSQL runs them as one transaction, whatever the caller's autocommit.
    cursor.execute(sql.SQL("\n").join(statements).as_string(cursor.connection))

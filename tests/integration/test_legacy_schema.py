"""The application's tables load in every generation and are what the backfill builds on."""

from typing import Any

import pytest
from django.db import ProgrammingError, connection
from pytest_django import Settings

from crm.legacy_schema import GENERATIONS, create_legacy_tables, ddl

TABLES = {
    *("client_preparers", "crm_contacts", "crm_interactions", "crm_stage_history"),
    *("leads", "profiles", "tax_intake_leads", "users"),
}
UPPER = ["SUPER_ADMIN", "ADMIN", "LEAD", "CLIENT", "TAX_PREPARER", "AFFILIATE"]
LOWER = [role.lower() for role in UPPER]
ROLES = {
    "2025_10": UPPER,
    "2025_10_21": UPPER,
    "2025_10_mixed": UPPER + LOWER,
    "2025_11": LOWER,
    "2025_12": LOWER,
    "2025_12_b": ["admin", "lead", "client", "tax_preparer"],
    "2025_12_c": ["admin", "client", "tax_preparer"],
    "2026_01": ["admin", "client", "tax_preparer", "affiliate"],
}
# Facts of the real databases: columns, indexes (primary keys among them), foreign keys.
COUNTS = {
    "2025_10": (148, 61, 7),
    "2025_10_21": (152, 64, 8),
    "2025_10_mixed": (148, 61, 7),
    "2025_11": (169, 61, 8),
    "2025_12": (182, 64, 8),
    "2025_12_b": (207, 69, 8),
    "2025_12_c": (225, 77, 8),
    "2026_01": (227, 78, 8),
}

every_generation = pytest.mark.parametrize("generation", GENERATIONS)


@pytest.fixture
def schema(db: None, settings: Settings) -> str:
    """A schema name with nothing behind it, beside the one of the other tests."""
    settings.LEGACY_SCHEMA = 'Legacy "tables"'
    return str(settings.LEGACY_SCHEMA)


def query(statement: str, *parameters: Any) -> list[Any]:
    """The rows, or the values where there is one column."""
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        rows = cursor.fetchall()
    return [row[0] if len(row) == 1 else row for row in rows]


def create(generation: str) -> None:
    with connection.cursor() as cursor:
        create_legacy_tables(cursor, generation)


@every_generation
def test_every_table_is_made_in_the_legacy_schema_with_all_that_belongs_to_them(schema: str, generation: str) -> None:
    create(generation)
    assert (
        set(query("SELECT table_name::text FROM information_schema.tables WHERE table_schema = %s", schema)) == TABLES
    )
    counts = query(
        "SELECT (SELECT count(*) FROM information_schema.columns WHERE table_schema = %s),"
        " (SELECT count(*) FROM pg_indexes WHERE schemaname = %s),"
        " (SELECT count(*) FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace"
        "  WHERE nspname = %s AND contype = 'f')",
        schema,
        schema,
        schema,
    )
    assert counts == [COUNTS[generation]]


@every_generation
def test_roles_are_spelt_as_in_that_generation(schema: str, generation: str) -> None:
    create(generation)
    assert labels(schema, "UserRole") == ROLES[generation]


def labels(schema: str, enum: str) -> list[str]:
    return query(
        "SELECT enumlabel::text FROM pg_enum JOIN pg_type ON pg_type.oid = enumtypid "
        "WHERE typname = %s AND typnamespace = to_regnamespace(quote_ident(%s)) ORDER BY enumsortorder",
        enum,
        schema,
    )


@every_generation
def test_only_later_pipelines_can_lose_a_contact(schema: str, generation: str) -> None:
    create(generation)
    stages = labels(schema, "PipelineStage")
    assert ("LOST" in stages, "COMPLETE" in stages) == (
        (False, True) if generation.startswith("2025_10") else (True, False)
    )


@every_generation
def test_contacts_are_unique_by_email_user_and_clerk_id(schema: str, generation: str) -> None:
    create(generation)
    unique = query(
        "SELECT indexname::text FROM pg_indexes WHERE schemaname = %s AND tablename = 'crm_contacts' "
        "AND indexdef LIKE 'CREATE UNIQUE%%' ORDER BY 1",
        schema,
    )
    assert unique == [
        "crm_contacts_clerkUserId_key",
        "crm_contacts_email_key",
        "crm_contacts_pkey",
        "crm_contacts_userId_key",
    ]


@every_generation
def test_only_october_has_profiles_without_a_user_and_with_a_clerk_id(schema: str, generation: str) -> None:
    create(generation)
    keys = dict(
        query(
            "SELECT column_name::text, is_nullable::text FROM information_schema.columns "
            "WHERE table_schema = %s AND table_name = 'profiles' AND column_name IN ('userId', 'clerkUserId')",
            schema,
        )
    )
    assert keys == ({"userId": "YES", "clerkUserId": "YES"} if generation.startswith("2025_10") else {"userId": "NO"})


def test_the_search_path_of_the_session_is_left_as_it_was(schema: str) -> None:
    before = query("SHOW search_path")
    create("2025_12")
    assert query("SHOW search_path") == before


def test_tables_that_are_there_are_not_made_again(schema: str) -> None:
    create("2025_11")
    with pytest.raises(ProgrammingError, match="already exists"):
        create("2025_11")


def test_an_unknown_generation_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"2025_10, 2025_10_21, .*, 2026_01"):
        ddl("2024_01")


@every_generation
def test_an_intake_has_the_columns_of_its_generation(schema: str, generation: str) -> None:
    create(generation)
    columns = query(
        "SELECT column_name::text FROM information_schema.columns "
        "WHERE table_schema = %s AND table_name = 'tax_intake_leads'",
        schema,
    )
    later = {"convertedToClient": "2025_10_21", "tax_year": "2025_12_b", "unqualified": "2025_12_c"}
    order = [*GENERATIONS[:1], *GENERATIONS[2:3], *GENERATIONS[1:2], *GENERATIONS[3:]]
    assert {column: column in columns for column in later} == {
        column: order.index(generation) >= order.index(first) for column, first in later.items()
    }

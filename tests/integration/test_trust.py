"""Whoever may create in a schema that our statements look into has nothing called by them: attacks by a second role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import Database
from tests.integration.test_least_privilege import role_made_by_script
from tests.integration.test_session import COMMANDS, assert_refused, ended_on, role_with
from tests.support.builders import add_lead, contacts
from tests.support.processes import database_url, session

ATTACKER = "mallory"
# A sequence goes on although the transaction is rolled back.
PLANTED = """
CREATE SEQUENCE {schema}.calls;
GRANT USAGE ON SEQUENCE {schema}.calls TO PUBLIC;
CREATE FUNCTION {schema}.unnest(text[]) RETURNS SETOF text LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_catalog.nextval('{schema}.calls'); RETURN QUERY SELECT pg_catalog.unnest($1); END $$;
CREATE FUNCTION {schema}.quote_ident(name) RETURNS text LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_catalog.nextval('{schema}.calls'); RETURN pg_catalog.quote_ident($1); END $$;
CREATE FUNCTION {schema}.quote_ident(varchar) RETURNS text LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_catalog.nextval('{schema}.calls'); RETURN pg_catalog.quote_ident($1); END $$;
CREATE FUNCTION {schema}.same(varchar, text) RETURNS boolean LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_catalog.nextval('{schema}.calls'); RETURN $1::text OPERATOR(pg_catalog.=) $2; END $$;
CREATE OPERATOR {schema}.= (LEFTARG = varchar, RIGHTARG = text, FUNCTION = {schema}.same);
CREATE FUNCTION {schema}.same(oid, int) RETURNS boolean LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_catalog.nextval('{schema}.calls'); RETURN $1 OPERATOR(pg_catalog.=) $2::pg_catalog.oid; END $$;
CREATE OPERATOR {schema}.= (LEFTARG = oid, RIGHTARG = int, FUNCTION = {schema}.same)
"""


def as_owner(*statements: str) -> None:
    with session() as owner:
        owner.autocommit = True
        for statement in statements:
            owner.execute(statement.encode())


@contextmanager
def attacker(*grants: str) -> Iterator[None]:
    """A role with these grants that owns nothing as yet."""
    as_owner(f"CREATE ROLE {ATTACKER} LOGIN", *grants)
    try:
        yield
    finally:
        as_owner(
            f"DROP OWNED BY {ATTACKER} CASCADE",
            f"DROP ROLE {ATTACKER}",
            "REVOKE ALL ON SCHEMA public, crm_backfill FROM PUBLIC",
        )


def plant(schema: str) -> None:
    with session(ATTACKER) as own:
        own.execute(PLANTED.format(schema=schema).encode())
        own.commit()


def was_called(schema: str) -> bool:
    with session() as observer:
        return observer.execute(f"SELECT is_called FROM {schema}.calls".encode()).fetchone() == (True,)


def put_right(line: str) -> None:
    """What the message says to run, with what the database's owner may do."""
    for verb in ("REVOKE ", "DROP "):
        if verb in line:
            told = line[line.index(verb) :]
            as_owner(*[f"{verb}{part}" for part in told[len(verb) : told.rindex(";")].split(f"; {verb}")])


@pytest.fixture
def own_public(database: Database) -> Database:
    """A database whose schemas are made anew afterwards, as far as they are the application's."""
    database.change("SELECT 1")
    add_lead("ann@example.com")
    return database


@pytest.mark.parametrize("schema", ["public", "crm_backfill"])
@pytest.mark.parametrize("grantee", ["PUBLIC", f'"{ATTACKER}"'])
def test_every_command_refuses_a_schema_in_which_others_may_create(
    own_public: Database, schema: str, grantee: str
) -> None:
    with attacker(f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {grantee}"):
        plant(schema)
        revoke = f'REVOKE CREATE ON SCHEMA "{schema}" FROM {grantee};'
        for command in COMMANDS:
            refused = ended_on(database_url(), *command)
            assert_refused(refused, schema, revoke, "PostgreSQL 14", f'ALTER SCHEMA "{schema}" OWNER TO')
        as_owner(revoke)
        # Whoever took the right away has not taken away what was made by it.
        refused = (0, "")
        for command in COMMANDS:
            refused = ended_on(database_url(), *command)
            assert_refused(
                refused, f"{schema}.unnest(text[]) of {ATTACKER}", f"DROP OPERATOR {schema}.= (oid, integer);"
            )
        assert not was_called(schema)
        put_right(refused[1])
        assert ended_on(database_url(), *COMMANDS[0]) == (0, "")
        assert not was_called(schema)
    assert len(contacts()) == 1


def test_what_is_planted_would_be_called_if_it_were_not_refused(
    own_public: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crm.postgres.session.require_trusted", lambda *_: None)
    with attacker("GRANT USAGE, CREATE ON SCHEMA public TO PUBLIC"):
        plant("public")
        assert ended_on(database_url(), *COMMANDS[0]) == (0, "")
        assert was_called("public")


def test_the_owner_its_members_and_superusers_may_create(own_public: Database) -> None:
    as_owner("CREATE ROLE application", "CREATE ROLE root SUPERUSER")
    try:
        with attacker(
            "ALTER SCHEMA public OWNER TO application",
            "ALTER TABLE crm_contacts OWNER TO application",
            f"GRANT application TO {ATTACKER}",
            f"GRANT CREATE ON SCHEMA public TO application, root, {ATTACKER}",
        ):
            plant("public")
            assert ended_on(database_url(), "backfill_runs", "list")[0] == 0
            as_owner(f"REVOKE application FROM {ATTACKER}")
            refused = ended_on(database_url(), "backfill_runs", "list")
            assert_refused(
                refused, f"of application ({ATTACKER}): ", f'REVOKE CREATE ON SCHEMA "public" FROM "{ATTACKER}";'
            )
    finally:
        as_owner("REASSIGN OWNED BY application TO CURRENT_USER", "DROP OWNED BY application", "DROP ROLE application")
        as_owner("DROP OWNED BY root", "DROP ROLE root")


@pytest.mark.parametrize("schema", ["crm_backfill", "public"])
def test_every_command_refuses_a_schema_of_a_stranger(own_public: Database, schema: str) -> None:
    with attacker(f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {ATTACKER}"):
        plant(schema)
        as_owner(f"REVOKE CREATE ON SCHEMA {schema} FROM {ATTACKER}", f"ALTER SCHEMA {schema} OWNER TO {ATTACKER}")
        try:
            for command in COMMANDS:
                refused = ended_on(database_url(), *command)
                assert_refused(refused, f"{schema} belongs to {ATTACKER}", f'ALTER SCHEMA "{schema}" OWNER TO')
            assert not was_called(schema)
        finally:
            as_owner(f"ALTER SCHEMA {schema} OWNER TO CURRENT_USER")


@pytest.mark.parametrize("parameters", ["", "&pgbouncer=true"])
def test_a_schema_of_a_stranger_in_the_roles_own_search_path_is_refused(own_public: Database, parameters: str) -> None:
    with role_with(search_path="crm_backfill, public, theirs") as role, attacker():
        as_owner(f"CREATE SCHEMA theirs AUTHORIZATION {ATTACKER}")
        refused = ended_on(database_url(role=role, parameters=parameters), "backfill_runs", "list")
        assert_refused(refused, f"theirs belongs to {ATTACKER}")


def test_a_right_that_was_granted_on_is_taken_away_by_the_statement_as_well(own_public: Database) -> None:
    with attacker(f"GRANT ALL ON SCHEMA public TO {ATTACKER} WITH GRANT OPTION"):
        with session(ATTACKER) as own:
            own.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
            own.commit()
        code, line = ended_on(database_url(), "backfill_runs", "list")
        assert code == 2
        as_owner(line[line.index("REVOKE ") : line.index(";")])
        assert ended_on(database_url(), "backfill_runs", "list")[0] == 0


@pytest.mark.parametrize("parameters", ["", "&pgbouncer=true"])
def test_the_other_schemas_of_the_roles_search_path_are_looked_at_too(own_public: Database, parameters: str) -> None:
    as_owner("CREATE SCHEMA triggers")
    try:
        with (
            role_with(search_path="crm_backfill, public, triggers") as role,
            attacker("GRANT CREATE ON SCHEMA triggers TO PUBLIC"),
        ):
            refused = ended_on(database_url(role=role, parameters=parameters), "backfill_runs", "list")
            assert_refused(refused, 'REVOKE CREATE ON SCHEMA "triggers" FROM PUBLIC;')
            put_right(refused[1])
            assert ended_on(database_url(role=role, parameters=parameters), "backfill_runs", "list")[0] == 0
    finally:
        as_owner("DROP SCHEMA triggers CASCADE")


def test_the_script_that_gives_rights_calls_nothing_that_others_have_made(own_public: Database) -> None:
    with attacker("GRANT USAGE, CREATE ON SCHEMA public TO PUBLIC"):
        plant("public")
        with role_made_by_script(update="on", rollback="on"):
            assert not was_called("public")

"""Whoever may create in a schema that our statements look into has nothing called by them: attacks by a second role."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from django.db import connection
from psycopg.errors import LockNotAvailable

from config import embedded
from crm.backfill.latecomers import Latecomers
from crm.conflicts.resolving import belongs_to
from crm.models import BackfillRun, CRMContact
from crm.models.ledger import RunStatus
from crm.postgres.facts.schema import examine
from crm.postgres.trust import UntrustedCodeError
from crm.rollback.ahead import Page
from crm.rollback.reader import Reader
from crm.rollback.runner import roll_back
from crm.rollback.undo import DryRunUndoer
from crm.rules.row_reference import RowReference
from crm.runs import control, lease
from crm.runs.lost_reports import noted
from tests.conftest import LEGACY_TABLES, Database
from tests.support.builders import add_lead, add_profile, add_user, contacts
from tests.support.commands import each_statement
from tests.support.processes import database_url, session
from tests.support.roles import role_made_by_script
from tests.support.sessions import COMMANDS, assert_refused, ended_on, role_with

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


def trust_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("trust", "transactions"):
        monkeypatch.setattr(f"crm.postgres.{module}.require_none", lambda _found: None)


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
        if schema == "crm_backfill":
            refused = ended_on(database_url(), *COMMANDS[0])
            assert_refused(refused, f"{schema}.same(oid, integer) of {ATTACKER}")
            put_right(refused[1])
        assert ended_on(database_url(), *COMMANDS[0]) == (0, "")
        assert not was_called(schema)
    assert len(contacts()) == 1


def test_what_is_planted_would_be_called_if_it_were_not_refused(
    own_public: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust_everyone(monkeypatch)
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


# What a stranger left in our own schema, before it was given to its owner

#: As many parameters as a contact has columns: without VARIADIC, PostgreSQL takes it before ours.
OVERLOAD = f"try_execute({', '.join(['text'] * (1 + len(CRMContact._meta.concrete_fields)))})"


@contextmanager
def left_in_our_schema() -> Iterator[None]:
    with attacker(f"GRANT USAGE, CREATE ON SCHEMA crm_backfill TO {ATTACKER}"):
        with session(ATTACKER) as own:
            own.execute(
                f"""
                CREATE SEQUENCE crm_backfill.calls;
                GRANT USAGE ON SEQUENCE crm_backfill.calls TO PUBLIC;
                CREATE FUNCTION crm_backfill.{OVERLOAD} RETURNS TABLE (id text, refusal text[]) LANGUAGE plpgsql AS
                  $$ BEGIN PERFORM pg_catalog.nextval('crm_backfill.calls'); END $$;
                CREATE FUNCTION crm_backfill.same(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
                CREATE OPERATOR crm_backfill.@=@ (
                  LEFTARG = text, RIGHTARG = text, FUNCTION = crm_backfill.same
                );
                """.encode()
            )
            own.commit()
        as_owner(f"REVOKE CREATE ON SCHEMA crm_backfill FROM {ATTACKER}")
        yield


def test_every_command_refuses_what_a_stranger_left_in_our_schema_whatever_its_name(own_public: Database) -> None:
    with left_in_our_schema():
        refused = (0, "")
        for command in COMMANDS:
            refused = ended_on(database_url(), *command)
            assert_refused(
                refused,
                f"crm_backfill.{OVERLOAD} of {ATTACKER}",
                "DROP OPERATOR crm_backfill.@=@ (text, text); DROP ROUTINE crm_backfill.same(text, text);",
            )
        assert not was_called("crm_backfill")
        put_right(refused[1])
        assert ended_on(database_url(), *RUN) == (0, "")
    assert len(contacts()) == 1


def test_our_function_is_called_although_another_one_fits_better(
    own_public: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust_everyone(monkeypatch)
    with left_in_our_schema():
        assert ended_on(database_url(), *RUN) == (0, "")
        assert not was_called("crm_backfill")
    assert len(contacts()) == 1


def test_our_function_in_the_hands_of_a_stranger_is_given_back_and_not_dropped(own_public: Database) -> None:
    function = "FUNCTION crm_backfill.try_execute(text, text[])"
    with attacker():
        as_owner(f"ALTER {function} OWNER TO {ATTACKER}")
        try:
            refused = ended_on(database_url(), *RUN)
            assert_refused(refused, f"of {ATTACKER}", f"ALTER {function} OWNER TO ...;")
            assert "DROP" not in refused[1]
        finally:
            as_owner(f"ALTER {function} OWNER TO CURRENT_USER")
        assert ended_on(database_url(), *RUN) == (0, "")


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


# What others own, and what would be called through it

#: Functions that say that they were called with other rights than the attacker's or those of a table's owner.
#: A sequence goes on although the transaction is rolled back.
EVIL = """
CREATE SEQUENCE evil.calls;
GRANT USAGE ON SCHEMA evil TO PUBLIC;
GRANT USAGE ON SEQUENCE evil.calls TO PUBLIC;
CREATE FUNCTION evil.note() RETURNS bigint LANGUAGE sql AS
  $$ SELECT nextval('evil.calls') WHERE current_user NOT IN ('mallory', 'pg_database_owner') $$;
CREATE FUNCTION evil.called() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN PERFORM evil.note(); RETURN NEW; END $$;
CREATE FUNCTION evil.called(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
  $$ BEGIN PERFORM evil.note(); RETURN 1; END $$;
CREATE FUNCTION evil.as_its_owner() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
  $$ BEGIN RETURN NEW; END $$;
CREATE FUNCTION evil.same(int, int) RETURNS boolean LANGUAGE sql AS $$ SELECT $1 = $2 * evil.called($1) $$;
CREATE OPERATOR evil.=== (LEFTARG = int, RIGHTARG = int, FUNCTION = evil.same);
"""
CAST = """
CREATE FUNCTION evil.as_text({type}) RETURNS text LANGUAGE plpgsql AS
  $$ BEGIN PERFORM nextval('evil.calls'); RETURN textin(enum_out($1)); END $$;
CREATE CAST ({type} AS text) WITH FUNCTION evil.as_text({type}) AS IMPLICIT;
"""
RUN, UPDATE, ROLLBACK = (
    ("backfill_crm_contacts", "--no-progress"),
    ("backfill_crm_contacts", "--update", "--no-progress"),
    ("rollback_crm_backfill", "--no-progress"),
)


class Attack(NamedTuple):
    """What a superuser allows, what the attacker makes of it, what calls it, how it is named and the ways out."""

    allowed: str
    made: str
    command: tuple[str, ...]
    named: str
    ways_out: tuple[str, ...]


ATTACKS = {
    "a foreign key from a table with an index that calls": Attack(
        "GRANT REFERENCES ON crm_contacts TO mallory",
        """CREATE TABLE evil.refs (contact text CONSTRAINT pin REFERENCES public.crm_contacts);
           CREATE INDEX ON evil.refs ((evil.called(1)));
           GRANT SELECT ON evil.refs TO PUBLIC""",
        ROLLBACK,
        "the foreign key pin of evil.refs of mallory",
        ("ALTER TABLE evil.refs DROP CONSTRAINT pin;",),
    ),
    "a foreign key that sets off a trigger at the end of our transaction": Attack(
        "GRANT REFERENCES (email) ON crm_contacts TO mallory; GRANT SELECT (email) ON crm_contacts TO mallory",
        """CREATE TABLE evil.refs (email text REFERENCES public.crm_contacts (email) ON UPDATE CASCADE);
           INSERT INTO evil.refs SELECT email FROM public.crm_contacts;
           CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON evil.refs DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION evil.called();""",
        UPDATE,
        "the foreign key refs_email_fkey of evil.refs of mallory",
        ("ALTER TABLE evil.refs DROP CONSTRAINT refs_email_fkey;",),
    ),
    "a cast of an enum": Attack(
        'ALTER TYPE "UserRole" OWNER TO mallory',
        CAST.format(type='public."UserRole"'),
        RUN,
        'the type public."UserRole" of mallory',
        ('ALTER TYPE public."UserRole" OWNER TO ...;', 'DROP CAST (public."UserRole" AS text);'),
    ),
    "the check of a domain": Attack(
        "CREATE DOMAIN public.tel AS text; ALTER DOMAIN public.tel OWNER TO mallory; "
        "ALTER TABLE crm_contacts ALTER phone TYPE public.tel",
        "ALTER DOMAIN public.tel ADD CHECK (evil.called(length(value)) = 1)",
        RUN,
        "the type public.tel of mallory",
        ("ALTER TYPE public.tel OWNER TO ...;", "ALTER FUNCTION evil.called(integer) OWNER TO ...;"),
    ),
    "the function of a trigger": Attack(
        "GRANT TRIGGER ON crm_contacts TO mallory",
        """CREATE TRIGGER mine BEFORE INSERT ON public.crm_contacts FOR EACH ROW EXECUTE FUNCTION evil.called()""",
        RUN,
        "the function evil.called() in the trigger mine of public.crm_contacts of mallory",
        ("DROP TRIGGER mine ON public.crm_contacts;",),
    ),
    "a trigger with its owner's rights that changes the search path": Attack(
        "GRANT TRIGGER ON crm_contacts TO mallory",
        """CREATE FUNCTION evil.is(text, text) RETURNS boolean LANGUAGE plpgsql AS
             $$ BEGIN PERFORM evil.note(); RETURN texteq($1, $2); END $$;
           CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.is);
           CREATE FUNCTION evil.elsewhere() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
             $$ BEGIN PERFORM set_config('search_path', 'crm_backfill, public, evil, pg_catalog', false); RETURN NEW;
                END $$;
           CREATE TRIGGER mine BEFORE INSERT ON public.crm_contacts FOR EACH ROW EXECUTE FUNCTION evil.elsewhere()""",
        RUN,
        "the function evil.elsewhere() in the trigger mine of public.crm_contacts of mallory",
        ("DROP TRIGGER mine ON public.crm_contacts;",),
    ),
    "a trigger with its owner's rights that defers one of ours": Attack(
        "GRANT TRIGGER ON crm_contacts TO mallory",
        """CREATE TABLE evil.queue (n int);
           GRANT INSERT ON evil.queue TO PUBLIC;
           CREATE CONSTRAINT TRIGGER late AFTER INSERT ON evil.queue DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION evil.called();
           CREATE FUNCTION evil.later() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
             $$ BEGIN SET CONSTRAINTS ALL DEFERRED; INSERT INTO evil.queue VALUES (1); RETURN NEW; END $$;
           CREATE TRIGGER mine BEFORE INSERT ON public.crm_contacts FOR EACH ROW EXECUTE FUNCTION evil.later()""",
        RUN,
        "the function evil.later() in the trigger mine of public.crm_contacts of mallory",
        ("DROP TRIGGER mine ON public.crm_contacts;",),
    ),
    "the default of a domain": Attack(
        "CREATE DOMAIN public.flag AS int; ALTER DOMAIN public.flag OWNER TO mallory; "
        "ALTER TABLE crm_contacts ADD flag public.flag",
        "ALTER DOMAIN public.flag SET DEFAULT evil.called(1)",
        RUN,
        "the type public.flag of mallory",
        ("ALTER TYPE public.flag OWNER TO ...;", "ALTER FUNCTION evil.called(integer) OWNER TO ...;"),
    ),
    "the condition of a trigger": Attack(
        "GRANT TRIGGER ON crm_contacts TO mallory",
        """CREATE TRIGGER mine BEFORE INSERT ON public.crm_contacts FOR EACH ROW
             WHEN (evil.called(length(NEW.id)) = 1) EXECUTE FUNCTION evil.as_its_owner()""",
        RUN,
        "the function evil.called(integer) in the trigger mine of public.crm_contacts of mallory",
        ("DROP TRIGGER mine ON public.crm_contacts;",),
    ),
    "the trigger of a partition": Attack(
        """CREATE TABLE public.history (LIKE crm_stage_history, PRIMARY KEY (id)) PARTITION BY HASH (id);
           CREATE TABLE public.history_1 PARTITION OF public.history FOR VALUES WITH (MODULUS 1, REMAINDER 0);
           DROP TABLE crm_stage_history; ALTER TABLE public.history RENAME TO crm_stage_history;
           GRANT TRIGGER ON public.history_1 TO mallory""",
        "CREATE TRIGGER mine BEFORE INSERT ON public.history_1 FOR EACH ROW EXECUTE FUNCTION evil.called()",
        UPDATE,
        "the function evil.called() in the trigger mine of public.history_1 of mallory",
        ("DROP TRIGGER mine ON public.history_1;",),
    ),
    "the trigger of a table that refers to contacts, at the end of our statement": Attack(
        "GRANT TRIGGER ON crm_interactions TO mallory; ALTER TABLE crm_interactions OWNER TO pg_database_owner; "
        "GRANT USAGE ON SCHEMA public TO pg_database_owner",
        "CREATE TRIGGER mine AFTER DELETE ON public.crm_interactions EXECUTE FUNCTION evil.called()",
        ROLLBACK,
        "the function evil.called() in the trigger mine of public.crm_interactions of mallory",
        ("DROP TRIGGER mine ON public.crm_interactions;",),
    ),
    "an index of a child": Attack(
        "GRANT CREATE ON SCHEMA public TO mallory; CREATE TABLE public.leads_1 () INHERITS (public.leads); "
        "ALTER TABLE public.leads_1 OWNER TO mallory",
        "CREATE INDEX ON public.leads_1 ((evil.called(1)))",
        RUN,
        "public.leads_1 of mallory",
        ("ALTER TABLE public.leads_1 OWNER TO ...;", "ALTER FUNCTION evil.called(integer) OWNER TO ...;"),
    ),
    "a table under a view": Attack(
        """DROP TABLE crm_interactions; CREATE TABLE public.calls (contact text);
           CREATE VIEW public.crm_interactions AS SELECT contact AS "contactId" FROM public.calls;
           ALTER TABLE public.calls OWNER TO mallory;
           GRANT CREATE ON SCHEMA public TO mallory""",
        "CREATE INDEX ON public.calls ((evil.called(1)))",
        ROLLBACK,
        "public.calls of mallory",
        ("ALTER TABLE public.calls OWNER TO ...;", "ALTER FUNCTION evil.called(integer) OWNER TO ...;"),
    ),
    "an index of a table": Attack(
        "GRANT CREATE ON SCHEMA public TO mallory; ALTER TABLE leads OWNER TO mallory",
        "CREATE INDEX ON public.leads ((evil.called(1)))",
        RUN,
        "public.leads of mallory",
        ("ALTER TABLE public.leads OWNER TO ...;", "ALTER FUNCTION evil.called(integer) OWNER TO ...;"),
    ),
    "a view": Attack(
        "DROP TABLE crm_interactions; "
        """CREATE VIEW public.crm_interactions AS SELECT ''::text AS "contactId";
           ALTER VIEW public.crm_interactions OWNER TO mallory;
           GRANT CREATE ON SCHEMA public TO mallory""",
        """CREATE OR REPLACE VIEW public.crm_interactions AS
             SELECT 'c'::text AS "contactId" FROM pg_am WHERE oid::int OPERATOR(evil.===) 1""",
        ROLLBACK,
        "public.crm_interactions of mallory",
        (
            "ALTER TABLE public.crm_interactions OWNER TO ...;",
            "ALTER FUNCTION evil.same(integer,integer) OWNER TO ...;",
        ),
    ),
}


@contextmanager
def attack(name: str) -> Iterator[tuple[Attack, tuple[str, ...]]]:
    """A database under attack, with contacts to make, update and take back, and the command that would fall for it."""
    profile, converted = add_profile(), add_lead("moe@example.com")
    assert ended_on(database_url(), *RUN) == (0, "")
    user = add_user("pat@example.com")
    as_owner(
        f"""UPDATE profiles SET "userId" = '{user}', "updatedAt" = now() WHERE id = '{profile}'""",
        f"""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() WHERE id = '{converted}'""",
    )
    add_lead("lee@example.com")
    found = ATTACKS[name]
    with session() as observer:
        ((run,),) = observer.execute("SELECT max(id)::text FROM backfill_run").fetchall()
    command = (*found.command, run) if found.command == ROLLBACK else found.command
    try:
        with attacker(
            f"GRANT USAGE ON SCHEMA public TO {ATTACKER}",
            *found.allowed.split(";"),
            f"CREATE SCHEMA evil AUTHORIZATION {ATTACKER}",
        ):
            with session(ATTACKER) as own:
                own.execute((EVIL + found.made).encode())
                own.commit()
            as_owner(f"REVOKE CREATE ON SCHEMA public FROM {ATTACKER}")
            yield found, command
    finally:
        as_owner("DROP SCHEMA IF EXISTS evil CASCADE")


@pytest.mark.parametrize("name", ATTACKS)
def test_what_others_could_have_called_is_refused_until_it_is_mended(own_public: Database, name: str) -> None:
    with attack(name) as (found, command):
        for refused in (ended_on(database_url(), *command), ended_on(database_url(), *command, "--dry-run")):
            assert_refused(refused, found.named, found.ways_out[0], "Nothing is written from here on.")
        assert not was_called("evil")
        for way_out in found.ways_out:
            assert_refused(ended_on(database_url(), *command), way_out)
            as_owner(way_out.replace("...", "CURRENT_USER"))
        assert ended_on(database_url(), *command) == (0, "")


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_refused_would_be_called_otherwise(
    own_public: Database, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trust_everyone(monkeypatch)
    with attack(name) as (_, command):
        ended_on(database_url(), *command)
        with session() as observer:
            # Since PostgreSQL 18 a trigger runs as the role that set it off, also at the end of a transaction.
            is_late = "at the end" in name or "defers" in name
            is_safe = is_late and observer.info.server_version >= 180000
        assert was_called("evil") is not is_safe


REFERRING = "a foreign key from a table with an index that calls"


def test_a_rollback_reads_no_table_whose_foreign_key_is_newer_than_its_connection(own_public: Database) -> None:
    connection.ensure_connection()
    with attack(REFERRING) as (found, (*_, run)):
        with pytest.raises(UntrustedCodeError) as refused:
            roll_back(int(run), dry_run=True)
        assert found.named in str(refused.value)
        assert not was_called("evil")


def test_a_dry_run_of_a_rollback_reads_no_table_whose_foreign_key_is_newer_than_its_beginning(
    own_public: Database,
) -> None:
    connection.ensure_connection()
    with attack(REFERRING) as (found, (*_, run)):
        reader = Reader.of(connection, examine(connection, for_writing=False), BackfillRun.objects.get(pk=run))
        with pytest.raises(UntrustedCodeError) as refused:
            DryRunUndoer(connection, reader).undo(Page(reader.page("", 10)))
        assert found.named in str(refused.value)
        assert not was_called("evil")


def test_a_run_that_would_remove_duplicates_reads_no_table_of_an_untrusted_role(own_public: Database) -> None:
    connection.ensure_connection()
    with attack(REFERRING) as (_, (*_, run)):
        as_owner(
            "INSERT INTO crm_contacts SELECT (jsonb_populate_record(c, jsonb_build_object("
            "'id', 'other', 'email', 'MOE@example.com'))).* FROM crm_contacts c WHERE email = 'moe@example.com'"
        )
        latecomers = Latecomers(connection, examine(connection, for_writing=False), int(run))
        assert list(latecomers.remove()) == []
        assert "belongs to a role that is not trusted" in latecomers.twice.why
        assert not was_called("evil")


def test_a_column_of_a_type_of_others_that_refers_to_a_contact_is_refused(own_public: Database) -> None:
    with attacker(f"CREATE SCHEMA evil AUTHORIZATION {ATTACKER}"):
        as_owner(
            "CREATE DOMAIN evil.word AS text",
            f"ALTER DOMAIN evil.word OWNER TO {ATTACKER}",
            "CREATE TABLE public.notes (contact evil.word REFERENCES crm_contacts)",
        )
        refused = ended_on(database_url(), "backfill_runs", "list")
        assert_refused(refused, f"the type evil.word of {ATTACKER}", "ALTER TYPE evil.word OWNER TO ...;")


# What is made while a run goes on

#: What the end of a run writes as well, which is then left to the next run.
OF_THE_END = ("backfill_run", "committed_transaction")
AT_WORK = {
    "a run": (RUN, "crm_contacts"),
    "an update": (UPDATE, "crm_contacts"),
    "the history of an update": (UPDATE, "crm_stage_history"),
    "a rollback": ((*ROLLBACK, "1"), "crm_contacts"),
    "a rollback of an update": ((*ROLLBACK, "2"), "crm_contacts"),
    "the history in a rollback of an update": ((*ROLLBACK, "2"), "crm_stage_history"),
    # A foreign key deletes from these with a contact.
    "the history in a rollback": ((*ROLLBACK, "1"), "crm_stage_history"),
    "the interactions in a rollback": ((*ROLLBACK, "1"), "crm_interactions"),
    **{f"the {table} of a run": (RUN, table) for table in ("ledger_entry", "backfill_batch", *OF_THE_END)},
    **{
        f"the {table} of an update": (UPDATE, table)
        for table in ("ledger_entry", "backfill_batch", "contact_update", *OF_THE_END)
    },
    "the changes of a run that recreates": ((*RUN, "--recreate-deleted"), "contact_update"),
    **{
        f"the {table} of a rollback": ((*ROLLBACK, "1"), table)
        for table in ("ledger_entry", "contact_update", "rollback", *OF_THE_END)
    },
}


@contextmanager
def at_work(name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """A command that has two batches or more, and what makes a trigger on a table that it writes."""
    command, table = AT_WORK[name]
    leads = [add_lead(f"{number}@example.com") for number in range(2)]
    if command != RUN:
        assert ended_on(database_url(), *RUN) == (0, "")
        converted = "UPDATE leads SET status = 'CONVERTED', \"updatedAt\" = now() WHERE id = '{}'"
        as_owner(*map(converted.format, leads))
    if "--recreate-deleted" in command:
        as_owner("DELETE FROM crm_contacts")
    if command[0] == ROLLBACK[0]:
        add_lead("new@example.com")
        assert ended_on(database_url(), *UPDATE) == (0, "")
        with session() as observer:
            runs = observer.execute("SELECT id::text FROM backfill_run run ORDER BY run.id").fetchall()
        command = (*ROLLBACK, *runs[int(command[-1]) - 1])
    schema = "public" if table in LEGACY_TABLES else "crm_backfill"
    made = f"CREATE TRIGGER mine BEFORE INSERT OR UPDATE OR DELETE ON {schema}.{table} EXECUTE FUNCTION evil.called()"
    try:
        with attacker(
            f"GRANT USAGE ON SCHEMA public TO {ATTACKER}",
            f"GRANT USAGE ON SCHEMA crm_backfill TO {ATTACKER}",
            f"GRANT TRIGGER ON ALL TABLES IN SCHEMA public, crm_backfill TO {ATTACKER}",
            f"CREATE SCHEMA evil AUTHORIZATION {ATTACKER}",
        ):
            with session(ATTACKER) as own:
                own.execute(EVIL.encode())
                own.commit()
            yield (*command, "--batch-size", "1"), made
    finally:
        as_owner("DROP SCHEMA IF EXISTS evil CASCADE")


@contextmanager
def in_the_second_batch(act: Callable[[], None], *, after_its_beginning: bool) -> Iterator[None]:
    """Act when the second batch is about to begin, or has begun."""
    batches: list[Any] = []
    acted = False

    def watch(execute: Any, sql: Any, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        nonlocal acted
        begins = "SET CONSTRAINTS ALL IMMEDIATE" in str(sql)
        if begins:
            batches.append(context["connection"])
        # Another thread reads over another connection.
        if (
            len(batches) == 2
            and not acted
            and context["connection"] is batches[1]
            and begins is not after_its_beginning
        ):
            acted = True
            act()
        return execute(sql, parameters, many, context)

    with each_statement(watch):
        yield
    assert acted


@pytest.mark.parametrize("name", AT_WORK)
def test_a_trigger_that_is_made_during_a_run_ends_it_before_its_next_batch(own_public: Database, name: str) -> None:
    with at_work(name) as (command, made):

        def act() -> None:
            with session(ATTACKER) as own:
                own.execute(made.encode())
                own.commit()

        with in_the_second_batch(act, after_its_beginning=False):
            code, output = ended_on(database_url(), *command)
        assert not was_called("evil")
        assert code == 5
        table = made.split(" ON ")[1].split(" ")[0]
        told = [output]
        if not table.endswith(OF_THE_END):
            with session() as observer:
                ((failure,),) = observer.execute("SELECT failure FROM backfill_run ORDER BY id DESC LIMIT 1").fetchall()
            told.append(failure)
        for failure in told:
            assert f"the function evil.called() in the trigger mine of {table}" in failure
            assert "DROP TRIGGER mine ON" in failure
            assert "Nothing is written from here on" in failure


@pytest.mark.parametrize("name", AT_WORK)
def test_nobody_makes_a_trigger_between_the_check_of_a_batch_and_its_end(own_public: Database, name: str) -> None:
    with at_work(name) as (command, made):

        def act() -> None:
            with session(ATTACKER) as own:
                own.execute("SET lock_timeout = 20")
                with pytest.raises(LockNotAvailable):
                    own.execute(made.encode())

        with in_the_second_batch(act, after_its_beginning=True):
            code, _ = ended_on(database_url(), *command)
        assert code == 0


def keep(run: int) -> None:
    with lease.kept(run):
        pass


@pytest.mark.parametrize(
    "write",
    [
        control.cancel,
        keep,
        lease.keep_alive,
        lambda run: lease.release(run, RunStatus.FINISHED),
        lambda run: lease.take_over_if_dead(BackfillRun.objects.get(pk=run)),
        lambda run: belongs_to(RowReference("leads", str(run)), "c1"),
    ],
    ids=["cancel", "keep", "keep alive", "release", "take over", "resolve"],
)
def test_whatever_else_writes_the_record_of_a_run_asks_for_its_triggers(
    own_public: Database, write: Callable[[int], object]
) -> None:
    connection.ensure_connection()
    with at_work("the backfill_run of a run") as (command, made):
        assert ended_on(database_url(), *command) == (0, "")
        run = BackfillRun.objects.latest("id")
        BackfillRun.objects.update(status=RunStatus.RUNNING, process_id=0)
        with session(ATTACKER) as own:
            own.execute(made.encode())
            own.commit()
        with pytest.raises(UntrustedCodeError, match=r"mine of crm_backfill\.backfill_run"):
            write(run.pk)
        assert not was_called("evil")
        assert BackfillRun.objects.get(pk=run.pk).status == RunStatus.RUNNING


def test_a_report_is_noted_in_no_record_whose_triggers_are_not_trusted(own_public: Database) -> None:
    connection.ensure_connection()
    with at_work("the backfill_run of a run") as (command, made):
        assert ended_on(database_url(), *command) == (0, "")
        run = BackfillRun.objects.latest("id")
        with session(ATTACKER) as own:
            own.execute(made.encode())
            own.commit()
        with noted(run.pk, []):
            pass
        assert not was_called("evil")


def test_a_member_that_may_nothing_by_it_is_not_trusted(own_public: Database) -> None:
    with session() as observer:
        if observer.info.server_version < 160000:
            pytest.skip("before PostgreSQL 16 every membership allows something")
    with attack("the function of a trigger") as (found, command):
        as_owner(f"GRANT {embedded.USER} TO {ATTACKER} WITH ADMIN FALSE, INHERIT FALSE, SET FALSE")
        assert_refused(ended_on(database_url(), *command), found.named)
        as_owner(f"REVOKE {embedded.USER} FROM {ATTACKER}")

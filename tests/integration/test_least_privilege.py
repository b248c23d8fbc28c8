"""The role of docs/least_privilege.sql: it can do what the backfill needs, and nothing else, and the check says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest
from django.db import connection
from pytest_django import DjangoDbBlocker

from config import embedded
from config.database import quoted_name
from crm import checks
from crm.legacy_schema import GENERATIONS
from crm.postgres.facts.rights import OPTIONS, RIGHTS
from manage import main
from tests.conftest import Database
from tests.support import builders
from tests.support.circumstances import DROP_FOREIGN_KEYS, acting_as
from tests.support.commands import called, ended
from tests.support.processes import address, database_url, manage, session
from tests.support.roles import (
    ROLE,
    URL_ROLE,
    drop_role,
    granted_to,
    role_made_by_script,
    run_script,
)
from tests.support.scratch import EmptyDatabase, django_connection
from tests.support.sessions import managed

#: A role that the backfill has nothing to do with, and an owner of the application's tables who is no superuser.
OTHERS, OWNER = "more rights", "an owner"
SECRETS = (
    ("users", "hashedPassword"),
    ("profiles", "ssn"),
    ("profiles", "dateOfBirth"),
    ("profiles", "address"),
    ("profiles", "bankDetails"),
)
#: Those of intakes that the first generation has.
SECRETS_OF_INTAKES = [
    ("tax_intake_leads", column)
    for column in (
        *("full_form_data", "contactNotes"),
        *("address_line_1", "address_line_2", "city", "state", "zip_code"),
    )
]


def as_owner(*statements: str) -> None:
    with session() as owner:
        owner.autocommit = True
        for statement in statements:
            named = statement.format(role=quoted_name(ROLE), other=quoted_name(OTHERS), owner=quoted_name(OWNER))
            owner.execute(named.encode())


def check(blocker: DjangoDbBlocker, role: str = URL_ROLE) -> list[str]:
    """What the check says of a role: number, text and hint of each message."""
    database = EmptyDatabase(str(connection.settings_dict["NAME"]), role, address())
    with django_connection(database, blocker, role=role) as theirs:
        messages = [*checks.check_rights(databases=[theirs.alias]), *checks.check_excess(databases=[theirs.alias])]
    return [f"{message.id} {message.msg} {message.hint}" for message in messages]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_backfill_works_under_the_role_and_the_check_is_clean(database: Database, generation: str) -> None:
    database.use(generation)
    builders.add_lead("ann@example.com", "CONVERTED", phone="555 0101")
    builders.add_lead("ann@example.com", "NEW", referrerUsername="ref", assignedPreparerId="nobody")
    builders.add_contact("carla@example.com")
    builders.add_lead("carla@example.com")
    builders.add_lead("not an address")
    client = database.rows("""SELECT label FROM unnest(enum_range(NULL::"UserRole")::text[]) AS label
        WHERE upper(label) = 'CLIENT' LIMIT 1""")[0][0]
    bob = builders.add_profile(client, email="bob@example.com")
    builders.add_lead("bob@example.com", phone="555 0102")
    builders.add_intake("ina@example.com")
    builders.add_intake("BOB@example.com", lastContactedAt="2025-02-03")
    builders.assign_client(bob, bob)
    with role_made_by_script() as url:
        checked = managed("check", "--database", "default", url=url)
        assert checked.code == 0, checked.stderr
        assert checked.stdout == "System check identified no issues (0 silenced).\n"

        foretold = managed("backfill_crm_contacts", "--dry-run", "--json", "--no-progress", url=url)
        run = managed("backfill_crm_contacts", "--json", "--no-progress", url=url)
        assert run.code == 1
        answer = json.loads(run.stdout)
        assert run.stderr.startswith(f"run {answer['run']}: "), "news and nothing else"
        assert run.stderr.count("\n") == 1
        counts = {name: answer[name] for name in ("created", "merged", "exists", "error")}
        assert counts == {"created": 3, "merged": 3, "exists": 1, "error": 1}
        assert counts == {name: json.loads(foretold.stdout)[name] for name in counts}
        again = managed("backfill_crm_contacts", "--json", "--no-progress", url=url)
        assert (again.code, json.loads(again.stdout)["already"]) == (0, 7)
        assert json.loads(managed("backfill_runs", "list", "--json", url=url).stdout)[0]["run"] == answer["run"] + 1
        with acting_as(ROLE):
            assert called("trace_contact", builders.contact_with("bob@example.com")["id"]).code == 0
            assert called("backfill_runs", "watch", "latest").code == 0
    assert builders.contact_with("ann@example.com")["referrerUsername"] == "ref"
    assert builders.contact_with("bob@example.com")["phone"] == "555 0102"
    assert builders.contact_with("bob@example.com")["assignedPreparerId"] == bob


@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_update_works_under_the_role_that_was_made_for_it_and_the_check_is_clean(
    database: Database, generation: str
) -> None:
    database.use(generation)
    lead = builders.add_lead("ann@example.com")
    builders.add_contact("carla@example.com")
    builders.add_lead("carla@example.com", phone="555 0103")
    intake = builders.add_intake("ina@example.com")
    with role_made_by_script() as url:
        managed("backfill_crm_contacts", "--json", "--no-progress", url=url)
        refused = managed("backfill_crm_contacts", "--update", "--no-progress", url=url)
        assert (refused.code, refused.stdout) == (2, "")
        for missing in ("INSERT on crm_stage_history", "UPDATE on crm_contacts.email", "UPDATE on crm_contacts.stage"):
            assert missing in refused.stderr
    database.rows("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() WHERE id = %s RETURNING id""", lead)
    builders.change("tax_intake_leads", intake, lastContactedAt="2025-07-02")
    with role_made_by_script(update="on") as url:
        checked = managed("check", "--database", "default", url=url)
        assert (checked.code, checked.stdout) == (0, "System check identified no issues (0 silenced).\n")
        foretold = managed("backfill_crm_contacts", "--update", "--dry-run", "--json", "--no-progress", url=url)
        run = managed("backfill_crm_contacts", "--update", "--json", "--no-progress", url=url)
        assert (run.code, run.stderr) == (0, "")
        columns = {"contact_type": 1, "last_contacted_at": 1, "phone": 1, "stage": 2}
        assert json.loads(run.stdout)["updated_by_column"] == columns
        assert json.loads(foretold.stdout)["updated_by_column"] == columns
    assert builders.contact_with("ann@example.com")["contactType"] == "CLIENT"
    with role_made_by_script(update="on", rollback="on") as url:
        checked = managed("check", "--database", "default", url=url)
        assert (checked.code, checked.stdout) == (0, "System check identified no issues (0 silenced).\n")
        number = str(json.loads(run.stdout)["run"])
        taken = managed("rollback_crm_backfill", number, "--json", "--no-progress", url=url)
        assert (taken.code, taken.stderr) == (0, "")
        assert json.loads(taken.stdout)["updates"] == {"reversed": 3, "kept": 0, "failed": 0}
    assert builders.contact_with("ann@example.com")["contactType"] == "LEAD"


def test_a_refusal_names_every_option_of_the_script_that_grants_what_is_missing(database: Database) -> None:
    lead = builders.add_lead("ann@example.com")
    assert called("backfill_crm_contacts", "--no-progress").code == 0
    database.rows("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() WHERE id = %s RETURNING id""", lead)
    run = json.loads(called("backfill_crm_contacts", "--update", "--json", "--no-progress").stdout)["run"]
    with role_made_by_script(rollback="on"), acting_as(ROLE):
        refused = called("rollback_crm_backfill", str(run), "--no-progress")
        assert (refused.code, refused.stdout) == (2, "")
        assert "DELETE on crm_stage_history" in refused.stderr
        assert "docs/least_privilege.sql again with --set rollback=on --set update=on," in refused.stderr


def test_a_rollback_needs_only_its_own_rights_and_its_dry_run_reports_all_that_are_missing(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    builders.add_lead("ann@example.com")
    run = json.loads(called("backfill_crm_contacts", "--json", "--no-progress").stdout)["run"]
    undo = ("rollback_crm_backfill", str(run), "--no-progress")
    with role_made_by_script(rollback="on"):
        as_owner(
            "REVOKE UPDATE ON crm_backfill.backfill_run FROM {role}",
            "REVOKE INSERT ON crm_backfill.rollback FROM {role}",
        )
        missing = "this role lacks: UPDATE on backfill_run, INSERT on rollback. As the tables' owner"
        with acting_as(ROLE):
            assert called(*undo, "--dry-run").code == 0
            assert [message for message in caplog.messages if missing in message] == caplog.messages != []
            refused = called(*undo)
            assert (refused.code, refused.stdout) == (2, "")
            assert missing in refused.stderr.replace("This", "this")
        as_owner(
            "GRANT UPDATE ON crm_backfill.backfill_run TO {role}",
            "GRANT INSERT ON crm_backfill.rollback TO {role}",
            # Only a run inserts these.
            "REVOKE INSERT ON public.crm_contacts, crm_backfill.ledger_entry, crm_backfill.backfill_batch FROM {role}",
        )
        caplog.clear()
        with acting_as(ROLE):
            assert called(*undo, "--dry-run").code == 0
            assert caplog.messages == []
            assert called(*undo).code == 0
    assert builders.contacts() == {}


@pytest.mark.parametrize("update", ["on", "off"])
@pytest.mark.parametrize("rollback", ["on", "off"])
def test_the_script_grants_the_rights_that_the_operations_need_and_no_other(
    database: Database, update: str, rollback: str
) -> None:
    options = {name for name, is_on in (("update", update), ("rollback", rollback)) if is_on == "on"}
    wanted = [
        right
        for right in RIGHTS
        if right.is_basic or any(options.issuperset(OPTIONS[operation]) for operation in right.operations)
    ]
    columns = {
        (right.table, right.privilege, column)
        for right in wanted
        for column in right.columns or all_columns(database, right.table)
        if right.privilege != "DELETE" and column in ("xmin", *all_columns(database, right.table))
    }
    with role_made_by_script(update=update, rollback=rollback):
        granted = database.rows(
            """
            SELECT relname::text, privilege, attname::text
              FROM pg_class c JOIN pg_attribute ON attrelid = c.oid
             CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
             WHERE relnamespace IN ('public'::regnamespace, 'crm_backfill'::regnamespace) AND relkind IN ('r', 'p')
               AND (attnum > 0 OR attname = 'xmin') AND NOT attisdropped
               AND has_column_privilege(%s, c.oid, attnum, privilege)
               AND (attname <> 'xmin' OR relname = 'crm_contacts' AND privilege = 'SELECT')
            """,
            ROLE,
        )
        whole = database.rows(
            """
            SELECT relname::text, privilege
              FROM pg_class c CROSS JOIN unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']) AS privilege
             WHERE relnamespace IN ('public'::regnamespace, 'crm_backfill'::regnamespace) AND relkind IN ('r', 'p')
               AND has_table_privilege(%s, c.oid, privilege)
            """,
            ROLE,
        )
    assert set(granted) == columns
    assert set(whole) == {(right.table, right.privilege) for right in wanted if right.privilege == "DELETE"}


def all_columns(database: Database, table: str) -> list[str]:
    query = "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped"
    return [name for (name,) in database.rows(query, table)]


def test_no_secret_can_be_read_nor_anything_else_be_done(database: Database) -> None:
    with role_made_by_script(), session(ROLE) as job:
        job.autocommit = True
        with_others = {*checks.READ_ONLY_TABLES, "crm_contacts"} - {"client_preparers"}
        refused = [
            *(f'SELECT "{column}" FROM public.{table}' for table, column in (*SECRETS, *SECRETS_OF_INTAKES)),
            *(
                statement.format(table)
                for table in (*checks.READ_ONLY_TABLES, "crm_contacts")
                for statement in (
                    # Of client_preparers, every column is read.
                    *(("SELECT * FROM public.{}", "SELECT count(p) FROM public.{} p") if table in with_others else ()),
                    *("UPDATE public.{} SET id = id", "DELETE FROM public.{}", "TRUNCATE public.{}"),
                )
            ),
            *(f"INSERT INTO public.{table} DEFAULT VALUES" for table in checks.READ_ONLY_TABLES),
            "UPDATE public.crm_contacts SET stage = 'NEW'",
            """UPDATE public.crm_contacts SET email = 'x'""",
            'UPDATE public.crm_contacts SET "filingStatus" = NULL',
            'INSERT INTO public.crm_contacts (id, "taxYear") VALUES (1, 2)',
            'SELECT "previousYearAGI" FROM public.crm_contacts',
            "SELECT FROM public.crm_interactions",
            "SELECT FROM public.crm_stage_history",
            """INSERT INTO public.crm_stage_history (id, "contactId", "toStage") VALUES ('h', 'c', 'NEW')""",
            "DELETE FROM crm_backfill.ledger_entry",
            "DELETE FROM crm_backfill.contact_update",
            "UPDATE crm_backfill.contact_update SET columns = 'phone'",
            "DELETE FROM crm_backfill.backfill_run",
            "UPDATE crm_backfill.backfill_batch SET read = 0",
            "SELECT FROM crm_backfill.auth_user",
            "SELECT FROM crm_backfill.django_session",
            "CREATE TABLE crm_backfill.mine (id int)",
            "CREATE TABLE public.mine (id int)",
        ]
        for statement in refused:
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
                job.execute(statement.encode())
        assert job.execute("SHOW search_path").fetchone() == ("crm_backfill,public",)


def test_the_secrets_are_those_of_the_tables(database: Database) -> None:
    """Every secret column is asked for above, in every generation."""
    for generation in GENERATIONS:
        database.use(generation)
        found = database.rows(
            "SELECT table_name::text, column_name::text FROM information_schema.columns "
            "WHERE table_schema = 'public' AND column_name = ANY(%s)",
            list(checks.SECRET_COLUMNS),
        )
        assert sorted(found) == sorted(SECRETS)
    columns = database.rows("SELECT attname FROM pg_attribute WHERE attrelid = 'tax_intake_leads'::regclass")
    assert {name for (name,) in columns} >= set(checks.SECRETS_OF_INTAKES), "of the last generation"
    assert set(checks.SECRETS_OF_INTAKES) == {"unqualifiedNotes", *(column for _, column in SECRETS_OF_INTAKES)}


def test_the_role_brings_its_search_path(database: Database) -> None:
    with role_made_by_script():
        listens = address()
        name = connection.settings_dict["NAME"]
        with psycopg.connect(host=listens.host, port=listens.port, user=ROLE, dbname=name) as job:
            assert job.execute("SHOW search_path").fetchone() == ("crm_backfill, public",)


@pytest.mark.parametrize(
    ("revoke", "number", "message", "grant"),
    [
        (
            "REVOKE SELECT (role, phone) ON public.profiles FROM {role}",
            "E002",
            "may not SELECT profiles.role, profiles.phone.",
            'GRANT SELECT ("role", "phone") ON "public"."profiles" TO {role};',
        ),
        (
            "REVOKE SELECT (xmin) ON public.crm_contacts FROM {role}",
            "E002",
            "may not SELECT crm_contacts.xmin.",
            'GRANT SELECT ("xmin") ON "public"."crm_contacts" TO {role};',
        ),
        (
            'REVOKE UPDATE ("assignedAt") ON public.crm_contacts FROM {role}',
            "E002",
            "may not UPDATE crm_contacts.assignedAt.",
            'GRANT UPDATE ("assignedAt") ON "public"."crm_contacts" TO {role};',
        ),
        (
            "REVOKE INSERT (email) ON public.crm_contacts FROM {role}",
            "E002",
            "may not INSERT crm_contacts.email.",
            'GRANT INSERT ("email") ON "public"."crm_contacts" TO {role};',
        ),
        (
            "REVOKE UPDATE ON crm_backfill.ledger_entry FROM {role}",
            "E002",
            "may not UPDATE ledger_entry.",
            'GRANT UPDATE ON "crm_backfill"."ledger_entry" TO {role};',
        ),
        (
            "REVOKE USAGE ON SCHEMA crm_backfill FROM {role}",
            "E001",
            "may not use the schema crm_backfill.",
            'GRANT USAGE ON SCHEMA "crm_backfill" TO {role};',
        ),
    ],
)
def test_the_check_tells_what_is_missing_with_the_grant(
    database: Database, django_db_blocker: DjangoDbBlocker, revoke: str, number: str, message: str, grant: str
) -> None:
    with role_made_by_script():
        as_owner(revoke)
        (said,) = check(django_db_blocker)
        assert said == f"crm.{number} The role {ROLE} {message} {grant.format(role=quoted_name(ROLE))}"
        as_owner(grant)
        assert check(django_db_blocker) == []


def test_the_script_grants_the_function_that_writes_contacts_where_not_everyone_has_it(
    database: Database, django_db_blocker: DjangoDbBlocker
) -> None:
    function = "FUNCTION crm_backfill.try_execute(text, text[])"
    as_owner(f"REVOKE EXECUTE ON {function} FROM PUBLIC")
    try:
        with role_made_by_script() as url:
            assert check(django_db_blocker) == []
            as_owner(f"REVOKE EXECUTE ON {function} FROM {{role}}")
            grant = f"GRANT EXECUTE ON {function} TO {quoted_name(ROLE)};"
            assert check(django_db_blocker) == [f"crm.E002 The role {ROLE} may not EXECUTE try_execute. {grant}"]
            refused = manage("backfill_crm_contacts", url=url)
            assert (refused.returncode, refused.stdout) == (2, "")
            assert "EXECUTE on crm_backfill.try_execute" in refused.stderr
    finally:
        as_owner(f"GRANT EXECUTE ON {function} TO PUBLIC")


@pytest.mark.parametrize(
    ("grant", "number", "message"),
    [
        ("GRANT SELECT (ssn) ON public.profiles TO {role}", "W001", "may read secret columns: profiles.ssn."),
        (
            "GRANT SELECT ON public.users, public.profiles TO {role}",
            "W001",
            f"may read secret columns: {', '.join(sorted(f'{table}.{column}' for table, column in SECRETS))}.",
        ),
        (
            "GRANT SELECT ON public.tax_intake_leads TO {role}",
            "W001",
            f"may read secret columns: {', '.join(sorted(map('.'.join, SECRETS_OF_INTAKES)))}.",
        ),
        (
            "GRANT UPDATE (phone) ON public.leads TO {role}",
            "W002",
            "may write tables that the backfill only reads: leads.",
        ),
        (
            "GRANT DELETE ON public.crm_interactions, public.users TO {role}",
            "W002",
            "may write tables that the backfill only reads: crm_interactions, users.",
        ),
        (
            'GRANT UPDATE ("createdAt") ON public.crm_contacts TO {role}',
            "W003",
            "may write columns that the backfill does not write: crm_contacts.createdAt (UPDATE).",
        ),
        ("GRANT CREATE ON SCHEMA public TO {role}", "W004", "may create tables in the application's schema: public."),
    ],
)
def test_the_check_warns_of_what_is_too_much(
    database: Database, django_db_blocker: DjangoDbBlocker, grant: str, number: str, message: str
) -> None:
    with role_made_by_script():
        as_owner(grant)
        assert check(django_db_blocker) == [f"crm.{number} The role {ROLE} {message} {checks.SCRIPT}"]


@pytest.mark.parametrize(
    ("grants", "powers", "ways_out"),
    [
        (["ALTER ROLE {role} CREATEROLE"], "CREATEROLE", "ALTER ROLE {role} NOCREATEROLE;"),
        (
            ["ALTER ROLE {role} REPLICATION BYPASSRLS"],
            "REPLICATION, BYPASSRLS",
            "ALTER ROLE {role} NOREPLICATION; ALTER ROLE {role} NOBYPASSRLS;",
        ),
        (
            ["GRANT pg_execute_server_program, pg_write_server_files TO {role}"],
            "member of pg_execute_server_program, member of pg_write_server_files",
            'REVOKE "pg_execute_server_program" FROM {role}; REVOKE "pg_write_server_files" FROM {role};',
        ),
        # With NOINHERIT no right is there until the role says SET ROLE.
        (
            ["ALTER ROLE {role} NOINHERIT", "GRANT pg_read_all_data, pg_write_all_data TO {role}"],
            "member of pg_read_all_data, member of pg_write_all_data",
            'REVOKE "pg_read_all_data" FROM {role}; REVOKE "pg_write_all_data" FROM {role};',
        ),
        (
            ["GRANT pg_read_server_files TO {other}", "GRANT {other} TO {role}"],
            "member of pg_read_server_files",
            "REVOKE {other} FROM {role};",
        ),
        (
            ["ALTER ROLE {other} CREATEROLE", "GRANT {other} TO {role}"],
            "member of more rights (CREATEROLE)",
            "REVOKE {other} FROM {role};",
        ),
        (
            [
                "ALTER ROLE {role} NOINHERIT",
                "GRANT {other} TO {role}",
                "ALTER TABLE public.crm_contacts OWNER TO {other}",
            ],
            "member of more rights (owner of tables)",
            "REVOKE {other} FROM {role};",
        ),
    ],
)
def test_the_check_names_what_makes_a_role_more_than_an_ordinary_one(
    database: Database, django_db_blocker: DjangoDbBlocker, grants: list[str], powers: str, ways_out: str
) -> None:
    with role_made_by_script(), role_of_others():
        as_owner(*grants)
        expected = f"crm.W005 The role {ROLE} has more power than an ordinary role: {powers}. "
        expected += ways_out.format(role=quoted_name(ROLE), other=quoted_name(OTHERS))
        assert [said for said in check(django_db_blocker) if said.startswith("crm.W005")] == [expected]
        as_owner(ways_out)
        assert check(django_db_blocker) == []


@pytest.mark.parametrize(
    "given",
    [
        "ALTER ROLE {role} SUPERUSER",
        "ALTER ROLE {role} CREATEROLE; ALTER TABLE public.leads OWNER TO {role}",
        "ALTER ROLE {role} CREATEROLE; ALTER SCHEMA public OWNER TO {role}",
        "ALTER ROLE {role} CREATEROLE; ALTER DATABASE {database} OWNER TO {role}",
    ],
)
def test_the_check_never_advises_to_change_a_role_that_others_depend_on(
    database: Database, django_db_blocker: DjangoDbBlocker, given: str
) -> None:
    name = quoted_name(str(connection.settings_dict["NAME"]))
    with role_made_by_script():
        try:
            as_owner(*given.replace("{database}", name).split("; "))
            (said,) = [said for said in check(django_db_blocker) if said.startswith("crm.W005")]
            assert said.endswith(f" {checks.KEEP}")
        finally:
            as_owner(f"REASSIGN OWNED BY {{role}} TO {embedded.USER}")


def test_what_a_role_needs_is_no_power(database: Database, django_db_blocker: DjangoDbBlocker) -> None:
    with role_made_by_script(), role_of_others():
        # For --max-replica-lag, in a group of people, and past policies that would hide rows.
        as_owner("GRANT pg_monitor, {other} TO {role}", "ALTER ROLE {role} BYPASSRLS")
        database.change("ALTER TABLE public.leads ENABLE ROW LEVEL SECURITY")
        assert check(django_db_blocker) == []


@pytest.mark.parametrize(
    ("grant", "number", "message"),
    [
        ("GRANT SELECT ON elsewhere.secrets TO {role}", "W006", "has rights on other relations: elsewhere.secrets."),
        ("GRANT SELECT (a) ON elsewhere.seen TO {role}", "W006", "has rights on other relations: elsewhere.seen."),
        ("GRANT SELECT ON elsewhere.kept TO {role}", "W006", "has rights on other relations: elsewhere.kept."),
        ("GRANT SELECT ON elsewhere.far TO {role}", "W006", "has rights on other relations: elsewhere.far."),
        ("GRANT INSERT ON elsewhere.secrets TO PUBLIC", "W006", "has rights on other relations: elsewhere.secrets."),
        (
            "GRANT SELECT (body) ON elsewhere.notes TO {role}",
            "W006",
            "has rights on other relations: elsewhere.notes.",
        ),
        ("GRANT CREATE ON SCHEMA elsewhere TO {role}", "W007", "may create objects in other schemas: elsewhere."),
        ("GRANT CREATE ON SCHEMA crm_backfill TO {role}", "W007", "may create objects in other schemas: crm_backfill."),
        ("GRANT CREATE ON DATABASE {database} TO {role}", "W008", "may create schemas in the database: {database}."),
    ],
)
def test_the_check_warns_of_rights_outside_of_what_the_backfill_uses(
    database: Database, django_db_blocker: DjangoDbBlocker, grant: str, number: str, message: str
) -> None:
    name = str(connection.settings_dict["NAME"])
    as_owner(
        "CREATE SCHEMA elsewhere",
        "CREATE TABLE elsewhere.secrets (a int)",
        "CREATE TABLE elsewhere.notes (contact text REFERENCES public.crm_contacts, body text)",
        "CREATE VIEW elsewhere.seen AS SELECT 1 AS a",
        "CREATE MATERIALIZED VIEW elsewhere.kept AS SELECT 1 AS a",
        "CREATE FOREIGN DATA WRAPPER anything",
        "CREATE SERVER anywhere FOREIGN DATA WRAPPER anything",
        "CREATE FOREIGN TABLE elsewhere.far (a int) SERVER anywhere",
        "CREATE TABLE elsewhere.of_everyone (a int)",
        "GRANT SELECT ON elsewhere.of_everyone TO PUBLIC",
    )
    try:
        with role_made_by_script(rollback="on"):
            assert check(django_db_blocker) == []
            as_owner(grant.replace("{database}", quoted_name(name)))
            said = message.replace("{database}", name)
            assert check(django_db_blocker) == [f"crm.{number} The role {ROLE} {said} {checks.SCRIPT}"]
    finally:
        as_owner("DROP SCHEMA elsewhere CASCADE", "DROP FOREIGN DATA WRAPPER anything CASCADE")


def test_a_warning_of_many_rights_stays_short(database: Database, django_db_blocker: DjangoDbBlocker) -> None:
    as_owner("CREATE SCHEMA elsewhere", *(f"CREATE TABLE elsewhere.t{number:02} (a int)" for number in range(12)))
    try:
        with role_made_by_script():
            as_owner("GRANT SELECT ON ALL TABLES IN SCHEMA elsewhere TO {role}")
            (said,) = check(django_db_blocker)
            assert "elsewhere.t09 and 2 more." in said
    finally:
        as_owner("DROP SCHEMA elsewhere CASCADE")


@pytest.mark.parametrize("table", ["public.crm_contacts", "public.crm_stage_history", "crm_backfill.ledger_entry"])
def test_the_check_warns_of_others_who_may_put_triggers_on_what_the_backfill_writes(
    database: Database, django_db_blocker: DjangoDbBlocker, table: str
) -> None:
    schema, name = table.split(".")
    with role_made_by_script(), role_of_others():
        as_owner(f"GRANT TRIGGER ON {table} TO {{other}}, PUBLIC", "ALTER ROLE {other} SUPERUSER")
        (said,) = check(django_db_blocker)
        assert f"on {table} (PUBLIC). " in said
        as_owner("ALTER ROLE {other} NOSUPERUSER")
        way_out = f'REVOKE TRIGGER ON "{schema}"."{name}" FROM PUBLIC, {quoted_name(OTHERS)};'
        (said,) = check(django_db_blocker)
        assert said == (
            "crm.W009 Roles other than the owner may create triggers, which run with the rights of the backfill, "
            f"on {table} (PUBLIC, {OTHERS}). {way_out}"
        )
        as_owner(way_out)
        assert check(django_db_blocker) == []


@pytest.mark.parametrize("what", ["REFERENCES", "REFERENCES (email)"])
def test_the_check_warns_of_others_who_may_refer_to_contacts(
    database: Database, django_db_blocker: DjangoDbBlocker, what: str
) -> None:
    with role_made_by_script(), role_of_others():
        as_owner(f"GRANT {what} ON public.crm_contacts TO {{other}}")
        (said,) = check(django_db_blocker)
        assert said.startswith(
            f"crm.W012 Roles other than the owner may create foreign keys to crm_contacts: {OTHERS}. "
        )
        way_out = f'REVOKE REFERENCES ON "public"."crm_contacts" FROM {quoted_name(OTHERS)};'
        assert said.endswith(f" {way_out}")
        as_owner(way_out)
        assert check(django_db_blocker) == []


def test_the_check_looks_at_the_role_that_reset_role_leads_back_to(
    database: Database, django_db_blocker: DjangoDbBlocker
) -> None:
    name = quoted_name(str(connection.settings_dict["NAME"]))
    with role_made_by_script(), role_of_others():
        as_owner("ALTER ROLE {other} LOGIN CREATEROLE", "GRANT {role} TO {other}")
        as_owner("GRANT SELECT (ssn) ON public.profiles TO {other}")
        as_owner(f"ALTER ROLE {{other}} IN DATABASE {name} SET role = {quoted_name(ROLE)}")
        assert check(django_db_blocker, role="more%20rights") == [
            f"crm.W001 The role {OTHERS} (after RESET ROLE) may read secret columns: profiles.ssn. {checks.SCRIPT}",
            (
                f"crm.W005 The role {OTHERS} (after RESET ROLE) has more power than an ordinary role: CREATEROLE. "
                f"ALTER ROLE {quoted_name(OTHERS)} NOCREATEROLE;"
            ),
        ]
        assert check(django_db_blocker) == []


@contextmanager
def role_of_others() -> Iterator[None]:
    as_owner("CREATE ROLE {other}")
    try:
        yield
    finally:
        as_owner(f"REASSIGN OWNED BY {{other}} TO {embedded.USER}", "DROP OWNED BY {other}", "DROP ROLE {other}")


@pytest.mark.process
def test_a_role_with_everything_is_warned_about(database: Database) -> None:
    checked = manage("check", "--database", "default", url=database_url())
    assert checked.returncode == 0
    for number in ("W001", "W002", "W003", "W004", "W005", "W007", "W008"):
        assert f"(crm.{number}) The role postgres " in checked.stderr


@pytest.mark.process
def test_who_migrates_is_not_warned_of_rights_that_migrate_needs(database: Database) -> None:
    migrated = manage("migrate", "--plan", url=database_url())
    assert (migrated.returncode, migrated.stderr) == (0, "")


def test_rows_that_row_level_security_hides_are_told_of(database: Database, django_db_blocker: DjangoDbBlocker) -> None:
    with role_made_by_script():
        database.change("ALTER TABLE public.leads ENABLE ROW LEVEL SECURITY")
        (said,) = check(django_db_blocker)
        assert said.startswith(f"crm.E003 Row-level security may hide rows of leads from the role {ROLE}; ")
        assert said.endswith(f"ALTER ROLE {quoted_name(ROLE)} BYPASSRLS;")


def test_a_history_that_row_level_security_guards_is_told_of_where_it_is_written(
    database: Database, django_db_blocker: DjangoDbBlocker
) -> None:
    with role_made_by_script():
        database.change("ALTER TABLE public.crm_stage_history ENABLE ROW LEVEL SECURITY")
        assert check(django_db_blocker) == []
    with role_made_by_script(update="on"):
        (said,) = check(django_db_blocker)
        assert said.startswith("crm.E003 Row-level security may hide rows of crm_stage_history from the role ")
        with acting_as(ROLE):
            assert called("backfill_crm_contacts", "--no-progress").code == 0
            for arguments in (("--dry-run",), ()):
                refused = called("backfill_crm_contacts", "--update", "--no-progress", *arguments)
                assert (refused.code, refused.stdout) == (2, "")
                assert "crm_stage_history" in refused.stderr


@pytest.mark.parametrize("table", ["ledger_entry", "conflict_decision", "backfill_run"])
def test_what_row_level_security_hides_of_the_books_is_not_taken_for_nothing(database: Database, table: str) -> None:
    builders.add_lead("ann@example.com")
    assert called("backfill_crm_contacts", "--no-progress").code == 0
    with role_made_by_script(update="on", rollback="on"):
        as_owner(f"ALTER TABLE crm_backfill.{table} ENABLE ROW LEVEL SECURITY")
        try:
            with acting_as(ROLE):
                for command in (
                    ("check", "--database", "default"),
                    ("backfill_crm_contacts", "--no-progress", "--dry-run"),
                    ("backfill_crm_contacts", "--no-progress"),
                    ("verify_crm_contacts",),
                    ("rollback_crm_backfill", "1", "--no-progress", "--dry-run"),
                    ("repair_crm_contacts", "--types", "--no-progress"),
                    ("backfill_runs", "list"),
                    ("resolve_crm_conflict", "profiles:1"),
                    ("export_backfill_errors",),
                    ("trace_contact", "c1"),
                ):
                    refused = ended(partial(main, ["manage.py", *command]))
                    assert (refused.code, refused.stdout) == (2, ""), (command, refused)
                    assert refused.stderr.count("\n") == 1
                    assert f'ALTER TABLE "crm_backfill"."{table}" DISABLE ROW LEVEL SECURITY' in refused.stderr
        finally:
            as_owner(f"ALTER TABLE crm_backfill.{table} DISABLE ROW LEVEL SECURITY")


def test_before_migrate_and_without_the_application_nothing_is_said(database: Database) -> None:
    assert checks.check_rights(databases=None) == checks.check_excess(databases=None) == []
    assert checks.check_rights(databases=["default"]) == checks.check_excess(databases=["default"]) == []
    with session() as owner:
        owner.autocommit = True
        owner.execute("ALTER SCHEMA crm_backfill RENAME TO crm_backfill_aside")
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"CREATE ROLE {quoted_name(ROLE)}")
                cursor.execute(f"SET ROLE {quoted_name(ROLE)}")
            assert checks.check_rights(databases=["default"]) == checks.check_excess(databases=["default"]) == []
        finally:
            connection.close()
            owner.execute("ALTER SCHEMA crm_backfill_aside RENAME TO crm_backfill")
            drop_role()


def test_before_migrate_the_script_says_so_and_does_nothing(database: Database) -> None:
    drop_role()
    as_owner("ALTER SCHEMA crm_backfill RENAME TO crm_backfill_aside")
    try:
        result = run_script(role=ROLE)
    finally:
        as_owner("ALTER SCHEMA crm_backfill_aside RENAME TO crm_backfill")
    assert result.returncode == 3
    assert "run `python manage.py migrate` first" in result.stderr
    assert database.rows("SELECT FROM pg_roles WHERE rolname = %s", ROLE) == []


def test_the_script_takes_back_what_was_granted_too_much(database: Database) -> None:
    with role_made_by_script(rollback="on"):
        as_owner("GRANT SELECT ON public.profiles TO {role}", "GRANT ALL ON public.leads TO {role}")
        assert may(database, "public.crm_contacts", "DELETE")
        assert run_script(role=ROLE).returncode == 0
        assert not may(database, "public.profiles", "SELECT")
        assert not may(database, "public.leads", "UPDATE")
        assert not may(database, "public.crm_contacts", "DELETE")


@pytest.mark.parametrize("schema", ["public", "crm_backfill"])
def test_the_script_takes_back_the_right_to_make_tables(database: Database, schema: str) -> None:
    with role_made_by_script(), session(ROLE) as job:
        job.autocommit = True
        make = f"CREATE TABLE {schema}.mine (); DROP TABLE {schema}.mine".encode()
        as_owner(f"GRANT ALL ON SCHEMA {schema} TO {{role}} WITH GRANT OPTION")
        job.execute(make)
        assert run_script(role=ROLE).returncode == 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for schema"):
            job.execute(make)
        granted = f"SELECT has_schema_privilege(%s, '{schema}', %s)"
        assert database.rows(granted, ROLE, "USAGE") == [(True,)]
        assert database.rows(granted, ROLE, "USAGE WITH GRANT OPTION") == [(False,)]


def test_the_script_takes_back_what_was_granted_in_whatever_schema(database: Database) -> None:
    name = quoted_name(str(connection.settings_dict["NAME"]))
    as_owner(
        "CREATE SCHEMA elsewhere",
        "CREATE TABLE elsewhere.notes (contact text REFERENCES public.crm_contacts, body text)",
        "CREATE SEQUENCE elsewhere.numbers",
        "CREATE FUNCTION elsewhere.act() RETURNS void LANGUAGE sql AS ''",
    )
    try:
        with role_made_by_script(rollback="on"):
            assert readable_columns(database, "elsewhere.notes") == ["contact"]
            as_owner(
                "GRANT INSERT, SELECT (body) ON elsewhere.notes TO {role}",
                "GRANT USAGE ON SEQUENCE elsewhere.numbers TO {role}",
                "GRANT EXECUTE ON FUNCTION elsewhere.act, pg_ls_logdir() TO {role}",
                "ALTER DEFAULT PRIVILEGES IN SCHEMA elsewhere GRANT SELECT ON TABLES TO {role}",
                "ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO {role}",
                f"GRANT CREATE ON DATABASE {name} TO {{role}}",
            )
            result = run_script(role=ROLE)
            assert (result.returncode, result.stdout, result.stderr) == (0, granted_to(), "")
            assert readable_columns(database, "elsewhere.notes") == []
            assert granted(database) == {"database CONNECT", "schema crm_backfill USAGE", "schema public USAGE"}
    finally:
        as_owner("DROP SCHEMA elsewhere CASCADE")


def test_the_script_takes_back_rights_on_what_is_no_table(database: Database) -> None:
    as_owner(
        "CREATE SCHEMA elsewhere",
        "CREATE TYPE elsewhere.mood AS ENUM ('well')",
        "CREATE DOMAIN elsewhere.word AS text",
        "CREATE FOREIGN DATA WRAPPER anything",
        "CREATE SERVER anywhere FOREIGN DATA WRAPPER anything",
        "SELECT lo_create(4711)",
    )
    try:
        with role_made_by_script():
            as_owner(
                "GRANT USAGE ON TYPE elsewhere.mood, elsewhere.word, int4 TO {role} WITH GRANT OPTION",
                "GRANT USAGE ON FOREIGN DATA WRAPPER anything TO {role}",
                "GRANT USAGE ON FOREIGN SERVER anywhere TO {role}",
                "GRANT USAGE ON LANGUAGE plpgsql TO {role}",
                "GRANT SELECT, UPDATE ON LARGE OBJECT 4711 TO {role}",
            )
            assert {"type mood USAGE", "server USAGE", "wrapper USAGE", "plpgsql USAGE"} <= granted(database)
            result = run_script(role=ROLE)
            assert (result.returncode, result.stdout, result.stderr) == (0, granted_to(), "")
            assert granted(database) == {"database CONNECT", "schema crm_backfill USAGE", "schema public USAGE"}
    finally:
        as_owner(
            "DROP SCHEMA elsewhere CASCADE",
            "DROP FOREIGN DATA WRAPPER anything CASCADE",
            "SELECT lo_unlink(4711)",
        )


def granted(database: Database) -> set[str]:
    """All that the role was granted in this database, but for the tables that the script names."""
    query = """
        SELECT what || ' ' || privilege_type
          FROM (SELECT 'database', datacl FROM pg_database WHERE datname = current_database()
                 UNION ALL SELECT 'schema ' || nspname, nspacl FROM pg_namespace
                 UNION ALL SELECT proname, proacl FROM pg_proc
                 UNION ALL SELECT 'type ' || typname, typacl FROM pg_type
                 UNION ALL SELECT lanname, lanacl FROM pg_language
                 UNION ALL SELECT 'server', srvacl FROM pg_foreign_server
                 UNION ALL SELECT 'wrapper', fdwacl FROM pg_foreign_data_wrapper
                 UNION ALL SELECT 'large object', lomacl FROM pg_largeobject_metadata
                 UNION ALL SELECT 'default', defaclacl FROM pg_default_acl
                 UNION ALL SELECT nspname || '.' || relname, relacl
                             FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
                            WHERE nspname NOT IN ('public', 'crm_backfill')) AS object(what, acl),
               aclexplode(acl)
         WHERE grantee = (SELECT oid FROM pg_roles WHERE rolname = %s)
    """
    return {what for (what,) in database.rows(query, ROLE)}


def test_the_script_ends_with_what_it_granted_so_that_a_misspelled_variable_shows(database: Database) -> None:
    drop_role()
    try:
        misspelled = run_script(role=ROLE, rolback="on", update="on")
        assert (misspelled.returncode, misspelled.stderr) == (0, "")
        assert misspelled.stdout == granted_to(update="on", rollback="off")
        assert not may(database, "public.crm_contacts", "DELETE")
    finally:
        drop_role()


@pytest.mark.parametrize("name", ["update", "rollback"])
@pytest.mark.parametrize("value", ["onn", "true", "1", ""])
def test_an_optional_part_that_is_neither_on_nor_off_is_refused(database: Database, name: str, value: str) -> None:
    drop_role()
    refused = run_script(role=ROLE, **{name: value})
    assert (refused.returncode, refused.stdout) == (3, "")
    assert (
        f"{name} is neither on nor off: write --set {name}=on, or leave it out. Nothing was changed." in refused.stderr
    )
    assert database.rows("SELECT FROM pg_roles WHERE rolname = %s", ROLE) == []


# Who may run the script


@pytest.fixture
def plain_owner(database: Database) -> Iterator[None]:
    """The owner of the application's tables and of ours, who is no superuser and may make no role."""
    drop_role()
    own = """
        DO $$ DECLARE name regclass; BEGIN
          FOR name IN SELECT oid FROM pg_class WHERE relkind IN ('r', 'p')
                         AND relnamespace IN ('public'::regnamespace, 'crm_backfill'::regnamespace) LOOP
            EXECUTE format('ALTER TABLE %s OWNER TO OWNER', name);
          END LOOP;
        END $$;
        ALTER SCHEMA public OWNER TO OWNER; ALTER SCHEMA crm_backfill OWNER TO OWNER
    """
    with session() as superuser:
        superuser.autocommit = True
        superuser.execute(f"CREATE ROLE {quoted_name(OWNER)} LOGIN".encode())
        superuser.execute(own.replace("TO OWNER", f"TO {quoted_name(OWNER)}").encode())
        try:
            yield
        finally:
            drop_role()
            superuser.execute(own.replace("TO OWNER", f"TO {embedded.USER}").encode())
            superuser.execute(f"DROP OWNED BY {quoted_name(OWNER)}; DROP ROLE {quoted_name(OWNER)}".encode())


def test_an_owner_who_may_make_no_role_is_told_what_an_administrator_has_to_do_first(
    database: Database, plain_owner: None, django_db_blocker: DjangoDbBlocker
) -> None:
    refused = run_script(user=OWNER, role=ROLE)
    assert (refused.returncode, refused.stdout) == (3, "")
    make = f"CREATE ROLE {quoted_name(ROLE)} LOGIN;"
    settle = f"ALTER ROLE {quoted_name(ROLE)} IN DATABASE {connection.settings_dict['NAME']} SET search_path ="
    statements = [make, f"{settle} crm_backfill, public;"]
    advice = f"may not make or change the role {ROLE}. Let an administrator run once: {' '.join(statements)} "
    assert f"The role {OWNER} {advice}" in refused.stderr
    as_owner(*statements)
    for _ in range(2):
        done = run_script(user=OWNER, role=ROLE)
        assert (done.returncode, done.stdout, done.stderr) == (0, granted_to(), "")
        assert check(django_db_blocker) == []


def test_an_owner_who_may_make_roles_needs_no_administrator(
    database: Database, plain_owner: None, django_db_blocker: DjangoDbBlocker
) -> None:
    as_owner("ALTER ROLE {owner} CREATEROLE")
    done = run_script(user=OWNER, role=ROLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, granted_to(), "")
    assert check(django_db_blocker) == []


def test_who_owns_only_some_of_the_tables_is_told_so_before_anything_is_done(
    database: Database, plain_owner: None
) -> None:
    as_owner("ALTER ROLE {owner} CREATEROLE", f"ALTER TABLE public.leads OWNER TO {embedded.USER}")
    refused = run_script(user=OWNER, role=ROLE)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert f"The role {OWNER} may grant nothing on public.leads (owner {embedded.USER})" in refused.stderr
    assert database.rows("SELECT FROM pg_roles WHERE rolname = %s", ROLE) == []


def test_what_only_others_can_take_away_is_told_and_nothing_is_done(database: Database, plain_owner: None) -> None:
    as_owner("ALTER ROLE {owner} CREATEROLE")
    assert run_script(user=OWNER, role=ROLE, rollback="on").returncode == 0
    as_owner("GRANT EXECUTE ON FUNCTION pg_ls_logdir() TO {role}")
    refused = run_script(user=OWNER, role=ROLE)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert f"on pg_ls_logdir() (owner {embedded.USER}) that only the owner or a superuser can revoke" in refused.stderr
    assert may(database, "public.crm_contacts", "DELETE")


#: What is granted to `{other}`, to be granted on by it to `{role}`; and how the script names it.
GRANTED_ON = {
    "SELECT (body) ON elsewhere.notes": "elsewhere.notes",
    "SELECT ON public.profiles": "public.profiles",
    "USAGE ON SEQUENCE elsewhere.numbers": "elsewhere.numbers",
    "EXECUTE ON FUNCTION elsewhere.act()": "elsewhere.act()",
    "USAGE ON TYPE elsewhere.mood": "type elsewhere.mood",
    "SELECT ON LARGE OBJECT 4711": "large object 4711",
    "CREATE ON SCHEMA elsewhere": "schema elsewhere",
    "CREATE ON DATABASE {database}": "database {database}",
}


def test_what_somebody_else_than_the_owner_granted_is_told_and_nothing_is_done(
    database: Database, django_db_blocker: DjangoDbBlocker
) -> None:
    name = str(connection.settings_dict["NAME"])
    rights = [right.replace("{database}", name) for right in GRANTED_ON]
    as_owner(
        "CREATE SCHEMA elsewhere",
        "CREATE TABLE elsewhere.notes (body text)",
        "CREATE SEQUENCE elsewhere.numbers",
        "CREATE FUNCTION elsewhere.act() RETURNS void LANGUAGE sql AS ''",
        "CREATE TYPE elsewhere.mood AS ENUM ('well')",
        "SELECT lo_create(4711)",
    )
    try:
        with role_made_by_script(rollback="on"), role_of_others():
            as_owner(
                "GRANT USAGE ON SCHEMA public, elsewhere TO {other}",
                *(f"GRANT {right} TO {{other}} WITH GRANT OPTION" for right in rights),
                "SET ROLE {other}",
                *(f"GRANT {right} TO {{role}}" for right in rights),
            )
            refused = run_script(role=ROLE)
            assert (refused.returncode, refused.stdout) == (3, "")
            for named in GRANTED_ON.values():
                assert f"{named} (granted by {OTHERS})".replace("{database}", name) in refused.stderr
            assert may(database, "public.crm_contacts", "DELETE"), "nothing was changed"
            way_out = refused.stderr[refused.stderr.index("SET ROLE ") : refused.stderr.index(" Then run this again.")]
            as_owner(*way_out.split("; "))
            result = run_script(role=ROLE)
            assert (result.returncode, result.stdout, result.stderr) == (0, granted_to(), "")
            assert granted(database) == {"database CONNECT", "schema crm_backfill USAGE", "schema public USAGE"}
            assert check(django_db_blocker) == []
    finally:
        as_owner("DROP SCHEMA elsewhere CASCADE", "SELECT lo_unlink(4711)")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("ALTER ROLE {other} SUPERUSER", "a superuser"),
        ("ALTER DATABASE {database} OWNER TO {other}", "the owner of the database"),
        ("ALTER SCHEMA public OWNER TO {other}", "the owner of the schema public"),
        ("ALTER TABLE public.leads OWNER TO {other}", "the owner of public.leads"),
        ("ALTER TABLE crm_backfill.ledger_entry OWNER TO {other}", "the owner of crm_backfill.ledger_entry"),
    ],
)
def test_the_script_takes_no_role_that_owns_or_administers_something(database: Database, given: str, what: str) -> None:
    with role_of_others():
        as_owner(given.replace("{database}", quoted_name(str(connection.settings_dict["NAME"]))))
        refused = run_script(role=OTHERS)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert f"The role {OTHERS} is {what}: " in refused.stderr
        assert database.rows("SELECT FROM pg_db_role_setting WHERE setrole = to_regrole(%s)", quoted_name(OTHERS)) == []


def test_the_script_takes_not_the_role_that_runs_it(database: Database, plain_owner: None) -> None:
    as_owner("ALTER ROLE {owner} CREATEROLE")
    for role, user in ((embedded.USER, embedded.USER), (OWNER, OWNER)):
        refused = run_script(user=user, role=role)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert "the role that runs this" in refused.stderr
    roles = [embedded.USER, OWNER]
    assert (
        database.rows(
            "SELECT FROM pg_db_role_setting JOIN pg_roles r ON r.oid = setrole WHERE rolname = ANY(%s)", roles
        )
        == []
    )


@pytest.mark.parametrize("rollback", ["on", "off"])
def test_the_script_grants_nothing_where_a_table_of_somebody_else_refers_to_contacts(
    database: Database, rollback: str
) -> None:
    drop_role()
    with role_of_others():
        as_owner(
            "CREATE SCHEMA elsewhere AUTHORIZATION {other}",
            "CREATE TABLE elsewhere.notes (contact text CONSTRAINT pin REFERENCES public.crm_contacts)",
            "ALTER TABLE elsewhere.notes OWNER TO {other}",
        )
        try:
            refused = run_script(role=ROLE, rollback=rollback)
            assert (refused.returncode, refused.stdout) == (3, "")
            assert f"The table elsewhere.notes of {OTHERS}, " in refused.stderr
            assert "ALTER TABLE elsewhere.notes DROP CONSTRAINT pin;" in refused.stderr
            assert database.rows("SELECT FROM pg_roles WHERE rolname = %s", ROLE) == []
        finally:
            as_owner("DROP SCHEMA elsewhere CASCADE")


@pytest.mark.parametrize(("option", "is_trusted"), [("ADMIN", True), ("INHERIT", True), ("SET", True), (None, False)])
def test_a_membership_that_allows_nothing_makes_nobody_trusted(
    database: Database, option: str | None, *, is_trusted: bool
) -> None:
    with session() as observer:
        if observer.info.server_version < 160000:
            pytest.skip("before PostgreSQL 16 every membership allows something")
    options = ", ".join(f"{each} {str(each == option).upper()}" for each in ("ADMIN", "INHERIT", "SET"))
    drop_role()
    with role_of_others():
        as_owner(
            "CREATE SCHEMA elsewhere AUTHORIZATION {other}",
            "CREATE TABLE elsewhere.notes (contact text REFERENCES public.crm_contacts)",
            "ALTER TABLE elsewhere.notes OWNER TO {other}",
            f"GRANT {embedded.USER} TO {{other}} WITH {options}",
        )
        try:
            result = run_script(role=ROLE)
            assert (result.returncode == 0) is is_trusted
            assert (f"The table elsewhere.notes of {OTHERS}, " in result.stderr) is not is_trusted
        finally:
            drop_role()
            as_owner("DROP SCHEMA elsewhere CASCADE")


# What is not for the role


@pytest.mark.process
@pytest.mark.parametrize("command", [("migrate",), ("createsuperuser", "--noinput"), ("runserver",)])
def test_what_is_not_for_the_role_is_one_line_that_says_which_address_to_use(
    database: Database, command: tuple[str, ...]
) -> None:
    with role_made_by_script() as url:
        refused = manage(*command, url=url)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "give DATABASE_URL the address of the role that owns the schema crm_backfill" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_right_to_take_a_run_back_has_to_be_asked_for(database: Database) -> None:
    with role_made_by_script(rollback="on"):
        assert may(database, "public.crm_contacts", "DELETE")
        assert may(database, "public.crm_contacts", "SELECT")
        assert may(database, "crm_backfill.ledger_entry", "DELETE")
        for table in ("crm_interactions", "crm_stage_history"):
            assert readable_columns(database, f"public.{table}") == ["contactId"]


@pytest.mark.parametrize("has_foreign_keys", [True, False])
def test_a_run_is_verified_and_taken_back_under_the_role(
    database: Database,
    has_foreign_keys: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    if not has_foreign_keys:
        database.change(DROP_FOREIGN_KEYS)
    builders.add_lead("ann@example.com", "CONVERTED")
    builders.add_lead("ann@example.com", phone="555 0101", referrerUsername="ref")
    met = builders.add_contact("carla@example.com")
    builders.add_lead("carla@example.com")
    builders.add_intake("ann@example.com", lastContactedAt="2025-02-03")
    with role_made_by_script() as url:
        answer = json.loads(managed("backfill_crm_contacts", "--json", "--no-progress", url=url).stdout)
        verified = managed("verify_crm_contacts", url=url)
        assert verified.code == 0, verified.stdout + verified.stderr
        undo = ("rollback_crm_backfill", str(answer["run"]), "--no-progress")
        refused = managed(*undo, url=url)
        assert refused.code == 2
        assert "This role cannot see every row of crm_interactions, crm_stage_history" in refused.stderr
        assert len(builders.contacts()) == 2
    with role_made_by_script(rollback="on") as url:
        undone = managed(*undo, url=url)
        assert undone.code == 0, undone.stdout + undone.stderr
    assert list(builders.contacts()) == [met]
    assert builders.ledger() == {}


def may(database: Database, table: str, privilege: str) -> bool:
    return database.rows("SELECT has_table_privilege(%s, %s, %s)", ROLE, table, privilege) == [(True,)]


def readable_columns(database: Database, table: str) -> list[str]:
    found = database.rows(
        "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 "
        "AND has_column_privilege(%s, attrelid, attnum, 'SELECT')",
        table,
        ROLE,
    )
    return [name for (name,) in found]

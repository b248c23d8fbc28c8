"""Every session is on the examined schema and reads values as we do, whatever role, database and pooler say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_django import DjangoDbBlocker

from crm.legacy_schema import ddl
from crm.postgres.session import FOLLOWED, SETTINGS
from tests.conftest import Database
from tests.support.builders import add_lead, add_profile, add_user, contacts
from tests.support.commands import backfill
from tests.support.pgbouncer import PGBOUNCER, PORT, pgbouncer
from tests.support.processes import database_url, manage
from tests.support.profiles import SOAKING
from tests.support.scratch import EmptyDatabase, as_the_default, scratch_database
from tests.support.sessions import COMMANDS, assert_refused, ended_on, role_with


@pytest.fixture(scope="module")
def two_schemas(django_db_setup: Database, django_db_blocker: DjangoDbBlocker) -> Iterator[EmptyDatabase]:
    """The application's tables twice, in `public` and in `app`; the ledger belongs to `public` by a first run."""
    with django_db_blocker.unblock(), scratch_database("two_schemas") as database:
        database.execute("CREATE SCHEMA app; SET search_path = app; " + braced(ddl("2025_12")))
        database.execute("SET search_path = public; " + braced(ddl("2025_12")))
        for schema in ("public", "app"):
            database.execute(
                f"SET search_path = {schema}; "
                'INSERT INTO leads (id, type, status, "firstName", "lastName", email, phone, "updatedAt") '
                "VALUES ('1', 'CUSTOMER', 'NEW', 'Ann', 'Lee', 'ann@example.com', '1', now())"
            )
        for command in (("migrate", "--verbosity", "0"), COMMANDS[0]):
            assert ended_on(database.url(), *command) == (0, "")
        database.execute(
            "GRANT USAGE ON SCHEMA crm_backfill, public, app TO {role}; "
            "GRANT ALL ON ALL TABLES IN SCHEMA crm_backfill, public, app TO {role}"
        )
        yield database


OURS = "crm_backfill"


def braced(statement: str) -> str:
    return statement.replace("{", "{{").replace("}", "}}")


def contents(database: EmptyDatabase) -> list[object]:
    return database.execute(
        " UNION ALL ".join(
            f"SELECT json_agg(t)::text FROM {table} t"
            for table in ("app.crm_contacts", "public.crm_contacts", f"{OURS}.ledger_entry", f"{OURS}.backfill_run")
        )
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_search_path_that_leads_to_another_schema_is_refused_by_every_command(
    database: Database, two_schemas: EmptyDatabase, command: tuple[str, ...]
) -> None:
    before = contents(two_schemas)
    two_schemas.execute("ALTER ROLE {role} IN DATABASE {name} SET search_path = crm_backfill, public")
    finished = ended_on(two_schemas.url(role=two_schemas.role, parameters="&schema=app&pgbouncer=true"), *command)
    statement = (
        'ALTER ROLE "two_schemas_role" IN DATABASE "two_schemas" SET search_path = "crm_backfill", "app", "public";'
    )
    assert_refused(finished, "search path", "crm_backfill, public", "schema app", statement)
    assert contents(two_schemas) == before


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_ledger_of_another_schema_is_refused_by_every_command(
    database: Database, two_schemas: EmptyDatabase, command: tuple[str, ...]
) -> None:
    before = contents(two_schemas)
    finished = ended_on(two_schemas.url(parameters="&schema=app"), *command)
    assert_refused(finished, "schema public", "schema app", "?schema=", "use another database")
    assert contents(two_schemas) == before


def test_a_schema_that_was_renamed_goes_on_with_its_ledger(database: Database, two_schemas: EmptyDatabase) -> None:
    two_schemas.execute("ALTER SCHEMA public RENAME TO renamed")
    url = two_schemas.url(parameters="&schema=renamed")
    try:
        _, refused = ended_on(url, *COMMANDS[0])
        two_schemas.execute(refused[refused.index("UPDATE") :])
        assert ended_on(url, *COMMANDS[0])[0] == 0
        assert two_schemas.execute("SELECT count(*) FROM crm_backfill.ledger_entry") == [1]
    finally:
        two_schemas.execute(
            "ALTER SCHEMA renamed RENAME TO public; UPDATE crm_backfill.backfill_run SET legacy_schema = 'public'"
        )


# What a role or a database says otherwise

STRANGE_SETTINGS = {
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "America/New_York",
    "array_nulls": "off",
    "bytea_output": "escape",
    "default_transaction_isolation": "serializable",
    "exit_on_error": "on",
    "extra_float_digits": "-15",
    "idle_in_transaction_session_timeout": "1ms",
    "idle_session_timeout": "10s",
    "log_parameter_max_length_on_error": "-1",
    "plan_cache_mode": "force_generic_plan",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "transaction_timeout": "1s",
    "transform_null_equals": "on",
}


def people() -> None:
    add_lead("ann@example.com", id="lead-1", referrerUsername="back\\slash", commissionRate="5.25")
    user = add_user("bob@example.com", id="user-1")
    add_profile(id="profile-1", userId=user, phone=None)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["all", *(STRANGE_SETTINGS if SOAKING else ())])
def test_settings_of_the_role_change_nothing(database: Database, name: str) -> None:
    people()
    strange = STRANGE_SETTINGS if name == "all" else {name: STRANGE_SETTINGS[name]}
    with role_with(**strange) as role:
        url = database_url(role=role)
        for command in (COMMANDS[1], COMMANDS[0], COMMANDS[2], ("verify_crm_contacts",)):
            assert ended_on(url, *command) == (0, "")
        made = database.dump("crm_contacts")
        (run,) = database.rows("SELECT min(id)::text FROM backfill_run")[0]
        assert ended_on(url, "rollback_crm_backfill", run, "--no-progress") == (0, "")
        assert contacts() == {}
    assert backfill().code == 0
    assert database.dump("crm_contacts") == made


def test_the_search_path_of_the_role_comes_after_ours(database: Database) -> None:
    database.change("CREATE SCHEMA triggers; CREATE FUNCTION triggers.stamp() RETURNS text RETURN 'stamped'")
    database.change(
        "CREATE FUNCTION public.stamp_contact() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN NEW.company = stamp(); RETURN NEW; END $$; CREATE TRIGGER stamp BEFORE INSERT ON crm_contacts "
        "FOR EACH ROW EXECUTE FUNCTION public.stamp_contact()"
    )
    people()
    try:
        with role_with(search_path='"$user", public, triggers') as role:
            assert ended_on(database_url(role=role), *COMMANDS[0]) == (0, "")
    finally:
        database.change("DROP SCHEMA triggers CASCADE")
    assert {contact["company"] for contact in contacts().values()} == {"stamped"}


# Behind a pooler


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (Debian: apt-get install pgbouncer)")
@pytest.mark.process
def test_startup_options_that_a_pooler_drops_are_missed(two_schemas: EmptyDatabase) -> None:
    before = contents(two_schemas)
    two_schemas.execute("ALTER ROLE {role} IN DATABASE {name} RESET search_path")
    with pgbouncer(two_schemas.address, two_schemas.role, "ignore_startup_parameters = options") as folder:
        where = f"host={folder}&schema=public"
        url = f"postgresql://{two_schemas.role}@localhost:{PORT}/{two_schemas.name}?{where}"
        for command in (COMMANDS[0], ("backfill_runs", "list")):
            finished = manage(*command, url=url)
            assert_refused((finished.returncode, finished.stderr), "dropped", "pgbouncer=true", "ALTER ROLE")
    assert contents(two_schemas) == before


@pytest.mark.parametrize(
    "name", ["array_nulls", "exit_on_error", "transaction_timeout", "default_transaction_isolation"]
)
def test_behind_a_pooler_the_role_has_to_have_the_settings(
    database: Database, two_schemas: EmptyDatabase, name: str
) -> None:
    if two_schemas.execute(f"SELECT 1 FROM pg_settings WHERE name = '{name}'") == []:
        pytest.skip(f"this server has no {name}")
    two_schemas.execute("ALTER ROLE {role} IN DATABASE {name} SET search_path = crm_backfill, public")
    two_schemas.execute(f"ALTER ROLE {{role}} SET {name} = {STRANGE_SETTINGS[name]!r}")
    url = two_schemas.url(role=two_schemas.role, parameters="&pgbouncer=true")
    refused = ended_on(url, "backfill_runs", "list")
    assert_refused(refused, name, f'ALTER ROLE "two_schemas_role" IN DATABASE "two_schemas" SET {name}')
    two_schemas.execute(refused[1][refused[1].index("ALTER ROLE") : refused[1].index(";")])
    code, line = ended_on(url, "backfill_runs", "list")
    two_schemas.execute(f"ALTER ROLE {{role}} RESET {name}; ALTER ROLE {{role}} IN DATABASE {{name}} RESET ALL")
    assert code == 0, line


def test_the_settings_are_those_of_every_new_connection(database: Database) -> None:
    with role_with(**STRANGE_SETTINGS) as role, as_the_default(database_url(role=role)):
        found = dict(database.rows("SELECT name, setting FROM pg_settings"))
        wanted = {**FOLLOWED, **SETTINGS, "TimeZone": "UTC", "idle_in_transaction_session_timeout": "300000"}
        wanted["idle_session_timeout"] = "0"
        assert {name: found[name] for name in wanted if name in found} == {
            name: value for name, value in wanted.items() if name in found
        }
        assert database.rows("SHOW search_path") == [('"crm_backfill", "public", "pg_temp"',)]

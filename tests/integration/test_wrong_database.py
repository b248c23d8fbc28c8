"""A database that does not fit: one clear message, exit code 2, nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from django.db import connection

from tests.conftest import LEGACY_TABLES, OWN_TABLES, TOKENS, Database
from tests.support.builders import add_lead, add_profile, contacts
from tests.support.circumstances import (
    SECRET_COLUMNS,
    acting_as,
    address_of_the_test_database,
    reading_role,
    without_own_schema,
)
from tests.support.commands import Finished, backfill, called, run
from tests.support.processes import SECRET, python
from tests.support.reference import CONTACT_COLUMNS

dry_and_wet = pytest.mark.parametrize("arguments", [(), ("--dry-run",)], ids=["wet", "dry"])


def assert_refused(finished: Finished, *named: str) -> None:
    """One line on stderr that names what is wrong; nothing on stdout."""
    assert (finished.code, finished.stdout) == (2, "")
    assert finished.stderr.count("\n") == 1
    assert [name for name in named if name not in finished.stderr] == []
    assert "Traceback" not in finished.stderr


@contextmanager
def nothing_written(database: Database) -> Iterator[None]:
    there = [table for table in database.tables() if database.rows("SELECT to_regclass(%s) IS NOT NULL", table)[0][0]]
    before = database.dump(*there)
    yield
    assert database.dump(*there) == before


def refused(database: Database, *arguments: str) -> Finished:
    with nothing_written(database):
        return backfill("--json", "--no-progress", *arguments)


# Tables and columns


@dry_and_wet
@pytest.mark.parametrize("table", ["users", "profiles", "leads", "crm_contacts"])
def test_a_table_that_is_missing(database: Database, table: str, arguments: tuple[str, ...]) -> None:
    database.change(f"DROP TABLE {table} CASCADE")
    assert_refused(refused(database, *arguments), f"no table {table}", "public", "DATABASE_URL")


@dry_and_wet
def test_a_database_of_something_else(database: Database, arguments: tuple[str, ...]) -> None:
    database.drop_legacy_tables()
    assert_refused(refused(database, *arguments), "no table profiles, leads, users, crm_contacts")


def test_a_schema_that_is_not_there(database: Database) -> None:
    database.change("ALTER SCHEMA public RENAME TO elsewhere")
    try:
        finished = backfill("--dry-run")
    finally:
        database.change("ALTER SCHEMA elsewhere RENAME TO public")
    assert_refused(finished, "no table profiles", "public", "?schema=")


@dry_and_wet
@pytest.mark.parametrize(
    ("table", "column"),
    [
        *(("users", "email"), ("profiles", "role"), ("profiles", "companyName"), ("profiles", "userId")),
        *(("leads", "status"), ("leads", "commissionRate"), ("leads", "attributionConfidence")),
        *(("crm_contacts", "stageEnteredAt"), ("crm_contacts", "clerkUserId"), ("crm_contacts", "updatedAt")),
    ],
)
def test_a_column_that_is_missing(database: Database, table: str, column: str, arguments: tuple[str, ...]) -> None:
    database.change(f'ALTER TABLE {table} DROP COLUMN "{column}" CASCADE')
    assert_refused(refused(database, *arguments), f"no column {table}.{column}")


def test_all_columns_that_are_missing_are_named_at_once(database: Database) -> None:
    database.change('ALTER TABLE leads DROP COLUMN phone, DROP COLUMN "updatedAt"; ALTER TABLE users DROP COLUMN email')
    assert_refused(refused(database), "users.email", "leads.phone", "leads.updatedAt")


@dry_and_wet
def test_the_clerk_id_of_a_profile_may_be_missing(database: Database, arguments: tuple[str, ...]) -> None:
    database.change('ALTER TABLE profiles DROP COLUMN "clerkUserId"')
    add_profile(email="ann@example.com")
    assert backfill(*arguments).code == 0


# What would hide rows, or make every insert fail


@dry_and_wet
def test_rows_that_a_policy_hides_are_not_taken_for_all_there_are(
    database: Database, arguments: tuple[str, ...]
) -> None:
    add_lead("ann@example.com")
    with writing_role(database) as role:
        database.change("ALTER TABLE leads ENABLE ROW LEVEL SECURITY")
        with acting_as(role):
            finished = backfill("--json", "--no-progress", *arguments)
    assert_refused(finished, "leads", "row-level security", "BYPASSRLS")
    assert contacts() == {}


@dry_and_wet
@pytest.mark.parametrize("constraint", ["UNIQUE (phone)", "EXCLUDE USING btree (phone WITH =)"])
def test_a_deferrable_constraint_that_no_insert_could_pass_by(
    database: Database, constraint: str, arguments: tuple[str, ...]
) -> None:
    add_lead("ann@example.com")
    database.change(f"ALTER TABLE crm_contacts ADD CONSTRAINT one_phone {constraint} DEFERRABLE")
    assert_refused(refused(database, *arguments), "one_phone", "crm_contacts", "NOT DEFERRABLE")


# Labels


def without_labels(database: Database, enum: str, column: str, labels: tuple[str, ...]) -> None:
    """Make the enum anew with these labels alone."""
    quoted = ", ".join(f"'{label}'" for label in labels)
    database.change(
        f'ALTER TABLE crm_contacts ALTER COLUMN "{column}" DROP DEFAULT; DROP TABLE crm_stage_history; '
        f'ALTER TYPE public."{enum}" RENAME TO old; CREATE TYPE public."{enum}" AS ENUM ({quoted}); '
        f'ALTER TABLE crm_contacts ALTER COLUMN "{column}" TYPE public."{enum}" USING "{column}"::text::public."{enum}"'
    )


@dry_and_wet
@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        (("NEW", "CONTACTED", "DOCUMENTS"), '"PipelineStage" COMPLETE or CLOSED'),
        (("NEW", "COMPLETE"), '"PipelineStage" CONTACTED'),
        (("CONTACTED", "CLOSED", "LOST"), '"PipelineStage" NEW'),
    ],
)
def test_a_stage_that_is_missing(
    database: Database, labels: tuple[str, ...], missing: str, arguments: tuple[str, ...]
) -> None:
    without_labels(database, "PipelineStage", "stage", labels)
    assert_refused(refused(database, *arguments), missing)


@dry_and_wet
@pytest.mark.parametrize("missing", ["CLIENT", "LEAD", "AFFILIATE", "PREPARER"])
def test_a_contact_type_that_is_missing(database: Database, missing: str, arguments: tuple[str, ...]) -> None:
    labels = tuple(label for label in ("CLIENT", "LEAD", "AFFILIATE", "PREPARER") if label != missing)
    without_labels(database, "ContactType", "contactType", labels)
    assert_refused(refused(database, *arguments), f'"ContactType" {missing}')


@pytest.mark.parametrize("labels", [("NEW", "CONTACTED", "COMPLETE"), ("NEW", "CONTACTED", "CLOSED")])
def test_one_of_the_stages_of_a_converted_lead_is_enough(database: Database, labels: tuple[str, ...]) -> None:
    without_labels(database, "PipelineStage", "stage", labels)
    add_lead("ann@example.com", "CONVERTED")
    assert backfill().code == 0
    assert [contact["stage"] for contact in contacts().values()] == [labels[-1]]


# Rights


@dry_and_wet
@pytest.mark.parametrize("table", ["users", "profiles", "leads", "tax_intake_leads", "crm_contacts"])
def test_a_table_that_may_not_be_read(database: Database, table: str, arguments: tuple[str, ...]) -> None:
    others = tuple(name for name in LEGACY_TABLES if name != table)
    with nothing_written(database), reading_role(database, tables=others) as role, acting_as(role):
        finished = backfill("--json", *arguments)
    assert_refused(finished, f"may not read {table}.id", "GRANT SELECT")


def test_a_column_that_may_not_be_read_is_named_alone(database: Database) -> None:
    with nothing_written(database), reading_role(database) as role:
        database.change(f"REVOKE SELECT (phone) ON leads FROM {role}")
        with acting_as(role):
            finished = backfill("--dry-run")
    assert_refused(finished, "may not read leads.phone. ")


def test_the_secret_columns_are_not_asked_for(database: Database) -> None:
    readable = database.rows(
        "SELECT count(*) FROM information_schema.columns WHERE table_schema = 'public' AND column_name = ANY(%s)",
        list(SECRET_COLUMNS),
    )
    assert readable == [(5,)], "otherwise the next lines prove nothing"
    add_profile(email="ann@example.com")
    with reading_role(database) as role, acting_as(role):
        assert backfill("--dry-run").code == 0


@dry_and_wet
def test_a_schema_that_may_not_be_looked_into(database: Database, arguments: tuple[str, ...]) -> None:
    with nothing_written(database), reading_role(database) as role:
        database.change(f"REVOKE USAGE ON SCHEMA public FROM {role}, PUBLIC")
        with acting_as(role):
            finished = backfill(*arguments)
    assert_refused(finished, f'GRANT USAGE ON SCHEMA "public" TO {role}')


@pytest.mark.parametrize(
    ("revoked", "named"),
    [
        ("INSERT ON crm_contacts", "INSERT on crm_contacts"),
        ("UPDATE ON crm_contacts", "UPDATE on crm_contacts"),
        ("INSERT ON ledger_entry", "INSERT on ledger_entry"),
        ("INSERT ON backfill_batch", "INSERT on backfill_batch"),
        ("INSERT ON backfill_run", "INSERT on backfill_run"),
        ("UPDATE ON backfill_run", "UPDATE on backfill_run"),
        ("UPDATE ON ledger_entry", "UPDATE on ledger_entry"),
        ("SELECT ON ledger_entry", "SELECT on ledger_entry"),
        ("USAGE ON SCHEMA crm_backfill", "USAGE on schema crm_backfill"),
        ("SELECT ON backfill_run", "SELECT on backfill_run"),
        ("SELECT ON backfill_batch", "SELECT on backfill_batch"),
    ],
)
def test_a_table_that_may_not_be_written(
    database: Database, caplog: pytest.LogCaptureFixture, revoked: str, named: str
) -> None:
    add_lead("ann@example.com")
    with nothing_written(database), writing_role(database) as role:
        database.change(f"REVOKE {revoked} FROM {role}")
        with acting_as(role):
            finished = backfill()
            assert caplog.records == []
            predicted = backfill("--dry-run", "--no-progress")
        assert_refused(finished, named, "--dry-run")
        assert (predicted.code, predicted.stderr) == (0, "")
        assert_warned(caplog, named)


def test_the_right_to_read_the_columns_of_a_contact_is_enough(database: Database) -> None:
    add_lead("ann@example.com")
    add_profile(email="Ann@example.com")
    with writing_role(database) as role:
        database.change(f"REVOKE SELECT ON crm_contacts FROM {role}")
        names = ", ".join(f'"{column}"' for column in CONTACT_COLUMNS)
        database.change(f"GRANT SELECT ({names}) ON crm_contacts TO {role}")
        with acting_as(role):
            assert backfill().code == 0
    assert len(contacts()) == 1


def assert_warned(caplog: pytest.LogCaptureFixture, *rights: str) -> None:
    """One line says that a run would be refused, and for which rights."""
    (told,) = [message for message in caplog.messages if "would be refused" in message]
    assert [right for right in rights if right not in told] == []
    assert "\n" not in told


def test_a_dry_run_says_which_rights_the_run_would_lack_and_nothing_where_it_has_them(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_lead("ann@example.com")
    number = run()["run"]
    with writing_role(database) as role:
        with acting_as(role):
            assert backfill("--dry-run").code == 0
            assert caplog.records == []
            assert backfill("--update", "--dry-run").code == 0
            assert_warned(caplog, "INSERT on crm_stage_history", "docs/least_privilege.sql again with --set update=on")
            caplog.clear()
            assert called("rollback_crm_backfill", str(number), "--dry-run").code == 0
            assert_warned(caplog, "DELETE on crm_contacts", "docs/least_privilege.sql again with --set rollback=on")
        caplog.clear()
        database.change(
            f"GRANT INSERT ON crm_stage_history TO {role}; GRANT INSERT, UPDATE ON crm_backfill.rollback TO {role};"
            f"GRANT DELETE ON ALL TABLES IN SCHEMA public, crm_backfill TO {role}"
        )
        with acting_as(role):
            assert backfill("--update", "--dry-run").code == 0
            assert called("rollback_crm_backfill", str(number), "--dry-run").code == 0
    assert caplog.records == []


def test_a_role_that_may_write_what_is_written_is_enough(database: Database) -> None:
    add_lead("ann@example.com")
    add_lead("not-an-address")
    add_profile(email="Ann@example.com")
    with writing_role(database) as role:
        for expected in (1, 0):
            with acting_as(role):
                assert backfill().code == expected
    assert len(contacts()) == 1


def test_a_role_that_may_only_read_is_told_to_look_first(database: Database) -> None:
    with nothing_written(database), reading_role(database) as role:
        database.change(f"GRANT USAGE ON SCHEMA crm_backfill TO {role}")
        database.change(f"GRANT SELECT ON ALL TABLES IN SCHEMA crm_backfill TO {role}")
        with acting_as(role):
            finished = backfill()
    assert_refused(finished, "INSERT on crm_contacts", "UPDATE on crm_contacts", "INSERT on ledger_entry", "--dry-run")


@contextmanager
def writing_role(database: Database) -> Iterator[str]:
    """A role with all the rights that a run needs, and no more."""
    with reading_role(database) as role:
        database.change(
            f"GRANT SELECT, INSERT, UPDATE ON crm_contacts TO {role}; GRANT USAGE ON SCHEMA crm_backfill TO {role};"
            f"GRANT SELECT, INSERT, UPDATE ON {', '.join(OWN_TABLES)} TO {role};"
            f"GRANT SELECT, INSERT, DELETE ON {TOKENS} TO {role};"
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA crm_backfill TO {role}"
        )
        yield role


# Before `migrate`


def without_attribution(database: Database) -> None:
    database.change('ALTER TABLE crm_contacts DROP COLUMN "attributionMethod"')


def test_a_database_without_our_tables_is_told_to_migrate(database: Database) -> None:
    with without_own_schema():
        finished = backfill("--json")
    assert_refused(finished, "the ledger", "manage.py migrate", "--dry-run")


def test_a_database_without_the_attribution_columns_is_told_to_migrate(database: Database) -> None:
    without_attribution(database)
    assert_refused(refused(database), "the attribution columns of crm_contacts", "manage.py migrate")


# No connection


@pytest.mark.sampled(2)
@pytest.mark.process
@dry_and_wet
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://crm:hunter2@127.0.0.1:1/tax",
        "postgresql://crm:hunter2@db.invalid:5432/tax",
        "postgresql://crm:hunter2@localhost/tax?host=/nowhere",
    ],
    ids=["closed_port", "unknown_host", "no_socket"],
)
def test_a_server_that_does_not_answer(url: str, arguments: tuple[str, ...]) -> None:
    result = python("manage.py", "backfill_crm_contacts", *arguments, DATABASE_URL=url, SECRET_KEY=SECRET)
    assert_refused(Finished(result.returncode, result.stdout, result.stderr), "The database cannot be reached: ")
    assert "hunter2" not in result.stderr


@pytest.mark.process
def test_a_role_and_a_database_that_the_server_does_not_know(database: Database) -> None:
    environment = address_of_the_test_database(role="nobody")
    result = python("manage.py", "backfill_crm_contacts", **environment)
    assert_refused(Finished(result.returncode, result.stdout, result.stderr), "nobody", "DATABASE_URL")
    name = str(connection.settings_dict["NAME"])
    environment = address_of_the_test_database()
    environment["DATABASE_URL"] = environment["DATABASE_URL"].replace(f"/{name}?", "/no_such_database?")
    result = python("manage.py", "backfill_crm_contacts", **environment)
    assert_refused(Finished(result.returncode, result.stdout, result.stderr), "no_such_database", "DATABASE_URL")


@pytest.mark.process
def test_the_real_command_ends_in_one_line_too(database: Database) -> None:
    database.change("DROP TABLE leads")
    result = python("manage.py", "backfill_crm_contacts", **address_of_the_test_database())
    assert_refused(Finished(result.returncode, result.stdout, result.stderr), "no table leads")

"""What a database must be, told before anything happens: by a run, and by the system checks with the same words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
from django.db import connection
from django.db.backends.base import base

from crm.checks import check_fit
from crm.postgres.facts.catalog import read_tables
from crm.rules.mapping import Rules, rounded
from manage import main
from tests.conftest import Database
from tests.support.circumstances import without_own_schema
from tests.support.commands import backfill, ended
from tests.support.processes import session


def test_the_system_checks_name_everything_that_a_run_would_refuse(database: Database) -> None:
    assert check_fit(["default"]) == []
    database.change(
        "ALTER TABLE leads ALTER id TYPE char(40); ALTER TABLE crm_contacts ADD tenant text NOT NULL; "
        'DROP INDEX "crm_contacts_email_key"'
    )
    messages = check_fit(["default"])
    assert [message.id for message in messages] == ["crm.E004"] * 3
    for message, name in zip(messages, ("leads.id", "unique key on email", "crm_contacts.tenant"), strict=True):
        assert name in message.msg
        assert message.hint
    refused = backfill("--dry-run")
    assert refused.code == 2
    assert f"{messages[0].msg} {messages[0].hint}" in refused.stderr


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("ALTER TABLE crm_stage_history DROP reason, DROP id", ("crm_stage_history.id, crm_stage_history.reason",)),
        (
            """CREATE TYPE other AS ENUM ('NEW');
               ALTER TABLE crm_stage_history ALTER "toStage" TYPE other USING NULL""",
            ("crm_stage_history.toStage", "other", "CONTACTED"),
        ),
        (
            """ALTER TABLE crm_stage_history RENAME TO steps;
               CREATE MATERIALIZED VIEW public.crm_stage_history AS SELECT * FROM steps""",
            ("crm_stage_history", "a materialized view"),
        ),
        (
            """ALTER TABLE crm_stage_history RENAME TO steps;
               CREATE VIEW public.crm_stage_history AS SELECT * FROM steps""",
            ("crm_stage_history", "a view"),
        ),
    ],
)
def test_a_history_in_which_an_update_could_record_no_step(
    database: Database, statement: str, names: tuple[str, ...]
) -> None:
    database.change(statement)
    (message,) = check_fit(["default"])
    assert [name for name in names if name not in message.msg] == []
    for arguments in (("--update", "--dry-run"), ("--update",)):
        refused = backfill(*arguments)
        assert (refused.code, refused.stdout) == (2, "")
        assert f"{message.msg} {message.hint}" in refused.stderr
    assert backfill().code == 0, "without --update nothing is recorded there"


@pytest.mark.parametrize(
    "lacking", ["the attribution column", "the ledger", "a column of the ledger", "a required one"]
)
def test_what_a_run_is_refused_for_is_no_clean_check_and_migrate_makes_what_it_can(
    database: Database, lacking: str
) -> None:
    check = partial(main, ["manage.py", "check", "--database", "default"])
    with (
        without_own_schema()
        if lacking == "the ledger"
        else renamed_column("crm_backfill.ledger_entry", "reason")
        if lacking == "a column of the ledger"
        else nullcontext()
    ):
        if lacking == "the attribution column":
            database.change('ALTER TABLE crm_contacts DROP "referrerType"')
        elif lacking == "a required one":
            database.change("ALTER TABLE leads DROP status CASCADE")
        refused = backfill()
        assert (refused.code, refused.stdout) == (2, "")
        checked = ended(check)
        assert checked.code == 1
        assert "(crm.E005) " + refused.stderr.removeprefix("CommandError: ").strip() in checked.stderr
        connection.close()
        assert "crm.E005" not in ended(lambda: main(["manage.py", "migrate", "--plan"])).stderr
    if lacking == "the attribution column":
        assert ended(lambda: main(["manage.py", "migrate", "--verbosity", "0"])).code == 0
        assert ended(check).stderr.count("crm.E") == 0


@contextmanager
def renamed_column(table: str, name: str) -> Iterator[None]:
    with session() as owner:
        owner.autocommit = True
        owner.execute(f"ALTER TABLE {table} RENAME {name} TO aside".encode())
        try:
            yield
        finally:
            owner.execute(f"ALTER TABLE {table} RENAME aside TO {name}".encode())


def test_the_system_checks_say_nothing_of_a_database_without_the_tables(database: Database) -> None:
    database.drop_legacy_tables()
    assert check_fit(["default"]) == []


@pytest.mark.parametrize("command", [("backfill_crm_contacts",), ("migrate",), ("verify_crm_contacts",)])
def test_a_server_that_is_older_than_django_takes(
    database: Database, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.close()
    monkeypatch.setattr(connection.features, "minimum_database_version", (99,))
    # Django looks at the version of a server once.
    monkeypatch.setattr(base, "RAN_DB_VERSION_CHECK", set())
    finished = ended(lambda: main(["manage.py", *command]))
    assert (finished.code, finished.stdout) == (2, "")
    assert "PostgreSQL 99 or later is required" in finished.stderr
    assert finished.stderr.count("\n") == 1
    connection.close()


@pytest.mark.parametrize(
    ("moment", "digits", "as_stored"),
    [
        ("2025-01-02 03:04:05", 3, "2025-01-02 03:04:05"),
        ("2025-01-02 03:04:05.678", 3, "2025-01-02 03:04:05.678"),
        ("2025-01-02 03:04:05.6784", 3, "2025-01-02 03:04:05.678"),
        ("2025-01-02 03:04:05.6785", 3, "2025-01-02 03:04:05.679"),
        ("2025-01-02 03:04:05.6996", 3, "2025-01-02 03:04:05.7"),
        ("2024-12-31 23:59:59.999999", 3, "2025-01-01 00:00:00"),
        ("2025-01-02 03:04:05.5", 0, "2025-01-02 03:04:06"),
        ("0099-01-02 03:04:05.123456", 2, "0099-01-02 03:04:05.12"),
        ("9999-12-31 23:59:59.999999", 3, "9999-12-31 23:59:59.999"),
        ("24000-01-01 00:00:00.123456", 3, "24000-01-01 00:00:00.123"),
        ("0044-03-15 12:00:00.123456 BC", 3, "0044-03-15 12:00:00.123 BC"),
        ("infinity", 3, "infinity"),
    ],
)
def test_a_timestamp_is_rounded_as_a_contact_keeps_it(
    database: Database, moment: str, digits: int, as_stored: str
) -> None:
    assert rounded(moment, digits) == as_stored
    assert database.rows(f"SELECT %s::timestamp({digits})::text", as_stored) == [(as_stored,)]


@pytest.mark.parametrize(
    ("rate", "decimals", "kept"),
    [
        *(("5.00", 2, True), ("5.00", 0, True), ("5.10", 1, True), ("5.10", 0, False), ("5.125", 2, False)),
        *(("5.125", None, True), ("NaN", 2, True), (None, 2, True)),
    ],
)
def test_a_rate_is_never_rounded(rate: str | None, decimals: int | None, kept: bool) -> None:  # noqa: FBT001 - a parameter of the test
    assert Rules({}, "example.invalid", rate_decimals=decimals).keeps(rate) is kept


@pytest.mark.parametrize(
    ("declared", "scale"), [("numeric", None), ("numeric(65,30)", 30), ("numeric(5)", 0), ("numeric(3,-2)", -2)]
)
def test_the_scale_of_a_numeric_is_read(database: Database, declared: str, scale: int | None) -> None:
    database.change(f'ALTER TABLE leads ALTER "commissionRate" TYPE {declared}')
    assert read_tables(connection, ["leads"])["leads"].columns["commissionRate"].scale == scale

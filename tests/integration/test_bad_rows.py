"""Rows that PostgreSQL refuses, for whatever reason somebody gave it: each costs itself, and none of its neighbours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from django.db import connection

from crm.models import BackfillRun
from crm.postgres.refusals import MAX_ALIKE
from tests.conftest import Database
from tests.support.builders import add_contact, add_lead, add_many_leads, add_profile, contact_with, contacts, ledger
from tests.support.commands import backfill, run, statements
from tests.support.processes import session

INSERTS_CONTACTS = 'INSERT INTO "crm_contacts"'
PEOPLE = 40
BAD = "bad@example.com"
#: Savepoint, look at the spellings, insert, roll back to the savepoint and release it.
MAX_STATEMENTS_A_TRY = 5


@dataclass(frozen=True)
class Obstacle:
    """Something on crm_contacts that refuses some rows, and how it is taken away again."""

    put: str
    remove: str
    sqlstate: str | None
    constraint: str | None = None
    column: str | None = None


def raising(condition: str, trigger: str = "TRIGGER", when: str = "BEFORE INSERT OR UPDATE", how: str = "") -> str:
    return f"""
        CREATE FUNCTION public.obstacle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF {condition} THEN RAISE EXCEPTION 'not %', NEW.email {how}; END IF;
            RETURN NEW;
        END $$;
        CREATE {trigger} obstacle {when} ON crm_contacts
        {"DEFERRABLE INITIALLY DEFERRED" if trigger == "CONSTRAINT TRIGGER" else ""}
        FOR EACH ROW EXECUTE FUNCTION public.obstacle()
    """


NO_TRIGGER = "DROP FUNCTION public.obstacle() CASCADE"
IS_BAD = "NEW.email LIKE 'bad%'"
OBSTACLES = {
    "check constraint": Obstacle(
        "ALTER TABLE crm_contacts ADD CONSTRAINT no_bad_people CHECK (email NOT LIKE 'bad%')",
        "ALTER TABLE crm_contacts DROP CONSTRAINT no_bad_people",
        "23514",
        "no_bad_people",
    ),
    "trigger": Obstacle(raising(IS_BAD), NO_TRIGGER, "P0001"),
    "trigger with names": Obstacle(
        raising(IS_BAD, how="USING ERRCODE = '23514', CONSTRAINT = 'crm_contacts_email_key', COLUMN = 'email'"),
        NO_TRIGGER,
        "23514",
        "crm_contacts_email_key",
        "email",
    ),
    "trigger with names that nothing has": Obstacle(
        raising(IS_BAD, how="""USING ERRCODE = '23514', CONSTRAINT = NEW.email, COLUMN = NEW."firstName" """),
        NO_TRIGGER,
        "23514",
    ),
    "trigger after the row": Obstacle(raising(IS_BAD, when="AFTER INSERT OR UPDATE"), NO_TRIGGER, "P0001"),
    **{
        f"trigger with {sqlstate}": Obstacle(raising(IS_BAD, how=f"USING ERRCODE = '{sqlstate}'"), NO_TRIGGER, sqlstate)
        for sqlstate in ("PT400", "42501", "42P01", "42804", "0A000", "54000", "XX000", "XX001", "58030", "25000")
    },
    "trigger that asks a table that is gone": Obstacle(
        raising("public.is_bad(NEW.email)")
        + """; CREATE FUNCTION public.is_bad(email text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
                 IF email LIKE 'bad%' THEN PERFORM FROM public.gone; END IF; RETURN false; END $$""",
        f"{NO_TRIGGER}; DROP FUNCTION public.is_bad",
        "42P01",
    ),
    "phone too long for its index": Obstacle(
        "CREATE INDEX of_phones ON crm_contacts (phone)", "DROP INDEX of_phones", "54000"
    ),
    "deferred trigger": Obstacle(raising(IS_BAD, "CONSTRAINT TRIGGER", "AFTER INSERT OR UPDATE"), NO_TRIGGER, "P0001"),
    "unique index": Obstacle(
        "CREATE UNIQUE INDEX one_such_phone ON crm_contacts (phone) WHERE phone = '13'",
        "DROP INDEX one_such_phone",
        "23505",
        "one_such_phone",
    ),
    "exclusion": Obstacle(
        "ALTER TABLE crm_contacts ADD CONSTRAINT one_such_phone EXCLUDE (phone WITH =) WHERE (phone = '13')",
        "ALTER TABLE crm_contacts DROP CONSTRAINT one_such_phone",
        "23P01",
        "one_such_phone",
    ),
    "trigger that swallows": Obstacle(
        f"""
        CREATE FUNCTION public.obstacle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF {IS_BAD} THEN RETURN NULL; END IF; RETURN NEW;
        END $$;
        CREATE TRIGGER obstacle BEFORE INSERT ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.obstacle()
        """,
        NO_TRIGGER,
        None,
    ),
    "number out of range": Obstacle(
        'ALTER TABLE crm_contacts ALTER "commissionRate" TYPE numeric(3,2)',
        'ALTER TABLE crm_contacts ALTER "commissionRate" TYPE numeric(5,2)',
        "22003",
    ),
    "text too long": Obstacle(
        "ALTER TABLE crm_contacts ALTER phone TYPE varchar(8)",
        "ALTER TABLE crm_contacts ALTER phone TYPE text",
        "22001",
    ),
}
#: What makes a lead the one that the obstacle is about.
BADNESS: dict[str, dict[str, Any]] = {
    "phone too long for its index": {"phone": "".join(hashlib.sha256(bytes([n])).hexdigest() for n in range(200))},
    "number out of range": {"commissionRate": "12.50"},
    "text too long": {"phone": "555 0100 0100"},
    "unique index": {"phone": "13"},
    "exclusion": {"phone": "13"},
}
every_obstacle = pytest.mark.parametrize("name", OBSTACLES)


def populate(name: str) -> str:
    """Good leads, and one in their middle that the obstacle refuses; its row reference."""
    add_many_leads(PEOPLE)
    with connection.cursor() as cursor:
        cursor.execute("""UPDATE leads SET "referrerUsername" = 'ref'""")
    bad = add_lead(BAD, id="new000000000020x", **({"referrerUsername": "ref"} | BADNESS.get(name, {})))
    if name in ("unique index", "exclusion"):
        add_contact("holder@example.com", phone="13", referrerUsername="ref")
    return f"leads:{bad}"


def refusals(database: Database) -> list[tuple[Any, ...]]:
    return database.rows(
        'SELECT source_id, outcome, reason, sqlstate, "constraint", "column" FROM ledger_entry '
        "WHERE outcome = 'error' ORDER BY 1"
    )


@pytest.mark.sampled(3)
@every_obstacle
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_a_row_that_is_refused_costs_itself_alone_and_lands_once_nothing_is_in_its_way(
    database: Database, name: str, batch_size: int
) -> None:
    obstacle = OBSTACLES[name]
    bad = populate(name)
    database.change(obstacle.put)

    finished = backfill("--batch-size", str(batch_size), "--no-progress", "--json")
    assert finished.code == 1, "the error is new"
    assert finished.answer["status"] == "finished"
    assert finished.answer["balanced"] is True
    assert (finished.answer["read"], finished.answer["created"], finished.answer["error_new"]) == (
        PEOPLE + 1,
        PEOPLE,
        1,
    )
    entry = (bad.split(":")[1], "error", "data_error", obstacle.sqlstate, obstacle.constraint, obstacle.column)
    assert refusals(database) == [entry]
    assert not [contact for contact in contacts().values() if contact["email"] == BAD]

    again = backfill("--batch-size", str(batch_size), "--no-progress", "--json")
    assert (again.code, again.answer["read"], again.answer["error"], again.answer["error_new"]) == (0, 1, 1, 0)
    assert backfill("--strict", "--no-progress").code == 1
    assert refusals(database) == [entry]

    database.change(obstacle.remove)
    assert run(batch_size=batch_size)["created"] == 1
    assert contact_with(BAD)["stage"] == "NEW"
    assert refusals(database) == []
    assert database.rows("SELECT count(*) FROM ledger_entry WHERE sqlstate IS NOT NULL") == [(0,)]
    assert run(batch_size=batch_size)["read"] == 0


@pytest.mark.parametrize("name", ["number out of range", "trigger", "deferred trigger", "text too long"])
def test_a_fill_that_is_refused_costs_the_row_that_brought_it(database: Database, name: str) -> None:
    """Leads that are merged into contacts of ours, one of which cannot take what its lead brings."""
    obstacle = OBSTACLES[name]
    for number in range(PEOPLE):
        add_profile(email=f"person-{number}@example.com")
    add_profile(email=BAD)
    assert run()["created"] == PEOPLE + 1
    for number in range(PEOPLE):
        add_lead(f"person-{number}@example.com", referrerUsername="ref", phone="555")
    bad = add_lead(BAD, **({"referrerUsername": "ref", "phone": "555"} | BADNESS.get(name, {})))
    before = contact_with(BAD)
    database.change(obstacle.put)

    answer = run()
    assert (answer["merged"], answer["error"], answer["balanced"]) == (PEOPLE, 1, True)
    assert [(entry[0], entry[3]) for entry in refusals(database)] == [(bad, obstacle.sqlstate)]
    assert contact_with(BAD) == before
    assert {c["referrerUsername"] for c in contacts().values() if c["email"] != BAD} == {"ref"}

    database.change(obstacle.remove)
    assert run()["merged"] == 1
    assert contact_with(BAD)["referrerUsername"] == "ref"


def test_the_next_row_of_a_person_makes_the_contact_that_the_first_could_not(database: Database) -> None:
    database.change(OBSTACLES["number out of range"].put)
    first = add_lead("ann@example.com", createdAt="2025-01-01", commissionRate="12.50", referrerUsername="ref")
    second = add_lead("ann@example.com", createdAt="2025-01-02")
    add_many_leads(PEOPLE)
    answer = run()
    assert (answer["created"], answer["error"]) == (PEOPLE + 1, 1)
    assert (ledger()[f"leads:{first}"]["reason"], ledger()[f"leads:{second}"]["outcome"]) == ("data_error", "created")
    database.change(OBSTACLES["number out of range"].remove)
    assert run()["merged"] == 1


@contextmanager
def before_the_contacts_of_a_batch(happening: Callable[[], None]) -> Iterator[None]:
    """Call `happening` once, when the first batch has been read and its contacts are about to be inserted."""
    happened = False

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        nonlocal happened
        if INSERTS_CONTACTS in str(sql) and not happened:
            happened = True
            happening()
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        yield
    assert happened


def test_a_user_who_vanished_between_reading_and_writing(database: Database) -> None:
    people = [add_profile(email=f"person-{number}@example.com") for number in range(PEOPLE)]
    gone = people[17]

    def delete_the_user() -> None:
        with session() as somebody:
            somebody.execute('DELETE FROM users WHERE id = (SELECT "userId" FROM profiles WHERE id = %s)', [gone])
            somebody.commit()

    with before_the_contacts_of_a_batch(delete_the_user):
        answer = run()
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert (answer["created"], answer["error_new"]) == (PEOPLE - 1, 1)
    assert refusals(database) == [(gone, "error", "data_error", "23503", "crm_contacts_userId_fkey", None)]
    assert run()["read"] == 0, "the profile went with its user"


def test_a_user_who_left_a_profile_behind_is_tried_again_and_lands(database: Database) -> None:
    people = [add_profile(email=f"person-{number}@example.com") for number in range(PEOPLE)]
    gone = people[17]

    def part_them() -> None:
        with session() as somebody:
            somebody.execute('UPDATE profiles SET "userId" = NULL WHERE id = %s', [gone])
            somebody.execute('DELETE FROM users WHERE id NOT IN (SELECT "userId" FROM profiles WHERE id <> %s)', [gone])
            somebody.commit()

    with before_the_contacts_of_a_batch(part_them):
        assert run()["error_new"] == 1
    assert [entry[3] for entry in refusals(database)] == ["23503"]
    assert (run()["created"], refusals(database)) == (1, [])


def test_the_entry_names_table_constraint_column_and_trigger_where_the_catalogue_has_them(database: Database) -> None:
    names = 'SELECT "table", "constraint", "column", "trigger" FROM ledger_entry WHERE outcome = \'error\''
    add_lead(BAD)
    for obstacle, named in {
        "check constraint": ("crm_contacts", "no_bad_people", None, None),
        "trigger with PT400": (None, None, None, "obstacle"),
        "trigger with names that nothing has": (None, None, None, "obstacle"),
        "trigger that asks a table that is gone": (None, None, None, "obstacle"),
        "deferred trigger": (None, None, None, "obstacle"),
    }.items():
        database.change(OBSTACLES[obstacle].put)
        run()
        assert database.rows(names) == [named], obstacle
        database.change(OBSTACLES[obstacle].remove)


def test_a_function_that_is_named_in_an_error_and_is_none_of_the_database_is_not_written_down(
    database: Database,
) -> None:
    context = "E'\\nPL/pgSQL function ann@example.com() line 1 at RAISE'"
    database.change(raising(f"{IS_BAD} AND {context} || NEW.email <> ''", how="USING ERRCODE = 'PT400'"))
    database.change(
        f"""
        CREATE OR REPLACE FUNCTION public.obstacle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF {IS_BAD} THEN EXECUTE 'SELECT raise_it(' || quote_literal({context}) || ')'; END IF;
            RETURN NEW;
        END $$
        """
    )
    add_lead(BAD)
    run()
    assert database.rows('SELECT sqlstate, "trigger" FROM ledger_entry') == [("42883", "obstacle")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("batch_size", [30, 1000])
def test_where_every_row_is_refused_for_one_reason_the_run_fails_and_says_so_once(
    database: Database, workers: int, batch_size: int
) -> None:
    database.change(raising("true", how="USING ERRCODE = 'PT400'"))
    add_many_leads(1000)
    with statements() as sent:
        finished = backfill("--no-progress", "--batch-size", str(batch_size), "--workers", str(workers), "--json")
    assert (finished.code, finished.answer["status"], finished.answer["balanced"]) == (5, "failed", True)
    assert finished.answer["failure"] == (
        "the database refuses every row for one reason (SQLSTATE PT400, trigger obstacle)"
    )
    # Why it failed, and what is newly in error, if a batch was committed before.
    assert finished.stderr.count("\n") == 1 + bool(finished.answer["error_new"])
    assert finished.answer["read"] == len(refusals(database)) <= 2 * MAX_ALIKE * workers
    assert len(sent) <= 2 * 2 * MAX_ALIKE * (MAX_STATEMENTS_A_TRY + 1)
    database.change(NO_TRIGGER)
    assert run()["created"] == 1000


def test_many_rows_in_succession_that_are_refused_fail_no_run_in_which_others_land(database: Database) -> None:
    add_many_leads(1000)
    database.rows("UPDATE leads SET phone = 'refused' WHERE id < 'new000000000301' RETURNING id")
    database.change("ALTER TABLE crm_contacts ADD CONSTRAINT nobody_refused CHECK (phone <> 'refused')")
    answer = run(batch_size=1000)
    assert (answer["status"], answer["created"], answer["error"]) == ("finished", 700, 300)
    again = run()
    assert (again["status"], again["error"], again["error_new"]) == ("finished", 300, 0), "known errors say nothing"


def test_a_batch_in_which_every_row_is_refused(database: Database) -> None:
    database.change("ALTER TABLE crm_contacts ADD CONSTRAINT nobody CHECK (false)")
    add_many_leads(PEOPLE)
    answer = run(batch_size=16)
    assert (answer["created"], answer["error"], answer["balanced"]) == (0, PEOPLE, True)
    assert {entry[3:5] for entry in refusals(database)} == {("23514", "nobody")}
    assert BackfillRun.objects.get().status == "finished"


def sent_for(database: Database, rows: int, bad: int) -> int:
    """How many statements one batch of so many rows takes, of which `bad` are refused, as far apart as can be."""
    database.empty()
    add_many_leads(rows)
    if bad:
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE leads SET phone = 'refused' WHERE substring(email FROM '[0-9]+')::int %% %s = 0",
                [rows // bad],
            )
    with statements() as sent:
        answer = run(batch_size=rows)
    assert (answer["error"], answer["created"]) == (bad, rows - bad)
    return len(sent)


def test_bad_rows_cost_as_many_statements_as_they_are_times_the_logarithm_of_the_batch(database: Database) -> None:
    database.change("ALTER TABLE crm_contacts ADD CONSTRAINT nobody_refused CHECK (phone <> 'refused')")
    rows = 1024
    undisturbed = sent_for(database, rows, 0)
    for bad in (1, 4, 16):
        # Each bad row fails once on every level, and takes a neighbour along on each.
        tries = 2 * bad * (math.log2(rows) + 1)
        assert sent_for(database, rows, bad) - undisturbed <= MAX_STATEMENTS_A_TRY * tries
    assert sent_for(database, 8 * rows, 1) - sent_for(database, rows, 1) <= 3 * 2 * MAX_STATEMENTS_A_TRY

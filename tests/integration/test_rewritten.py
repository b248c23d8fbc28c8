"""What PostgreSQL answers is held against what was sent: a trigger may write another id, or nothing, without a word."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from tests.conftest import Database
from tests.support.builders import add_lead, add_many_leads, add_profile, contact_with, contacts, ledger
from tests.support.commands import run

PEOPLE = 20
BAD = "ann@example.com"
OWN_ID = "NEW.id := 'own-' || NEW.id; RETURN NEW;"


def add_trigger(database: Database, body: str, event: str, name: str = "its_own_way") -> None:
    database.change(
        f"""
        CREATE FUNCTION public.{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;
        CREATE TRIGGER {name} BEFORE {event} ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.{name}()
        """
    )


def refusals(database: Database) -> list[tuple[object, ...]]:
    return database.rows(
        'SELECT DISTINCT reason, sqlstate, "constraint", "column" FROM ledger_entry WHERE reason <> %s', ""
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_contact_that_got_another_id_is_an_error_of_its_row(database: Database, workers: int) -> None:
    add_trigger(database, f"IF NEW.email = '{BAD}' THEN {OWN_ID} END IF; RETURN NEW;", "INSERT")
    bad = add_lead(BAD)
    add_many_leads(PEOPLE)
    answer = run(workers=workers)
    assert (answer["created"], answer["merged"], answer["error"]) == (PEOPLE, 0, 1)
    assert answer["balanced"] is True
    assert refusals(database) == [("data_error", None, "its_own_way", "id")]
    assert ledger()[f"leads:{bad}"]["outcome"] == "error"
    assert BAD not in {contact["email"] for contact in contacts().values()}
    database.change("DROP FUNCTION public.its_own_way() CASCADE")
    assert run()["created"] == 1


def test_ids_that_are_all_rewritten_are_no_merges(database: Database) -> None:
    add_trigger(database, OWN_ID, "INSERT")
    add_trigger(database, "RETURN NEW;", "INSERT", "later")
    add_many_leads(PEOPLE)
    answer = run()
    assert (answer["created"], answer["merged"], answer["exists"]) == (0, 0, 0)
    assert contacts() == {}


def test_a_fill_that_a_trigger_swallowed_is_an_error_and_no_merge(database: Database) -> None:
    add_profile(email=BAD)
    run()
    add_trigger(database, "RETURN NULL;", "UPDATE")
    add_lead(BAD, referrerUsername="ref")
    add_many_leads(PEOPLE)
    answer = run()
    assert (answer["created"], answer["merged"], answer["error"]) == (PEOPLE, 0, 1)
    assert refusals(database) == [("data_error", None, "its_own_way", None)]
    database.change("DROP FUNCTION public.its_own_way() CASCADE")
    assert run()["merged"] == 1
    assert contact_with(BAD)["referrerUsername"] == "ref"


def test_a_contact_that_was_deleted_while_it_was_to_be_filled_is_no_error(database: Database) -> None:
    add_profile(email=BAD)
    run()
    add_lead(BAD)

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if sql.startswith("UPDATE crm_contacts"):
            execute("DELETE FROM crm_contacts", None, many, context)
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        answer = run()
    assert (answer["merged"], answer["error"]) == (1, 0)


#: It writes the contact itself, and says that nothing was written.
ITSELF = "INSERT INTO crm_contacts SELECT NEW.*; RETURN NULL;"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_contact_that_a_trigger_inserted_itself_is_an_error_of_its_row_and_no_merge(
    database: Database, workers: int
) -> None:
    condition = f"pg_trigger_depth() = 1 AND NEW.email = '{BAD}'"
    add_trigger(database, f"IF {condition} THEN {ITSELF} END IF; RETURN NEW;", "INSERT")
    rows = [add_lead(BAD), add_lead(BAD)]
    add_many_leads(PEOPLE)
    answer = run(workers=workers)
    assert (answer["created"], answer["merged"], answer["exists"], answer["error"]) == (PEOPLE, 0, 0, 2)
    assert refusals(database) == [("data_error", None, "its_own_way", None)]
    assert BAD not in {contact["email"] for contact in contacts().values()}
    database.change("DROP FUNCTION public.its_own_way() CASCADE")
    answer = run()
    assert (answer["created"], answer["merged"]) == (1, 1)
    assert {ledger()[f"leads:{row}"]["outcome"] for row in rows} == {"created", "merged"}


def test_a_contact_whose_ledger_was_lost_is_met_whatever_triggers_there_are(database: Database) -> None:
    add_trigger(database, "RETURN NEW;", "INSERT")
    add_many_leads(PEOPLE)
    run()
    database.change("DELETE FROM ledger_entry")
    # One is changed at this very moment, which makes it look new.
    changed: list[bool] = []

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if sql.lstrip().startswith("SELECT tgname") and not changed:
            changed.append(True)
            execute("UPDATE crm_contacts SET phone = '1'", None, many, context)
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        answer = run()
    assert changed
    assert (answer["created"], answer["merged"], answer["error"]) == (0, PEOPLE, 0)

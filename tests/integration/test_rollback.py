"""Taking a run back: all that nobody touched goes, all that somebody touched stays, and nothing else moves."""

from __future__ import annotations

import csv
import json
import logging
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection
from hypothesis import given
from hypothesis import strategies as st

from crm.interruption import StoppedError
from crm.models import BackfillRun, LedgerEntry, Rollback
from crm.models.ledger import RunStatus
from crm.postgres.facts.foreign_keys import KNOWN, find_foreign_keys
from crm.postgres.refusals import MAX_ALIKE
from crm.rollback import runner
from crm.rollback.reader import Reader
from crm.rollback.report import MEANING_OF_REASONS, listing, news
from crm.rollback.runner import roll_back
from crm.rollback.undo import Reverted
from crm.rules.entry import Entry
from crm.runs import retrying
from crm.sample_data.loader import load as load_people
from crm.verification import verify
from tests.conftest import LEGACY_TABLES, Database
from tests.support import processes, reference
from tests.support.builders import (
    add_contact,
    add_lead,
    add_many_leads,
    add_profile,
    add_user,
    contact_with,
    contacts,
    ledger,
)
from tests.support.circumstances import DROP_FOREIGN_KEYS, acting_as
from tests.support.commands import files_no_larger_than, rollback, run, statements
from tests.support.populations import (
    GENERATIONS,
    aftermaths,
    insert_population,
    populations,
    replace_population,
)
from tests.support.profiles import SOAKING, against_the_database

UNTOUCHED_TABLES = tuple(table for table in LEGACY_TABLES if table != "crm_contacts")
SOON = 20


def taken_back(run_id: int, **options: Any) -> dict[str, Any]:
    """What --json prints of the rollback of a run."""
    finished = rollback(str(run_id), "--json", *(f"--{name}={value}" for name, value in options.items()))
    assert finished.code == 0, finished.stderr
    return finished.answer


def outcome_of(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what differs from one go to the next."""
    of_one_go = ("run", "dry_run", "balanced", "started_at", "finished_at", "seconds")
    return {name: value for name, value in report.items() if name not in of_one_go}


def change(statement: str, *parameters: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters or None)


def add_interaction(contact_id: str) -> None:
    change(
        'INSERT INTO crm_interactions (id, "contactId", type, "updatedAt") VALUES (gen_random_uuid(), %s, %s, now())',
        contact_id,
        "NOTE",
    )


# Before it starts


def two_runs_and_an_address_that_moved() -> tuple[int, int]:
    """Two runs, one profile each; since then the first one's account has the address that the second one's had."""
    ann, bob = add_user("ann@example.com"), add_user("bob@example.com")
    add_profile(userId=ann)
    first = run()["run"]
    add_profile(userId=bob)
    second = run()["run"]
    for user, email in ((bob, "carl@example.com"), (ann, "bob@example.com")):
        change("""UPDATE users SET email = %s, "updatedAt" = now() WHERE id = %s""", email, user)
    return first, second


def test_a_rollback_says_which_later_runs_stand_and_in_which_order_to_roll_back(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = two_runs_and_an_address_that_moved()
    add_lead("nobody")
    assert run()["error_new"] == 1, "an error changes no contact"
    add_lead("dora@example.com")
    third = run()["run"]
    for arguments in (("--dry-run",), ()):
        caplog.clear()
        finished = rollback(str(first), "--json", *arguments)
        answer = finished.answer
        assert (finished.code, answer["later_runs"], answer["reversed"]) == (0, [third, second], 1)
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert "Later runs made or changed contacts, and were not rolled back (2)." in warning
        assert f"use this order: {third}, {second}, and then {first}." in warning
    assert run()["by_reason"] == {"conflict": 1, "invalid_email": 1}, "what the warning warns of"


def test_rolled_back_in_that_order_nothing_is_warned_of_and_nothing_comes_into_conflict(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = two_runs_and_an_address_that_moved()
    for number in (second, first):
        assert taken_back(number)["later_runs"] == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    answer = run()
    assert (answer["created"], answer["error"]) == (2, 0)


def test_of_many_later_runs_some_are_named(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_NAMED", 3)
    numbers = []
    for number in range(5):
        add_lead(f"person-{number}@example.com")
        numbers.append(run()["run"])
    assert taken_back(numbers[0])["later_runs"] == numbers[:0:-1]
    order = f"{numbers[4]}, {numbers[3]}, ..., {numbers[1]}, and then {numbers[0]}."
    assert f"use this order: {order}" in caplog.text


def test_a_later_run_that_only_updated_stands_too(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    add_lead("ann@example.com")
    first = run()["run"]
    change("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now()""")
    update = run(update=True)["run"]
    assert taken_back(first)["later_runs"] == [update]
    assert "Later runs made or changed contacts, and were not rolled back (1)." in caplog.text


def test_a_later_run_of_which_a_rollback_kept_something_is_not_to_be_rolled_back_again(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_lead("ann@example.com")
    first = run()["run"]
    add_lead("bob@example.com")
    second = run()["run"]
    change("""UPDATE crm_contacts SET "firstName" = 'Bobby', "updatedAt" = now() WHERE email = 'bob@example.com'""")
    taken = taken_back(second)
    assert taken["kept"] == 1
    caplog.clear()
    assert taken_back(first)["later_runs"] == []
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("Later rollbacks kept a part of their runs, and another one would keep it as well: ")
    assert warning.endswith("Such a row is not lost: the conflict can be resolved (`resolve_crm_conflict`).")
    assert f": {second} (rolled back by {taken['run']}). When" in warning
    assert "use this order" not in warning


# The whole


@pytest.mark.parametrize("generation", GENERATIONS)
@against_the_database(10)
@given(data=st.data(), batch_size=st.sampled_from([1, 3, 1000]))
def test_rollback_leaves_what_was_there_before_and_then_backfill_equals_backfill(
    database: Database, generation: str, data: st.DataObject, batch_size: int
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    with connection.cursor() as cursor:
        insert_population(cursor, population)
    before = contacts()
    first = run()
    if not first["read"]:
        return
    after_first, entries = contacts(), ledger()
    dump = database.dump(*UNTOUCHED_TABLES)

    whole = database.dump()
    foretold = taken_back_dry(first["run"], batch_size)
    assert database.dump() == whole
    report = taken_back(first["run"], **{"batch-size": batch_size})

    assert outcome_of(foretold) == outcome_of(report)
    assert report["reversed"] == first["created"]
    assert report["merges"] == {"reversed": first["merged"], "kept": 0, "failed": 0}
    assert report["lines"] == {"reversed": first["exists"] + first["error"], "kept": 0, "failed": 0}
    assert report["balanced"] is True
    assert without_what_is_lost(contacts(), entries) == without_what_is_lost(before, entries)
    assert ledger() == {}
    assert database.dump(*UNTOUCHED_TABLES) == dump

    again = run()
    assert again["read"] == first["read"]
    assert (contacts(), ledger()) == (after_first, entries)


def taken_back_dry(run_id: int, batch_size: int) -> dict[str, Any]:
    finished = rollback(str(run_id), "--dry-run", "--json", f"--batch-size={batch_size}")
    assert finished.code == 0, finished.stderr
    return finished.answer


def without_what_is_lost(
    found: dict[str, reference.Row], entries: dict[str, reference.Entry]
) -> dict[str, reference.Row]:
    """The contacts but for what a merge replaces as part of a unit, where no entry tells what it was: in contacts of a
    ledger that was lost."""
    orphans = {entry["contact_id"] for entry in entries.values() if entry["outcome"] == "merged"}
    orphans -= {entry["contact_id"] for entry in entries.values() if entry["outcome"] == "created"}
    lost = {"attributionConfidence": None, "assignedAt": None}
    return {key: row | (lost if key in orphans else {}) for key, row in found.items()}


@pytest.mark.parametrize("generation", ["2025_10_mixed", "2025_12"])
@against_the_database(10)
@given(data=st.data(), first_is_taken_back=st.booleans())
def test_nothing_that_a_person_wrote_is_lost_whichever_run_is_taken_back(
    database: Database,
    generation: str,
    data: st.DataObject,
    first_is_taken_back: bool,  # noqa: FBT001 - hypothesis
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    with connection.cursor() as cursor:
        insert_population(cursor, population)
    first = run()
    as_written = contacts()
    result = reference.backfill(population)
    later = data.draw(aftermaths(population, result))
    with connection.cursor() as cursor:
        replace_population(cursor, later)
    edited = contacts()
    second = run()
    chosen = first if first_is_taken_back else second
    if not LedgerEntry.objects.filter(run=chosen["run"]).exists():
        return
    there = contacts()
    settled = {row: entry for row, entry in ledger().items() if entry["outcome"] != "error"}
    of_deleted_contacts = {row: entry for row, entry in settled.items() if entry["contact_id"] not in there}
    foretold = taken_back_dry(chosen["run"], 1000)
    report = taken_back(chosen["run"])

    assert outcome_of(foretold) == outcome_of(report)
    left = contacts()
    for contact_id, row in edited.items():
        differing = {column for column, value in row.items() if as_written[contact_id][column] != value}
        if differing:
            assert contact_id in left
        if contact_id in left:
            assert {column: left[contact_id][column] for column in differing} == {c: row[c] for c in differing}
    run()
    entries = ledger()
    assert {row: entries[row] for row in of_deleted_contacts} == of_deleted_contacts


@pytest.fixture
def table_in_another_schema(database: Database) -> Iterator[None]:
    yield
    change("DROP SCHEMA IF EXISTS elsewhere CASCADE")


@pytest.mark.sampled
def test_of_many_people_those_whom_somebody_touched_stay_and_nothing_else_moves(
    database: Database, table_in_another_schema: None
) -> None:
    database.use("2025_12")
    load_people(people := 10_000 if SOAKING else 2_000, "2025_12", 7)
    before = dict(database.rows("SELECT id, c::text FROM crm_contacts c"))
    made = run()
    ours = [contact_id for (contact_id,) in database.rows("SELECT id FROM ledger_entry WHERE outcome = 'created'")]
    assert len(ours) == made["created"] > people // 2
    touched = ours[:300]
    database.change(
        'CREATE SCHEMA elsewhere; CREATE TABLE elsewhere."a 100%% new table" (tag text, "who%%" text '
        "REFERENCES crm_contacts ON DELETE SET NULL)".replace("%%", "%")
    )
    change("""UPDATE crm_contacts SET "lastName" = 'Edited', "updatedAt" = now() WHERE id = ANY(%s)""", touched[:60])
    change("UPDATE crm_contacts SET phone = '555 0199' WHERE id = ANY(%s)", touched[60:100])
    change("""UPDATE crm_contacts SET "filingStatus" = 'single' WHERE id = ANY(%s)""", touched[100:110])
    change("""UPDATE crm_contacts SET "leadScore" = 5 WHERE id = ANY(%s)""", touched[110:120])
    for contact_id in touched[120:180]:
        add_interaction(contact_id)
    change(
        """INSERT INTO crm_stage_history (id, "contactId", "toStage")
           SELECT gen_random_uuid(), who, 'NEW' FROM unnest(%s::text[]) AS who""",
        touched[180:240],
    )
    change(
        "INSERT INTO elsewhere.\"a 100%% new table\" SELECT 'tag', who FROM unnest(%s::text[]) AS who", touched[240:300]
    )
    now = dict(database.rows("SELECT id, c::text FROM crm_contacts c"))
    others = (*UNTOUCHED_TABLES, 'elsewhere."a 100% new table"')
    dump = {table: database.rows(f"SELECT t::text FROM {table.replace('%', '%%')} t ORDER BY 1") for table in others}

    foretold = taken_back_dry(made["run"], 1000)
    report = taken_back(made["run"])

    assert outcome_of(foretold) == outcome_of(report)
    assert (report["reversed"], report["kept"], report["failed"]) == (len(ours) - 300, 300, 0)
    assert report["by_reason"]["edited"] >= 120
    assert report["by_reason"]["referenced"] == 180
    expected = {key: now[key] for key in touched} | before
    assert dict(database.rows("SELECT id, c::text FROM crm_contacts c")) == expected
    for table, rows in dump.items():
        assert database.rows(f"SELECT t::text FROM {table.replace('%', '%%')} t ORDER BY 1") == rows

    again = run()
    assert again["created"] == len(ours) - 300
    assert dict(database.rows("SELECT id, c::text FROM crm_contacts c")) == now


# One contact at a time


EDITS = {
    "bumped": """UPDATE crm_contacts SET "updatedAt" = "updatedAt" + interval '1 ms'""",
    "first name, by raw SQL": """UPDATE crm_contacts SET "firstName" = 'Other'""",
    "email, by raw SQL": "UPDATE crm_contacts SET email = 'other@example.com'",
    "stage, by raw SQL": "UPDATE crm_contacts SET stage = 'CONTACTED'",
    "phone removed, by raw SQL": "UPDATE crm_contacts SET phone = NULL",
    "rate, by raw SQL": """UPDATE crm_contacts SET "commissionRate" = 12.51""",
    "tax year, by raw SQL": """UPDATE crm_contacts SET "taxYear" = 2024""",
    "interaction": """INSERT INTO crm_interactions (id, "contactId", type, "updatedAt")
        SELECT 'i', id, 'NOTE', now() FROM crm_contacts""",
    "stage history": """INSERT INTO crm_stage_history (id, "contactId", "toStage")
        SELECT 's', id, 'NEW' FROM crm_contacts""",
    "deleted": "DELETE FROM crm_contacts",
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_contact_that_somebody_touched_stays_as_it_is_and_is_never_made_again(database: Database, edit: str) -> None:
    lead = add_lead("ann@example.com", commissionRate="12.50", referrerUsername="ref")
    made = run()
    change(EDITS[edit])
    dump = database.dump(*LEGACY_TABLES, "ledger_entry")

    report = taken_back(made["run"])

    assert (report["reversed"], report["kept"], report["failed"]) == (0, 1, 0)
    assert database.dump(*LEGACY_TABLES, "ledger_entry") == dump
    assert run()["read"] == 0
    assert ledger()[f"leads:{lead}"]["outcome"] == "created"
    assert taken_back(made["run"])["kept"] == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE leads SET phone = '555 0111', \"updatedAt\" = now()",
        "DELETE FROM leads",
    ],
)
def test_a_source_that_moved_on_keeps_nothing_from_being_taken_back(database: Database, statement: str) -> None:
    add_lead("ann@example.com")
    made = run()
    change(statement)
    assert taken_back(made["run"])["reversed"] == 1
    assert contacts() == ledger() == {}


def test_a_contact_that_was_edited_stays_whatever_became_of_its_source(database: Database) -> None:
    add_lead("ann@example.com")
    add_lead("bob@example.com")
    made = run()
    change("""UPDATE crm_contacts SET "firstName" = 'Edited', "updatedAt" = now()""")
    change("""UPDATE leads SET "updatedAt" = now() WHERE email = 'ann@example.com'""")
    change("DELETE FROM leads WHERE email = 'bob@example.com'")
    assert taken_back(made["run"])["kept"] == 2


def test_an_account_whose_address_changed_since_is_no_edit_of_the_contact(database: Database) -> None:
    add_profile(email="ann@example.com")
    made = run()
    change("UPDATE users SET email = 'new@example.com', \"updatedAt\" = now() + interval '1 s'")
    assert taken_back(made["run"])["reversed"] == 1


def test_a_source_that_maps_to_nothing_any_more_keeps_the_contact(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()
    change("UPDATE leads SET email = 'nobody'")
    assert taken_back(made["run"])["by_reason"] == {"source_changed": 1}


def test_so_does_a_merged_row_that_maps_to_nothing_any_more(database: Database) -> None:
    add_profile(email="ann@example.com")
    add_lead("ann@example.com")
    made = run()
    change("UPDATE leads SET email = 'nobody'")
    change("UPDATE crm_contacts SET phone = '555 0199'")
    assert taken_back(made["run"])["by_reason"] == {"source_changed": 1, "with_its_contact": 1}


REFERRERS = {
    "partitioned": """CREATE TABLE public.referrer (who text REFERENCES crm_contacts ON DELETE CASCADE, n int)
        PARTITION BY LIST (n); CREATE TABLE public.referrer_1 PARTITION OF public.referrer FOR VALUES IN (1);
        INSERT INTO public.referrer SELECT id, 1 FROM crm_contacts""",
    "several columns": """ALTER TABLE crm_contacts ADD UNIQUE (email, id);
        CREATE TABLE public.referrer (mail text, who text, FOREIGN KEY (mail, who) REFERENCES crm_contacts (email, id)
        ON DELETE CASCADE); INSERT INTO public.referrer SELECT email, id FROM crm_contacts""",
    "another key": """CREATE TABLE public.referrer (mail text REFERENCES crm_contacts (email) ON DELETE SET NULL);
        INSERT INTO public.referrer SELECT email FROM crm_contacts""",
    "deferred": """CREATE TABLE public.referrer (who text REFERENCES crm_contacts DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO public.referrer SELECT id FROM crm_contacts""",
    "not validated": """CREATE TABLE public.referrer (who text);
        ALTER TABLE public.referrer ADD FOREIGN KEY (who) REFERENCES crm_contacts ON DELETE CASCADE NOT VALID;
        INSERT INTO public.referrer SELECT id FROM crm_contacts""",
    "restrict": """CREATE TABLE public.referrer (who text REFERENCES crm_contacts ON DELETE RESTRICT);
        INSERT INTO public.referrer SELECT id FROM crm_contacts""",
}


@pytest.mark.parametrize("referrer", REFERRERS)
def test_every_foreign_key_of_the_catalogue_keeps_a_contact(database: Database, referrer: str) -> None:
    add_lead("ann@example.com")
    made = run()
    database.change(REFERRERS[referrer])
    dump = database.dump("referrer", "crm_contacts")
    report = taken_back(made["run"])
    assert report["by_reason"] == {"referenced": 1}
    assert database.dump("referrer", "crm_contacts") == dump


def test_a_row_that_refers_to_nobody_keeps_nobody(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()
    database.change(
        "CREATE TABLE public.referrer (who text REFERENCES crm_contacts); INSERT INTO public.referrer VALUES (NULL)"
    )
    assert taken_back(made["run"])["reversed"] == 1


# Merges


def merged_by_a_second_run(**lead: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A profile's contact from one run, and a lead of the same person merged into it by another."""
    add_profile(email="ann@example.com")
    first = run()
    add_lead("ann@example.com", commissionRate="7.50", referrerUsername="ref", attributionConfidence=85, **lead)
    return first, run()


def test_what_a_run_merged_is_taken_out_again(database: Database) -> None:
    first, second = merged_by_a_second_run(lastContactedAt="2025-03-04", assignedPreparerId="p")
    assert contact_with("ann@example.com")["attributionConfidence"] == 85
    report = taken_back(second["run"])
    assert report["merges"] == {"reversed": 1, "kept": 0, "failed": 0}
    contact = contact_with("ann@example.com")
    assert contact["attributionConfidence"] == 100
    emptied = ("referrerUsername", "commissionRate", "phone", "lastContactedAt", "assignedPreparerId", "assignedAt")
    assert [contact[column] for column in emptied] == [None] * len(emptied)
    assert taken_back(first["run"])["reversed"] == 1


def test_the_confidence_is_that_of_the_row_that_made_the_contact_again(database: Database) -> None:
    add_lead("ann@example.com", attributionConfidence=40)
    run()
    add_lead("ann@example.com", commissionRate="7.50", referrerUsername="ref", attributionConfidence=85)
    second = run()
    assert contact_with("ann@example.com")["attributionConfidence"] == 85
    taken_back(second["run"])
    assert contact_with("ann@example.com")["attributionConfidence"] == 40


DIRECT: dict[str, Any] = {"attributionMethod": "direct", "commissionRate": "0.00", "attributionConfidence": 95}


@pytest.mark.parametrize("username", [None, " "])
def test_what_was_written_down_for_nobody_comes_back_when_a_referrer_is_taken_out(
    database: Database, username: str | None
) -> None:
    add_lead("ann@example.com", referrerUsername=username, **DIRECT)
    run()
    before = contacts()
    add_lead("ann@example.com", referrerUsername="ref", commissionRate="7.50", attributionMethod="cookie")
    second = run()
    assert str(contact_with("ann@example.com")["commissionRate"]) == "7.50"
    assert taken_back(second["run"])["merges"] == {"reversed": 1, "kept": 0, "failed": 0}
    assert contacts() == before


def test_a_rate_that_completed_an_attribution_is_taken_out_alone(database: Database) -> None:
    add_lead("ann@example.com", referrerUsername="ref", attributionMethod="cookie")
    run()
    before = contacts()
    add_lead("ann@example.com", referrerUsername="REF", commissionRate="7.50", commissionRateLockedAt="2025-01-02")
    second = run()
    assert str(contact_with("ann@example.com")["commissionRate"]) == "7.50"
    assert verify(connection).findings.kept == []
    assert taken_back(second["run"])["merges"]["reversed"] == 1
    assert contacts() == before


def test_an_attribution_and_its_rate_are_taken_out_together(database: Database) -> None:
    add_lead("ann@example.com", **DIRECT)
    run()
    before = contacts()
    add_lead("ann@example.com", id="z", referrerUsername="ref", attributionMethod="cookie", createdAt="2024-01-01")
    add_lead("ann@example.com", id="a", referrerUsername="ref", commissionRate="7.50", createdAt="2024-01-02")
    second = run()
    assert verify(connection).findings.kept == []
    assert taken_back(second["run"])["merges"]["reversed"] == 2
    assert contacts() == before


@pytest.mark.parametrize("somebody_elses", [False, True])
def test_an_update_puts_a_referrer_in_the_place_of_nobody_and_a_rollback_nobody_in_the_place_of_the_referrer(
    database: Database,
    somebody_elses: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    if somebody_elses:
        add_contact("ann@example.com", **DIRECT)
    lead = add_lead("ann@example.com", phone=" ", **DIRECT)
    run()
    before = contacts()
    change(
        """UPDATE leads SET "commissionRate" = 7.50, "referrerUsername" = 'ref', "updatedAt" = now() WHERE id = %s""",
        lead,
    )
    second = run(update=True)
    assert second["updated_by_column"] == {"attribution": 1}
    assert contact_with("ann@example.com")["referrerUsername"] == "ref"
    assert taken_back(second["run"])["updates"] == {"reversed": 1, "kept": 0, "failed": 0}
    assert contacts() == before


def edit_by_hand() -> None:
    change(
        """UPDATE crm_contacts SET "lastName" = 'Edited', "attributionConfidence" = 55,
        "updatedAt" = '2025-06-07 08:09:10.123'"""
    )


def test_what_a_run_merged_into_an_edited_contact_is_taken_out_again(database: Database) -> None:
    add_profile(email="ann@example.com")
    run()
    edit_by_hand()
    before = contacts()
    add_lead("ann@example.com", commissionRate="7.50", referrerUsername="ref", attributionConfidence=85)
    second = run()
    assert str(contact_with("ann@example.com")["commissionRate"]) == "7.50"
    foretold = taken_back_dry(second["run"], 1000)
    report = taken_back(second["run"])
    assert report["merges"] == foretold["merges"] == {"reversed": 1, "kept": 0, "failed": 0}
    assert contacts() == before


def test_a_row_that_found_nothing_to_fill_in_an_edited_contact_is_pending_again(database: Database) -> None:
    add_profile(email="ann@example.com", phone="555 0100")
    run()
    edit_by_hand()
    before = contacts()
    add_lead("ann@example.com", phone="555 0101")
    second = run()
    foretold = taken_back_dry(second["run"], 1000)
    report = taken_back(second["run"])
    assert report["merges"] == foretold["merges"] == {"reversed": 1, "kept": 0, "failed": 0}
    assert contacts() == before


@pytest.mark.parametrize("somebody_elses", [False, True])
def test_what_an_update_filled_in_an_edited_contact_is_taken_out_again(
    database: Database,
    somebody_elses: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    if somebody_elses:
        add_contact("ann@example.com")
    lead = add_lead("ann@example.com", phone=" ")
    run()
    edit_by_hand()
    before = contacts()
    change(
        """UPDATE leads SET phone = '555 0101', "commissionRate" = 7.50, "referrerUsername" = 'ref', "updatedAt" = now()
        WHERE id = %s""",
        lead,
    )
    second = run(update=True)
    assert contact_with("ann@example.com")["phone"] == "555 0101"
    assert taken_back(second["run"])["updates"] == {"reversed": 1, "kept": 0, "failed": 0}
    assert contacts() == before


def test_an_entry_without_the_contacts_marker_is_judged_by_the_row_that_made_the_contact(database: Database) -> None:
    _, second = merged_by_a_second_run()
    change("UPDATE ledger_entry SET contact_updated_at = NULL, attribution_before = NULL")
    assert taken_back(second["run"])["merges"]["reversed"] == 1
    run()
    change("UPDATE ledger_entry SET contact_updated_at = NULL, attribution_before = NULL")
    edit_by_hand()
    assert taken_back(BackfillRun.objects.latest("pk").pk)["merges"]["kept"] == 1


# A database without foreign keys

KNOWN_REFERENCES = {
    "crm_interactions": EDITS["interaction"],
    "crm_stage_history": EDITS["stage history"],
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("table", KNOWN_REFERENCES)
def test_a_contact_in_use_stays_where_the_database_has_no_foreign_keys(
    database: Database, generation: str, table: str
) -> None:
    database.use(generation)
    add_lead("ann@example.com")
    made = run()
    database.change(DROP_FOREIGN_KEYS)
    change(KNOWN_REFERENCES[table])
    foretold = taken_back_dry(made["run"], 1000)
    report = taken_back(made["run"])
    assert (report["kept"], report["by_reason"]) == (1, {"referenced": 1})
    assert outcome_of(foretold) == outcome_of(report)
    change(f"DELETE FROM {table}")
    assert taken_back(made["run"])["reversed"] == 1


def test_every_table_of_the_application_that_refers_to_contacts_is_known_by_name(database: Database) -> None:
    for generation in GENERATIONS:
        database.use(generation)
        found = {(r.table.removeprefix("public."), r.condition) for r in find_foreign_keys(connection)}
        known = {(table, f'r."{column}" = c.id') for table, column in KNOWN}
        assert known <= found
        catalogue = database.rows(
            "SELECT conrelid::regclass::text FROM pg_constraint WHERE contype = 'f' "
            "AND confrelid = 'public.crm_contacts'::regclass"
        )
        assert {table.removeprefix("public.") for (table,) in catalogue} == {table for table, _ in KNOWN}


def test_a_database_without_one_of_these_tables_is_none_the_worse_for_it(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()
    database.change("DROP TABLE crm_interactions")
    assert taken_back(made["run"])["reversed"] == 1


MERGE_KEPT = {
    "the contact was edited": """UPDATE crm_contacts SET "lastName" = 'X', "updatedAt" = now()""",
    "the value was edited": """UPDATE crm_contacts SET "commissionRate" = 7.51""",
    "another value was edited": "UPDATE crm_contacts SET phone = '555 0123'",
    "the lead changed": 'UPDATE leads SET "updatedAt" = now()',
    "the lead is gone": "DELETE FROM leads",
    "the contact was deleted": "DELETE FROM crm_contacts",
}


@pytest.mark.parametrize("happening", MERGE_KEPT)
def test_what_a_run_merged_stays_where_it_does_not_stand_as_written(database: Database, happening: str) -> None:
    _, second = merged_by_a_second_run()
    change(MERGE_KEPT[happening])
    dump = database.dump("crm_contacts", "ledger_entry")
    assert taken_back(second["run"])["merges"] == {"reversed": 0, "kept": 1, "failed": 0}
    assert database.dump("crm_contacts", "ledger_entry") == dump


def test_a_contact_goes_with_what_a_later_run_merged_into_it(database: Database) -> None:
    first, second = merged_by_a_second_run()
    before = contacts()
    report = taken_back(first["run"])
    assert (report["reversed"], report["later_merges"]) == (1, 1)
    assert contacts() == ledger() == {}
    assert rollback(str(second["run"])).code == 2
    assert run()["read"] == 2
    assert contacts() == before


def test_what_is_taken_out_is_missed_by_nobody(database: Database) -> None:
    add_profile(email="ann@example.com")
    run()
    add_lead("ann@example.com", phone="555 0101")
    second = run()
    add_lead("ann@example.com", phone="555 0102", commissionRate="7.50", referrerUsername="ref")
    add_lead("ann@example.com", phone=" ", commissionRate="8.50", referrerUsername="ref")
    run()
    whole, entries = contacts(), ledger()
    report = taken_back(second["run"])
    assert contact_with("ann@example.com")["phone"] is None
    assert verify(connection).findings.kept == []
    assert report["later_merges"] == 2
    run()
    assert (contacts(), ledger()) == (whole, entries)


def test_a_row_merged_by_the_same_run_stays_with_a_contact_that_stays(database: Database) -> None:
    add_profile(email="ann@example.com")
    add_lead("ann@example.com", commissionRate="7.50", referrerUsername="ref")
    made = run()
    change("""UPDATE crm_contacts SET phone = NULL, "updatedAt" = now()""")
    report = taken_back(made["run"])
    assert (report["kept"], report["merges"]["kept"]) == (1, 1)
    assert report["by_reason"] == {"edited": 1, "with_its_contact": 1}
    assert run()["read"] == 0
    assert contact_with("ann@example.com")["phone"] is None


def test_the_summary_says_what_the_reasons_are_and_where_they_are_explained(database: Database) -> None:
    add_profile(email="ann@example.com")
    add_lead("ann@example.com", commissionRate="7.50", referrerUsername="ref")
    made = run()
    assert "Why rows" not in rollback(str(made["run"]), "--dry-run").stdout
    change("""UPDATE crm_contacts SET phone = NULL, "updatedAt" = now()""")
    lines = [" ".join(line.split()) for line in rollback(str(made["run"])).stdout.splitlines()]
    heading = f'Why rows were kept or failed 2 see "{MEANING_OF_REASONS}" in docs/runbook.md'
    assert lines[lines.index(heading) + 1 :][:2] == ["edited 1", "with_its_contact 1"]


def test_somebody_elses_contact_that_was_deleted_since_is_not_brought_back(database: Database) -> None:
    for name in ("ann", "bob"):
        add_contact(f"{name}@example.com")
        add_lead(f"{name}@example.com")
    made = run()
    change("DELETE FROM crm_contacts WHERE email = 'bob@example.com'")
    assert taken_back(made["run"])["lines"] == {"reversed": 1, "kept": 1, "failed": 0}
    assert run()["created"] == 0


def test_errors_are_pending_again(database: Database) -> None:
    add_lead("nobody")
    made = run()
    taken_back(made["run"])
    assert ledger() == {}
    assert run()["error_new"] == 1


# What the database refuses


@contextmanager
def trigger_on_delete(body: str) -> Iterator[None]:
    change(f"CREATE FUNCTION mishap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
    change("CREATE TRIGGER mishap BEFORE DELETE ON crm_contacts FOR EACH ROW EXECUTE FUNCTION mishap()")
    try:
        yield
    finally:
        change("DROP FUNCTION mishap() CASCADE")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("IF OLD.email LIKE 'n3@%' THEN RAISE 'no, %', OLD.email; END IF; RETURN OLD;", "refused P0001"),
        ("IF OLD.email LIKE 'n3@%' THEN RETURN NULL; END IF; RETURN OLD;", "refused not deleted"),
    ],
)
def test_a_contact_that_the_database_will_not_give_up_fails_alone(database: Database, body: str, reason: str) -> None:
    for number in range(8):
        add_lead(f"n{number}@example.com")
    made = run()
    with trigger_on_delete(body):
        finished = rollback(str(made["run"]), "--json")
    assert finished.code == 1
    assert (finished.answer["reversed"], finished.answer["failed"]) == (7, 1)
    assert finished.answer["by_reason"] == {reason: 1}
    said = f"run {finished.answer['run']}: 1 of the results of run {made['run']} were not reversed ({reason} 1); "
    assert finished.stderr.startswith(said)
    assert finished.answer["started_at"] < finished.answer["finished_at"]
    assert [contact["email"] for contact in contacts().values()] == ["n3@example.com"]
    assert taken_back(made["run"])["reversed"] == 1
    assert rollback(str(made["run"])).code == 2


def test_a_table_that_gives_up_no_contact_is_not_asked_contact_by_contact(database: Database) -> None:
    add_many_leads(600)
    made = run()["run"]
    with trigger_on_delete("RAISE 'no';"), statements() as sent:
        finished = rollback(str(made), "--json")
    assert (finished.code, finished.answer["reversed"], finished.answer["failed"]) == (1, 0, 600)
    assert finished.answer["by_reason"] == {"refused P0001": 600}
    assert sum(statement.sql.startswith("DELETE FROM crm_contacts") for statement in sent) < 4 * MAX_ALIKE
    assert len(contacts()) == 600


def test_many_contacts_in_succession_that_are_not_given_up_keep_no_other(database: Database) -> None:
    add_many_leads(600)
    made = run()["run"]
    ((last,),) = database.rows("SELECT max(id) FROM (SELECT id FROM crm_contacts ORDER BY id LIMIT 250) first")
    with trigger_on_delete(f"IF OLD.id <= '{last}' THEN RAISE 'no'; END IF; RETURN OLD;"):
        finished = rollback(str(made), "--json")
    assert (finished.answer["reversed"], finished.answer["failed"], len(contacts())) == (350, 250, 250)


# Refusals


def test_a_run_that_cannot_be_taken_back_is_refused_and_nothing_is_written(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()["run"]
    empty = run()["run"]
    running = BackfillRun.objects.create(
        version="", generation="", operator="", host="elsewhere", process_id=1, status=RunStatus.RUNNING
    )

    def refused(run_id: int | str, words: str, *arguments: str) -> None:
        dump = database.dump()
        finished = rollback(str(run_id), *arguments)
        assert (finished.code, finished.stdout) == (2, "")
        assert words in finished.stderr
        assert finished.stderr.count("\n") == 1
        assert database.dump() == dump

    for arguments in ((), ("--dry-run",)):
        refused(made + 1000, "There is no run", *arguments)
        refused(10**30, "There is no run", *arguments)
        refused(running.pk, "is in progress", *arguments)
        refused(empty, "no entry", *arguments)
    going = rollback(str(made))
    assert (going.code, going.stdout) == (3, "")
    running.delete()
    rolled_back = taken_back(made)["run"]
    for arguments in ((), ("--dry-run",)):
        refused(made, f"run {rolled_back} has rolled it back", *arguments)
        refused(rolled_back, "is a rollback.", *arguments)


def test_a_dry_run_of_the_backfill_has_no_number_to_be_taken_back_by(database: Database) -> None:
    add_lead("ann@example.com")
    assert run(dry_run=True)["run"] is None
    assert rollback("None").code == 2


def test_a_run_that_died_can_be_taken_back(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()["run"]
    BackfillRun.objects.filter(pk=made).update(status=RunStatus.RUNNING, process_id=2**22 + 1)
    assert taken_back(made)["reversed"] == 1


def test_while_another_run_is_paused_none_may_start_but_a_dry_run_may(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()["run"]
    BackfillRun.objects.create(version="", generation="", operator="", host="", process_id=1, status=RunStatus.PAUSED)
    assert rollback(str(made)).code == 3
    assert rollback(str(made), "--dry-run").code == 0


def test_a_role_that_does_not_see_every_reference_is_refused(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()["run"]
    database.change("CREATE TABLE public.secret_notes (who text REFERENCES crm_contacts)")
    change("ALTER TABLE public.secret_notes ENABLE ROW LEVEL SECURITY")
    change("DROP ROLE IF EXISTS half_blind")
    change("CREATE ROLE half_blind LOGIN")
    change("GRANT ALL ON ALL TABLES IN SCHEMA public, crm_backfill TO half_blind")
    change("GRANT ALL ON ALL SEQUENCES IN SCHEMA crm_backfill TO half_blind")
    change("GRANT USAGE ON SCHEMA public, crm_backfill TO half_blind")
    try:
        with acting_as("half_blind"):
            finished = rollback(str(made))
        assert finished.code == 2
        assert "secret_notes" in finished.stderr
        change("ALTER TABLE public.secret_notes DISABLE ROW LEVEL SECURITY")
        change("REVOKE SELECT ON crm_contacts FROM half_blind")
        change('GRANT SELECT (id, "userId") ON crm_contacts TO half_blind')
        change("REVOKE SELECT ON secret_notes FROM half_blind")
        with acting_as("half_blind"):
            assert rollback(str(made)).code == 2
    finally:
        connection.close()
        change("DROP OWNED BY half_blind")
        change("DROP ROLE half_blind")


# The record


def test_a_rollback_is_a_run_in_the_history(database: Database) -> None:
    add_lead("ann@example.com")
    add_lead("bob@example.com")
    made = run()["run"]
    change("UPDATE crm_contacts SET phone = '1' WHERE email = 'bob@example.com'")
    report = taken_back(made)
    record = BackfillRun.objects.get(pk=report["run"])
    assert (record.kind, record.status, record.options) == ("rollback", "finished", {"rolls_back": made})
    assert (record.balanced, record.read) == (True, 0)
    counts = Rollback.objects.get(run=record)
    assert (counts.of_id, counts.contacts_reversed, counts.contacts_kept) == (made, 1, 1)
    assert counts.reasons == {"edited": 1}


def test_the_list_says_what_became_of_each_row(database: Database, tmp_path: Path) -> None:
    ann, bob = add_lead("ann@example.com"), add_lead("bob@example.com")
    made = run()["run"]
    add_lead("ann@example.com", lastContactedAt="2025-03-04")
    later = run()["run"]
    change("UPDATE crm_contacts SET phone = '1' WHERE email = 'bob@example.com'")
    path = tmp_path / "list.csv"
    assert rollback(str(made), f"--csv={path}").code == 0
    with path.open(newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert {(row["outcome"], row["why"], row["detail"]) for row in rows.values()} == {
        ("reversed", "", ""),
        ("kept", "edited", "phone"),
        ("reversed", "merged_by_a_later_run", f"run {later}"),
    }
    assert rows[f"leads:{ann}"]["outcome"] == "reversed"
    assert rows[f"leads:{bob}"]["contact_id"] == reference.contact_id_of(f"leads:{bob}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    dump = database.dump()
    refused = rollback(str(made), f"--csv={path}")
    assert (refused.code, database.dump()) == (2, dump)
    assert f"{path} already exists: name a new file with --csv. Nothing was written." in refused.stderr
    link, theirs = tmp_path / "link.csv", tmp_path / "theirs"
    link.symlink_to(theirs)
    assert (rollback(str(made), f"--csv={link}").code, theirs.exists()) == (2, False)


def test_no_cell_of_the_list_is_a_formula(database: Database, tmp_path: Path) -> None:
    add_contact("ann@example.com", id="=1+1")
    add_lead("ann@example.com")
    path = tmp_path / "list.csv"
    assert rollback(str(run()["run"]), f"--csv={path}").code == 0
    with path.open(newline="") as file:
        assert [row["contact_id"] for row in csv.DictReader(file)] == ["'=1+1"]


def test_a_rollback_that_is_refused_leaves_no_list_in_the_way_of_the_next(database: Database, tmp_path: Path) -> None:
    add_lead("ann@example.com")
    made = run()["run"]
    path = tmp_path / "list.csv"
    assert rollback(str(made + 1), f"--csv={path}").code == 2
    assert rollback(str(made), f"--csv={path}").code == 0
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("size", ["0", "5001", "9" * 5_000, "1_000"])
def test_a_batch_size_that_is_out_of_range_is_refused_with_the_range(size: str) -> None:
    refused = rollback("1", f"--batch-size={size}")
    assert (refused.code, f"{size!r} is not a whole number from 1 to 5000" in refused.stderr) == (2, True)


def test_a_disk_that_is_full_before_the_list_is_begun(database: Database, tmp_path: Path) -> None:
    add_lead("ann@example.com")
    made, path = run()["run"], tmp_path / "list.csv"
    dump = database.dump()
    with files_no_larger_than(10):
        refused = rollback(str(made), f"--csv={path}")
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert f"{path} cannot be written (File too large). Nothing was written." in refused.stderr
    assert database.dump() == dump
    assert rollback(str(made), f"--csv={path}").code == 0


def test_a_disk_that_is_full_before_the_list_is_at_its_end(database: Database, tmp_path: Path) -> None:
    for number in range(20):
        add_lead(f"lead{number}@example.com")
    made, path = run()["run"], tmp_path / "list.csv"
    with files_no_larger_than(1_000):
        failed = rollback(str(made), f"--csv={path}", "--batch-size=5")
    assert failed.code == 5
    assert "the list of rows cannot be written (File too large)" in failed.stderr
    assert 0 < database.rows("SELECT count(*) FROM crm_contacts")[0][0] < 20
    assert BackfillRun.objects.latest("pk").status == "failed"
    assert rollback(str(made)).code == 0
    assert database.rows("SELECT count(*) FROM crm_contacts") == [(0,)]


def test_no_output_holds_a_word_about_a_person(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    personal = ("quentin", "Xanadu", "5551234567", "Zyzzyva")
    columns = {"firstName": "Xanadu", "lastName": "Zyzzyva", "phone": "5551234567"}
    for number in range(4):
        add_lead(f"quentin{number}@example.com", **columns)
    made = run()["run"]
    change("UPDATE crm_contacts SET \"lastName\" = 'Zyzzyva Xanadu' WHERE email = 'quentin1@example.com'")
    add_interaction(contact_with("quentin2@example.com")["id"])
    outputs = []
    with trigger_on_delete("RAISE 'no, %', OLD.email USING DETAIL = OLD.\"firstName\";"):
        for number, arguments in enumerate((["--dry-run"], ["--json"], [])):
            path = tmp_path / f"{number}.csv"
            finished = rollback(str(made), f"--csv={path}", *arguments)
            outputs += [finished.stdout, finished.stderr, path.read_text()]
    assert "P0001" in outputs[5]
    outputs += [caplog.text, json.dumps(database.dump("backfill_run", "rollback"))]
    for output in outputs:
        assert not any(word.lower() in output.lower() for word in personal)


# What happens meanwhile


@contextmanager
def in_a_thread(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Work on a connection of its own, to its end."""
    results: list[Any] = []

    def target() -> None:
        try:
            results.append(work())
        finally:
            connection.close()

    thread = threading.Thread(target=target)
    thread.start()
    try:
        yield results
    finally:
        thread.join(SOON)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


INTERACTION = """INSERT INTO crm_interactions (id, "contactId", type, "updatedAt")
    SELECT 'i', id, 'NOTE', now() FROM crm_contacts WHERE email = 'ann@example.com'"""


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_an_interaction_that_is_just_being_added_is_never_taken_away_with_its_contact(
    database: Database, isolation: str
) -> None:
    add_lead("ann@example.com")
    add_lead("bob@example.com")
    made = run()["run"]
    name = connection.settings_dict["NAME"]
    change(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    try:
        with processes.session() as other:
            other.execute(INTERACTION)
            with in_a_thread(lambda: taken_back(made)) as results:
                wait_for(
                    lambda: database.rows(
                        "SELECT FROM pg_locks WHERE NOT granted AND pid <> %s", other.info.backend_pid
                    )
                )
                other.commit()
    finally:
        change(f"ALTER DATABASE {name} RESET default_transaction_isolation")
    assert (results[0]["reversed"], results[0]["kept"]) == (1, 1)
    assert database.rows("SELECT id FROM crm_interactions") == [("i",)]


@contextmanager
def once_contacts_were_read(statement: str) -> Iterator[None]:
    """Let somebody else do something between the comparison of the contacts and their deletion."""

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        result = execute(sql, parameters, many, context)
        if "c.xmin::text" in str(sql) and "FROM crm_contacts c WHERE" in str(sql):
            with processes.session() as other:
                other.execute(statement)
                other.commit()
        return result

    with connection.execute_wrapper(watch):
        yield


@pytest.mark.parametrize(
    "statement",
    [
        INTERACTION,
        "UPDATE crm_contacts SET phone = '1' WHERE email = 'ann@example.com'",
        """CREATE TABLE public.referrer (who text REFERENCES crm_contacts ON DELETE CASCADE);
        INSERT INTO public.referrer SELECT id FROM crm_contacts WHERE email = 'ann@example.com'""",
    ],
)
def test_what_somebody_does_after_the_comparison_keeps_the_contact(database: Database, statement: str) -> None:
    add_lead("ann@example.com")
    add_lead("bob@example.com")
    made = run()["run"]
    database.change("")  # whatever happens below, the tables are made anew
    with once_contacts_were_read(statement):
        report = taken_back(made)
    assert (report["reversed"], report["kept"]) == (1, 1)


def test_no_table_comes_to_refer_to_contacts_between_the_question_and_the_deletion(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()["run"]
    refused = []

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        result = execute(sql, parameters, many, context)
        if "SELECT k.conrelid" in str(sql) and connection.in_atomic_block:
            with processes.session() as other:
                other.execute("SET lock_timeout = '100ms'")
                with pytest.raises(psycopg.errors.LockNotAvailable) as error:
                    other.execute("CREATE TABLE public.referrer (who text REFERENCES crm_contacts)")
                refused.append(error)
        return result

    with connection.execute_wrapper(watch):
        taken_back(made)
    assert len(refused) == 1


def test_a_merged_value_that_somebody_edits_after_the_comparison_stays(database: Database) -> None:
    _, second = merged_by_a_second_run()
    with once_contacts_were_read("""UPDATE crm_contacts SET "commissionRate" = 9"""):
        report = taken_back(second["run"])
    assert report["merges"]["kept"] == 1
    assert str(contact_with("ann@example.com")["commissionRate"]) == "9.00"


def test_a_rollback_that_is_cancelled_stops_at_its_batch_and_goes_on_when_run_again(database: Database) -> None:
    for number in range(6):
        add_lead(f"n{number}@example.com")
    made = run()["run"]
    batches = []

    def cancel_after_the_second(reverted: Any) -> None:
        batches.append(reverted)
        if len(batches) == 2:
            BackfillRun.objects.running().update(status=RunStatus.CANCELLED)

    stopped = roll_back(made, batch_size=1, listener=cancel_after_the_second)
    assert (stopped.status, stopped.exit_code, len(contacts())) == (RunStatus.CANCELLED, 4, 4)
    assert stopped.counts.numbers["contacts_reversed"] == 2
    assert taken_back(made)["reversed"] == 4


def test_ctrl_c_ends_it_with_its_batch(database: Database) -> None:
    for number in range(3):
        add_lead(f"n{number}@example.com")
    made = run()["run"]
    stopped = roll_back(made, batch_size=1, listener=lambda _: signal.raise_signal(signal.SIGINT))
    assert (stopped.status, stopped.exit_code, len(contacts())) == (RunStatus.INTERRUPTED, 4, 2)
    assert taken_back(made)["reversed"] == 2


def test_a_page_that_cannot_be_read_ahead_is_read_when_its_turn_comes(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Reader.page

    def failing_ahead(self: Reader, after: str, size: int) -> list[Entry]:
        if threading.current_thread() is not threading.main_thread():
            raise OperationalError("no connection is left")
        return page(self, after, size)

    for number in range(3):
        add_lead(f"n{number}@example.com")
    made = run()["run"]
    monkeypatch.setattr(Reader, "page", failing_ahead)
    assert taken_back(made, **{"batch-size": 1})["reversed"] == 3
    assert not contacts()


def test_the_way_back_that_is_printed_leads_back(database: Database) -> None:
    lead = add_lead("ann@example.com")
    made = run()["run"]
    change("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() WHERE id = %s""", lead)
    updated = run(update=True)
    said = rollback(str(updated["run"]), "--no-progress").stdout
    assert "backfill_crm_contacts --update`" in said
    assert "The rows are pending again" not in said
    assert run(update=True)["updated"] == updated["updated"] == 1
    assert rollback(str(updated["run"] + 2), "--no-progress").code == 0
    said = rollback(str(made), "--no-progress").stdout
    assert "The rows are pending again" in said
    assert "backfill_crm_contacts --update`" not in said
    assert run()["created"] == 1


def test_one_that_was_paused_says_that_it_is_to_be_resumed_first(database: Database) -> None:
    for number in range(3):
        add_lead(f"n{number}@example.com")
    made = run()["run"]

    def pause(reverted: Reverted) -> None:
        BackfillRun.objects.running().update(status=RunStatus.PAUSED)

    stopped = roll_back(made, batch_size=1, listener=pause)
    assert (
        f"unless it was resumed already, `python manage.py backfill_runs resume {stopped.run_id}`; then"
        in news(stopped)[-1]
    )


def test_one_that_died_after_its_last_batch_is_closed_by_the_next(database: Database) -> None:
    add_lead("ann@example.com")
    made = run()["run"]
    report = taken_back(made)
    BackfillRun.objects.filter(pk=report["run"]).update(status=RunStatus.RUNNING, process_id=2**22 + 1)
    again = taken_back(made)
    assert (again["reversed"], again["status"]) == (0, "finished")
    assert rollback(str(made)).code == 2


def test_a_database_that_fails_ends_it_as_failed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "MAX_RETRIES", 2)
    add_lead("ann@example.com")
    made = run()["run"]
    with trigger_on_delete("RAISE 'no' USING ERRCODE = '53100'; RETURN OLD;"):
        finished = rollback(str(made), "--json")
    assert (finished.code, finished.answer["status"], finished.answer["failure"]) == (
        5,
        "failed",
        "OperationalError (53100)",
    )
    assert taken_back(made)["reversed"] == 1


@pytest.mark.process
def test_killed_in_the_middle_it_goes_on_when_run_again(database: Database) -> None:
    load_people(2_000, "2025_10", 3)
    before = database.dump(*LEGACY_TABLES)
    made = run()
    change(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN PERFORM pg_sleep(0.1); RETURN NEW; END $$"
    )
    change("CREATE TRIGGER slowly BEFORE UPDATE ON rollback FOR EACH ROW EXECUTE FUNCTION slowly()")
    try:
        for _ in range(3):
            left = LedgerEntry.objects.count()
            process = processes.start(
                "rollback_crm_backfill", str(made["run"]), "--batch-size=100", url=processes.database_url()
            )
            wait_for(lambda left=left: LedgerEntry.objects.count() < left - 150)  # type: ignore[misc] # the default binds
            process.send_signal(signal.SIGKILL)
            process.communicate()
            (dead,) = BackfillRun.objects.running()
            counts = Rollback.objects.get(run=dead)
            wait_for(lambda: not others_at_work(database))
            assert 0 < LedgerEntry.objects.filter(run=made["run"]).count() < made["read"]
            assert counts.contacts_reversed > 0
    finally:
        change("DROP FUNCTION slowly() CASCADE")
    report = taken_back(made["run"])
    assert report["status"] == "finished"
    reversed_contacts = sum(Rollback.objects.values_list("contacts_reversed", flat=True))
    assert reversed_contacts == made["created"]
    assert database.dump(*LEGACY_TABLES) == before
    assert ledger() == {}


def others_at_work(database: Database) -> list[Any]:
    return database.rows(
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND state <> 'idle'"
    )


def test_a_run_that_is_not_named_by_its_number_is_not_taken_back(database: Database) -> None:
    assert "There is no run yet." in rollback("latest").stderr
    add_lead("ann@example.com")
    run()
    number = run()["run"]
    before = database.dump()
    refused = rollback("latest")
    assert (refused.code, refused.stdout) == (2, "")
    assert refused.stderr == (
        "CommandError: A rollback does not accept `latest`, because another run may have started since you looked: "
        f"give the run's number. The latest run is {number}; `python manage.py backfill_runs list` shows the others. "
        "Nothing was written.\n"
    )
    unknown = rollback("two")
    assert unknown.code == 2
    assert "'two' is not a run: give its number, as shown by `backfill_runs list`" in unknown.stderr
    assert database.dump() == before


@pytest.mark.parametrize("error", [StoppedError("Interrupted at the start."), KeyboardInterrupt()])
def test_a_rollback_that_is_stopped_before_it_begins_leaves_the_name_of_its_list_free(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "list.csv"
    with pytest.raises(type(error)), listing(path):
        raise error
    assert not path.exists()


def test_a_list_with_the_result_of_a_batch_is_kept_whatever_ends_the_rollback(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"

    def stop_after_a_batch() -> None:
        with listing(path) as listener:
            assert listener is not None
            listener(Reverted())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_after_a_batch()
    assert path.exists()

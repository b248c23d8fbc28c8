"""Contacts that are gone in number are told, and made again where an operator says so; a rollback takes that back."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from crm.backfill import gone_contacts
from crm.backfill.gone_contacts import GoneContacts, count_gone_contacts, is_more_than_expected
from crm.backfill.read import inventory
from crm.models import BackfillRun, ContactUpdate, LedgerEntry
from crm.outcome import Source
from crm.verification import verify
from tests.conftest import Database
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
from tests.support.circumstances import acting_as
from tests.support.commands import Finished, backfill, called, run, statements

LATER = "2025-06-01 00:00:00"


def delete_contacts(database: Database, condition: str = "true") -> int:
    """People, or a restored table: contacts are gone."""
    return len(database.rows(f"DELETE FROM crm_contacts WHERE {condition} RETURNING id"))


def recreate(**options: Any) -> dict[str, Any]:
    return run(recreate_deleted=True, **options)


def as_figures(answer: dict[str, Any]) -> dict[str, Any]:
    names = ("read", "created", "merged", "exists", "error", "error_new", "already", "recreated", "excluded")
    return {name: answer[name] for name in names}


def taken_back(run_id: int) -> Finished:
    return called("rollback_crm_backfill", str(run_id), "--no-progress")


# The warning


def test_contacts_that_are_gone_in_number_are_told_once_with_the_figure(database: Database) -> None:
    add_many_leads(30)
    first = run()
    assert first["contacts_gone"] == {"rows": 0, "settled": 30, "known": 0, "known_to": None, "is_news": False}
    delete_contacts(database, "id IN (SELECT id FROM crm_contacts ORDER BY id LIMIT 12)")
    ended = backfill("--json", "--no-progress")
    assert ended.code == 0
    told = GoneContacts(rows=12, settled=30, known=0, known_to=first["run"])
    assert ended.answer["contacts_gone"] == {**told._asdict(), "is_news": True}
    assert "12 of 30 migrated rows have lost their contact" in ended.stderr
    assert "--recreate-deleted --dry-run" in ended.stderr
    predicted = backfill("--recreate-deleted", "--dry-run", "--no-progress")
    assert predicted.stderr.endswith("This dry run read 12 of them again; the summary includes their outcomes.\n")

    ended = backfill("--json", "--no-progress")
    assert (ended.stderr, ended.answer["contacts_gone"]["rows"]) == ("", 12)
    delete_contacts(database)
    assert "18 of them since run" in backfill("--no-progress").stderr


def test_a_few_that_people_deleted_are_no_news(database: Database) -> None:
    add_many_leads(30)
    run()
    delete_contacts(database, "id IN (SELECT id FROM crm_contacts ORDER BY id LIMIT 9)")
    ended = backfill("--json", "--no-progress")
    assert (ended.stderr, ended.answer["contacts_gone"]["rows"]) == ("", 9)


def test_a_night_without_losses_looks_at_a_sample_and_counts_nothing(database: Database) -> None:
    add_many_leads(60)
    run()
    with statements() as sent:
        assert count_gone_contacts(connection, 60, run_id=1, size=20).rows == 0
    assert [statement.sql for statement in sent if "NOT EXISTS" in statement.sql] == []
    (sample,) = [statement for statement in sent if "UNION ALL" in statement.sql]
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN {sample.sql}", sample.parameters)
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "Limit" in plan
    delete_contacts(database)
    with statements() as sent:
        assert count_gone_contacts(connection, 60, run_id=1, size=20).rows == 60
    assert len([statement for statement in sent if "NOT EXISTS" in statement.sql]) == 1


def test_the_sample_goes_round_from_wherever_it_begins(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    add_many_leads(25)
    run()
    for digits in ("0" * 24, "8" * 24, "f" * 24):
        monkeypatch.setattr(secrets, "token_hex", lambda _bytes, digits=digits: digits)
        with statements() as sent:
            count_gone_contacts(connection, 25, run_id=1, size=20)
        (sample,) = [statement for statement in sent if "UNION ALL" in statement.sql]
        with connection.cursor() as cursor:
            cursor.execute(sample.sql, sample.parameters)
            assert cursor.fetchone() == (20, 0)


@given(st.integers(0, 2_000), st.floats(0, 2_000))
def test_a_sample_as_expected_gives_no_reason_to_count(found: int, expected: float) -> None:
    assert not is_more_than_expected(found, max(found, expected))
    assert is_more_than_expected(found + 1, 0)


def test_what_is_news_grows_with_the_number_of_rows() -> None:
    assert not GoneContacts(9, 30, 0, None).is_news
    assert GoneContacts(10, 30, 0, None).is_news
    assert not GoneContacts(1_499, 1_000_000, 500, 1).is_news
    assert GoneContacts(1_500, 1_000_000, 500, 1).is_news


def test_a_dry_run_tells_it_too_and_needs_no_right_to_read_the_runs(database: Database) -> None:
    add_many_leads(12)
    run()
    delete_contacts(database)
    with statements() as sent:
        answer = run(dry_run=True)
    assert answer["contacts_gone"]["rows"] == 12
    assert [statement for statement in sent if gone_contacts.RECORDED in str(statement.parameters)] == []


# Made again


def people(database: Database) -> tuple[int, str, str]:
    """Rows of every outcome; the run, a profile's reference and a lead's."""
    profile = add_profile(email="ann@example.com", firstName="Ann")
    lead = add_lead("ann@example.com", lastContactedAt=LATER, referrerUsername="ref")
    add_lead("ann@example.com")
    add_contact("bob@example.com")
    add_lead("bob@example.com")
    add_lead("cy@example.com", "CONVERTED")
    add_lead("nobody")
    return run()["run"], f"profiles:{profile}", f"leads:{lead}"


def test_without_being_told_nobody_comes_back(database: Database) -> None:
    people(database)
    delete_contacts(database)
    entries = ledger()
    answer = run()
    assert (answer["read"], answer["created"], answer["recreated"]) == (1, 0, 0)
    assert (contacts(), ledger()) == ({}, entries)


def test_contacts_that_are_gone_are_made_again_as_a_first_run_would_and_the_dry_run_says_so(database: Database) -> None:
    people(database)
    before = contacts()
    delete_contacts(database)
    add_lead("new@example.com")
    dump = database.dump()
    predicted = recreate(dry_run=True)
    assert database.dump() == dump
    answer = recreate()
    assert as_figures(answer) == as_figures(predicted)
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert (answer["recreated"], answer["already"], answer["error_new"]) == (5, 0, 0)
    assert answer["contacts_gone"]["rows"] == 0
    ours = {identifier: contact for identifier, contact in before.items() if contact["firstName"] != "Con"}
    assert {identifier: contacts()[identifier] for identifier in ours} == ours
    assert sorted(contact["email"] for contact in contacts().values()) == [
        *("ann@example.com", "bob@example.com", "cy@example.com", "new@example.com"),
    ]
    assert BackfillRun.objects.get(pk=answer["run"]).options["recreate_deleted"] is True
    assert verify(connection).exit_code == 0
    assert as_figures(recreate())["read"] == as_figures(run())["read"] == 1


def test_only_what_is_gone_is_made_again(database: Database) -> None:
    people(database)
    delete_contacts(database, "email = 'cy@example.com'")
    database.rows("UPDATE crm_contacts SET phone = 'theirs' WHERE email = 'ann@example.com' RETURNING id")
    before = contacts()
    answer = recreate()
    assert (answer["recreated"], answer["created"], answer["already"]) == (1, 1, 4)
    assert {identifier: contacts()[identifier] for identifier in before} == before
    decided = LedgerEntry.objects.filter(run=answer["run"]).exclude(outcome="error")
    assert [entry.contact_id for entry in decided] == [contact_with("cy@example.com")["id"]]


def test_a_rollback_takes_it_back_and_nobody_comes_back_by_the_next_run(database: Database) -> None:
    people(database)
    delete_contacts(database)
    run()  # the row in error is tried again
    before = database.dump("ledger_entry", "crm_contacts")
    answer = recreate()
    assert LedgerEntry.objects.filter(former__isnull=False).count() == 5
    ended = taken_back(answer["run"])
    assert (ended.code, contacts()) == (0, {})
    assert "those stay deleted" in ended.stdout
    # The row in error is pending; all others are what they were.
    error = LedgerEntry.objects.filter(outcome="error").exists()
    assert not error
    left = database.dump("ledger_entry")["ledger_entry"]
    assert set(left) < set(before["ledger_entry"])
    assert len(left) == 5
    answer = run()
    assert (answer["created"], answer["error"], contacts()) == (0, 1, {})


def test_what_came_to_a_contact_comes_to_it_again_also_where_a_run_stopped_in_between(database: Database) -> None:
    people(database)
    before = contacts()
    delete_contacts(database)
    assert recreate(only=(Source.CLIENTS,))["recreated"] == 1
    assert recreate()["recreated"] == 4
    assert contact_with("ann@example.com") == before[contact_with("ann@example.com")["id"]]
    assert recreate()["recreated"] == 0


def test_made_again_twice_it_is_taken_back_step_by_step(database: Database) -> None:
    add_lead("ann@example.com")
    run()
    delete_contacts(database)
    first = recreate()["run"]
    entries = database.dump("ledger_entry")
    delete_contacts(database)
    second = recreate()["run"]
    assert (taken_back(second).code, contacts(), database.dump("ledger_entry")) == (0, {}, entries)
    # What it made is gone, so there is nothing of it to take back.
    assert (taken_back(first).code, contacts(), database.dump("ledger_entry")) == (0, {}, entries)


def test_what_an_update_changed_in_a_contact_is_not_taken_for_a_change_of_the_new_one(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    database.rows(
        "UPDATE leads SET status = 'CONTACTED', phone = '555 0199', \"updatedAt\" = %s WHERE id = %s RETURNING id",
        LATER,
        lead,
    )
    assert run(update=True)["updated"] == 1
    assert ContactUpdate.objects.exists()
    delete_contacts(database)
    answer = recreate()
    assert (contact_with("ann@example.com")["phone"], ContactUpdate.objects.count()) == ("555 0199", 0)
    assert verify(connection).exit_code == 0
    assert run(update=True)["updated"] == 0
    ended = taken_back(answer["run"])
    assert (ended.code, contacts()) == (0, {})


def test_a_resolution_of_a_person_holds_for_what_is_made_again(database: Database) -> None:
    contact = add_contact("ann@example.com", userId=add_user("other@example.com"))
    profile = add_profile(email="ann@example.com")
    run()
    row = f"profiles:{profile}"
    assert called("resolve_crm_conflict", row, "--separate", "ann.other@example.com").code == 0
    assert run()["created"] == 1
    delete_contacts(database, f"id <> '{contact}'")
    predicted, answer = recreate(dry_run=True), recreate()
    assert as_figures(predicted) == as_figures(answer)
    assert (answer["created"], answer["error"]) == (1, 0)
    assert contact_with("ann.other@example.com")["id"] == ledger()[row]["contact_id"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("share", [inventory.FEW_SHARE, 2])
@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"batch_size": 7}, {"only": (Source.ACTIVE_LEADS,)}])
def test_however_it_is_read_everybody_is_made_again(
    database: Database, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], share: float
) -> None:
    monkeypatch.setattr(inventory, "FEW_SHARE", share)
    add_many_leads(40)
    run()
    before = contacts()
    delete_contacts(database, "right(id, 1) < '8'")
    gone = len(before) - len(contacts())
    answer = recreate(**options)
    assert (answer["recreated"], answer["created"], answer["already"]) == (gone, gone, 40 - gone)
    assert (answer["balanced"], contacts()) == (True, before)


def test_a_limit_counts_the_rows_that_are_made_again(database: Database) -> None:
    add_many_leads(20)
    run()
    delete_contacts(database)
    assert [recreate(limit=15)["created"], recreate()["created"]] == [15, 5]


def test_it_is_refused_together_with_an_update_and_without_the_right_to_forget(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    ended = backfill("--recreate-deleted", "--update")
    assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    add_lead("ann@example.com")
    run()
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE ROLE recreator LOGIN; GRANT USAGE ON SCHEMA public, crm_backfill TO recreator;"
            "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public, crm_backfill TO recreator"
        )
    try:
        with acting_as("recreator"):
            ended = backfill("--recreate-deleted")
            predicted = backfill("--recreate-deleted", "--dry-run", "--json", "--no-progress")
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP OWNED BY recreator; DROP ROLE recreator")
    assert (ended.code, ended.stderr.count("\n")) == (2, 1)
    assert "DELETE on contact_update" in ended.stderr
    assert predicted.code == 0
    (told,) = caplog.messages
    assert "would be refused, because this role lacks: DELETE on contact_update" in told


def test_what_a_restored_table_lacks_is_filled_again_once_every_row_is_due(database: Database) -> None:
    lead = add_lead("ann@example.com", phone="")
    run()
    add_lead("ann@example.com", phone="555 0199", createdAt="2025-02-01")
    database.rows("UPDATE leads SET status = 'CONTACTED', \"updatedAt\" = %s WHERE id = %s RETURNING id", LATER, lead)
    run(update=True)
    now = contacts()
    # The table is that of the first night again.
    database.rows('UPDATE crm_contacts SET phone = NULL, stage = \'NEW\', "stageEnteredAt" = "createdAt" RETURNING id')
    database.rows("DELETE FROM crm_stage_history RETURNING id")
    assert (run(update=True)["updated"], contacts() == now) == (0, False)
    database.rows("UPDATE ledger_entry SET seen_updated_at = NULL RETURNING id")
    assert (run(update=True)["updated"] > 0, contacts()) == (True, now)

"""The next run carries out what a person decided about a row in conflict, and nothing is overwritten.

Whatever the number of workers: their rows are taken last, and in one place.
"""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from crm.errors import OperatorError
from crm.outcome import Source
from crm.rollback.runner import roll_back
from crm.rules.mapping import contact_id
from crm.verification import verify
from crm.verification.findings import Kind
from tests.conftest import Database
from tests.support import reference
from tests.support.builders import add_contact, add_lead, add_profile, add_user, contacts, ledger
from tests.support.circumstances import acting_as, reading_role
from tests.support.commands import run
from tests.support.conflicts import ANN, OTHER, entry_of, resolve, resolved, somebody_elses_account


def rehearsed_and_run() -> dict[str, Any]:
    """What a run did, and a dry run before it had predicted."""
    foretold, report = run(dry_run=True), run()
    counts = ("read", "created", "merged", "exists", "error", "error_new")
    assert {name: foretold[name] for name in counts} == {name: report[name] for name in counts}
    return report


# --contact


def test_a_row_belongs_to_somebody_elses_contact_and_changes_nothing_there(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    before = contacts()
    resolved(row, "--contact", contact)
    assert contacts() == before
    assert entry_of(row) == ("error", "conflict", contact)
    assert rehearsed_and_run()["exists"] == 1
    assert contacts() == before
    assert entry_of(row) == ("exists", None, contact)
    assert run()["read"] == 0


def test_a_row_is_merged_into_a_contact_of_ours_and_fills_only_what_is_missing(database: Database) -> None:
    add_profile(email=ANN)
    run()
    (mine,) = contacts()
    row = f"profiles:{add_profile(email=ANN.upper(), phone='555 0101', companyName='Co')}"
    assert run()["by_reason"] == {"conflict": 1}
    before = contacts()[mine]
    resolved(row, "--contact", mine)
    assert rehearsed_and_run()["merged"] == 1
    assert contacts()[mine] == before | {"phone": "555 0101", "company": "Co"}
    assert entry_of(row) == ("merged", None, mine)


def test_a_row_may_belong_to_a_contact_with_which_it_has_no_key_in_common(database: Database) -> None:
    add_profile(email="ann.other@example.com")
    first = run()
    (mine,) = contacts()
    row, _, _ = somebody_elses_account()
    resolved(row, "--contact", mine)
    carried_out = rehearsed_and_run()
    assert (carried_out["merged"], entry_of(row)) == (1, ("merged", None, mine))
    after = contacts()
    roll_back(carried_out["run"])
    roll_back(first["run"])
    assert mine not in contacts()
    # The contact comes back in the run that carries the resolution out again, and a dry run knows it.
    assert rehearsed_and_run()["merged"] == 1
    assert contacts() == after


def test_an_account_that_another_contact_has_stays_there(database: Database) -> None:
    add_lead(ANN)
    run()
    (mine,) = contacts()
    user = add_user(ANN.title())
    theirs = add_contact("elsewhere@example.com", userId=user)
    row = f"profiles:{add_profile(userId=user, clerkUserId='user_1')}"
    assert run()["by_reason"] == {"conflict": 1}
    resolved(row, "--contact", mine)
    assert rehearsed_and_run()["merged"] == 1
    assert (contacts()[mine]["userId"], contacts()[mine]["clerkUserId"]) == (None, "user_1")
    assert contacts()[theirs]["userId"] == user


def test_a_contact_that_was_deleted_since_is_told_as_a_new_error(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    resolved(row, "--contact", contact)
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM crm_contacts WHERE id = %s", [contact])
    report = rehearsed_and_run()
    assert (report["error"], report["error_new"], report["created"]) == (1, 1, 0)
    assert entry_of(row) == ("error", "stale_decision", contact)
    assert run()["error_new"] == 0
    resolved(row, "--separate", OTHER)
    assert rehearsed_and_run()["created"] == 1


def test_a_run_that_may_not_see_what_was_resolved_is_refused(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    grants = (
        "CREATE ROLE decides_nothing LOGIN",
        "GRANT USAGE ON SCHEMA public, crm_backfill TO decides_nothing",
        "GRANT ALL ON ALL TABLES IN SCHEMA public, crm_backfill TO decides_nothing",
        "REVOKE ALL ON conflict_decision FROM decides_nothing",
    )
    with connection.cursor() as cursor:
        for grant in grants:
            cursor.execute(grant)
    try:
        with acting_as("decides_nothing"), pytest.raises(OperatorError, match="SELECT on conflict_decision"):
            run()
        with acting_as("decides_nothing"), pytest.raises(OperatorError, match="SELECT on conflict_decision"):
            verify(connection)
        with acting_as("decides_nothing"):
            assert run(dry_run=True)["status"] == "finished"
        assert "the dry run applies no resolution" in caplog.text
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP OWNED BY decides_nothing")
            cursor.execute("DROP ROLE decides_nothing")


def test_a_dry_run_that_may_see_resolutions_and_no_ledger_goes_without_both(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    resolved(row, "--contact", contact)
    with reading_role(database) as role:
        with connection.cursor() as cursor:
            cursor.execute(f"GRANT USAGE ON SCHEMA crm_backfill TO {role}; GRANT SELECT ON conflict_decision TO {role}")
        with acting_as(role):
            assert run(dry_run=True)["by_reason"] == {"conflict": 1}


def test_a_run_without_the_table_of_resolutions_asks_for_the_migration(database: Database) -> None:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE conflict_decision RENAME TO elsewhere")
    try:
        with pytest.raises(OperatorError, match="conflict_decision, which came with this version: run `python manage"):
            run()
        assert run(dry_run=True)["status"] == "finished"
        assert verify(connection).exit_code == 0
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO conflict_decision")


# --separate


def test_a_row_gets_a_contact_of_its_own_with_another_address(database: Database) -> None:
    row, user, contact = somebody_elses_account()
    before = contacts()
    resolved(row, "--separate", f" {OTHER.title()} ")
    assert rehearsed_and_run()["created"] == 1
    own = reference.contact_id_of(row)
    after = contacts()
    assert (after[own]["email"], after[own]["userId"], after[own]["phone"]) == (OTHER, user, "555 0101")
    assert after.keys() == {contact, own}
    assert after[contact] == before[contact]
    assert entry_of(row) == ("created", None, own)
    assert run()["read"] == 0


def test_a_contact_of_its_own_goes_without_accounts_that_others_have(database: Database) -> None:
    user = add_user(ANN)
    add_contact("u@example.com", userId=user)
    add_contact("k@example.com", clerkUserId="user_1")
    row = f"profiles:{add_profile(userId=user, clerkUserId='user_1')}"
    assert run()["by_reason"] == {"conflict": 1}
    resolved(row, "--separate", ANN)
    carried_out = rehearsed_and_run()
    assert carried_out["created"] == 1
    own = contacts()[reference.contact_id_of(row)]
    assert (own["email"], own["userId"], own["clerkUserId"]) == (ANN, None, None)
    before = contacts()
    assert roll_back(carried_out["run"]).counts.numbers["contacts_reversed"] == 1
    assert rehearsed_and_run()["created"] == 1
    assert contacts() == before


def test_an_address_that_became_somebodys_since_is_told_as_a_new_error(database: Database) -> None:
    row, _, _ = somebody_elses_account()
    resolved(row, "--separate", OTHER)
    newcomer = add_contact(OTHER.upper())
    assert rehearsed_and_run()["error_new"] == 1
    assert entry_of(row) == ("error", "stale_decision", newcomer)
    resolved(row, "--contact", newcomer)
    assert rehearsed_and_run()["exists"] == 1


def test_taking_the_run_back_and_running_again_carries_the_resolution_out_again(database: Database) -> None:
    row, _, _ = somebody_elses_account()
    before = contacts()
    resolved(row, "--separate", OTHER)
    second = run()
    after = contacts()
    report = roll_back(second["run"])
    assert report.counts.numbers["contacts_reversed"] == 1
    assert contacts() == before
    assert rehearsed_and_run()["created"] == 1
    assert contacts() == after


def test_a_merge_that_was_resolved_is_taken_back_like_any_other(database: Database) -> None:
    add_profile(email=ANN)
    first = run()
    (mine,) = contacts()
    before = contacts()
    row = f"profiles:{add_profile(email=ANN.upper(), phone='555 0101')}"
    run()
    resolved(row, "--contact", mine)
    after_resolution = run()
    assert roll_back(after_resolution["run"]).counts.numbers["merges_reversed"] == 1
    assert contacts() == before
    run()
    report = roll_back(first["run"])
    assert (report.counts.numbers["contacts_reversed"], report.counts.numbers["later_merges"]) == (1, 1)
    assert contacts() == {}
    # The contact comes back under its id, so the resolution holds for it, also in the run that brings it back.
    assert rehearsed_and_run()["merged"] == 1


def test_a_row_that_is_settled_already_is_refused(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    resolved(row, "--contact", contact)
    run()
    assert "it is exists" in resolve(row, "--separate", OTHER).stderr


@pytest.mark.parametrize("generation", ["2025_11", "2025_12"])
def test_other_generations_carry_it_out_as_well(database: Database, generation: str) -> None:
    database.use(generation)
    user = add_user(ANN)
    row = f"profiles:{add_profile('client', userId=user)}"
    contact = add_contact(ANN, userId=add_user("elsewhere@example.com"))
    run()
    resolved(row, "--separate", OTHER)
    assert rehearsed_and_run()["created"] == 1
    assert contacts().keys() == {contact, reference.contact_id_of(row)}


# However many workers there are


def a_crowd() -> dict[str, tuple[str, ...]]:
    """People of many partitions, with rows in conflict; what is decided on each of these. The ledger knows them all."""
    resolutions: dict[str, tuple[str, ...]] = {}
    for number in range(12):
        email = f"person-{number}@example.com"
        theirs = add_contact(email, userId=add_user(f"elsewhere-{number}@example.com"))
        row = f"profiles:{add_profile(userId=add_user(email), phone='555 0101', clerkUserId=f'clerk_{number}')}"
        resolutions[row] = ("--separate", f"own-{number}@example.com") if number % 3 else ("--contact", theirs)
    return resolutions


def later_rows() -> None:
    """What came in since: addresses that were given to others, and leads of the contact that rows were decided to."""
    for number in (1, 2):
        add_lead(f"own-{number}@example.com", phone="555 0202")
    add_lead("shared@example.com", phone=" ", referrerUsername="first")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_end_is_the_same_for_every_number_of_workers(database: Database, workers: int) -> None:
    shared = contact_id("leads", add_lead("shared@example.com", phone=""))
    run()
    resolutions = a_crowd()
    run()
    for row, resolution in resolutions.items():
        resolved(row, *resolution)
    # Two rows of two partitions, and a later lead of a third, fill the same contact.
    extra = [row for row, resolution in resolutions.items() if resolution[0] == "--separate"][-2:]
    for row in extra:
        resolved(row, "--contact", shared)
    later_rows()
    foretold = run(dry_run=True, workers=workers)
    report = run(workers=workers, batch_size=1)
    for answer in (foretold, report):
        counts = {name: answer[name] for name in ("read", "created", "merged", "exists", "error", "error_new")}
        assert counts == {"read": 15, "created": 6, "merged": 3, "exists": 4, "error": 2, "error_new": 2}
    by_row = {row: entry_of(row) for row in resolutions}
    taken = {reference.contact_id_of(row) for row, entry in ledger().items() if entry["outcome"] == "created"}
    for row, (how, what) in resolutions.items():
        if row in extra:
            assert by_row[row] == ("merged", None, shared)
        elif how == "--contact":
            assert by_row[row] == ("exists", None, what)
        elif what in ("own-1@example.com", "own-2@example.com"):
            assert by_row[row][:2] == ("error", "stale_decision")
            assert by_row[row][2] in taken
        else:
            assert by_row[row] == ("created", None, reference.contact_id_of(row))
    # The lead had come before the rows that were decided on, and the first of those before the second.
    contact = contacts()[shared]
    assert (contact["referrerUsername"], contact["phone"]) == ("first", "555 0101")
    assert (
        contact["clerkUserId"]
        == database.rows('SELECT "clerkUserId" FROM profiles WHERE id = %s', min(extra).partition(":")[2])[0][0]
    )
    assert verify(connection).exit_code == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_contact_that_this_run_brings_back_is_there_for_the_resolution(database: Database, workers: int) -> None:
    add_lead("late@example.com")
    first = run()
    (mine,) = contacts()
    row, _, _ = somebody_elses_account()
    resolved(row, "--contact", mine)
    carried_out = run()
    after = contacts()
    roll_back(carried_out["run"])
    roll_back(first["run"])
    assert mine not in contacts()
    assert run(dry_run=True, workers=workers)["merged"] == 1
    assert run(workers=workers)["merged"] == 1
    assert contacts() == after


def test_a_limit_bounds_the_rows_that_were_resolved_on_as_well(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    resolved(row, "--contact", contact)
    add_lead("first@example.com")
    assert run(limit=1)["created"] == 1
    assert entry_of(row)[0] == "error"
    assert run(limit=1)["exists"] == 1


def test_a_source_that_is_left_out_is_left_out(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    resolved(row, "--contact", contact)
    assert run(only=(Source.PREPARERS, Source.ACTIVE_LEADS))["read"] == 0
    assert run(since="2030-01-01")["read"] == 0
    assert entry_of(row)[0] == "error"
    assert run(only=(Source.CLIENTS,))["exists"] == 1


# The proof


def verified() -> list[tuple[str, str, tuple[str, ...]]]:
    """What a verification finds, with exit code 1 exactly for defects."""
    report = verify(connection)
    assert report.exit_code == int(any(finding.kind == Kind.DEFECT for finding in report.findings.kept))
    return [(finding.check.value, finding.kind.value, finding.columns) for finding in report.findings.kept]


def test_a_verification_expects_the_address_that_was_resolved(database: Database) -> None:
    row, _, _ = somebody_elses_account()
    resolved(row, "--separate", OTHER)
    run()
    assert verified() == []
    own = reference.contact_id_of(row)
    change(own, email=ANN.replace("ann", "another"))
    assert verified() == [("fields", "defect", ("email",))]


def test_no_change_of_the_account_explains_another_address_than_the_resolved_one(database: Database) -> None:
    row, user, _ = somebody_elses_account()
    resolved(row, "--separate", OTHER)
    run()
    database.rows("UPDATE users SET \"updatedAt\" = now() + interval '1 day' WHERE id = %s RETURNING id", user)
    assert verified() == []
    change(reference.contact_id_of(row), email="another@example.com")
    assert verified() == [("fields", "defect", ("email",))]


def test_a_verification_accepts_that_accounts_were_left_to_others(database: Database) -> None:
    user = add_user(ANN)
    add_contact("u@example.com", userId=user)
    add_contact("k@example.com", clerkUserId="user_1")
    row = f"profiles:{add_profile(userId=user, clerkUserId='user_1')}"
    run()
    resolved(row, "--separate", ANN)
    run()
    assert verified() == []
    own = reference.contact_id_of(row)
    change(own, userId=add_user("foreign@example.com"))
    assert verified() == [("fields", "defect", ("userId",))]


def test_a_verification_expects_what_a_resolved_merge_filled(database: Database) -> None:
    add_lead(ANN, phone="")
    run()
    (mine,) = contacts()
    user = add_user(ANN.title())
    add_contact("elsewhere@example.com", userId=user)
    row = f"profiles:{add_profile(userId=user, clerkUserId='user_1', phone='555 0101')}"
    run()
    resolved(row, "--contact", mine)
    run()
    assert entry_of(row) == ("merged", None, mine)
    assert verified() == []
    change(mine, clerkUserId=None)
    assert verified() == [("fields", "defect", ("clerkUserId",))]
    change(mine, clerkUserId="user_1", phone=None)
    assert verified() == [("fields", "defect", ("phone",))]


def change(contact: str, **columns: Any) -> None:
    """What nobody should do: change a contact and leave `updatedAt` as it is."""
    for column, value in columns.items():
        with connection.cursor() as cursor:
            cursor.execute(f'UPDATE crm_contacts SET "{column}" = %s WHERE id = %s', [value, contact])


# A second look


def test_a_second_look_holds_to_the_resolution(database: Database) -> None:
    user = add_user(ANN)
    add_contact("u@example.com", userId=user)
    add_contact("k@example.com", clerkUserId="user_1")
    profile = add_profile(userId=user, clerkUserId="user_1")
    run()
    resolved(f"profiles:{profile}", "--separate", ANN.replace("ann", "other.ann"))
    run()
    own = contact_id("profiles", profile)
    before = contacts()[own]
    with connection.cursor() as cursor:
        cursor.execute("UPDATE profiles SET phone = '555 0101', \"updatedAt\" = '2026-01-01' WHERE id = %s", [profile])
    for options in ({"dry_run": True}, {}):
        answer = run(update=True, **options)
        assert (answer["revisited"], answer["updated"], answer["kept"]) == (1, 1, 0)
    assert contacts()[own] == before | {"phone": "555 0101"}
    assert (before["email"], before["userId"], before["clerkUserId"]) == (OTHER, None, None)
    assert verify(connection).exit_code == 0
    assert run(update=True)["revisited"] == 0

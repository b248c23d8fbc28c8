"""Whose client is this: the preparer of a contact, from wherever one is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection
from pytest_django import Settings

from crm.backfill.read import referrers
from crm.backfill.update import reader
from crm.verification import verify
from tests.conftest import LEGACY_TABLES, Database
from tests.support.builders import (
    ASSIGNED_AT,
    LATER,
    UPDATED_AT,
    add_contact,
    add_intake,
    add_lead,
    add_profile,
    add_user,
    assign_client,
    change,
    contact_with,
    contacts,
)
from tests.support.circumstances import acting_as, reading_role
from tests.support.commands import called, run

COUNTED = "assignments"


def assigned(email: str) -> tuple[str | None, str | None]:
    """The preparer of a contact, and since when."""
    contact = contact_with(email)
    at = contact["assignedAt"]
    return contact["assignedPreparerId"], at and at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def verified() -> list[Any]:
    return verify(connection).findings.kept


def test_each_way_to_a_preparer_is_counted_and_foretold(database: Database) -> None:
    user = add_user("preparer@example.com")
    preparer = add_profile("TAX_PREPARER", userId=user, trackingCode="TGP-1")
    assign_client(add_profile(email="client@example.com"), preparer)
    for add, form in ((add_lead, "lead"), (add_intake, "intake")):
        add(f"own-{form}@example.com", assignedPreparerId=user)
        add(f"referred-{form}@example.com", referrerUsername=" tgp-1 ")
        add(f"unresolved-{form}@example.com", assignedPreparerId="gone", referrerUsername="TGP-1")
        add(f"nobodys-{form}@example.com", referrerUsername="somebody")
        add_contact(f"others-{form}@example.com")
        add(f"others-{form}@example.com", assignedPreparerId=preparer)
    counts = {"client_preparers": 1, "own": 2, "referrer": 2, "unresolved_preparer": 2}
    assert run(dry_run=True)[COUNTED] == counts
    assert run()[COUNTED] == counts
    assert assigned("client@example.com") == (preparer, ASSIGNED_AT)
    for form in ("lead", "intake"):
        assert assigned(f"own-{form}@example.com") == assigned(f"referred-{form}@example.com") == (preparer, UPDATED_AT)
        for name in ("unresolved", "nobodys", "others"):
            assert assigned(f"{name}-{form}@example.com") == (None, None)
    assert verified() == []
    updated = {"own": 2}
    assert run(update=True, dry_run=True)[COUNTED] == updated
    assert run(update=True)[COUNTED] == updated
    assert assigned("others-lead@example.com") == assigned("others-intake@example.com") == (preparer, UPDATED_AT)
    assert run(update=True)[COUNTED] == {}
    assert verified() == []


def test_a_dry_run_counts_an_assignment_once_whatever_the_batches_are(database: Database) -> None:
    """A person's later rows find the preparer that an earlier batch would have given."""
    preparers = [add_profile("TAX_PREPARER") for _ in range(2)]
    for preparer in preparers:
        add_lead("ann@example.com", assignedPreparerId=preparer)
    add_lead("bob@example.com")
    for preparer in preparers:
        add_intake(f"{'BOB' if preparer == preparers[1] else 'bob'}@example.com", assignedPreparerId=preparer)
    for batch_size in (1, 100):
        assert run(dry_run=True, batch_size=batch_size)[COUNTED] == {"own": 2}
    assert run(batch_size=1)[COUNTED] == {"own": 2}


def test_the_summary_tells_how_contacts_got_their_preparers(database: Database) -> None:
    add_profile("TAX_PREPARER", shortLinkUsername="ref")
    add_lead("referred@example.com", referrerUsername="ref")
    add_lead("unresolved@example.com", assignedPreparerId="gone")
    for arguments, verb in ((["--dry-run"], "would get"), ([], "got")):
        lines = called("backfill_crm_contacts", *arguments, "--no-progress").stdout.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("Assigned"))
        assert [line.split(maxsplit=2) for line in lines[start : start + 3]] == [
            ["Assigned", "1", f"{verb} a preparer"],
            ["referrer", "1", "the tax preparer who referred the person"],
            ["unresolved_preparer", "1", "rows whose preparer has no profile: not assigned"],
        ]


FORMS = pytest.mark.parametrize("add", [add_lead, add_intake])


@FORMS
def test_nobody_is_assigned_to_a_referrer_where_that_is_switched_off(
    database: Database, settings: Settings, add: Callable[..., str]
) -> None:
    settings.CRM_ASSIGN_TO_REFERRER = False
    preparer = add_profile("TAX_PREPARER", trackingCode="ref")
    add("ann@example.com", referrerUsername="ref")
    assert run()[COUNTED] == {}
    assert verified() == []
    assert run(update=True)["revisited"] == 0
    settings.CRM_ASSIGN_TO_REFERRER = True
    assert {finding.kind.value for finding in verified()} == {"source_changed"}
    assert run(update=True)[COUNTED] == {"referrer": 1}
    assert assigned("ann@example.com") == (preparer, UPDATED_AT)


# What operators had to mend by hand


@FORMS
def test_a_user_id_as_preparer_becomes_the_id_of_the_users_profile(database: Database, add: Callable[..., str]) -> None:
    """In a contact of ours as well as in one that others made: a preparer sees no contact with the user's id."""
    user = add_user("preparer@example.com")
    preparer = add_profile("TAX_PREPARER", userId=user)
    add("ann@example.com", assignedPreparerId=user)
    add_contact("bob@example.com")
    add("bob@example.com", assignedPreparerId=user)
    run(update=True)
    assert assigned("ann@example.com") == assigned("bob@example.com") == (preparer, UPDATED_AT)


def test_a_contact_without_a_preparer_gets_the_one_of_the_person_s_intake(database: Database) -> None:
    """Whether a lead made the contact, or others did."""
    preparer = add_profile("TAX_PREPARER")
    emails = [f"{name}@example.com" for name in ("lead", "other")]
    add_lead(emails[0])
    add_contact(emails[1])
    run()
    for email in emails:
        add_intake(email, assignedPreparerId=preparer)
    assert run()[COUNTED] == {"own": 1}
    assert run(update=True)[COUNTED] == {"own": 1}
    assert {assigned(email) for email in emails} == {(preparer, UPDATED_AT)}


def test_a_client_without_a_preparer_gets_the_one_of_client_preparers(database: Database) -> None:
    """Whether the contact is new, one that the backfill made from a lead, or one that others made."""
    preparer = add_profile("TAX_PREPARER")
    emails = [f"{name}@example.com" for name in ("new", "lead", "other")]
    add_lead(emails[1])
    add_contact(emails[2])
    run()
    for email in emails:
        assign_client(add_profile(email=email), preparer)
    assert run()[COUNTED] == {"client_preparers": 2}
    assert run(update=True)[COUNTED] == {"client_preparers": 1}
    assert {assigned(email) for email in emails} == {(preparer, ASSIGNED_AT)}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a", 0, "2025-03-01", True), ("b", 1, "2025-03-02", True)], 1),
        ([("a", 0, "2025-03-01", True), ("b", 1, "2025-03-02", False)], 0),
        ([("b", 0, "2025-03-01", True), ("a", 1, "2025-03-01", True)], 1),
        ([("a", 0, "2025-03-01", False)], None),
    ],
)
def test_of_several_preparers_of_a_client_the_active_one_who_was_assigned_last_counts(
    database: Database, rows: list[tuple[str, int, str, bool]], expected: int | None
) -> None:
    preparers = [add_profile("TAX_PREPARER") for _ in range(2)]
    client = add_profile(email="ann@example.com")
    for identifier, number, at, active in rows:
        assign_client(client, preparers[number], id=identifier, assignedAt=at, isActive=active)
    run()
    assert assigned("ann@example.com")[0] == (None if expected is None else preparers[expected])
    assert verified() == []


# What comes after the row


def a_profile_of_the_user(user: str, client: str) -> None:
    add_profile("TAX_PREPARER", userId=user)


def a_code(user: str, client: str) -> None:
    add_profile("TAX_PREPARER", customTrackingCode="REF")


def a_preparer_of_the_client(user: str, client: str) -> None:
    assign_client(client, add_profile("TAX_PREPARER"))


LATE = {"own": a_profile_of_the_user, "referrer": a_code, "client_preparers": a_preparer_of_the_client}


def three_people_without_a_preparer(add: Callable[..., str] = add_lead) -> tuple[str, str]:
    user = add_user("preparer@example.com")
    add("own@example.com", assignedPreparerId=user)
    add("referrer@example.com", referrerUsername="ref")
    return user, add_profile(email="client_preparers@example.com")


@pytest.mark.parametrize("by", LATE)
@FORMS
def test_a_preparer_who_comes_after_the_row_is_filled_by_an_update_once(
    database: Database, by: str, add: Callable[..., str]
) -> None:
    people = three_people_without_a_preparer(add)
    run()
    assert run(update=True)["revisited"] == 0
    LATE[by](*people)
    run()
    assert contact_with(f"{by}@example.com")["assignedPreparerId"] is None
    foretold = run(update=True, dry_run=True)
    report = run(update=True)
    for answer in (foretold, report):
        assert (answer["revisited"], answer["updated_by_column"], answer[COUNTED]) == (1, {"assignment": 1}, {by: 1})
    (preparer,) = {contact["assignedPreparerId"] for contact in contacts().values()} - {None}
    assert assigned(f"{by}@example.com")[0] == preparer
    assert run(update=True)["revisited"] == 0
    assert verified() == []
    called("rollback_crm_backfill", str(report["run"]), "--no-progress")
    assert contact_with(f"{by}@example.com")["assignedPreparerId"] is None


@pytest.mark.parametrize("by", LATE)
@FORMS
def test_a_preparer_whom_a_person_took_away_stays_away(database: Database, by: str, add: Callable[..., str]) -> None:
    LATE[by](*three_people_without_a_preparer(add))
    run()
    contact = contact_with(f"{by}@example.com")
    assert contact["assignedPreparerId"] is not None
    # By an application that leaves `updatedAt` as it is.
    change("crm_contacts", contact["id"], assignedPreparerId=None, assignedAt=None, updatedAt=contact["updatedAt"])
    assert run(update=True)["revisited"] == 0
    assert contact_with(f"{by}@example.com")["assignedPreparerId"] is None


@pytest.mark.parametrize("by", LATE)
@FORMS
def test_an_assignment_that_the_tables_do_not_tell_of_any_more_keeps_no_rollback(
    database: Database, by: str, add: Callable[..., str]
) -> None:
    user, client = three_people_without_a_preparer(add)
    LATE[by](user, client)
    made = run()["run"]
    for table, columns in {
        "client_preparers": """ "isActive" = false""",
        "profiles": """ "customTrackingCode" = NULL""",
    }.items():
        with connection.cursor() as cursor:
            cursor.execute(f"UPDATE {table} SET {columns}")
    called("rollback_crm_backfill", str(made), "--no-progress")
    assert contacts() == {}


# A preparer that changed from one to another


def two_preparers() -> tuple[str, str]:
    return add_profile("TAX_PREPARER", trackingCode="REF"), add_profile("TAX_PREPARER")


def by_its_own(former: str, new: str) -> tuple[str, Callable[[], None]]:
    lead = add_lead("ann@example.com", assignedPreparerId=former)
    return LATER, lambda: change("leads", lead, assignedPreparerId=new)


def by_client_preparers(former: str, new: str) -> tuple[str, Callable[[], None]]:
    """The profile does not show it."""
    client = add_profile(email="ann@example.com")
    row = assign_client(client, former)

    def reassign() -> None:
        with connection.cursor() as cursor:
            cursor.execute("""UPDATE client_preparers SET "isActive" = false WHERE id = %s""", [row])
        assign_client(client, new, assignedAt=LATER)

    return LATER, reassign


def by_a_code(former: str, new: str) -> tuple[str, Callable[[], None]]:
    """The lead does not show it: the code is another preparer's now."""
    add_lead("ann@example.com", referrerUsername="ref")

    def reassign() -> None:
        change("profiles", former, trackingCode=None)
        change("profiles", new, trackingCode="REF")

    return UPDATED_AT, reassign


def of_an_intake_by_its_own(former: str, new: str) -> tuple[str, Callable[[], None]]:
    intake = add_intake("ann@example.com", assignedPreparerId=former)
    return LATER, lambda: change("tax_intake_leads", intake, assignedPreparerId=new)


def of_an_intake_by_a_code(former: str, new: str) -> tuple[str, Callable[[], None]]:
    add_intake("ann@example.com", referrerUsername="ref")

    def reassign() -> None:
        change("profiles", former, trackingCode=None)
        change("profiles", new, trackingCode="REF")

    return UPDATED_AT, reassign


#: By the way as it is counted.
REASSIGNED = {
    "own": by_its_own,
    "client_preparers": by_client_preparers,
    "referrer": by_a_code,
    "own, of an intake": of_an_intake_by_its_own,
    "referrer, of an intake": of_an_intake_by_a_code,
}


def counted(way: str) -> dict[str, int]:
    return {way.partition(",")[0]: 1}


@pytest.mark.parametrize("by", REASSIGNED)
def test_an_update_follows_a_preparer_that_changed_and_a_rollback_restores_the_former_one(
    database: Database, by: str
) -> None:
    former, new = two_preparers()
    since, reassign = REASSIGNED[by](former, new)
    run()
    before = contacts()
    assert contact_with("ann@example.com")["assignedPreparerId"] == former
    reassign()
    assert {finding.kind.value for finding in verified()} == {"source_changed"}
    run()
    assert contacts() == before
    foretold, report = run(update=True, dry_run=True), run(update=True)
    for answer in (foretold, report):
        assert (answer["updated_by_column"], answer[COUNTED]) == ({"assignment": 1}, counted(by))
    assert assigned("ann@example.com") == (new, since)
    assert verified() == []
    assert run(update=True)["revisited"] == 0
    called("rollback_crm_backfill", str(report["run"]), "--no-progress")
    assert contacts() == before
    assert run(update=True)["updated_by_column"] == {"assignment": 1}
    assert assigned("ann@example.com") == (new, since)


@pytest.mark.parametrize("by", REASSIGNED)
@pytest.mark.parametrize(
    "edit", [{"assignedPreparerId": "by hand"}, {}, {"assignedPreparerId": None, "assignedAt": None}]
)
def test_the_preparer_of_a_contact_that_a_person_changed_stays_and_counts_as_kept_once(
    database: Database, by: str, edit: dict[str, str | None]
) -> None:
    former, new = two_preparers()
    _, reassign = REASSIGNED[by](former, new)
    run()
    change("crm_contacts", contact_with("ann@example.com")["id"], **edit)
    before = contacts()
    reassign()
    foretold, report = run(update=True, dry_run=True), run(update=True)
    for answer in (foretold, report):
        assert (answer["kept_by_column"], answer["updated"], answer[COUNTED]) == ({"assignment": 1}, 0, {})
    assert contacts() == before
    assert run(update=True)["revisited"] == 0


@pytest.mark.parametrize("by", REASSIGNED)
def test_a_contact_from_which_a_person_took_the_preparer_gets_no_other_one(database: Database, by: str) -> None:
    """Even if the application did not move `updatedAt`: no run empties an assignment."""
    former, new = two_preparers()
    _, reassign = REASSIGNED[by](former, new)
    run()
    contact = contact_with("ann@example.com")
    change("crm_contacts", contact["id"], assignedPreparerId=None, assignedAt=None, updatedAt=contact["updatedAt"])
    reassign()
    assert run(update=True)["kept_by_column"] == {"assignment": 1}
    assert assigned("ann@example.com") == (None, None)


def test_a_contact_that_others_made_follows_the_preparer_that_an_update_gave_it_until_a_person_saves_it(
    database: Database,
) -> None:
    former, new = two_preparers()
    contact = add_contact("ann@example.com")
    lead = add_lead("ann@example.com", assignedPreparerId=former)
    assert run(update=True)[COUNTED] == {"own": 1}
    change("leads", lead, assignedPreparerId=new)
    assert run(update=True)[COUNTED] == {"own": 1}
    assert assigned("ann@example.com") == (new, LATER)
    change("crm_contacts", contact)
    change("leads", lead, assignedPreparerId=former, updatedAt="2025-07-08")
    assert run(update=True)["kept_by_column"] == {"assignment": 1}
    assert assigned("ann@example.com") == (new, LATER)


def test_rows_of_an_earlier_version_are_revisited_once_and_give_back_no_preparer(database: Database) -> None:
    """Their entries do not have the preparer."""
    preparer = add_profile("TAX_PREPARER")
    assign_client(add_profile(email="ann@example.com"), preparer)
    add_lead("bob@example.com", assignedPreparerId=preparer)
    run()
    contact = contact_with("bob@example.com")
    change("crm_contacts", contact["id"], assignedPreparerId=None, assignedAt=None, updatedAt=contact["updatedAt"])
    with connection.cursor() as cursor:
        cursor.execute("UPDATE ledger_entry SET seen_preparer = NULL")
    before = contacts()
    report = run(update=True)
    assert (report["unchanged"], report["kept_by_column"]) == (1, {"assignment": 1})
    assert contacts() == before
    assert run(update=True)["revisited"] == 0


def test_a_preparer_that_was_taken_from_a_client_stays_with_the_contact(database: Database) -> None:
    former, _ = two_preparers()
    by_client_preparers(former, former)
    run()
    with connection.cursor() as cursor:
        cursor.execute("""UPDATE client_preparers SET "isActive" = false""")
    assert run(update=True)["revisited"] == 0
    assert assigned("ann@example.com") == (former, ASSIGNED_AT)


def test_a_rollback_of_the_first_of_two_reassignments_keeps_the_second(database: Database) -> None:
    first, second = two_preparers()
    third = add_profile("TAX_PREPARER")
    client = add_profile(email="ann@example.com")
    assign_client(client, first)
    run()
    runs = []
    for preparer, at in ((second, "2025-04-01"), (third, "2025-05-01")):
        assign_client(client, preparer, assignedAt=at)
        runs.append(run(update=True)["run"])
    called("rollback_crm_backfill", str(runs[0]), "--no-progress")
    assert assigned("ann@example.com")[0] == third
    called("rollback_crm_backfill", str(runs[1]), "--no-progress")
    assert assigned("ann@example.com")[0] == second
    called("rollback_crm_backfill", str(runs[0]), "--no-progress")
    assert assigned("ann@example.com") == (first, ASSIGNED_AT)


@pytest.mark.parametrize("others", [0, 1])
def test_where_many_rows_are_due_no_reassigned_one_is_missed(
    database: Database, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The rows that may be due are listed up to a number, and asked one by one above it."""
    former, new = two_preparers()
    later = []
    emails = [f"person-{number}@example.com" for number, _ in enumerate(REASSIGNED)]
    for way, email in zip(REASSIGNED.values(), emails, strict=True):
        later.append(way(former, new)[1])
        with connection.cursor() as cursor:
            for table in ("users", "leads", "tax_intake_leads"):
                cursor.execute(f"UPDATE {table} SET email = %s WHERE email = 'ann@example.com'", [email])
    run()
    monkeypatch.setattr(reader, "MAX_LISTED", others)
    for reassign in later:
        reassign()
    # The former preparer of the code has changed as well.
    assert run(update=True)[COUNTED] == {"own": 2, "client_preparers": 1, "referrer": 2}
    assert {assigned(email)[0] for email in emails} == {new}


# What the rows do not show


def test_another_preparer_in_an_unmodified_contact_is_a_defect_and_no_rollback_deletes_it(database: Database) -> None:
    """The ledger has the preparer of the row, so nothing but a fault or an unusual write explains another one."""
    former, new = two_preparers()
    by_client_preparers(former, new)
    made = run()["run"]
    contact = contact_with("ann@example.com")
    change("crm_contacts", contact["id"], assignedPreparerId=new, updatedAt=contact["updatedAt"])
    (found,) = verified()
    assert (found.kind.value, found.columns) == ("defect", ("assignedPreparerId",))
    called("rollback_crm_backfill", str(made), "--no-progress")
    assert [each["id"] for each in contacts().values()] == [contact["id"]]


def test_a_preparer_that_an_update_could_not_write_is_no_defect(database: Database) -> None:
    """The user has another contact's address by now, so the row brings this one nothing."""
    former, new = two_preparers()
    _, reassign = by_client_preparers(former, new)
    run()
    contact = contact_with("ann@example.com")
    add_contact("bob@example.com")
    with connection.cursor() as cursor:
        cursor.execute(
            """UPDATE users SET email = 'bob@example.com', "updatedAt" = '2099-01-01' WHERE email = 'ann@example.com'"""
        )
    reassign()
    assert run(update=True)["kept_by_column"] == {"identity": 1}
    assert contacts()[contact["id"]] == contact
    assert {finding.kind.value for finding in verified()} == {"source_changed"}
    assert run(update=True)["revisited"] == 0


# What a database lacks


def test_a_database_without_client_preparers_is_migrated_all_the_same(database: Database) -> None:
    assign_client(add_profile(email="ann@example.com"), add_profile("TAX_PREPARER"))
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE client_preparers RENAME TO elsewhere")
    try:
        assert (run(dry_run=True)[COUNTED], run()[COUNTED], run(update=True)[COUNTED]) == ({}, {}, {})
        assert verified() == []
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO client_preparers")
    assert {finding.kind.value for finding in verified()} == {"source_changed"}
    assert run(update=True)[COUNTED] == {"client_preparers": 1}


def test_a_database_without_codes_assigns_nobody_to_a_referrer(database: Database) -> None:
    add_profile("TAX_PREPARER", trackingCode="ref")
    add_lead("ann@example.com", referrerUsername="ref")
    columns = ("trackingCode", "customTrackingCode", "shortLinkUsername")
    with renamed("profiles", *columns):
        assert (run(dry_run=True)[COUNTED], run()[COUNTED], run(update=True)[COUNTED]) == ({}, {}, {})
        assert verified() == []


@contextmanager
def renamed(table: str, *columns: str) -> Iterator[None]:
    with connection.cursor() as cursor:
        for column in columns:
            cursor.execute(f'ALTER TABLE {table} RENAME "{column}" TO "{column} elsewhere"')
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            for column in columns:
                cursor.execute(f'ALTER TABLE {table} RENAME "{column} elsewhere" TO "{column}"')


def test_a_role_that_may_not_read_client_preparers_is_refused(database: Database) -> None:
    """As with every other table: clients without their preparers would look like clients who have none."""
    others = tuple(table for table in LEGACY_TABLES if table != "client_preparers")
    with reading_role(database, tables=others) as role, acting_as(role):
        refused = called("backfill_crm_contacts", "--dry-run")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "may not read client_preparers.id, client_preparers.clientId" in refused.stderr


# What it costs


def test_referrers_are_asked_for_once_each_and_never_row_by_row(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_profile("TAX_PREPARER", trackingCode="one")
    add_profile("AFFILIATE", trackingCode="two")
    for number in range(12):
        add_lead(f"person-{number}@example.com", referrerUsername=("one", "two", "ONE", "nobody")[number % 4])
    asked: list[set[str]] = []
    look_up = referrers._Profiles._read

    def counted(profiles: Any, condition: str, names: Any) -> Any:
        asked.append(set(names))
        return look_up(profiles, condition, names)

    monkeypatch.setattr(referrers._Profiles, "_read", counted)
    assert run(batch_size=4)[COUNTED] == {"referrer": 6}
    assert asked == [{"one", "two", "ONE", "nobody"}] * 3 + [{"one", "nobody"}]


def test_what_is_remembered_of_referrers_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrers, "MAX_KNOWN", 2)
    preparers = [add_profile("TAX_PREPARER", trackingCode=f"code {number}") for number in range(5)]
    for number in range(10):
        add_lead(f"person-{number}@example.com", referrerUsername=f"Code {number % 5}")
    assert run(batch_size=3)[COUNTED] == {"referrer": 10}
    for number in range(10):
        assert assigned(f"person-{number}@example.com")[0] == preparers[number % 5]


def test_a_preparer_whose_codes_cannot_be_read_costs_the_others_nothing(database: Database) -> None:
    preparer = add_profile("TAX_PREPARER", trackingCode="ref")
    add_profile("TAX_PREPARER", trackingCode="broken")
    add_lead("ann@example.com", referrerUsername="ref")
    add_lead("bob@example.com", referrerUsername="REF")
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE profiles RENAME TO profiles_there")
        names = database.rows(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'profiles_there'::regclass AND attnum > 0"
        )
        broken = """CASE WHEN "trackingCode" = 'broken' THEN (1 / (length("trackingCode") - 6))::text
                    ELSE "trackingCode" END"""
        columns = ", ".join(f'{broken} AS "{name}"' if name == "trackingCode" else f'"{name}"' for (name,) in names)
        cursor.execute(f"CREATE VIEW public.profiles AS SELECT {columns} FROM profiles_there")
    try:
        assert run()[COUNTED] == {"referrer": 2}
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP VIEW profiles")
            cursor.execute("ALTER TABLE profiles_there RENAME TO profiles")
    assert assigned("ann@example.com") == assigned("bob@example.com") == (preparer, UPDATED_AT)

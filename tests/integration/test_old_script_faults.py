"""What the script that this replaces got wrong, a test for each fault. And who must never become a contact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from pytest_django import Settings

from crm.backfill.read import inventory
from crm.outcome import Source
from crm.rules.mapping import contact_id, normalised
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
from tests.support.commands import run, statements
from tests.support.populations import GENERATIONS, ROLES

EARLY, LATE = "2024-01-01 00:00:00", "2024-02-01 00:00:00"
ATTRIBUTION: dict[str, Any] = {
    "referrerUsername": "ref",
    "referrerType": "AFFILIATE",
    "commissionRate": "12.50",
    "commissionRateLockedAt": EARLY,
    "attributionMethod": "cookie",
    "attributionConfidence": 85,
}


def told(reference: str) -> tuple[str | None, str | None, str | None]:
    """What the ledger says of a row: outcome, reason, contact."""
    entry = ledger()[reference]
    return entry["outcome"], entry["reason"], entry["contact_id"]


# Keys


def test_a_profile_without_any_key_becomes_a_contact_and_crashes_nothing(database: Database) -> None:
    profile = add_profile(userId=None, clerkUserId=None)
    other = add_profile(email="ann@example.com")
    assert run()["created"] == 2
    assert run()["read"] == 0
    assert {contact["id"] for contact in contacts().values()} == {
        contact_id("profiles", profile),
        contact_id("profiles", other),
    }


def test_a_profile_meets_a_contact_that_has_nothing_but_its_email(database: Database) -> None:
    contact = add_contact("ann@example.com")
    profile = add_profile(email="ann@example.com")
    answer = run()
    assert (answer["exists"], answer["created"], answer["error"]) == (1, 0, 0)
    assert told(f"profiles:{profile}") == ("exists", None, contact)


def test_two_profiles_with_one_email_in_two_spellings_do_not_make_two_contacts(database: Database) -> None:
    first = add_profile(email="ann@example.com")
    second = add_profile(email="ANN@example.com")
    assert run()["created"] == 1
    assert told(f"profiles:{second}") == ("error", "conflict", contact_id("profiles", first))


def test_no_key_masks_another_when_they_name_two_contacts(database: Database) -> None:
    user = add_user("ann@example.com")
    by_user = add_contact("old@example.com", userId=user)
    add_contact("older@example.com", clerkUserId="user_1")
    profile = add_profile(userId=user, clerkUserId="user_1")
    before = database.dump("crm_contacts")
    assert run()["by_reason"] == {"conflict": 1}
    assert told(f"profiles:{profile}") == ("error", "conflict", by_user)
    assert database.dump("crm_contacts") == before


@pytest.mark.parametrize("key", ["userId", "clerkUserId"])
def test_no_account_masks_an_email_that_belongs_to_another_contact(database: Database, key: str) -> None:
    user = add_user("ann@example.com")
    add_contact("old@example.com", **{key: user if key == "userId" else "user_1"})
    by_email = add_contact("Ann@Example.com")
    profile = add_profile(userId=user, clerkUserId="user_1")
    assert run()["by_reason"] == {"conflict": 1}
    assert told(f"profiles:{profile}") == ("error", "conflict", by_email)


def test_an_email_of_another_account_is_a_conflict(database: Database) -> None:
    stranger = add_contact("ann@example.com", userId=add_user("stranger@example.com"))
    profile = add_profile(email="ann@example.com")
    assert run()["by_reason"] == {"conflict": 1}
    assert told(f"profiles:{profile}") == ("error", "conflict", stranger)


@pytest.mark.parametrize("stored", ["Ann@Example.COM", "ANN@EXAMPLE.COM", " ann@example.com "])
@pytest.mark.parametrize("brought", ["ann@example.com", "aNN@example.com", "\tAnn@Example.com "])
def test_emails_are_compared_without_case(database: Database, stored: str, brought: str) -> None:
    contact = add_contact(stored)
    lead, profile = add_lead(brought), add_profile(email=brought)
    assert run()["exists"] == 2
    assert told(f"leads:{lead}") == told(f"profiles:{profile}") == ("exists", None, contact)
    assert contacts().keys() == {contact}


# Leads


def test_a_lead_that_meets_a_contact_of_the_backfill_keeps_its_attribution(database: Database) -> None:
    profile = add_profile(email="ann@example.com")
    add_lead("Ann@example.com", **ATTRIBUTION)
    answer = run()
    assert (answer["created"], answer["merged"]) == (1, 1)
    contact = contact_with("ann@example.com")
    assert contact["id"] == contact_id("profiles", profile)
    assert (contact["referrerUsername"], contact["referrerType"], str(contact["commissionRate"])) == (
        "ref",
        "AFFILIATE",
        "12.50",
    )
    assert (contact["attributionMethod"], contact["attributionConfidence"]) == ("cookie", 85)
    assert contact["commissionRateLockedAt"] is not None


def test_an_attribution_that_comes_in_a_later_run_is_not_lost_either(database: Database) -> None:
    add_profile(email="ann@example.com")
    run()
    add_lead("ann@example.com", **ATTRIBUTION)
    assert run()["merged"] == 1
    assert contact_with("ann@example.com")["referrerUsername"] == "ref"


def test_a_converted_lead_comes_before_an_older_active_one(database: Database) -> None:
    add_lead("ann@example.com", "NEW", createdAt=EARLY, type="AFFILIATE")
    converted = add_lead("ann@example.com", "CONVERTED", createdAt=LATE)
    answer = run()
    assert (answer["created"], answer["merged"]) == (1, 1)
    contact = contact_with("ann@example.com")
    assert (contact["id"], contact["contactType"], contact["stage"]) == (
        contact_id("leads", converted),
        "CLIENT",
        "COMPLETE",
    )


@pytest.mark.parametrize("batch_size", [1, 1000])
@pytest.mark.parametrize("moments", [(EARLY, LATE), (LATE, EARLY)])
@pytest.mark.parametrize("status", ["NEW", "CONVERTED"])
def test_the_oldest_lead_of_a_person_makes_the_contact(
    database: Database, status: str, moments: tuple[str, str], batch_size: int
) -> None:
    for moment in moments:
        name = "Old" if moment == EARLY else "Young"
        add_lead("ann@example.com", status, createdAt=moment, firstName=name, referrerUsername=name)
    run(batch_size=batch_size)
    contact = contact_with("ann@example.com")
    assert (contact["firstName"], contact["referrerUsername"]) == ("Old", "Old")


@pytest.mark.parametrize("ids", [("a1", "b2"), ("b2", "a1")])
def test_leads_of_one_moment_have_an_order_too(database: Database, ids: tuple[str, str]) -> None:
    for identifier in ids:
        add_lead("ann@example.com", id=identifier, createdAt=EARLY)
    run()
    assert contact_with("ann@example.com")["id"] == contact_id("leads", "a1")


@pytest.mark.parametrize(
    ("generation", "qualified", "disqualified"),
    [
        ("2025_10", "CONTACTED", None),
        ("2025_10_mixed", "CONTACTED", None),
        ("2025_11", "QUALIFIED", "LOST"),
        ("2025_12", "QUALIFIED", "LOST"),
    ],
)
def test_qualified_and_disqualified_do_not_become_new(
    database: Database, generation: str, qualified: str, disqualified: str | None
) -> None:
    database.use(generation)
    add_lead("q@example.com", "QUALIFIED")
    add_lead("d@example.com", "DISQUALIFIED")
    answer = run()
    stages = {contact["email"]: contact["stage"] for contact in contacts().values()}
    expected = {"q@example.com": qualified, "d@example.com": disqualified}
    assert stages == {email: stage for email, stage in expected.items() if stage}
    assert answer["excluded"] == ({} if disqualified else {"disqualified": 1})


# What is written


@pytest.mark.parametrize(
    ("role", "kind"), [("CLIENT", "client"), ("TAX_PREPARER", "preparer"), ("AFFILIATE", "affiliate")]
)
def test_a_placeholder_address_is_under_a_domain_that_cannot_exist(database: Database, role: str, kind: str) -> None:
    profile = add_profile(role)
    add_profile(role, email="  ")
    run()
    emails = {contact["id"]: contact["email"] for contact in contacts().values()}
    assert emails.pop(contact_id("profiles", profile)) == f"{kind}-{profile}@crm-backfill.invalid"
    assert all(email.endswith(".invalid") for email in emails.values())


def test_the_operator_chooses_the_domain_of_placeholders(database: Database, settings: Settings) -> None:
    settings.CRM_PLACEHOLDER_DOMAIN = "nobody.example"
    profile = add_profile()
    run()
    assert contacts()[contact_id("profiles", profile)]["email"] == f"client-{profile}@nobody.example"


@pytest.mark.parametrize("dry_run", [False, True])
def test_no_statement_returns_more_rows_than_a_batch_has(
    database: Database, monkeypatch: pytest.MonkeyPatch, *, dry_run: bool
) -> None:
    # The ids of the last few rows alone are read together, and no more of them than this.
    monkeypatch.setattr(inventory, "FEW_ROWS", 10)
    add_many_leads(120, "CONVERTED")
    add_many_leads(120, "NEW", first=61)
    for number in range(120):
        add_profile(email=f"profile-{number}@example.com")
    with statements() as sent:
        assert run(batch_size=20, dry_run=dry_run)["read"] == 360
    returned = [statement for statement in sent if statement.sql.startswith("SELECT")]
    read = [statement.rows for statement in returned if "sum(bytes)" in statement.sql]
    assert sum(read) == 360, "these are the statements that read the source rows"
    of_people = [
        statement for statement in returned if not any(name in statement.sql for name in ("pg_attribute", "pg_enum"))
    ]
    assert max(statement.rows for statement in of_people) == 20


@pytest.mark.parametrize("blank", ["", "   ", "\t\r\n", "\N{NO-BREAK SPACE}"])
def test_white_space_is_no_name(database: Database, blank: str) -> None:
    add_lead("ann@example.com", firstName=blank, lastName=f" Lee{blank} ", phone=blank)
    add_profile(email="bob@example.com", firstName=f"{blank} Bob ", lastName=blank, companyName=blank)
    run()
    ann, bob = contact_with("ann@example.com"), contact_with("bob@example.com")
    assert (ann["firstName"], ann["lastName"], ann["phone"]) == ("Unknown", "Lee", None)
    assert (bob["firstName"], bob["lastName"], bob["company"]) == ("Bob", "Unknown", None)


# Roles


@pytest.mark.parametrize("generation", GENERATIONS)
def test_each_role_of_each_generation_goes_its_own_way(database: Database, generation: str) -> None:
    database.use(generation)
    for role in ROLES[generation]:
        add_profile(role, email=f"{role}-{role.isupper()}@example.com")
    answer = run()
    rows = Counter(role.lower() for role in ROLES[generation])
    assert answer["created_by_type"] == {
        "AFFILIATE": rows["affiliate"],
        "CLIENT": rows["client"],
        "PREPARER": rows["tax_preparer"],
    }
    assert answer["excluded"] == +Counter({name: rows[name] for name in ("super_admin", "admin", "lead")})
    assert answer["error"] == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("options", [{}, {"only": (Source.CLIENTS,)}, {"batch_size": 1}, {"limit": 100}])
def test_the_house_never_becomes_a_contact(
    database: Database, generation: str, options: dict[str, Any], *, dry_run: bool
) -> None:
    database.use(generation)
    house = [role for role in ROLES[generation] if role.upper() in ("SUPER_ADMIN", "ADMIN", "LEAD")]
    for role in house:
        add_profile(role, email=f"{role}-{role.isupper()}@example.com")
        add_profile(role, **({} if "2025_10" in generation else {"userId": add_user(f"no-{role}@example.com")}))
    answer = run(dry_run=dry_run, **options)
    assert contacts() == {}
    assert ledger() == {}
    assert (answer["read"], sum(answer["excluded"].values())) == (0, 2 * len(house))


@pytest.mark.parametrize("spelling", ["super admin", "Super-Admin", "sUPER_aDMIN", "Admin", "aDMIN", "Lead"])
def test_a_spelling_that_somebody_added_by_hand_is_excluded_too(database: Database, spelling: str) -> None:
    database.change(f"ALTER TYPE \"UserRole\" ADD VALUE '{spelling}'")
    add_profile(spelling, email="root@example.com")
    answer = run()
    assert (answer["read"], answer["excluded"]) == (0, {normalised(spelling).lower(): 1})
    assert (contacts(), ledger()) == ({}, {})


@pytest.mark.parametrize("label", ["SUPERADMIN", "OWNER", "super_admin_2"])
def test_a_role_that_nobody_knows_is_an_error_and_never_a_client(database: Database, label: str) -> None:
    database.change(f"ALTER TYPE \"UserRole\" ADD VALUE '{label}'")
    profile = add_profile(label, email="root@example.com")
    assert run()["by_reason"] == {"unknown_role": 1}
    assert contacts() == {}
    assert told(f"profiles:{profile}") == ("error", "unknown_role", None)


def test_an_admin_who_becomes_a_client_is_migrated_by_the_next_run(database: Database) -> None:
    profile = add_profile("ADMIN", email="ann@example.com")
    assert run()["read"] == 0
    database.rows("UPDATE profiles SET role = 'CLIENT' WHERE id = %s RETURNING id", profile)
    assert run()["created"] == 1

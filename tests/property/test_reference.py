"""The judge is judged: every rule as an example that a reader can check by eye."""

from __future__ import annotations

import dataclasses
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.populations import GENERATIONS, HAS_CLERK_USER_ID, STAGE_LABELS, aftermaths, populations
from tests.support.reference import (
    ATTRIBUTION,
    CONTACT_COLUMNS,
    NULLABLE_ATTRIBUTION,
    SIGNUP_SOURCES,
    SOURCES,
    TABLES,
    Entry,
    Population,
    Rejected,
    Result,
    Row,
    backfill,
    contact_id_of,
    exclusion,
    source_of,
    valid_email,
)
from tests.support.rule_examples import (
    CONTACT_IDS,
    EMAILS,
    EXAMPLES,
    PLACEHOLDER_DOMAIN,
    PREPARERS_BY_CODE,
    SUPER_ADMIN,
    Example,
)

DAY = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=number) for number in range(10)]
NO_ATTRIBUTION: Row = {**dict.fromkeys(NULLABLE_ATTRIBUTION), "attributionConfidence": 100}
REFERRED: Row = {
    "referrerUsername": "ref",
    "referrerType": "AFFILIATE",
    "commissionRate": Decimal("12.50"),
    "commissionRateLockedAt": DAY[1],
    "attributionMethod": "cookie",
    "attributionConfidence": 85,
}
ALSO_REFERRED: Row = {**REFERRED, "referrerUsername": "other", "attributionConfidence": 90}


def user(identifier: str = "u1", email: str = "ann@example.com") -> Row:
    return {"id": identifier, "email": email, "createdAt": DAY[0], "updatedAt": DAY[0]}


def profile(identifier: str = "p1", role: str = "CLIENT", **columns: Any) -> Row:
    row: Row = {"id": identifier, "role": role, "userId": None, "clerkUserId": None, "phone": None, "companyName": None}
    row |= {"firstName": "Ann", "lastName": "Lee", "createdAt": DAY[0], "updatedAt": DAY[1]}
    return row | columns


def lead(identifier: str = "l1", email: str = "ann@example.com", **columns: Any) -> Row:
    row: Row = {
        "id": identifier,
        "email": email,
        "type": "CUSTOMER",
        "status": "NEW",
        "firstName": "Ann",
        "lastName": "Lee",
    }
    row |= {"phone": "", "source": None, "assignedPreparerId": None, "lastContactedAt": None, **NO_ATTRIBUTION}
    return row | {"createdAt": DAY[0], "updatedAt": DAY[2]} | columns


def intake(identifier: str = "i1", email: str = "ann@example.com", **columns: Any) -> Row:
    """An intake of a generation that has no more columns than all of them have."""
    row: Row = {"id": identifier, "email": email, "first_name": "Ann", "last_name": "Lee", "phone": "555 0100"}
    return row | {"created_at": DAY[0], "updated_at": DAY[2]} | columns


def contact(identifier: str = "k1", email: str = "ann@example.com", **columns: Any) -> Row:
    row: Row = {**dict.fromkeys(CONTACT_COLUMNS), "id": identifier, "email": email, "contactType": "LEAD"}
    row |= {"firstName": "There", "lastName": "Before", "stage": "NEW", "attributionConfidence": 100}
    return row | {"stageEnteredAt": DAY[5], "createdAt": DAY[5], "updatedAt": DAY[5]} | columns


def run(
    *rows: Row, generation: str = "2025_10", ledger: dict[str, Entry] | None = None, only: set[str] | None = None
) -> Result:
    """Run on rows as the builders above make them; each is recognised by its columns."""
    return backfill(population_of(*rows, generation=generation), ledger=ledger, only=only)


def population_of(*rows: Row, generation: str = "2025_10") -> Population:
    return Population(
        generation=generation,
        stages=STAGE_LABELS[generation],
        has_clerk_user_id=generation in HAS_CLERK_USER_ID,
        users=[row for row in rows if len(row) == len(user())],
        profiles=[row for row in rows if "role" in row],
        client_preparers=[row for row in rows if "clientId" in row],
        leads=[row for row in rows if "status" in row],
        tax_intake_leads=[row for row in rows if "first_name" in row],
        contacts=[row for row in rows if "stage" in row],
    )


def outcomes(result: Result) -> dict[str, str | None]:
    return {reference: entry["reason"] or entry["outcome"] for reference, entry in result.ledger.items()}


def made_by(result: Result, reference: str) -> Row:
    return result.contacts[contact_id_of(reference)]


# Which rows, and as what


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_row_becomes_what_the_examples_say(example: Example) -> None:
    row = dict(example.row)
    population = Population("2025_10", example.stages, has_clerk_user_id=True)
    if "role" in row:
        email, preparer, assigned_at = (row.pop(name) for name in ("email", "preparerId", "assignedAt"))
        row["email"] = row.pop("ownEmail")
        population.profiles.append(row)
        population.users.extend([] if email is None else [user(row["userId"], email)])
        if preparer is not None:
            columns = {"clientId": row["id"], "preparerId": preparer, "assignedAt": assigned_at}
            population.client_preparers.append({"id": "a", **columns, "isActive": True})
    elif "name" in row:
        population.users.append(row)
    else:
        (population.leads if "status" in row else population.tax_intake_leads).append(row)
    ((code, preparer),) = PREPARERS_BY_CODE.items()
    population.profiles.append(profile(preparer, "TAX_PREPARER", userId="user9", trackingCode=code))
    result = backfill(population, placeholder_domain=PLACEHOLDER_DOMAIN, with_signups=True)
    ((reference, line),) = ((key, line) for key, line in result.ledger.items() if key.endswith(f":{row['id']}"))
    assert line["source"] == example.source
    types = Counter({"PREPARER": 1})
    if isinstance(example.expected, str):
        assert (line["outcome"], line["reason"], line["contact_id"]) == ("error", example.expected, None)
        assert (result.counts.created_by_type, result.counts.by_reason) == (types, {example.expected: 1})
        return
    made = made_by(result, reference)
    assert {column: made[column] for column in example.expected} == example.expected
    assert result.counts.created_by_type == types + Counter([made["contactType"]])


@pytest.mark.parametrize(("raw", "email"), EMAILS)
def test_an_email_is_trimmed_lower_cased_and_checked(raw: str, email: str | None) -> None:
    if email is None:
        with pytest.raises(Rejected, match="invalid_email"):
            valid_email(raw)
    else:
        assert valid_email(raw) == email


@pytest.mark.parametrize(("row", "identifier"), CONTACT_IDS.items())
def test_a_contact_id_is_a_known_function_of_the_row(row: tuple[str, str], identifier: str) -> None:
    assert contact_id_of(":".join(row)) == identifier


@pytest.mark.parametrize("role", SUPER_ADMIN)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_super_admin_never_becomes_a_contact(role: str, generation: str) -> None:
    result = run(user(), profile(role=role, userId="u1"), generation=generation)
    assert (result.contacts, result.ledger, result.counts.read) == ({}, {}, 0)
    assert result.counts.excluded == {"super_admin": 1}


def test_admins_and_people_who_signed_up_are_excluded_by_reason() -> None:
    rows = [user("u1"), user("u2", "b@b.io"), profile("p1", "ADMIN", userId="u1"), profile("p2", "lead")]
    result = run(*rows, profile("p3", "LEAD"))
    assert result.counts.excluded == {"admin": 1, "lead": 2, "no_profile": 1}
    assert not result.ledger


# People who signed up


def with_signups(*rows: Row, ledger: dict[str, Entry] | None = None) -> Result:
    return backfill(population_of(*rows), ledger=ledger, with_signups=True)


def test_people_who_signed_up_come_after_all_others() -> None:
    rows = [user("u1", "a@a.io"), user("u2", "b@b.io"), profile("p1", "LEAD", userId="u1")]
    result = with_signups(*rows, lead("l1", "a@a.io"), intake("i1", "b@b.io"))
    assert outcomes(result) == {
        "leads:l1": "created",
        "tax_intake_leads:i1": "created",
        "profiles:p1": "merged",
        "users:u2": "merged",
    }
    assert (made_by(result, "leads:l1")["userId"], made_by(result, "tax_intake_leads:i1")["userId"]) == ("u1", "u2")
    assert not result.counts.excluded


def test_a_profile_that_comes_later_meets_the_contact_of_its_user_whatever_became_of_its_keys() -> None:
    first = with_signups(user())
    made = made_by(first, "users:u1")
    for changed in ({}, {"email": "new@example.com"}, {"email": "new@example.com", "userId": None}):
        result = run(user(), profile(userId="u1"), made | changed, ledger=first.ledger)
        assert (outcomes(result)["profiles:p1"], len(result.contacts)) == ("merged", 1)
    before = contact()
    linked = with_signups(user(), before)
    assert outcomes(linked) == {"users:u1": "exists"}
    moved = before | {"email": "new@example.com"}
    result = run(user(), profile(userId="u1"), moved, ledger=linked.ledger)
    assert (outcomes(result)["profiles:p1"], result.contacts) == ("exists", {"k1": moved})


def test_a_lead_that_comes_later_meets_the_contact_of_the_user_with_its_address() -> None:
    first = with_signups(user(), contact(email="other@example.com", userId="u1"))
    result = run(user(), lead(email="ANN@example.com"), *first.contacts.values(), ledger=first.ledger)
    assert result.ledger["leads:l1"]["contact_id"] == "k1"


def test_who_was_migrated_as_a_signup_stays_accounted_for() -> None:
    rows = [user("u1"), user("u2", "b@b.io"), profile("p1", "LEAD", userId="u2")]
    first = with_signups(*rows)
    without = run(*rows, user("u3", "c@c.io"), *first.contacts.values(), ledger=first.ledger)
    assert (without.counts.excluded, without.counts.read, without.counts.already) == ({"no_profile": 1}, 0, 0)
    again = with_signups(*rows, *first.contacts.values(), ledger=first.ledger)
    assert (again.counts.excluded, again.counts.read, again.counts.already) == ({}, 0, 2)


# Stages


def test_a_disqualified_lead_is_excluded_before_its_faults_are_seen_where_there_is_no_stage_for_it() -> None:
    result = run(lead(status="DISQUALIFIED", email="nonsense"))
    assert (result.counts.excluded, result.ledger) == ({"disqualified": 1}, {})


# Columns


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("p1", "p1"), ("u1", "p1"), ("gone", None)],
)
def test_an_assigned_preparer_is_a_profile_id_even_if_a_user_id_was_stored(stored: str, expected: str) -> None:
    result = run(user(email="b@b.io"), profile(role="ADMIN", userId="u1"), lead(assignedPreparerId=stored))
    assert assignment(result, "leads:l1") == (expected, DAY[2] if expected else None)
    counted = "own" if expected else "unresolved_preparer" if stored == "gone" else None
    assert result.counts.assignments == ({counted: 1} if counted else {})


def assignment(result: Result, reference: str) -> tuple[Any, Any]:
    made = made_by(result, reference)
    return made["assignedPreparerId"], made["assignedAt"]


def of_client(identifier: str, preparer: str, day: int, *, active: bool = True) -> Row:
    row: Row = {"id": identifier, "clientId": "p1", "preparerId": preparer}
    return row | {"assignedAt": DAY[day], "isActive": active}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([of_client("a", "p2", 3), of_client("b", "p3", 4)], ("p3", DAY[4])),
        ([of_client("a", "p2", 3), of_client("b", "p3", 4, active=False)], ("p2", DAY[3])),
        ([of_client("b", "p2", 3), of_client("a", "p3", 3)], ("p3", DAY[3])),
        ([of_client("a", "p2", 3, active=False)], (None, None)),
        ([of_client("a", "gone", 4), of_client("b", "p2", 3)], (None, None)),
        ([of_client("a", "u2", 4)], ("p2", DAY[4])),
    ],
)
def test_a_client_has_the_active_preparer_who_was_assigned_last(rows: list[Row], expected: tuple[Any, Any]) -> None:
    others = [user("u2", "b@b.io"), profile("p2", "TAX_PREPARER", userId="u2"), profile("p3", "TAX_PREPARER")]
    result = run(profile(), *others, *rows)
    assert assignment(result, "profiles:p1") == expected
    is_unresolved = rows[0]["preparerId"] == "gone"
    by = "client_preparers" if expected[0] else "unresolved_preparer" if is_unresolved else None
    assert result.counts.assignments == ({by: 1} if by else {})


def test_only_clients_have_preparers() -> None:
    result = run(profile(role="AFFILIATE"), profile("p2", "TAX_PREPARER"), of_client("a", "p2", 3))
    assert assignment(result, "profiles:p1") == (None, None)


def test_a_clients_preparer_comes_before_that_of_a_lead_and_fills_the_contact_of_an_earlier_one() -> None:
    people = [user(), profile(userId="u1"), profile("p2", "TAX_PREPARER"), profile("p3", "TAX_PREPARER")]
    rows = [*people, of_client("a", "p2", 3)]
    assert assignment(run(*rows, lead(assignedPreparerId="p3")), "profiles:p1") == ("p2", DAY[3])
    first = run(lead())
    later = run(*rows, lead(), *first.contacts.values(), ledger=first.ledger)
    assert assignment(later, "leads:l1") == ("p2", DAY[3])
    assert later.counts.assignments == {"client_preparers": 1}


@pytest.mark.parametrize(
    ("username", "codes", "expected"),
    [
        ("ann", {"p2": {"trackingCode": "ann"}}, "p2"),
        (" Ann\t", {"p2": {"shortLinkUsername": "\u2003aNN"}}, "p2"),
        ("René", {"p2": {"trackingCode": "RENÉ"}}, None),
        ("ann", {"p2": {"trackingCode": "ANN"}, "p3": {"shortLinkUsername": "ann"}}, "p3"),
        ("ann", {"p2": {"shortLinkUsername": "ann"}, "p3": {"customTrackingCode": "ann"}}, "p3"),
        ("ann", {"p2": {"customTrackingCode": "ann"}, "p3": {"trackingCode": "ann"}}, "p3"),
        ("ann", {"p2": {"trackingCode": "ANN"}, "p3": {"trackingCode": "Ann"}}, "p2"),
        ("ann", {"p1": {"trackingCode": "ann"}}, None),
        ("ann", {"p1": {"trackingCode": "ann"}, "p2": {"trackingCode": "ANN"}}, None),
        ("ann", {"p1": {"trackingCode": "ann"}, "p2": {"shortLinkUsername": "ann"}}, "p2"),
        ("ann", {}, None),
        (" ", {"p2": {"trackingCode": " "}}, None),
        (None, {"p2": {"trackingCode": ""}}, None),
    ],
)
def test_a_lead_without_a_preparer_gets_the_one_who_referred_it(
    username: str | None, codes: dict[str, Row], expected: str | None
) -> None:
    people = [
        profile(identifier, "AFFILIATE" if identifier == "p1" else "TAX_PREPARER", **of_theirs)
        for identifier, of_theirs in codes.items()
    ]
    result = run(*people, lead(referrerUsername=username))
    assert assignment(result, "leads:l1") == (expected, DAY[2] if expected else None)
    assert result.counts.assignments == ({"referrer": 1} if expected else {})
    switched_off = dataclasses.replace(population_of(*people, lead(referrerUsername=username)))
    switched_off = dataclasses.replace(switched_off, assigns_to_referrer=False)
    assert assignment(backfill(switched_off), "leads:l1") == (None, None)


def test_a_lead_whose_own_preparer_is_nobody_waits_for_that_one() -> None:
    result = run(
        profile("p2", "TAX_PREPARER", trackingCode="ref"), lead(assignedPreparerId="gone", referrerUsername="ref")
    )
    assert assignment(result, "leads:l1") == (None, None)
    assert result.counts.assignments == {"unresolved_preparer": 1}


def test_a_database_without_clerk_ids_has_none() -> None:
    row = profile()
    del row["clerkUserId"]
    assert made_by(run(row, generation="2025_11"), "profiles:p1")["clerkUserId"] is None


# Identity of a profile


@pytest.mark.parametrize(
    "columns",
    [
        {"email": "other@example.com", "userId": "u1"},
        {"email": "other@example.com", "clerkUserId": "user_1"},
        {"email": "ANN@example.com"},
        {"email": "ann@example.com", "userId": "u1", "clerkUserId": "user_1"},
        {"email": "other@example.com", "userId": "u1", "clerkUserId": "user_9"},
    ],
)
def test_any_key_of_a_profile_finds_a_contact_that_others_made_and_leaves_it_alone(columns: Row) -> None:
    before = contact() | columns
    result = run(user(), profile(userId="u1", clerkUserId="user_1", phone="1", companyName="Lee Ltd"), before)
    assert result.contacts == {"k1": before}
    assert result.ledger["profiles:p1"] == {
        "source": "clients",
        "outcome": "exists",
        "reason": None,
        "contact_id": "k1",
        "keys": None,
    }


@pytest.mark.parametrize(
    ("contacts", "named", "keys"),
    [
        ([{"userId": "u1", "email": "a@a.io"}, {"clerkUserId": "user_1", "email": "b@b.io"}], "k1", ("k1", "k2", None)),
        ([{"clerkUserId": "user_1", "email": "b@b.io"}, {"userId": "u1", "email": "a@a.io"}], "k2", ("k2", "k1", None)),
        ([{"userId": "u1", "email": "a@a.io"}, {}], "k2", ("k1", None, "k2")),
        ([{"clerkUserId": "user_1", "email": "a@a.io"}, {"email": "Ann@example.com"}], "k2", (None, "k1", "k2")),
        ([{"userId": "u9"}], "k1", (None, None, "k1")),
        ([{"clerkUserId": "user_9"}], "k1", (None, None, "k1")),
        ([{"clerkUserId": "user_9", "userId": "u1"}], "k1", ("k1", None, "k1")),
    ],
    ids=["user-vs-clerk", "clerk-vs-user", "user-vs-email", "clerk-vs-email", "other-user", "other-clerk", "own-email"],
)
def test_keys_that_name_two_accounts_are_a_conflict_that_says_where_each_key_leads(
    contacts: list[Row], named: str, keys: tuple[str | None, str | None, str | None]
) -> None:
    before = [contact(f"k{number}") | columns for number, columns in enumerate(contacts, start=1)]
    result = run(user(), profile(userId="u1", clerkUserId="user_1"), *before)
    assert list(result.contacts.values()) == before
    expected = {"source": "clients", "outcome": "error", "reason": "conflict", "contact_id": named}
    by_key = dict(zip(("userId", "clerkUserId", "email"), keys, strict=True))
    assert result.ledger == {"profiles:p1": {**expected, "keys": by_key}}


def test_of_several_spellings_a_conflict_names_the_one_to_which_another_key_leads_and_the_row_s_own_contact() -> None:
    own = contact(contact_id_of("profiles:p1"), "moved@example.com")
    spellings = [contact("k1"), contact("k2", "Ann@example.com", userId="u1", clerkUserId="user_9")]
    result = run(user(), profile(userId="u1", clerkUserId="user_1"), *spellings, own)
    assert result.ledger["profiles:p1"]["contact_id"] == "k2"
    assert result.ledger["profiles:p1"]["keys"] == {
        "userId": "k2",
        "clerkUserId": None,
        "email": "k2",
        "id": own["id"],
    }


def test_an_account_on_the_contact_alone_is_no_conflict() -> None:
    assert outcomes(run(user(), profile(userId="u1"), contact(clerkUserId="user_9"))) == {"profiles:p1": "exists"}


def test_two_profiles_whose_emails_differ_by_case_are_two_accounts() -> None:
    users = [user("u1"), user("u2", "ANN@EXAMPLE.COM")]
    result = run(*users, profile("p1", userId="u1"), profile("p2", userId="u2"))
    assert outcomes(result) == {"profiles:p1": "created", "profiles:p2": "conflict"}
    assert result.ledger["profiles:p2"]["contact_id"] == contact_id_of("profiles:p1")


def test_profiles_go_by_source_then_id() -> None:
    users = [user("u1"), user("u2", "ANN@EXAMPLE.COM"), user("u3", "Ann@example.com")]
    older, younger = profile("p3", userId="u3"), profile("p2", userId="u2", createdAt=DAY[9])
    result = run(*users, older, younger, profile("p1", "AFFILIATE", userId="u1"))
    assert outcomes(result) == {"profiles:p2": "created", "profiles:p3": "conflict", "profiles:p1": "conflict"}


def test_of_contacts_that_differ_by_case_the_lower_one_is_met_then_the_oldest_then_the_first_id() -> None:
    exact, upper = contact("k3"), contact("k2", "ANN@EXAMPLE.COM", createdAt=DAY[4])
    title, padded = contact("k1", "Ann@Example.com"), contact("k0", " ann@example.com ")
    assert run(lead(), title, upper, exact, padded).ledger["leads:l1"]["contact_id"] == "k3"
    assert run(lead(), title, padded, upper).ledger["leads:l1"]["contact_id"] == "k2"
    assert run(lead(), title, padded).ledger["leads:l1"]["contact_id"] == "k0"


def test_a_placeholder_address_meets_the_contact_that_has_it() -> None:
    assert outcomes(run(profile(), contact(email="Client-P1@crm-backfill.invalid"))) == {"profiles:p1": "exists"}


# Leads that meet contacts


def test_of_two_leads_of_one_person_the_converted_one_wins_even_if_it_is_younger() -> None:
    result = run(lead("l1"), lead("l2", status="CONVERTED", createdAt=DAY[9]))
    assert outcomes(result) == {"leads:l1": "merged", "leads:l2": "created"}
    assert [(row["id"], row["stage"]) for row in result.contacts.values()] == [(contact_id_of("leads:l2"), "COMPLETE")]


def test_otherwise_the_oldest_lead_wins_and_the_id_breaks_a_tie() -> None:
    assert outcomes(run(lead("l1", createdAt=DAY[1]), lead("l2")))["leads:l2"] == "created"
    assert outcomes(run(lead("l2"), lead("l1")))["leads:l1"] == "created"


def test_a_lead_that_meets_a_contact_which_others_made_leaves_it_alone() -> None:
    before = contact(email="ANN@example.com")
    result = run(lead(phone="1", **REFERRED), before)
    assert result.contacts == {"k1": before}
    assert outcomes(result) == {"leads:l1": "exists"}


def test_a_lead_fills_the_blanks_of_a_contact_that_the_backfill_made_and_nothing_else() -> None:
    columns: Row = {"phone": "1", "source": "web", "lastContactedAt": DAY[3], "assignedPreparerId": "p9"}
    preparer = profile("p9", "ADMIN")
    result = run(
        *(user(), profile(userId="u1"), preparer),
        lead(email=" ANN@example.com", firstName="Anna", **columns, **REFERRED),
    )
    alone = made_by(run(user(), profile(userId="u1")), "profiles:p1")
    filled = {"phone": "1", "lastContactedAt": DAY[3], "assignedPreparerId": "p9", "assignedAt": DAY[2], **REFERRED}
    assert result.contacts == {alone["id"]: alone | filled}
    assert outcomes(result) == {"profiles:p1": "created", "leads:l1": "merged"}


def test_what_is_there_is_not_filled() -> None:
    first: Row = {"phone": "1", "lastContactedAt": DAY[3], "assignedPreparerId": "p9", **REFERRED}
    second: Row = {"phone": "2", "lastContactedAt": DAY[4], "assignedPreparerId": "p8", **ALSO_REFERRED}
    preparers = [profile("p8", "ADMIN"), profile("p9", "ADMIN")]
    result = run(*preparers, lead("l1", **first), lead("l2", createdAt=DAY[1], **second))
    assert result.contacts == run(*preparers, lead("l1", **first)).contacts


DIRECT: Row = {**NO_ATTRIBUTION, "commissionRate": Decimal("0.00"), "attributionMethod": "direct"}


@pytest.mark.parametrize("nobody", [None, "", " "])
def test_an_attribution_without_a_referrer_is_none_and_is_filled_as_a_unit(nobody: str | None) -> None:
    direct = DIRECT | {"referrerUsername": nobody}
    filled = run(lead("l1", **direct), lead("l2", createdAt=DAY[1], **REFERRED))
    assert {key: made_by(filled, "leads:l1")[key] for key in ATTRIBUTION} == REFERRED
    kept = run(lead("l1"), lead("l2", createdAt=DAY[1], **direct))
    assert {key: made_by(kept, "leads:l1")[key] for key in ATTRIBUTION} == NO_ATTRIBUTION


def test_a_rate_that_is_missing_comes_from_the_same_referrer_alone() -> None:
    without = REFERRED | {"commissionRate": None, "commissionRateLockedAt": None}
    theirs = lead("l3", createdAt=DAY[3], **(REFERRED | {"referrerUsername": " REF", "attributionMethod": "other"}))
    result = run(lead("l1", **without), lead("l2", createdAt=DAY[1], **ALSO_REFERRED), theirs)
    assert {key: made_by(result, "leads:l1")[key] for key in ATTRIBUTION} == REFERRED


def test_a_lead_without_attribution_does_not_bring_its_confidence() -> None:
    result = run(lead("l1"), lead("l2", createdAt=DAY[1], attributionConfidence=7))
    assert made_by(result, "leads:l1")["attributionConfidence"] == 100


def test_the_first_lead_that_has_something_fills_it() -> None:
    later = [lead("l2", createdAt=DAY[1], **REFERRED), lead("l3", createdAt=DAY[3], phone="3", **ALSO_REFERRED)]
    made = made_by(run(lead("l1"), *later), "leads:l1")
    assert (made["referrerUsername"], made["phone"]) == ("ref", "3")


# Later runs


def test_a_second_run_changes_nothing() -> None:
    rows = [user(), profile(userId="u1"), profile("p2", "ADMIN"), lead(), lead("l2", "nonsense"), lead("l3", "b@b.io")]
    first = run(*rows, contact(email="b@b.io"))
    second = run(*rows, *first.contacts.values(), ledger=first.ledger)
    assert (second.contacts, second.ledger) == (first.contacts, first.ledger)
    counts = second.counts
    assert (counts.already, counts.read, counts.error, counts.error_new) == (3, 1, 1, 0)
    assert counts.excluded == {"admin": 1}


def test_a_profile_that_comes_after_its_lead_fills_the_keys_too() -> None:
    first = run(lead(**REFERRED))
    account = profile(userId="u1", clerkUserId="user_1", phone="1", companyName="Lee Ltd", firstName="Anna")
    second = run(user(), account, lead(**REFERRED), *first.contacts.values(), ledger=first.ledger)
    filled = {"userId": "u1", "clerkUserId": "user_1", "phone": "1", "company": "Lee Ltd"}
    assert second.contacts == {contact_id_of("leads:l1"): made_by(first, "leads:l1") | filled}
    assert outcomes(second)["profiles:p1"] == "merged"


def test_a_contact_that_was_deleted_stays_deleted() -> None:
    first = run(lead())
    second = run(lead(), ledger=first.ledger)
    assert (second.contacts, second.ledger, second.counts.already) == ({}, first.ledger, 1)


def test_what_people_changed_stays_although_the_row_says_otherwise() -> None:
    first = run(lead())
    edited = made_by(first, "leads:l1") | {"email": "new@example.com", "lastName": "Changed"}
    second = run(lead(status="CONVERTED"), edited, ledger=first.ledger)
    assert second.contacts == {edited["id"]: edited}


def test_an_error_is_tried_again_and_is_new_only_if_the_reason_is() -> None:
    first = run(user(email="nonsense"), profile(userId="u1"))
    assert first.counts.error_new == 1
    other_fault = run(user(), profile(userId="u1"), contact(userId="u9"), ledger=first.ledger)
    assert (other_fault.counts.by_reason, other_fault.counts.error_new) == ({"conflict": 1}, 1)
    mended = run(user(), profile(userId="u1"), ledger=other_fault.ledger)
    assert outcomes(mended) == {"profiles:p1": "created"}


def test_a_pending_profile_that_became_a_client_is_migrated_by_the_next_run() -> None:
    first = run(profile(role="LEAD"))
    assert outcomes(run(profile(role="CLIENT"), ledger=first.ledger)) == {"profiles:p1": "created"}


def test_a_row_finds_its_own_contact_again_when_the_ledger_was_lost() -> None:
    made = made_by(run(lead()), "leads:l1")
    moved = made | {"email": "new@example.com"}
    for there in (made, moved):
        result = run(lead(phone="1"), there)
        assert outcomes(result) == {"leads:l1": "merged"}
        assert result.contacts == {made["id"]: there | {"phone": "1"}}


def test_only_some_sources() -> None:
    result = run(profile(), profile("p2", "ADMIN"), lead(), lead("l2", "b@b.io", status="CONVERTED"), only={"clients"})
    assert outcomes(result) == {"profiles:p1": "created"}
    assert (result.counts.read, result.counts.excluded) == (1, {"admin": 1})


def test_no_more_rows_than_the_limit_are_looked_at_and_settled_ones_do_not_count() -> None:
    rows = [profile(), lead(email="b@b.io"), lead("l2", "nonsense"), lead("l3", "c@c.io")]
    first = backfill(population_of(*rows), limit=2)
    assert outcomes(first) == {"profiles:p1": "created", "leads:l1": "created"}
    second = backfill(population_of(*rows, *first.contacts.values()), ledger=first.ledger, limit=1)
    assert (outcomes(second)["leads:l2"], second.counts.read, second.counts.already) == ("invalid_email", 1, 2)


# Intakes


def test_an_unqualified_intake_is_excluded_where_there_is_no_stage_for_it() -> None:
    result = run(intake(email="nonsense", unqualified=True))
    assert (result.counts.excluded, result.ledger) == ({"unqualified": 1}, {})


def test_an_intake_is_its_profile_s_whatever_its_address() -> None:
    result = run(
        user(),
        profile(userId="u1"),
        intake(email="other@example.com", profileId="p1"),
        contact(email="other@example.com"),
    )
    assert outcomes(result) == {"profiles:p1": "created", "tax_intake_leads:i1": "merged"}


def test_an_intake_goes_by_its_address_where_its_profile_has_no_contact() -> None:
    gone = run(user(), profile(userId="u1")).ledger
    for rows, ledger in (([profile(role="ADMIN")], None), ([], None), ([profile(userId="u1"), user()], gone)):
        result = run(*rows, intake(email="b@b.io", profileId="p1"), contact(email="b@b.io"), ledger=ledger)
        assert result.ledger["tax_intake_leads:i1"]["contact_id"] == "k1"


def test_of_leads_and_intakes_those_that_converted_come_first_and_leads_before_intakes() -> None:
    open_rows = [lead("l1"), intake("i1")]
    converted = [lead("l2", status="CONVERTED"), intake("i2", convertedToClient=True)]
    made = [contact_id_of(row) for row in ("leads:l2", "tax_intake_leads:i2", "leads:l1", "tax_intake_leads:i1")]
    assert list(run(*open_rows, *converted).contacts) == made[:1]
    assert list(run(*open_rows, *converted[1:]).contacts) == made[1:2]
    assert list(run(*open_rows).contacts) == made[2:3]
    assert list(run(intake("i0", created_at=DAY[1]), intake("i1")).contacts) == made[3:]


def test_of_several_intakes_of_a_person_the_latest_says_who_the_preparer_is() -> None:
    first, second = intake("i1", assignedPreparerId="p8"), intake("i2", created_at=DAY[1], assignedPreparerId="p9")
    last = intake("i3", created_at=DAY[9], assignedPreparerId=" ", referrerUsername="seven")
    preparers = [
        profile("p7", "TAX_PREPARER", trackingCode="seven"),
        *(profile(i, "TAX_PREPARER") for i in ("p8", "p9")),
    ]

    def preparer(made: str, *rows: Row) -> str | None:
        named: str | None = made_by(run(*preparers, *rows), made)["assignedPreparerId"]
        return named

    assert preparer("tax_intake_leads:i1", first, second, last) == "p9"
    # Whichever comes first, and whoever referred the person.
    assert preparer("tax_intake_leads:i3", first, second, last | {"convertedToClient": True}) == "p9"
    assert preparer("tax_intake_leads:i3", last) == "p7"
    of_profile = [first | {"profileId": "p1"}, second | {"profileId": "p1", "email": "b@b.io"}]
    assert preparer("profiles:p1", profile(), *of_profile) == "p9"


# Resolutions


def resolve(*rows: Row, **resolutions: tuple[str | None, str | None]) -> Result:
    return backfill(population_of(*rows), resolutions={f"profiles:{row}": made for row, made in resolutions.items()})


def test_a_row_that_belongs_to_a_contact_is_merged_or_linked_and_leaves_the_accounts_of_others() -> None:
    account = profile(userId="u1", clerkUserId="user_1")
    others = [contact("k1", "b@b.io"), contact("k2", "c@c.io", userId="u1")]
    linked = resolve(user(), account, *others, p1=("k1", None))
    assert linked.ledger["profiles:p1"]["contact_id"] == "k1"
    assert list(linked.contacts.values()) == others
    merged = resolve(user(), account, profile("p2"), *others, p1=(contact_id_of("profiles:p2"), None))
    made = made_by(merged, "profiles:p2")
    assert (made["userId"], made["clerkUserId"]) == (None, "user_1")
    assert outcomes(merged) == {"profiles:p2": "created", "profiles:p1": "merged"}


def test_a_row_that_is_separate_gets_a_contact_with_that_address() -> None:
    result = resolve(user(), profile(userId="u1"), contact(userId="u9"), p1=(None, "own@example.com"))
    assert made_by(result, "profiles:p1")["email"] == "own@example.com"
    assert len(result.contacts) == 2


@pytest.mark.parametrize("resolution", [("gone", None), (None, "b@b.io")])
def test_a_resolution_that_holds_no_more_is_an_error(resolution: tuple[str | None, str | None]) -> None:
    result = resolve(user(), profile(userId="u1"), contact("k1", "B@b.io"), p1=resolution)
    assert outcomes(result) == {"profiles:p1": "stale_decision"}
    assert result.ledger["profiles:p1"]["contact_id"] == (resolution[0] or "k1")


# Faults of the script that this replaces


def test_no_key_at_all_does_not_crash_the_row() -> None:
    assert outcomes(run(profile())) == {"profiles:p1": "created"}


def test_a_profile_is_checked_by_email() -> None:
    assert outcomes(run(user(), profile(userId="u1"), contact())) == {"profiles:p1": "exists"}


def test_one_key_does_not_mask_another() -> None:
    by_user = contact(email="other@example.com", userId="u1")
    assert outcomes(run(user(), profile(userId="u1", clerkUserId="user_1"), by_user)) == {"profiles:p1": "exists"}


@pytest.mark.parametrize("stored", ["ANN@EXAMPLE.COM", " Ann@example.com "])
def test_emails_are_compared_without_case(stored: str) -> None:
    assert outcomes(run(lead(email="aNN@example.com\n"), contact(email=stored))) == {"leads:l1": "exists"}


def test_a_lead_that_meets_its_profile_keeps_its_attribution() -> None:
    result = run(user(), profile(userId="u1"), lead(**REFERRED))
    assert {key: made_by(result, "profiles:p1")[key] for key in ATTRIBUTION} == REFERRED


def test_a_converted_lead_keeps_its_attribution_before_an_older_active_one() -> None:
    result = run(lead("l1", **REFERRED), lead("l2", status="CONVERTED", createdAt=DAY[9], **ALSO_REFERRED))
    assert made_by(result, "leads:l2")["referrerUsername"] == "other"


@pytest.mark.parametrize("blank", [None, "", "   ", "\t\n", "\N{NO-BREAK SPACE}"])
def test_a_name_of_white_space_is_unknown(blank: str | None) -> None:
    made = made_by(run(profile(firstName=blank, lastName=blank)), "profiles:p1")
    assert (made["firstName"], made["lastName"]) == ("Unknown", "Unknown")


# Any population


def check(population: Population, result: Result, ledger: dict[str, Entry], *, with_signups: bool) -> None:
    """What must hold after any run over all sources, whatever the rows are."""
    counts = result.counts
    account_ids = {profile["userId"] for profile in population.profiles}
    rows = [
        (table, row)
        for table in TABLES
        for row in getattr(population, table)
        if table != "users" or row["id"] not in account_ids or f"users:{row['id']}" in ledger
    ]
    signups = {f"{table}:{row['id']}" for table, row in rows if source_of(table, row) in SIGNUP_SOURCES}
    unread = set() if with_signups else signups
    assert counts.read == counts.created + counts.merged + counts.exists + counts.error
    assert len(rows) == counts.excluded.total() + counts.already + counts.read + len(unread & ledger.keys())
    migrated = {f"{table}:{row['id']}" for table, row in rows if not exclusion(table, row, population.stages)}
    assert set(result.ledger) == (migrated - unread) | set(ledger)
    by_outcome = sum(counts.by_source.values(), Counter())
    assert by_outcome == +Counter({name: getattr(counts, name) for name in ("created", "merged", "exists", "error")})
    assert set(counts.by_source) <= set(SOURCES)
    assert counts.created_by_type.total() == counts.created == len(result.contacts) - len(population.contacts)
    for key in ("email", "userId", "clerkUserId"):
        values = [row[key] for row in result.contacts.values() if row[key] is not None]
        assert len(values) == len(set(values)), "the database would refuse this"
    made = {entry["contact_id"] for entry in result.ledger.values() if entry["outcome"] == "created"}
    for row in population.contacts:
        own = any(contact_id_of(reference) == row["id"] for reference in migrated)
        if row["id"] not in made and not own:
            assert result.contacts[row["id"]] == row
    assert all(set(row) == set(CONTACT_COLUMNS) for row in result.contacts.values())


@settings(deadline=None)
@given(populations(added_labels=True), st.booleans())
def test_in_any_population_the_reconciliation_holds_and_no_key_is_twice(
    population: Population,
    with_signups: bool,  # noqa: FBT001 - drawn
) -> None:
    check(population, backfill(population, with_signups=with_signups), {}, with_signups=with_signups)


@settings(deadline=None)
@given(st.data(), populations())
def test_some_time_later_the_same_holds(data: st.DataObject, population: Population) -> None:
    first = backfill(population, with_signups=data.draw(st.booleans()))
    later = data.draw(aftermaths(population, first))
    with_signups = data.draw(st.booleans())
    again = backfill(later, ledger=first.ledger, with_signups=with_signups)
    check(later, again, first.ledger, with_signups=with_signups)

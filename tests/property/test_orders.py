"""With --update, any order of runs and any split of them ends where one full run ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from crm.backfill.update.reader import ENTRIES_OF_CONTACTS
from crm.outcome import Source
from crm.verification import verify
from tests.conftest import Database
from tests.support import reference
from tests.support.builders import add_contact, add_lead, add_profile, add_user, change, contact_with, contacts, ledger
from tests.support.commands import run, told, update
from tests.support.populations import (
    ADDRESSES,
    GENERATIONS,
    MOMENTS,
    attributions,
    insert_population,
    nullable_moments,
    nullable_texts,
    populations,
)
from tests.support.profiles import against_the_database
from tests.support.reference import NULLABLE_ATTRIBUTION, Population, Row

#: What belongs to the row that made a contact.
OF_THE_MAKER = ("id", "createdAt", "updatedAt")

some_sources = st.sets(st.sampled_from(Source), min_size=1).map(lambda some: tuple(s for s in Source if s in some))
parts = st.fixed_dictionaries(
    {"update": st.booleans()},
    optional={
        "only": some_sources,
        "limit": st.integers(1, 5),
        "since": st.sampled_from(MOMENTS).map(lambda moment: moment.replace(tzinfo=None).isoformat(" ")),
        "batch_size": st.sampled_from([1, 2, 1000]),
    },
)


@st.composite
def people(draw: st.DrawFn, generation: str) -> Population:
    """People of whom each has one account and one address at most, and contacts of some of them that others made.

    Which of two accounts with one address has the contact is for a person to decide, and until then the first has it.
    An intake that is migrated before the profile that it names has a contact by its own address, and keeps it.
    """
    population = draw(populations(generation))
    accounts: dict[str, str] = {}
    for user in population.users:
        accounts.setdefault(reference.address_of(user["email"]) or user["id"], user["id"])
    profiles = [row for row in population.profiles if row["userId"] in (None, *accounts.values())]
    addresses_of_users = {user["id"]: reference.address_of(user["email"]) for user in population.users}
    addresses_of_profiles = {row["id"]: addresses_of_users.get(row["userId"]) for row in profiles}
    intakes = [
        {**row, "profileId": None}
        if "profileId" in row and addresses_of_profiles.get(row["profileId"]) != reference.address_of(row["email"])
        else row
        for row in population.tax_intake_leads
    ]
    addresses = draw(st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=2))
    theirs = [_theirs(draw, f"theirs{number}", address) for number, address in enumerate(addresses)]
    there = {profile["id"] for profile in profiles}
    assigned = [row for row in population.client_preparers if {row["clientId"], row["preparerId"]} <= there]
    return dataclasses.replace(
        population, profiles=profiles, tax_intake_leads=intakes, contacts=theirs, client_preparers=assigned
    )


def _theirs(draw: st.DrawFn, identifier: str, address: str) -> Row:
    return {
        "id": identifier,
        "email": address,
        "userId": None,
        "clerkUserId": None,
        "contactType": "LEAD",
        "firstName": "Own",
        "lastName": "Own",
        "stage": "NEW",
        "stageEnteredAt": MOMENTS[0],
        "source": None,
        "phone": draw(nullable_texts),
        "company": draw(nullable_texts),
        "assignedPreparerId": None,
        "assignedAt": None,
        **draw(attributions()),
        "createdAt": MOMENTS[0],
        "updatedAt": MOMENTS[0],
        "lastContactedAt": draw(nullable_moments),
    }


def persons() -> dict[str, Row]:
    """The contacts by their address, but for what belongs to the rows that made them."""
    return {
        contact["email"]: {column: value for column, value in contact.items() if column not in _of_the_maker(contact)}
        for contact in contacts().values()
    }


def _of_the_maker(contact: Row) -> tuple[str, ...]:
    """A confidence alone is no attribution."""
    has_attribution = any(contact[column] is not None for column in NULLABLE_ATTRIBUTION)
    return OF_THE_MAKER if has_attribution else (*OF_THE_MAKER, "attributionConfidence")


def outcomes() -> Mapping[str, str | None]:
    """The address that each row's contact has, or the reason why it has none."""
    found = contacts()
    return {
        row: entry["reason"] if entry["outcome"] == "error" else found[str(entry["contact_id"])]["email"]
        for row, entry in ledger().items()
    }


@pytest.mark.parametrize("generation", GENERATIONS)
@against_the_database(8)
@given(data=st.data(), split=st.lists(parts, min_size=1, max_size=5))
def test_any_order_of_runs_and_any_split_ends_where_one_full_run_ends(
    database: Database, generation: str, data: st.DataObject, split: list[dict[str, Any]]
) -> None:
    database.use(generation)
    population = data.draw(people(generation))
    with connection.cursor() as cursor:
        insert_population(cursor, population)
    update()
    expected = persons(), outcomes()
    assert run(update=True)["revisited"] == 0

    database.empty()
    with connection.cursor() as cursor:
        insert_population(cursor, population)
    for part in split:
        foretold = run(**part, dry_run=True)
        assert told(foretold) == told(run(**part))
    update()
    assert (persons(), outcomes()) == expected
    assert [finding for finding in verify(connection).findings.kept if finding.kind == "defect"] == []
    again = run(update=True)
    assert (again["revisited"], again["updated"]) == (0, 0)


# The smallest examples


def in_one_run(database: Database, people: Any) -> dict[str, Row]:
    """What one full run with --update makes of these people, who are there again afterwards."""
    people()
    run(update=True)
    expected = persons()
    database.empty()
    return expected


def test_of_two_leads_of_a_person_the_converted_one_counts_whenever_it_comes(database: Database) -> None:
    def first_night() -> None:
        add_lead("ann@example.com", id="lead1", firstName="Old", phone="555 0101", referrerUsername="first")

    def second_night() -> None:
        add_lead("ann@example.com", "CONVERTED", id="lead2", firstName="New", phone=" ", referrerUsername="second")

    def both() -> None:
        first_night()
        second_night()

    expected = in_one_run(database, both)
    first_night()
    run()
    second_night()
    assert run()["merged"] == 1
    report = update()
    assert (report["revisited"], report["updated"]) == (1, 1)
    assert persons() == expected
    contact = contact_with("ann@example.com")
    assert (contact["contactType"], contact["stage"]) == ("CLIENT", "COMPLETE")
    assert (contact["firstName"], contact["phone"], contact["referrerUsername"]) == ("New", "555 0101", "second")
    assert database.rows('SELECT "fromStage"::text, "toStage"::text FROM crm_stage_history') == [("NEW", "COMPLETE")]
    assert update()["revisited"] == 0


def test_a_confidence_without_an_attribution_stays_that_of_the_row_that_made_the_contact(database: Database) -> None:
    add_profile(email="ann@example.com")
    add_lead("ann@example.com", "CONVERTED", attributionConfidence=85)
    run(only=(Source.CONVERTED_LEADS,))
    assert update()["updated_by_column"]["source"] == 1
    assert contact_with("ann@example.com")["attributionConfidence"] == 85


def test_a_part_that_came_first_does_not_tell_in_the_end(database: Database) -> None:
    def everybody() -> None:
        add_lead("ann@example.com", id="lead1", firstName="Lead", phone="555 0101", source="facebook")
        add_lead("ann@example.com", "CONVERTED", id="lead2", firstName="Client", phone="555 0102")
        add_profile(id="profile1", email="ann@example.com", phone="555 0103", companyName="Ann & Co")

    expected = in_one_run(database, everybody)
    everybody()
    run(only=(Source.ACTIVE_LEADS,))
    assert contact_with("ann@example.com")["firstName"] == "Lead"
    update()
    for person in (*persons().values(), *expected.values()):
        person.pop("userId")
    assert persons().keys() == expected.keys()
    assert contact_with("ann@example.com")["phone"] == "555 0103"


def test_what_a_touched_contact_would_have_been_promoted_to_is_kept(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    with connection.cursor() as cursor:
        cursor.execute("""UPDATE crm_contacts SET "lastName" = 'Own', "updatedAt" = now()""")
    add_profile(email="ann@example.com")
    report = update()
    assert (report["merged"], report["revisited"], report["kept"], report["updated"]) == (1, 1, 1, 0)
    assert report["kept_by_column"]["contact_type"] == 1
    contact = contact_with("ann@example.com")
    assert (contact["contactType"], contact["lastName"]) == ("LEAD", "Own"), lead
    assert update()["revisited"] == 0


def test_what_was_filled_in_anothers_contact_becomes_what_one_run_fills(database: Database) -> None:
    theirs = add_contact("ann@example.com", company="Own")
    add_lead("ann@example.com", phone="555 0101")
    add_profile(email="ann@example.com", phone="555 0102", companyName="Other")
    update(only=(Source.ACTIVE_LEADS,))
    assert contacts()[theirs]["phone"] == "555 0101"
    update()
    assert (contacts()[theirs]["phone"], contacts()[theirs]["company"]) == ("555 0102", "Own")


# What is looked for


def test_the_rows_of_contacts_are_found_by_an_index(database: Database) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")
        try:
            cursor.execute(f"EXPLAIN {ENTRIES_OF_CONTACTS}", {"ids": ["c1", "c2"]})
            plan = "\n".join(line for (line,) in cursor.fetchall())
        finally:
            cursor.execute("RESET enable_seqscan")
    assert "ledger_entry_contact_id" in plan
    assert "Seq Scan" not in plan


@pytest.mark.parametrize("most", [0, 50_000])
def test_what_is_due_is_found_whether_it_is_listed_or_not(
    database: Database, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("crm.backfill.update.reader.MAX_LISTED", most)
    first, _ = (add_lead(f"{name}@example.com", phone=" ") for name in ("ann", "bob"))
    user = add_user("")
    add_profile(userId=user)
    run(update=True)
    assert run(update=True)["revisited"] == 0
    change("leads", first, phone="555 0101")
    change("users", user, email="cy@example.com")
    assert update()["updated_by_column"] == {"email": 1, "phone": 1}
    assert run(update=True)["revisited"] == 0

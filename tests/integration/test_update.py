"""A second look: what turned up since is filled in, what people wrote stays, and it is told by column."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.conf import settings
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from crm.models import BackfillBatch, BackfillRun, ContactUpdate
from crm.models.ledger import RunStatus
from crm.outcome import Source
from crm.postgres.refusals import MAX_ALIKE
from crm.rollback.report import as_json as rollback_as_json
from crm.rollback.runner import roll_back
from crm.rules.mapping import contact_id
from crm.runs.control import details
from crm.verification import verify
from crm.verification.findings import Check, Finding, Kind
from crm.verification.report import as_json
from tests.conftest import LEGACY_TABLES, Database
from tests.support import reference_update
from tests.support.builders import (
    LATER,
    add_contact,
    add_intake,
    add_lead,
    add_many_leads,
    add_profile,
    add_user,
    change,
    contact_with,
    contacts,
)
from tests.support.circumstances import acting_as, in_batch, reading_role, set_status, without_own_schema
from tests.support.commands import backfill, run, statements, told, update
from tests.support.populations import (
    CODE_COLUMNS,
    GENERATIONS,
    UNKNOWN_ID,
    attributions,
    client_preparer_lists,
    insert_population,
    nullable_moments,
    nullable_texts,
    populations,
    replace_population,
    source_emails,
    texts,
)
from tests.support.processes import session
from tests.support.profiles import against_the_database
from tests.support.reference import Population, Row
from tests.support.undisturbed import everything_looked_at, populate_with_news


def defects() -> list[Any]:
    return [finding for finding in verify(connection).findings.kept if finding.kind == "defect"]


# Against the judge

_STEP = timedelta(days=1)


def _bumped(row: Row) -> Row:
    column = "updated_at" if "updated_at" in row else "updatedAt"
    return row | {column: max(row[column], datetime(2025, 1, 1, tzinfo=UTC)) + _STEP}


@st.composite
def changed_sources(draw: st.DrawFn, population: Population) -> Population:
    """The application went on: leads and intakes move on or expire, profiles are completed, accounts get an email."""
    leads = [
        _bumped(lead)
        | {
            "status": draw(st.sampled_from(["NEW", "CONTACTED", "CONVERTED", "DISQUALIFIED", lead["status"]])),
            "phone": draw(st.sampled_from([lead["phone"], "555 0101"]) | texts),
            "lastContactedAt": draw(st.just(lead["lastContactedAt"]) | nullable_moments),
            "email": draw(st.sampled_from([lead["email"]] * 5) | source_emails),
            **(draw(attributions()) if draw(st.booleans()) else {}),
        }
        if draw(st.booleans())
        else lead
        for lead in population.leads
    ]
    intakes = [
        _bumped(intake)
        | {
            "phone": draw(st.sampled_from([intake["phone"], "555 0101"]) | texts),
            "lastContactedAt": draw(st.just(intake["lastContactedAt"]) | nullable_moments),
            "assignedPreparerId": draw(
                st.sampled_from(
                    [intake["assignedPreparerId"], UNKNOWN_ID, None, *(row["id"] for row in population.profiles)]
                )
            ),
            **({"convertedToClient": draw(st.booleans())} if "convertedToClient" in intake else {}),
        }
        if draw(st.booleans())
        else intake
        for intake in population.tax_intake_leads
        if draw(st.integers(0, 4))
    ]
    emails = {user["email"] for user in population.users}
    users = []
    for user in population.users:
        email = draw(st.sampled_from([user["email"]] * 3) | source_emails)
        # A user's change leaves the profile as it is; `updatedAt` tells of it if the run that wrote it had begun.
        changed = {"email": email, "updatedAt": datetime(2099, 1, 1, tzinfo=UTC)} if email not in emails else {}
        emails.add(email)
        users.append(user | changed)
    roles = {True: ("CLIENT", "TAX_PREPARER", "AFFILIATE"), False: ("client", "tax_preparer", "affiliate")}
    is_upper = population.has_clerk_user_id
    profiles = [
        _bumped(profile)
        | {
            "role": draw(st.sampled_from([profile["role"], *roles[is_upper]])),
            "phone": draw(nullable_texts),
            "companyName": draw(nullable_texts),
        }
        if draw(st.booleans())
        else profile
        for profile in population.profiles
    ]
    # Without a trace in any row that names a preparer: codes, preparers of clients, and one who was nobody before.
    for column in CODE_COLUMNS if draw(st.booleans()) else ():
        codes = draw(st.permutations([profile[column] for profile in profiles]))
        profiles = [profile | {column: code} for profile, code in zip(profiles, codes, strict=True)]
    if population.has_clerk_user_id and draw(st.booleans()):
        role = draw(st.sampled_from(["ADMIN", "TAX_PREPARER"]))
        came = datetime(2099, 1, 1, tzinfo=UTC)
        nothing = dict.fromkeys(profiles[0] if profiles else ("userId", "firstName", "lastName", "phone"))
        profiles.append({**nothing, "id": UNKNOWN_ID, "role": role, "createdAt": came, "updatedAt": came})
    assigned = draw(client_preparer_lists(profiles)) if draw(st.booleans()) else population.client_preparers
    return dataclasses.replace(
        population,
        users=users,
        profiles=profiles,
        leads=leads,
        tax_intake_leads=intakes,
        client_preparers=assigned,
    )


@st.composite
def edited_contacts(draw: st.DrawFn, contacts: dict[str, Row], stages: tuple[str, ...]) -> list[Row]:
    """People worked in the CRM: every write moves `updatedAt`."""
    edits = {
        "phone": nullable_texts,
        "company": nullable_texts,
        "lastName": texts,
        "stage": st.sampled_from(stages),
        "contactType": st.sampled_from(["CLIENT", "LEAD", "PREPARER"]),
        "assignedPreparerId": st.none() | st.just("somebody"),
        "lastContactedAt": nullable_moments,
        "referrerUsername": st.none() | st.just("other"),
        "clerkUserId": st.none(),
        "userId": st.none(),
    }
    edited = []
    for contact in contacts.values():
        what = draw(st.sampled_from(["", "", "", "deleted", *edits]))
        if what == "deleted":
            continue
        edited.append(_bumped(contact) | {what: draw(edits[what])} if what else contact)
    return edited


@pytest.mark.parametrize("generation", GENERATIONS)
@against_the_database(16)
@given(
    data=st.data(),
    batch_size=st.sampled_from([1, 3, 1000]),
    is_first=st.booleans(),
    with_signups=st.lists(st.booleans(), min_size=2, max_size=2),
)
def test_a_second_look_does_what_the_judge_says_and_then_finds_nothing_more(
    database: Database,
    generation: str,
    data: st.DataObject,
    batch_size: int,
    is_first: bool,  # noqa: FBT001 - hypothesis
    with_signups: list[bool],
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    with connection.cursor() as cursor:
        insert_population(cursor, population)
    world = reference_update.World()
    reference_update.run(world, population, update=is_first, with_signups=with_signups[0])
    run(update=is_first, with_signups=with_signups[0])
    later = data.draw(changed_sources(population))
    later = dataclasses.replace(later, contacts=data.draw(edited_contacts(world.contacts, later.stages)))
    with connection.cursor() as cursor:
        replace_population(cursor, later)
    world.history.clear()  # it went with the contacts, which are there again

    defects_before = defects()
    expected = reference_update.run(world, later, update=True, with_signups=with_signups[1])
    report = update(batch_size=batch_size, with_signups=with_signups[1])

    assert contacts() == world.contacts
    assert {name: report[name] for name in vars(expected)} == vars(expected)
    assert set(defects()) <= set(defects_before)
    history = 'SELECT "contactId", "fromStage"::text, "toStage"::text FROM crm_stage_history'
    assert set(database.rows(history)) == world.history
    before = database.dump("crm_contacts", "crm_stage_history", "contact_update")
    again = run(update=True, with_signups=with_signups[1])
    assert (again["read"] - again["error"], again["revisited"]) == (0, 0)
    assert database.dump("crm_contacts", "crm_stage_history", "contact_update") == before


# Rule by rule


#: What a profile that comes to its lead's contact is the first to say.
OF_A_PROFILE = dict.fromkeys(("contact_type", "first_name", "last_name", "source"), 1)


def the_change() -> ContactUpdate:
    return ContactUpdate.objects.get()


STEPS = {
    "2025_10": [("CONTACTED", "CONTACTED"), ("QUALIFIED", "CONTACTED"), ("CONVERTED", "COMPLETE")],
    "2025_12": [
        *(("CONTACTED", "CONTACTED"), ("QUALIFIED", "QUALIFIED")),
        *(("CONVERTED", "CLOSED"), ("DISQUALIFIED", "LOST")),
    ],
}


@pytest.mark.parametrize(
    ("generation", "status", "stage"), [(g, *step) for g, steps in STEPS.items() for step in steps]
)
def test_a_lead_that_moves_on_takes_its_contact_along_and_tells_its_history(
    database: Database, generation: str, status: str, stage: str
) -> None:
    database.use(generation)
    lead = add_lead("ann@example.com")
    run()
    before = contact_with("ann@example.com")
    change("leads", lead, status=status)
    report = update()
    converted = {"contact_type": 1} if status == "CONVERTED" else {}
    assert (report["revisited"], report["updated"]) == (1, 1)
    assert report["updated_by_column"] == {**converted, "stage": 1}
    moved = datetime.fromisoformat(LATER).replace(tzinfo=UTC)
    assert contact_with("ann@example.com") == before | {
        "stage": stage,
        "stageEnteredAt": moved,
        "contactType": "CLIENT" if converted else "LEAD",
    }
    ((identifier, *step),) = database.rows(
        """SELECT id, "contactId", "fromStage"::text, "toStage"::text, "changedBy", reason, "createdAt"
             FROM crm_stage_history"""
    )
    assert (len(identifier), identifier[0], identifier.isalnum()) == (25, "c", True)
    assert step == [before["id"], "NEW", stage, None, "CRM contacts backfill", moved.replace(tzinfo=None)]
    assert (the_change().from_stage, the_change().to_stage) == ("NEW", stage)
    assert defects() == []
    assert update()["revisited"] == 0


@pytest.mark.parametrize(("before", "after"), [("CONVERTED", "NEW"), ("CONTACTED", "NEW"), ("CONVERTED", "CONTACTED")])
def test_nobody_is_taken_back_along_the_pipeline(database: Database, before: str, after: str) -> None:
    lead = add_lead("ann@example.com", before)
    run()
    written = contacts()
    change("leads", lead, status=after)
    report = update()
    assert (report["revisited"], report["unchanged"]) == (1, 1)
    assert contacts() == written
    assert database.rows("SELECT FROM crm_stage_history") == []


@pytest.mark.parametrize(
    ("role", "kind"), [("CLIENT", "CLIENT"), ("TAX_PREPARER", "PREPARER"), ("AFFILIATE", "AFFILIATE")]
)
@pytest.mark.parametrize("is_merged_before", [True, False])
def test_a_profile_that_merged_into_its_leads_contact_promotes_it(
    database: Database,
    role: str,
    kind: str,
    is_merged_before: bool,  # noqa: FBT001 - parametrized
) -> None:
    add_lead("ann@example.com")
    run()
    add_profile(role, email="ann@example.com", companyName="Ann & Co")
    if is_merged_before:
        run()
    report = update()
    assert report["updated_by_column"] == OF_A_PROFILE
    contact = contact_with("ann@example.com")
    assert (contact["contactType"], contact["stage"], contact["company"]) == (kind, "NEW", "Ann & Co")
    assert (contact["firstName"], contact["source"]) == ("Pat", "backfill")
    assert database.rows("SELECT FROM crm_stage_history") == [], "the stage is the same"
    assert defects() == []
    assert update()["revisited"] == 0


def test_a_profile_says_what_a_person_is_whatever_its_lead_said(database: Database) -> None:
    add_lead("ann@example.com", type="TAX_PREPARER")
    run()
    add_profile(email="ann@example.com")
    assert update()["updated_by_column"] == OF_A_PROFILE
    assert contact_with("ann@example.com")["contactType"] == "CLIENT"


KINDS = {"CLIENT": "CLIENT", "TAX_PREPARER": "PREPARER", "AFFILIATE": "AFFILIATE"}
ROLE_CHANGES = pytest.mark.parametrize(("before", "after"), [*itertools.permutations(KINDS, 2)])


@ROLE_CHANGES
@pytest.mark.parametrize("lead_is", [None, "moved back", "gone"])
def test_the_type_follows_the_role_of_the_profile_in_any_direction_and_a_rollback_restores_it(
    database: Database, before: str, after: str, lead_is: str | None
) -> None:
    """Whatever became of a lead of the same person meanwhile."""
    profile = add_profile(before, email="ann@example.com")
    lead = add_lead("ann@example.com", "CONVERTED") if lead_is else None
    run(update=True)
    contact = contact_with("ann@example.com")
    assert contact["contactType"] == KINDS[before]
    if lead and lead_is == "moved back":
        change("leads", lead, status="NEW")
    elif lead:
        database.rows("DELETE FROM leads RETURNING id")
    change("profiles", profile, role=after)
    report = update()
    assert report["updated_by_column"] == {"contact_type": 1}
    assert contacts() == {contact["id"]: contact | {"contactType": KINDS[after]}}
    assert defects() == []
    assert update()["revisited"] == 0
    roll_back(report["run"])
    assert contacts() == {contact["id"]: contact}


@pytest.mark.parametrize("intake_is", [None, "there", "expired"])
def test_the_type_of_people_who_signed_up_follows_their_role_and_a_rollback_restores_it(
    database: Database, intake_is: str | None
) -> None:
    """From waiting to approved and back, also where an intake of the person has expired."""
    database.use("2025_12")
    user = add_user("ann@example.com")
    intake = add_intake("ann@example.com") if intake_is else None
    run(update=True, with_signups=True)
    assert contact_with("ann@example.com")["contactType"] == "LEAD"
    profile = add_profile("lead", userId=user)
    update(with_signups=True)
    before = contact_with("ann@example.com")
    assert before["contactType"] == "LEAD"
    if intake_is == "expired":
        database.change("DELETE FROM tax_intake_leads")
    change("profiles", profile, role="client")
    approved = update(with_signups=True)
    assert approved["updated_by_column"]["contact_type"] == 1
    assert contact_with("ann@example.com")["contactType"] == "CLIENT"
    assert defects() == []
    assert update(with_signups=True)["revisited"] == 0
    roll_back(approved["run"])
    assert contact_with("ann@example.com") == before, intake


@pytest.mark.parametrize("lead_is", [None, "there", "gone"])
def test_a_client_whose_role_became_lead_is_one_unless_another_row_says_more(
    database: Database, lead_is: str | None
) -> None:
    profile = add_profile(email="ann@example.com")
    if lead_is:
        add_lead("ann@example.com", "CONVERTED")
    run(update=True)
    if lead_is == "gone":
        database.change("DELETE FROM leads")
    change("profiles", profile, role="LEAD")
    assert update()["revisited"] == 0
    report = update(with_signups=True)
    assert report["updated_by_column"].get("contact_type", 0) == (lead_is != "there")
    assert contact_with("ann@example.com")["contactType"] == ("CLIENT" if lead_is == "there" else "LEAD")
    assert defects() == []
    assert update(with_signups=True)["revisited"] == 0


def test_a_person_stays_what_an_expired_intake_said_where_their_role_says_less(database: Database) -> None:
    database.use("2025_12")
    add_profile("lead", email="ann@example.com")
    add_intake("ann@example.com", convertedToClient=True)
    run(update=True, with_signups=True)
    assert contact_with("ann@example.com")["contactType"] == "CLIENT"
    database.change("DELETE FROM tax_intake_leads")
    database.change('UPDATE profiles SET "updatedAt" = now()')
    update(with_signups=True)
    assert contact_with("ann@example.com")["contactType"] == "CLIENT"


@ROLE_CHANGES
@pytest.mark.parametrize("edit", [{"phone": "by hand"}, {"contactType": "LEAD"}])
def test_the_type_of_a_contact_that_a_person_changed_stays_and_counts_as_kept(
    database: Database, before: str, after: str, edit: dict[str, str]
) -> None:
    profile = add_profile(before, email="ann@example.com")
    run()
    change("crm_contacts", contact_with("ann@example.com")["id"], **edit)
    written = contacts()
    change("profiles", profile, role=after)
    report = update()
    assert (report["kept_by_column"], report["updated"]) == ({"contact_type": 1}, 0)
    assert contacts() == written


@pytest.mark.parametrize("in_two_runs", [True, False])
def test_the_blanks_of_a_contact_that_others_made_are_filled_and_nothing_else(
    database: Database,
    in_two_runs: bool,  # noqa: FBT001 - parametrized
) -> None:
    contact = add_contact("ann@example.com", firstName="Own", company="Own Ltd")
    profile = add_profile(email="ann@example.com", phone="555 0101", companyName="Other", clerkUserId="clerk")
    attribution = {"referrerUsername": "ref", "commissionRate": "12.50", "attributionConfidence": 85}
    add_lead("ann@example.com", "CONVERTED", assignedPreparerId=profile, lastContactedAt=LATER, **attribution)
    before = contacts()[contact]
    if in_two_runs:
        assert run()["exists"] == 2
        assert contacts()[contact] == before
    report = update()
    assert (report["revisited"], report["updated"], report["kept"], report["updated_and_kept"]) == (2, 2, 0, 1)
    of_clients = {"updated": 1, "kept": 0, "unchanged": 0, "updated_and_kept": 1}
    assert report["updates_by_source"]["clients"] == of_clients
    filled = {"user_id", "clerk_user_id", "phone", "last_contacted_at", "assignment", "attribution"}
    assert report["updated_by_column"] == dict.fromkeys(sorted(filled), 1)
    assert report["kept_by_column"] == {"company": 1}
    after = contacts()[contact]
    assert (after["phone"], after["clerkUserId"], after["attributionConfidence"]) == ("555 0101", "clerk", 85)
    assert after["assignedPreparerId"] == profile
    written = [*("userId", "clerkUserId", "phone", "lastContactedAt", "assignedPreparerId", "assignedAt")]
    written += [*("referrerUsername", "commissionRate", "attributionConfidence")]
    assert after == before | {column: after[column] for column in written}
    assert update()["revisited"] == 0


def test_a_blank_of_anothers_contact_that_a_person_empties_again_stays_empty(database: Database) -> None:
    contact = add_contact("ann@example.com")
    lead = add_lead("ann@example.com")
    assert update()["updated_by_column"] == {"phone": 1}
    change("crm_contacts", contact, phone=None)
    with statements() as sent:
        assert run(update=True)["revisited"] == 0
    assert not [statement for statement in sent if "FROM ledger_entry WHERE id = ANY" in statement.sql], "not even read"
    change("leads", lead, phone="555 0199")
    assert update()["kept_by_column"] == {"phone": 1}
    assert contacts()[contact]["phone"] is None


# Placeholders


def add_account_without_email(**columns: Any) -> tuple[str, str]:
    """A user whose email is blank, and its profile."""
    user = add_user("")
    return user, add_profile(userId=user, **columns)


@pytest.mark.parametrize("kind", ["as it was written", "somebody added a phone number"])
def test_a_placeholder_is_replaced_by_the_email_that_turned_up(database: Database, kind: str) -> None:
    user, profile = add_account_without_email()
    run()
    own = contact_id("profiles", profile)
    placeholder = contacts()[own]["email"]
    assert placeholder == f"client-{profile}@crm-backfill.invalid"
    if kind != "as it was written":
        change("crm_contacts", own, phone="555 0199")
    change("users", user, email=" Ann@Example.com")
    report = update()
    assert report["updated_by_column"] == {"email": 1}
    assert contacts()[own]["email"] == "ann@example.com"
    assert the_change().placeholder == placeholder
    assert defects() == []
    assert update()["revisited"] == 0


@pytest.mark.parametrize("generation", ["2026_01"])
def test_a_placeholder_is_replaced_by_an_email_of_the_profile_itself_and_a_rollback_puts_it_back(
    database: Database, generation: str
) -> None:
    profile = add_profile("client", userId=add_user(""))
    run()
    before = contacts()
    # As the newest application writes it, which leaves `updatedAt` as it is.
    database.rows("UPDATE profiles SET email = ' Ann@Example.com' WHERE id = %s RETURNING id", profile)
    report = update()
    assert report["updated_by_column"] == {"email": 1}
    assert contacts()[contact_id("profiles", profile)]["email"] == "ann@example.com"
    assert defects() == []
    assert update()["revisited"] == 0
    roll_back(report["run"])
    assert contacts() == before


def test_a_profile_that_gets_an_account_gets_its_key_and_its_email(database: Database) -> None:
    profile = add_profile(userId=None)
    run()
    user = add_user("ann@example.com")
    change("profiles", profile, userId=user)
    assert update()["updated_by_column"] == {"email": 1, "user_id": 1}
    assert contact_with("ann@example.com")["userId"] == user


def test_a_placeholder_is_known_under_another_domain_and_another_role(database: Database) -> None:
    user, profile = add_account_without_email()
    run()
    change("crm_contacts", contact_id("profiles", profile), email=f"client-{profile}@elsewhere.invalid")
    change("profiles", profile, role="AFFILIATE")
    change("users", user, email="ann@example.com")
    assert update()["updated_by_column"] == {"email": 1}


@pytest.mark.parametrize("spelling", ["ann@example.com", "Ann@Example.com"])
def test_an_email_that_another_contact_has_is_not_written(database: Database, spelling: str) -> None:
    user, profile = add_account_without_email()
    run()
    add_contact(spelling)
    before = contacts()
    change("users", user, email="ann@example.com")
    change("profiles", profile, phone="555 0101")
    report = update()
    assert (report["status"], report["kept"], report["kept_by_column"]) == ("finished", 1, {"identity": 1})
    assert contacts() == before
    assert update()["revisited"] == 0


def test_the_runbooks_query_lists_placeholders_whose_address_is_taken(database: Database) -> None:
    (user, profile), other_user = add_account_without_email(), add_user(" ")
    add_profile(userId=other_user)
    run()
    taken_by = add_contact("Ann@Example.com")
    change("users", user, email=" ann@example.com")
    change("users", other_user, email="free@example.com")
    assert update()["updated_by_column"] == {"email": 1}
    page = (settings.BASE_DIR / "docs" / "runbook.md").read_text(encoding="utf-8")
    (query,) = (text for text in re.findall(r"^```sql\n(.*?)^```$", page, re.M | re.S) if "has_the_address" in text)
    with connection.cursor() as cursor:
        cursor.execute(query.rstrip("\n;"))
        assert cursor.fetchall() == [(contact_id("profiles", profile), taken_by)]


def test_two_accounts_whose_email_is_the_same_but_for_its_case_do_not_share_it(database: Database) -> None:
    (first, _), second = add_account_without_email(), add_profile(userId=None)
    run()
    change("users", first, email="ann@example.com")
    other = add_user("Ann@Example.com")
    change("profiles", second, userId=other)
    report = update()
    assert (report["updated_by_column"], report["kept_by_column"]) == ({"email": 1}, {"identity": 1})


# What people wrote


#: What a person writes into a contact of a lead, and the name under which it is kept; NULL is what a person takes away.
EDITS_OF_LEADS: dict[str, tuple[Row, str]] = {
    "a phone": ({"phone": "555 0199"}, "phone"),
    "no phone": ({"phone": None}, "phone"),
    "a type": ({"contactType": "AFFILIATE"}, "contact_type"),
    "a stage": ({"stage": "CONTACTED"}, "stage"),
    "a preparer": ({"assignedPreparerId": "somebody"}, "assignment"),
    "no preparer": ({"assignedPreparerId": None}, "assignment"),
    "no assignment": ({"assignedPreparerId": None, "assignedAt": None}, "assignment"),
    "a referrer": ({"referrerUsername": "other"}, "attribution"),
    "a rate": ({"commissionRate": "99.00"}, "attribution"),
    "no attribution": ({"referrerUsername": None, "commissionRate": None}, "attribution"),
    "a last contact": ({"lastContactedAt": "2025-05-05 00:00:00"}, "last_contacted_at"),
    "no last contact": ({"lastContactedAt": None}, "last_contacted_at"),
}
EDITS_OF_PROFILES: dict[str, tuple[Row, str]] = {
    "a company": ({"company": "Own Ltd"}, "company"),
    "no company": ({"company": None}, "company"),
    "an email": ({"email": "own@example.com"}, "email"),
    "no phone": ({"phone": None}, "phone"),
    "no account": ({"userId": None}, "user_id"),
}


def assert_kept(written: Row, name: str, contact: str) -> None:
    """What a person wrote stands, and whatever else the row changes, it is told by this name."""
    report = update()
    assert (report["revisited"], report["kept"] + report["updated_and_kept"]) == (1, 1)
    assert report["kept_by_column"][name] == 1
    assert name not in report["updated_by_column"]
    with connection.cursor() as cursor:
        columns = ", ".join(f'"{column}"::text' for column in written)
        cursor.execute(f"SELECT {columns} FROM crm_contacts WHERE id = %s", [contact])
        found = dict(zip(written, cursor.fetchone(), strict=True))
    assert found == written
    assert defects() == []
    assert update()["revisited"] == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("edit", EDITS_OF_LEADS)
def test_what_a_person_wrote_into_a_leads_contact_stays(database: Database, edit: str) -> None:
    written, name = EDITS_OF_LEADS[edit]
    attribution = {"referrerUsername": "ref", "commissionRate": "12.50"}
    preparer = add_profile("ADMIN")
    lead = add_lead("ann@example.com", assignedPreparerId=preparer, lastContactedAt=LATER, **attribution)
    run()
    change("crm_contacts", contact_id("leads", lead), **written)
    change("leads", lead, status="CONVERTED")
    assert_kept(written, name, contact_id("leads", lead))


@pytest.mark.parametrize("edit", EDITS_OF_PROFILES)
def test_what_a_person_wrote_into_a_profiles_contact_stays(database: Database, edit: str) -> None:
    written, name = EDITS_OF_PROFILES[edit]
    user, profile = add_account_without_email(companyName="Ann & Co", phone="555 0101")
    run()
    change("crm_contacts", contact_id("profiles", profile), **written)
    if name == "email":
        change("users", user, email="ann@example.com", updatedAt="2099-01-01")
    change("profiles", profile)
    assert_kept(written, name, contact_id("profiles", profile))


def test_a_person_who_changed_a_name_keeps_no_profile_from_filling_what_it_alone_can_bring(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    change("crm_contacts", contact_id("leads", lead), lastName="Own")
    profile = add_profile(email="ann@example.com")
    run()
    change("profiles", profile, companyName="Ann & Co")
    report = update()
    assert (report["updated_by_column"], report["kept_by_column"]) == ({"company": 1}, OF_A_PROFILE)
    change("crm_contacts", contact_id("leads", lead), company=None)
    change("profiles", profile, companyName="Ann & Sons", updatedAt="2025-08-08 00:00:00")
    assert update()["kept_by_column"] == {"company": 1, **OF_A_PROFILE}


#: What turns up in a lead only later, by the name under which it is told.
NEWS_OF_LEADS: dict[str, Row] = {
    "phone": {"phone": "555 0101"},
    "last_contacted_at": {"lastContactedAt": LATER},
    "assignment": {"assignedPreparerId": "preparer"},
    "attribution": {"referrerUsername": "ref", "commissionRate": "12.50"},
}
NEWS_OF_PROFILES: dict[str, Row] = {
    "phone": {"phone": "555 0101"},
    "company": {"companyName": "Ann & Co"},
    "clerk_user_id": {"clerkUserId": "clerk"},
}


@pytest.mark.parametrize("name", NEWS_OF_LEADS)
def test_a_blank_that_never_was_filled_is_one_also_where_a_person_worked_elsewhere(
    database: Database, name: str
) -> None:
    # The lead that made the contact brought everything else.
    brought = {
        column: value for other, news in NEWS_OF_LEADS.items() if other != name for column, value in news.items()
    }
    add_profile("ADMIN", id="preparer")
    lead = add_lead("ann@example.com", **({"phone": " "} | brought))
    run()
    contact = contact_id("leads", lead)
    change("crm_contacts", contact, lastName="Own", stage="CONTACTED")
    change("leads", lead, **NEWS_OF_LEADS[name])
    before = contacts()[contact]
    report = update()
    assert (report["updated_by_column"], report["kept_by_column"]) == ({name: 1}, {"last_name": 1})
    after = contacts()[contact]
    written = {*NEWS_OF_LEADS[name], *(["assignedAt"] if name == "assignment" else [])}
    assert {column for column in after if after[column] != before[column]} == written
    change("crm_contacts", contact, **dict.fromkeys(written))
    change("leads", lead, updatedAt="2025-08-08 00:00:00")
    assert update()["kept_by_column"] == {name: 1, "last_name": 1}, "now a person made it"


@pytest.mark.parametrize("name", NEWS_OF_PROFILES)
def test_so_it_is_with_what_a_profile_brings(database: Database, name: str) -> None:
    brought = {
        column: value for other, news in NEWS_OF_PROFILES.items() if other != name for column, value in news.items()
    }
    profile = add_profile(email="ann@example.com", **brought)
    run()
    change("crm_contacts", contact_id("profiles", profile), lastName="Own")
    change("profiles", profile, **NEWS_OF_PROFILES[name])
    report = update()
    assert (report["updated_by_column"], report["kept_by_column"]) == ({name: 1}, {"last_name": 1})


def test_what_a_merge_filled_and_a_person_took_away_stays_away(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    profile = add_profile(email="ann@example.com", companyName="Ann & Co")
    run()
    change("crm_contacts", contact_id("leads", lead), company=None)
    change("profiles", profile, companyName="Ann & Sons")
    assert update()["kept_by_column"] == {"company": 1, **OF_A_PROFILE}
    assert contact_with("ann@example.com")["company"] is None


def test_a_value_of_ours_that_grew_old_becomes_what_its_row_says_now(database: Database) -> None:
    lead = add_lead("ann@example.com", lastName="Old")
    run()
    before = contact_with("ann@example.com")
    change("leads", lead, phone="555 0199", lastName="New")
    report = update()
    assert (report["revisited"], report["updated_by_column"]) == (1, {"last_name": 1, "phone": 1})
    assert contact_with("ann@example.com") == before | {"phone": "555 0199", "lastName": "New"}
    assert verify(connection).findings.kept == []


def test_what_a_row_does_not_say_any_more_is_not_taken_away(database: Database) -> None:
    attribution = {"referrerUsername": "ref", "commissionRate": "12.50"}
    preparer = add_profile("ADMIN")
    lead = add_lead("ann@example.com", lastContactedAt=LATER, assignedPreparerId=preparer, **attribution)
    run()
    before = contacts()
    nothing = dict.fromkeys((*attribution, "lastContactedAt", "assignedPreparerId"))
    change("leads", lead, phone=" ", **nothing)
    assert update()["unchanged"] == 1
    assert contacts() == before


def test_a_contact_of_which_a_row_is_gone_is_filled_and_promoted_but_not_written_anew(database: Database) -> None:
    lead = add_lead("ann@example.com", phone="555 0101")
    run()
    database.rows("DELETE FROM leads RETURNING id")
    add_lead("ann@example.com", "CONVERTED", firstName="Other", phone="555 0102", referrerUsername="ref")
    assert update()["updated_by_column"] == {"contact_type": 1, "stage": 1}
    contact = contact_with("ann@example.com")
    assert (contact["id"], contact["firstName"], contact["phone"]) == (contact_id("leads", lead), "Lee", "555 0101")
    assert (contact["referrerUsername"], contact["contactType"]) == ("ref", "CLIENT")


def test_deleted_stays_deleted(database: Database) -> None:
    lead, other = add_lead("ann@example.com"), add_contact("bob@example.com")
    add_lead("bob@example.com")
    run()
    database.rows("DELETE FROM crm_contacts RETURNING id")
    change("leads", lead, status="CONVERTED")
    assert update()["revisited"] == 0
    assert contacts() == {}
    assert other not in contacts()


# Identity


def test_a_key_that_another_contact_has_is_not_filled(database: Database) -> None:
    user = add_user("ann@example.com")
    add_contact("ann@example.com")
    add_profile(userId=user)
    assert run()["exists"] == 1
    add_contact("other@example.com", userId=user)
    before = contacts()
    assert update()["kept_by_column"] == {"identity": 1}
    assert contacts() == before
    assert update()["revisited"] == 0


def test_a_lead_whose_email_is_another_persons_by_now_brings_that_person_nothing(database: Database) -> None:
    lead = add_lead("ann@example.com")
    add_lead("bob@example.com")
    run()
    before = contacts()
    change("leads", lead, email="bob@example.com", status="CONVERTED", referrerUsername="ref")
    assert update()["kept_by_column"] == {"identity": 1}
    assert contacts() == before


def test_a_row_that_cannot_be_a_contact_any_more_brings_nothing(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    before = contacts()
    change("leads", lead, email="nobody", status="CONVERTED")
    assert update()["unchanged"] == 1
    assert contacts() == before
    assert update()["revisited"] == 0


# Whatever happens meanwhile


@contextmanager
def meanwhile(
    happening: Callable[[], object], *, after: str = "FROM crm_contacts c WHERE c.id = wanted.id"
) -> Iterator[None]:
    """Let something happen once, between the look at a contact and the write."""
    left = [happening]

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        result = execute(sql, parameters, many, context)
        if left and after in " ".join(str(sql).split()):
            left.pop()()
        return result

    with connection.execute_wrapper(watch):
        yield
    assert not left, "it never happened"


def elsewhere(statement: str, *parameters: Any) -> Callable[[], object]:
    """Somebody else's statement, committed."""

    def execute() -> None:
        with session() as other:
            other.execute(statement.encode(), parameters)
            other.commit()

    return execute


def test_what_a_person_writes_under_our_eyes_stays(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    change("leads", lead, status="CONVERTED")
    with meanwhile(elsewhere("""UPDATE crm_contacts SET "lastName" = 'Own', "updatedAt" = now()""")):
        report = run(update=True)
    assert (report["revisited"], report["kept"], report["balanced"]) == (1, 1, True)
    contact = contact_with("ann@example.com")
    assert (contact["lastName"], contact["contactType"], contact["stage"]) == ("Own", "LEAD", "NEW")


def test_a_blank_that_somebody_fills_under_our_eyes_is_none(database: Database) -> None:
    add_contact("ann@example.com")
    add_lead("ann@example.com")
    add_contact("bob@example.com")
    add_lead("bob@example.com")
    run()
    theirs = elsewhere("UPDATE crm_contacts SET phone = '555 0199' WHERE email = 'ann@example.com'")
    with meanwhile(theirs):
        report = run(update=True)
    assert report["updated_by_column"] == {"phone": 1}
    assert contact_with("ann@example.com")["phone"] == "555 0199"
    assert contact_with("bob@example.com")["phone"] == "555 0100"


def test_a_contact_that_is_deleted_under_our_eyes_stays_deleted(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    change("leads", lead, status="CONVERTED")
    with meanwhile(elsewhere("DELETE FROM crm_contacts")):
        assert run(update=True)["revisited"] == 0
    assert contacts() == {}


def test_a_key_that_somebody_takes_under_our_eyes_stays_theirs_and_keeps_no_other_row(database: Database) -> None:
    (first, _), (second, _) = (add_account_without_email_of(name) for name in ("ann", "bob"))
    run()
    change("users", first, email="ann@example.com")
    change("users", second, email="bob@example.com")
    theirs = """INSERT INTO crm_contacts (id, "contactType", "firstName", "lastName", email, "updatedAt")
                VALUES ('theirs', 'LEAD', 'A', 'B', 'ann@example.com', now())"""
    with meanwhile(elsewhere(theirs), after="UNION SELECT id FROM crm_contacts WHERE"):
        report = run(update=True)
    assert (report["status"], report["updated_by_column"]) == ("finished", {"email": 1})
    assert contact_with("bob@example.com")["userId"] == second
    assert contact_with("ann@example.com")["id"] == "theirs"


def add_account_without_email_of(name: str) -> tuple[str, str]:
    user = add_user(" " * len(name) if name == "ann" else "")
    return user, add_profile(userId=user, firstName=name)


def test_what_the_database_refuses_is_told_once_and_tried_again_by_the_next_run(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    leads = [add_lead("ann@example.com"), add_lead("bob@example.com")]
    run()
    for lead in leads:
        change("leads", lead, status="CONVERTED")
    database.change(
        """CREATE FUNCTION mishap() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'PT400', COLUMN = 'ann'; END $$;
           CREATE TRIGGER mishap BEFORE INSERT ON crm_stage_history FOR EACH ROW EXECUTE FUNCTION mishap()"""
    )
    report = run(update=True, batch_size=1)
    assert (report["kept_by_column"], report["balanced"]) == ({"refused": 2}, True)
    (said,) = [told for told in caplog.messages if "refuse" in told]
    assert "(SQLSTATE PT400, trigger mishap)" in said
    assert "ann" not in said
    assert contact_with("ann@example.com")["stage"] == "NEW"
    database.change("DROP FUNCTION mishap() CASCADE")
    assert update()["updated_by_column"] == {"contact_type": 2, "stage": 2}


def test_a_table_that_takes_no_change_is_not_asked_contact_by_contact(database: Database) -> None:
    add_many_leads(600)
    run()
    database.rows('UPDATE leads SET "lastContactedAt" = %s, "updatedAt" = %s RETURNING id', LATER, LATER)
    database.change('ALTER TABLE crm_contacts ADD CONSTRAINT nobody CHECK ("lastContactedAt" IS NULL)')
    with statements() as sent:
        report = run(update=True)
    assert (report["status"], report["updated"], report["kept_by_column"]) == ("finished", 0, {"refused": 600})
    assert sum(statement.sql.startswith("UPDATE crm_contacts") for statement in sent) < 4 * MAX_ALIKE
    database.change("ALTER TABLE crm_contacts DROP CONSTRAINT nobody")
    assert run(update=True)["updated_by_column"] == {"last_contacted_at": 600}


@pytest.fixture
def undisturbed(database: Database) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """What a run with --update comes to that nobody disturbs; the population is as before it."""
    populate_with_news()
    before = everything_looked_at(database)
    report = update()
    end = everything_looked_at(database)
    assert report["updated"] > 20
    assert end != before
    database.empty()
    populate_with_news()
    assert everything_looked_at(database) == before
    return report, end


@pytest.mark.sampled(3)
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("after", ["UPDATE crm_contacts", "INSERT INTO contact_update", 'UPDATE "backfill_run"'])
def test_stopped_in_the_middle_and_run_again_it_ends_as_if_nothing_had_happened(
    database: Database, undisturbed: tuple[dict[str, Any], tuple[Any, ...]], batch: int, after: str
) -> None:
    with in_batch(batch, _stop, after=after):
        stopped = run(update=True, batch_size=6)
    assert (stopped["status"], stopped["balanced"]) == ("interrupted", True)
    again = run(update=True, batch_size=6)
    assert everything_looked_at(database) == undisturbed[1]
    for name in ("revisited", "updated", "kept", "unchanged", "updated_and_kept"):
        assert stopped[name] + again[name] == undisturbed[0][name]


def _stop() -> None:
    """Ctrl-C, and a second one."""
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("options", [{"workers": 2}, {"batch_size": 1}, {"max_rate": 1000}])
def test_it_ends_the_same_whatever_the_pace(
    database: Database, undisturbed: tuple[dict[str, Any], tuple[Any, ...]], options: dict[str, Any]
) -> None:
    assert told(update(**options)) == told(undisturbed[0])
    assert everything_looked_at(database) == undisturbed[1]


def test_only_the_sources_that_are_asked_for_are_looked_at_again(database: Database) -> None:
    populate_with_news()
    report = update(only=(Source.CONVERTED_LEADS,))
    assert list(report["updates_by_source"]) == ["converted_leads"]
    assert report["updated_by_column"].keys() == {"attribution", "contact_type", "phone", "stage"}
    assert update(only=(Source.CLIENTS,))["updated_by_column"].keys() == {"company", "email", "user_id"}


def test_since_bounds_a_second_look_too(database: Database) -> None:
    populate_with_news()
    report = update(since=LATER)
    assert report["updates_by_source"].keys() == {"converted_leads"}
    assert "email" in update()["updated_by_column"]


def test_a_limit_counts_rows_that_are_read_and_rows_that_are_looked_at_again(database: Database) -> None:
    populate_with_news()
    add_lead("late@example.com")
    report = update(limit=5)
    assert (report["read"], report["revisited"]) == (1, 4)
    assert update(limit=5)["revisited"] == 5


def test_a_run_that_was_cancelled_looks_at_nothing_more(database: Database) -> None:
    populate_with_news()
    with in_batch(2, lambda: set_status(RunStatus.CANCELLED), after="INSERT INTO contact_update"):
        report = run(update=True, batch_size=4)
    assert (report["status"], report["revisited"]) == ("cancelled", 4)


# What is told


def test_the_record_the_batches_and_the_report_agree(database: Database) -> None:
    populate_with_news()
    report = update(batch_size=7)
    record = BackfillRun.objects.get(pk=report["run"])
    batches = list(BackfillBatch.objects.filter(run=record))
    for name in ("revisited", "updated", "kept", "unchanged", "updated_and_kept"):
        assert getattr(record, name) == sum(getattr(batch, name) for batch in batches) == report[name]
    columns = sum((Counter(batch.updated_by_column) for batch in batches), Counter())
    assert columns == report["updated_by_column"]
    assert record.options["update"] is True
    assert report["revisited"] == report["updated"] + report["kept"] + report["unchanged"]


def test_a_row_that_changed_its_contact_counts_as_changed_whatever_it_kept_besides(database: Database) -> None:
    add_contact("ann@example.com", company="Own Ltd")
    add_profile(email="ann@example.com", phone="555 0101", companyName="Other")
    add_contact("bob@example.com")
    add_lead("bob@example.com")
    add_contact("cy@example.com", phone="own")
    add_lead("cy@example.com")
    counted = {"updated": 2, "updated_and_kept": 1, "kept": 1, "unchanged": 0}
    dry, done = (backfill("--update", "--no-progress", *dry) for dry in (["--dry-run"], []))
    for shown, would in ((dry.stdout, "would be "), (done.stdout, "")):
        assert re.search(rf"changed +2 +{would}filled or promoted; 1 kept a value as well", shown)
        assert re.search(r"kept only +1 ", shown)
        assert "3 revisited = 2 changed + 1 kept only + 0 unchanged" in shown
    record = BackfillRun.objects.latest("pk")
    assert {name: getattr(record, name) for name in counted} == counted
    assert {name: details(record.pk)[name] for name in counted} == counted
    assert sum(json.loads(rollback_as_json(roll_back(record.pk, dry_run=True)))["updates"].values()) == 2


def test_a_record_of_changes_that_lacks_one_fails_the_run(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    change("leads", lead, status="CONVERTED")
    database.change(
        """CREATE FUNCTION mishap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
           CREATE TRIGGER mishap BEFORE INSERT ON contact_update FOR EACH ROW EXECUTE FUNCTION mishap()"""
    )
    try:
        report = run(update=True)
    finally:
        database.change("DROP FUNCTION mishap() CASCADE")
    assert (report["status"], report["balanced"]) == ("failed", False)


def test_the_summary_tells_by_column_what_was_changed(database: Database) -> None:
    add_contact("ann@example.com", company="Own")
    add_profile(email="ann@example.com", phone="555 0101", companyName="Other")
    would = " ".join(backfill("--update", "--dry-run", "--no-progress").stdout.split())
    assert "changed 1 would be filled or promoted; 1 kept a value as well kept only 0" in would
    assert "company 0 1 kept phone 1" in would
    said = " ".join(backfill("--update", "--no-progress").stdout.split())
    assert "Revisited 1" in said
    assert "1 revisited = 1 changed + 0 kept only + 0 unchanged (holds)" in said
    assert "Revisited" not in backfill("--no-progress").stdout


def test_no_value_is_told(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    user, _ = add_account_without_email()
    add_contact("lee@example.com")
    add_lead("lee@example.com", phone="555 0101", referrerUsername="secret-ref")
    run()
    change("users", user, email="zelda@example.com")
    finished = backfill("--update", "--json")
    told_of = finished.stdout + finished.stderr + caplog.text + repr(database.dump("contact_update", "ledger_entry"))
    for secret in ("zelda", "lee@", "555 0101", "secret-ref"):
        assert secret not in told_of


# Before there is anything


def test_a_dry_run_foretells_the_first_run_with_nothing_but_the_right_to_read(database: Database) -> None:
    add_contact("ann@example.com")
    add_profile(email="ann@example.com", phone="555 0101")
    add_lead("ann@example.com", referrerUsername="ref")
    with without_own_schema(), reading_role(database) as role, acting_as(role):
        foretold = run(update=True, dry_run=True)
    assert foretold["updated_by_column"] == {"attribution": 1, "phone": 1, "user_id": 1}
    assert told(foretold) == told(run(update=True))


# Verification


def planted(column: str) -> str:
    """A value that nobody wrote."""
    by_type = {
        "commissionRate": "99.00",
        "attributionConfidence": "7",
        "contactType": "AFFILIATE",
        "stage": "DOCUMENTS",
    }
    moments = ("lastContactedAt", "assignedAt", "commissionRateLockedAt", "stageEnteredAt")
    return by_type.get(column, "2098-01-01" if column in moments else "planted")


WRITTEN_FROM_LEADS = (
    *("phone", "lastContactedAt", "assignedPreparerId", "assignedAt", "referrerUsername", "commissionRate"),
    *("attributionConfidence", "contactType", "stage", "stageEnteredAt"),
)


@pytest.mark.parametrize("column", WRITTEN_FROM_LEADS)
def test_a_fault_in_what_an_update_wrote_is_found(database: Database, column: str) -> None:
    lead, preparer = add_lead("ann@example.com", phone=" "), add_profile("ADMIN")
    run()
    attribution = {"referrerUsername": "ref", "commissionRate": "12.50"}
    news = {"phone": "555 0101", "lastContactedAt": LATER, "assignedPreparerId": preparer, **attribution}
    change("leads", lead, status="CONVERTED", **news)
    assert update()["updated"] == 1
    assert defects() == []
    database.rows(f'UPDATE crm_contacts SET "{column}" = %s RETURNING id', planted(column))
    assert [(finding.check, finding.columns) for finding in defects()] == [("fields", (column,))]


@pytest.mark.parametrize("column", ["userId", "email", "company", "contactType"])
def test_a_fault_in_what_an_update_wrote_from_a_profile_is_found(database: Database, column: str) -> None:
    if column in ("company", "contactType"):
        add_lead("ann@example.com")
        run()
        profile = add_profile(email="ann@example.com")
        run()
        change("profiles", profile, companyName="Ann & Co")
    else:
        profile = add_profile(userId=None)
        run()
        change("profiles", profile, userId=add_user("ann@example.com"))
    assert update()["updated"] == 1
    assert defects() == []
    value = add_user("planted@example.com") if column == "userId" else planted(column)
    database.rows(f'UPDATE crm_contacts SET "{column}" = %s RETURNING id', value)
    assert [(finding.check, finding.columns) for finding in defects()] == [("fields", (column,))]


def test_a_value_that_went_since_an_update_of_a_merged_row_is_found(database: Database) -> None:
    add_lead("ann@example.com")
    run()
    profile = add_profile(email="ann@example.com")
    run()
    change("profiles", profile, companyName="Ann & Co")
    update()
    database.rows("UPDATE crm_contacts SET company = NULL RETURNING id")
    assert [(finding.check, finding.columns) for finding in defects()] == [("fields", ("company",))]


def test_a_line_of_the_history_that_somebody_deleted_is_told_as_the_crms(database: Database) -> None:
    lead = add_lead("ann@example.com")
    other = add_lead("bob@example.com")
    run()
    change("leads", lead, status="CONVERTED")
    change("leads", other, referrerUsername="ref")
    assert update()["updated_by_column"] == {"attribution": 1, "contact_type": 1, "stage": 1}
    assert verify(connection).findings.kept == []
    database.rows("DELETE FROM crm_stage_history RETURNING id")
    report = verify(connection)
    contact = contact_id("leads", lead)
    assert report.findings.kept == [Finding(Check.HISTORY_GONE, Kind.CRM_CHANGED, f"leads:{lead}", contact, ("stage",))]
    assert (report.exit_code, report.history_is_hidden) == (0, False)
    database.rows("DELETE FROM crm_contacts RETURNING id")
    assert verify(connection).findings.kept == [], "it went with its contact"


def test_a_role_that_may_not_read_the_history_is_told_so_once_there_is_one(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    tables = tuple(table for table in LEGACY_TABLES if table != "crm_stage_history")
    with reading_role(database, tables=tables) as role:
        for grant in ("USAGE ON SCHEMA", "SELECT ON ALL TABLES IN SCHEMA"):
            database.change(f"GRANT {grant} crm_backfill TO {role}")
        with acting_as(role):
            assert list(json.loads(as_json(verify(connection)))["notes"]) == []
        change("leads", lead, status="CONVERTED")
        update()
        with acting_as(role):
            (note,) = json.loads(as_json(verify(connection)))["notes"]
    assert "crm_stage_history.id" in note


def test_a_source_that_moves_on_after_an_update_is_no_defect(database: Database) -> None:
    lead = add_lead("ann@example.com", phone=" ")
    run()
    change("leads", lead, phone="555 0101")
    update()
    change("leads", lead, phone="555 0102", updatedAt="2025-08-08 00:00:00")
    assert defects() == []


# The way back


def test_a_run_that_is_taken_back_leaves_what_was_there_before_and_can_be_done_again(database: Database) -> None:
    populate_with_news()
    before = everything_looked_at(database)
    report = update(batch_size=7)
    end = everything_looked_at(database)
    foretold = roll_back(report["run"], dry_run=True)
    assert everything_looked_at(database) == end
    taken = roll_back(report["run"], batch_size=4)
    assert taken.counts == foretold.counts
    assert (taken.status, taken.balanced) == (RunStatus.FINISHED, True)
    assert taken.counts.numbers["updates_reversed"] == ContactUpdate.objects.count() + len(end[3])
    assert taken.counts.numbers["updates_kept"] == 0
    assert (contacts(), *everything_looked_at(database)[1:2]) == before[:2]
    assert defects() == []
    again = update()
    assert again["updated_by_column"] == report["updated_by_column"]
    assert everything_looked_at(database)[:2] == end[:2]


def test_of_several_steps_each_is_taken_back(database: Database) -> None:
    add_lead("ann@example.com", phone=" ")
    second, third = (add_lead("ann@example.com", phone=" ") for _ in range(2))
    run()
    before = contacts()
    change("leads", second, status="CONTACTED", phone="555 0101")
    change("leads", third, status="CONVERTED", referrerUsername="ref")
    report = update()
    assert ContactUpdate.objects.count() == 2
    assert roll_back(report["run"]).counts.numbers["updates_reversed"] == 2
    assert contacts() == before
    assert database.rows("SELECT FROM crm_stage_history") == []


def made_and_promoted_in_one_run(email: str) -> tuple[str, int]:
    """A lead that converts while its contact is being made; the contact, and the run that made and promoted it."""
    lead = add_lead(email)
    convert = elsewhere("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() WHERE id = %s""", lead)
    with in_batch(1, convert):
        report = run(update=True)
    assert (report["created"], report["updated_by_column"]) == (1, {"contact_type": 1, "stage": 1})
    return contact_id("leads", lead), report["run"]


def counts_foretold(run_id: int, **options: Any) -> Any:
    """What a rollback counts, which a dry run has foretold."""
    foretold = roll_back(run_id, dry_run=True, **options)
    taken = roll_back(run_id, **options)
    assert (foretold.counts.numbers + Counter(), foretold.counts.reasons) == (
        taken.counts.numbers + Counter(),
        taken.counts.reasons,
    )
    return taken.counts


def test_a_dry_run_foretells_that_a_contact_goes_which_the_same_run_made_and_promoted(database: Database) -> None:
    _, made = made_and_promoted_in_one_run("ann@example.com")
    counts = counts_foretold(made)
    assert (counts.numbers["updates_reversed"], counts.numbers["contacts_reversed"]) == (1, 1)
    assert (contacts(), database.rows("SELECT FROM crm_stage_history")) == ({}, [])


@pytest.mark.parametrize("what", ["a step", "an interaction", "a touch"])
def test_a_dry_run_foretells_that_it_stays_where_somebody_relies_on_it(database: Database, what: str) -> None:
    contact, made = made_and_promoted_in_one_run("ann@example.com")
    reasons = {"referenced": 1}
    if what == "a step":
        database.rows(
            """INSERT INTO crm_stage_history (id, "contactId", "toStage") VALUES ('own', %s, 'NEW') RETURNING id""",
            contact,
        )
    elif what == "an interaction":
        database.rows(
            """INSERT INTO crm_interactions (id, "contactId", type, "updatedAt")
               VALUES ('own', %s, 'NOTE', now()) RETURNING id""",
            contact,
        )
    else:
        change("crm_contacts", contact, lastName="Own")
        reasons = {"edited": 2}
    counts = counts_foretold(made)
    assert (counts.numbers["contacts_kept"], counts.reasons) == (1, reasons)
    assert list(contacts()) == [contact]


def test_a_dry_run_foretells_that_a_contact_goes_which_another_row_filled_in_the_same_run(database: Database) -> None:
    add_lead("ann@example.com", phone=" ")
    other = add_lead("ann@example.com", phone=" ")
    telephone = elsewhere("""UPDATE leads SET phone = '555 0101', "updatedAt" = now() WHERE id = %s""", other)
    with in_batch(1, telephone):
        made = run(update=True)
    assert (made["merged"], made["updated_by_column"]) == (1, {"phone": 1})
    assert counts_foretold(made["run"]).numbers["contacts_reversed"] == 1
    assert contacts() == {}


def test_a_dry_run_counts_what_later_runs_merged_on_top_once(database: Database) -> None:
    lead = add_lead("ann@example.com", phone=" ")
    telephone = elsewhere("""UPDATE leads SET phone = '555 0101', "updatedAt" = now() WHERE id = %s""", lead)
    with in_batch(1, telephone):
        made = run(update=True)
    assert made["updated_by_column"] == {"phone": 1}
    add_lead("ann@example.com", phone="555 0102")
    run()
    assert counts_foretold(made["run"]).numbers["later_merges"] == 1


def test_what_somebody_touched_after_an_update_is_kept(database: Database) -> None:
    lead = add_lead("ann@example.com")
    run()
    change("leads", lead, status="CONVERTED")
    report = update()
    change("crm_contacts", contact_id("leads", lead), lastName="Own")
    dump = database.dump(*LEGACY_TABLES, "contact_update", "ledger_entry")
    counts = roll_back(report["run"]).counts
    assert (counts.numbers["updates_kept"], counts.reasons) == (1, {"edited": 1})
    assert database.dump(*LEGACY_TABLES, "contact_update", "ledger_entry") == dump


def test_what_a_row_does_not_tell_any_more_is_kept(database: Database) -> None:
    lead = add_lead("ann@example.com", phone=" ")
    run()
    change("leads", lead, phone="555 0101")
    report = update()
    change("leads", lead, phone="555 0102", updatedAt="2025-08-08 00:00:00")
    assert roll_back(report["run"]).counts.reasons == {"source_changed": 1}
    assert contact_with("ann@example.com")["phone"] == "555 0101"


def test_what_a_fault_stands_in_for_is_kept(database: Database) -> None:
    lead = add_lead("ann@example.com", phone=" ")
    run()
    change("leads", lead, phone="555 0101")
    report = update()
    database.rows("UPDATE crm_contacts SET phone = '555 0199' RETURNING id")
    assert roll_back(report["run"]).counts.reasons == {"edited": 1}
    assert contact_with("ann@example.com")["phone"] == "555 0199"


def test_what_was_merged_on_top_of_a_value_that_is_taken_out_is_pending_again(database: Database) -> None:
    lead = add_lead("ann@example.com", phone=" ")
    run()
    change("leads", lead, phone="555 0101")
    report = update()
    add_lead("ann@example.com", phone="555 0102")
    run()
    counts = roll_back(report["run"]).counts
    assert (counts.numbers["updates_reversed"], counts.numbers["later_merges"]) == (1, 1)
    assert contact_with("ann@example.com")["phone"] is None
    assert defects() == []
    assert run()["merged"] == 1
    assert contact_with("ann@example.com")["phone"] == "555 0102"
    assert defects() == []


def test_what_a_row_changed_is_known_when_the_row_is_pending_again(database: Database) -> None:
    add_lead("bob@example.com")
    run()
    anothers = add_contact("ann@example.com")
    add_lead("ann@example.com", phone="555 0101")
    add_profile(email="bob@example.com")
    first = run()
    before = contacts()
    second = update()
    assert second["updated_by_column"] == OF_A_PROFILE | {"phone": 1}
    roll_back(first["run"])
    assert contacts()[anothers]["phone"] == "555 0101"
    assert defects() == []
    taken = roll_back(second["run"])
    assert taken.counts.numbers["updates_reversed"] == 2
    assert {key: row | {"userId": None} for key, row in before.items()} == contacts()
    assert defects() == []


def test_a_contact_that_a_later_run_promoted_stays_until_that_run_is_taken_back(database: Database) -> None:
    lead = add_lead("ann@example.com")
    made = run()
    change("leads", lead, status="CONVERTED")
    promoted = update()
    assert roll_back(made["run"]).counts.reasons == {"referenced": 1}
    assert roll_back(promoted["run"]).counts.numbers["updates_reversed"] == 1
    assert roll_back(made["run"]).counts.numbers["contacts_reversed"] == 1
    assert contacts() == {}
    assert database.rows("SELECT FROM contact_update") == []


def test_a_contact_that_a_later_run_filled_goes_with_the_run_that_made_it(database: Database) -> None:
    lead = add_lead("ann@example.com")
    made = run()
    profile = add_profile(email="ann@example.com")
    run()
    change("profiles", profile, companyName="Ann & Co")
    update()
    assert set(ContactUpdate.objects.get().columns.split(",")) == {"company", *OF_A_PROFILE}
    assert roll_back(made["run"]).counts.numbers["contacts_reversed"] == 1
    assert (contacts(), database.rows("SELECT FROM contact_update")) == ({}, [])
    assert run()["created"] == 1
    assert contact_id("leads", lead) not in contacts()

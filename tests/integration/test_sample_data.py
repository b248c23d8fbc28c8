"""Sample people: the same for the same seed, as awkward as real ones, and never beside rows that are there."""

import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date
from functools import cache
from io import StringIO
from itertools import islice, pairwise
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.core.validators import validate_email
from django.db import connection
from psycopg import sql
from pytest_django import Settings

from crm.legacy_schema import GENERATIONS, create_legacy_tables
from crm.sample_data.chance import DAY, HOUR, Chance
from crm.sample_data.population import CHUNK, generate
from crm.sample_data.shapes import SHAPES, TABLES

Rows = list[dict[str, str | None]]

PEOPLE = 3_000
ROLES = {"SUPER_ADMIN", "ADMIN", "LEAD", "CLIENT", "TAX_PREPARER", "AFFILIATE"}
STATUSES = {"NEW", "CONTACTED", "QUALIFIED", "CONVERTED", "DISQUALIFIED"}
LEAD_TYPES = {"CUSTOMER", "TAX_PREPARER", "AFFILIATE"}

every_generation = pytest.mark.parametrize("generation", GENERATIONS)


@cache
def population(generation: str = "2025_10", people: int = PEOPLE, seed: int = 1) -> dict[str, Rows]:
    tables: dict[str, Rows] = {table: [] for table in TABLES}
    for chunk in generate(people, generation, seed):
        for table, rows in chunk.items():
            columns = SHAPES[generation].columns[table]
            tables[table] += [dict(zip(columns, row, strict=True)) for row in rows]
    return tables


def values(rows: Rows, column: str) -> list[str]:
    return [value for row in rows if (value := row[column]) is not None]


def normal(email: str | None) -> str:
    return (email or "").strip().lower()


def is_email(email: str) -> bool:
    try:
        validate_email(normal(email))
    except ValidationError:
        return False
    return normal(email).isascii()


def several(rows: Rows, column: str) -> int:
    """How many people have more than one row, told apart by email."""
    return sum(count > 1 for count in Counter(map(normal, values(rows, column))).values())


# The same for the same seed


def test_the_same_seed_gives_the_same_rows() -> None:
    assert list(generate(500, "2025_11", 7)) == list(generate(500, "2025_11", 7))


def test_another_seed_gives_other_rows() -> None:
    assert list(generate(500, "2025_11", 7)) != list(generate(500, "2025_11", 8))


def test_rows_depend_on_nothing_that_differs_from_one_process_to_the_next() -> None:
    program = "from crm.sample_data.population import generate; print(list(generate(200, '2025_10', 1)))"
    outputs = {
        subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "TZ": zone, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }
    assert len(outputs) == 1


def test_people_come_in_chunks_however_many_there_are() -> None:
    chunks = islice(generate(10**12, "2025_10", 1), 2)
    assert [len(chunk["profiles"]) + len(chunk["leads"]) > CHUNK for chunk in chunks] == [True, True]


# What the tables demand


@every_generation
def test_ids_are_cuids_and_unique(generation: str) -> None:
    ids = [row["id"] for rows in population(generation).values() for row in rows]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("c[0-9a-z]{24}", str(made)) for made in ids)


@every_generation
def test_no_row_was_updated_before_it_was_made_or_after_the_last_day(generation: str) -> None:
    last = f"{SHAPES[generation].last_day} 23:59:59.999"
    for table in ("users", "profiles", "leads", "crm_contacts"):
        for row in population(generation)[table]:
            assert "2022-11-01" <= str(row["createdAt"]) <= str(row["updatedAt"]) <= last
            assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", str(row["createdAt"]))


def test_clerk_ids_have_the_form_of_clerk_and_follow_time() -> None:
    clerk_ids = values(population()["profiles"], "clerkUserId")
    assert clerk_ids
    assert len(set(clerk_ids)) == len(clerk_ids)
    assert all(re.fullmatch("user_[0-9A-Za-z]{27}", clerk_id) for clerk_id in clerk_ids)
    chance = Chance("any", date(2022, 11, 1), date(2025, 10, 31))
    # What a KSUID of noon on the second of November 2022 begins with, worked out by hand.
    noon = ((1_667_390_400 - 1_400_000_000) << 128) // 62**22
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    told = chance.clerk_id(DAY + 12 * HOUR).removeprefix("user_")[:5]
    assert sum(digits.index(digit) * 62**place for place, digit in enumerate(reversed(told))) == noon
    moments = [chance.clerk_id(moment) for moment in range(0, 1000 * DAY, DAY)]
    assert moments == sorted(moments)


# People as they really are


@every_generation
def test_every_role_status_and_lead_type_occurs(generation: str) -> None:
    tables = population(generation)
    roles = set(values(tables["profiles"], "role"))
    assert {role.upper() for role in roles} == ROLES - SHAPES[generation].missing_roles
    assert {"upper": roles <= ROLES, "lower": not roles & ROLES, "both": len(roles) == 12}[SHAPES[generation].roles]
    assert {(row["type"], row["status"]) for row in tables["leads"]} == {(t, s) for t in LEAD_TYPES for s in STATUSES}


def test_a_handful_of_people_has_every_role() -> None:
    assert set(values(population(people=8)["profiles"], "role")) == ROLES


def test_four_people_in_ten_have_an_account() -> None:
    tables = population()
    assert len(tables["profiles"]) / PEOPLE == pytest.approx(0.4, abs=0.03)
    assert len(tables["leads"]) / PEOPLE == pytest.approx(0.92, abs=0.06)
    assert len(tables["crm_contacts"]) / PEOPLE == pytest.approx(0.03, abs=0.01)


def test_one_person_has_several_leads_or_a_lead_and_a_profile() -> None:
    tables = population()
    assert several(tables["leads"], "email") > PEOPLE / 20
    leads, users = (set(map(normal, values(tables[table], "email"))) for table in ("leads", "users"))
    assert len(leads & users) > PEOPLE / 20


def test_emails_of_one_person_differ_by_case() -> None:
    emails = {email.strip() for email in values(population()["leads"], "email")}
    assert len(emails) - len({email.lower() for email in emails}) > PEOPLE / 100


def test_two_accounts_differ_by_case_alone() -> None:
    assert several(population()["users"], "email") > 0


def test_some_emails_are_none() -> None:
    tables = population()
    assert not all(map(is_email, values(tables["users"], "email")))
    bad = [email for email in values(tables["leads"], "email") if not is_email(email)]
    assert 0 < len(bad) < len(tables["leads"]) / 50


@every_generation
def test_no_email_can_reach_anybody(generation: str) -> None:
    for table in ("users", "leads", "crm_contacts"):
        for email in filter(is_email, values(population(generation)[table], "email")):
            assert re.search(r"[@.]example\.(com|net|org)$", normal(email))


def test_names_are_accented_multi_part_spaced_or_blank() -> None:
    last_names = values(population()["leads"], "lastName")
    assert any(not name.isascii() for name in last_names)
    assert any(" " in name.strip() for name in last_names)
    assert any(name.strip() and name != name.strip() for name in last_names)
    assert any(not name.strip() for name in last_names)
    assert None in {row["firstName"] for row in population()["profiles"]}


def test_phones_come_in_every_form() -> None:
    forms = {re.sub(r"\d", "9", phone) for phone in values(population()["leads"], "phone")}
    assert {"(999) 999-9999", "+99999999999", "9999999999 ext 9", ""} <= forms
    assert len(forms) > 12


def test_only_october_has_profiles_with_no_user_and_even_with_no_key_at_all() -> None:
    profiles = population("2025_10")["profiles"]
    assert any(row["userId"] is None and row["clerkUserId"] for row in profiles)
    assert any(row["userId"] is None and row["clerkUserId"] is None for row in profiles)
    assert all(row["userId"] for row in population("2025_11")["profiles"])


def test_most_people_came_without_a_referrer_and_are_written_down_as_direct() -> None:
    leads = population()["leads"]
    direct = [row for row in leads if row["attributionMethod"] == "direct"]
    assert len(direct) > len(leads) / 2
    assert not any((row["referrerUsername"] or "").strip() for row in direct)
    assert {row["commissionRate"] for row in direct} == {"0.00", None}


def test_attributions_are_whole_partial_or_missing() -> None:
    leads = population()["leads"]
    assert any(row["commissionRateLockedAt"] for row in leads)
    assert any(row["commissionRate"] and not row["commissionRateLockedAt"] for row in leads)
    assert any(row["referrerUsername"] == "" for row in leads)
    assert {"5.00", "7.50"} <= set(values(leads, "commissionRate"))
    assert len(set(values(leads, "attributionConfidence"))) > 3


def test_leads_are_assigned_to_profiles_users_and_preparers_who_are_gone() -> None:
    tables = population()
    assigned = set(values(tables["leads"], "assignedPreparerId"))
    preparers = [row for row in tables["profiles"] if row["role"] == "TAX_PREPARER"]
    profile_ids, user_ids = set(values(preparers, "id")), set(values(preparers, "userId"))
    assert assigned & profile_ids
    assert assigned & user_ids
    assert assigned - profile_ids - user_ids - {""}


@every_generation
def test_intakes_are_open_or_became_a_client(generation: str) -> None:
    tables = population(generation)
    intakes = tables["tax_intake_leads"]
    assert len(intakes) > PEOPLE / 5
    assert {row["country_code"] for row in intakes} == {"+1", "+52"}
    if generation not in ("2025_10", "2025_10_mixed"):
        assert {row["convertedToClient"] for row in intakes} == {"t", "f"}
        profiles = set(values(tables["profiles"], "id"))
        linked = values(intakes, "profileId")
        assert linked
        assert profiles.issuperset(linked)
    if generation in ("2025_12_c", "2026_01"):
        assert {row["unqualified"] for row in intakes} == {"t", "f"}
        assert any(row["expiresAt"] for row in intakes)


@every_generation
def test_clients_have_preparers_of_whom_some_are_past(generation: str) -> None:
    tables = population(generation)
    preparers = {row["id"] for row in tables["profiles"] if str(row["role"]).upper() == "TAX_PREPARER"}
    assert preparers.issuperset(values(tables["client_preparers"], "preparerId"))
    assert {row["isActive"] for row in tables["client_preparers"]} == {"t", "f"}


def test_those_who_wait_for_approval_are_users_without_a_profile() -> None:
    tables = population("2026_01")
    with_profile = set(values(tables["profiles"], "userId"))
    assert len([row for row in tables["users"] if row["id"] not in with_profile]) > PEOPLE / 100


def test_a_profile_has_an_email_of_its_own_since_january() -> None:
    assert values(population("2026_01")["profiles"], "email")


def test_the_crm_knows_some_people_already_and_contradicts_some_accounts() -> None:
    tables = population(people=20_000)
    email_of = {row["id"]: normal(row["email"]) for row in tables["users"]}
    contacts = tables["crm_contacts"]
    by_user = [row for row in contacts if row["userId"]]
    assert any(normal(row["email"]) == email_of[row["userId"]] for row in by_user)
    strangers = [row for row in by_user if normal(row["email"]) != email_of[row["userId"]]]
    assert any(normal(row["email"]) in email_of.values() for row in strangers)
    assert any(row["clerkUserId"] and not row["userId"] for row in contacts)
    assert any(str(row["email"]) != normal(row["email"]) for row in contacts)
    assert {row["contactId"] for row in tables["crm_interactions"]} <= {row["id"] for row in contacts}


def test_secrets_are_there_and_plainly_made_up() -> None:
    tables = population()
    assert {ssn[:7] for ssn in values(tables["profiles"], "ssn")} == {"000-00-"}
    assert any(row["bankDetails"] for row in tables["profiles"])
    assert all("not.a.real.hash" in password for password in values(tables["users"], "hashedPassword"))


# The command


@pytest.fixture
def empty_schema(db: None, settings: Settings) -> str:
    """A schema that does not exist yet, beside the one of the other tests."""
    settings.LEGACY_SCHEMA = "sample_data"
    return "sample_data"


def load(**options: Any) -> str:
    stdout = StringIO()
    call_command("load_sample_data", stdout=stdout, **options)
    return stdout.getvalue()


def refusal(**options: Any) -> str:
    """The one line that refuses, with exit code 2."""
    with pytest.raises(CommandError) as refused:
        load(**options)
    assert refused.value.returncode == 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


def count(table: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier("sample_data", table)))
        return int(cursor.fetchone()[0])


def execute(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def create(generation: str) -> None:
    with connection.cursor() as cursor:
        create_legacy_tables(cursor, generation)


@every_generation
def test_missing_tables_are_made_and_filled(empty_schema: str, generation: str) -> None:
    output = load(people=600, generation=generation, seed=3)
    written = {table: len(rows) for table, rows in population(generation, 600, 3).items()}
    assert {table: count(table) for table in TABLES} == written
    assert re.search(rf"^leads +{written['leads']:,}$", output, re.MULTILINE)
    assert re.search(
        rf"^600 people of generation {generation} loaded: {sum(written.values()):,} rows in ", output, re.M
    )


@every_generation
def test_empty_tables_of_that_generation_are_filled(empty_schema: str, generation: str) -> None:
    create(generation)
    load(people=50, generation=generation)
    assert count("profiles") > 0


def test_the_rows_in_the_database_are_those_that_were_made(empty_schema: str) -> None:
    load(people=600)
    made = population("2025_10", 600)["leads"]
    with connection.cursor() as cursor:
        cursor.execute('SELECT id, "firstName", email, message FROM sample_data.leads')
        stored = {row[0]: row[1:] for row in cursor.fetchall()}
    assert stored == {row["id"]: (row["firstName"], row["email"], row["message"]) for row in made}


@pytest.mark.parametrize("table", ["users", "leads"])
def test_tables_that_hold_rows_are_left_alone(empty_schema: str, table: str) -> None:
    create("2025_10")
    columns = 'id, email, "updatedAt"' + (', type, "firstName", "lastName", phone' if table == "leads" else "")
    row = "'1', 'ana@example.com', now()" + (", 'CUSTOMER', 'Ana', 'Li', ''" if table == "leads" else "")
    execute(f"INSERT INTO sample_data.{table} ({columns}) VALUES ({row})")
    assert f"already holds rows, in {table}" in refusal(people=10)
    assert [count("users") + count("leads"), count("profiles")] == [1, 0]


@pytest.mark.parametrize(
    ("there", "generation"), [*pairwise(GENERATIONS), *pairwise(reversed(GENERATIONS)), ("2025_10", "2026_01")]
)
def test_tables_of_another_generation_are_left_alone(empty_schema: str, there: str, generation: str) -> None:
    create(there)
    assert "--generation" in refusal(people=10, generation=generation)
    assert count("users") == 0


def test_a_database_with_some_of_the_tables_is_left_alone(empty_schema: str) -> None:
    create("2025_10")
    execute("DROP TABLE sample_data.leads")
    assert "leads missing" in refusal(people=10)


def test_what_the_database_refuses_leaves_nothing_behind_and_quotes_nobody(empty_schema: str) -> None:
    create("2025_10")
    execute('ALTER TABLE sample_data.leads ADD CHECK ("attributionConfidence" = 0)')
    message = refusal(people=100)
    assert "violates check constraint" in message
    assert "@" not in message
    assert [count(table) for table in TABLES] == [0] * len(TABLES)


@pytest.mark.parametrize("people", [0, -1])
def test_nobody_is_not_a_number_of_people(people: int) -> None:
    assert f"--people {people}" in refusal(people=people)

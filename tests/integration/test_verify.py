"""The verification: silent after a run, and loud about each fault that somebody plants."""

from __future__ import annotations

import csv
import re
import stat
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, ProgrammingError, connection
from hypothesis import assume, given
from hypothesis import strategies as st

from crm.attribution import COLUMNS as ATTRIBUTION_DDL
from crm.backfill.read.rows import NONE_PROVEN
from crm.outcome import Source
from crm.postgres import snapshot
from crm.rules.mapping import contact_id
from crm.verification import VerificationReport, comparison, runner, verify
from crm.verification.findings import KEPT, Check, Finding, Kind
from crm.verification.schema import WANTED
from tests.conftest import Database
from tests.support import builders, reference
from tests.support.circumstances import acting_as, reading_role, without_own_schema
from tests.support.commands import Finished, called, files_no_larger_than, run, statements
from tests.support.populations import GENERATIONS, insert_population, populations
from tests.support.profiles import against_the_database

LATER = "2099-01-01 00:00:00"
ASSIGNMENT = ("assignedPreparerId", "assignedAt")
SECRETS = ("Zelda", "Quimby", "zelda.quimby@example.com", "555 0199", "Quimby & Daughters", "ref-zelda")


def found() -> list[Finding]:
    """Every finding, in the order of the checks."""
    return sorted(verified().findings.kept, key=str)


def verified(**watchers: Any) -> VerificationReport:
    return verify(connection, **watchers)


def command(*arguments: str) -> Finished:
    """`manage.py verify_crm_contacts` with these arguments, in this process."""
    return called("verify_crm_contacts", *arguments)


def change(statement: str, *parameters: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        assert cursor.rowcount == 1


def own_contact(row: str) -> str:
    return contact_id(*row.split(":"))


def defect(check: Check, row: str | None, contact: str | None, *columns: str) -> Finding:
    return Finding(check, Kind.DEFECT, row, contact, columns)


def add_client(**columns: Any) -> str:
    """A client who is in the CRM since a run; returns the row's reference."""
    return f"profiles:{builders.add_profile(email='pat@example.com', **columns)}"


def add_attributed_lead(email: str = "lee@example.com", **columns: Any) -> str:
    """A lead with a commission; returns the row's reference."""
    attribution = {"referrerUsername": "ref", "referrerType": "AFFILIATE", "commissionRate": "12.50"}
    return f"leads:{builders.add_lead(email, **(attribution | columns))}"


# Clean


@pytest.mark.parametrize("generation", GENERATIONS)
@against_the_database(12)
@given(data=st.data())
def test_nothing_is_found_after_a_run_and_nothing_is_written(
    database: Database, generation: str, data: st.DataObject
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    with connection.cursor() as cursor:
        insert_population(cursor, population)
    run(only=tuple(source for source in Source if data.draw(st.booleans(), label=source)))
    last = run()
    before = database.dump()
    report = verified()
    assert sorted(report.findings.kept, key=str) == sorted(expected_of_lost_ledgers(population), key=str)
    assert database.dump() == before
    entries = builders.ledger().values()
    assert report.entries == Counter(str(entry["outcome"]) for entry in entries)
    assert report.comparison.compared == report.comparison.matching == report.entries.get("created", 0)
    assert (report.comparison.modified, report.deleted, report.rows_gone) == (0, {}, {})
    assert (report.row_counts.rows, report.row_counts.in_ledger, sum(report.row_counts.pending.values())) == (
        sum(len(getattr(population, table)) for table in reference.TABLES if table != "users")
        + len(reference.users_without_profile(population)),
        len(entries),
        0,
    )
    assert report.row_counts.excluded == last["excluded"]


def expected_of_lost_ledgers(population: reference.Population) -> Iterator[Finding]:
    """Some populations hold contacts with ids of ours from a time whose ledger was lost. A row that is not to be
    migrated gets no entry for its own."""
    there = {contact["id"] for contact in population.contacts}
    for table in reference.TABLES:
        for row in getattr(population, table):
            own = reference.contact_id_of(f"{table}:{row['id']}")
            if own in there and reference.exclusion(table, row, population.stages):
                yield defect(Check.MISSING_ENTRY, f"{table}:{row['id']}", own)


def test_rows_that_no_run_has_seen_are_pending_and_no_defect(database: Database) -> None:
    add_client()
    run()
    builders.add_profile("AFFILIATE", email="late@example.com")
    builders.add_lead("later@example.com")
    builders.add_lead("latest@example.com")
    ended = command("--json")
    assert ended.code == 0
    assert ended.answer["pending"] == 3
    assert ended.answer["pending_by_source"] == {
        "clients": 0,
        "preparers": 0,
        "affiliates": 1,
        "converted_leads": 0,
        "converted_intakes": 0,
        "active_leads": 2,
        "open_intakes": 0,
        "lead_profiles": 0,
        "signups": 0,
    }
    assert ended.answer["rows"] == 4
    assert re.search(r"pending +3 +no defect", command().stdout)


def test_the_snapshot_is_one_moment_and_refuses_to_write(database: Database) -> None:
    seen: list[str] = []

    def look(_contacts: int) -> None:
        with connection.cursor() as cursor:
            for setting in ("transaction_isolation", "transaction_read_only"):
                cursor.execute(f"SHOW {setting}")
                seen.extend(cursor.fetchone())

    add_client()
    run()
    verified(on_page=look)
    assert seen == ["repeatable read", "on"]


def test_the_right_to_select_is_enough(database: Database) -> None:
    add_client()
    builders.add_lead("pat@example.com", assignedPreparerId="nobody")
    run()
    with verifying_role(database) as role, acting_as(role):
        ended = command("--json")
    assert (ended.code, ended.answer["notes"]) == (0, [])
    assert ended.answer["compared"] == 1


@contextmanager
def verifying_role(database: Database) -> Iterator[str]:
    with reading_role(database) as role:
        readable = "ledger_entry, contact_update, backfill_run, conflict_decision"
        for grant in ("USAGE ON SCHEMA crm_backfill", f"SELECT ON {readable}"):
            with connection.cursor() as cursor:
                cursor.execute(f"GRANT {grant} TO {role}")
        yield role


# Planted faults


PLANTED_MOMENT = "2098-01-01 00:00:00"
#: Values that no population has; with the second, where the column may be NULL, comes a value that went.
PLANTED: dict[str, tuple[Any, ...]] = {
    "contactType": ("PREPARER", "AFFILIATE"),
    "stage": ("DOCUMENTS",),
    "attributionConfidence": (77,),
    **dict.fromkeys(("firstName", "lastName"), ("planted",)),
    **dict.fromkeys(("createdAt", "stageEnteredAt"), (PLANTED_MOMENT,)),
    **dict.fromkeys(("assignedAt", "commissionRateLockedAt", "lastContactedAt"), (PLANTED_MOMENT, None)),
    **dict.fromkeys(("phone", "company", "source"), ("planted", None)),
    **dict.fromkeys(("referrerUsername", "referrerType", "attributionMethod"), ("planted", None)),
    "commissionRate": ("123.45", None),
}
PLACES = {
    (): Kind.DEFECT,
    ("crm",): Kind.CRM_CHANGED,
    ("source",): Kind.SOURCE_CHANGED,
    ("crm", "source"): Kind.CRM_CHANGED,
}


@pytest.mark.parametrize("generation", ["2025_10_mixed", "2025_12"])
@against_the_database(12)
@given(data=st.data(), column=st.sampled_from(sorted(PLANTED)), touched=st.sampled_from(sorted(PLACES)))
def test_one_wrong_value_in_any_contact_is_found_and_blamed_on_who_changed(
    database: Database, generation: str, data: st.DataObject, column: str, touched: tuple[str, ...]
) -> None:
    database.use(generation)
    with connection.cursor() as cursor:
        insert_population(cursor, data.draw(populations(generation)))
    run()
    entries = builders.ledger()
    made = sorted(str(entry["contact_id"]) for entry in entries.values() if entry["outcome"] == "created")
    assume(made)
    contact, value = data.draw(st.sampled_from(made)), data.draw(st.sampled_from(PLANTED[column]))
    before = builders.contacts()[contact][column]
    assume(before != value)
    change(f'UPDATE crm_contacts SET "{column}" = %s WHERE id = %s', value, contact)
    if "crm" in touched:
        change('UPDATE crm_contacts SET "updatedAt" = %s WHERE id = %s', LATER, contact)
    if "source" in touched:
        for table, _, identifier in (row.partition(":") for row in entries if entries[row]["contact_id"] == contact):
            moment = "updated_at" if table == "tax_intake_leads" else "updatedAt"
            change(f'UPDATE {table} SET "{moment}" = %s WHERE id = %s', LATER, identifier)
    kinds = [finding.kind for finding in found() if finding.contact_id == contact and column in finding.columns]
    assert kinds == [PLACES[touched]]


#: What the application may do to a row, and people to a contact: white space, case, and what Python and PostgreSQL may
#: see in different ways.
ODD_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "users": {"email": ("", " ann@example.com", "ANN@example.com\u3000", "ann@\u00c9xample.com", "a..b@example.com")},
    "profiles": {
        **dict.fromkeys(("firstName", "lastName", "phone", "companyName"), ("", "\u2003 Ann", "\u0130", None)),
        "userId": (None,),
    },
    "leads": {
        **dict.fromkeys(("firstName", "lastName", "phone", "source"), ("", "\u2003 Ann\x1f", "\u0130")),
        "email": ("ann", "ANN@EXAMPLE.COM", "ann@example.com\x85", "ann@localhost", "\u017fam@example.com"),
        "type": ("AFFILIATE",),
        "status": ("CONVERTED", "CONTACTED", "DISQUALIFIED"),
        "assignedPreparerId": ("", "nobody", None),
        **dict.fromkeys(("referrerUsername", "attributionMethod"), ("", "planted", None)),
        **dict.fromkeys(("lastContactedAt", "updatedAt", "createdAt"), (PLANTED_MOMENT,)),
    },
    "tax_intake_leads": {
        **dict.fromkeys(("first_name", "last_name", "phone", "country_code"), ("", "\u2003 Ann\x1f", "+52", "+1 ")),
        "email": ("ann", "ANN@EXAMPLE.COM", "ann@example.com\x85", "\u017fam@example.com"),
        "assignedPreparerId": ("", "nobody", None),
        **dict.fromkeys(("referrerUsername", "attributionMethod"), ("", "phone_match", None)),
        **dict.fromkeys(("lastContactedAt", "updated_at", "created_at", "convertedAt"), (PLANTED_MOMENT,)),
        **dict.fromkeys(("convertedToClient", "unqualified"), (True, False)),
    },
    "crm_contacts": {**PLANTED, "email": ("ann@localhost", "Ann@Example.com"), "updatedAt": (PLANTED_MOMENT,)},
}


@pytest.mark.parametrize("generation", ["2025_10_mixed", "2026_01"])
@against_the_database(12)
@given(data=st.data())
def test_what_the_server_proves_is_what_the_rules_find_alike(
    database: Database, generation: str, data: st.DataObject
) -> None:
    database.use(generation)
    with connection.cursor() as cursor:
        insert_population(cursor, data.draw(populations(generation)))
    run()
    for table in data.draw(st.lists(st.sampled_from(sorted(ODD_VALUES)), max_size=3)):
        column = data.draw(st.sampled_from(sorted(ODD_VALUES[table])))
        value = data.draw(st.sampled_from(ODD_VALUES[table][column]))
        there = sorted(identifier for (identifier,) in database.rows(f"SELECT id FROM {table}"))
        # Some generations lack a column.
        with suppress(IntegrityError, ProgrammingError), connection.cursor() as cursor:
            for identifier in data.draw(st.lists(st.sampled_from(there), max_size=2)) if there else ():
                cursor.execute(f'UPDATE {table} SET "{column}" = %s WHERE id = %s', [value, identifier])
    proven = verified()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "proven_contacts", lambda *_: (NONE_PROVEN, {}))
        by_the_rules = verified()
    assert sorted(proven.findings.kept, key=str) == sorted(by_the_rules.findings.kept, key=str)
    assert proven.comparison == by_the_rules.comparison


def test_contacts_of_plain_rows_are_compared_on_the_server(database: Database) -> None:
    builders.add_many_leads(20)
    builders.add_many_leads(5, "CONVERTED", first=21)
    preparer = builders.add_profile("TAX_PREPARER", email="Preparer@Example.com ", firstName=" Ann", companyName="")
    builders.add_profile(id="c0001")
    add_attributed_lead(assignedPreparerId=preparer, lastContactedAt="2024-01-01")
    builders.add_intake("ina@example.com")
    referred = {"referrerUsername": "ref", "attributionMethod": "email_match", "assignedPreparerId": preparer}
    builders.add_intake("ida@example.com", lastContactedAt="2024-01-01", **referred)
    run()
    with statements() as sent:
        report = verified()
    assert (report.comparison.compared, report.comparison.matching, report.defects) == (30, 30, 0)
    assert not any("AS wanted(" in statement.sql for statement in sent), "a page of rows"


def test_what_the_server_cannot_compare_is_compared_by_the_rules(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead = add_attributed_lead()
    run()
    refused = "SELECT id, false AS touched FROM crm_contacts WHERE 1 / (length(id) - length(id)) = 1"
    monkeypatch.setattr(comparison, "proven_contacts", lambda *_: (refused, {}))
    change("UPDATE crm_contacts SET phone = NULL")
    assert found() == [defect(Check.FIELDS, lead, own_contact(lead), "phone")]


def test_a_wrong_rate_and_a_swapped_referrer_are_found(database: Database) -> None:
    first = add_attributed_lead("first@example.com")
    second = add_attributed_lead("second@example.com", referrerUsername="other", commissionRate="10.00")
    run()
    assert found() == []
    change('UPDATE crm_contacts SET "commissionRate" = 12.51 WHERE id = %s', own_contact(first))
    change("UPDATE crm_contacts SET \"referrerUsername\" = 'ref' WHERE id = %s", own_contact(second))
    assert found() == sorted(
        (
            defect(Check.FIELDS, first, own_contact(first), "commissionRate"),
            defect(Check.FIELDS, second, own_contact(second), "referrerUsername"),
        ),
        key=str,
    )
    assert command().code == 1


def test_an_attribution_that_a_merge_left_behind_is_found(database: Database) -> None:
    client = add_client(phone="555 0100")
    add_attributed_lead("pat@example.com")
    run()
    assert found() == []
    filled = '"referrerUsername" = NULL, "referrerType" = NULL, "commissionRate" = NULL'
    change(f"UPDATE crm_contacts SET {filled} WHERE id = %s", own_contact(client))
    lost = defect(Check.FIELDS, client, own_contact(client), "referrerUsername", "referrerType", "commissionRate")
    assert found() == [lost]
    # Even if the ledger says nothing of it.
    change("UPDATE ledger_entry SET filled = NULL WHERE outcome = 'merged'")
    assert found() == [lost]


@pytest.mark.parametrize("runs", [1, 2])
def test_an_attribution_is_held_against_one_row_whole(database: Database, runs: int) -> None:
    first = add_attributed_lead(referrerType=None, commissionRate=None, createdAt="2024-01-01")
    if runs == 2:
        run()
    builders.add_lead("lee@example.com", attributionMethod="cookie", attributionConfidence=85)
    run()
    # Without its referrer, the contact has no attribution: the second lead might fill it, but never was to.
    change('UPDATE crm_contacts SET "referrerUsername" = NULL')
    assert found() == [defect(Check.FIELDS, first, own_contact(first), "referrerUsername")]
    change('UPDATE crm_contacts SET "attributionConfidence" = 77')
    both = ("referrerUsername", "attributionConfidence")
    assert found() == [defect(Check.FIELDS, first, own_contact(first), *both)]


def test_a_confidence_is_held_against_the_row_that_brought_the_attribution(database: Database) -> None:
    client = add_client()
    referred: dict[str, Any] = {"referrerUsername": "first", "attributionMethod": "cookie", "attributionConfidence": 0}
    builders.add_lead("pat@example.com", createdAt="2024-01-01", **referred)
    add_attributed_lead("pat@example.com", attributionConfidence=85)
    run()
    assert found() == []
    change('UPDATE crm_contacts SET "attributionMethod" = NULL, "attributionConfidence" = 85')
    both = ("attributionMethod", "attributionConfidence")
    assert found() == [defect(Check.FIELDS, client, own_contact(client), *both)]


def test_a_value_that_the_ledger_says_a_merge_filled_is_held_against_the_merged_row(database: Database) -> None:
    client = add_client()
    lead = add_attributed_lead("pat@example.com")
    run()
    change("UPDATE crm_contacts SET \"referrerUsername\" = 'thief' WHERE id = %s", own_contact(client))
    assert found() == [defect(Check.FIELDS, client, own_contact(client), "referrerUsername")]
    change('UPDATE leads SET "updatedAt" = %s WHERE id = %s', LATER, lead.partition(":")[2])
    assert [(finding.kind, finding.columns) for finding in found()] == [(Kind.SOURCE_CHANGED, ("referrerUsername",))]
    change("DELETE FROM leads WHERE id = %s", lead.partition(":")[2])
    # What it filled can be held against nothing any more.
    filled = Finding(Check.FIELDS, Kind.SOURCE_CHANGED, client, own_contact(client), ("phone", *ATTRIBUTION_DDL))
    assert found() == [filled]


def test_a_deleted_ledger_entry_is_found(database: Database) -> None:
    rows = (add_client(), add_attributed_lead(), f"tax_intake_leads:{builders.add_intake('ina@example.com')}")
    run()
    for row in rows:
        change("DELETE FROM ledger_entry WHERE id = %s", own_contact(row))
    assert found() == sorted((defect(Check.MISSING_ENTRY, row, own_contact(row)) for row in rows), key=str)
    assert command().code == 1


def test_an_entry_of_another_table_is_no_entry(database: Database) -> None:
    client = add_client(id="same")
    lead = add_attributed_lead(id="same")
    run()
    change("DELETE FROM ledger_entry WHERE id = %s", own_contact(lead))
    assert found() == [defect(Check.MISSING_ENTRY, lead, own_contact(lead))]
    assert client == "profiles:same"


def test_a_contact_that_is_gone_is_told_as_a_figure(database: Database) -> None:
    client, lead = add_client(), add_attributed_lead("pat@example.com")
    run()
    change("DELETE FROM crm_contacts WHERE id = %s", own_contact(client))
    report = verified()
    assert (report.findings.kept, report.exit_code) == ([], 0)
    assert report.deleted == {"created": 1, "merged": 1}
    ended = command("--json")
    assert (ended.code, ended.answer["deleted_in_crm"]) == (0, {"created": 1, "merged": 1})
    assert re.search(r"created +1 +1 deleted in the CRM since", command().stdout)
    assert own_contact(lead) not in builders.contacts()


def test_an_entry_that_names_no_contact_is_found(database: Database) -> None:
    client = add_client()
    builders.add_contact("lee@example.com")
    lead = add_attributed_lead()
    run()
    change("UPDATE ledger_entry SET contact_id = NULL WHERE outcome = 'exists'")
    change("UPDATE ledger_entry SET contact_id = NULL WHERE outcome = 'created'")
    assert found() == sorted((defect(Check.NO_CONTACT, row, None) for row in (client, lead)), key=str)


def test_a_contact_with_two_creators_is_found(database: Database) -> None:
    client, lead = add_client(), add_attributed_lead()
    run()
    for row, other in ((client, lead), (lead, client)):
        change("UPDATE ledger_entry SET contact_id = %s WHERE id = %s", own_contact(other), own_contact(row))
        assert found() == [defect(Check.TWO_CREATORS, row, own_contact(other))]
        change("UPDATE ledger_entry SET contact_id = id WHERE id = %s", own_contact(row))


def test_an_entry_under_another_rows_key_is_found(database: Database) -> None:
    client, lead = add_client(), add_attributed_lead()
    run()
    change("UPDATE ledger_entry SET source_id = 'moved' WHERE id = %s", own_contact(client))
    assert defect(Check.WRONG_ID, "profiles:moved", own_contact(client)) in found()
    change("UPDATE ledger_entry SET source = 'clients' WHERE id = %s", own_contact(lead))
    assert defect(Check.WRONG_ID, lead.replace("leads", "profiles"), own_contact(lead)) in found()


@pytest.mark.parametrize(("generation", "role"), [("2025_10", "SUPER_ADMIN"), ("2025_12", "super_admin")])
def test_a_super_admin_who_was_migrated_is_found(database: Database, generation: str, role: str) -> None:
    database.use(generation)
    client = (
        f"profiles:{builders.add_profile('CLIENT' if generation == '2025_10' else 'client', email='p@example.com')}"
    )
    run()
    change('UPDATE profiles SET role = %s::"UserRole"', role)
    assert found() == [defect(Check.EXCLUDED_MIGRATED, client, own_contact(client), "role")]
    assert command().code == 1
    change('UPDATE profiles SET "updatedAt" = %s', LATER)
    assert found() == [Finding(Check.EXCLUDED_MIGRATED, Kind.SOURCE_CHANGED, client, own_contact(client), ("role",))]
    assert command().code == 0
    change("DELETE FROM crm_contacts WHERE id = %s", own_contact(client))
    assert found() == []


def test_a_client_whose_role_is_lead_differs_in_type_and_source(database: Database) -> None:
    client = add_client()
    run()
    change("UPDATE profiles SET role = 'LEAD'")
    columns = ("contactType", "source")
    assert found() == [defect(Check.FIELDS, client, own_contact(client), *columns)]
    change('UPDATE profiles SET "updatedAt" = %s', LATER)
    assert found() == [Finding(Check.FIELDS, Kind.SOURCE_CHANGED, client, own_contact(client), columns)]


def test_a_lead_that_was_migrated_although_the_pipeline_has_no_stage_for_it_is_found(database: Database) -> None:
    lead = add_attributed_lead()
    run()
    change("UPDATE leads SET status = 'DISQUALIFIED'")
    assert found() == [defect(Check.EXCLUDED_MIGRATED, lead, own_contact(lead), "status")]


def test_a_row_that_cannot_be_a_contact_but_is_one_is_found(database: Database) -> None:
    lead = add_attributed_lead()
    run()
    change("UPDATE leads SET email = 'nobody'")
    assert found() == [defect(Check.FIELDS, lead, own_contact(lead), "email")]
    change('UPDATE leads SET "updatedAt" = %s', LATER)
    assert [finding.kind for finding in found()] == [Kind.SOURCE_CHANGED]


def test_a_contact_twice_is_found(database: Database) -> None:
    first, second = add_attributed_lead("one@example.com"), add_attributed_lead("two@example.com")
    run()
    change("UPDATE crm_contacts SET email = ' One@Example.com' WHERE id = %s", own_contact(second))
    assert [finding for finding in found() if finding.check is Check.CONTACT_TWICE] == sorted(
        (defect(Check.CONTACT_TWICE, row, own_contact(row), "email") for row in (first, second)), key=str
    )
    change('UPDATE crm_contacts SET "updatedAt" = %s WHERE id = %s', LATER, own_contact(second))
    assert {finding.kind for finding in found()} == {Kind.CRM_CHANGED}
    assert command().code == 0


def test_a_person_twice_under_somebody_elses_contact_is_ours_unless_it_came_later(database: Database) -> None:
    lead = add_attributed_lead("one@example.com")
    run()
    builders.add_contact("ONE@example.com")
    assert found() == [defect(Check.CONTACT_TWICE, lead, own_contact(lead), "email")]
    for column in ("createdAt", "updatedAt"):
        change(f"""UPDATE crm_contacts SET "{column}" = %s WHERE email = 'ONE@example.com'""", LATER)
        assert [finding.kind for finding in found()] == [Kind.CRM_CHANGED]
        change(f"""UPDATE crm_contacts SET "{column}" = '2020-01-01' WHERE email = 'ONE@example.com'""")
    # Two contacts that others made are none of our business.
    change("DELETE FROM ledger_entry")
    assert [finding.check for finding in found()] == [Check.MISSING_ENTRY]


@pytest.mark.parametrize("column", ["userId", "clerkUserId"])
def test_two_contacts_of_one_account_are_found(database: Database, column: str) -> None:
    user = builders.add_user("some@example.com")
    rows = [add_attributed_lead("one@example.com"), add_attributed_lead("two@example.com")]
    run()
    database.change(f'DROP INDEX "crm_contacts_{column}_key"')
    for row in rows:
        change(f'UPDATE crm_contacts SET "{column}" = %s WHERE id = %s', user, own_contact(row))
    assert {finding for finding in found() if finding.check is Check.CONTACT_TWICE} == {
        defect(Check.CONTACT_TWICE, row, own_contact(row), column) for row in rows
    }


# The schema


@pytest.mark.parametrize("column", ATTRIBUTION_DDL)
def test_a_dropped_column_is_found_and_the_others_are_still_compared(database: Database, column: str) -> None:
    lead = add_attributed_lead()
    run()
    database.change(f'ALTER TABLE crm_contacts DROP COLUMN "{column}"')
    of_index = [defect(Check.INDEX_MISSING, None, None, column)] if column == "referrerUsername" else []
    assert found() == sorted([defect(Check.COLUMN_MISSING, None, None, column), *of_index], key=str)
    change("UPDATE crm_contacts SET phone = NULL")
    assert defect(Check.FIELDS, lead, own_contact(lead), "phone") in found()
    ended = command("--json")
    assert ended.code == 1
    assert ended.answer["contacts"]["with_attribution"] == (None if column == "referrerUsername" else 1)
    assert command().code == 1


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ('DROP INDEX "crm_contacts_referrerUsername_idx"', (Check.INDEX_MISSING, "referrerUsername")),
        (
            """UPDATE pg_index SET indisvalid = false
                WHERE indexrelid = '"crm_contacts_referrerUsername_idx"'::regclass""",
            (Check.INDEX_INVALID, "referrerUsername"),
        ),
        ('ALTER TABLE crm_contacts ALTER "commissionRate" TYPE numeric(6,1)', (Check.COLUMN_TYPE, "commissionRate")),
        (
            'ALTER TABLE crm_contacts ALTER "attributionConfidence" DROP NOT NULL',
            (Check.COLUMN_NULLABILITY, "attributionConfidence"),
        ),
        (
            'ALTER TABLE crm_contacts ALTER "attributionMethod" SET NOT NULL',
            (Check.COLUMN_NULLABILITY, "attributionMethod"),
        ),
    ],
)
def test_a_wrong_schema_is_found(database: Database, statement: str, expected: tuple[Check, str]) -> None:
    assert found() == []
    database.change(statement)
    assert found() == [defect(expected[0], None, None, expected[1])]
    assert command().code == 1


def test_an_index_of_another_name_serves_but_a_partial_one_does_not(database: Database) -> None:
    database.change('DROP INDEX "crm_contacts_referrerUsername_idx"')
    database.change("CREATE INDEX partial ON crm_contacts (\"referrerUsername\") WHERE stage = 'NEW'")
    assert [finding.check for finding in found()] == [Check.INDEX_MISSING]
    database.change('CREATE INDEX other ON crm_contacts ("referrerUsername", email)')
    assert found() == []


def test_the_wanted_columns_are_those_that_the_migration_adds() -> None:
    assert {name: "NOT NULL" in declared for name, declared in ATTRIBUTION_DDL.items()} == WANTED


# Who changed


def test_what_a_person_edited_is_the_crms(database: Database) -> None:
    client = add_client()
    run()
    change("""UPDATE crm_contacts SET "lastName" = 'Married', stage = 'CONTACTED', "updatedAt" = %s""", LATER)
    assert found() == [Finding(Check.FIELDS, Kind.CRM_CHANGED, client, own_contact(client), ("lastName", "stage"))]
    ended = command("--json")
    assert (ended.code, ended.answer["touched_in_crm"], ended.answer["alike"]) == (0, 1, 0)


def test_a_touch_that_changed_no_column_of_ours_is_counted_alone(database: Database) -> None:
    add_client()
    run()
    change('UPDATE crm_contacts SET "taxYear" = 2025, "updatedAt" = %s', LATER)
    report = verified()
    assert (report.findings.kept, report.comparison.modified, report.comparison.matching) == ([], 1, 1)


def test_what_the_source_changed_is_the_sources(database: Database) -> None:
    lead = add_attributed_lead()
    run()
    change("""UPDATE leads SET "commissionRate" = 20, status = 'CONVERTED', "updatedAt" = %s""", LATER)
    (finding,) = found()
    assert (finding.kind, finding.row) == (Kind.SOURCE_CHANGED, lead)
    assert finding.columns == ("contactType", "stage", "stageEnteredAt", "commissionRate")
    assert command().code == 0


def test_a_changed_address_of_the_user_is_the_sources(database: Database) -> None:
    client = add_client()
    run()
    change("UPDATE users SET email = 'new@example.com'")
    assert found() == [defect(Check.FIELDS, client, own_contact(client), "email")]
    change('UPDATE users SET "updatedAt" = %s', LATER)
    of_source = Finding(Check.FIELDS, Kind.SOURCE_CHANGED, client, own_contact(client), ("email",))
    assert found() == [of_source]
    change("UPDATE crm_contacts SET phone = '1'")
    assert found() == [defect(Check.FIELDS, client, own_contact(client), "phone"), of_source]


def test_a_merged_row_that_makes_no_contact_since_its_address_changed_is_the_sources(database: Database) -> None:
    lead = f"leads:{builders.add_lead('pat@example.com')}"
    run()
    add_client(companyName="Pat Ltd")
    run()
    assert found() == []
    change("UPDATE users SET email = 'nobody'")
    assert found() == [defect(Check.FIELDS, lead, own_contact(lead), "userId", "company")]
    change('UPDATE users SET "updatedAt" = %s', LATER)
    assert found() == [Finding(Check.FIELDS, Kind.SOURCE_CHANGED, lead, own_contact(lead), ("userId", "company"))]


@pytest.mark.parametrize("ids", [("p1", "p2"), ("p2", "p1")])
def test_a_value_that_was_filled_twice_is_held_against_the_later_row(database: Database, ids: tuple[str, str]) -> None:
    builders.add_lead("pat@example.com")
    run()
    builders.add_profile(id=ids[0], email="pat@example.com")
    run()
    # The account goes, and its profile and the contact's link with it.
    change("DELETE FROM users")
    builders.add_profile(id=ids[1], email="pat@example.com")
    run()
    assert found() == []


def test_a_preparer_who_came_or_went_since_is_the_sources(database: Database) -> None:
    user = builders.add_user("preparer@example.com")
    lead = add_attributed_lead(assignedPreparerId=user)
    run()
    assert builders.contact_with("lee@example.com")["assignedPreparerId"] is None
    came = builders.add_profile("TAX_PREPARER", userId=user)
    expected = [Finding(Check.FIELDS, Kind.SOURCE_CHANGED, lead, own_contact(lead), ASSIGNMENT)]
    assert [finding for finding in found() if finding.row == lead] == expected
    assert run(update=True)["updated_by_column"] == {"assignment": 1}
    assert builders.contact_with("lee@example.com")["assignedPreparerId"] == came
    assert found() == []
    change("DELETE FROM profiles WHERE id = %s", came)
    assert [finding for finding in found() if finding.row == lead] == expected


@pytest.mark.parametrize("moved", ["2020-01-01", LATER])
def test_a_preparer_whose_profile_is_linked_to_another_user_since_is_the_sources(
    database: Database, moved: str
) -> None:
    user = builders.add_user("preparer@example.com")
    preparer = builders.add_profile("TAX_PREPARER", userId=user)
    lead = add_attributed_lead(assignedPreparerId=user)
    run()
    assert builders.contact_with("lee@example.com")["assignedPreparerId"] == preparer
    other = builders.add_user("preparer2@example.com")
    change('UPDATE profiles SET "userId" = %s, "updatedAt" = %s', other, moved)
    expected = [Finding(Check.FIELDS, Kind.SOURCE_CHANGED, lead, own_contact(lead), ASSIGNMENT)]
    assert [finding for finding in found() if finding.row == lead] == expected
    # That there is no preparer any more is another matter.
    change('UPDATE crm_contacts SET "assignedPreparerId" = NULL WHERE id = %s', own_contact(lead))
    assert defect(Check.FIELDS, lead, own_contact(lead), "assignedAt") in found()


def test_another_preparer_of_a_client_is_the_sources_and_one_whom_nobody_assigned_is_not(database: Database) -> None:
    client = add_client()
    row, contact = client, own_contact(client)
    first, second = (builders.add_profile("ADMIN") for _ in range(2))
    builders.assign_client(client.partition(":")[2], first)
    run()
    assert database.rows('SELECT "assignedPreparerId" FROM crm_contacts WHERE id = %s', contact) == [(first,)]
    assert found() == []
    change("""UPDATE client_preparers SET "isActive" = false""")
    assert found() == [Finding(Check.FIELDS, Kind.SOURCE_CHANGED, row, contact, ASSIGNMENT)]
    builders.assign_client(client.partition(":")[2], second)
    assert found() == [Finding(Check.FIELDS, Kind.SOURCE_CHANGED, row, contact, ASSIGNMENT[:1])]
    change('UPDATE crm_contacts SET "assignedPreparerId" = NULL, "assignedAt" = NULL WHERE id = %s', contact)
    assert found() == [defect(Check.FIELDS, row, contact, *ASSIGNMENT)]


def test_another_code_of_a_preparer_is_the_sources(database: Database) -> None:
    preparer = builders.add_profile("TAX_PREPARER", trackingCode="Ref")
    lead = add_attributed_lead()
    nobodys = add_attributed_lead("other@example.com", referrerUsername=None)
    run()
    assert builders.contact_with("lee@example.com")["assignedPreparerId"] == preparer
    assert found() == []
    change("""UPDATE profiles SET "trackingCode" = 'another' WHERE id = %s""", preparer)
    expected = Finding(Check.FIELDS, Kind.SOURCE_CHANGED, lead, own_contact(lead), ASSIGNMENT)
    assert found() == [expected]
    change('UPDATE crm_contacts SET "assignedPreparerId" = %s WHERE id = %s', preparer, own_contact(nobodys))
    assert found() == sorted(
        [expected, defect(Check.FIELDS, nobodys, own_contact(nobodys), "assignedPreparerId")], key=str
    )


def test_a_preparer_is_looked_for_by_profile_before_by_user(database: Database) -> None:
    user = builders.add_user("preparer@example.com", id="same")
    builders.add_profile("TAX_PREPARER", userId=user)
    add_attributed_lead(assignedPreparerId=builders.add_profile("TAX_PREPARER", id="same"))
    run()
    assert builders.contact_with("lee@example.com")["assignedPreparerId"] == "same"
    assert found() == []


def test_a_preparer_whom_nobody_assigned_is_found(database: Database) -> None:
    preparer = builders.add_profile("TAX_PREPARER")
    unassigned = add_attributed_lead()
    assigned = add_attributed_lead("other@example.com", assignedPreparerId=preparer)
    run()
    for row in (unassigned, assigned):
        change("""UPDATE crm_contacts SET "assignedPreparerId" = 'planted' WHERE id = %s""", own_contact(row))
    assert found() == sorted(
        (defect(Check.FIELDS, row, own_contact(row), "assignedPreparerId") for row in (unassigned, assigned)), key=str
    )


def test_somebody_elses_preparer_is_found_where_the_lead_names_nobody_known(database: Database) -> None:
    preparer = builders.add_profile("TAX_PREPARER")
    lead = add_attributed_lead(assignedPreparerId="nobody")
    run()
    change('UPDATE crm_contacts SET "assignedPreparerId" = %s WHERE id = %s', preparer, own_contact(lead))
    assert found() == [defect(Check.FIELDS, lead, own_contact(lead), "assignedPreparerId")]


def test_a_source_row_that_is_gone_is_the_sources(database: Database) -> None:
    client, lead = add_client(), add_attributed_lead()
    run()
    change("DELETE FROM leads")
    change("DELETE FROM profiles")
    report = verified()
    assert sorted(report.findings.kept, key=str) == sorted(
        (Finding(Check.ROW_GONE, Kind.SOURCE_CHANGED, row, own_contact(row)) for row in (client, lead)), key=str
    )
    assert (report.rows_gone, report.comparison.compared, report.exit_code) == ({"created": 2}, 0, 0)
    change('UPDATE crm_contacts SET "updatedAt" = %s WHERE id = %s', LATER, own_contact(client))
    assert Counter(finding.kind for finding in found()) == {Kind.SOURCE_CHANGED: 1, Kind.CRM_CHANGED: 1}
    assert re.search(r"created +2 +2 without their source row", command().stdout)


# Figures


def test_the_figures_are_those_of_a_hand_made_crm(database: Database) -> None:
    builders.add_contact("other@example.com", contactType="CLIENT", referrerUsername="ref", createdAt="2024-05-06")
    builders.add_profile("CLIENT", email="client@example.com", createdAt="2023-01-01 10:00:00")
    builders.add_profile("CLIENT", email="client2@example.com", createdAt="2023-02-01")
    add_attributed_lead("client2@example.com", createdAt="2022-01-01")
    add_attributed_lead("converted@example.com", status="CONVERTED", createdAt="2025-03-04")
    builders.add_lead("lead@example.com", createdAt="2025-01-01")
    run()
    answer = command("--json").answer
    by_type = answer["contacts_by_type"]

    def figures(total: int, attributed: int, percent: float, oldest: str, newest: str) -> dict[str, Any]:
        return {
            "total": total,
            "with_attribution": attributed,
            "percent": percent,
            "oldest": oldest,
            "newest": newest,
        }

    assert set(by_type) == {"CLIENT", "LEAD"}
    assert by_type["LEAD"]["by_source"] == {
        "active_leads": figures(1, 0, 0.0, "2025-01-01 00:00:00", "2025-01-01 00:00:00")
    }
    of_source = by_type["CLIENT"].pop("by_source")
    assert by_type["CLIENT"] == figures(4, 3, 75.0, "2023-01-01 10:00:00", "2025-03-04 00:00:00")
    assert of_source == {
        "clients": figures(2, 1, 50.0, "2023-01-01 10:00:00", "2023-02-01 00:00:00"),
        "converted_leads": figures(1, 1, 100.0, "2025-03-04 00:00:00", "2025-03-04 00:00:00"),
        "others": figures(1, 1, 100.0, "2024-05-06 00:00:00", "2024-05-06 00:00:00"),
    }
    everybody = answer["contacts"]
    assert set(everybody.pop("by_source")) == {"clients", "converted_leads", "active_leads", "others"}
    assert everybody == figures(5, 3, 60.0, "2023-01-01 10:00:00", "2025-03-04 00:00:00")
    told = command().stdout
    assert re.search(r"CLIENT\W+4\W+3\W+75\.0 %\W+2023-01-01 10:00\W+2025-03-04 00:00", told)
    assert re.search(r"Converted leads\W+1\W+1\W+100\.0 %", told)


def test_a_contact_whose_ledger_was_lost_counts_as_somebody_elses(database: Database) -> None:
    lead = add_attributed_lead()
    builders.add_contact("lee@example.com", id=own_contact(lead))
    run()
    assert builders.ledger()[lead]["outcome"] == "merged"
    assert set(command("--json").answer["contacts"]["by_source"]) == {"others"}


def test_an_empty_crm_has_no_figures_and_no_defect(database: Database) -> None:
    answer = command("--json").answer
    assert (answer["ok"], answer["contacts"]["total"], answer["contacts_by_type"]) == (True, 0, {})
    assert command().code == 0


# Streams


def test_statements_do_not_grow_with_rows_but_with_pages(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(leads: int, page: int) -> int:
        database.empty()
        builders.add_many_leads(leads)
        builders.add_many_leads(leads, "CONVERTED")
        run()
        for module in (snapshot, comparison):
            monkeypatch.setattr(module, "PAGE", page)
        with statements() as of_verification:
            assert verified().comparison.matching == leads
        return len(of_verification)

    assert sent(3, 1000) == sent(300, 1000)
    # A page costs one look at contacts; one at leads, in a savepoint, and none at profiles, of which it has no row; and
    # its entries, two a contact here, two fetches.
    assert sent(80, 10) - sent(40, 10) == 4 * (1 + 3 + 2)


def test_memory_does_not_grow_with_rows_or_findings(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (snapshot, comparison):
        monkeypatch.setattr(module, "PAGE", 200)

    def peak(leads: int) -> int:
        database.empty()
        builders.add_many_leads(leads)
        run()
        with connection.cursor() as cursor:
            cursor.execute("UPDATE crm_contacts SET phone = NULL")
        passed_on = Counter[Kind]()
        tracemalloc.start()
        try:
            report = verified(on_finding=lambda finding: passed_on.update([finding.kind]))
            highest = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert report.defects == passed_on[Kind.DEFECT] == leads
        assert len(report.findings.kept) == KEPT
        return highest

    assert peak(8000) < 1.5 * peak(2000)


def test_no_statement_is_kept_whatever_debug_says(database: Database) -> None:
    add_client()
    run()
    kept: list[int] = []
    connection.force_debug_cursor = True
    try:
        verified(on_page=lambda _contacts: kept.append(len(connection.queries_log)))
    finally:
        connection.force_debug_cursor = False
    assert kept == [0]


# The command


def test_json_is_one_object_and_csv_has_every_finding(database: Database, tmp_path: Path) -> None:
    builders.add_many_leads(KEPT + 5)
    client = add_client()
    run()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE crm_contacts SET phone = NULL, company = 'planted' WHERE \"userId\" IS NULL")
    change('UPDATE profiles SET "firstName" = \'New\', "updatedAt" = %s', LATER)
    file = tmp_path / "findings.csv"
    ended = command("--json", "--csv", str(file))
    said = f"verification: {KEPT + 5} defects (fields {KEPT + 5}); --csv lists them\n"
    assert (ended.code, ended.stderr) == (1, said)
    assert ended.answer["found"] == {"fields": {"defect": KEPT + 5, "source_changed": 1}}
    assert ended.answer["started_at"] < ended.answer["finished_at"]
    assert (ended.answer["ok"], ended.answer["defects"], len(ended.answer["findings"])) == (False, KEPT + 5, KEPT + 1)
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == KEPT + 6
    assert {row["columns"] for row in rows if row["kind"] == "defect"} == {"phone company"}
    assert [row for row in rows if row["kind"] == "source_changed"] == [
        {
            "kind": "source_changed",
            "check": "fields",
            "row": client,
            "contact_id": own_contact(client),
            "columns": "firstName",
            "written_by": "",
        }
    ]
    told = command().stdout
    assert "105 defects" in told
    assert f"and {KEPT + 5 - 10} more" in told
    assert client in told


@pytest.mark.parametrize("name", ["missing/findings.csv", ".", "x" * 300])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_looked_at(
    database: Database, tmp_path: Path, name: str
) -> None:
    with statements() as sent:
        ended = command("--csv", str(tmp_path / name))
    assert (ended.code, ended.stdout, ended.stderr.count("\n"), sent) == (2, "", 1, [])
    assert "with --csv." in ended.stderr


def test_wrong_usage_and_databases_that_do_not_fit_exit_with_two(database: Database) -> None:
    assert command("--no-such-thing").code == 2
    with without_own_schema():
        ended = command()
    assert (ended.code, ended.stdout) == (2, "")
    assert "no ledger" in ended.stderr
    database.change("DROP TABLE crm_stage_history, crm_interactions, crm_contacts")
    ended = command("--json")
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert "crm_contacts" in ended.stderr


def test_a_verification_that_cannot_begin_leaves_no_file_and_the_name_free(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "findings.csv"
    with without_own_schema():
        assert command("--csv", str(file)).code == 2
    assert list(tmp_path.iterdir()) == []
    assert command("--csv", str(file)).code == 0
    assert file.read_text(encoding="utf-8") == "kind,check,row,contact_id,columns,written_by\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_disk_that_is_full_breaks_the_verification_off(database: Database, tmp_path: Path) -> None:
    add_attributed_lead("ann@example.com")
    run()
    change("UPDATE crm_contacts SET phone = 'planted'")
    with files_no_larger_than(40):
        ended = command("--csv", str(tmp_path / "findings.csv"))
    assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "findings.csv cannot be written (File too large)" in ended.stderr


def test_a_database_that_breaks_off_quotes_nobody(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: Any) -> dict[str, int]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT %s::integer", [SECRETS[2]])
        return {}

    monkeypatch.setattr(runner, "count_rows_gone", break_off)
    ended = command()
    assert (ended.code, ended.stdout) == (2, "")
    assert "DataError (22P02)" in ended.stderr
    assert SECRETS[2] not in ended.stderr


def test_no_output_holds_personal_data(database: Database, tmp_path: Path) -> None:
    people = {"firstName": SECRETS[0], "lastName": SECRETS[1], "phone": SECRETS[3]}
    client = builders.add_profile(email=SECRETS[2], companyName=SECRETS[4], **people)
    for email in (SECRETS[2], f"x{SECRETS[2]}", f"y{SECRETS[2]}", f"z{SECRETS[2]}"):
        add_attributed_lead(email, **(people | {"referrerUsername": SECRETS[5]}))
    run()
    change("""UPDATE crm_contacts SET "lastName" = 'Other', company = NULL WHERE email = %s""", SECRETS[2])
    change("UPDATE crm_contacts SET email = %s WHERE email = %s", SECRETS[2].upper(), f"x{SECRETS[2]}")
    change("UPDATE leads SET \"updatedAt\" = %s, phone = '' WHERE email = %s", LATER, f"y{SECRETS[2]}")
    change('UPDATE crm_contacts SET "updatedAt" = %s, phone = NULL WHERE email = %s', LATER, f"z{SECRETS[2]}")
    file = tmp_path / "findings.csv"
    told = [command().stdout, command("--json", "--csv", str(file)).stdout, file.read_text(encoding="utf-8")]
    for text in told:
        assert client in text
        found = set(re.findall(r"defect|source_changed|crm_changed", text))
        assert {kind.value for kind in Kind} - {Kind.RULES_CHANGED} <= found or (
            "Changed in the CRM" in text and "Changed in the source" in text
        )
        assert [secret for secret in SECRETS if secret.lower() in text.lower()] == []

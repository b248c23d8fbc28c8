"""Intakes: databases without the table or some of its columns, and rows that the application deletes."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connection

from crm.checks import check_fit, check_rights, check_run
from crm.outcome import Source
from crm.rollback.runner import roll_back
from crm.rules.mapping import contact_id
from crm.verification import verify
from crm.verification.findings import Kind
from tests.conftest import Database
from tests.support.builders import (
    LATER,
    add_contact,
    add_intake,
    add_lead,
    add_profile,
    change,
    contact_with,
    contacts,
    ledger,
)
from tests.support.circumstances import in_batch
from tests.support.commands import called, run, update
from tests.support.processes import session

#: The columns that a database may lack.
OPTIONAL = (
    *("country_code", "referrerUsername", "referrerType", "attributionMethod", "assignedPreparerId"),
    *("lastContactedAt", "profileId", "convertedToClient", "convertedAt", "unqualified", "unqualifiedAt"),
)


def expire(*intakes: str) -> None:
    """Delete intakes, as the application does when they expire."""
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM tax_intake_leads WHERE id = ANY(%s)", [list(intakes)])


def defects() -> list[object]:
    return [finding for finding in verify(connection).findings.kept if finding.kind is Kind.DEFECT]


def test_a_database_with_the_required_columns_alone_has_its_intakes_migrated(database: Database) -> None:
    database.use("2026_01")
    dropped = (f'DROP COLUMN "{name}" CASCADE' for name in OPTIONAL)
    database.change(f"ALTER TABLE tax_intake_leads {', '.join(dropped)}")
    intake = add_intake("Ann@example.com")
    assert run(dry_run=True)["created"] == 1
    assert run(workers=2)["by_source"]["open_intakes"]["created"] == 1
    made = contacts()[contact_id("tax_intake_leads", intake)]
    assert (made["contactType"], made["stage"], made["source"], made["phone"]) == (
        *("LEAD", "NEW", "tax_intake_form"),
        "555 0100",
    )
    assert update()["revisited"] == 0
    assert defects() == []


def test_a_database_without_the_table_is_as_it_was(database: Database) -> None:
    add_intake("ann@example.com")
    lead = add_lead("bob@example.com")
    assert run()["created"] == 2
    database.change("DROP TABLE tax_intake_leads CASCADE")
    report = update()
    assert (report["read"], report["rows"], report["balanced"]) == (0, 1, True)
    assert defects() == []
    for command in (
        ("verify_crm_contacts",),
        ("export_backfill_errors", "--with-email"),
        ("trace_contact", f"leads:{lead}"),
    ):
        assert called(*command).code == 0
    assert [*check_rights(["default"]), *check_fit(["default"]), *check_run(["default"])] == []
    refused = called("backfill_crm_contacts", "--only", "open_intakes")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "no table tax_intake_leads" in refused.stderr


def test_a_column_of_another_type_is_refused_by_name(database: Database) -> None:
    database.use("2026_01")
    database.change("ALTER TABLE tax_intake_leads ALTER COLUMN unqualified DROP DEFAULT, ALTER unqualified TYPE text")
    refused = called("backfill_crm_contacts")
    assert (refused.code, refused.stdout) == (2, "")
    assert "tax_intake_leads.unqualified is of the type text" in refused.stderr


def test_an_unqualified_intake_is_excluded_and_counted_where_there_is_no_stage_for_it(database: Database) -> None:
    database.change("ALTER TABLE tax_intake_leads ADD COLUMN unqualified boolean")
    settled = add_intake("ann@example.com")
    run()
    add_intake("bob@example.com", unqualified=True)
    change("tax_intake_leads", settled, unqualified=True)
    for options in ({"dry_run": True}, {"update": True}):
        report = run(**options)
        assert (report["excluded"], report["read"], report["balanced"]) == ({"unqualified": 2}, 0, True)
    assert contact_with("ann@example.com")["stage"] == "NEW"
    assert [str(finding.kind) for finding in verify(connection).findings.kept] == ["source_changed"]


def test_an_intake_that_converts_takes_its_contact_along(database: Database) -> None:
    database.use("2026_01")
    intake = add_intake("ann@example.com", lastContactedAt="2025-02-03")
    run()
    change("tax_intake_leads", intake, convertedToClient=True, convertedAt="2025-04-05")
    assert update()["updated_by_column"] == {"contact_type": 1, "stage": 1}
    contact = contact_with("ann@example.com")
    assert (contact["contactType"], contact["stage"], str(contact["stageEnteredAt"])[:10]) == (
        *("CLIENT", "CLOSED", "2025-04-05"),
    )
    assert defects() == []


def test_an_intake_that_expires_is_no_defect_and_no_obstacle_to_a_rollback(database: Database) -> None:
    add_profile(email="ann@example.com")
    first = run()["run"]
    alone, filling = add_intake("bob@example.com"), add_intake("ann@example.com", phone="555 0199")
    second = run()["run"]
    assert contact_with("ann@example.com")["phone"] == "555 0199"
    expire(alone, filling)
    assert defects() == []
    assert update()["revisited"] == 0
    report = roll_back(second)
    assert report.exit_code == 0
    (left,) = contacts().values()
    assert (left["email"], left["phone"]) == ("ann@example.com", None)
    assert [entry for entry in ledger().values() if entry["source"] == "open_intakes"] == []
    assert roll_back(first).exit_code == 0


def test_what_a_later_update_wrote_over_an_expired_intake_is_kept(database: Database) -> None:
    profile = add_profile(email="ann@example.com")
    run()
    filling = add_intake("ann@example.com", phone="555 0199")
    second = run()["run"]
    change("profiles", profile, phone="555 0111")
    assert update()["updated_by_column"] == {"phone": 1}
    expire(filling)
    assert [str(reason) for reason in roll_back(second).counts.reasons] == ["source_changed"]
    assert contact_with("ann@example.com")["phone"] == "555 0111"


def test_intakes_that_expire_while_a_run_reads_them_do_not_disturb_it(database: Database) -> None:
    for number in range(6):
        add_intake(f"person-{number}@example.com", id=f"intake{number}")

    def happening() -> None:
        with session() as other:
            other.execute("DELETE FROM public.tax_intake_leads WHERE id IN ('intake0', 'intake1', 'intake4')")

    with in_batch(1, happening):
        report = run(batch_size=2)
    assert (report["status"], report["balanced"]) == ("finished", True)
    assert {"person-0@example.com", "person-5@example.com"} <= {row["email"] for row in contacts().values()}
    assert defects() == []
    assert run()["read"] == 0


def add_many_intakes(people: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO tax_intake_leads (id, first_name, last_name, email, phone, created_at, updated_at)
            SELECT 'intake' || number, 'Ina', 'Intake', 'person-' || number || '@example.com', '555 0100',
                   '2025-01-01'::timestamp + number * interval '1 minute', '2025-02-01'
              FROM generate_series(1, %s) AS number
            """,
            [people],
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_no_person_is_lost_or_doubled_while_intakes_are_added_and_expire(database: Database, workers: int) -> None:
    add_many_intakes(400)
    over, expired = threading.Event(), set()

    def application() -> None:
        with session() as own:
            for number in itertools.count(1):
                deleted = own.execute(
                    "DELETE FROM public.tax_intake_leads WHERE id = ("
                    "SELECT id FROM public.tax_intake_leads ORDER BY random() LIMIT 1) RETURNING id"
                )
                expired.update(deleted.fetchall())
                own.execute(
                    "INSERT INTO public.tax_intake_leads (id, first_name, last_name, email, phone, updated_at) "
                    f"VALUES ('new{number}', 'New', 'Intake', 'new-{number}@example.com', '555 0100', now())"
                )
                own.commit()
                if over.wait(0.005):
                    return

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(application)
        report = run(batch_size=20, workers=workers)
        over.set()
        acting.result()
    assert expired
    assert (report["status"], report["error"], report["balanced"]) == ("finished", 0, True)
    assert run()["balanced"] is True
    left = dict(database.rows("SELECT id, email FROM tax_intake_leads"))
    people = Counter(contact["email"] for contact in contacts().values())
    assert set(people.values()) == {1}
    assert set(left.values()) <= people.keys()
    assert {f"tax_intake_leads:{identifier}" for identifier in left} <= ledger().keys()
    assert len(ledger()) == len(contacts())
    assert defects() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_intake_goes_to_its_profile_s_contact_whatever_its_address(database: Database, workers: int) -> None:
    database.use("2025_11")
    account = add_profile("client", email="ann@example.com")
    add_intake("work@example.com", profileId=account, phone="555 0111")
    add_intake("ann@example.com", phone="555 0122", created_at=LATER)
    theirs = add_contact("work@example.com")
    report = run(workers=workers)
    assert (report["created"], report["merged"]) == (1, 2)
    assert contacts()[contact_id("profiles", account)]["phone"] == "555 0111"
    assert contacts()[theirs]["firstName"] == "Con"


def test_an_intake_that_came_before_its_profile_keeps_a_contact_of_its_own(database: Database) -> None:
    database.use("2025_11")
    intake = add_intake("work@example.com")
    own = run()["created_by_type"]
    account = add_profile("client", email="ann@example.com")
    change("tax_intake_leads", intake, profileId=account, convertedToClient=True)
    report = update()
    assert (own, report["created"], report["kept_by_column"]) == ({"LEAD": 1}, 1, {"identity": 1})
    assert contacts().keys() == {contact_id("tax_intake_leads", intake), contact_id("profiles", account)}


def test_people_whose_intakes_name_a_profile_without_contact_keep_their_preparers(database: Database) -> None:
    database.use("2026_01")
    first, second = (add_profile("tax_preparer", email=f"{name}@example.com") for name in ("first", "second"))
    office = add_profile("admin", email="office@example.com")
    add_intake("ann@example.com", assignedPreparerId=first, profileId=office)
    add_intake("bob@example.com", assignedPreparerId=second, profileId=office, created_at=LATER)
    run()
    preparers = {name: contact_with(f"{name}@example.com")["assignedPreparerId"] for name in ("ann", "bob")}
    assert preparers == {"ann": first, "bob": second}
    assert defects() == []


def test_a_later_intake_with_a_preparer_comes_to_its_person_with_the_next_update(database: Database) -> None:
    database.use("2026_01")
    first, second = (add_profile("tax_preparer", email=f"{name}@example.com") for name in ("first", "second"))
    add_intake("ann@example.com", tax_year=2023, assignedPreparerId=first)
    assert run()["created"] == 3
    assert contact_with("ann@example.com")["assignedPreparerId"] == first
    add_intake("ann@example.com", tax_year=2024, assignedPreparerId=second, created_at=LATER)
    for _ in range(2):
        assert [str(finding.kind) for finding in verify(connection).findings.kept] == ["source_changed"]
        run()
    assert contact_with("ann@example.com")["assignedPreparerId"] == first
    last = update()
    assert last["updated_by_column"] == {"assignment": 1}
    assert contact_with("ann@example.com")["assignedPreparerId"] == second
    assert defects() == []
    assert update()["revisited"] == 0
    assert roll_back(last["run"]).exit_code == 0
    assert contact_with("ann@example.com")["assignedPreparerId"] == first


@pytest.mark.parametrize("converted", [2023, 2024, 2025])
def test_the_latest_of_several_intakes_that_names_a_preparer_has_the_assignment(
    database: Database, converted: int
) -> None:
    """Whichever is read first, and whoever referred the person: a converted one comes before the open ones."""
    database.use("2026_01")
    first, second, referring = (
        add_profile("tax_preparer", email=f"{number}@example.com", trackingCode=f"code{number}") for number in range(3)
    )
    for year, preparer in ((2023, first), (2024, second), (2025, None)):
        add_intake(
            "ann@example.com",
            tax_year=year,
            created_at=f"{year}-03-01",
            assignedPreparerId=preparer,
            referrerUsername="code2",
            convertedToClient=year == converted,
        )
    report = run()
    assert (report["created"], report["merged"], report["assignments"]) == (4, 2, {"own": 1})
    assert contact_with("ann@example.com")["assignedPreparerId"] == second
    assert defects() == []
    assert update()["updated_by_column"].get("assignment") is None
    database.change("DELETE FROM tax_intake_leads WHERE tax_year < 2025")
    assert defects() == []
    update()
    assert contact_with("ann@example.com")["assignedPreparerId"] == second != referring


def test_intakes_are_counted_with_the_leads_and_by_source(database: Database) -> None:
    database.use("2025_11")
    add_lead("ann@example.com")
    add_intake("bob@example.com")
    add_intake("Ann@example.com")
    add_intake("cy@example.com", convertedToClient=True)
    summary = called("backfill_crm_contacts", "--no-progress").stdout
    shown = [" ".join(line.split()) for line in summary.splitlines()]
    assert {"Leads 2", "Clients 1", "Rows by source 4 read"} <= set(shown)
    assert {"converted_intakes 1 1 created", "active_leads 1 1 created", "open_intakes 2 1 created"} <= set(shown)


def test_only_open_intakes(database: Database) -> None:
    add_intake("ann@example.com")
    add_lead("bob@example.com")
    assert run(only=(Source.OPEN_INTAKES,))["by_source"].keys() == {"open_intakes"}

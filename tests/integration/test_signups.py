"""People who signed up and wait for approval: excluded and counted, or migrated as leads if that is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.db import connection

from crm.outcome import Source
from crm.rollback.runner import roll_back
from crm.rules.mapping import contact_id
from crm.tracing import trace_address, trace_reference
from crm.verification import verify
from crm.verification.findings import Kind
from tests.conftest import Database
from tests.support.builders import (
    add_contact,
    add_lead,
    add_profile,
    add_user,
    change,
    contact_with,
    contacts,
    ledger,
)
from tests.support.commands import backfill, called, run, update

GENERATIONS = pytest.mark.parametrize("generation", ["2025_10", "2025_11", "2026_01"])


def defects() -> list[object]:
    return [finding for finding in verify(connection).findings.kept if finding.kind is Kind.DEFECT]


def client(generation: str) -> str:
    """The role as the generation spells it."""
    return "CLIENT" if generation == "2025_10" else "client"


def accounts(report: Any) -> tuple[int, dict[str, int], int, int]:
    """What became of all rows."""
    counts = report.row_counts
    assert counts.balances
    return counts.rows, counts.excluded, counts.in_ledger, sum(counts.pending.values())


# Counted


@GENERATIONS
def test_a_user_without_a_profile_is_counted_and_left_alone(database: Database, generation: str) -> None:
    add_user("ann@example.com")
    add_profile(client(generation), email="bob@example.com")
    for dry_run in (True, False):
        report = run(dry_run=dry_run)
        assert (report["rows"], report["excluded"], report["read"], report["balanced"]) == (
            *(2, {"no_profile": 1}, 1),
            True,
        )
    assert accounts(verify(connection)) == (2, {"no_profile": 1}, 1, 0)
    assert [contact["email"] for contact in contacts().values()] == ["bob@example.com"]
    assert "no_profile" in backfill("--dry-run").stdout


def test_a_dry_run_before_the_migrations_counts_them_as_well(database: Database) -> None:
    add_user("ann@example.com")
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE ledger_entry RENAME TO elsewhere")
    try:
        assert run(dry_run=True)["excluded"] == {"no_profile": 1}
        assert run(dry_run=True, with_signups=True)["created_by_type"] == {"LEAD": 1}
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO ledger_entry")


# Migrated


@pytest.mark.parametrize("workers", [1, 2])
def test_those_who_signed_up_become_leads_if_that_is_asked_for(database: Database, workers: int) -> None:
    user, profile = add_user("Ann@example.com"), add_profile("LEAD", email="bob@example.com", companyName="Bob Ltd")
    foretold = run(dry_run=True, with_signups=True, workers=workers)
    done = run(with_signups=True, workers=workers)
    for name in ("created", "created_by_type", "by_source", "excluded", "rows"):
        assert foretold[name] == done[name]
    assert (done["created_by_type"], done["excluded"]) == ({"LEAD": 2}, {})
    assert {source: counts["created"] for source, counts in done["by_source"].items()} == {
        "lead_profiles": 1,
        "signups": 1,
    }
    ann, bob = contact_with("ann@example.com"), contact_with("bob@example.com")
    assert (ann["id"], ann["userId"]) == (contact_id("users", user), user)
    assert (bob["id"], bob["company"]) == (contact_id("profiles", profile), "Bob Ltd")
    assert {(row["contactType"], row["stage"], row["source"]) for row in (ann, bob)} == {("LEAD", "NEW", "signup")}
    assert defects() == []
    database.rows("UPDATE crm_contacts SET source = 'planted' RETURNING id")
    assert len(defects()) == 2


@pytest.mark.parametrize("generation", ["2025_11"])
def test_the_first_word_of_a_users_name_is_the_first_name(database: Database, generation: str) -> None:
    add_user("ann@example.com", name="Ann Mary Lee ")
    run(with_signups=True)
    assert (contact_with("ann@example.com")["firstName"], contact_with("ann@example.com")["lastName"]) == (
        "Ann",
        "Mary Lee",
    )


def test_runs_without_the_option_leave_them_accounted_for(database: Database) -> None:
    add_user("ann@example.com"), add_profile("LEAD", email="bob@example.com"), add_user("not an address")
    assert run(with_signups=True)["by_reason"] == {"invalid_email": 1}
    add_user("cy@example.com")
    before = contacts(), ledger()
    for options in ({}, {"update": True}, {"recreate_deleted": True}):
        for dry_run in (True, False):
            report = run(**options, dry_run=dry_run)
            assert (report["read"], report["rows"], report["excluded"]) == (0, 4, {"no_profile": 1})
            assert report["balanced"]
    assert (contacts(), ledger()) == before
    assert accounts(verify(connection)) == (4, {"no_profile": 1}, 3, 0)
    again = run(with_signups=True)
    assert (again["already"], again["created"], again["error_new"]) == (2, 1, 0)


def test_a_source_of_signups_alone_needs_the_option(database: Database) -> None:
    add_user("ann@example.com")
    refused = backfill("--only", "signups", "lead_profiles")
    assert (refused.code, refused.stdout) == (2, "")
    assert "--only signups lead_profiles requires --with-signups" in refused.stderr
    assert json.loads(backfill("--only", "signups", "--with-signups", "--json").stdout)["created"] == 1


# A profile that comes later


@GENERATIONS
@pytest.mark.parametrize("edit", [{}, {"email": "new@example.com"}, {"email": "new@example.com", "userId": None}])
def test_a_profile_that_comes_later_meets_the_same_contact(
    database: Database, generation: str, edit: dict[str, Any]
) -> None:
    user = add_user("ann@example.com")
    run(with_signups=True)
    contact = contact_id("users", user)
    if edit:
        change("crm_contacts", contact, **edit)
    profile = add_profile(client(generation), userId=user, phone="555 0100", companyName="Lee Ltd")
    assert run(dry_run=True)["merged"] == run()["merged"] == 1
    assert ledger()[f"profiles:{profile}"]["contact_id"] == contact
    assert list(contacts()) == [contact]
    assert contacts()[contact]["phone"] == "555 0100"
    assert accounts(verify(connection)) == (2, {}, 2, 0)
    assert defects() == []
    # It is no signup any more, and not one anew.
    assert run(with_signups=True)["read"] == 0


def test_a_profile_that_comes_later_meets_the_contact_that_others_had_made(database: Database) -> None:
    contact, user = add_contact("Ann@example.com"), add_user("ann@example.com")
    assert run(with_signups=True)["exists"] == 1
    change("crm_contacts", contact, email="new@example.com")
    add_profile(userId=user)
    add_lead("ann@example.com")
    assert run(dry_run=True)["exists"] == run()["exists"] == 2
    assert list(contacts()) == [contact]


@pytest.mark.parametrize("spelling", ["ann@example.com", "Ann@Example.com"])
def test_a_lead_that_comes_later_meets_the_contact_of_the_user_with_its_address(
    database: Database, spelling: str
) -> None:
    user = add_user(spelling)
    contact = add_contact("other@example.com", userId=user)
    assert run(with_signups=True)["exists"] == 1
    add_lead("ann@example.com")
    assert run(dry_run=True)["exists"] == run()["exists"] == 1
    assert list(contacts()) == [contact]


def test_an_update_makes_a_client_of_who_has_been_approved(database: Database) -> None:
    user, pending = add_user("ann@example.com"), add_profile("LEAD", email="bob@example.com")
    run(with_signups=True)
    add_profile(userId=user, firstName="Anna", lastName="Lee")
    change("profiles", pending, role="CLIENT")
    foretold, done = run(update=True, dry_run=True), update()
    assert foretold["updated_by_column"] == done["updated_by_column"]
    ann, bob = contact_with("ann@example.com"), contact_with("bob@example.com")
    assert (ann["contactType"], ann["source"], ann["firstName"]) == ("CLIENT", "backfill", "Anna")
    assert (bob["contactType"], bob["source"]) == ("CLIENT", "backfill")
    assert defects() == []
    assert update()["revisited"] == update(with_signups=True)["revisited"] == 0
    roll_back(done["run"])
    assert {contact["contactType"] for contact in contacts().values()} == {"LEAD"}


# Taken back, traced, resolved


def test_a_rollback_makes_a_lead_again_of_who_was_approved(database: Database) -> None:
    database.use("2025_12")
    profile = add_profile("lead", email="ann@example.com")
    run(with_signups=True)
    before = contacts()
    change("profiles", profile, role="client")
    report = update(with_signups=True)
    assert report["updated_by_column"] == {"contact_type": 1, "source": 1}
    assert roll_back(report["run"]).exit_code == 0
    assert contacts() == before


def test_a_rollback_takes_them_back_and_leaves_what_was_there(database: Database) -> None:
    lead = add_lead("cy@example.com")
    run()
    before = contacts()
    add_user("ann@example.com"), add_profile("LEAD", email="bob@example.com"), add_user("Cy@example.com")
    report = run(with_signups=True)
    assert (report["created"], report["merged"]) == (2, 1)
    assert contacts()[contact_id("leads", lead)]["userId"] is not None
    roll_back(report["run"])
    assert contacts() == before
    assert run()["excluded"] == {"lead": 1, "no_profile": 2}


def test_a_contact_that_was_deleted_is_not_brought_back(database: Database) -> None:
    user = add_user("ann@example.com")
    run(with_signups=True)
    database.rows("DELETE FROM crm_contacts WHERE id = %s RETURNING id", contact_id("users", user))
    assert run(with_signups=True)["read"] == 0
    assert run(with_signups=True, recreate_deleted=True)["created"] == 1


def test_a_trace_tells_of_users_and_of_profiles_that_wait(database: Database) -> None:
    user, pending = add_user("ann@example.com"), add_profile("LEAD", email="bob@example.com")
    other = add_user("cy@example.com")
    add_profile(userId=other)

    def states(trace: dict[str, Any]) -> dict[str, str]:
        return {row["row"]: row["state"] for row in trace["rows"]}

    run()
    assert states(trace_address(connection, "ANN@example.com")) == {f"users:{user}": "excluded (no_profile)"}
    assert states(trace_address(connection, "bob@example.com")) == {f"profiles:{pending}": "excluded (lead)"}
    assert [row.partition(":")[0] for row in states(trace_address(connection, "cy@example.com"))] == ["profiles"]
    run(with_signups=True)
    assert states(trace_reference(connection, f"users:{user}")) == {f"users:{user}": "in the ledger"}
    assert states(trace_reference(connection, contact_id("users", user))) == {f"users:{user}": "in the ledger"}


def test_a_conflict_of_a_user_is_resolved_like_any_other(database: Database) -> None:
    user = add_user("ann@example.com")
    contact = add_contact("Ann@example.com", userId=add_user("other@example.com"))
    assert run(with_signups=True, only=(Source.SIGNUPS,))["by_reason"] == {"conflict": 1}
    assert f"users:{user}" in called("export_backfill_errors", "--with-email").stdout
    assert called("resolve_crm_conflict", f"users:{user}", "--contact", contact).code == 0
    assert run()["read"] == 0
    assert run(with_signups=True)["exists"] == 1
    assert ledger()[f"users:{user}"]["contact_id"] == contact

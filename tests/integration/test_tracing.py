"""What happened to one person is told from whatever one knows of them, and tells nobody who they are."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from crm.outcome import Source
from crm.rollback.runner import roll_back
from crm.rules.mapping import contact_id
from tests.conftest import Database
from tests.support.builders import add_contact, add_intake, add_lead, add_profile, add_user, contact_with
from tests.support.circumstances import acting_as, reading_role
from tests.support.commands import Finished, called, run
from tests.support.conflicts import resolved

MARK = "canary7q"
NAMED = {"firstName": f"First{MARK}", "lastName": f"Last{MARK}"}
PERSON = NAMED | {"phone": f"555{MARK}"}
ADDRESS = f"ann@{MARK}.example"
LATER = "2025-06-07 08:09:10.111"


def trace(whom: str, *arguments: str) -> Finished:
    """`manage.py trace_contact` in this process."""
    return called("trace_contact", whom, *arguments)


def traced(whom: str) -> dict[str, Any]:
    """What --json prints of something that is known."""
    finished = trace(whom, "--json")
    assert (finished.code, finished.stderr) == (0, "")
    return finished.answer


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a text on standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", StringIO(text))


def a_person() -> tuple[str, str, str]:
    """A profile that made a contact, a lead that was merged, and an update by the lead; profile, lead, contact."""
    profile = f"profiles:{add_profile(email=ADDRESS, **NAMED)}"
    run(only=(Source.CLIENTS,))
    lead = f"leads:{add_lead(ADDRESS.upper(), **PERSON)}"
    run()
    return profile, lead, contact_id(*profile.split(":"))


def test_an_intake_is_traced_like_every_row(database: Database, given: Any) -> None:
    intake = f"tax_intake_leads:{add_intake(ADDRESS.upper(), first_name=MARK)}"
    given(ADDRESS)
    assert [row["state"] for row in traced(intake)["rows"]] == ["pending"]
    assert traced("-") == traced(intake)
    made = run()["run"]
    given(ADDRESS)
    assert traced("-") == traced(intake) == traced(contact_id(*intake.split(":")))
    assert [(row["row"], row["source"]) for row in traced(intake)["rows"]] == [(intake, "open_intakes")]
    roll_back(made)
    assert traced(contact_id(*intake.split(":")))["rows"][0]["row"] == intake


def test_a_contact_a_row_and_an_address_tell_the_same(database: Database, given: Any) -> None:
    profile, lead, contact = a_person()
    add_lead("other@example.com")
    add_contact("another@example.com")
    first = traced(contact)
    assert first == traced(profile) == traced(lead)
    given(f" {ADDRESS.title()} \n")
    assert first == traced("-")
    assert [(row["row"], row["state"], row["source"]) for row in first["rows"]] == [
        (lead, "in the ledger", "active_leads"),
        (profile, "in the ledger", "clients"),
    ]
    assert [(line["row"], line["outcome"], line["filled"]) for line in first["lines"]] == [
        (profile, "created", ["user_id"]),
        (lead, "merged", ["phone"]),
    ]
    assert [(found["contact_id"], found["state"], found["made_by"]) for found in first["contacts"]] == [
        (contact, "there", profile)
    ]
    assert [run["run"] for run in first["runs"]] == [line["run"] for line in first["lines"]]


def test_everything_is_told_for_people_and_nothing_of_theirs(database: Database, given: Any) -> None:
    profile, lead, contact = a_person()
    database.rows("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = %s RETURNING id""", LATER)
    updated = run(update=True)["run"]
    given(ADDRESS)
    shown = [trace(whom) for whom in (contact, profile, lead, "-")] + [trace(contact, "--json")]
    assert {finished.stdout for finished in shown[1:4]} == {shown[0].stdout}
    moments = re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:[\d.]+(.{4})", f"{shown[0].stdout} ", re.DOTALL)
    assert len(moments) >= 7
    assert set(moments) == {" UTC"}, "each moment says in which zone it is, and all in one way"
    for expected in (
        f"Contact {contact}: in the CRM, created by {profile}, created ",
        f"Row {profile}: in the ledger, updated ",
        f"Row {lead}: in the ledger, updated ",
        f"active_leads: merged, contact {contact}, filled phone",
        f"Update in run {updated} of contact {contact} from {lead}: stage (NEW -> COMPLETE)",
        f"Run {updated}: backfill, finished, started ",
    ):
        assert expected in shown[0].stdout
    assert MARK not in "".join(finished.stdout + finished.stderr for finished in shown).lower()


def test_what_became_of_a_contact_that_was_deleted_and_of_a_row_that_is_gone(database: Database) -> None:
    profile, lead, contact = a_person()
    database.rows("DELETE FROM leads RETURNING id")
    database.rows("DELETE FROM crm_contacts RETURNING id")
    found = traced(contact)
    assert [(row["row"], row["state"]) for row in found["rows"]] == [(lead, "gone"), (profile, "in the ledger")]
    assert [contact["state"] for contact in found["contacts"]] == ["deleted"]
    assert "only --recreate-deleted recreates it" in trace(contact).stdout


def test_a_run_that_was_taken_back_is_told_with_the_one_that_took_it_back(database: Database) -> None:
    lead = f"leads:{add_lead(ADDRESS)}"
    made = run()["run"]
    contact = contact_id(*lead.split(":"))
    roll_back(made)
    found = traced(lead)
    assert [(row["row"], row["state"]) for row in found["rows"]] == [(lead, "pending")]
    ((of, by),) = ((rollback["rolls_back"], rollback["run"]) for rollback in found["rollbacks"])
    assert of == made
    assert f"Run {by}: rollback of run {made}, finished, started " in trace(lead).stdout
    assert traced(contact)["rows"] == found["rows"], "the row is known by the id of the contact that it would make"
    assert traced(contact)["rollbacks"] == found["rollbacks"]
    profile = f"profiles:{add_profile(email='pending@example.com')}"
    assert [row["row"] for row in traced(contact_id(*profile.split(":")))["rows"]] == [profile]
    database.rows("DELETE FROM leads RETURNING id")
    assert trace(contact).code == 1


def test_a_rollback_says_what_it_kept_here_what_it_may_have_reversed_and_nothing_of_a_later_row(
    database: Database,
) -> None:
    add_lead("other@example.com")
    before = run()["run"]
    roll_back(before)
    lead = f"leads:{add_lead(ADDRESS, createdAt=datetime.now(UTC))}"
    assert traced(lead)["rollbacks"] == [], "the row came after it"
    made = run()["run"]
    database.rows("""UPDATE crm_contacts SET "firstName" = 'Bobby' WHERE email = %s RETURNING id""", ADDRESS)
    kept = roll_back(made)
    (found,) = traced(lead)["rollbacks"]
    assert (found["run"], found["run_stands_here"]) == (kept.run_id, True)
    assert f"The changes of run {made} above were kept" in trace(lead).stdout
    pending = f"leads:{add_lead('third@example.com', createdAt='2025-01-01')}"
    assert [each["run_stands_here"] for each in traced(pending)["rollbacks"]] == [False, False]
    assert trace(pending).stdout.count("It may have reversed something here: rollbacks keep no record") == 2


def test_an_update_that_a_rollback_reversed_is_traced_to_the_rollback(database: Database) -> None:
    lead = f"leads:{add_lead(ADDRESS)}"
    run()
    assert traced(lead)["rollbacks"] == []
    database.rows("""UPDATE leads SET status = 'CONVERTED', "updatedAt" = now() RETURNING id""")
    updated = run(update=True)["run"]
    roll_back(updated)
    found = traced(lead)
    assert found["updates"] == []
    assert [(rollback["rolls_back"], rollback["updates_reversed"]) for rollback in found["rollbacks"]] == [(updated, 1)]
    (line,) = [line for line in trace(lead).stdout.splitlines() if f"rollback of run {updated}" in line]
    assert ", reversed 1 update of a contact. It may have reversed something here: " in line


def test_a_conflict_and_its_resolution(database: Database, given: Any) -> None:
    theirs = add_contact(f"Bob@{MARK}.example", userId=add_user(f"account@{MARK}.example"), **PERSON)
    profile = f"profiles:{add_profile(email=f'bob@{MARK}.example', **PERSON)}"
    assert run()["by_reason"] == {"conflict": 1}
    assert [(line["outcome"], line["reason"], line["contact_id"]) for line in traced(theirs)["lines"]] == [
        ("error", "conflict", theirs)
    ]
    resolved(profile, "--separate", f"bob.other@{MARK}.example")
    run()
    given(f"bob.other@{MARK}.example")
    found = traced("-")
    assert [(decision["row"], decision["is_separate"]) for decision in found["decisions"]] == [(profile, True)]
    assert contact_with(f"bob.other@{MARK}.example")["id"] in {each["contact_id"] for each in found["contacts"]}
    shown = trace(profile)
    assert f"Resolution of {profile} at " in shown.stdout
    assert MARK not in json.dumps(found) + shown.stdout


@pytest.mark.parametrize(("role", "state"), [("ADMIN", "excluded (admin)"), ("CLIENT", "pending")])
def test_a_row_that_no_run_has_migrated(database: Database, role: str, state: str) -> None:
    profile = f"profiles:{add_profile(role, email=ADDRESS)}"
    assert [row["state"] for row in traced(profile)["rows"]] == [state]


@pytest.mark.parametrize("whom", ["nobody", "profiles:nobody", "leads:nobody", "-"])
def test_of_whom_nothing_is_known_nothing_is_told(database: Database, given: Any, whom: str) -> None:
    given("nobody@example.com\n")
    finished = trace(whom)
    assert (finished.code, finished.stdout) == (1, "")
    assert finished.stderr == "Nothing found: no row, no contact and no ledger entry.\n"
    given("nobody@example.com\n")
    assert trace(whom, "--json").answer["found"] is False


@pytest.mark.parametrize(
    ("whom", "text", "words"),
    [
        (ADDRESS, "", "standard input"),
        ("-", "", "There is no email address on standard input."),
        ("-", " \n", "There is no email address on standard input."),
        ("-", f"{ADDRESS}\n\nbob@{MARK}.example\n", "more than one line"),
        ("-", f"Ann <{ADDRESS}>\n", "not a plain email address"),
        ("-", f"mailto:{ADDRESS}\n", "not a plain email address"),
        ("profiles:", "", "profiles:<id>"),
        ("lead:new1", "", "leads:<id>"),
        ("\udcff", "", "not valid UTF-8"),
        ("-", "a\0b@example.com", "contains NUL"),
    ],
)
def test_what_names_nobody_is_refused_and_not_repeated(
    database: Database, given: Any, whom: str, text: str, words: str
) -> None:
    given(text)
    finished = trace(whom)
    assert (finished.code, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert words in finished.stderr
    assert MARK not in finished.stderr


def test_standard_input_that_cannot_be_read_is_told_in_one_line(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "output").open("w") as output:
        for stdin, why in ((None, "it is closed"), (output, "not readable")):
            monkeypatch.setattr("sys.stdin", stdin)
            finished = trace("-")
            assert (finished.code, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
            assert f"Standard input cannot be read ({why})" in finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("trace_contact", "nobody"),
        ("export_backfill_errors",),
        ("verify_crm_contacts",),
        ("rollback_crm_backfill", "1", "--dry-run"),
    ],
)
def test_a_role_that_may_not_read_the_ledger_is_told_so(
    database: Database, caplog: pytest.LogCaptureFixture, arguments: tuple[str, ...]
) -> None:
    with reading_role(database) as role, acting_as(role):
        finished = called(*arguments)
    assert (finished.code, finished.stderr.count("\n")) == (2, 1)
    assert "There is no ledger that this role may read" in finished.stderr
    assert "dry run" not in caplog.text, "it speaks of what the backfill's dry run would do"

"""Rows with NULL in any column, or a value of the wrong kind: an outcome of that row, whoever reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection

from crm.backfill.read import source
from tests.conftest import Database
from tests.support.builders import add_intake, add_lead, add_many_leads, add_profile, add_user, contacts, ledger
from tests.support.commands import backfill, called, rollback, run

#: A column of a lead, what is in it, and what becomes of the row: "created", or the reason of an error and its column.
LEADS: dict[str, tuple[Any, Any]] = {
    "type": (None, ("missing_value", "type")),
    "status": (None, ("missing_value", "status")),
    "firstName": (None, "created"),
    "lastName": (None, "created"),
    "email": (None, ("invalid_email", None)),
    "phone": (None, "created"),
    "source": (None, "created"),
    "referrerUsername": (None, "created"),
    "commissionRate": (None, "created"),
    "attributionConfidence": (None, "created"),
    "assignedPreparerId": (None, "created"),
    "lastContactedAt": (None, "created"),
    "createdAt": (None, ("missing_value", "createdAt")),
    "updatedAt": (None, ("missing_value", "updatedAt")),
}
WRONG_LEADS: dict[str, tuple[Any, Any]] = {
    "createdAt": ("-infinity", ("invalid_value", "createdAt")),
    "updatedAt": ("infinity", ("invalid_value", "updatedAt")),
    "lastContactedAt": ("0044-03-15 BC", ("invalid_value", "lastContactedAt")),
    "commissionRateLockedAt": ("12025-01-01", ("invalid_value", "commissionRateLockedAt")),
    "commissionRate": ("NaN", ("invalid_value", "commissionRate")),
}
PROFILES: dict[str, tuple[Any, Any]] = {
    "role": (None, ("missing_value", "role")),
    "firstName": (None, "created"),
    "lastName": (None, "created"),
    "phone": (None, "created"),
    "companyName": (None, "created"),
    "userId": (None, "created"),
    "clerkUserId": (None, "created"),
    "createdAt": (None, ("missing_value", "createdAt")),
    "updatedAt": (None, ("missing_value", "updatedAt")),
}
WRONG_PROFILES: dict[str, tuple[Any, Any]] = {
    "createdAt": ("0001-01-01 BC", ("invalid_value", "createdAt")),
    "updatedAt": ("infinity", ("invalid_value", "updatedAt")),
}
INTAKES: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("first_name", "last_name", "phone", "country_code", "lastContactedAt"), (None, "created")),
    **dict.fromkeys(("referrerUsername", "attributionMethod", "assignedPreparerId"), (None, "created")),
    "email": (None, ("invalid_email", None)),
    "created_at": (None, ("missing_value", "created_at")),
    "updated_at": (None, ("missing_value", "updated_at")),
}
WRONG_INTAKES: dict[str, tuple[Any, Any]] = {
    "created_at": ("-infinity", ("invalid_value", "created_at")),
    "updated_at": ("infinity", ("invalid_value", "updated_at")),
    "lastContactedAt": ("0044-03-15 BC", ("invalid_value", "lastContactedAt")),
}
OUTCOME = """
SELECT source_id, CASE outcome WHEN 'error' THEN reason ELSE outcome END, "column" FROM ledger_entry
"""


def populate(database: Database, *, with_good: int = 20) -> dict[str, Any]:
    """A row for each column, and good rows beside them; what is to become of the bad ones, by their id."""
    for table in ("users", "profiles", "leads", "tax_intake_leads"):
        for (column,) in database.rows(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND attnotnull "
            "AND attname <> 'id'",
            table,
        ):
            database.change(f'ALTER TABLE {table} ALTER "{column}" DROP NOT NULL')
    expected: dict[str, Any] = {}
    for name, columns in {"null": LEADS, "wrong": WRONG_LEADS}.items():
        for column, (value, outcome) in columns.items():
            expected[add_lead(**{"email": f"lead-{name}-{column}@example.com", column: value})] = outcome
    for name, columns in {"null": PROFILES, "wrong": WRONG_PROFILES}.items():
        for column, (value, outcome) in columns.items():
            expected[add_profile(**{"email": f"profile-{name}-{column}@example.com", column: value})] = outcome
    for name, columns in {"null": INTAKES, "wrong": WRONG_INTAKES}.items():
        for column, (value, outcome) in columns.items():
            expected[add_intake(**{"email": f"intake-{name}-{column}@example.com", column: value})] = outcome
    expected[add_profile(email=None, userId=add_user(None))] = "created"  # type: ignore[arg-type] # NULL, as it may be
    # Two of each, so that the pages go on behind a key that has no moment.
    expected[add_lead("another@example.com", createdAt=None)] = ("missing_value", "createdAt")
    expected[add_intake("another-intake@example.com", created_at=None)] = ("missing_value", "created_at")
    add_many_leads(with_good)
    return expected


def outcomes(database: Database, ids: Any) -> dict[str, Any]:
    found = {identifier: (what, column) for identifier, what, column in database.rows(OUTCOME)}
    return {key: "created" if found[key][0] == "created" else found[key] for key in ids}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("since", [None, "2000-01-01"])
def test_every_row_has_its_outcome(database: Database, batch_size: int, since: str | None) -> None:
    expected = populate(database)
    dry = run(batch_size=batch_size, since=since, dry_run=True)
    answer = run(batch_size=batch_size, since=since)
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert outcomes(database, expected) == expected
    errors = Counter(outcome[0] for outcome in expected.values() if outcome != "created")
    assert answer["new_by_reason"] == dry["new_by_reason"] == errors
    assert (dry["read"], dry["created"]) == (answer["read"], answer["created"]) == (len(ledger()), len(contacts()))
    again = run(batch_size=batch_size, update=True)
    assert (again["status"], again["balanced"], again["error_new"]) == ("finished", True, 0)
    assert (again["read"], again["revisited"]) == (errors.total(), 0)


@pytest.mark.parametrize("workers", [2, 4])
def test_every_row_has_its_outcome_whatever_the_number_of_workers(database: Database, workers: int) -> None:
    expected = populate(database)
    answer = run(workers=workers)
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert outcomes(database, expected) == expected


def test_no_run_is_left_running_and_every_night_is_alike(database: Database) -> None:
    populate(database)
    assert backfill("--no-progress").code == 1
    for _ in range(2):
        assert backfill("--no-progress", "--workers", "2").code == 0
    assert database.rows("SELECT DISTINCT status FROM backfill_run") == [("finished",)]


def test_what_became_null_after_it_was_migrated_is_neither_a_defect_nor_in_the_way_of_a_rollback(
    database: Database,
) -> None:
    populate(database)
    number = run()["run"]
    with connection.cursor() as cursor:
        for table, columns in {"leads": {**LEADS, **WRONG_LEADS}, "profiles": PROFILES}.items():
            for column in columns:
                cursor.execute(
                    f'UPDATE {table} SET "{column}" = NULL WHERE id = (SELECT min(entry.source_id) '
                    "FROM ledger_entry entry JOIN crm_contacts c ON c.id = entry.id WHERE entry.source_id IN "
                    f'(SELECT id FROM {table} WHERE "{column}" IS NOT NULL))'
                )
    verified = called("verify_crm_contacts")
    assert "Traceback" not in verified.stdout + verified.stderr
    assert verified.code == 1, "values that changed without their row's updatedAt are told"
    assert run(update=True)["status"] == "finished"
    assert rollback(str(number), "--json").answer["status"] == "finished"


#: A phone of which one row's cannot be read.
UNREADABLE = "CASE WHEN id LIKE '%17' THEN ('1' || email)::int::text ELSE phone END"


@contextmanager
def a_view_of_leads(database: Database, phone: str) -> Iterator[None]:
    """A view in the place of the table, in which the phone is this expression."""
    database.change(
        f"""
        ALTER TABLE leads RENAME TO all_leads;
        CREATE VIEW public.leads AS SELECT id, type, status, "firstName", "lastName", email, {phone} AS phone, source,
               "referrerUsername", "referrerType", "commissionRate", "commissionRateLockedAt", "attributionMethod",
               "attributionConfidence", "assignedPreparerId", "lastContactedAt", "createdAt", "updatedAt"
          FROM all_leads
        """
    )
    yield
    database.change("DROP VIEW public.leads; ALTER TABLE all_leads RENAME TO leads")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch_size", [2, 1000])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_cannot_be_read_costs_itself_alone(database: Database, batch_size: int, workers: int) -> None:
    add_many_leads(30)
    add_profile(email="ann@example.com")
    with a_view_of_leads(database, UNREADABLE):
        answer = run(batch_size=batch_size, workers=workers)
        assert (answer["status"], answer["balanced"], answer["created"], answer["error"]) == ("finished", True, 30, 1)
        assert database.rows("SELECT source_id, reason, sqlstate FROM ledger_entry WHERE outcome = 'error'") == [
            ("new000000000017", "unreadable", "22P02")
        ]
        assert run(dry_run=True)["by_reason"] == {"unreadable": 1}
    assert run()["created"] == 1


def test_a_row_that_cannot_be_read_any_more_is_no_defect_and_in_nobodys_way(database: Database) -> None:
    add_many_leads(30)
    number = run()["run"]
    with a_view_of_leads(database, UNREADABLE):
        verified = called("verify_crm_contacts")
        assert verified.code == 0, verified.stdout + verified.stderr
        assert run(update=True)["status"] == "finished"
        undone = rollback(str(number), "--json")
        assert (undone.code, undone.answer["status"]) == (0, "finished")


def test_where_no_row_can_be_read_the_run_fails_and_says_so(database: Database) -> None:
    add_many_leads(300)
    with a_view_of_leads(database, "('1' || email)::int::text"):
        finished = backfill("--no-progress", "--json")
    assert (finished.code, finished.answer["failure"], finished.answer["read"]) == (5, "DataError (22P02)", 0)
    assert "person-" not in finished.stderr


KEYLESS = """
ALTER TABLE leads DROP CONSTRAINT leads_pkey CASCADE; ALTER TABLE profiles DROP CONSTRAINT profiles_pkey CASCADE;
ALTER TABLE profiles ALTER id DROP NOT NULL; ALTER TABLE leads ALTER id DROP NOT NULL
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_whose_id_is_not_unique_are_one_error_and_the_others_land(
    database: Database, batch_size: int, workers: int
) -> None:
    database.change(KEYLESS)
    add_many_leads(10)
    for number in range(3):
        status = "CONVERTED" if number else "NEW"
        add_lead(f"twice-{number}@example.com", status, id="twice", createdAt=f"202{number}-01-01")
    add_profile("CLIENT", email="a@example.com", id="same")
    add_profile("ADMIN", email="b@example.com", id="same")
    add_profile("AFFILIATE", email="c@example.com")
    add_lead("none@example.com", id=None)
    dry = run(batch_size=batch_size, dry_run=True)
    answer = run(batch_size=batch_size, workers=workers)
    for report in (dry, answer):
        assert (report["read"], report["created"], report["error_new"]) == (13, 11, 2)
        assert report["new_by_reason"] == {"duplicate_id": 2}
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert run()["excluded"] == {"duplicate_id": 3, "missing_id": 1}
    assert set(database.rows(OUTCOME)) >= {("twice", "duplicate_id", None), ("same", "duplicate_id", None)}
    again = run(update=True, batch_size=batch_size)
    assert (again["read"], again["error_new"], again["balanced"]) == (2, 0, True)
    listed = called("export_backfill_errors", "--with-email").stdout
    assert listed.count("duplicate_id") == 2, "a line for each id"
    assert called("verify_crm_contacts").code == 0
    database.rows("DELETE FROM leads WHERE id = 'twice' AND status = 'CONVERTED' RETURNING id")
    assert run()["created"] == 1


def test_a_second_row_with_the_id_of_one_that_was_migrated_changes_nothing(database: Database) -> None:
    database.change(KEYLESS)
    first = add_lead("ann@example.com")
    number = run()["run"]
    add_lead("bob@example.com", id=first, updatedAt="2026-06-01")
    answer = run(update=True)
    assert (answer["read"], answer["revisited"], answer["already"]) == (0, 0, 1)
    assert answer["excluded"] == {"duplicate_id": 1}
    assert called("verify_crm_contacts").code == 0
    assert rollback(str(number), "--json").answer["status"] == "finished"


def test_a_run_is_taken_back_with_an_error_whose_row_has_no_moment(database: Database) -> None:
    database.change(KEYLESS)
    add_lead("bob@example.com", id=add_lead("ann@example.com"))
    answer = run()
    assert answer["new_by_reason"] == {"duplicate_id": 1}
    undone = rollback(str(answer["run"]), "--json").answer
    assert (undone["status"], undone["lines"]["reversed"]) == ("finished", 1)


def test_a_ledger_that_was_not_migrated_is_told_before_anything_happens(database: Database) -> None:
    add_many_leads(1)
    database.change('ALTER TABLE ledger_entry RENAME COLUMN "trigger" TO was')
    try:
        finished = backfill("--no-progress")
    finally:
        database.change('ALTER TABLE ledger_entry RENAME COLUMN was TO "trigger"')
    assert (finished.code, contacts()) == (2, {})
    assert "lacks the column ledger_entry.trigger, which came with this version" in finished.stderr


def test_a_page_is_bounded_in_bytes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BYTES_OF_PAGE", 100_000)
    add_many_leads(40)
    database.rows("UPDATE leads SET phone = repeat('5', 40000) RETURNING id")
    sizes: list[int] = []
    page = source.SourceReader.page

    def noting(*arguments: Any) -> source.Page:
        found = page(*arguments)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(source.SourceReader, "page", noting)
    assert run(batch_size=40)["created"] == 40
    assert max(sizes) == 3, "the third is the one with which the bytes are spent"
    assert sum(sizes) == 40

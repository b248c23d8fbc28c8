"""Databases as people have them: every command ends in right books, or in one line that names what does not fit.

`cases.txt` has one case a line. Never a traceback, never "run the command again".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from django.db import connection

from manage import main
from tests.conftest import LEGACY_TABLES, OWN_TABLES, Database
from tests.support.builders import add_contact, add_lead, add_profile, add_user
from tests.support.commands import Finished, ended
from tests.support.processes import session

BOOKS = "books"
VERDICTS = ("reversed", "kept", "failed")
COUNTS = ("read", "created", "merged", "exists", "error", "by_reason")
#: What the server says when it does not have what a case is made of.
NOT_HERE = (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedObject, psycopg.errors.UndefinedFile)


class Case(NamedTuple):
    """A hostile database: its name, how a run on it ends, and the SQL that makes it."""

    name: str
    end: str
    statement: str


def cases() -> Iterator[Case]:
    """The cases of the file."""
    for line in (Path(__file__).parent / "cases.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield Case(*(part.strip() for part in line.split("|", 2)))


CASES = list(cases())


def people() -> None:
    """A small population in which every outcome happens."""
    ann = add_user("ann@example.com", id="user-ann")
    add_profile(id="profile-ann", userId=ann, clerkUserId="clerk-ann", phone="555 0001", companyName="Ann's")
    add_profile("TAX_PREPARER", id="profile-pat", userId=add_user("pat@example.com", id="user-pat"))
    add_profile("AFFILIATE", id="profile-nobody")
    add_profile("ADMIN", id="profile-admin")
    attribution: dict[str, Any] = {
        "referrerUsername": "pat",
        "referrerType": "TAX_PREPARER",
        "commissionRate": "5.00",
        "commissionRateLockedAt": "2025-01-02 03:04:05.6",
        "attributionMethod": "cookie",
        "attributionConfidence": 90,
    }
    add_lead("ann@example.com", id="lead-ann", **attribution)
    add_lead("bob@example.com", "CONVERTED", id="lead-bob", assignedPreparerId="profile-pat", phone="555 0002")
    add_lead("Bob@Example.com", "CONTACTED", id="lead-bob-2", **attribution)
    add_lead("cat@example.com", "QUALIFIED", id="lead-cat", type="AFFILIATE", lastContactedAt="2025-03-04 05:06:07.089")
    add_lead("dan@example.com", id="lead-dan", phone="555 0003", **attribution | {"commissionRate": "12.50"})
    add_lead("not an address", id="lead-nobody")
    add_contact("Dan@Example.com", id="contact-dan")


@contextmanager
def hostile(database: Database, case: Case) -> Iterator[None]:
    """The database of the tests made hostile; it is an ordinary one afterwards."""
    people()
    database.change("SELECT 1")
    name = connection.settings_dict["NAME"]
    connection.close()
    try:
        with session() as owner:
            owner.autocommit = True
            owner.execute("SET search_path = public")
            try:
                owner.execute(case.statement.replace("{database}", f'"{name}"').encode())
            except NOT_HERE as error:
                pytest.skip(f"not on this server: {type(error).__name__}")
        yield
    finally:
        connection.close()
        with session() as owner:
            owner.autocommit = True
            owner.execute("SET default_transaction_read_only = off")
            owner.execute(f'ALTER DATABASE "{name}" RESET ALL'.encode())
            owner.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off'.encode())
        with session() as owner:
            owner.autocommit = True
            owner.execute("; ".join(f"DELETE FROM crm_backfill.{table}" for table in OWN_TABLES).encode())
            for table in LEGACY_TABLES:
                owner.execute(f"DROP TABLE IF EXISTS crm_backfill.{table} CASCADE".encode())
            owner.execute("DROP FOREIGN DATA WRAPPER IF EXISTS w CASCADE")
            for schema in ("elsewhere", '"Other %s"'):
                owner.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE".encode())


def run(*command: str) -> Finished:
    """A command in this process, which ends by itself and without a traceback."""
    return ended(lambda: main(["manage.py", *command]))


def answer(finished: Finished, *codes: int) -> dict[str, Any]:
    assert finished.code in codes, (finished.code, finished.stderr, finished.stdout)
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("backfill_crm_contacts", "--dry-run", "--json", "--no-progress"),
    ("backfill_crm_contacts", "--json", "--no-progress"),
    ("backfill_crm_contacts", "--json", "--no-progress"),
    ("backfill_crm_contacts", "--update", "--json", "--no-progress"),
    ("verify_crm_contacts", "--json"),
)


def assert_right_books(database: Database) -> None:
    dry, first, again, update, verified = (run(*command) for command in COMMANDS)
    rehearsed, done = answer(dry, 0, 1), answer(first, 0, 1)
    assert done["balanced"] is True
    assert done["pending"] == 0
    assert done["read"] == 9
    # What PostgreSQL refuses is seen by writing alone.
    foreseeable = ("read",) if "data_error" in done["by_reason"] else COUNTS
    assert {name: rehearsed[name] for name in foreseeable} == {name: done[name] for name in foreseeable}
    repeated = answer(again, 0)
    assert (repeated["created"], repeated["merged"], repeated["error_new"]) == (0, 0, 0)
    assert answer(update, 0)["balanced"] is True
    proven = answer(verified, 0)
    assert proven["defects"] == 0, verified.stdout
    number = str(done["run"])
    if done["read"] == done["error"]:
        # Every run tries errors again: the first one has nothing left that could be taken back.
        assert run("rollback_crm_backfill", number, "--no-progress").code == 2
        return
    foreseen = answer(run("rollback_crm_backfill", number, "--dry-run", "--json", "--no-progress"), 0)
    reversed_ = answer(run("rollback_crm_backfill", number, "--json", "--no-progress"), 0)
    assert reversed_["balanced"] is True
    assert [reversed_[name] for name in VERDICTS] == [foreseen[name] for name in VERDICTS]


def assert_refused(database: Database, *named: str) -> None:
    """Every command that may write is refused in one line that names it all, and nothing is written."""
    for command in COMMANDS[:2]:
        finished = run(*command)
        if named == ("read_only",) and command == COMMANDS[0]:
            assert finished.code in (0, 1)
            continue
        assert (finished.code, finished.stdout) == (2, ""), (finished.stdout, finished.stderr)
        assert finished.stderr.count("\n") == 1
        assert [name for name in named if name not in finished.stderr] == [], finished.stderr
    for command in (COMMANDS[4], ("rollback_crm_backfill", "1", "--no-progress")):
        assert run(*command).code in (0, 1, 2)
    with session() as owner:
        assert owner.execute("SELECT count(*) FROM crm_backfill.ledger_entry").fetchone() == (0,)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_database_ends_in_right_books_or_in_a_name(database: Database, case: Case) -> None:
    with hostile(database, case):
        if case.end == BOOKS:
            assert_right_books(database)
        else:
            assert_refused(database, *(name.strip() for name in case.end.split(",")))


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)

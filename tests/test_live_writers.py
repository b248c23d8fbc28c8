"""A run while the application is at its busiest: nobody's work is lost, doubled, overwritten or brought back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.builders import add_many_contacts, add_many_leads, contacts, ledger
from tests.commands import backfill, run
from tests.conftest import Database
from tests.processes import session

PEOPLE = 2000
THERE = 200
BATCH_SIZE = 25
WRITERS = 4
#: As Prisma's upsert does it: by the address, in one statement.
UPSERT = """
INSERT INTO crm_contacts (id, "contactType", "firstName", "lastName", email, company, "updatedAt")
VALUES (%(id)s, 'LEAD', 'App', 'Lication', %(email)s, %(company)s, now()::timestamp)
ON CONFLICT (email) DO UPDATE SET company = excluded.company, "updatedAt" = excluded."updatedAt"
"""
INSERT = UPSERT.split("ON CONFLICT")[0] + "ON CONFLICT DO NOTHING RETURNING id"
UPDATE = """
UPDATE crm_contacts SET company = %(company)s, "updatedAt" = now()::timestamp WHERE email = %(email)s RETURNING id
"""
DELETE = "DELETE FROM crm_contacts WHERE email = %(email)s RETURNING id"
LOCK = "SELECT id FROM crm_contacts WHERE email = %(email)s FOR UPDATE"


class ApplicationSession(threading.Thread):
    """One of the application's sessions. It remembers what it has left behind of its own people."""

    def __init__(self, number: int, over: threading.Event) -> None:
        super().__init__(name=f"application {number}")
        self._number = number
        self._over = over
        self._chance = random.Random(number)  # noqa: S311 - the same people in every run of the tests
        self.is_at_work = threading.Event()
        self.trouble: Exception | None = None
        self.written: dict[str, str] = {}
        self.taken_from_the_backfill: set[str] = set()

    def run(self) -> None:
        try:
            with session() as own:
                while not self._over.is_set():
                    self._act(own)
                    self.is_at_work.set()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is to tell
            self.trouble = error
            self.is_at_work.set()

    def _act(self, own: psycopg.Connection) -> None:
        person = WRITERS * self._chance.randrange(PEOPLE // WRITERS) + self._number + 1
        email = f"person-{person}@example.com"
        company = f"work {self._chance.random()}"
        action = self._chance.choice((INSERT, UPSERT, UPSERT, UPDATE, DELETE, LOCK))
        done = own.execute(action, {"id": f"app-{company}", "email": email, "company": company})
        found = [identifier for (identifier,) in done.fetchall()] if done.description else [""]
        if self._chance.random() < 0.3:
            time.sleep(0.005)
        own.commit()
        if action == DELETE:
            self._remember_deleted(email, found)
        elif action != LOCK and found:
            self.written[email] = company
            self.taken_from_the_backfill.discard(email)

    def _remember_deleted(self, email: str, found: list[str]) -> None:
        self.written.pop(email, None)
        if found and not found[0].startswith(("app-", "contact")):
            self.taken_from_the_backfill.add(email)


@contextmanager
def a_busy_application() -> Iterator[list[ApplicationSession]]:
    over = threading.Event()
    sessions = [ApplicationSession(number, over) for number in range(WRITERS)]
    for one in sessions:
        one.start()
    try:
        for one in sessions:
            one.is_at_work.wait(30)
        yield sessions
    finally:
        over.set()
        for one in sessions:
            one.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_nobodys_work_is_lost_doubled_overwritten_or_brought_back(database: Database, workers: int) -> None:
    add_many_leads(PEOPLE)
    add_many_contacts(THERE)
    with a_busy_application() as sessions:
        finished = backfill(
            "--batch-size", str(BATCH_SIZE), "--workers", str(workers), "--no-progress", "--json", "--strict"
        )
    assert [one.trouble for one in sessions] == [None] * WRITERS
    assert (finished.code, finished.answer["status"], finished.answer["balanced"]) == (0, "finished", True)
    assert finished.answer["read"] == len(ledger()) == PEOPLE
    assert finished.answer["created"] + finished.answer["exists"] + finished.answer["merged"] == PEOPLE

    stored = contacts()
    addresses = {contact["email"].lower(): contact for contact in stored.values()}
    assert len(addresses) == len(stored), "nobody is there twice"
    written = {email: company for one in sessions for email, company in one.written.items()}
    assert {email: addresses[email]["company"] for email in written} == written
    of_the_application = [contact for key, contact in stored.items() if key.startswith("app-")]
    assert {(contact["firstName"], contact["phone"]) for contact in of_the_application} <= {("App", None)}
    taken = set().union(*(one.taken_from_the_backfill for one in sessions))
    assert taken.isdisjoint(addresses), "who was deleted stays deleted"

    before = database.dump("crm_contacts", "ledger_entry")
    assert run()["read"] == 0
    assert database.dump("crm_contacts", "ledger_entry") == before


def test_what_is_deleted_after_a_run_is_not_brought_back_by_the_next_while_all_else_goes_on(database: Database) -> None:
    add_many_leads(PEOPLE)
    run()
    database.rows(DELETE.replace("%(email)s", "%s"), "person-1@example.com")
    with a_busy_application() as sessions:
        add_many_leads(PEOPLE, first=PEOPLE + 1)
        answer = run(batch_size=BATCH_SIZE)
    assert [one.trouble for one in sessions] == [None] * WRITERS
    assert (answer["status"], answer["balanced"]) == ("finished", True)
    assert answer["read"] == answer["created"] == PEOPLE
    taken = set().union(*(one.taken_from_the_backfill for one in sessions))
    if not any("person-1@example.com" in one.written for one in sessions):
        taken.add("person-1@example.com")
    assert taken.isdisjoint({contact["email"] for contact in contacts().values()})

"""A run while the application is at its busiest: nobody's work is lost, doubled, overwritten or brought back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection

from tests.conftest import Database
from tests.support.builders import add_many_contacts, add_many_leads, contacts, ledger
from tests.support.commands import backfill, run
from tests.support.forks import labels_are_watched
from tests.support.processes import session
from tests.support.profiles import SOAKING

PEOPLE = 20_000 if SOAKING else 5_000
#: Of them, those who have a lead that makes the contact, and another one that fills in a referrer.
TWICE = PEOPLE // 4
THERE = PEOPLE // 10
BATCH_SIZE = PEOPLE // 80
WRITERS = 4
#: How far ahead of the last committed batch a session may write: where it gets into the way of the batch that is open.
REACH = 2 * BATCH_SIZE
#: Of whom each batch is looked at closely.
FEW, SMALL = 100, 10
INSERTS, FILLS = 'INSERT INTO "crm_contacts"', "UPDATE crm_contacts"
BLOCKED_BY = "SELECT FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
#: How long the test waits for what must come; nothing waits for its end.
AT_MOST_SECONDS = 20
#: As Prisma's upsert does it: by the address, in one statement.
UPSERT = """
INSERT INTO crm_contacts (id, "contactType", "firstName", "lastName", email, company, "updatedAt")
VALUES (%(id)s, 'LEAD', 'App', 'Lication', %(email)s, %(company)s, now()::timestamp)
ON CONFLICT (email) DO UPDATE SET company = excluded.company, "updatedAt" = excluded."updatedAt"
"""
INSERT = UPSERT.split("ON CONFLICT")[0] + "ON CONFLICT DO NOTHING RETURNING id"
UPDATE = """
UPDATE crm_contacts SET company = %(company)s, "referrerUsername" = %(company)s, "updatedAt" = now()::timestamp
 WHERE email = %(email)s RETURNING id
"""
DELETE = "DELETE FROM crm_contacts WHERE email = %(email)s RETURNING id"
LOCK = "SELECT id FROM crm_contacts WHERE email = %(email)s FOR UPDATE"


def number_of(email: str) -> int:
    return int(email.removeprefix("person-").removesuffix("@example.com"))


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
        self.referred: dict[str, str] = {}
        self.taken_from_the_backfill: set[str] = set()
        self.deleted: set[str] = set()

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
        person = WRITERS * (self._somebody(own) // WRITERS) + self._number + 1
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
            if action == UPDATE:
                self.referred[email] = company

    def _somebody(self, own: psycopg.Connection) -> int:
        """The number of anybody, or of somebody whom the run is just at."""
        if self._chance.random() < 0.5:
            return self._chance.randrange(PEOPLE)
        (read,) = own.execute("SELECT COALESCE(max(read), 0) FROM backfill_run").fetchone() or (0,)
        at = int(read) if read < TWICE else int(read) - TWICE
        return (at + self._chance.randrange(REACH)) % PEOPLE

    def _remember_deleted(self, email: str, found: list[str]) -> None:
        self.written.pop(email, None)
        self.referred.pop(email, None)
        self.deleted.update(found)
        # Another lead of the same person, which the run has yet to come to, makes a contact of its own.
        if found and not found[0].startswith(("app-", "contact")) and number_of(email) > TWICE:
            self.taken_from_the_backfill.add(email)


@contextmanager
def a_busy_application() -> Iterator[list[ApplicationSession]]:
    over = threading.Event()
    sessions = [ApplicationSession(number, over) for number in range(WRITERS)]
    for one in sessions:
        one.start()
    try:
        for one in sessions:
            one.is_at_work.wait(AT_MOST_SECONDS)
        yield sessions
    finally:
        over.set()
        for one in sessions:
            one.join()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("workers", [2, 1])
def test_nobodys_work_is_lost_doubled_overwritten_or_brought_back(database: Database, workers: int) -> None:
    add_many_leads(TWICE, "CONTACTED")
    add_many_leads(PEOPLE)
    database.rows("""UPDATE leads SET "referrerUsername" = 'ref' WHERE status = 'NEW' RETURNING id""")
    add_many_contacts(THERE)
    with a_busy_application() as sessions:
        finished = backfill(
            "--batch-size", str(BATCH_SIZE), "--workers", str(workers), "--no-progress", "--json", "--strict"
        )
    assert [one.trouble for one in sessions] == [None] * WRITERS
    assert (finished.code, finished.answer["status"], finished.answer["balanced"]) == (0, "finished", True)
    assert finished.answer["read"] == len(ledger()) == PEOPLE + TWICE
    counts = [finished.answer[outcome] for outcome in ("created", "exists", "merged")]
    assert sum(counts) == PEOPLE + TWICE
    assert min(counts) > 0

    stored = contacts()
    addresses = {contact["email"].lower(): contact for contact in stored.values()}
    assert len(addresses) == len(stored), "nobody is there twice"
    written = {email: company for one in sessions for email, company in one.written.items()}
    assert {email: addresses[email]["company"] for email in written} == written
    referred = {email: company for one in sessions for email, company in one.referred.items()}
    assert {email: addresses[email]["referrerUsername"] for email in referred} == referred
    of_the_application = [contact for key, contact in stored.items() if key.startswith("app-")]
    assert {(contact["firstName"], contact["phone"]) for contact in of_the_application} <= {("App", None)}
    taken = set().union(*(one.taken_from_the_backfill for one in sessions))
    assert taken, "somebody was deleted"
    assert taken.isdisjoint(addresses), "who was deleted stays deleted"
    assert stored.keys().isdisjoint(set().union(*(one.deleted for one in sessions)))

    before = database.dump("crm_contacts", "ledger_entry")
    assert run()["read"] == 0
    assert database.dump("crm_contacts", "ledger_entry") == before


@pytest.mark.sampled
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


def values_of(person: int) -> dict[str, str]:
    return {"id": f"app-{person}", "email": f"person-{person}@example.com", "company": "work"}


class Upsert(threading.Thread):
    """The application's upsert of one contact, over a connection of its own."""

    def __init__(self, person: int) -> None:
        super().__init__(name=f"upsert {person}")
        self._person = person
        self.trouble: Exception | None = None

    def run(self) -> None:
        try:
            with session() as own:
                own.execute(UPSERT, values_of(self._person))
                own.commit()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is to tell
            self.trouble = error


class Onlooker:
    """Lets somebody upsert a contact that a batch has just written, and holds up the next one until that is done.

    The batch itself goes on as soon as the upsert is seen to wait for it. So the upsert needs the end of this batch and
    of no other one, or the test fails.
    """

    def __init__(self, observer: psycopg.Connection) -> None:
        self._observer = observer
        self._waiting: Upsert | None = None
        self._before = 0
        self.waited = 0

    def watch(self, label: str, send: Callable[[], Any]) -> Any:
        """Send a statement of the run."""
        if label.startswith("SET LOCAL"):
            self.see_it_through()
        answer = send()
        batch = self._committed()
        # The leads that come first make the contacts, the others fill something in.
        if label.startswith(INSERTS if batch < FEW // SMALL else FILLS):
            self._let_somebody_upsert(SMALL * (batch % (FEW // SMALL)), batch)
        return answer

    def see_it_through(self) -> None:
        """Wait for the upsert."""
        if self._waiting is None:
            return
        self._waiting.join(AT_MOST_SECONDS)
        assert not self._waiting.is_alive(), "it waits for more than the batch"
        assert self._waiting.trouble is None
        assert self._committed() == self._before + 1
        self._waiting = None
        self.waited += 1

    def _let_somebody_upsert(self, before: int, committed: int) -> None:
        # Whoever is in no open batch need not wait at all.
        for person in (before, before + SMALL + 1):
            with session() as other:
                other.execute("SET lock_timeout = '5s'")
                other.execute(UPSERT, values_of(person))
        self._before = committed
        self._waiting = Upsert(before + SMALL)
        self._waiting.start()
        backend = connection.connection.info.backend_pid
        until = time.monotonic() + AT_MOST_SECONDS
        while self._observer.execute(BLOCKED_BY, [backend]).fetchone() is None:
            assert time.monotonic() < until, "nobody waits"

    def _committed(self) -> int:
        (batches,) = self._observer.execute("SELECT count(*) FROM backfill_batch").fetchone() or (0,)
        return int(batches)


def test_an_upsert_waits_for_the_end_of_one_batch_at_most(database: Database) -> None:
    add_many_leads(FEW, "CONVERTED")
    add_many_leads(FEW)
    database.rows("""UPDATE leads SET "referrerUsername" = 'ref' WHERE status = 'NEW' RETURNING id""")
    with session() as observer:
        observer.autocommit = True
        onlooker = Onlooker(observer)
        with labels_are_watched(onlooker.watch):
            answer = run(batch_size=SMALL)
        onlooker.see_it_through()
    assert (answer["created"], answer["merged"], answer["balanced"]) == (FEW, FEW, True)
    assert onlooker.waited == 2 * FEW // SMALL
    worked_on = {contact["email"] for contact in contacts().values() if contact["company"] == "work"}
    assert worked_on == {f"person-{person}@example.com" for person in range(SMALL, FEW + 1, SMALL)}

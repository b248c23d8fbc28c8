"""Populations, what an undisturbed run makes of them, and the way back: for runs that are killed or stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connection

from tests.conftest import Database
from tests.support.builders import (
    CREATED_AT,
    LATER,
    add_contact,
    add_lead,
    add_many_leads,
    add_profile,
    add_user,
    contacts,
)
from tests.support.commands import backfill, run
from tests.support.forks import COMMIT, labels

SEED = 20250101
#: Of `populate_five_batches`.
PEOPLE = 50
BATCH_SIZE = 10
SIZED = ("--no-progress", "--batch-size", str(BATCH_SIZE))
# Every column but the two that say when, and in which run.
_LEDGER = """
SELECT id, source, source_id, outcome, reason, contact_id, source_updated_at, filled, sqlstate, "constraint", "column"
  FROM ledger_entry ORDER BY id
"""


def populate(people: int = 200, profiles: int = 20) -> None:
    """People of every source who meet one another and contacts that are there, and rows in error."""
    for number in range(profiles):
        role = ("CLIENT", "TAX_PREPARER", "AFFILIATE")[number % 3]
        email = None if number % 7 == 0 else f"person-{number * 3}@example.com"
        add_profile(role, email=email, companyName="A company", phone="555 0199")
    add_many_leads(people)
    add_many_leads(people // 5, "CONVERTED", first=people // 2)
    for number in range(5):
        add_contact(f"Person-{number * 17 + 1}@example.com")
        add_lead("not-an-address", createdAt=f"2025-01-0{number + 1}")
        add_lead(f"person-{number * 13}@example.com", createdAt="2025-01-03", referrerUsername="ref")


def everything(database: Database) -> tuple[Any, Any]:
    return contacts(), database.rows(_LEDGER)


def totals(database: Database) -> list[tuple[Any, ...]]:
    """What all runs' batches together made of the rows, an error that was tried again counted once."""
    return database.rows(
        "SELECT source, sum(created), sum(merged), sum(exists), sum(error_new) "
        "FROM backfill_batch GROUP BY 1 ORDER BY 1"
    )


class Undisturbed:
    """A population, how a run that nobody disturbs ends with it, and the way back to the beginning."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._before = [identifier for (identifier,) in database.rows("SELECT id FROM crm_contacts")]
        self.beginning = everything(database)
        # In a session of its own, by the command itself: that is what is killed.
        connection.close()
        with labels() as sent:
            backfill(*SIZED)
        self.labels = list(sent)
        self.end = everything(database)
        self.totals = totals(database)
        self.reset()

    def reset(self) -> None:
        self._database.rows("DELETE FROM crm_contacts WHERE id <> ALL(%s) RETURNING id", self._before)
        for table in ("ledger_entry", "backfill_batch", "backfill_run"):
            self._database.rows(f"DELETE FROM {table} RETURNING id")
        assert everything(self._database) == self.beginning

    def batches(self) -> tuple[int, int]:
        """The numbers, from 1 on, of the first and the last statement of all batches."""
        begins = self._begins()
        # The commits after that are those of the run's own record.
        return begins[0] + 1, self.labels.index(COMMIT, begins[-1]) + 1

    def busiest_batch(self) -> tuple[int, int]:
        """The first and the last of the labels of the batch that has the most of them."""
        spans = [(begin, self.labels.index(COMMIT, begin)) for begin in self._begins()]
        return max(spans, key=lambda span: span[1] - span[0])

    def _begins(self) -> list[int]:
        """Where batches begin. The note that the report was written sets a timeout for locks alone."""
        return [
            number
            for number, label in enumerate(self.labels)
            if label.startswith("SET LOCAL") and "SET LOCAL statement_timeout" in label
        ]

    def assert_reached(self) -> None:
        assert everything(self._database) == self.end
        assert totals(self._database) == self.totals
        assert self._database.rows("SELECT status FROM backfill_run WHERE status = 'running'") == []


def after_a_second_look(database: Database) -> tuple[Any, ...]:
    """Contacts, stage history, ledger, and every change and count of a second look, but for when and in which run."""
    return (
        *everything_looked_at(database),
        everything(database)[1],
        database.rows("SELECT (to_jsonb(change) - 'id' - 'run_id')::text FROM contact_update change ORDER BY 1"),
        totals(database),
        database.rows(
            "SELECT source, sum(revisited), sum(updated), sum(kept), sum(unchanged), sum(updated_and_kept) "
            "FROM backfill_batch GROUP BY 1 ORDER BY 1"
        ),
        database.rows(
            "SELECT name, key, sum(value::int) FROM backfill_batch CROSS JOIN (VALUES ('updated'), ('kept')) n(name) "
            "CROSS JOIN jsonb_each_text(CASE name WHEN 'kept' THEN kept_by_column ELSE updated_by_column END) "
            "GROUP BY 1, 2 ORDER BY 1, 2"
        ),
    )


def populate_with_news(people: int = 60) -> None:
    """People of whom a run made contacts, or met others', and about whom there is news. The same ids every time."""
    add_many_leads(people)
    for number in range(0, people, 5):
        add_contact(f"Person-{number + 1}@example.com", id=f"contact{number}", stageEnteredAt=CREATED_AT)
    for number in range(1, people, 7):
        user = add_user(f"person-{number}@example.com", id=f"user{number}")
        add_profile(id=f"profile{number}", userId=user, companyName="A company")
    for number in range(5):
        add_profile(id=f"nobody{number}", userId=add_user(" " * number, id=f"nobody{number}"))
    run()
    news = """UPDATE leads SET status = 'CONVERTED', "referrerUsername" = 'ref', "updatedAt" = %s
               WHERE substring(id, 4)::int %% 3 = 0"""
    with connection.cursor() as cursor:
        cursor.execute(news, [LATER])
        cursor.execute(
            """UPDATE users SET email = id || '@example.com', "updatedAt" = '2099-01-01' WHERE email ~ '^ *$'"""
        )


def everything_looked_at(database: Database) -> tuple[Any, ...]:
    """Contacts, their history, and what the ledger remembers, but for when and by which run."""
    return (
        contacts(),
        database.rows("SELECT * FROM crm_stage_history ORDER BY id"),
        database.rows("SELECT id, outcome, contact_id, seen_updated_at FROM ledger_entry ORDER BY id"),
        database.rows("SELECT line_id, contact_id, columns FROM contact_update ORDER BY 1, 2, 3"),
    )


def populate_five_batches() -> None:
    """Five batches of leads, in which people meet one another, a contact that is there, and an error."""
    add_many_leads(PEOPLE - 10)
    add_many_leads(7, "CONVERTED", first=31)
    add_contact("Person-12@example.com")
    add_lead("not-an-address", createdAt="2025-01-03")
    add_lead("person-3@example.com", createdAt="2025-01-03", referrerUsername="ref")
    add_lead("person-39@example.com", createdAt="2025-01-03", referrerUsername="ref")


@contextmanager
def as_an_undisturbed_run_ends(database: Database) -> Iterator[None]:
    """Run on the same rows without and with what is inside, which has to end in the same contacts and ledger."""
    populate_five_batches()
    before = database.rows("SELECT id FROM crm_contacts")
    run(batch_size=BATCH_SIZE)
    expected = everything(database)
    database.rows("DELETE FROM crm_contacts WHERE id <> ALL(%s) RETURNING id", [identifier for (identifier,) in before])
    database.rows("DELETE FROM ledger_entry RETURNING id")
    database.rows("DELETE FROM backfill_batch RETURNING id")
    database.rows("DELETE FROM backfill_run RETURNING id")
    yield
    assert everything(database) == expected

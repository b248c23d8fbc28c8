"""What is counted before a run, and which rows are left to it: the same, however they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from django.conf import settings
from django.db import connection

from config import embedded
from crm.backfill import runner
from crm.backfill.read import inventory
from crm.backfill.read.inventory import take_inventory
from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.outcome import Fault, Outcome, Source
from crm.postgres.facts.schema import examine
from crm.runs import retrying
from tests.conftest import Database
from tests.support.builders import add_lead, add_many_leads, add_profile
from tests.support.circumstances import in_batch, set_status
from tests.support.commands import Finished, called, run, statements


def people() -> None:
    for role in ("CLIENT", "TAX_PREPARER", "AFFILIATE", "ADMIN", "SUPER_ADMIN", "LEAD"):
        add_profile(role)
    add_many_leads(200)
    add_many_leads(20, "CONVERTED", first=100)
    add_many_leads(3, "DISQUALIFIED", first=300)
    add_lead("not-an-address")


@contextmanager
def refusing_contacts_after(database: Database, number: int) -> Iterator[None]:
    """The disk is full when there are so many contacts."""
    database.change(
        f"""
        CREATE FUNCTION public.full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF (SELECT count(*) FROM crm_contacts) > {number} THEN
                RAISE EXCEPTION 'full' USING ERRCODE = '53100';
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER full_disk AFTER INSERT ON crm_contacts FOR EACH STATEMENT EXECUTE FUNCTION public.full()
        """
    )
    yield


@contextmanager
def locking_leads(database: Database) -> Iterator[Callable[[], object]]:
    """Somebody else who locks the leads when they are told to, until the end."""
    address = embedded.start(settings.EMBEDDED_DATA)
    with psycopg.connect(
        host=address.host, port=address.port, user=embedded.USER, dbname=connection.settings_dict["NAME"]
    ) as other:
        yield lambda: other.execute("LOCK TABLE public.leads IN ACCESS EXCLUSIVE MODE")


def terminate_this_session() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def look() -> inventory.Inventory:
    return take_inventory(connection, examine(connection, for_writing=False))


def test_few_rows_that_are_left_are_named_and_counted(database: Database) -> None:
    people()
    run()
    new = add_lead("new@example.com")
    found, left, _ = look()
    assert (found.pending[Source.ACTIVE_LEADS], found.errors[Source.ACTIVE_LEADS]) == (1, 1)
    assert new in left[Source.ACTIVE_LEADS]
    assert {source: len(ids) for source, ids in left.items() if ids} == {Source.ACTIVE_LEADS: 2}
    assert (found.rows, sum(found.excluded.values()), found.in_ledger) == (231, 6, 224)
    assert found.balances


@pytest.mark.parametrize("few", [0, 1, 2])
def test_the_census_is_the_same_where_the_rows_are_too_many_to_be_named(
    database: Database, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    people()
    run()
    add_lead("new@example.com")
    named = look()
    monkeypatch.setattr(inventory, "FEW_ROWS", few)
    assert look().row_counts == named.row_counts
    assert (Source.ACTIVE_LEADS in look().left) is (few == 2)


def test_before_the_first_run_no_row_is_named(database: Database) -> None:
    people()
    found, left, _ = look()
    assert not any(left.values())
    assert found.pending[Source.ACTIVE_LEADS] == 201


# What cannot be right


def backfill(*arguments: str) -> Finished:
    return called("backfill_crm_contacts", "--no-progress", *arguments)


def change(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        assert cursor.rowcount > 0


def test_entries_are_counted_as_what_they_are(database: Database) -> None:
    people()
    run()
    found, _, _ = look()
    entries = dict(database.rows("SELECT outcome, count(*) FROM ledger_entry GROUP BY 1"))
    assert found.entries == dict.fromkeys(Outcome, 0) | entries
    assert sum(found.entries.values()) == found.in_ledger
    assert found.faults == {}


def test_an_outcome_that_is_none_does_not_hold_though_the_numbers_add_up(database: Database) -> None:
    add_many_leads(100)
    run()
    forty = "SELECT id FROM ledger_entry ORDER BY id LIMIT 40"
    change(f"DELETE FROM crm_contacts WHERE id IN ({forty})")
    change(f"UPDATE ledger_entry SET outcome = 'nonsense' WHERE id IN ({forty})")
    ended = backfill()
    assert ended.code == 5
    assert "100 rows = 0 excluded + 60 in the ledger + 0 pending  (DOES NOT HOLD)" in ended.stdout
    assert "40 ledger entries with an unknown outcome" in ended.stderr
    assert backfill("--json", "--dry-run").answer["balanced"] is False
    verified = called("verify_crm_contacts", "--json")
    assert verified.answer["balanced"] is False
    assert verified.code == 1


@pytest.mark.parametrize("outcome", ["", "pending", "NULL"])
def test_no_word_for_an_outcome_is_taken_for_a_row_without_an_entry(database: Database, outcome: str) -> None:
    add_many_leads(3)
    run()
    change(f"UPDATE ledger_entry SET outcome = '{outcome}'")
    found, _, _ = look()
    assert (found.in_ledger, sum(found.pending.values()), found.faults) == (0, 0, {Fault.UNKNOWN_OUTCOME: 3})


@pytest.mark.parametrize("outcome", ["created", "merged", "exists"])
def test_an_entry_whose_outcome_says_that_there_is_a_contact_names_one(database: Database, outcome: str) -> None:
    add_many_leads(5)
    add_lead("not-an-address")
    run()
    change(f"UPDATE ledger_entry SET outcome = '{outcome}', contact_id = NULL WHERE outcome <> 'error'")
    ended = backfill("--json")
    assert (ended.code, ended.answer["balanced"], ended.answer["faults"]) == (5, False, {"no_contact": 5})
    assert "5 ledger entries without a contact" in ended.answer["failure"]


def test_an_entry_of_this_run_for_a_row_that_is_not_to_be_migrated_does_not_hold(database: Database) -> None:
    admin = add_profile("ADMIN")
    add_many_leads(3)
    entry = f"""
        INSERT INTO ledger_entry (id, source, source_id, outcome, contact_id, run_id, source_updated_at)
        SELECT 'c123456789012345678901234', 'clients', '{admin}', 'created', 'c1', max(id),
               (SELECT "updatedAt" FROM profiles) FROM backfill_run
    """
    with in_batch(1, lambda: change(entry)):
        ended = backfill("--json")
    assert (ended.code, ended.answer["faults"]) == (5, {"excluded_row": 1})
    # In a later run, it may be one that became an administrator since.
    assert backfill("--json").answer["balanced"] is True


def test_two_entries_of_one_row_do_not_hold(database: Database) -> None:
    add_many_leads(3)
    run()
    copied = "source, source_id, outcome, contact_id, run_id, source_updated_at"
    change(
        f"INSERT INTO ledger_entry (id, {copied}) SELECT 'c123456789012345678901234', {copied} "
        "FROM ledger_entry ORDER BY id LIMIT 1"
    )
    assert not look().row_counts.balances


# At the end of every run


def test_a_run_that_failed_tells_what_is_true_at_its_end(database: Database) -> None:
    add_many_leads(30)
    with refusing_contacts_after(database, 20):
        ended = backfill("--batch-size", "10")
    assert ended.code == 5
    assert "30 rows = 0 excluded + 20 in the ledger + 10 pending  (holds)" in ended.stdout
    record = BackfillRun.objects.get()
    assert record.census is not None
    assert (record.census["pending"]["active_leads"], record.census["lines"]["created"]) == (10, 20)


@pytest.mark.parametrize("status", [RunStatus.PAUSED, RunStatus.CANCELLED, RunStatus.INTERRUPTED])
def test_a_run_that_lost_its_fence_counts_the_tables_and_does_not_judge_its_own_entries(
    database: Database, status: RunStatus
) -> None:
    add_many_leads(30)
    with in_batch(3, lambda: set_status(status)):
        ended = backfill("--batch-size", "10")
    assert ended.code == 4
    assert "30 rows = 0 excluded + 20 in the ledger + 10 pending" in ended.stdout
    assert f"(not checked: the run was {status} before it ended)" in ended.stdout
    record = BackfillRun.objects.get()
    assert record.census is not None
    assert (record.status, record.balanced, record.census["lines"]["created"]) == (status, None, 20)


def test_what_could_not_be_counted_is_not_checked(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAITS_BEFORE_ANOTHER_LOOK", ())
    monkeypatch.setattr(runner, "count_rows", lambda *_, **_options: terminate_this_session())
    add_many_leads(3)
    ended = backfill()
    assert ended.code == 5
    assert "3 read = 3 created" in ended.stdout
    assert "(not checked: OperationalError (57P01))" in ended.stdout
    assert backfill("--dry-run", "--json").answer["not_checked"] is None


def test_a_run_that_is_stopped_behind_a_lock_does_not_wait_to_count(database: Database) -> None:
    add_many_leads(30)

    def stop_behind_a_lock() -> None:
        set_status(RunStatus.CANCELLED)
        lock()

    with locking_leads(database) as lock, in_batch(2, stop_behind_a_lock):
        ended = backfill("--batch-size", "10", "--json")
    assert (ended.code, ended.answer["balanced"], ended.answer["rows"]) == (4, None, None)
    assert ended.answer["created"] == 10


def test_a_run_with_nothing_new_takes_one_census(database: Database) -> None:
    people()
    run()
    with statements() as sent:
        run()
    assert len([statement for statement in sent if "count(*) AS counted" in statement.sql]) == 4

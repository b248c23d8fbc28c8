"""How much is asked of the database: a small constant of statements a batch, whatever a batch holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection

from crm.backfill.read.source import EVERYBODY, Partition, SourceReader
from crm.outcome import Source
from crm.postgres.facts.schema import examine
from tests.conftest import Database
from tests.support.builders import add_many_contacts, add_many_leads, add_profile, contacts
from tests.support.commands import Statement, run, statements

BATCH_SIZES = (100, 1000)
#: Savepoints and settings included. Raise these only with a reason that is worth a round trip for every batch.
#: One of them is the token of the transaction, which waits for the answer whether a trigger is trusted.
MAX_FOR_NEW_CONTACTS = 10
MAX_FOR_MEETINGS = 12
SOURCE_TABLES = re.compile(r"(FROM|JOIN) (users|profiles|leads)\b")
INSERT_INTO_CONTACTS = 'INSERT INTO "crm_contacts"'


def all_new(rows: int) -> None:
    add_many_leads(rows)


def all_merged(rows: int) -> None:
    """The contacts are there from an earlier run; every lead fills something."""
    add_many_leads(rows, "CONVERTED")
    run()
    add_many_leads(rows)


def all_there(rows: int) -> None:
    add_many_contacts(rows)
    add_many_leads(rows)


def half_there(rows: int) -> None:
    add_many_contacts(rows)
    add_many_leads(rows, first=1 + rows // 2)


def all_in_error(rows: int) -> None:
    add_many_leads(rows)
    with_all("UPDATE leads SET email = 'not-an-address'")


def all_in_error_again(rows: int) -> None:
    all_in_error(rows)
    run()


def with_all(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def sent_for(database: Database, arrange: Callable[[int], None], rows: int, batch_size: int) -> list[Statement]:
    database.empty()
    arrange(rows)
    with statements() as sent:
        assert run(batch_size=batch_size)["read"] == rows
    return sent


@pytest.mark.parametrize(
    ("arrange", "most"),
    [
        (all_new, MAX_FOR_NEW_CONTACTS),
        (all_merged, MAX_FOR_MEETINGS),
        (all_there, MAX_FOR_MEETINGS),
        (half_there, MAX_FOR_MEETINGS),
        (all_in_error, MAX_FOR_NEW_CONTACTS),
        (all_in_error_again, MAX_FOR_NEW_CONTACTS),
    ],
)
def test_a_batch_takes_as_many_statements_whether_it_has_a_hundred_rows_or_a_thousand(
    database: Database, arrange: Callable[[int], None], most: int
) -> None:
    # What a process asks once only, of the types of the columns for one, is asked by now.
    sent_for(database, arrange, BATCH_SIZES[0], BATCH_SIZES[0])
    # Two runs that differ by two batches: what every run takes once cancels out.
    a_batch = {
        size: (len(sent_for(database, arrange, 3 * size, size)) - len(sent_for(database, arrange, size, size))) / 2
        for size in BATCH_SIZES
    }
    assert a_batch[100] == a_batch[1000]
    assert 0 < a_batch[1000] <= most


def test_what_a_run_takes_once_is_small_too(database: Database) -> None:
    # Most of them ask the catalogue whether the database fits. The others claim and close the run, count the tables
    # before and after, look for addresses in another spelling (of contacts and users before, of contacts after), and
    # note that the report was written. What a process asks once only, it has asked by now.
    sent_for(database, all_new, 100, 100)
    assert len(sent_for(database, all_new, 100, 100)) <= MAX_FOR_NEW_CONTACTS + 77


def test_contacts_go_in_as_arrays_of_columns_and_skip_what_is_there(database: Database) -> None:
    sent = sent_for(database, half_there, 1000, 1000)
    (insert,) = [statement for statement in sent if INSERT_INTO_CONTACTS in statement.sql]
    assert re.search(r"SELECT \* FROM UNNEST\(", insert.sql)
    assert insert.sql.endswith(' ON CONFLICT DO NOTHING RETURNING "id"')
    assert {len(column) for column in insert.parameters} == {1000}
    (addresses,) = [column for column in insert.parameters if "@" in str(column[0])]
    assert addresses == sorted(addresses)
    assert insert.rows == 500
    assert len(contacts()) == 1500


def test_a_batch_of_the_usual_size_is_one_insert(database: Database) -> None:
    add_many_leads(5_000)
    with statements() as sent:
        run()
    assert [statement.rows for statement in sent if INSERT_INTO_CONTACTS in statement.sql] == [5_000]


def test_a_run_with_nothing_new_reads_no_source_rows(database: Database) -> None:
    add_many_leads(50)
    add_profile(email="ann@example.com")
    assert run()["read"] == 51
    with statements() as sent:
        answer = run()
    assert (answer["read"], answer["already"]) == (0, 51)
    of_sources = [statement.sql for statement in sent if SOURCE_TABLES.search(statement.sql)]
    assert len(of_sources) == 3
    assert all("count(*)" in statement and "GROUP BY" in statement for statement in of_sources), "the census alone"


def test_a_run_with_one_new_row_reads_that_row_alone(database: Database) -> None:
    add_many_leads(50)
    run()
    add_many_leads(1, first=51)
    with statements() as sent:
        assert run()["read"] == 1
    read = pages(sent)
    assert sum(statement.rows for statement in read) == 1
    assert all("r.id = ANY" in statement.sql for statement in read)


def test_many_new_rows_are_read_in_passing_over_the_table(database: Database) -> None:
    add_many_leads(10)
    with statements() as sent:
        assert run()["read"] == 10
    read = pages(sent)
    assert sum(statement.rows for statement in read) == 10
    assert not any("r.id = ANY" in statement.sql for statement in read)


def pages(sent: list[Statement]) -> list[Statement]:
    """The statements that read pages of source rows."""
    return [statement for statement in sent if SOURCE_TABLES.search(statement.sql) and '"createdAt"' in statement.sql]


def asks_the_ledger(sent: list[Statement]) -> set[bool]:
    """Whether the ledger was asked when pages of source rows were read."""
    return {"FROM ledger_entry" in statement.sql for statement in pages(sent)}


def test_a_first_run_does_not_ask_the_ledger_for_entries_that_are_not_there(database: Database) -> None:
    assert asks_the_ledger(sent_for(database, half_there, 100, 100)) == {False}
    assert asks_the_ledger(sent_for(database, all_in_error_again, 100, 100)) == {True}


def test_a_row_that_goes_over_to_another_source_in_the_middle_of_a_first_run_is_settled_once(
    database: Database,
) -> None:
    wanderer = add_profile("CLIENT", email="ann@example.com")
    add_profile("TAX_PREPARER", email="bob@example.com")
    database.change(
        "CREATE FUNCTION promote() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN UPDATE profiles SET role = 'TAX_PREPARER'; RETURN NULL; END $$; "
        "CREATE TRIGGER promote AFTER INSERT ON crm_contacts EXECUTE FUNCTION promote()"
    )
    with statements() as sent:
        answer = run()
    assert (answer["status"], answer["read"], answer["created"]) == ("finished", 2, 2)
    assert asks_the_ledger(sent) == {False, True}
    sources = dict(database.rows("SELECT source_id, source FROM ledger_entry"))
    assert sources.pop(wanderer) == "clients"
    assert list(sources.values()) == ["preparers"]


def test_no_statement_touches_the_tables_of_the_sources_but_to_read_them(database: Database) -> None:
    sent = sent_for(database, all_merged, 10, 10)
    writes = [statement.sql for statement in sent if re.match(r"(INSERT|UPDATE|DELETE|TRUNCATE|ALTER)", statement.sql)]
    assert {re.split(r'[\s"(]+', re.sub("INTO |FROM ", "", sql).replace('"', ""))[1] for sql in writes} == {
        *("backfill_run", "backfill_batch", "ledger_entry", "committed_transaction", "crm_contacts")
    }
    locked: set[str] = set()
    for statement in sent:
        for names in re.findall("LOCK TABLE (.*?) IN", statement.sql):
            locked.update(names.split(", "))
    assert locked == {"backfill_run", "backfill_batch", "ledger_entry", "committed_transaction"}
    locks = {sql for sql in (statement.sql for statement in sent) if "FOR UPDATE" in sql or "FOR SHARE" in sql}
    assert locks <= {"SELECT FROM crm_contacts WHERE id = ANY(%s) ORDER BY id FOR UPDATE"}


def test_a_batch_does_not_wait_for_ever(database: Database) -> None:
    sent = [statement.sql for statement in sent_for(database, all_new, 10, 10)]
    # The last one is of the note that the report was written.
    manners, _ = [sql for sql in sent if "lock_timeout" in sql]
    assert "SET LOCAL lock_timeout" in manners
    assert "SET LOCAL statement_timeout" in manners
    assert sent.index(manners) < next(n for n, sql in enumerate(sent) if INSERT_INTO_CONTACTS in sql)


def test_the_line_of_a_row_that_made_a_contact_costs_one_entry_in_one_index(database: Database) -> None:
    indexes = database.rows("SELECT indexdef FROM pg_indexes WHERE tablename = 'ledger_entry' ORDER BY 1 DESC")
    key, of_contacts_met = (index for (index,) in indexes)
    assert key == "CREATE UNIQUE INDEX ledger_entry_pkey ON crm_backfill.ledger_entry USING btree (id)"
    assert of_contacts_met.endswith("(contact_id) WHERE (outcome = ANY (ARRAY['merged'::text, 'exists'::text]))")


@pytest.mark.parametrize("partition", [EVERYBODY, Partition(0, 2)])
def test_a_page_is_a_walk_along_an_index_whatever_the_statistics_say(database: Database, partition: Partition) -> None:
    add_many_leads(20_000)
    with_all("""UPDATE leads SET "createdAt" = timestamp '2025-01-01' + random() * interval '100 days'""")
    # As autovacuum does in the middle of a run: every row that it sees has an entry, and all of them are of this run.
    assert run(limit=5_000)["created"] == 5_000
    with_all("ANALYZE")
    reader = SourceReader(
        connection, examine(connection, for_writing=False), Source.ACTIVE_LEADS, partition=partition, run_id=1
    )
    plans: list[str] = []

    def explain(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        with connection.connection.cursor() as cursor:
            plans.extend(line for (line,) in cursor.execute("EXPLAIN " + sql, parameters))
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(explain):
        reader.page(("2020-01-01", ""), 100)
    plan = "\n".join(plans)
    assert 'Index Scan using "leads_createdAt_idx" on leads r' in plan, plan

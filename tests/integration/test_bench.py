"""What `make bench` compares with is worth comparing with: it ends as a run does."""

from __future__ import annotations

from django.db import connection

from bench.__main__ import CONTACTS, LEDGER
from bench.limit import run_limit
from crm.models import BackfillRun
from crm.sample_data.loader import load
from tests.conftest import Database
from tests.support.commands import run


def ends(database: Database) -> list[object]:
    return [database.rows(query) for query in (CONTACTS, LEDGER)]


def test_the_limit_ends_with_the_contacts_and_the_ledger_of_a_run(database: Database) -> None:
    # Of these people nobody's attribution is completed by another lead's rate, which the limit leaves out.
    load(3_000, "2025_10", 3)
    before = [identifier for (identifier,) in database.rows("SELECT id FROM crm_contacts")]
    run()
    expected = ends(database)
    database.rows("DELETE FROM crm_contacts WHERE id <> ALL(%s) RETURNING id", before)
    for table in ("ledger_entry", "backfill_batch"):
        database.rows(f"DELETE FROM {table} RETURNING id")
    BackfillRun.objects.update(id=1)
    run_limit(connection.connection)
    assert ends(database) == expected

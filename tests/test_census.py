"""What is counted before a run, and which rows are left to it: the same, however they are found."""

from __future__ import annotations

import pytest
from django.db import connection

from crm.backfill import census
from crm.backfill.census import survey
from crm.backfill.outcome import Source
from crm.backfill.schema import examine
from tests.builders import add_lead, add_many_leads, add_profile
from tests.commands import run
from tests.conftest import Database


def people() -> None:
    for role in ("CLIENT", "TAX_PREPARER", "AFFILIATE", "ADMIN", "SUPER_ADMIN", "LEAD"):
        add_profile(role)
    add_many_leads(200)
    add_many_leads(20, "CONVERTED", first=100)
    add_many_leads(3, "DISQUALIFIED", first=300)
    add_lead("not-an-address")


def look() -> census.Survey:
    return survey(connection, examine(connection, for_writing=False))


def test_few_rows_that_are_left_are_named_and_counted(database: Database) -> None:
    people()
    run()
    new = add_lead("new@example.com")
    found, left = look()
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
    monkeypatch.setattr(census, "FEW_ROWS", few)
    assert look().census == named.census
    assert (Source.ACTIVE_LEADS in look().left) is (few == 2)


def test_before_the_first_run_no_row_is_named(database: Database) -> None:
    people()
    found, left = look()
    assert not left
    assert found.pending[Source.ACTIVE_LEADS] == 201

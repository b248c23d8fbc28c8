"""The backfill against the judge: whatever the population, contacts, ledger and counts are the reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from datetime import datetime

import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from crm.outcome import Source
from crm.rules.mapping import contact_id
from tests.conftest import Database
from tests.support import builders, reference
from tests.support.commands import run
from tests.support.comparison import (
    assert_as_the_reference,
    counts_of,
    expected_counts,
    load,
)
from tests.support.populations import (
    GENERATIONS,
    aftermaths,
    populations,
    replace_population,
)
from tests.support.profiles import against_the_database

READ_ONLY = ("users", "profiles", "leads", "tax_intake_leads")
BATCH_SIZES = (1, 2, 7, 1000)
#: Whether one run, and the next one, migrates people who signed up.
FLAGS = st.lists(st.booleans(), min_size=2, max_size=2)


@pytest.mark.parametrize("generation", GENERATIONS)
@against_the_database(12)
@given(data=st.data(), batch_size=st.sampled_from(BATCH_SIZES), with_signups=FLAGS)
def test_every_run_ends_as_the_reference_does(
    database: Database,
    generation: str,
    data: st.DataObject,
    batch_size: int,
    with_signups: list[bool],
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    load(population)
    expected = reference.backfill(population, with_signups=with_signups[0])

    before = database.dump()
    foretold = run(dry_run=True, batch_size=batch_size, with_signups=with_signups[0])
    assert database.dump() == before
    assert counts_of(foretold) == expected_counts(expected.counts)

    first = run(batch_size=batch_size, with_signups=with_signups[0])
    assert_as_the_reference(first, expected)
    assert database.dump(*READ_ONLY) == {table: before[table] for table in READ_ONLY}

    again = run(batch_size=batch_size, with_signups=with_signups[1])
    second = reference.backfill(
        with_contacts(population, expected), ledger=expected.ledger, with_signups=with_signups[1]
    )
    assert_as_the_reference(again, second)
    if with_signups != [False, True]:
        assert again["created"] == again["merged"] == again["exists"] == again["error_new"] == 0


@pytest.mark.parametrize("generation", ["2025_10", "2026_01"])
@against_the_database(6)
@given(
    data=st.data(), workers=st.sampled_from([2, 4]), batch_size=st.sampled_from([1, 2, 7]), with_signups=st.booleans()
)
def test_the_end_is_the_same_for_every_number_of_workers(
    database: Database,
    generation: str,
    data: st.DataObject,
    workers: int,
    batch_size: int,
    with_signups: bool,  # noqa: FBT001 - drawn
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    load(population)
    expected = reference.backfill(population, with_signups=with_signups)
    foretold = run(dry_run=True, workers=workers, batch_size=batch_size, with_signups=with_signups)
    assert counts_of(foretold) == expected_counts(expected.counts)
    assert_as_the_reference(run(workers=workers, batch_size=batch_size, with_signups=with_signups), expected)


def with_contacts(population: reference.Population, result: reference.Result) -> reference.Population:
    return dataclasses.replace(population, contacts=list(result.contacts.values()))


@pytest.mark.parametrize("generation", ["2025_10_mixed", "2025_12"])
@against_the_database(12)
@given(data=st.data(), batch_size=st.sampled_from(BATCH_SIZES), with_signups=FLAGS)
def test_a_rerun_after_the_world_has_moved_on_ends_as_the_reference_does(
    database: Database, generation: str, data: st.DataObject, batch_size: int, with_signups: list[bool]
) -> None:
    database.use(generation)
    population = data.draw(populations(generation))
    load(population)
    first = reference.backfill(population, with_signups=with_signups[0])
    run(batch_size=batch_size, with_signups=with_signups[0])
    later = data.draw(aftermaths(population, first))
    with connection.cursor() as cursor:
        replace_population(cursor, later)
    expected = reference.backfill(later, ledger=first.ledger, with_signups=with_signups[1])
    foretold = run(batch_size=batch_size, dry_run=True, with_signups=with_signups[1])
    assert counts_of(foretold) == expected_counts(expected.counts)
    assert_as_the_reference(run(batch_size=batch_size, with_signups=with_signups[1]), expected)


@against_the_database(12)
@given(
    data=st.data(),
    only=st.sets(st.sampled_from([source.value for source in Source]), min_size=1, max_size=4),
)
def test_a_run_of_some_sources_and_then_of_all_ends_as_the_reference_does(
    database: Database, data: st.DataObject, only: Collection[str]
) -> None:
    database.use("2025_10")
    population = data.draw(populations("2025_10"))
    load(population)
    first = reference.backfill(population, only=only)
    assert_as_the_reference(run(only=tuple(source for source in Source if source in only)), first)
    expected = reference.backfill(with_contacts(population, first), ledger=first.ledger)
    assert_as_the_reference(run(), expected)


@pytest.mark.parametrize("generation", ["2025_10", "2025_11"])
@against_the_database(12)
@given(data=st.data(), batch_size=st.sampled_from(BATCH_SIZES))
def test_labels_that_nobody_knows_are_errors_and_never_a_guess(
    database: Database, generation: str, data: st.DataObject, batch_size: int
) -> None:
    database.use(generation, added_labels=True)
    population = data.draw(populations(generation, added_labels=True))
    load(population)
    expected = reference.backfill(population)
    assert counts_of(run(dry_run=True, batch_size=batch_size)) == expected_counts(expected.counts)
    assert_as_the_reference(run(batch_size=batch_size), expected)


def test_when_a_contact_was_assigned_is_never_overwritten(database: Database) -> None:
    first = builders.add_lead("ann@example.com")
    run()
    contact = contact_id("leads", first)
    # Somebody took the preparer away in the CRM and left the date.
    database.rows(
        """UPDATE crm_contacts SET "assignedAt" = '2025-06-01' WHERE id = %s RETURNING id""",
        contact,
    )
    preparer = builders.add_profile("TAX_PREPARER")
    builders.add_lead("ann@example.com", assignedPreparerId=preparer, referrerUsername="ref", phone="1")
    assert run()["merged"] == 1
    ((preparer, assigned_at, referrer),) = database.rows(
        'SELECT "assignedPreparerId", "assignedAt", "referrerUsername" FROM crm_contacts WHERE id = %s', contact
    )
    assert (preparer, assigned_at, referrer) == (None, datetime(2025, 6, 1), "ref")  # noqa: DTZ001 - as it is stored

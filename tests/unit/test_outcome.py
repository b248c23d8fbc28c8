"""What becomes of rows is counted so that nothing can be missing."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from crm.outcome import Outcome, Reason, RowCounts, RowOutcome, Source, Totals
from tests.support.profiles import examples

reasons = st.sampled_from(list(Reason))
known_reasons = st.none() | reasons.map(str)
# Of which row it is makes no difference to the counts.
row = (st.just("c1"), st.just("1"), st.just("2025-01-01"), known_reasons)
errors = st.builds(RowOutcome, *row, st.just(Outcome.ERROR), reason=reasons)
successes = st.builds(
    RowOutcome, *row, st.sampled_from([outcome for outcome in Outcome if outcome is not Outcome.ERROR])
)
batches = st.lists(errors | successes, max_size=12)
counts_by_source = st.fixed_dictionaries({source: st.integers(0, 9) for source in Source})


def totals(row_outcomes: list[RowOutcome]) -> Totals:
    types = Counter("CLIENT" for row_outcome in row_outcomes if row_outcome.outcome is Outcome.CREATED)
    return Totals.of(row_outcomes, types)


@settings(max_examples=examples(30))
@given(batches)
def test_every_row_of_a_batch_is_counted_once(row_outcomes: list[RowOutcome]) -> None:
    counted = totals(row_outcomes)
    assert counted.read == len(row_outcomes) == counted.created + counted.merged + counted.exists + counted.error
    assert counted.balances
    assert counted.errors_by_reason.total() == counted.error
    assert counted.errors_new_by_reason.total() == counted.error_new <= counted.error
    assert counted.created_by_type.total() == counted.created


@settings(max_examples=examples(20))
@given(st.lists(batches, max_size=4))
def test_batches_add_up_to_what_they_are_together(parts: list[list[RowOutcome]]) -> None:
    added = Totals()
    for part in parts:
        added.add(totals(part))
    assert added == totals([row_outcome for part in parts for row_outcome in part])


@settings(max_examples=examples(30))
@given(batches)
def test_adding_leaves_the_other_as_it_was(row_outcomes: list[RowOutcome]) -> None:
    other, everything = totals(row_outcomes), Totals()
    everything.add(other)
    everything.add(other)
    assert other == totals(row_outcomes)


def test_a_row_that_is_not_accounted_for_shows() -> None:
    assert not Totals(read=2, created=1).balances
    assert not Totals(read=1, created=1, error=1).balances


def test_an_error_is_new_unless_the_same_one_was_known() -> None:
    def is_new(outcome: Outcome, reason: Reason | None, known: str | None) -> bool:
        return RowOutcome("c1", "1", "2025-01-01", known, outcome, reason).is_new_error

    assert is_new(Outcome.ERROR, Reason.CONFLICT, None)
    assert is_new(Outcome.ERROR, Reason.CONFLICT, "invalid_email")
    assert not is_new(Outcome.ERROR, Reason.CONFLICT, "conflict")
    assert not is_new(Outcome.CREATED, None, "conflict")


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 9)), counts_by_source, counts_by_source, counts_by_source)
def test_the_census_balances_exactly_when_every_row_is_somewhere(
    excluded: dict[str, int], settled: dict[Source, int], errors: dict[Source, int], pending: dict[Source, int]
) -> None:
    rows = sum(sum(counts.values()) for counts in (excluded, settled, errors, pending))
    assert RowCounts(rows, excluded, settled, errors, pending).balances
    assert not RowCounts(rows + 1, excluded, settled, errors, pending).balances
    assert not RowCounts(rows - 1, excluded, settled, errors, pending).balances


def test_what_is_pending_or_in_error_is_to_be_read() -> None:
    zeros = dict.fromkeys(Source, 0)
    row_counts = RowCounts(6, {}, zeros | {Source.CLIENTS: 3}, zeros | {Source.CLIENTS: 2}, zeros | {Source.CLIENTS: 1})
    assert row_counts.unstarted == [source for source in Source if source is not Source.CLIENTS]
    assert row_counts.to_read(Source.CLIENTS) == 3
    assert row_counts.to_read(Source.PREPARERS) == 0
    assert row_counts.in_ledger == 5


def test_sources_come_in_the_order_that_decides_who_makes_the_contact() -> None:
    assert [source.value for source in Source] == [
        "clients",
        "preparers",
        "affiliates",
        "converted_leads",
        "converted_intakes",
        "active_leads",
        "open_intakes",
        "lead_profiles",
        "signups",
    ]
    assert Source.of_table("profiles") == [Source.CLIENTS, Source.PREPARERS, Source.AFFILIATES, Source.LEAD_PROFILES]
    assert Source.of_table("leads") == [Source.CONVERTED_LEADS, Source.ACTIVE_LEADS]

"""What a run came to, against what the reference comes to: the same contacts, ledger and counts."""

from __future__ import annotations

from typing import Any

from django.db import connection

from tests.support import reference
from tests.support.populations import insert_population, read_contacts, read_ledger


def load(population: reference.Population) -> None:
    with connection.cursor() as cursor:
        insert_population(cursor, population)


def contacts_and_ledger() -> tuple[dict[str, Any], dict[str, Any]]:
    with connection.cursor() as cursor:
        return read_contacts(cursor), read_ledger(cursor)


def without_zeros(counts: dict[str, Any]) -> dict[str, Any]:
    return {
        key: without_zeros(value) if isinstance(value, dict) else value for key, value in counts.items() if value != 0
    }


def counts_of(answer: dict[str, Any]) -> dict[str, Any]:
    names = ("read", "created", "merged", "exists", "error", "error_new", "already")
    breakdowns = ("excluded", "created_by_type", "by_source", "by_reason", "assignments")
    return {name: answer[name] for name in names} | {name: without_zeros(answer[name]) for name in breakdowns}


def expected_counts(counts: reference.Counts) -> dict[str, Any]:
    return {
        name: without_zeros({key: dict(value) if isinstance(value, dict) else value for key, value in counted.items()})
        if isinstance(counted, dict)
        else counted
        for name, counted in vars(counts).items()
    }


def assert_as_the_reference(answer: dict[str, Any], result: reference.Result, *, exact: bool = True) -> None:
    contacts, ledger = contacts_and_ledger()
    assert contacts == result.contacts
    assert ledger == result.ledger
    assert counts_of(answer) == expected_counts(result.counts)
    assert answer["status"] == "finished"
    assert answer["balanced"] is True

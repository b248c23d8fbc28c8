"""What Python cannot hold is shown as PostgreSQL's text, and is in nobody's way: infinity, odd years, NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from django.contrib.auth.models import User as Operator
from django.contrib.sessions.models import Session
from django.db import connection, models
from django.test import Client

from crm.fields import RateField, TimestampField
from crm.models import BackfillRun, ConflictResolution, ContactUpdate, CRMContact, Lead, LedgerEntry, Profile, User
from crm.rules.mapping import contact_id
from tests.conftest import Database
from tests.support.builders import add_contact, add_lead, add_profile, add_user
from tests.support.commands import called, run
from tests.support.pages import address, listed, page

#: A timestamp as it is stored, and as it is shown.
MOMENTS = {
    "infinity": "infinity",
    "-infinity": "-infinity",
    "0044-03-15 12:00:00.5 BC": "0044-03-15 12:00:00.5 BC",
    "12025-01-01": "12025-01-01 00:00:00",
    "9999-12-31 23:59:59.9996": "10000-01-01 00:00:00",
    "0001-01-01": "Jan. 1, 0001, midnight",
    "9999-12-31 23:59:59": "Dec. 31, 9999, 11:59 p.m.",
}
#: A rate likewise.
RATES = {"NaN": "NaN", "0.10": "0.10", "-999.99": "-999.99"}
ADDERS: dict[type[models.Model], Callable[..., str]] = {
    CRMContact: add_contact,
    User: add_user,
    Profile: lambda _, **row: add_profile(**row),
    Lead: add_lead,
}


@pytest.fixture
def browser(database: Database) -> Iterator[Client]:
    """The browser of a superuser."""
    operator = Operator.objects.create(username="operator", is_staff=True, is_superuser=True)
    client = Client()
    client.force_login(operator)
    yield client
    operator.delete()
    Session.objects.all().delete()


def columns_of(model: type[models.Model], kind: type[models.Field[Any, Any]]) -> list[str]:
    """The columns that a model reads through a kind of field."""
    return [str(field.column) for field in model._meta.concrete_fields if isinstance(field, kind)]


def row_with(model: type[models.Model], moment: str, rate: str, number: int) -> str:
    """A row that has the value in every such column; its id."""
    row = dict.fromkeys(columns_of(model, TimestampField), moment) | dict.fromkeys(columns_of(model, RateField), rate)
    return ADDERS[model](f"person-{number}@example.com", **row)


def rows_with_all(model: type[models.Model]) -> dict[str, tuple[str, str]]:
    """A row for each odd value, with the texts of its timestamps and its rate, by id."""
    rates = [*RATES.items()] * 3
    return {
        row_with(model, moment, rate, number): (shown, shown_rate)
        for number, ((moment, shown), (rate, shown_rate)) in enumerate(zip(MOMENTS.items(), rates, strict=False))
    }


def test_contacts_with_any_value_are_listed_searched_filtered_and_shown(browser: Client) -> None:
    rows = rows_with_all(CRMContact)
    answer = browser.get(address(CRMContact))
    assert answer.status_code == 200
    html = answer.content.decode()
    for identifier, (moment, rate) in rows.items():
        assert moment in html
        shown = page(browser, CRMContact, identifier)
        assert shown.count(f": {moment}") == len(columns_of(CRMContact, TimestampField))
        assert f"Commission rate: {rate}" in shown
        assert listed(browser, CRMContact, q=identifier) == {identifier}
    assert listed(browser, CRMContact, made="no", attributed="no", stage="NEW") == set(rows)
    assert listed(browser, CRMContact, q="person") == set(rows)


@pytest.mark.parametrize("model", [CRMContact, User, Profile, Lead])
def test_every_timestamp_and_rate_is_read_whatever_it_is(database: Database, model: type[models.Model]) -> None:
    rows = rows_with_all(model)
    found = {row.pk: row for row in model._default_manager.all()}
    for identifier, (moment, rate) in rows.items():
        for field in model._meta.concrete_fields:
            value = getattr(found[identifier], field.attname)
            if isinstance(field, TimestampField):
                assert value == moment or (isinstance(value, datetime) and value.tzinfo is UTC)
            elif isinstance(field, RateField):
                assert f"{value:f}" == rate


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 BC", "12025-01-01"])
def test_timestamps_with_a_zone_are_read_likewise(database: Database, moment: str) -> None:
    shown, known = database.rows(f"SELECT '{moment}'::timestamptz, '2025-07-01 12:00:00.5+02'::timestamptz")[0]
    assert isinstance(shown, str)
    assert shown.startswith(moment.removesuffix(" BC"))
    assert (known, known.tzinfo) == (datetime(2025, 7, 1, 10, 0, 0, 500_000, tzinfo=UTC), UTC)


def test_lines_and_updates_with_any_value_are_shown(database: Database, browser: Client) -> None:
    contact = add_contact("ann@example.com")
    add_lead("ann@example.com", phone="555 0101")
    number = run(update=True)["run"]
    for moment in ("infinity", "0044-03-15 BC", "12025-01-01"):
        for model in (LedgerEntry, ContactUpdate):
            table = model._meta.db_table
            for column in columns_of(model, TimestampField):
                database.rows(f"UPDATE {table} SET {column} = '{moment}' RETURNING 1")
            (key,) = listed(browser, model)
            shown = page(browser, model, key)
            assert shown.count(f": {moment.removesuffix(' BC')}") == len(columns_of(model, TimestampField))
            assert listed(browser, model, run=str(number)) == {key}
        assert page(browser, CRMContact, contact)
        assert page(browser, BackfillRun, number)


def test_a_conflict_with_any_value_is_exported_shown_and_resolved(database: Database, browser: Client) -> None:
    """The row, its line as an earlier version wrote it, and the contacts of the conflict."""
    user = add_user("ann@example.com")
    infinite = dict.fromkeys(columns_of(CRMContact, TimestampField), "infinity") | {"commissionRate": "NaN"}
    contact = add_contact("ann@example.com", userId=add_user("elsewhere@example.com"), **infinite)
    row = f"profiles:{add_profile(userId=user)}"
    assert run()["by_reason"] == {"conflict": 1}
    for moment in ("infinity", "0044-03-15 BC"):
        database.rows(f"UPDATE ledger_entry SET source_updated_at = '{moment}' RETURNING 1")
        exported = called("export_backfill_errors", "--with-email")
        assert (exported.code, f"{contact} (email)" in exported.stdout) == (0, True)
        assert called("resolve_crm_conflict", row).code == 0
        resolved = called("resolve_crm_conflict", row, "--contact", contact)
        assert (resolved.code, resolved.stderr) == (0, "")
    key = contact_id(*row.split(":"))
    assert page(browser, ConflictResolution, key)
    assert page(browser, LedgerEntry, key)
    assert run(update=True)["exists"] == 1
    for name in ("export_backfill_errors", "verify_crm_contacts"):
        assert called(name).code == 0
    number = BackfillRun.objects.latest("pk").pk
    assert called("rollback_crm_backfill", str(number), "--no-progress").code == 0


def test_a_contact_whose_timestamps_became_infinite_is_no_obstacle_to_a_run_or_to_its_rollback(
    database: Database, browser: Client
) -> None:
    """Whatever people wrote into a contact of ours."""
    lead = add_lead("ann@example.com")
    number = run()["run"]
    identifier = contact_id("leads", lead)
    with connection.cursor() as cursor:
        for column in columns_of(CRMContact, TimestampField):
            cursor.execute(f"""UPDATE crm_contacts SET "{column}" = 'infinity'""")
    add_lead("ann@example.com", phone=" ", referrerUsername="ref", attributionMethod="cookie")
    assert run()["merged"] == 1
    assert "infinity" in page(browser, LedgerEntry, contact_id("leads", Lead.objects.exclude(pk=lead).get().pk))
    assert run(update=True)["status"] == "finished"
    assert called("verify_crm_contacts").code == 0
    undone = called("rollback_crm_backfill", str(number), "--json", "--no-progress").answer
    assert (undone["reversed"], undone["kept"]) == (0, 1)
    assert CRMContact.objects.get(pk=identifier).created_at == "infinity"

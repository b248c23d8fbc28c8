"""The models fit the application's tables, in every generation, and those that are only read cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from django.apps import apps
from django.core import serializers
from django.db import IntegrityError, NotSupportedError, transaction
from django.db import connection as default_connection
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Field, Model, QuerySet
from django.test.utils import CaptureQueriesContext
from psycopg import sql
from pytest_django import DjangoDbBlocker

from crm.fields import PostgresEnumField, RateField, TimestampField
from crm.legacy_schema import GENERATIONS, create_legacy_tables
from crm.models import CRMContact, CRMInteraction, CRMStageHistory, Lead, Profile, TaxIntakeLead, User
from crm.models.legacy import ReadOnlyError, ReadOnlyQuerySet
from crm.rules.mapping import ContactDraft
from tests.conftest import Database
from tests.support.scratch import django_connection, scratch_database

READ_ONLY: tuple[type[Model], ...] = (User, Profile, Lead, TaxIntakeLead)
MODELS: tuple[type[Model], ...] = (*READ_ONLY, CRMContact, CRMInteraction, CRMStageHistory)
SECRETS = {"ssn", "dateOfBirth", "address", "bankDetails", "hashedPassword"}
NOON = datetime(2025, 7, 1, 12, 0, 0, 123000, tzinfo=UTC)
LATER = NOON + timedelta(hours=1)

Columns = dict[str, dict[str, tuple[str, bool, bool]]]


def column(field: Field[Any, Any]) -> str:
    assert field.column is not None
    return field.column


@pytest.fixture(scope="module")
def empty(django_db_setup: Database, django_db_blocker: DjangoDbBlocker) -> Iterator[BaseDatabaseWrapper]:
    with scratch_database("models") as database, django_connection(database, django_db_blocker) as connection:
        yield connection


@pytest.fixture(scope="module")
def generations(empty: BaseDatabaseWrapper) -> dict[str, Columns]:
    """Of every generation and table the columns: type, whether NULL is allowed, whether there is a default."""
    return {generation: real_columns(empty, generation) for generation in GENERATIONS}


@pytest.fixture
def connection(empty: BaseDatabaseWrapper) -> BaseDatabaseWrapper:
    make_tables(empty, "2025_11")
    return empty


def make_tables(connection: BaseDatabaseWrapper, generation: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        create_legacy_tables(cursor, generation)


def real_columns(connection: BaseDatabaseWrapper, generation: str) -> Columns:
    make_tables(connection, generation)
    return {model._meta.db_table: columns_of(connection, model._meta.db_table) for model in MODELS}


def columns_of(connection: BaseDatabaseWrapper, table: str) -> dict[str, tuple[str, bool, bool]]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull, atthasdef FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
            [table],
        )
        return {name: (kind, nullable, has_default) for name, kind, nullable, has_default in cursor.fetchall()}


def mapped_types(connection: BaseDatabaseWrapper, model: type[Model]) -> dict[str, str]:
    """The types that the fields ask for, in PostgreSQL's own words: it is let make such a table."""
    columns = ", ".join(
        f"{sql.Identifier(column(field)).as_string()} {field.db_type(connection)}"
        for field in model._meta.concrete_fields
    )
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE TEMPORARY TABLE mapped ({columns})")
    try:
        return {name: kind for name, (kind, _, _) in columns_of(connection, "mapped").items()}
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP TABLE mapped")


def way_out(model: type[Model], generation: str, difference: str) -> str:
    return (
        f"{difference}. If the application's tables in {generation} are as crm/legacy_schema/{generation}.sql says, "
        f"correct {model.__name__} in {model.__module__} and run makemigrations; if the application has changed them, "
        "correct that file, or add one for a new generation."
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_field_has_its_column_of_its_type(
    empty: BaseDatabaseWrapper, generations: dict[str, Columns], model: type[Model], generation: str
) -> None:
    table = model._meta.db_table
    real = generations[generation][table]
    make_tables(empty, generation)
    for name, mapped in mapped_types(empty, model).items():
        assert name in real, way_out(model, generation, f"{table} has no column {name}")
        assert real[name][0] == mapped, way_out(model, generation, f"{table}.{name} is {real[name][0]}, not {mapped}")


@pytest.mark.parametrize("model", MODELS)
def test_a_field_may_be_null_where_its_column_may(generations: dict[str, Columns], model: type[Model]) -> None:
    table = model._meta.db_table
    for field in model._meta.concrete_fields:
        nullable = [name for name in GENERATIONS if generations[name][table][column(field)][1]]
        generation = (nullable or GENERATIONS)[-1]
        difference = (
            f"{table}.{column(field)} {'may' if nullable else 'may never'} be NULL, and its field says otherwise"
        )
        assert field.null == bool(nullable), way_out(model, generation, difference)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_contact_has_a_field_for_all_that_the_database_does_not_fill_in(
    generations: dict[str, Columns], generation: str
) -> None:
    mapped = {field.column for field in CRMContact._meta.concrete_fields}
    for name, (_, nullable, has_default) in generations[generation]["crm_contacts"].items():
        difference = f"crm_contacts.{name} wants a value and is not mapped"
        assert name in mapped or nullable or has_default, way_out(CRMContact, generation, difference)


def test_a_draft_has_the_fields_of_a_contact_in_their_order() -> None:
    assert tuple(field.attname for field in CRMContact._meta.concrete_fields) == ContactDraft._fields


def test_no_model_maps_a_secret_column(generations: dict[str, Columns]) -> None:
    real = {name for columns in generations.values() for table in columns.values() for name in table}
    assert real >= SECRETS
    mapped = {
        field.column for model in apps.get_app_config("crm").get_models() for field in model._meta.concrete_fields
    }
    assert mapped & SECRETS == set()


def test_the_application_s_models_are_unmanaged() -> None:
    assert [model for model in MODELS if model._meta.managed] == []


def deserialized(model: type[Model]) -> Any:
    document = [{"model": model._meta.label_lower, "pk": "1", "fields": {}}]
    return next(iter(serializers.deserialize("json", json.dumps(document))))


# Without the fixture `db` no query gets through: each of these has to be refused before there is one.
WRITES: dict[str, Callable[[Any], object]] = {
    "save": lambda model: model(pk="1").save(),
    "save with arguments": lambda model: model(pk="1").save(force_insert=True, using="default"),
    "save_base, as loaddata does": lambda model: deserialized(model).save(),
    "delete": lambda model: model(pk="1").delete(),
    "create": lambda model: model.objects.create(pk="1"),
    "bulk_create": lambda model: model.objects.bulk_create([model(pk="1")]),
    "bulk_create, conflicts ignored": lambda model: model.objects.bulk_create([model(pk="1")], ignore_conflicts=True),
    "bulk_update": lambda model: model.objects.bulk_update([model(pk="1")], ["created_at"]),
    "update": lambda model: model.objects.filter(pk="1").update(created_at=NOON),
    "update, on another database": lambda model: model.objects.using("default").update(created_at=NOON),
    "delete many": lambda model: model.objects.all().delete(),
    "get_or_create": lambda model: model.objects.get_or_create(pk="1"),
    "update_or_create": lambda model: model.objects.update_or_create(pk="1"),
    "_raw_delete": lambda model: model.objects.all()._raw_delete("default"),
    "_base_manager.create": lambda model: model._base_manager.create(pk="1"),
    "_base_manager.bulk_create": lambda model: model._base_manager.bulk_create([model(pk="1")]),
    "_base_manager.update": lambda model: model._base_manager.update(created_at=NOON),
    "_base_manager.all().delete": lambda model: model._base_manager.all().delete(),
    "_default_manager.create": lambda model: model._default_manager.create(pk="1"),
}


@pytest.mark.parametrize("model", READ_ONLY)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_what_is_only_read_cannot_be_written(model: type[Model], write: Callable[[Any], object]) -> None:
    with pytest.raises(ReadOnlyError, match=model._meta.db_table):
        write(model)


def test_no_writing_method_of_django_s_querysets_is_forgotten() -> None:
    writing = {name for name in dir(QuerySet) if getattr(getattr(QuerySet, name), "alters_data", False)}
    writing |= {name for name in dir(QuerySet) if name.endswith(("create", "update", "delete"))}
    assert {"bulk_create", "acreate", "_raw_delete", "_update", "_insert", "aget_or_create"} <= writing
    # The one only reads, the other only checks the objects.
    harmless = {"select_for_update", "_prepare_for_bulk_create"}
    refused = {name for name in dir(ReadOnlyQuerySet) if getattr(ReadOnlyQuerySet, name) is ReadOnlyQuerySet._refuse}
    assert writing - harmless - refused == set()


def contact(identifier: str, **values: Any) -> CRMContact:
    return CRMContact(
        **{
            "id": identifier,
            "contact_type": "CLIENT",
            "first_name": "Ada",
            "last_name": "Byron",
            "email": f"{identifier}@example.com",
            "stage": "NEW",
            "stage_entered_at": NOON,
            "created_at": NOON,
            "updated_at": NOON,
            **values,
        }
    )


def stored(connection: BaseDatabaseWrapper, column: str) -> list[str]:
    with connection.cursor() as cursor:
        name = sql.Identifier(column).as_string()
        cursor.execute(f"SELECT {name}::text FROM crm_contacts ORDER BY id")
        return [text for (text,) in cursor.fetchall()]


def test_a_timestamp_goes_in_and_comes_out_aware(connection: BaseDatabaseWrapper) -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-7)))
    contacts = CRMContact.objects.using(connection.alias)
    contacts.bulk_create([contact("a", created_at=elsewhere, last_contacted_at=None)])
    assert stored(connection, "createdAt") == ["2025-07-01 12:00:00.123"]
    found = contacts.get(created_at=elsewhere, created_at__lt=LATER)
    assert (found.created_at, found.created_at.tzinfo, found.last_contacted_at) == (NOON, UTC, None)
    found.updated_at = LATER
    found.save(using=connection.alias)
    assert contacts.values_list("updated_at", flat=True).get() == LATER


@pytest.mark.parametrize("text", ["2025-07-01 12:00:00.123", "0044-03-15 00:00:00 BC", "infinity", "not a timestamp"])
def test_a_timestamp_as_text_passes_untouched(text: str) -> None:
    assert TimestampField().get_db_prep_save(text, default_connection) is text


def test_postgresql_s_own_texts_are_stored_as_they_are(connection: BaseDatabaseWrapper) -> None:
    moments = ["2025-07-01 12:00:00.1", "0044-03-15 00:00:00 BC", "infinity"]
    drafts = [contact(str(number), created_at=moment) for number, moment in enumerate(moments)]
    CRMContact.objects.using(connection.alias).bulk_create(drafts)
    assert stored(connection, "createdAt") == moments


@pytest.mark.parametrize("ignore_conflicts", [False, True])
def test_contacts_are_inserted_as_arrays(connection: BaseDatabaseWrapper, *, ignore_conflicts: bool) -> None:
    drafts = [contact("a", contact_type="CLIENT"), contact("b", contact_type="PREPARER", commission_rate="12.50")]
    with CaptureQueriesContext(connection) as queries:
        CRMContact.objects.using(connection.alias).bulk_create(drafts, ignore_conflicts=ignore_conflicts)
    inserts = [query["sql"] for query in queries if query["sql"].startswith("INSERT")]
    assert len(inserts) == 1
    assert "UNNEST(" in inserts[0]
    assert '::"ContactType"[]' in inserts[0]
    assert stored(connection, "contactType") == ["CLIENT", "PREPARER"]
    assert CRMContact.objects.using(connection.alias).get(contact_type="PREPARER").pk == "b"


def test_contacts_are_inserted_in_their_order_and_those_that_were_are_returned(database: Database) -> None:
    CRMContact.bulk.bulk_create([contact("there", email="there@example.com")])
    given = [contact(name, email=f"{name}@example.com") for name in ("zoe", "there", "ann")]
    assert CRMContact.bulk.bulk_create(iter(given), ignore_conflicts=True) == [given[0], given[2]]
    assert database.rows("SELECT id FROM crm_contacts ORDER BY ctid") == [("there",), ("zoe",), ("ann",)]
    assert CRMContact.bulk.bulk_create([], ignore_conflicts=True) == []
    with pytest.raises(IntegrityError), transaction.atomic():
        CRMContact.bulk.bulk_create(given)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {"update_conflicts": True, "update_fields": ["email"], "unique_fields": ["id"]},
    ],
)
def test_contacts_are_neither_inserted_in_parts_nor_updated(options: dict[str, Any]) -> None:
    with pytest.raises(NotSupportedError):
        CRMContact.bulk.bulk_create([contact("a")], **options)


def test_an_enum_field_survives_a_migration() -> None:
    _, _, args, kwargs = PostgresEnumField(enum="UserRole", null=True).deconstruct()
    again = PostgresEnumField(*args, **kwargs)
    assert (again.db_type(default_connection), again.null) == ('"UserRole"', True)


@pytest.mark.parametrize("text", ["0.10", "999.99", "12.50", "0.00", "-1.00"])
def test_a_rate_is_exact_on_its_way_in_and_out(connection: BaseDatabaseWrapper, text: str) -> None:
    contacts = CRMContact.objects.using(connection.alias)
    contacts.bulk_create([contact("text", commission_rate=text)])
    contacts.bulk_create([contact("decimal", commission_rate=Decimal(text))])
    assert stored(connection, "commissionRate") == [text, text]
    for rate in contacts.values_list("commission_rate", flat=True):
        assert isinstance(rate, Decimal)
        assert rate.as_tuple() == Decimal(text).as_tuple()


@pytest.mark.parametrize("value", ["0.10", Decimal("0.10"), 0.1, 1])
def test_a_rate_is_never_a_float(value: object) -> None:
    assert not isinstance(RateField().get_db_prep_save(value, default_connection), float)

"""Field classes for the two column types of the application that Django does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.expressions import Expression


class PostgresEnumField(models.TextField):  # type: ignore[type-arg] # django-stubs' fields are generic, Django's are not
    """A column of a PostgreSQL enum type; its value is the label.

    `enum` is the type's name. It is quoted: Prisma's type names are in mixed case, and Django's UNNEST insert casts to
    `db_type`.
    """

    def __init__(self, *args: Any, enum: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.enum = enum

    def deconstruct(self) -> Any:
        """The field as a migration writes it down."""
        name, path, args, kwargs = super().deconstruct()
        return name, path, args, {**kwargs, "enum": self.enum}

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """The quoted name of the enum type."""
        return f'"{self.enum}"'


def array_type(field: models.Field[Any, Any], connection: BaseDatabaseWrapper) -> str:
    """The type of an array of a column's values, by what the column really is: text, maybe, or another schema's enum.

    Without a modifier: an explicit cast to varchar(n) or numeric(p,s) would cut or round without a word. An integer is
    as long as there are: whether it fits, the column itself decides.
    """
    if isinstance(field, models.IntegerField):
        return "bigint[]"
    if not isinstance(field, PostgresEnumField):
        return f"{str(field.db_type(connection)).split('(')[0]}[]"
    connection.ensure_connection()
    of_session = _ENUM_TYPES.setdefault(connection.connection, {})
    column = (field.model._meta.db_table, str(field.column))
    if column not in of_session:
        with connection.cursor() as cursor:
            cursor.execute(_ENUM_TYPE, column)
            row = cursor.fetchone()
        of_session[column] = row[0] if row else "text"
    # For a statement with parameters.
    return f"{of_session[column].replace('%', '%%')}[]"


def array_types(fields: Iterable[models.Field[Any, Any]], connection: BaseDatabaseWrapper) -> dict[str, str]:
    """The types of arrays of these columns' values, by the quoted names of the columns: what `unnest` takes."""
    return {f'"{field.column}"': array_type(field, connection) for field in fields}


def unnest(alias: str, types: Mapping[str, str]) -> str:
    """The SQL of a table of rows that are sent as one array a column: the columns by name, each with its array's type.

    Its parameters are what `as_columns` makes of the rows.
    """
    return f"UNNEST({', '.join(f'%s::{kind}' for kind in types.values())}) AS {alias}({', '.join(types)})"


def as_columns(rows: Iterable[Iterable[Any]]) -> list[list[Any]]:
    """Return rows, of which there is at least one, as one list a column."""
    return [list(column) for column in zip(*rows, strict=True)]


# By session: another one may see another database.
_ENUM_TYPES: WeakKeyDictionary[Any, dict[tuple[str, str], str]] = WeakKeyDictionary()
_ENUM_TYPE = """
WITH RECURSIVE base(oid) AS (
  SELECT atttypid FROM pg_attribute WHERE attrelid = to_regclass(quote_ident(%s)) AND attname = %s
   UNION ALL
  SELECT typbasetype FROM base JOIN pg_type d USING (oid) WHERE d.typtype = 'd')
SELECT format('%%I.%%I', nspname, typname)
  FROM base JOIN pg_type t USING (oid) JOIN pg_namespace n ON n.oid = typnamespace WHERE typtype = 'e'
"""


class KeyField(models.TextField):  # type: ignore[type-arg] # django-stubs' fields are generic, Django's are not
    """A textual key that is looked up by equality alone.

    Beside the index of a key of type `text` or `varchar`, Django makes a second one for LIKE, which every insert would
    have to maintain. It goes by the type's name, and this is the same type's other name.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """The column's type."""
        return "character varying"


class TimestampField(models.DateTimeField):  # type: ignore[type-arg] # django-stubs' fields are generic, Django's are not
    """Prisma's DateTime: `timestamp(3)` without time zone, meaning UTC. Aware in Python.

    What a datetime cannot hold is PostgreSQL's text (`crm.postgres.loaders`). In the other direction, text is taken
    for what PostgreSQL itself printed and is passed on untouched: the backfill carries timestamps from one table to
    the other without ever parsing them.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """The column's type."""
        return "timestamp(3)"

    def from_db_value(
        self, value: datetime | str | None, *_: Expression | BaseDatabaseWrapper
    ) -> datetime | str | None:
        """What was stored, marked as the UTC that it is."""
        return value.replace(tzinfo=UTC) if isinstance(value, datetime) and not value.tzinfo else value

    def get_db_prep_value(self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False) -> Any:  # noqa: FBT001, FBT002 - Django's signature
        """A naive UTC timestamp for an aware one; text as it is."""
        if isinstance(value, str):
            return value
        moment = super().get_db_prep_value(value, connection, prepared)
        return moment.astimezone(UTC).replace(tzinfo=None) if isinstance(moment, datetime) and moment.tzinfo else moment


class ExactTimestampField(TimestampField):
    """A timestamp of the application's in a table of ours, as exact as PostgreSQL has it.

    Those of the application differ in that: a copy that is rounded would be another moment.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """The column's type."""
        return "timestamp"


class RateField(models.DecimalField):  # type: ignore[type-arg] # django-stubs' fields are generic, Django's are not
    """A commission rate in dollars per return, `numeric(5,2)`, never a float. PostgreSQL's text passes as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_digits": 5, "decimal_places": 2, **kwargs})

    def get_db_prep_save(self, value: Any, connection: BaseDatabaseWrapper) -> Any:
        """The value for an insert."""
        return value if isinstance(value, str) else super().get_db_prep_save(value, connection)

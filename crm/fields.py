"""Field classes for column types of the application, and arrays of column values for statements."""

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
        """Return the field as migrations store it."""
        name, path, args, kwargs = super().deconstruct()
        return name, path, args, {**kwargs, "enum": self.enum}

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """Return the quoted name of the enum type."""
        return f'"{self.enum}"'


def array_type(field: models.Field[Any, Any], connection: BaseDatabaseWrapper) -> str:
    """Return the SQL type of an array of a column's values, according to the actual type of an enum's column.

    That column may be text, or have an enum of another schema. The type has no modifier, because a cast to varchar(n)
    or numeric(p,s) would truncate or round silently. Integers are bigint, so that the column itself checks the range.
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
    # Escaped for a statement with parameters.
    return f"{of_session[column].replace('%', '%%')}[]"


def array_types(fields: Iterable[models.Field[Any, Any]], connection: BaseDatabaseWrapper) -> dict[str, str]:
    """Return the array types of the fields' columns by quoted column name, for `unnest`."""
    return {f'"{field.column}"': array_type(field, connection) for field in fields}


def unnest(alias: str, types: Mapping[str, str]) -> str:
    """Return the SQL of a table of rows that are sent as one array per column.

    `types` has the array type of each column, by name. The parameters of the SQL are the result of `as_columns`.
    """
    return f"UNNEST({', '.join(f'%s::{kind}' for kind in types.values())}) AS {alias}({', '.join(types)})"


def as_columns(rows: Iterable[Iterable[Any]]) -> list[list[Any]]:
    """Return one list per column for rows, of which there must be at least one."""
    return [list(column) for column in zip(*rows, strict=True)]


# By session, because another one may use another database.
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
    """A text key that is only compared by equality.

    For a key of type `text` or `varchar`, Django creates a second index for LIKE, which would slow down every insert.
    Django decides by the name of the type, so this field uses a synonym.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """Return the column's type."""
        return "character varying"


class TimestampField(models.DateTimeField):  # type: ignore[type-arg] # django-stubs' fields are generic, Django's are not
    """Prisma's DateTime: `timestamp(3)` without time zone, in UTC. Values in Python are aware.

    A timestamp that datetime cannot represent is read as text (`crm.postgres.loaders`). Text is written unchanged: the
    backfill copies timestamps between tables as PostgreSQL's text, without parsing them.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """Return the column's type."""
        return "timestamp(3)"

    def from_db_value(
        self, value: datetime | str | None, *_: Expression | BaseDatabaseWrapper
    ) -> datetime | str | None:
        """Return the stored value, as an aware datetime in UTC."""
        return value.replace(tzinfo=UTC) if isinstance(value, datetime) and not value.tzinfo else value

    def get_db_prep_value(self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False) -> Any:  # noqa: FBT001, FBT002 - Django's signature
        """Return a naive datetime in UTC for an aware one, and text unchanged."""
        if isinstance(value, str):
            return value
        moment = super().get_db_prep_value(value, connection, prepared)
        return moment.astimezone(UTC).replace(tzinfo=None) if isinstance(moment, datetime) and moment.tzinfo else moment


class ExactTimestampField(TimestampField):
    """A copy of an application's timestamp in one of our tables, with PostgreSQL's full precision.

    The application's columns differ in precision, and a rounded copy would not compare as equal.
    """

    def db_type(self, connection: BaseDatabaseWrapper) -> str:  # noqa: ARG002 - Django's signature
        """Return the column's type."""
        return "timestamp"


class RateField(models.DecimalField):  # type: ignore[type-arg] # django-stubs' fields are generic, Django's are not
    """A commission rate in dollars per return, `numeric(5,2)`, never a float. Text is written unchanged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_digits": 5, "decimal_places": 2, **kwargs})

    def get_db_prep_save(self, value: Any, connection: BaseDatabaseWrapper) -> Any:
        """Return the value for an insert."""
        return value if isinstance(value, str) else super().get_db_prep_save(value, connection)

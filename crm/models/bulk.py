"""`bulk_create` for rows whose values are already what the database takes.

Django prepares every value of every row by a chain of method calls, which costs more than all else that a backfill does
in Python. Where every value is PostgreSQL's own text, or a whole number, there is nothing to prepare: here a column's
values are taken off the objects in one go and sent as one array, in the same UNNEST form that Django uses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import Any

from django.db import connections, models
from django.db.models.constants import OnConflict
from django.db.models.sql import InsertQuery
from django.db.models.sql.compiler import SQLInsertCompiler


class _ColumnwiseCompiler(SQLInsertCompiler):
    def as_sql(self) -> Any:  # type: ignore[override] # Django's own insert compiler overrides it so
        # django-stubs do not know that the query of this compiler is an insert.
        query: Any = self.query
        operations = self.connection.ops
        fields: Sequence[models.Field[Any, Any]] = query.fields
        names = ", ".join(operations.quote_name(str(field.column)) for field in fields)
        arrays = ", ".join(f"%s::{str(field.db_type(self.connection)).split('(')[0]}[]" for field in fields)
        on_conflict = operations.on_conflict_suffix_sql(
            fields,
            query.on_conflict,
            (field.column for field in query.update_fields),
            (field.column for field in query.unique_fields),
        )
        table = operations.quote_name(query.get_meta().db_table)
        statement = f"INSERT INTO {table} ({names}) SELECT * FROM UNNEST({arrays}) {on_conflict}"  # noqa: S608 - names from the models
        return [(statement, tuple(list(map(attrgetter(field.attname), query.objs)) for field in fields))]


class _ColumnwiseInsert(InsertQuery):
    def get_compiler(self, using: str | None = None, connection: Any = None, elide_empty: bool = True) -> Any:  # noqa: FBT001, FBT002 - Django's signature
        return _ColumnwiseCompiler(self, connection or connections[using or "default"], using, elide_empty)


class ColumnwiseQuerySet(models.QuerySet[Any]):
    """A queryset whose `bulk_create` takes its values column by column, as they are."""

    def _insert(
        self,
        objs: list[models.Model],
        fields: Collection[models.Field[Any, Any]],
        returning_fields: Collection[models.Field[Any, Any]] | None = None,
        raw: bool = False,  # noqa: FBT001, FBT002 - Django's signature
        using: str | None = None,
        on_conflict: OnConflict | None = None,
        update_fields: Collection[models.Field[Any, Any]] | None = None,
        unique_fields: Collection[models.Field[Any, Any]] | None = None,
    ) -> Any:
        alias = using or self.db
        query = _ColumnwiseInsert(
            self.model, on_conflict=on_conflict, update_fields=update_fields, unique_fields=unique_fields
        )
        query.insert_values(fields, objs, raw=raw)
        return query.get_compiler(using=alias).execute_sql(returning_fields)

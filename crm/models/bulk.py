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

from crm.fields import array_types, unnest
from crm.try_execute import try_execute


class ColumnwiseQuerySet(models.QuerySet[Any]):
    """A queryset whose `bulk_create` takes its values column by column, as they are, and inserts in its own order.

    `inserted_ids` are the primary keys of the rows that it inserted. Django reports every object as written when it
    ignores conflicts; only PostgreSQL knows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inserted_ids: set[Any] = set()

    def _insert(
        self,
        objs: list[models.Model],
        fields: Sequence[models.Field[Any, Any]],
        returning_fields: Collection[models.Field[Any, Any]] | None = None,  # noqa: ARG002 - Django's signature
        raw: bool = False,  # noqa: ARG002, FBT001, FBT002 - Django's signature
        using: str | None = None,
        on_conflict: OnConflict | None = None,
        update_fields: Collection[models.Field[Any, Any]] | None = None,
        unique_fields: Collection[models.Field[Any, Any]] | None = None,
    ) -> list[tuple[Any, ...]]:
        connection = connections[using or self.db]
        operations: Any = connection.ops
        options = self.model._meta
        arrays = array_types(fields, connection)
        suffix = operations.on_conflict_suffix_sql(
            fields,
            on_conflict,
            (field.column for field in update_fields or ()),
            (field.column for field in unique_fields or ()),
        )
        table, key = operations.quote_name(options.db_table), operations.quote_name(str(options.pk.column))
        ordered = [operations.quote_name(str(options.get_field(name).column)) for name in self.query.order_by]
        order = f"ORDER BY {', '.join(ordered)}" if ordered else ""
        statement = (
            f"INSERT INTO {table} ({', '.join(arrays)}) SELECT * FROM {unnest('sent', arrays)} {order} "
            f"{suffix} RETURNING {key}"
        )
        keys = try_execute(connection, statement, [list(map(attrgetter(field.attname), objs)) for field in fields])
        self.inserted_ids.update(keys)
        return [(key,) for key in keys]

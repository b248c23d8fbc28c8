"""`bulk_create` for rows whose values are already what the database takes.

Django prepares every value of every row by a chain of method calls, which costs more than all else that a backfill does
in Python. Where every value is PostgreSQL's own text, or a whole number, there is nothing to prepare: here a column's
values are taken off the objects in one go and sent as one array, in the same UNNEST form that Django uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Any

from django.db import NotSupportedError, connections, models

from crm.fields import array_types, unnest
from crm.try_execute import try_execute


class ColumnwiseQuerySet(models.QuerySet[Any]):
    """A queryset whose `bulk_create` takes its values column by column, as they are."""

    def bulk_create(
        self,
        objs: Iterable[Any],
        batch_size: int | None = None,
        ignore_conflicts: bool = False,  # noqa: FBT001, FBT002 - Django's signature
        update_conflicts: bool = False,  # noqa: FBT001, FBT002 - Django's signature
        update_fields: Collection[str] | None = None,
        unique_fields: Collection[str] | None = None,
    ) -> list[Any]:
        """Insert all objects in their order by one statement, and return those that were inserted.

        Django returns every object when it ignores conflicts; only PostgreSQL knows. Where a trigger gave a row another
        key, a new object that has nothing but this key stands for it. Batches and updates are not supported.

        Raises django.db.DatabaseError where PostgreSQL refuses a row; see crm.try_execute.
        """
        if batch_size is not None or update_conflicts or update_fields or unique_fields:
            raise NotSupportedError("All objects are inserted by one statement, and none is updated.")
        rows = list(objs)
        if not rows:
            return rows
        connection = connections[self.db]
        quoted, options = connection.ops.quote_name, self.model._meta
        fields = options.concrete_fields
        arrays = array_types(fields, connection)
        on_conflict = "ON CONFLICT DO NOTHING" if ignore_conflicts else ""
        statement = (
            f"INSERT INTO {quoted(options.db_table)} ({', '.join(arrays)}) "
            f"SELECT * FROM {unnest('sent', arrays)} {on_conflict} "
            f"RETURNING {quoted(options.pk.column)}"
        )
        keys = try_execute(connection, statement, [list(map(attrgetter(field.attname), rows)) for field in fields])
        by_key = dict(zip(map(attrgetter(options.pk.attname), rows), rows, strict=True))
        return [by_key.get(key) or self.model(pk=key) for key in keys]

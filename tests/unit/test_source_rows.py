"""What is read of a source row, and in which order, follows from the declaration of the row alone."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import pytest

from crm.rules.source_rows import SOURCE_TABLES, Joined, KnownReason, Own, SourceTable


class Intake(NamedTuple):
    id: Annotated[str, Own("id")]
    known_reason: Annotated[str | None, KnownReason()]
    email: Annotated[str | None, Own("email", is_long=True)]
    preparer: Annotated[str | None, Joined("p.id")]
    converted_at: Annotated[str | None, Own("convertedAt", is_optional=True)]


INTAKES = SourceTable("intakes", Intake, "email", ())  # type: ignore[arg-type] # of no table that there is


def test_the_values_of_a_row_are_selected_in_the_order_of_its_fields() -> None:
    assert INTAKES.values == 'r."id", r.known_reason, r."email", p.id, r."convertedAt"'
    assert INTAKES.long_values == ['r."email"']


def test_a_column_that_the_database_lacks_reads_as_null_under_its_name() -> None:
    assert (INTAKES.required_columns, INTAKES.optional_columns) == (("id", "email"), ("convertedAt",))
    assert INTAKES.columns(()) == 'r."id", r."email", r."convertedAt", NULL::text AS known_reason'
    lacking = INTAKES.columns({"intakes.convertedAt"}, "line.reason")
    assert lacking == 'r."id", r."email", NULL::text AS "convertedAt", line.reason AS known_reason'


@pytest.mark.parametrize("table", SOURCE_TABLES.values(), ids=SOURCE_TABLES.keys())
def test_the_rules_find_in_every_row_what_they_go_by(table: SourceTable) -> None:
    assert {"id", "created_at", "updated_at", "known_reason", table.label} <= table.fields.keys()

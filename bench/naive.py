"""What one would write on the first day: to see what the care is worth. Neither keeps a ledger or merges anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from django.db import connection, transaction

from crm.backfill.read.source import SourceReader
from crm.models import CRMContact
from crm.outcome import Source
from crm.postgres.facts.schema import examine
from crm.rules.mapping import ContactDraft, map_rows

BATCH = 5_000


def _batches() -> Iterator[list[ContactDraft]]:
    facts = examine(connection, for_writing=False)
    for source in Source:
        reader, after = SourceReader(connection, facts, source), None
        while (page := reader.page(after, BATCH)).rows:
            after = page.key
            yield [row.draft for row in map_rows(source, page.rows, facts.rules()) if row.draft]


def plain_bulk_create() -> int:
    """`bulk_create(ignore_conflicts=True)` of plain models, a transaction a batch. The rows that were sent."""
    rows = 0
    for drafts in _batches():
        rows += len(drafts)
        with transaction.atomic():
            CRMContact.objects.bulk_create([CRMContact(*draft) for draft in drafts], ignore_conflicts=True)  # type: ignore[misc] # the draft's fields are the model's
    return rows


def row_by_row() -> int:
    """A look and an insert for every row, as the script before did: two round trips each. The rows that were sent."""
    rows = 0
    for draft in _one_by_one(_batches()):
        rows += 1
        if not CRMContact.objects.filter(email=draft.email).exists():
            with transaction.atomic():
                CRMContact.objects.bulk_create([CRMContact(*draft)], ignore_conflicts=True)  # type: ignore[misc] # the draft's fields are the model's
    return rows


def _one_by_one(batches: Iterable[list[ContactDraft]]) -> Iterator[ContactDraft]:
    for batch in batches:
        yield from batch


CANDIDATES: dict[str, Callable[[], int]] = {"bulk_create": plain_bulk_create, "row by row": row_by_row}

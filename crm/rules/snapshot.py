"""A contact as it was read, to compare it with what its rows map to. Pure: no database."""

from __future__ import annotations

from dataclasses import dataclass

from crm.rules.mapping import ContactDraft


@dataclass(frozen=True, slots=True)
class ContactSnapshot:
    """A contact as it was read. Columns that the table lacks are None.

    `version` is PostgreSQL's version of the row (`xmin`). `set_elsewhere` are columns that the backfill
    never writes and that do not have their default. Both have their default if the reader does not read them.
    """

    values: ContactDraft
    version: str = ""
    set_elsewhere: tuple[str, ...] = ()

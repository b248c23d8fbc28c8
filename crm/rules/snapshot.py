"""A contact as it stood when it was read, for whoever compares it with what its rows make of it. Pure: no database."""

from __future__ import annotations

from dataclasses import dataclass

from crm.rules.mapping import ContactDraft


@dataclass(frozen=True, slots=True)
class ContactSnapshot:
    """A contact as it is now; columns that the table lacks are None.

    `version` is PostgreSQL's own mark of the row's version (`xmin`). `set_elsewhere` are columns that the backfill
    never writes and that do not have their default. What was not asked for has its default here.
    """

    values: ContactDraft
    version: str = ""
    set_elsewhere: tuple[str, ...] = ()

"""A row in conflict, and its resolution."""

from __future__ import annotations

from typing import Any

from tests.support.builders import add_contact, add_profile, add_user, ledger
from tests.support.commands import Finished, called, run

ANN = "ann@example.com"
OTHER = "other.ann@example.com"


def resolve(*arguments: str) -> Finished:
    """`manage.py resolve_crm_conflict` with these arguments, in this process."""
    return called("resolve_crm_conflict", *arguments)


def resolved(*arguments: str) -> None:
    finished = resolve(*arguments)
    assert (finished.code, finished.stderr) == (0, "")


def entry_of(row: str) -> tuple[Any, ...]:
    entry = ledger()[row]
    return entry["outcome"], entry["reason"], entry["contact_id"]


def somebody_elses_account() -> tuple[str, str, str]:
    """A profile in conflict: its address is in a contact with another account. The row, its user and the contact."""
    user = add_user(ANN)
    row = add_profile(userId=user, phone="555 0101")
    contact = add_contact(ANN, userId=add_user("elsewhere@example.com"))
    assert run()["by_reason"] == {"conflict": 1}
    return f"profiles:{row}", user, contact

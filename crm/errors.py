"""Errors for the operator."""

from collections.abc import Sequence
from typing import ClassVar

#: The maximum number of names in a list of names in a message.
MAX_NAMED = 10


class OperatorError(Exception):
    """An error that the operator can fix. The message names the object, the reason and the remedy.

    A command prints the message as one line on stderr and returns `exit_code`. The message never contains a password or
    personal data.
    """

    exit_code: ClassVar[int] = 2


def listed(names: Sequence[str]) -> str:
    """Return the first MAX_NAMED names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more

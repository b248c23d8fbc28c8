"""Errors for the operator."""

from typing import ClassVar


class OperatorError(Exception):
    """An error that the operator can fix. The message names the object, the reason and the remedy.

    A command prints the message as one line on stderr and returns `exit_code`. The message never contains a password or
    personal data.
    """

    exit_code: ClassVar[int] = 2

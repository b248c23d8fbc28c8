"""The errors that are meant for the person at the keyboard."""

from typing import ClassVar


class OperatorError(Exception):
    """Something that the operator can put right: the message names the thing, the reason and the way out.

    A command ends with `exit_code` and the message on one line of stderr. The message never holds a password or a
    person's data.
    """

    exit_code: ClassVar[int] = 2

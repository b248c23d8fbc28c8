r"""Parses a file `.env` by the conventions of python-dotenv. Pure: text in, names and values out.

    NAME=value            white space around the name, the = and the value is not part of them
    export NAME=value     the same
    NAME=value # comment  a # after white space begins a comment; within a value it is part of the value
    NAME='value'          taken literally, including # and white space
    NAME="value"          the same, with escapes such as \n, \t, \" and \\

A byte order mark and Windows line ends are accepted; if a name occurs more than once, the last line counts. ${NAME},
which other tools expand, is refused outside single quotation marks. Any other line is refused by its number. No message
quotes the file, because it contains secrets.

`Env.read_env` of django-environ skips a line that it cannot read, such as `NAME = value`, and logs it with its secret.
It also cuts a value off at any #, or keeps the comment in it.
"""

import re
from typing import Final

from django.core.exceptions import ImproperlyConfigured

_ASSIGNMENT: Final = re.compile(
    r"""
    \s* (?:export\s+)? (?P<name>[A-Za-z_][A-Za-z0-9_]*) \s* = \s*
    (?: '(?P<single>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | (?P<plain>(?![\s'"`\#])\S.*?)? )
    \s* (?:(?<=\s)\#.*)?
    """,
    re.VERBOSE,
)
_REFERENCE: Final = re.compile(r"\$\{[^}]*\}")
_EMPTY: Final = re.compile(r"\s*(?:#.*)?")
_ESCAPE: Final = re.compile(r"\\(.)")
_ESCAPED: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class DotenvError(ImproperlyConfigured):
    """A line cannot be read. The message gives only the number of the line."""

    def __init__(self, number: int, *, refers: bool = False) -> None:
        super().__init__(
            f".env cannot be read: line {number} refers to another variable by ${{...}}, which is not expanded. "
            "Write the value itself, or put a literal value in single quotation marks."
            if refers
            else f".env cannot be read: line {number} is not NAME=value. Put a value with white space, quotation marks "
            "or a # in single quotation marks, on one line, and begin a comment with a #."
        )


def parse(text: str) -> dict[str, str]:
    """Return the variables that are set in the text of a file. Raises DotenvError."""
    found: dict[str, str] = {}
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff")), start=1):
        if _EMPTY.fullmatch(line):
            continue
        assignment = _ASSIGNMENT.fullmatch(line)
        if assignment is None or "\0" in line:
            raise DotenvError(number)
        if _REFERENCE.search(assignment["double"] or assignment["plain"] or ""):
            raise DotenvError(number, refers=True)
        found[assignment["name"]] = _value(assignment)
    return found


def _value(assignment: re.Match[str]) -> str:
    if assignment["double"] is not None:
        return _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[1]), assignment["double"])
    return assignment["single"] or assignment["plain"] or ""

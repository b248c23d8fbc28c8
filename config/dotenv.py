r"""A file `.env`, read by the conventions of dotenv as python-dotenv has them. Pure: text in, names and values out.

    NAME=value            white space around the name, the = and the value is not part of them
    export NAME=value     the same
    NAME=value # comment  a # after white space begins a comment; one within a value is part of it
    NAME='value'          as it is, also # and white space
    NAME="value"          the same, with \n, \t, \", \\ and the like

A byte order mark and the line ends of Windows do no harm, and the last line of a name counts. ${NAME}, which other
tools would expand, is refused outside single quotation marks.
Whatever else stands in a line is refused by its number. No message holds a word of the file: there are secrets in it.

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
    """A line that cannot be read. The message names the line by its number alone."""

    def __init__(self, number: int, *, refers: bool = False) -> None:
        super().__init__(
            f".env cannot be read: line {number} refers to another variable by ${{...}}, and nothing is expanded here. "
            "Write its value out, or put a value that is meant as it stands into single quotation marks."
            if refers
            else f".env cannot be read: line {number} is not NAME=value. Put a value with white space, quotation marks "
            "or a # into single quotation marks, on one line, and a # before a comment."
        )


def parse(text: str) -> dict[str, str]:
    """The variables that the text of a file names. Raises DotenvError."""
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

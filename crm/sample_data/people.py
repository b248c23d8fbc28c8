"""The data about a person from which rows are generated."""

from dataclasses import dataclass

#: Text as PostgreSQL reads it, None for NULL.
Row = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Person:
    """A person, with correctly spelled data. Forms may contain other spellings."""

    number: int
    arrived: int
    first: str
    last: str
    #: The first name as an address or a link has it.
    handle: str
    #: The part of the email before the @. Its number makes it unique.
    own: str
    #: In lower case.
    email: str
    area: str
    line: str


@dataclass(frozen=True, slots=True)
class Account:
    """A profile as stored."""

    profile_id: str
    user_id: str | None
    clerk_id: str | None
    role: str
    at: int
    first: str | None
    last: str | None
    phone: str | None


@dataclass(frozen=True, slots=True)
class Lead:
    """A lead as stored."""

    kind: str
    at: int
    first: str
    last: str
    email: str
    phone: str
    source: str | None
    #: Username, type, rate, locked at, method, confidence, cookie.
    attribution: Row

"""When two spellings are one email address. Pure: no database. The same rule in Python and in SQL.

White space, control characters, format characters and whatever else nobody can see are no part of an address: they are
taken off its ends. Letters are compared without case, each by itself, ASCII with ASCII and others with others. So the
rule depends on no collation and no locale, and PostgreSQL and Python agree on every text that PostgreSQL can hold.
"""

from __future__ import annotations

import re
from functools import cache

#: What nobody sees: white space, the categories Cc and Cf of Unicode, whatever it declares ignorable by default, blank
#: fillers, and the marks that stand for what could not be read.
_INVISIBLE = (
    *((0x0001, 0x0020), (0x007F, 0x00A0), (0x00AD, 0x00AD), (0x034F, 0x034F), (0x0600, 0x0605), (0x061C, 0x061C)),
    *((0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x115F, 0x1160), (0x1680, 0x1680)),
    *((0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800)),
    *((0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFD)),
    *((0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x13430, 0x1343F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)),
    *((0xE0000, 0xE0FFF),),
)
_SET = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in _INVISIBLE)
_ASCII_SET = "".join(map(chr, (*range(0x01, 0x21), 0x7F)))
_AT_THE_ENDS = re.compile(f"\\A[{_SET}]+|[{_SET}]+\\Z")
# A quoted name may hold a space, and nothing else of these.
_INSIDE = re.compile(f"(?! )[{_SET}]")
_LAST_LETTER_WITH_CASE = 0x1E943


@cache
def _lower_case() -> dict[int, int]:
    """The lower case of letters that are not ASCII, where it is one letter and not ASCII either."""
    pairs = ((code, chr(code).lower()) for code in range(0x80, _LAST_LETTER_WITH_CASE))
    return {code: ord(low) for code, low in pairs if len(low) == 1 and not low.isascii() and ord(low) != code} | {
        code: code + 0x20 for code in range(ord("A"), ord("Z") + 1)
    }


def trimmed_address(raw: str) -> str:
    """The address without what nobody sees at its ends."""
    return raw.strip(_ASCII_SET) if raw.isascii() else _AT_THE_ENDS.sub("", raw)


def canonical_address(raw: str) -> str:
    """The spelling by which addresses are compared, and in which we write them; not necessarily a valid address."""
    address = trimmed_address(raw)
    return address.lower() if address.isascii() else address.translate(_lower_case())


def hides_something(address: str) -> bool:
    """Whether there is something inside the address that nobody sees."""
    return _INSIDE.search(address) is not None


def trimmed_address_sql(column: str) -> str:
    """The SQL of `trimmed_address`."""
    return (
        f"CASE WHEN octet_length({column}) = char_length({column}) THEN btrim({column}, {literal(_ASCII_SET)}) "
        f"ELSE regexp_replace({column} COLLATE \"C\", {_AT_THE_ENDS_SQL}, '', 'g') END"
    )


def canonical_address_sql(column: str) -> str:
    """The SQL of `canonical_address`."""
    address = trimmed_address_sql(column)
    letters = _lower_case()
    upper, lower = ("".join(map(chr, codes)) for codes in (letters.keys(), letters.values()))
    return (
        f'CASE WHEN octet_length({column}) = char_length({column}) THEN lower(({address}) COLLATE "C") '
        f"ELSE translate({address}, '{upper}', '{lower}') END"
    )


def may_be_noncanonical_sql(column: str) -> str:
    """The SQL condition of every address that is not in its canonical form, and of some others."""
    return f"{column} COLLATE \"C\" ~ '[^!-@[-~]'"


def literal(text: str) -> str:
    """Return text as a literal of PostgreSQL's, whatever is in it."""
    return "E'" + "".join(f"\\u{ord(character):04x}" for character in text) + "'"


_AT_THE_ENDS_SQL = f"E'{f'^[{_SET}]+|[{_SET}]+$'.replace(chr(92), chr(92) * 2)}'"

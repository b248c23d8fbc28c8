"""Decides when two spellings are the same email address, by the same rule in Python and in SQL. Pure: no database.

White space, control characters, format characters and other invisible characters at the ends are not part of an
address and are removed. Letters are compared without case, one by one: ASCII with ASCII, others with others. So the
rule depends on no collation and no locale, and PostgreSQL and Python agree on every text that PostgreSQL can store.
"""

from __future__ import annotations

import re
from functools import cache

#: Invisible characters: white space, the Unicode categories Cc and Cf, the characters with the Unicode property
#: Default_Ignorable_Code_Point, blank fillers, and replacement characters.
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
# A quoted local part may contain a space, but no other of these characters.
_INSIDE = re.compile(f"(?! )[{_SET}]")
_LAST_LETTER_WITH_CASE = 0x1E943


@cache
def _lower_case() -> dict[int, int]:
    """Return the lower case of ASCII letters, and of others whose lower case is a single non-ASCII letter."""
    pairs = ((code, chr(code).lower()) for code in range(0x80, _LAST_LETTER_WITH_CASE))
    return {code: ord(low) for code, low in pairs if len(low) == 1 and not low.isascii() and ord(low) != code} | {
        code: code + 0x20 for code in range(ord("A"), ord("Z") + 1)
    }


def trimmed_address(raw: str) -> str:
    """Return the address without invisible characters at its ends."""
    return raw.strip(_ASCII_SET) if raw.isascii() else _AT_THE_ENDS.sub("", raw)


def canonical_address(raw: str) -> str:
    """Return the spelling in which addresses are compared and written. The result is not necessarily valid."""
    address = trimmed_address(raw)
    return address.lower() if address.isascii() else address.translate(_lower_case())


def hides_something(address: str) -> bool:
    """Return whether the address contains an invisible character; spaces are allowed."""
    return _INSIDE.search(address) is not None


def trimmed_address_sql(column: str) -> str:
    """Return `trimmed_address` as an SQL expression."""
    return (
        f"CASE WHEN octet_length({column}) = char_length({column}) THEN btrim({column}, {literal(_ASCII_SET)}) "
        f"ELSE regexp_replace({column} COLLATE \"C\", {_AT_THE_ENDS_SQL}, '', 'g') END"
    )


def canonical_address_sql(column: str) -> str:
    """Return `canonical_address` as an SQL expression."""
    address = trimmed_address_sql(column)
    letters = _lower_case()
    upper, lower = ("".join(map(chr, codes)) for codes in (letters.keys(), letters.values()))
    return (
        f'CASE WHEN octet_length({column}) = char_length({column}) THEN lower(({address}) COLLATE "C") '
        f"ELSE translate({address}, '{upper}', '{lower}') END"
    )


def may_be_noncanonical_sql(column: str) -> str:
    """Return an SQL condition that every address not in canonical form satisfies, and some others."""
    return f"{column} COLLATE \"C\" ~ '[^!-@[-~]'"


def literal(text: str) -> str:
    """Return any text as a PostgreSQL string literal."""
    return "E'" + "".join(f"\\u{ord(character):04x}" for character in text) + "'"


_AT_THE_ENDS_SQL = f"E'{f'^[{_SET}]+|[{_SET}]+$'.replace(chr(92), chr(92) * 2)}'"

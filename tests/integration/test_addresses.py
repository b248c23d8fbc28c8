"""When two spellings are one address: the same in Python, in PostgreSQL and for the judge."""

from __future__ import annotations

import unicodedata

import pytest
from django.db import connection
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crm.rules.addresses import (
    canonical_address,
    canonical_address_sql,
    may_be_noncanonical_sql,
    trimmed_address,
    trimmed_address_sql,
)
from crm.rules.mapping import normalised_email
from tests.conftest import Database
from tests.support.builders import add_contact, add_lead, add_profile, contacts, ledger
from tests.support.commands import run
from tests.support.reference import address_of

# What is left out are ideographs, private ones and nothing.
CHARACTERS = [chr(code) for code in (*range(1, 0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x14000))]
CHARACTERS += [chr(code) for code in (*range(0x16000, 0x1F000), *range(0xE0000, 0xE1000))]
INVISIBLE = [character for character in CHARACTERS if trimmed_address(character) == ""]
#: What stood at the end of one person's address, who was ten people then.
AT_THE_END = [chr(code) for code in (0x200B, 0x200D, 0x2060, 0xFEFF, 0x200F, 0x00AD, 0x180E, 0x202E, 0xFFFD)]
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    | st.sampled_from("aZ@. éÉßİΣς\N{LATIN SMALL LETTER DOTLESS I}\N{KELVIN SIGN}\N{NO-BREAK SPACE}\n\x1f\x7f")
    | st.sampled_from(INVISIBLE)
)
against_postgresql = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def in_postgresql(sql: str, texts: list[str]) -> list[object]:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {sql} FROM unnest(%s::text[]) WITH ORDINALITY AS t(t, n) ORDER BY n", [texts])
        return [value for (value,) in cursor.fetchall()]


@against_postgresql
@given(st.lists(TEXT, max_size=20))
@example(["", " ", "\x1cAnn@Example.COM\x1f", "MAX@BÜRO.example", "ΑΣ", "İ", "\u212aing@x", "\U000e0fff a \U000e0001"])
def test_python_postgresql_and_the_judge_tell_the_same_people_apart(database: Database, texts: list[str]) -> None:
    connection.ensure_connection()
    assert in_postgresql(trimmed_address_sql("t"), texts) == [trimmed_address(text) for text in texts]
    canonical = [canonical_address(text) for text in texts]
    assert in_postgresql(canonical_address_sql("t"), texts) == canonical
    assert [address_of(text) for text in texts] == canonical
    assert [canonical_address(text) for text in canonical] == canonical
    differs = [text for text in texts if canonical_address(text) != text]
    assert all(in_postgresql(may_be_noncanonical_sql("t"), differs))


def test_they_agree_on_every_single_character(database: Database) -> None:
    canonical = {character: canonical_address(f"{character}x{character}") for character in CHARACTERS}
    assert {character: address_of(f"{character}x{character}") for character in CHARACTERS} == canonical
    special = [character for character in CHARACTERS if canonical[character] != f"{character}x{character}"]
    special += [character for character in CHARACTERS if character.swapcase() != character]
    there = in_postgresql(canonical_address_sql("t"), [f"{character}x{character}" for character in special])
    assert there == [canonical[character] for character in special]


def test_nobody_sees_white_space_controls_and_format_characters() -> None:
    categories = ("Cc", "Cf", "Zs", "Zl", "Zp")
    unseen = {c for c in CHARACTERS if c.isspace() or unicodedata.category(c) in categories}
    assert unseen | set(AT_THE_END) <= set(INVISIBLE)


def test_no_two_letters_become_one_by_their_case_but_in_one_alphabet() -> None:
    assert canonical_address("\N{KELVIN SIGN}@x") != "k@x"
    assert canonical_address("\N{LATIN SMALL LETTER LONG S}@x") != "s@x"


@pytest.mark.parametrize(
    "character", sorted({*AT_THE_END, "\x01", "\x1f", "\N{HANGUL FILLER}", "\N{BRAILLE PATTERN BLANK}"})
)
def test_what_nobody_sees_is_no_part_of_an_address_and_makes_it_invalid_inside(character: str) -> None:
    assert normalised_email(f"{character} Ann@example.com{character}\t{character}") == "ann@example.com"
    assert normalised_email(f"an{character}n@example.com") is None
    assert normalised_email(f"ann@exam{character}ple.com") is None
    assert normalised_email(f'"an{character}n"@example.com') is None


def test_one_person_whose_address_ends_in_what_nobody_sees_is_one_contact(database: Database) -> None:
    for character in ("", *AT_THE_END):
        add_lead(f"ann@example.com{character}")
    report = run()
    assert (report["created"], report["merged"]) == (1, len(AT_THE_END))
    assert [contact["email"] for contact in contacts().values()] == ["ann@example.com"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "character", [*AT_THE_END, "\x1c", "\x1f", "\x85", "\N{NO-BREAK SPACE}", "\N{IDEOGRAPHIC SPACE}"]
)
@pytest.mark.parametrize("in_another_case", [True, False])
def test_a_stored_address_that_ends_in_what_nobody_sees_is_found(
    database: Database,
    character: str,
    in_another_case: bool,  # noqa: FBT001 - parametrized
) -> None:
    contact = add_contact(f"{'Ann' if in_another_case else 'ann'}@example.com{character}")
    add_lead("ann@example.com")
    add_profile(email="ann@example.com")
    foretold, done = run(dry_run=True), run()
    assert foretold["exists"] == done["exists"] == 2
    assert list(contacts()) == [contact]


def test_an_account_whose_address_is_nothing_to_be_seen_has_none(database: Database) -> None:
    profile = add_profile(email="\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}", id="p1")
    assert run(dry_run=True)["created"] == run()["created"] == 1
    assert [contact["email"] for contact in contacts().values()] == [f"client-{profile}@crm-backfill.invalid"]


@pytest.mark.parametrize("workers", [1, 4])
def test_profiles_whose_ids_differ_only_in_case_are_two_people(database: Database, workers: int) -> None:
    for identifier in ("abc", "ABC", "Abc"):
        add_profile(id=identifier)
    assert run(dry_run=True)["created"] == run(workers=workers)["created"] == 3
    assert {line["outcome"] for line in ledger().values()} == {"created"}

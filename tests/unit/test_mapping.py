"""From a source row to a contact, rule by rule."""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from hypothesis import given, settings
from hypothesis import strategies as st

from crm.models import CRMContact
from crm.outcome import AssignedBy, Reason, Source
from crm.rules.mapping import (
    ContactDraft,
    MappedRow,
    Rules,
    canonical_username,
    contact_id,
    map_rows,
    normalised,
    normalised_email,
    trimmed,
)
from crm.rules.source_rows import IntakeRow, LeadRow, ProfileRow, RawRow, SignupRow
from tests.support import rule_examples
from tests.support.profiles import examples
from tests.support.rule_examples import CONTACT_IDS, EMAILS, EXAMPLES, OLD_STAGES, PLACEHOLDER_DOMAIN, SUPER_ADMIN

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def printed(value: Any) -> Any:
    """A value as PostgreSQL prints it."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(" ", "milliseconds")
    return str(value) if isinstance(value, Decimal) else value


def as_read(row: rule_examples.Row) -> dict[str, Any]:
    """A row as it is read: with our names for the columns, and PostgreSQL's texts."""
    values = {re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name): printed(row[name]) for name in row}
    return {"known_reason": None, **values}


# To find the profile of a preparer, by id, user or code, is the work of the statements which read the rows.


def profile_row(row: rule_examples.Row) -> ProfileRow:
    own = {name: value for name, value in row.items() if name != "preparerId"}
    raw = row["preparerId"]
    resolved = rule_examples.PREPARERS_BY_ID.get(raw)
    return ProfileRow(raw_assigned_preparer_id=raw, assigned_preparer_id=resolved, **as_read(own))


def as_read_with_preparer(row: rule_examples.Row) -> dict[str, Any]:
    """A lead or an intake as it is read."""
    own = {name: value for name, value in row.items() if name != "assignedPreparerId"}
    raw = row["assignedPreparerId"]
    codes = {canonical_username(code): preparer for code, preparer in rule_examples.PREPARERS_BY_CODE.items()}
    return {
        "raw_assigned_preparer_id": raw,
        "assigned_preparer_id": rule_examples.PREPARERS_BY_ID.get(raw),
        "referring_preparer_id": codes.get(canonical_username(row["referrerUsername"] or "")),
        **as_read(own),
    }


def lead_row(row: rule_examples.Row) -> LeadRow:
    return LeadRow(**as_read_with_preparer(row))


def intake_row(row: rule_examples.Row) -> IntakeRow:
    # Its kind decides only which source reads it.
    return IntakeRow(kind="", is_outranked=False, **as_read_with_preparer(row))


def row_of(row: rule_examples.Row) -> RawRow:
    if "role" in row:
        return profile_row(row)
    if "name" in row:
        return SignupRow(kind="", **as_read(row))
    return lead_row(row) if "status" in row else intake_row(row)


PROFILE, LEAD = profile_row(rule_examples.PROFILE), lead_row(rule_examples.LEAD)


def mapped(row: RawRow, source: Source, stages: tuple[str, ...] = OLD_STAGES) -> MappedRow:
    rules = Rules(stages={stage: stage for stage in stages}, placeholder_domain=PLACEHOLDER_DOMAIN)
    (result,) = map_rows(source, [row], rules)
    return result


def draft_of(row: ProfileRow | LeadRow, source: Source) -> ContactDraft:
    result = mapped(row, source)
    assert result.draft is not None
    return result.draft


def rejection(row: ProfileRow | LeadRow, source: Source) -> Reason | None:
    result = mapped(row, source)
    assert (result.draft is None) == (result.rejection is not None)
    return result.rejection


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_row_becomes_what_the_examples_say(example: rule_examples.Example) -> None:
    result = mapped(row_of(example.row), Source(example.source), example.stages)
    assert (result.draft is None) == (result.rejection is not None)
    if result.draft is None:
        assert result.rejection == example.expected
        return
    made = {field.column: getattr(result.draft, field.attname) for field in CRMContact._meta.concrete_fields}
    assert isinstance(example.expected, dict), made
    assert {column: made[column] for column in example.expected} == {
        column: printed(value) for column, value in example.expected.items()
    }
    validate_email(result.draft.email)


@pytest.mark.parametrize("role", ["SUPER_ADMIN", "super admin", "TAX_PREPARER"])
def test_a_role_that_is_not_the_sources_is_an_error_and_never_a_client(role: str) -> None:
    assert rejection(PROFILE._replace(role=role), Source.CLIENTS) is Reason.UNKNOWN_ROLE


def test_profiles_whose_ids_differ_only_in_case_get_a_placeholder_each() -> None:
    ids = ("profile1", "Profile1", "PROFILE1", "profile1é", "profile1É", "profile 1")
    rows = [PROFILE._replace(id=identifier, email=None) for identifier in ids]
    emails = [draft_of(row, Source.CLIENTS).email for row in rows]
    assert emails[0] == "client-profile1@nobody.invalid"
    assert len(set(emails)) == len(ids)
    assert [email.lower() for email in emails] == emails


def test_an_empty_clerk_id_is_nothing() -> None:
    assert draft_of(PROFILE._replace(clerk_user_id=""), Source.CLIENTS).clerk_user_id is None


def test_a_preparer_without_a_profile_is_not_copied_and_comes_before_the_referrer() -> None:
    result = mapped(LEAD._replace(raw_assigned_preparer_id="gone", referring_preparer_id="p"), Source.ACTIVE_LEADS)
    assert result.draft is not None
    assert (result.draft.assigned_preparer_id, result.draft.assigned_at) == (None, None)
    assert result.assigned_by is AssignedBy.UNRESOLVED


def test_a_client_whose_preparer_was_assigned_at_no_moment_is_an_error() -> None:
    row = PROFILE._replace(raw_assigned_preparer_id="p", assigned_preparer_id="p", assigned_at="infinity")
    assert rejection(row, Source.CLIENTS) is Reason.INVALID_VALUE
    assert rejection(row._replace(role="AFFILIATE"), Source.AFFILIATES) is None


def test_what_the_ledger_knew_of_a_row_stays_with_it() -> None:
    row = mapped(LEAD._replace(known_reason="conflict"), Source.ACTIVE_LEADS)
    assert (row.source_id, row.updated_at, row.known_reason) == ("lead1", LEAD.updated_at, "conflict")


def test_a_lead_keeps_its_contacts_id_when_it_converts() -> None:
    converted = LEAD._replace(status="CONVERTED")
    assert draft_of(LEAD, Source.ACTIVE_LEADS).id == draft_of(converted, Source.CONVERTED_LEADS).id


def test_the_fields_of_a_draft_are_those_of_the_model_in_its_order() -> None:
    assert ContactDraft._fields == tuple(field.attname for field in CRMContact._meta.concrete_fields)


# Emails


@pytest.mark.parametrize(("raw", "email"), EMAILS)
def test_an_email_is_trimmed_lower_cased_and_checked(raw: str, email: str | None) -> None:
    assert normalised_email(raw) == email


# At the edges of what an address may be: dots and hyphens in every place, labels of 63 letters and more, 320 in all.
NAMES = st.text("ab0.+_-'AB!#$%&*/=?^`{|}~", max_size=6) | st.sampled_from(["a" * 64, "a" * 65, "a" * 254])
HOST_LABELS = st.text("ab0-", max_size=4) | st.sampled_from(["a" * 63, "a" * 64, "com", "c", "xn--a", "_a", "büro"])
EMAIL_LIKE = st.one_of(
    TEXT,
    st.builds("{}@{}".format, TEXT, TEXT),
    st.builds("{}@{}".format, NAMES, st.lists(HOST_LABELS, max_size=6).map(".".join)),
    st.builds("{}@example.com".format, NAMES),
    st.builds(" {}@Example.COM\n".format, NAMES),
    st.builds(
        "{}@example.com".format,
        st.text("aä\N{KELVIN SIGN}k\N{LATIN SMALL LETTER LONG S}\N{LATIN SMALL LETTER DOTLESS I}.+'\"@ \\", max_size=6),
    ),
)


@settings(max_examples=examples(100))
@given(EMAIL_LIKE)
def test_an_address_is_one_exactly_when_django_says_so_and_its_name_is_ascii(raw: str) -> None:
    candidate = raw.strip().lower()
    try:
        validate_email(candidate)
        valid = raw.strip().rpartition("@")[0].isascii()
    except ValidationError:
        valid = False
    assert normalised_email(raw) == (candidate if valid else None)


@given(EMAIL_LIKE)
def test_an_address_stays_the_same_address(raw: str) -> None:
    email = normalised_email(raw)
    if email is not None:
        assert normalised_email(email) == normalised_email(f" {email}\t") == email
    if email is not None and email.isascii():
        assert normalised_email(email.upper()) == email


# Labels and trimming


@pytest.mark.parametrize("spelling", SUPER_ADMIN)
def test_labels_are_compared_without_their_spelling(spelling: str) -> None:
    assert normalised(spelling) == "SUPER_ADMIN"


@given(TEXT)
def test_trimmed_text_has_nothing_around_it_and_is_never_empty(text: str) -> None:
    result = trimmed(text)
    assert result is None if not text.strip() else result == text.strip()
    assert trimmed(None) is None


# Ids


@given(st.sampled_from(["profiles", "leads", "tax_intake_leads", "users"]), TEXT)
def test_a_contacts_id_is_shaped_like_a_cuid(table: str, source_id: str) -> None:
    assert re.fullmatch(r"c[0-9a-f]{24}", contact_id(table, source_id))


@pytest.mark.parametrize(("row", "identifier"), CONTACT_IDS.items())
def test_a_contacts_id_is_the_same_for_ever(row: tuple[str, str], identifier: str) -> None:
    assert contact_id(*row) == identifier

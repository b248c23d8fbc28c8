"""From a source row to a contact, rule by rule."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from hypothesis import given, settings
from hypothesis import strategies as st

from crm.models import CRMContact
from crm.outcome import Reason, Source
from crm.rules.mapping import (
    ContactDraft,
    MappedRow,
    Rules,
    contact_id,
    map_rows,
    normalised,
    normalised_email,
    trimmed,
)
from crm.rules.source_rows import LeadRow, ProfileRow
from tests.support.profiles import examples

OLD_STAGES = ("NEW", "CONTACTED", "DOCUMENTS", "PREPARING", "COMPLETE")
NEW_STAGES = ("NEW", "CONTACTED", "QUALIFIED", "DOCUMENTS", "FILED", "CLOSED", "LOST")
CREATED, UPDATED, CALLED, LOCKED = (f"2025-01-0{day} 00:00:00.123" for day in range(1, 5))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))

PROFILE = ProfileRow(
    id="profile1",
    created_at=CREATED,
    updated_at=UPDATED,
    known_reason=None,
    role="CLIENT",
    first_name="Ann",
    last_name="Lee",
    phone="555 0100",
    company_name="Lee & Co",
    user_id="user1",
    clerk_user_id="user_clerk1",
    email="ann@example.com",
)
LEAD = LeadRow(
    id="lead1",
    created_at=CREATED,
    updated_at=UPDATED,
    known_reason=None,
    status="NEW",
    type="CUSTOMER",
    email="ann@example.com",
    first_name="Ann",
    last_name="Lee",
    phone="555 0100",
    source="landing",
    last_contacted_at=None,
    referrer_username="ref",
    referrer_type="AFFILIATE",
    commission_rate="12.50",
    commission_rate_locked_at=LOCKED,
    attribution_method="cookie",
    attribution_confidence=85,
    raw_assigned_preparer_id=None,
    assigned_preparer_id=None,
)


def rules(stages: tuple[str, ...] = OLD_STAGES) -> Rules:
    return Rules(stages={stage: stage for stage in stages}, placeholder_domain="nobody.invalid")


def mapped(row: ProfileRow | LeadRow, source: Source, stages: tuple[str, ...] = OLD_STAGES) -> MappedRow:
    (result,) = map_rows(source, [row], rules(stages))
    return result


def contact_of_profile(source: Source = Source.CLIENTS, **changes: Any) -> ContactDraft:
    result = mapped(PROFILE._replace(**changes), source)
    assert result.draft is not None
    return result.draft


def contact_of_lead(
    source: Source = Source.ACTIVE_LEADS, stages: tuple[str, ...] = OLD_STAGES, **changes: Any
) -> ContactDraft:
    result = mapped(LEAD._replace(**changes), source, stages)
    assert result.draft is not None
    return result.draft


def rejection(row: ProfileRow | LeadRow, source: Source) -> Reason | None:
    result = mapped(row, source)
    assert (result.draft is None) == (result.rejection is not None)
    return result.rejection


# Profiles


@pytest.mark.parametrize(
    ("role", "source", "contact_type"),
    [
        ("CLIENT", Source.CLIENTS, "CLIENT"),
        ("TAX_PREPARER", Source.PREPARERS, "PREPARER"),
        ("AFFILIATE", Source.AFFILIATES, "AFFILIATE"),
        ("tax_preparer", Source.PREPARERS, "PREPARER"),
        ("Tax-Preparer", Source.PREPARERS, "PREPARER"),
        ("tax preparer", Source.PREPARERS, "PREPARER"),
    ],
)
def test_a_profiles_role_gives_the_type_whatever_its_spelling(role: str, source: Source, contact_type: str) -> None:
    assert contact_of_profile(source, role=role).contact_type == contact_type


@pytest.mark.parametrize("role", ["PARTNER", "SUPER_ADMIN", "super admin", "TAX_PREPARER", ""])
def test_a_role_that_is_not_the_sources_is_an_error_and_never_a_client(role: str) -> None:
    assert rejection(PROFILE._replace(role=role), Source.CLIENTS) is Reason.UNKNOWN_ROLE


def test_a_profile_brings_what_it_has_and_nothing_else() -> None:
    assert contact_of_profile() == ContactDraft(
        id=contact_id("profiles", "profile1"),
        user_id="user1",
        clerk_user_id="user_clerk1",
        contact_type="CLIENT",
        first_name="Ann",
        last_name="Lee",
        email="ann@example.com",
        phone="555 0100",
        company="Lee & Co",
        stage="NEW",
        stage_entered_at=CREATED,
        source="backfill",
        assigned_preparer_id=None,
        assigned_at=None,
        referrer_username=None,
        referrer_type=None,
        commission_rate=None,
        commission_rate_locked_at=None,
        attribution_method=None,
        attribution_confidence=100,
        created_at=CREATED,
        updated_at=UPDATED,
        last_contacted_at=None,
    )


@pytest.mark.parametrize("email", [None, "", " \t\n", "\N{NO-BREAK SPACE}"])
@pytest.mark.parametrize(
    ("role", "source", "kind"),
    [
        ("CLIENT", Source.CLIENTS, "client"),
        ("TAX_PREPARER", Source.PREPARERS, "preparer"),
        ("AFFILIATE", Source.AFFILIATES, "affiliate"),
    ],
)
def test_a_profile_without_an_email_gets_a_placeholder(role: str, source: Source, kind: str, email: str | None) -> None:
    draft = contact_of_profile(source, role=role, email=email)
    assert draft.email == f"{kind}-profile1@nobody.invalid"
    validate_email(draft.email)


def test_profiles_whose_ids_differ_only_in_case_get_a_placeholder_each() -> None:
    ids = ("profile1", "Profile1", "PROFILE1", "profile1é", "profile1É", "profile 1")
    emails = [contact_of_profile(id=identifier, email=None).email for identifier in ids]
    assert emails[0] == "client-profile1@nobody.invalid"
    assert len(set(emails)) == len(ids)
    assert [email.lower() for email in emails] == emails


def test_a_profile_whose_email_is_none_is_an_error_and_gets_no_placeholder() -> None:
    assert rejection(PROFILE._replace(email="not-an-email"), Source.CLIENTS) is Reason.INVALID_EMAIL


def test_of_a_profile_the_role_is_checked_before_the_email() -> None:
    assert rejection(PROFILE._replace(role="PARTNER", email="nope"), Source.CLIENTS) is Reason.UNKNOWN_ROLE


@pytest.mark.parametrize("blank", [None, "", "  ", "\t\N{NO-BREAK SPACE}\n"])
def test_blank_names_are_unknown_and_other_blanks_are_nothing(blank: str | None) -> None:
    draft = contact_of_profile(first_name=blank, last_name=blank, phone=blank, company_name=blank)
    assert (draft.first_name, draft.last_name, draft.phone, draft.company) == ("Unknown", "Unknown", None, None)


def test_names_phones_and_companies_are_trimmed() -> None:
    draft = contact_of_profile(first_name=" José\t", last_name="\nde  la Cruz ", phone=" 1 ", company_name=" A B ")
    assert (draft.first_name, draft.last_name, draft.phone, draft.company) == ("José", "de  la Cruz", "1", "A B")


@pytest.mark.parametrize("clerk_user_id", [None, ""])
def test_no_clerk_id_is_nothing(clerk_user_id: str | None) -> None:
    assert contact_of_profile(clerk_user_id=clerk_user_id).clerk_user_id is None


# Leads


@pytest.mark.parametrize(
    ("status", "stages", "stage"),
    [
        ("NEW", OLD_STAGES, "NEW"),
        ("CONTACTED", OLD_STAGES, "CONTACTED"),
        ("QUALIFIED", OLD_STAGES, "CONTACTED"),
        ("QUALIFIED", NEW_STAGES, "QUALIFIED"),
        ("CONVERTED", OLD_STAGES, "COMPLETE"),
        ("CONVERTED", NEW_STAGES, "CLOSED"),
        ("CONVERTED", (*NEW_STAGES, "COMPLETE"), "COMPLETE"),
        ("DISQUALIFIED", NEW_STAGES, "LOST"),
        ("qualified", NEW_STAGES, "QUALIFIED"),
    ],
)
def test_a_leads_status_gives_the_stage_that_this_database_has(
    status: str, stages: tuple[str, ...], stage: str
) -> None:
    source = Source.CONVERTED_LEADS if status == "CONVERTED" else Source.ACTIVE_LEADS
    assert contact_of_lead(source, stages, status=status).stage == stage


@pytest.mark.parametrize(
    ("lead_type", "contact_type"),
    [("CUSTOMER", "LEAD"), ("TAX_PREPARER", "PREPARER"), ("AFFILIATE", "AFFILIATE"), ("tax-preparer", "PREPARER")],
)
def test_an_active_leads_type_gives_the_contacts(lead_type: str, contact_type: str) -> None:
    assert contact_of_lead(type=lead_type).contact_type == contact_type


@pytest.mark.parametrize("lead_type", ["CUSTOMER", "TAX_PREPARER", "AFFILIATE", "FRANCHISE"])
def test_a_converted_lead_is_a_client_whatever_its_type(lead_type: str) -> None:
    assert contact_of_lead(Source.CONVERTED_LEADS, status="CONVERTED", type=lead_type).contact_type == "CLIENT"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "ARCHIVED"}, Reason.UNKNOWN_STATUS),
        ({"type": "FRANCHISE"}, Reason.UNKNOWN_TYPE),
        ({"email": "nope"}, Reason.INVALID_EMAIL),
        ({"email": ""}, Reason.INVALID_EMAIL),
        ({"status": "ARCHIVED", "type": "FRANCHISE", "email": "nope"}, Reason.UNKNOWN_STATUS),
        ({"type": "FRANCHISE", "email": "nope"}, Reason.UNKNOWN_TYPE),
    ],
)
def test_what_is_wrong_with_a_lead_is_told_in_this_order(changes: dict[str, Any], reason: Reason) -> None:
    assert rejection(LEAD._replace(**changes), Source.ACTIVE_LEADS) is reason


@pytest.mark.parametrize(
    ("status", "stages", "called", "entered"),
    [
        ("NEW", OLD_STAGES, None, CREATED),
        ("NEW", OLD_STAGES, CALLED, CREATED),
        ("CONTACTED", OLD_STAGES, CALLED, CALLED),
        ("CONTACTED", OLD_STAGES, None, UPDATED),
        ("QUALIFIED", OLD_STAGES, CALLED, CALLED),
        ("QUALIFIED", NEW_STAGES, CALLED, UPDATED),
        ("CONVERTED", OLD_STAGES, CALLED, UPDATED),
        ("DISQUALIFIED", NEW_STAGES, CALLED, UPDATED),
    ],
)
def test_a_stage_was_entered_at_the_closest_recorded_truth(
    status: str, stages: tuple[str, ...], called: str | None, entered: str
) -> None:
    source = Source.CONVERTED_LEADS if status == "CONVERTED" else Source.ACTIVE_LEADS
    assert contact_of_lead(source, stages, status=status, last_contacted_at=called).stage_entered_at == entered


def test_all_six_fields_of_an_attribution_are_carried_over_as_they_are() -> None:
    draft = contact_of_lead(referrer_username=" Ref ", attribution_method="")
    assert (
        draft.referrer_username,
        draft.referrer_type,
        draft.commission_rate,
        draft.commission_rate_locked_at,
        draft.attribution_method,
        draft.attribution_confidence,
    ) == (" Ref ", "AFFILIATE", "12.50", LOCKED, "", 85)


def test_a_rate_is_the_text_that_the_database_printed_and_never_a_float() -> None:
    assert contact_of_lead(commission_rate="100.10").commission_rate == "100.10"


@pytest.mark.parametrize(
    ("raw", "source"),
    [("landing", "landing"), (" a b ", "a b"), (None, "lead_form"), ("", "lead_form"), (" ", "lead_form")],
)
def test_a_lead_keeps_its_source(raw: str | None, source: str) -> None:
    result = mapped(LEAD._replace(source=raw), Source.ACTIVE_LEADS)
    assert result.draft is not None
    assert result.draft.source == source


@pytest.mark.parametrize(
    ("preparer", "assigned"),
    [("profile9", ("profile9", UPDATED)), (None, (None, None)), ("", (None, None)), (" \t", (None, None))],
)
def test_an_assignment_dates_from_the_leads_last_change(
    preparer: str | None, assigned: tuple[str | None, str | None]
) -> None:
    draft = contact_of_lead(assigned_preparer_id=preparer)
    assert (draft.assigned_preparer_id, draft.assigned_at) == assigned


def test_a_lead_has_no_account_and_no_company_and_keeps_its_dates() -> None:
    draft = contact_of_lead(last_contacted_at=CALLED)
    assert (draft.user_id, draft.clerk_user_id, draft.company) == (None, None, None)
    assert (draft.created_at, draft.updated_at, draft.last_contacted_at) == (CREATED, UPDATED, CALLED)


def test_what_the_ledger_knew_of_a_row_stays_with_it() -> None:
    row = mapped(LEAD._replace(known_reason="conflict"), Source.ACTIVE_LEADS)
    assert (row.source_id, row.updated_at, row.known_reason) == ("lead1", UPDATED, "conflict")


def test_a_lead_keeps_its_contacts_id_when_it_converts() -> None:
    assert contact_of_lead().id == contact_of_lead(Source.CONVERTED_LEADS, status="CONVERTED").id


def test_the_fields_of_a_draft_are_those_of_the_model_in_its_order() -> None:
    assert ContactDraft._fields == tuple(field.attname for field in CRMContact._meta.concrete_fields)


# Emails


@pytest.mark.parametrize(
    ("raw", "email"),
    [
        ("ann@example.com", "ann@example.com"),
        (" Ann@Example.COM\n", "ann@example.com"),
        ("\N{NO-BREAK SPACE}ann@example.com\t", "ann@example.com"),
        ("bob.o'neil+tax@example.org", "bob.o'neil+tax@example.org"),
        ("max@BÜRO.example", "max@büro.example"),
        ("root@localhost", "root@localhost"),
        ("jösé@example.com", None),
        ("\N{KELVIN SIGN}arl@example.com", None),
        ("\N{LATIN SMALL LETTER LONG S}am@example.com", None),
        ("ann@@example.com", None),
        ("a..b@example.com", None),
        (".ab@example.com", None),
        ("ab.@example.com", None),
        ("ab@example..com", None),
        ("ab@-example.com", None),
        ("ab@example-.com", None),
        ("ab@example.c", None),
        ("ab@example.com.", None),
        ("ab@ex_ample.com", None),
        ("ab@" + "e" * 63 + ".com", "ab@" + "e" * 63 + ".com"),
        ("ab@" + "e" * 64 + ".com", None),
        ("a" * 300 + "@example.com", "a" * 300 + "@example.com"),
        ("a" * 309 + "@example.com", None),
        ("ann", None),
        ("@example.com", None),
        ("ann@", None),
        ("a b@example.com", None),
        ("ann@example.com, bob@example.com", None),
        ("", None),
        (" ", None),
    ],
)
def test_an_email_is_trimmed_lower_cased_and_checked(raw: str, email: str | None) -> None:
    assert normalised_email(raw) == email


# At the edges of what an address may be: dots and hyphens in every place, labels of 63 letters and more, 320 in all.
NAMES = st.text("ab0.+_-'", max_size=6) | st.sampled_from(["a" * 64, "a" * 65, "a" * 254])
HOST_LABELS = st.text("ab0-", max_size=4) | st.sampled_from(["a" * 63, "a" * 64, "com", "c", "xn--a", "_a", "büro"])
EMAIL_LIKE = st.one_of(
    TEXT,
    st.emails(),
    st.emails().map(str.upper),
    st.emails().map(" {}\n".format),
    st.builds("{}@{}".format, TEXT, TEXT),
    st.builds("{}@{}".format, NAMES, st.lists(HOST_LABELS, max_size=6).map(".".join)),
    st.builds("{}@example.com".format, NAMES),
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


@pytest.mark.parametrize("spelling", ["SUPER_ADMIN", "super_admin", "Super-Admin", "super admin", "sUPER aDMIN"])
def test_labels_are_compared_without_their_spelling(spelling: str) -> None:
    assert normalised(spelling) == "SUPER_ADMIN"


@given(TEXT)
def test_trimmed_text_has_nothing_around_it_and_is_never_empty(text: str) -> None:
    result = trimmed(text)
    assert result is None if not text.strip() else result == text.strip()
    assert trimmed(None) is None


# Ids


@given(st.sampled_from(["profiles", "leads"]), TEXT)
def test_a_contacts_id_is_shaped_like_a_cuid(table: str, source_id: str) -> None:
    assert re.fullmatch(r"c[0-9a-f]{24}", contact_id(table, source_id))


def test_a_contacts_id_is_the_same_for_ever() -> None:
    assert contact_id("leads", "1") == "c591960b957b66547385f92a3"
    assert contact_id("profiles", "1") != contact_id("leads", "1")

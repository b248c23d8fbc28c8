"""What happens to each row, decided without a database: the keys of a person, conflicts, and what a merge fills."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crm.outcome import Outcome, Reason, RowOutcome
from crm.rules.mapping import ContactDraft, MappedRow, contact_id
from crm.rules.matching import (
    COMMISSION_UNIT,
    PROFILE_FILLS,
    ExistingContact,
    ExistingContacts,
    MatchPlan,
    fill,
    match_batch,
)

CREATED, UPDATED, CALLED, LOCKED = (f"2025-01-0{day} 00:00:00.123" for day in range(1, 5))
ATTRIBUTED: dict[str, Any] = {
    "referrer_username": "ref",
    "referrer_type": "AFFILIATE",
    "commission_rate": "12.50",
    "commission_rate_locked_at": LOCKED,
    "attribution_method": "cookie",
    "attribution_confidence": 85,
}
BARE = ContactDraft(
    id="",
    user_id=None,
    clerk_user_id=None,
    contact_type="LEAD",
    first_name="Ann",
    last_name="Lee",
    email="ann@example.com",
    phone=None,
    company=None,
    stage="NEW",
    stage_entered_at=CREATED,
    source="lead_form",
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


def row(source_id: str = "1", *, table: str = "profiles", **fields: Any) -> MappedRow:
    identifier = contact_id(table, source_id)
    draft = BARE._replace(id=identifier, **fields)
    return MappedRow(identifier, source_id, UPDATED, None, draft.email, draft, None)


def rejected(source_id: str, reason: Reason) -> MappedRow:
    return MappedRow(contact_id("leads", source_id), source_id, UPDATED, None, None, None, reason)


def contact(identifier: str, email: str = "other@example.com", **fields: Any) -> ExistingContact:
    fields = {"user_id": None, "clerk_user_id": None, "ours": False} | fields
    return ExistingContact(identifier, email, **fields)


def decided(rows: list[MappedRow], *known: ExistingContact) -> MatchPlan:
    return match_batch(rows, ExistingContacts(known))


def only(mapped: MappedRow, *known: ExistingContact) -> RowOutcome:
    (each,) = decided([mapped], *known).row_outcomes
    return each


def told(each: RowOutcome) -> tuple[Outcome, Reason | None, str | None]:
    return each.outcome, each.reason, each.contact_id


# Identity


def test_who_meets_nobody_makes_a_contact() -> None:
    mapped = row(user_id="u", clerk_user_id="k")
    plan = decided([mapped], contact("a", user_id="x", clerk_user_id="y"))
    assert plan.creates == [mapped.draft]
    assert told(plan.row_outcomes[0]) == (Outcome.CREATED, None, mapped.id)


@pytest.mark.parametrize(
    "known",
    [
        contact("a", user_id="u"),
        contact("a", clerk_user_id="k"),
        contact("a", "ann@example.com"),
        contact("a", "ANN@Example.com"),
        contact("a", " ann@example.com\t"),
        contact("a", user_id="u", clerk_user_id="k"),
        contact("a", "Ann@example.com", user_id="u", clerk_user_id="k"),
        contact("a", "ann@example.com", user_id="u"),
    ],
)
def test_any_key_alone_or_all_of_them_together_find_the_contact(known: ExistingContact) -> None:
    each = only(row(user_id="u", clerk_user_id="k"), known)
    assert told(each) == (Outcome.EXISTS, None, "a")


@pytest.mark.parametrize(
    ("known", "named", "keys"),
    [
        ([contact("a", user_id="u"), contact("b", clerk_user_id="k")], "a", (None, "a", "b")),
        ([contact("a", user_id="u"), contact("b", "ann@example.com")], "b", ("b", "a", None)),
        ([contact("a", clerk_user_id="k"), contact("b", "ANN@example.com")], "b", ("b", None, "a")),
        ([contact("a", user_id="u", clerk_user_id="k"), contact("b", "ann@example.com")], "b", ("b", "a", "a")),
        (
            [contact("a", user_id="u"), contact("b", clerk_user_id="k"), contact("c", "ann@example.com")],
            "a",
            ("c", "a", "b"),
        ),
        ([contact("a", "ann@example.com", user_id="x")], "a", ("a", None, None)),
        ([contact("a", "ann@example.com", clerk_user_id="x")], "a", ("a", None, None)),
        ([contact("a", "Ann@example.com", user_id="u", clerk_user_id="x")], "a", ("a", "a", None)),
    ],
)
def test_keys_that_disagree_are_a_conflict_that_says_where_each_key_leads(
    known: list[ExistingContact], named: str, keys: tuple[str | None, ...]
) -> None:
    each = only(row(user_id="u", clerk_user_id="k"), *known)
    assert told(each) == (Outcome.ERROR, Reason.CONFLICT, named)
    assert each.identity_keys == dict(zip(("email", "userId", "clerkUserId"), keys, strict=True))


def test_of_several_spellings_a_conflict_names_the_one_to_which_another_key_leads() -> None:
    known = [contact("a", "ann@example.com"), contact("b", "Ann@example.com", user_id="u", clerk_user_id="x")]
    assert only(row(user_id="u", clerk_user_id="k"), *known).identity_keys == {
        "email": "b",
        "userId": "b",
        "clerkUserId": None,
    }


def test_a_conflict_names_the_row_s_own_contact_where_there_is_one() -> None:
    mapped = row(user_id="u")
    known = [contact(mapped.id, "moved@example.com"), contact("a", "ann@example.com", user_id="x")]
    each = only(mapped, *known)
    assert each.contact_id == "a"
    assert each.identity_keys == {"email": "a", "userId": None, "id": mapped.id}


def test_only_a_row_that_a_person_must_decide_on_says_where_its_keys_lead() -> None:
    plan = decided([row(), row("2", email="b@example.com"), rejected("3", Reason.INVALID_EMAIL)], contact("a"))
    assert [each.identity_keys for each in plan.row_outcomes] == [None, None, None]


def test_two_contacts_without_any_key_are_not_one_another() -> None:
    assert only(row(email="new@example.com"), contact("a"), contact("b")).outcome is Outcome.CREATED


def test_a_profile_without_keys_meets_an_account_by_email_without_conflict() -> None:
    assert told(only(row(), contact("a", "ann@example.com", user_id="x"))) == (Outcome.EXISTS, None, "a")


def test_of_several_spellings_the_lower_case_one_comes_first_then_the_oldest() -> None:
    spellings = [contact("a", "Ann@example.com"), contact("b", "ANN@example.com")]
    assert only(row(), *spellings).contact_id == "a"
    assert only(row(), *spellings, contact("c", "ann@example.com")).contact_id == "c"


def test_whose_email_was_changed_in_the_crm_still_has_one_contact() -> None:
    own = contact(contact_id("leads", "1"), "renamed@example.com")
    assert told(only(row("1", table="leads"), own)) == (Outcome.MERGED, None, own.id)


def test_a_contact_of_ours_is_merged_and_anybody_elses_left_alone() -> None:
    fields = {"phone": "1", "company": "Co", "user_id": "u"}
    theirs = decided([row(**fields)], contact("a", "ann@example.com"))
    assert (theirs.row_outcomes[0].outcome, theirs.fills, theirs.row_outcomes[0].filled) == (Outcome.EXISTS, {}, ())
    ours = decided([row(**fields)], contact("a", "ann@example.com", ours=True))
    assert ours.row_outcomes[0].outcome is Outcome.MERGED
    assert ours.fills == {"a": fields}
    assert ours.row_outcomes[0].filled == ("user_id", "phone", "company")


# Within a batch


def test_rows_of_one_person_in_one_batch_make_one_contact_with_what_each_brings() -> None:
    lead = row("1", table="leads", **ATTRIBUTED)
    profile = row("2", user_id="u", phone="1")
    plan = decided([lead, profile, row("3", table="leads", phone="2", last_contacted_at=CALLED)])
    assert [each.outcome for each in plan.row_outcomes] == [
        Outcome.CREATED,
        Outcome.MERGED,
        Outcome.MERGED,
    ]
    assert {each.contact_id for each in plan.row_outcomes} == {lead.id}
    assert lead.draft is not None
    assert plan.creates == [lead.draft._replace(user_id="u", phone="1", last_contacted_at=CALLED)]
    assert plan.fills == {}, "what is not there yet is created whole"


def test_an_account_that_an_earlier_row_brought_counts_for_the_later_ones() -> None:
    plan = decided([row("1", table="leads"), row("2", user_id="u"), row("3", user_id="other")])
    assert [each.outcome for each in plan.row_outcomes] == [
        Outcome.CREATED,
        Outcome.MERGED,
        Outcome.ERROR,
    ]
    assert plan.row_outcomes[2].contact_id == plan.row_outcomes[0].contact_id


def test_a_rejected_row_takes_no_key() -> None:
    plan = decided([rejected("1", Reason.INVALID_EMAIL), row("2")])
    assert [told(each)[:2] for each in plan.row_outcomes] == [
        (Outcome.ERROR, Reason.INVALID_EMAIL),
        (Outcome.CREATED, None),
    ]


# Fills


def test_an_attribution_is_filled_whole_or_not_at_all() -> None:
    draft = BARE._replace(**ATTRIBUTED)
    empty = contact("a", ours=True)
    assert fill(empty, draft) == ("attribution",)
    assert empty.fills == ATTRIBUTED
    others = dict(ATTRIBUTED, referrer_username="other")
    assert fill(contact("a", ours=True, attribution=tuple(others.values())), draft) == ()


DIRECT: dict[str, Any] = {
    "referrer_username": None,
    "referrer_type": None,
    "commission_rate": "0.00",
    "commission_rate_locked_at": None,
    "attribution_method": "direct",
    "attribution_confidence": 100,
}


@pytest.mark.parametrize("nobody", [None, "", " ", "\N{NO-BREAK SPACE}"])
def test_whom_nobody_referred_has_no_attribution_whatever_is_written_down(nobody: str | None) -> None:
    direct = DIRECT | {"referrer_username": nobody}
    referred = contact("a", ours=True, attribution=tuple(direct.values()))
    assert fill(referred, BARE._replace(**ATTRIBUTED)) == ("attribution",)
    assert referred.fills == ATTRIBUTED
    assert fill(contact("a", ours=True), BARE._replace(**direct)) == ()


@pytest.mark.parametrize("username", ["ref", " REF "])
def test_the_same_referrers_rate_completes_an_attribution_that_has_none(username: str) -> None:
    known = contact("a", ours=True, attribution=tuple((ATTRIBUTED | {"commission_rate": None}).values()))
    draft = BARE._replace(**(ATTRIBUTED | {"referrer_username": username, "attribution_method": "other"}))
    assert fill(known, draft) == ("commission",)
    assert known.fills == {name: ATTRIBUTED[name] for name in ("referrer_username", *COMMISSION_UNIT)}
    assert fill(known, draft._replace(commission_rate="9.00")) == ()


def test_another_referrers_rate_completes_nothing() -> None:
    known = contact("a", ours=True, attribution=tuple((ATTRIBUTED | {"commission_rate": None}).values()))
    assert fill(known, BARE._replace(**(ATTRIBUTED | {"referrer_username": "other"}))) == ()


def test_a_merge_says_what_it_replaced_of_an_attribution() -> None:
    lead = row("1", table="leads", **ATTRIBUTED)
    there = contact("a", ours=True, email=lead.draft.email if lead.draft else "", attribution=tuple(DIRECT.values()))
    (outcome,) = decided([lead], there).row_outcomes
    assert (outcome.filled, outcome.attribution_before) == (("attribution",), DIRECT)


def test_a_confidence_alone_is_no_attribution() -> None:
    assert fill(contact("a", ours=True), BARE._replace(attribution_confidence=7)) == ()


def test_an_assignment_comes_with_its_date() -> None:
    draft = BARE._replace(assigned_preparer_id="p", assigned_at=UPDATED)
    known = contact("a", ours=True)
    assert fill(known, draft) == ("assignment",)
    assert known.fills == {"assigned_preparer_id": "p", "assigned_at": UPDATED}
    assert fill(contact("a", ours=True, has_assignment=True), draft) == ()


FILLABLE = (*PROFILE_FILLS, "last_contacted_at")
values = st.none() | st.sampled_from(["x", "y", ""])


@given(st.fixed_dictionaries(dict.fromkeys(FILLABLE, values)), st.fixed_dictionaries(dict.fromkeys(FILLABLE, values)))
def test_a_merge_fills_what_is_null_and_never_what_is_there(there: dict[str, Any], brought: dict[str, Any]) -> None:
    known = contact("a", ours=True, **there)
    filled = fill(known, BARE._replace(**brought))
    expected = {name: brought[name] for name in FILLABLE if there[name] is None and brought[name] is not None}
    assert known.fills == expected
    assert filled == tuple(expected)


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(FILLABLE, values)), max_size=4))
def test_the_first_who_brings_a_value_wins(drafts: list[dict[str, Any]]) -> None:
    known = contact("a", ours=True)
    for draft in drafts:
        fill(known, BARE._replace(**draft))
    for name in FILLABLE:
        brought = [draft[name] for draft in drafts if draft[name] is not None]
        assert known.fills.get(name) == (brought[0] if brought else None)


# Whatever comes

emails = st.sampled_from(["ann@example.com", "bob@example.com"])
accounts = st.none() | st.sampled_from(["u", "v"])
people = st.lists(
    st.tuples(emails, accounts, accounts) | st.sampled_from([Reason.INVALID_EMAIL, Reason.UNKNOWN_TYPE]), max_size=7
)


@given(people, st.lists(st.tuples(emails.map(str.title) | emails, accounts, accounts, st.booleans()), max_size=3))
def test_every_row_gets_one_decision_and_no_key_is_taken_twice(people: list[Any], there: list[Any]) -> None:
    rows = [
        rejected(str(number), person)
        if isinstance(person, Reason)
        else row(str(number), email=person[0], user_id=person[1], clerk_user_id=person[2])
        for number, person in enumerate(people)
    ]
    known = [
        contact(f"k{number}", email, user_id=user, clerk_user_id=clerk, ours=ours)
        for number, (email, user, clerk, ours) in enumerate(there)
    ]
    plan = decided(rows, *known)
    assert [each.id for each in plan.row_outcomes] == [mapped.id for mapped in rows]
    created = [each.contact_id for each in plan.row_outcomes if each.outcome is Outcome.CREATED]
    assert created == [draft.id for draft in plan.creates]
    for key in ("id", "email", "user_id"):
        taken = [value for draft in plan.creates if (value := getattr(draft, key)) is not None]
        assert len(taken) == len(set(taken))
    assert plan.fills.keys() <= {one.id for one in known if one.ours}
    assert all((each.reason is None) == (each.outcome is not Outcome.ERROR) for each in plan.row_outcomes)

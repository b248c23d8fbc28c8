"""What a contact is by its rows: the first makes it, the others fill it unit by unit, the furthest stage counts."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from crm.rules.fold import FILLED_UNITS, UNITS_OF_FIRST, fold
from crm.rules.mapping import ContactDraft, MappedRow, Rules, referrer
from crm.rules.matching import ExistingContacts, match_batch

STAGES = ("NEW", "CONTACTED", "QUALIFIED", "COMPLETE")
RULES = Rules(dict(zip(STAGES, STAGES, strict=True)), "example.invalid")
_PROFILES_OWN = ("user_id", "clerk_user_id", "company")
_TEXT = st.none() | st.sampled_from(("one", "two"))


@st.composite
def drafts(draw: st.DrawFn, number: int) -> ContactDraft:
    """A draft of one person, of a profile or of a lead."""
    is_profile = draw(st.booleans())
    preparer = None if is_profile else draw(_TEXT)
    attribution: dict[str, Any] = {
        name: None if is_profile else draw(_TEXT)
        for name in FILLED_UNITS["attribution"]
        if name != "attribution_confidence"
    }
    return ContactDraft(
        **{name: "account" if is_profile and draw(st.booleans()) else None for name in _PROFILES_OWN},
        **attribution,
        id=f"c{number}",
        contact_type=draw(st.sampled_from(("CLIENT", "LEAD"))),
        first_name=f"first {number}",
        last_name=f"last {number}",
        email="ann@example.com",
        phone=draw(_TEXT),
        stage=draw(st.sampled_from(STAGES)),
        stage_entered_at=f"stage {number}",
        source=f"source {number}",
        assigned_preparer_id=preparer,
        assigned_at=f"assigned {number}" if preparer else None,
        attribution_confidence=100 if is_profile else number,
        created_at=f"created {number}",
        updated_at=f"updated {number}",
        last_contacted_at=None if is_profile else draw(_TEXT),
    )


@st.composite
def rows_of_one_person(draw: st.DrawFn) -> list[ContactDraft]:
    """Rows, and their order."""
    return [draw(drafts(number)) for number in range(draw(st.integers(1, 5)))]


@given(rows_of_one_person())
def test_a_contact_is_what_one_run_over_all_of_its_rows_makes(rows: list[ContactDraft]) -> None:
    mapped = [MappedRow(draft.id, draft.id, draft.updated_at, None, draft.email, draft, None) for draft in rows]
    (made,) = match_batch(mapped, ExistingContacts()).creates
    values = fold(rows, RULES).values
    assert values._replace(stage=made.stage, stage_entered_at=made.stage_entered_at) == made


@given(rows_of_one_person())
def test_the_stage_is_the_furthest_and_of_those_the_first(rows: list[ContactDraft]) -> None:
    folded = fold(rows, RULES)
    stages = [STAGES.index(draft.stage) for draft in rows]
    first = stages.index(max(stages))
    assert (folded.values.stage, folded.values.stage_entered_at) == (STAGES[max(stages)], f"stage {first}")
    assert folded.origins["stage"] == first


@given(rows_of_one_person())
def test_every_unit_comes_whole_from_the_row_that_is_named(rows: list[ContactDraft]) -> None:
    folded = fold(rows, RULES)
    for unit in (*FILLED_UNITS, *UNITS_OF_FIRST):
        fields = FILLED_UNITS.get(unit, (unit,))
        # A rate that completes nothing came with its attribution.
        named = "attribution" if unit == "commission" and unit not in folded.origins else unit
        origin = rows[folded.origins.get(named, 0)]
        if unit == "attribution" and "commission" in folded.origins:
            fields = tuple(name for name in fields if name not in FILLED_UNITS["commission"])
        assert [getattr(folded.values, name) for name in fields] == [getattr(origin, name) for name in fields]
        if unit == "commission":
            continue
        telling = ("referrer_username",) if unit == "attribution" else fields
        assert (unit in folded.origins) == any(getattr(folded.values, name) is not None for name in telling)


@given(rows_of_one_person())
def test_the_first_referrer_is_the_contacts_and_the_first_of_their_rates(rows: list[ContactDraft]) -> None:
    folded = fold(rows, RULES).values
    referred = [row for row in rows if referrer(row.referrer_username)]
    if referred:
        first = referrer(referred[0].referrer_username)
        theirs = [row for row in referred if referrer(row.referrer_username) == first]
        rates = [row.commission_rate for row in theirs if row.commission_rate is not None]
        assert (referrer(folded.referrer_username), folded.commission_rate) == (first, next(iter(rates), None))

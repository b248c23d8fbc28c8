"""What a repair makes of a contact, without a database."""

from __future__ import annotations

from typing import Any

import pytest

from crm.outcome import Repair, UpdateOutcome
from crm.repair.rules import (
    KeepCause,
    Profiles,
    RepairOutcome,
    decide,
    invented,
    is_placeholder_of,
    keep_conflicts,
    old_placeholder,
    placeholder_of,
    real_address,
    totals_by_repair,
)
from crm.rules.mapping import ContactDraft, Rules
from crm.rules.source_rows import ProfileRow

MOMENT, LATER = "2025-01-01 00:00:00", "2025-01-02 00:00:00"
RULES = Rules(stages={"NEW": "NEW", "CONTACTED": "CONTACTED"}, placeholder_domain="ours.invalid")


def profile(**fields: Any) -> ProfileRow:
    nothing: dict[str, Any] = dict.fromkeys(ProfileRow._fields)
    return ProfileRow(**nothing | {"id": "p1", "role": "CLIENT", "updated_at": MOMENT} | fields)


def contact(**fields: Any) -> ContactDraft:
    nothing: dict[str, Any] = dict.fromkeys(ContactDraft._fields)
    made = {"id": "c1", "email": "a@x.com", "contact_type": "CLIENT", "stage": "NEW", "source": "backfill"}
    return ContactDraft(**nothing | made | {"created_at": MOMENT, "updated_at": MOMENT} | fields)


def known(*rows: ProfileRow, invalid: tuple[str, ...] = ()) -> Profiles:
    profiles = Profiles(invalid=invalid)
    for row in rows:
        profiles.add(row)
    return profiles


def outcome(repair: Repair, of: ContactDraft, *rows: ProfileRow, invalid: tuple[str, ...] = ()) -> RepairOutcome:
    (found,) = decide([of], [repair], known(*rows, invalid=invalid), RULES)
    return found


def told(found: RepairOutcome) -> tuple[UpdateOutcome, KeepCause | None, str, str]:
    return found.outcome, found.cause, found.changed, found.value


UPDATED, KEPT, UNCHANGED = UpdateOutcome.UPDATED, UpdateOutcome.KEPT, UpdateOutcome.UNCHANGED


@pytest.mark.parametrize(
    ("email", "parts"),
    [
        ("client-abc@unknown.com", ("client", "abc")),
        ("Tax_Preparer-a-b-c@UNKNOWN.com", ("tax_preparer", "a-b-c")),
        ("client-@unknown.com", None),
        ("client-abc@unknown.com.example", None),
        ("client-abc@example.com", None),
        ("client-a@b@unknown.com", ("client", "a@b")),
        ("abc@unknown.com", None),
        (" client-abc@unknown.com", None),
        ("", None),
        (None, None),
    ],
)
def test_the_parts_of_an_invented_address(email: str | None, parts: tuple[str, str] | None) -> None:
    assert old_placeholder(email) == parts


def test_an_invented_address_is_looked_for_in_the_domains_that_are_asked_for() -> None:
    assert invented("client-abc@ours.invalid", "unknown.com", "ours.invalid") == ("client", "abc")
    assert invented("client-abc@ours.invalid", "unknown.com") is None


@pytest.mark.parametrize(
    ("preparer", "expected"),
    [
        ("p1", (UNCHANGED, None, "", "")),
        ("u1", (UPDATED, None, "assigned_preparer_id", "p1")),
        ("u2", (KEPT, KeepCause.AMBIGUOUS, "", "")),
        ("u4", (KEPT, KeepCause.INVALID_PROFILE, "", "")),
        ("broken", (UNCHANGED, None, "", "")),
        ("nobody", (KEPT, KeepCause.NO_PROFILE, "", "")),
    ],
)
def test_preparers(preparer: str, expected: tuple[Any, ...]) -> None:
    rows = [
        profile(user_id="u1"),
        *(profile(id=f"p{number}", user_id="u2") for number in (2, 3)),
        profile(id="p4", user_id="u4", updated_at=None),
    ]
    found = outcome(Repair.PREPARER_IDS, contact(assigned_preparer_id=preparer), *rows, invalid=("broken",))
    assert told(found) == expected


@pytest.mark.parametrize("preparer", [None, "", "  "])
def test_a_contact_without_a_preparer_is_not_counted(preparer: str | None) -> None:
    assert decide([contact(assigned_preparer_id=preparer)], list(Repair), known(), RULES)[0].repair is Repair.TYPES


def test_an_id_that_is_a_profiles_and_a_users_stays() -> None:
    rows = [profile(id="same"), profile(id="p2", user_id="same")]
    assert outcome(Repair.PREPARER_IDS, contact(assigned_preparer_id="same"), *rows).outcome is UNCHANGED


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("CLIENT", (UNCHANGED, None, "", "")),
        ("tax_preparer", (UPDATED, None, "contact_type", "PREPARER")),
        ("Affiliate", (UPDATED, None, "contact_type", "AFFILIATE")),
        ("lead", (UPDATED, None, "contact_type", "LEAD")),
        ("SUPER_ADMIN", (KEPT, KeepCause.EXCLUDED_ROLE, "", "")),
        ("WIZARD", (KEPT, KeepCause.UNKNOWN_ROLE, "", "")),
        (None, (KEPT, KeepCause.UNKNOWN_ROLE, "", "")),
    ],
)
def test_types(role: str | None, expected: tuple[Any, ...]) -> None:
    assert told(outcome(Repair.TYPES, contact(user_id="u1"), profile(user_id="u1", role=role))) == expected


@pytest.mark.parametrize("touched", [{"updated_at": LATER}, {"stage": "CONTACTED"}])
def test_a_touched_contact_keeps_a_wrong_type_and_a_right_one_is_right(touched: dict[str, Any]) -> None:
    row = profile(user_id="u1", role="AFFILIATE")
    assert outcome(Repair.TYPES, contact(user_id="u1", **touched), row).cause is KeepCause.MODIFIED
    right = contact(user_id="u1", contact_type="AFFILIATE", **touched)
    assert outcome(Repair.TYPES, right, row).outcome is UNCHANGED


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"user_id": "u1"}, "p1"),
        ({"clerk_user_id": "k2"}, "p2"),
        ({"user_id": "u1", "clerk_user_id": "k2"}, KeepCause.AMBIGUOUS),
        ({"email": "client-p1@unknown.com"}, "p1"),
        ({"email": "client-p2@ours.invalid"}, "p2"),
        ({"email": "client-p3@unknown.com"}, KeepCause.NO_PROFILE),
        ({"email": " Two@Example.com"}, "p2"),
        ({"email": "two@example.com", "user_id": "u9"}, KeepCause.NO_PROFILE),
        ({"email": "client-p1@unknown.com", "clerk_user_id": "k2"}, "p2"),
        ({"email": None}, KeepCause.NO_PROFILE),
    ],
)
def test_the_profile_of_a_contact(keys: dict[str, Any], expected: str) -> None:
    rows = [profile(user_id="u1"), profile(id="p2", clerk_user_id="k2", email="two@example.com")]
    found = outcome(Repair.TYPES, contact(**keys), *rows)
    assert (found.profile.id if found.profile else found.cause) == expected


@pytest.mark.parametrize(
    ("raw", "address"),
    [(" Ann@Example.com ", "ann@example.com"), ("", None), ("  ", None), (None, None), ("nobody", None)],
)
def test_the_real_address(raw: str | None, address: str | None) -> None:
    assert real_address(profile(email=raw)) == address
    found = outcome(Repair.PLACEHOLDERS, contact(email="client-p1@unknown.com"), profile(email=raw))
    assert (found.changed, found.value) == (
        ("email", address) if address else ("placeholder", "client-p1@ours.invalid")
    )


@pytest.mark.parametrize("of_user", [None, "", " "])
def test_a_profile_whose_user_has_no_address_has_its_own(of_user: str | None) -> None:
    assert real_address(profile(email=of_user, own_email=" Ann@Example.com")) == "ann@example.com"
    assert real_address(profile(email="bob@example.com", own_email="ann@example.com")) == "bob@example.com"


@pytest.mark.parametrize(
    ("role", "kind"), [("AFFILIATE", "affiliate"), ("tax_preparer", "preparer"), ("ADMIN", "old"), (None, "old")]
)
def test_our_placeholder_is_that_of_the_profiles_role(role: str | None, kind: str) -> None:
    assert placeholder_of(profile(role=role), "old", "ours.invalid") == f"{kind}-p1@ours.invalid"
    assert is_placeholder_of("p1", f"{kind}-p1@any.invalid", "old-p1@unknown.com")
    assert not is_placeholder_of("p1", f"{kind}-p2@any.invalid", "old-p1@unknown.com")
    assert not is_placeholder_of("p1", "old-p1@unknown.com", "old-p1@unknown.com")


def test_nothing_is_to_be_done_where_our_domain_is_that_of_the_script() -> None:
    rules = Rules(stages=RULES.stages, placeholder_domain="unknown.com")
    (found,) = decide([contact(email="client-p1@unknown.com")], [Repair.PLACEHOLDERS], known(profile()), rules)
    assert found.outcome is UNCHANGED


def test_an_address_goes_to_one_contact() -> None:
    rows = [profile(email="one@x.com"), profile(id="p2", email="two@x.com"), profile(id="p3", email="One@X.com")]
    people = [contact(id=f"c{row.id}", email=f"client-{row.id}@unknown.com") for row in rows]
    outcomes = decide(people, [Repair.PLACEHOLDERS], known(*rows), RULES)
    given: set[str] = set()
    settled = keep_conflicts(outcomes, {"two@x.com": {"other"}, "one@x.com": {"cp1"}}, given)
    assert [found.cause for found in settled] == [None, KeepCause.CONFLICT, KeepCause.CONFLICT]
    assert given == {"one@x.com"}
    assert [found.cause for found in keep_conflicts(outcomes[:1], {}, given)] == [KeepCause.CONFLICT]


def test_the_counts_add_up() -> None:
    rows = [profile(user_id="u1", role="AFFILIATE")]
    people = [contact(id=f"c{number}", assigned_preparer_id=key) for number, key in enumerate(("u1", "p1", "x"))]
    counts = totals_by_repair(decide(people, [Repair.TYPES, Repair.PREPARER_IDS], known(*rows), RULES))
    assert list(counts) == [Repair.PREPARER_IDS, Repair.TYPES]
    assert all(totals.balances for totals in counts.values())
    assert counts[Repair.PREPARER_IDS].update_outcomes == {"updated": 1, "kept": 1, "unchanged": 1}
    assert counts[Repair.TYPES].kept_by_column == {"no_profile": 3}

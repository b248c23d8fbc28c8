"""What must hold of each command, said over the state before and after it. Shares no code with the project.

A backfill needs no word here: the reference says what it makes of any state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from tests.support.machine.memory import Memory
from tests.support.machine.world import LedgerEntry, State, Update
from tests.support.reference import (
    ATTRIBUTION,
    CONTACT_COLUMNS,
    SIGNUP_SOURCES,
    TABLES,
    Rejected,
    Row,
    address_of,
    contact_of,
    exclusion,
    fill_from_lead,
    fill_from_profile,
    source_of,
    updated_at_of,
)

_FILLED = {
    "user_id": ("userId",),
    "clerk_user_id": ("clerkUserId",),
    "phone": ("phone",),
    "company": ("company",),
    "last_contacted_at": ("lastContactedAt",),
    "assignment": ("assignedPreparerId", "assignedAt"),
    "attribution": ATTRIBUTION,
    "email": ("email",),
    "first_name": ("firstName",),
    "last_name": ("lastName",),
    "source": ("source",),
    "contact_type": ("contactType",),
    "stage": ("stage", "stageEnteredAt"),
    "stage_entered_at": ("stageEnteredAt",),
}
#: The one column of a unit that is not empty when the unit is.
_NEVER_EMPTY = "attributionConfidence"
#: What a row that cannot be read any more says; equal to nothing.
_UNKNOWN = object()


class Found(NamedTuple):
    """A finding of a verification, without an order in its columns."""

    check: str
    kind: str
    row: str | None
    contact_id: str | None
    columns: frozenset[str]


# Nobody's work is lost


def assert_nothing_of_theirs_is_lost(before: State, after: State, memory: Memory) -> None:
    """Whatever people made, wrote or deleted is as they left it."""
    for contact_id in memory.theirs:
        undone = [update for update in before.updates_of(contact_id) if update not in after.updates]
        ours = {column for update in undone for column in columns_of(update)} | _filled_since_saved(before, contact_id)
        assert _is_only_filled(before.contacts[contact_id], after.contacts.get(contact_id, {}), ours), "one of theirs"
    for contact_id, columns in memory.written.items():
        assert contact_id in after.contacts, "a contact that people saved is gone"
        values = {c: before.contacts[contact_id][c] for c in columns if before.contacts[contact_id][c] is not None}
        assert {c: after.contacts[contact_id][c] for c in values} == values, "a value that people wrote"
    assert not memory.deleted & after.contacts.keys(), "a contact that people deleted is back"
    for row, entry in memory.laid_to_rest.items():
        assert after.entries.get(row) == entry, "a row whose contact was deleted is decided anew"


def _filled_since_saved(state: State, contact_id: str) -> set[str]:
    """What second looks filled in a contact that nobody saved since the first of them: that is theirs to replace."""
    updates = state.updates_of(contact_id)
    saved_at = state.contacts[contact_id]["updatedAt"]
    is_as_left = all(update.contact_updated_at == saved_at for update in updates)
    return {column for update in updates for column in columns_of(update)} if is_as_left else set()


def _is_only_filled(before: Row, after: Row, ours: set[str]) -> bool:
    """Whether a contact is as people left it, but for blanks, which a second look may fill, and what one had filled.

    A confidence alone is no attribution.
    """
    blank = {column for column, value in before.items() if value is None} | ours
    if not (before.keys() & set(ATTRIBUTION)) - blank - {_NEVER_EMPTY}:
        blank.add(_NEVER_EMPTY)
    return all(after.get(column) == value for column, value in before.items() if column not in blank)


def assert_a_second_look_fills_no_blank_of_theirs(before: State, after: State, memory: Memory) -> None:
    """What people emptied stays empty, unless a row that is new in the ledger brought it."""
    for contact_id, columns in memory.emptied.items():
        brought = {
            column
            for entry in after.merged_into(contact_id)
            if before.entries.get(entry.row) != entry
            for column in columns_of(entry)
        }
        still = {column for column in columns - brought if before.contacts[contact_id][column] is None}
        assert all(after.contacts[contact_id][column] is None for column in still), "a blank that people made"


def assert_the_ledger_is_whole(state: State) -> None:
    """Every entry has its reason or its contact, and no contact has two creators."""
    for entry in state.entries.values():
        assert (entry.outcome == "error") == (entry.reason is not None)
        assert entry.outcome == "error" or entry.contact_id is not None
    creators = Counter(entry.contact_id for entry in state.entries.values() if entry.outcome == "created")
    assert all(count == 1 for count in creators.values())
    assert creators.keys() == state.creators().keys()
    steps = {(update.contact_id, update.to_stage) for update in state.updates if update.to_stage}
    assert state.history == {step for step in steps if step[0] in state.contacts}, "a step that nothing tells of"


def census(state: State) -> dict[str, int]:
    """How many rows are excluded, in the ledger and pending."""
    counted = Counter({"excluded": 0, "in_ledger": 0, "pending": 0})
    with_profile = {profile["userId"] for profile in state.profiles.values()}
    for table in TABLES:
        for identifier, row in getattr(state, table).items():
            known = f"{table}:{identifier}" in state.entries
            if table == "users" and identifier in with_profile and not known:
                continue
            # Who signed up is excluded as long as no run was asked to migrate such people.
            waits = source_of(table, row) in SIGNUP_SOURCES and not known
            excluded = waits or exclusion(table, row, state.population.stages)
            counted["excluded" if excluded else "in_ledger" if known else "pending"] += 1
    return dict(counted)


# What a verification finds


def findings(state: State, memory: Memory) -> set[Found]:
    """Exactly what a verification must find; nothing of it is a defect."""
    return {*_fields(state, memory), *_excluded(state), *_twice(state)}


def _fields(state: State, memory: Memory) -> Iterator[Found]:
    for contact_id, entry in state.creators().items():
        contact, row = state.contacts.get(contact_id), state.source_row(entry.row)
        if contact is None:
            continue
        kind = "crm_changed" if contact_id in memory.written else "source_changed"
        if row is None:
            yield Found("row_gone", kind, entry.row, contact_id, frozenset())
        elif not _is_excluded(state, entry.row) and (columns := differing_columns(state, contact, entry)):
            rows = {entry.row, *(writer.row for writer in _other_writers(state, contact_id))}
            assert contact_id in memory.written or rows & memory.moved, f"nobody changed {columns} of {entry.row}"
            yield Found("fields", kind, entry.row, contact_id, columns)


def _other_writers(state: State, contact_id: str) -> list[LedgerEntry | Update]:
    """What other rows wrote into a contact after the one that made it, in their order."""
    return sorted([*state.merged_into(contact_id), *state.updates_of(contact_id)], key=_turn)


def differing_columns(state: State, contact: Row, creator: LedgerEntry) -> frozenset[str]:
    """The columns in which a contact is not what its row, and the rows merged into it, say now.

    Each unit is that of the row that wrote it last; one that none wrote is the first row's that has it.
    """
    draft = _draft_for(state, creator.row, contact)
    if draft is None:
        return frozenset({"email"})
    expected: dict[str, Any] = dict(draft)
    others = _other_writers(state, contact["id"])
    for entry in others:
        theirs = _draft_for(state, entry.row, contact)
        if theirs is not None and isinstance(entry, LedgerEntry):
            (fill_from_profile if entry.row.startswith(("profiles:", "users:")) else fill_from_lead)(expected, theirs)
    for writer in (creator, *others):
        theirs = _draft_for(state, writer.row, contact)
        expected |= {column: theirs[column] if theirs else _UNKNOWN for column in columns_of(writer)}
    return frozenset(column for column in CONTACT_COLUMNS if contact[column] != expected[column]) - {"updatedAt"}


def _turn(writer: LedgerEntry | Update) -> tuple[int, int, str]:
    """Within a run, the second look comes last."""
    return (writer.run, writer.number, "") if isinstance(writer, Update) else (writer.run, 0, writer.id)


def _draft_for(state: State, reference: str, contact: Row) -> Row | None:
    """What a row maps to now. One with a resolution may have left its accounts to other contacts."""
    draft = draft_of(state, reference)
    if draft is not None and reference in state.resolutions:
        draft |= {key: None for key in ("userId", "clerkUserId") if contact[key] is None}
    return draft


def columns_of(writer: LedgerEntry | Update) -> tuple[str, ...]:
    """The contact's columns that a merged row filled, or a second look changed."""
    return tuple(column for name in writer.filled for column in _FILLED[name])


def draft_of(state: State, reference: str) -> Row | None:
    """What a row maps to now; None where it is gone, excluded or in error."""
    row = state.source_row(reference)
    if row is None or _is_excluded(state, reference):
        return None
    source = source_of(reference.partition(":")[0], row)
    try:
        draft = contact_of(state.population, source, row)
    except Rejected:
        return None
    _, separate_email = state.resolutions.get(reference, (None, None))
    return draft | ({"email": separate_email} if separate_email else {})


def _is_excluded(state: State, reference: str) -> bool:
    row = state.source_row(reference)
    table = reference.partition(":")[0]
    return row is not None and exclusion(table, row, state.population.stages) is not None


def _excluded(state: State) -> Iterator[Found]:
    for entry in state.entries.values():
        if entry.outcome != "error" and entry.contact_id in state.contacts and _is_excluded(state, entry.row):
            label = "role" if entry.row.startswith("profiles:") else "status"
            yield Found("excluded_migrated", "source_changed", entry.row, entry.contact_id, frozenset({label}))


def _twice(state: State) -> Iterator[Found]:
    addresses = Counter(address_of(contact["email"]) for contact in state.contacts.values())
    for contact_id, entry in state.creators().items():
        if contact_id in state.contacts and addresses[address_of(state.contacts[contact_id]["email"])] > 1:
            yield Found("contact_twice", "crm_changed", entry.row, contact_id, frozenset({"email"}))


# What a rollback does


def assert_taken_back(before: State, after: State, run: int, memory: Memory) -> None:
    """What nobody touched is gone, what somebody touched is there, and nothing else moved."""
    gone = before.contacts.keys() - after.contacts.keys()
    assert after.contacts.keys() <= before.contacts.keys()
    entries_gone = {row: entry for row, entry in before.entries.items() if row not in after.entries}
    assert {row: entry for row, entry in before.entries.items() if row not in entries_gone} == after.entries
    for contact_id in gone:
        creator = before.creators()[contact_id]
        assert (creator.run, contact_id in before.referenced) == (run, False)
    for entry in before.entries.values():
        expected = _is_to_go(before, after, entry, run, memory)
        assert expected is None or (entry.row in entries_gone) == expected, f"{entry.outcome} {entry.row}"
    _assert_updates_taken_back(before, after, run, memory)
    for contact_id, contact in after.contacts.items():
        taken = [
            entry for entry in entries_gone.values() if (entry.outcome, entry.contact_id) == ("merged", contact_id)
        ]
        undone = [update for update in before.updates_of(contact_id) if update not in after.updates]
        _assert_emptied(before.contacts[contact_id], contact, taken, undone, run)


def _assert_updates_taken_back(before: State, after: State, run: int, memory: Memory) -> None:
    for update in before.updates:
        is_gone = update not in after.updates
        if update.contact_id in before.contacts and update.contact_id not in after.contacts:
            assert is_gone, "an update outlives its contact"
        elif update.run != run:
            assert not is_gone, "an update of another run"
        else:
            expected = _is_update_to_go(before, update, memory)
            assert expected is None or is_gone == expected, f"update by {update.row}"


def _is_update_to_go(before: State, update: Update, memory: Memory) -> bool | None:
    contact = before.contacts.get(update.contact_id)
    if contact is None or contact["updatedAt"] != update.contact_updated_at:
        return False
    later = [other for other in before.updates_of(update.contact_id) if other.number > update.number]
    if any(set(columns_of(other)) & set(columns_of(update)) for other in later):
        return None  # what a later one changed does not stand as this one wrote it
    tells = [_still_tells(before, update, memory), *(_is_known(before, what, memory) for what in _former(update))]
    return None if False not in tells and None in tells else all(tells)


def _former(update: Update) -> list[Any]:
    return list(update.former_values.values())


def _is_known(state: State, former: Any, memory: Memory) -> bool | None:
    """Whether what a second look replaced is still to be found; None where its row hides that it is not."""
    if former is None or "values" in former:
        return former is not None
    row = state.source_row(former["row"])
    if row is None or updated_at_of(row) != datetime.fromisoformat(former["updated_at"]).replace(tzinfo=UTC):
        return False
    return None if former["row"] in memory.moved_silently else True


def _is_to_go(before: State, after: State, entry: LedgerEntry, run: int, memory: Memory) -> bool | None:
    """Whether an entry is to go; None where it may stay or go, and must only agree with its contact."""
    is_there = entry.contact_id in before.contacts
    creator = before.creators().get(str(entry.contact_id))
    if entry.outcome == "merged" and creator and (entry.run != run or creator.run == run):
        # It goes with its contact; or with what had been filled before it by the run that is taken back.
        is_gone = is_there and entry.contact_id not in after.contacts
        return True if is_gone else False if entry.run == run else None
    if entry.run != run:
        return False
    if entry.outcome in ("error", "exists"):
        return entry.outcome == "error" or is_there
    if not is_there or entry.row in memory.saved_since:
        return False
    if entry.outcome == "created":
        return _is_contact_to_go(before, after, entry, memory)
    if any(set(columns_of(update)) & set(columns_of(entry)) for update in before.updates_of(str(entry.contact_id))):
        return None  # what a second look changed does not stand as the row filled it
    return not entry.filled or _still_tells(before, entry, memory)


def _is_contact_to_go(before: State, after: State, entry: LedgerEntry, memory: Memory) -> bool | None:
    if entry.id in before.referenced:
        return False
    if any(update.to_stage and update in after.updates for update in before.updates_of(entry.id)):
        return False  # its history refers to it
    writers = [entry, *(writer for writer in _other_writers(before, entry.id) if writer.filled)]
    return True if all(_still_tells(before, writer, memory) is not None for writer in writers) else None


def _still_tells(state: State, writer: LedgerEntry | Update, memory: Memory) -> bool | None:
    """Whether a row says what it said when it was written down; None where it hides that it does not."""
    row = state.source_row(writer.row)
    if row is None and writer.row.startswith("tax_intake_leads:"):
        return True  # it expired, which changes nothing
    if row is None or updated_at_of(row) != writer.updated_at:
        return False
    return None if writer.row in memory.moved_silently else True


def _assert_emptied(before: Row, after: Row, taken: list[LedgerEntry], undone: list[Update], run: int) -> None:
    """A contact that stays is as it was, but for what is taken out: there is nothing now, or what was before."""
    writers: list[LedgerEntry | Update] = [*taken, *undone]
    filled = {column for writer in writers for column in columns_of(writer)}
    assert {c: v for c, v in after.items() if c not in filled} == {c: v for c, v in before.items() if c not in filled}
    expected = dict.fromkeys(filled - {_NEVER_EMPTY, "stageEnteredAt"})
    for update in reversed(undone):
        was = {"contactType": update.from_type, "stage": update.from_stage, "email": update.placeholder}
        expected |= {column: value for column, value in was.items() if column in columns_of(update)}
        for name, former in update.former_values.items():
            expected = {column: value for column, value in expected.items() if column not in _FILLED[name]}
            if name == "assignment":
                expected["assignedPreparerId"] = former["values"][0]
    assert {column: after[column] for column in expected} == expected
    assert not taken or any(writer.run == run for writer in writers)


def rollback_counts(before: State, after: State, run: int) -> dict[str, Any]:
    """What a rollback must report, by what became of the entries."""

    def count(*outcomes: str) -> tuple[int, int]:
        of_run = [entry.row for entry in before.entries.values() if entry.run == run and entry.outcome in outcomes]
        stayed = sum(row in after.entries for row in of_run)
        return len(of_run) - stayed, stayed

    (made_gone, made_kept), merges, entries = count("created"), count("merged"), count("exists", "error")
    others = [entry for entry in before.entries.values() if entry.run != run and entry.row not in after.entries]
    updates = [update in after.updates for update in before.updates if update.run == run]
    return {
        "reversed": made_gone,
        "kept": made_kept,
        "failed": 0,
        "merges": {"reversed": merges[0], "kept": merges[1], "failed": 0},
        "lines": {"reversed": entries[0], "kept": entries[1], "failed": 0},
        "later_merges": len(others),
        "updates": {"reversed": updates.count(False), "kept": updates.count(True), "failed": 0},
    }

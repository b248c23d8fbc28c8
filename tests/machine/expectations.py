"""What must hold of each command, said over the state before and after it. Shares no code with the project.

A backfill needs no word here: the reference says what it makes of any state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.machine.memory import Memory
from tests.machine.world import LedgerLine, State
from tests.reference import (
    ATTRIBUTION,
    CONTACT_COLUMNS,
    PLACEHOLDER_DOMAIN,
    PROFILE_TYPES,
    Rejected,
    Row,
    contact_of_lead,
    contact_of_profile,
    exclusion,
    fill_from_lead,
    fill_from_profile,
    source_of,
)

_FILLED = {
    "user_id": ("userId",),
    "clerk_user_id": ("clerkUserId",),
    "phone": ("phone",),
    "company": ("company",),
    "last_contacted_at": ("lastContactedAt",),
    "assignment": ("assignedPreparerId", "assignedAt"),
    "attribution": ATTRIBUTION,
}
#: The one column of a unit that is not empty when the unit is.
_NEVER_EMPTY = "attributionConfidence"


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
        assert after.contacts.get(contact_id) == before.contacts[contact_id], "a contact that people made"
    for contact_id, columns in memory.written.items():
        assert contact_id in after.contacts, "a contact that people saved is gone"
        values = {c: before.contacts[contact_id][c] for c in columns if before.contacts[contact_id][c] is not None}
        assert {c: after.contacts[contact_id][c] for c in values} == values, "a value that people wrote"
    assert not memory.deleted & after.contacts.keys(), "a contact that people deleted is back"
    for row, line in memory.laid_to_rest.items():
        assert after.lines.get(row) == line, "a row whose contact was deleted is decided anew"


def assert_the_ledger_is_whole(state: State) -> None:
    """Every line has its reason or its contact, and no contact has two creators."""
    for line in state.lines.values():
        assert (line.outcome == "error") == (line.reason is not None)
        assert line.outcome == "error" or line.contact_id is not None
    creators = Counter(line.contact_id for line in state.lines.values() if line.outcome == "created")
    assert all(count == 1 for count in creators.values())
    assert creators.keys() == state.creators().keys()


def census(state: State) -> dict[str, int]:
    """How many rows are excluded, in the ledger and pending."""
    counted = Counter({"excluded": 0, "in_ledger": 0, "pending": 0})
    for table, rows in (("profiles", state.profiles), ("leads", state.leads)):
        for identifier, row in rows.items():
            excluded = exclusion(table, row, state.population.stages)
            known = f"{table}:{identifier}" in state.lines
            counted["excluded" if excluded else "in_ledger" if known else "pending"] += 1
    return dict(counted)


# What a verification finds


def findings(state: State, memory: Memory) -> set[Found]:
    """Exactly what a verification must find; nothing of it is a defect."""
    return {*_fields(state, memory), *_excluded(state), *_twice(state)}


def _fields(state: State, memory: Memory) -> Iterator[Found]:
    for contact_id, line in state.creators().items():
        contact, row = state.contacts.get(contact_id), state.source_row(line.row)
        if contact is None:
            continue
        kind = "crm_changed" if contact_id in memory.written else "source_changed"
        if row is None:
            yield Found("row_gone", kind, line.row, contact_id, frozenset())
        elif not _is_excluded(state, line.row) and (columns := differing_columns(state, contact, line)):
            rows = {line.row, *(merged.row for merged in state.merged_into(contact_id))}
            assert contact_id in memory.written or rows & memory.moved, f"nobody changed {columns} of {line.row}"
            yield Found("fields", kind, line.row, contact_id, columns)


def differing_columns(state: State, contact: Row, creator: LedgerLine) -> frozenset[str]:
    """The columns in which a contact is not what its row, and the rows merged into it, say now."""
    draft = _draft_for(state, creator.row, contact)
    if draft is None:
        return frozenset({"email"})
    differing = {column for column in CONTACT_COLUMNS if contact[column] != draft[column]} - {"updatedAt"}
    merged = sorted(state.merged_into(contact["id"]), key=lambda line: line.run)
    for line in merged:
        theirs = _draft_for(state, line.row, contact)
        for column in columns_of(line):
            differing.discard(column)
            if theirs is None or contact[column] != theirs[column]:
                differing.add(column)
    for line in merged:
        differing |= _would_fill(contact, line.row, _draft_for(state, line.row, contact))
    return frozenset(differing)


def _would_fill(contact: Row, row: str, draft: Row | None) -> set[str]:
    if draft is None:
        return set()
    filled = dict(contact)
    (fill_from_profile if row.startswith("profiles:") else fill_from_lead)(filled, draft)
    return {column for column, value in filled.items() if contact[column] != value}


def _draft_for(state: State, reference: str, contact: Row) -> Row | None:
    """What a row maps to now. One that was decided on may have left its accounts to other contacts."""
    draft = draft_of(state, reference)
    if draft is not None and reference in state.decisions:
        draft |= {key: None for key in ("userId", "clerkUserId") if contact[key] is None}
    return draft


def columns_of(line: LedgerLine) -> tuple[str, ...]:
    """The contact's columns that a merged row filled."""
    return tuple(column for name in line.filled for column in _FILLED[name])


def draft_of(state: State, reference: str) -> Row | None:
    """What a row maps to now; None where it is gone, excluded or in error."""
    row = state.source_row(reference)
    if row is None or _is_excluded(state, reference):
        return None
    source = source_of(reference.partition(":")[0], row)
    try:
        if source in PROFILE_TYPES:
            draft = contact_of_profile(state.population, source, row, PLACEHOLDER_DOMAIN)
        else:
            draft = contact_of_lead(state.population, source, row)
    except Rejected:
        return None
    _, separate_email = state.decisions.get(reference, (None, None))
    return draft | ({"email": separate_email} if separate_email else {})


def _is_excluded(state: State, reference: str) -> bool:
    row = state.source_row(reference)
    table = reference.partition(":")[0]
    return row is not None and exclusion(table, row, state.population.stages) is not None


def _excluded(state: State) -> Iterator[Found]:
    for line in state.lines.values():
        if line.outcome != "error" and line.contact_id in state.contacts and _is_excluded(state, line.row):
            label = "role" if line.row.startswith("profiles:") else "status"
            yield Found("excluded_migrated", "source_changed", line.row, line.contact_id, frozenset({label}))


def _twice(state: State) -> Iterator[Found]:
    addresses = Counter(contact["email"].strip().lower() for contact in state.contacts.values())
    for contact_id, line in state.creators().items():
        if contact_id in state.contacts and addresses[state.contacts[contact_id]["email"].strip().lower()] > 1:
            yield Found("contact_twice", "crm_changed", line.row, contact_id, frozenset({"email"}))


# What a rollback does


def assert_taken_back(before: State, after: State, run: int, memory: Memory) -> None:
    """What nobody touched is gone, what somebody touched is there, and nothing else moved."""
    gone = before.contacts.keys() - after.contacts.keys()
    assert after.contacts.keys() <= before.contacts.keys()
    lines_gone = {row: line for row, line in before.lines.items() if row not in after.lines}
    assert {row: line for row, line in before.lines.items() if row not in lines_gone} == after.lines
    for contact_id in gone:
        creator = before.creators()[contact_id]
        assert (creator.run, contact_id in before.referenced) == (run, False)
    for line in before.lines.values():
        expected = _is_to_go(before, line, run, gone, memory)
        assert expected is None or (line.row in lines_gone) == expected, f"{line.outcome} {line.row}"
    for contact_id, contact in after.contacts.items():
        taken = [line for line in lines_gone.values() if (line.outcome, line.contact_id) == ("merged", contact_id)]
        _assert_emptied(before.contacts[contact_id], contact, taken, run)


def _is_to_go(before: State, line: LedgerLine, run: int, gone: Any, memory: Memory) -> bool | None:
    """Whether a line is to go; None where it may stay or go, and must only agree with its contact."""
    is_there = line.contact_id in before.contacts
    creator = before.creators().get(str(line.contact_id))
    if line.outcome == "merged" and creator and (line.run != run or creator.run == run):
        # It goes with its contact; or with what had been filled before it by the run that is taken back.
        return True if line.contact_id in gone else False if line.run == run else None
    if line.run != run:
        return False
    if line.outcome in ("error", "exists"):
        return line.outcome == "error" or is_there
    if not is_there or line.contact_id in memory.written:
        return False
    if line.outcome == "created":
        if line.contact_id in before.referenced:
            return False
        writers = [line, *(merged for merged in before.merged_into(line.id) if merged.filled)]
        return True if all(_still_tells(before, writer, memory) is not None for writer in writers) else None
    return not line.filled or _still_tells(before, line, memory)


def _still_tells(state: State, line: LedgerLine, memory: Memory) -> bool | None:
    """Whether a row says what it said when its line was written; None where it hides that it does not."""
    row = state.source_row(line.row)
    if row is None or row["updatedAt"] != line.updated_at:
        return False
    return None if line.row in memory.moved_silently else True


def _assert_emptied(before: Row, after: Row, taken: list[LedgerLine], run: int) -> None:
    """A contact that stays is as it was, but for what the lines that are gone had filled: there is nothing now."""
    filled = {column for line in taken for column in columns_of(line)}
    assert {c: v for c, v in after.items() if c not in filled} == {c: v for c, v in before.items() if c not in filled}
    assert all(after[column] is None for column in filled - {_NEVER_EMPTY})
    assert not taken or any(line.run == run for line in taken)


def rollback_counts(before: State, after: State, run: int) -> dict[str, Any]:
    """What a rollback must report, by what became of the lines."""

    def count(*outcomes: str) -> tuple[int, int]:
        of_run = [line.row for line in before.lines.values() if line.run == run and line.outcome in outcomes]
        stayed = sum(row in after.lines for row in of_run)
        return len(of_run) - stayed, stayed

    (made_gone, made_kept), merges, lines = count("created"), count("merged"), count("exists", "error")
    others = [line for line in before.lines.values() if line.run != run and line.row not in after.lines]
    return {
        "reversed": made_gone,
        "kept": made_kept,
        "failed": 0,
        "merges": {"reversed": merges[0], "kept": merges[1], "failed": 0},
        "lines": {"reversed": lines[0], "kept": lines[1], "failed": 0},
        "later_merges": len(others),
    }

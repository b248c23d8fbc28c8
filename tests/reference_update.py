"""The judge of --update: what a second look must do, one row after another, on plain dicts.

Beside `tests.reference`, and as independent of the project: it shares no code with it. It remembers what the ledger
remembers: what each row's `updatedAt` was when it was last looked at, who made a contact, and what was filled once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests import reference
from tests.reference import ATTRIBUTION, NULLABLE_ATTRIBUTION, Line, Population, Row

#: What is filled together, by the name in the report; for each, the columns that tell whether something is there.
UNITS: dict[str, tuple[str, ...]] = {
    "user_id": ("userId",),
    "clerk_user_id": ("clerkUserId",),
    "phone": ("phone",),
    "company": ("company",),
    "last_contacted_at": ("lastContactedAt",),
    "assignment": ("assignedPreparerId", "assignedAt"),
    "attribution": ATTRIBUTION,
}
LEAD_BRINGS = {"phone", "last_contacted_at", "assignment", "attribution"}
PROFILE_BRINGS = {"user_id", "clerk_user_id", "phone", "company"}
PLACEHOLDER_KINDS = ("client", "preparer", "affiliate")


@dataclass
class Made:
    """The row that made a contact of ours: its `updatedAt`, and what it had to give, by column."""

    updated_at: Any
    gave: set[str]


@dataclass
class Looks:
    """What updates counted. Dicts hold no zeros."""

    revisited: int = 0
    updated: int = 0
    kept: int = 0
    unchanged: int = 0
    updated_by_column: Counter[str] = field(default_factory=Counter)
    kept_by_column: Counter[str] = field(default_factory=Counter)


@dataclass
class World:
    """Everything that runs leave behind: contacts, ledger, and what the ledger remembers of rows and contacts."""

    contacts: dict[str, Row] = field(default_factory=dict)
    ledger: dict[str, Line] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    given: dict[str, set[str]] = field(default_factory=dict)
    merged_in: dict[str, set[str]] = field(default_factory=dict)
    history: set[tuple[str, str, str]] = field(default_factory=set)


def run(world: World, population: Population, *, update: bool) -> Looks:
    """Backfill, and look again if asked to. `population.contacts` are the contacts as they stand before."""
    result = reference.backfill(population, ledger=world.ledger)
    rows = {f"{table}:{row['id']}": row for table in ("profiles", "leads") for row in getattr(population, table)}
    for ref, line in result.ledger.items():
        if line["outcome"] in reference.SETTLED and world.ledger.get(ref, {}).get("outcome") not in reference.SETTLED:
            world.seen[ref] = rows[ref]["updatedAt"]
            if line["outcome"] == "created":
                draft = _draft(population, str(reference.source_of(ref.split(":")[0], rows[ref])), rows[ref])
                gave = {column for column, value in draft.items() if value is not None} - {"attributionConfidence"}
                world.made[str(line["contact_id"])] = Made(rows[ref]["updatedAt"], gave)
    for contact_id, columns in result.filled.items():
        world.merged_in.setdefault(contact_id, set()).update(columns)
    world.contacts, world.ledger = result.contacts, result.ledger
    looks = Looks()
    if update:
        for source in reference.SOURCES:
            for table, row in reference._rows_in_order(population):
                is_excluded = reference.exclusion(table, row, population.stages)
                if not is_excluded and reference.source_of(table, row) == source:
                    _one_row(world, population, source, table, row, looks)
    return looks


def _one_row(world: World, population: Population, source: str, table: str, row: Row, looks: Looks) -> None:
    ref = f"{table}:{row['id']}"
    line = world.ledger.get(ref)
    if not line or line["outcome"] not in reference.SETTLED or line["contact_id"] not in world.contacts:
        return
    contact = world.contacts[str(line["contact_id"])]
    wanted, kept = _verdict(world, population, source, row, contact)
    has_changed = world.seen[ref] != row["updatedAt"]
    if not has_changed and not (wanted and (line["outcome"] == "exists" or table == "profiles")):
        return
    world.seen[ref] = row["updatedAt"]
    looks.revisited += 1
    if kept:
        looks.kept += 1
    elif wanted:
        looks.updated += 1
    else:
        looks.unchanged += 1
    looks.updated_by_column.update(wanted.keys())
    looks.kept_by_column.update(kept)
    if "stage" in wanted:
        world.history.add((contact["id"], contact["stage"], wanted["stage"]["stage"]))
    for name, values in wanted.items():
        contact.update(values)
        world.given.setdefault(contact["id"], set()).add(name)


def _draft(population: Population, source: str, row: Row) -> Row:
    if source in reference.PROFILE_TYPES:
        return reference.contact_of_profile(population, source, row, reference.PLACEHOLDER_DOMAIN)
    return reference.contact_of_lead(population, source, row)


def _verdict(
    world: World, population: Population, source: str, row: Row, contact: Row
) -> tuple[dict[str, Row], list[str]]:
    """What is written, by name, and the names of what is kept."""
    try:
        draft = _draft(population, source, row)
    except reference.Rejected:
        return {}, []
    try:
        found = reference.find(draft, world.contacts)
    except reference.Rejected:
        return {}, ["identity"]
    if found is not None and found["id"] != contact["id"]:
        return {}, ["identity"]
    made = world.made.get(contact["id"])
    untouched = made is not None and contact["updatedAt"] == made.updated_at
    wanted: dict[str, Row] = {}
    kept: list[str] = []
    is_profile = source in reference.PROFILE_TYPES
    for name in PROFILE_BRINGS if is_profile else LEAD_BRINGS:
        _unit(name, draft, contact, wanted, kept, untouched=untouched, may_fill=_may_fill(world, made, contact, name))
    if is_profile:
        _email(population, row, draft, contact, wanted, kept, untouched=untouched)
    if made:
        _promote(population, source, draft, contact, wanted, kept, untouched=untouched)
    return wanted, kept


def _unit(
    name: str, draft: Row, contact: Row, wanted: dict[str, Row], kept: list[str], *, untouched: bool, may_fill: bool
) -> None:
    columns = UNITS[name]
    telling = NULLABLE_ATTRIBUTION if name == "attribution" else columns
    compared = ("assignedPreparerId",) if name == "assignment" else columns
    if all(draft[column] is None for column in telling):
        return
    if all(contact[column] is None for column in telling):
        if may_fill:
            wanted[name] = {column: draft[column] for column in columns}
        else:
            kept.append(name)
    elif not untouched and any(draft[column] != contact[column] for column in compared):
        kept.append(name)


def _promote(
    population: Population,
    source: str,
    draft: Row,
    contact: Row,
    wanted: dict[str, Row],
    kept: list[str],
    *,
    untouched: bool,
) -> None:
    if source != "active_leads" and draft["contactType"] != contact["contactType"]:
        if not untouched:
            kept.append("contact_type")
        elif contact["contactType"] == "LEAD":
            wanted["contact_type"] = {"contactType": draft["contactType"]}
    if population.stages.index(draft["stage"]) > population.stages.index(contact["stage"]):
        if untouched and contact["stage"] in ("NEW", "CONTACTED", "QUALIFIED", "COMPLETE", "CLOSED", "LOST"):
            wanted["stage"] = {"stage": draft["stage"], "stageEnteredAt": draft["stageEnteredAt"]}
        else:
            kept.append("stage")


def _may_fill(world: World, made: Made | None, contact: Row, name: str) -> bool:
    """Whether nobody can have emptied it."""
    if name in world.given.get(contact["id"], set()):
        return False
    if made is None or contact["updatedAt"] == made.updated_at:
        return True
    return not set(UNITS[name]) & (made.gave | world.merged_in.get(contact["id"], set()))


def _email(
    population: Population,
    row: Row,
    draft: Row,
    contact: Row,
    wanted: dict[str, Row],
    kept: list[str],
    *,
    untouched: bool,
) -> None:
    raw = next((user["email"] for user in population.users if user["id"] == row["userId"]), "")
    if reference.trimmed(raw) is None:
        return
    if contact["email"].rpartition("@")[0] in {f"{kind}-{row['id'].lower()}" for kind in PLACEHOLDER_KINDS}:
        wanted["email"] = {"email": draft["email"]}
    elif contact["id"] == draft["id"] and not untouched and contact["email"] != draft["email"]:
        kept.append("email")

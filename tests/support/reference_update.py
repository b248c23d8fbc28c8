"""The judge of --update: what a second look must do, one row after another, on plain dicts.

Beside `tests.support.reference`, and as independent of the project: it shares no code with it. It remembers what the
ledger remembers: what each row's `updatedAt` and preparer were when it was settled and last looked at, who made a
contact, what was filled once, and what the contact's `updatedAt` was then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.support import reference
from tests.support.reference import ATTRIBUTION, COMMISSION, Entry, Population, Row, referrer

#: What is filled together, by the name in the report. An attribution is there if it names a referrer; the others if one
#: of their columns is there.
UNITS: dict[str, tuple[str, ...]] = {
    "user_id": ("userId",),
    "clerk_user_id": ("clerkUserId",),
    "phone": ("phone",),
    "company": ("company",),
    "last_contacted_at": ("lastContactedAt",),
    "assignment": ("assignedPreparerId", "assignedAt"),
    "attribution": ATTRIBUTION,
    "commission": COMMISSION,
}
#: What the row alone says that counts first.
FIRST = {
    "first_name": ("firstName",),
    "last_name": ("lastName",),
    "contact_type": ("contactType",),
    "source": ("source",),
}
STAGE = {"stage": ("stage", "stageEnteredAt"), "stage_entered_at": ("stageEnteredAt",)}
COLUMNS = {**UNITS, **FIRST, **STAGE, "email": ("email",)}
STAGES_OF_LEADS = ("NEW", "CONTACTED", "QUALIFIED", "COMPLETE", "CLOSED", "LOST")
#: The sources of people who are not clients yet.
OF_LEADS = ("active_leads", "open_intakes", *reference.SIGNUP_SOURCES)
PLACEHOLDER_KINDS = ("client", "preparer", "affiliate", "lead")


@dataclass
class Made:
    """The row that made a contact of ours: its `updatedAt`, and what it had to give, by column."""

    updated_at: Any
    gave: set[str]


@dataclass
class Looks:
    """What updates counted, and of assignments what the whole run did. Dicts hold no zeros."""

    revisited: int = 0
    updated: int = 0
    kept: int = 0
    unchanged: int = 0
    updated_and_kept: int = 0
    updated_by_column: Counter[str] = field(default_factory=Counter)
    kept_by_column: Counter[str] = field(default_factory=Counter)
    assignments: Counter[str] = field(default_factory=Counter)


@dataclass
class World:
    """Everything that runs leave behind: contacts, ledger, and what the ledger remembers of rows and contacts.

    `left` are the contacts' `updatedAt` at each update of theirs.
    """

    contacts: dict[str, Row] = field(default_factory=dict)
    ledger: dict[str, Entry] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    seen_preparer: dict[str, str | None] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)
    made: dict[str, Made] = field(default_factory=dict)
    given: dict[str, set[str]] = field(default_factory=dict)
    left: dict[str, set[Any]] = field(default_factory=dict)
    merged_in: dict[str, set[str]] = field(default_factory=dict)
    history: set[tuple[str, str, str]] = field(default_factory=set)

    def is_untouched(self, contact: Row) -> bool:
        """Whether it is of our making, and nobody saved it since."""
        made = self.made.get(contact["id"])
        return made is not None and contact["updatedAt"] == made.updated_at

    def is_due(self, ref: str, row: Row, preparer: str | None) -> bool:
        """Whether a row is to be looked at: it changed, has another preparer, or came to a contact and was not yet."""
        came = self.ledger[ref]["outcome"] != "created"
        is_reassigned = preparer is not None and preparer != self.seen_preparer[ref]
        is_changed = self.seen[ref] != reference.updated_at_of(row)
        return bool(is_changed or is_reassigned or (came and ref not in self.looked))


class Speaker(NamedTuple):
    """A row of a contact, and what it would make of its person alone."""

    ref: str
    source: str
    row: Row
    draft: Row


def run(world: World, population: Population, *, update: bool, with_signups: bool = False) -> Looks:
    """Backfill, and look again if asked to. `population.contacts` are the contacts as they stand before."""
    result = reference.backfill(population, ledger=world.ledger, with_signups=with_signups)
    rows = {f"{table}:{row['id']}": row for table in reference.TABLES for row in getattr(population, table)}
    for ref, entry in result.ledger.items():
        if entry["outcome"] in reference.SETTLED and world.ledger.get(ref, {}).get("outcome") not in reference.SETTLED:
            draft = reference.contact_of(population, reference.source_of(ref.split(":")[0], rows[ref]), rows[ref])
            world.seen[ref], world.seen_preparer[ref] = reference.updated_at_of(rows[ref]), draft["assignedPreparerId"]
            if entry["outcome"] == "created":
                gave = {column for column, value in draft.items() if value is not None} - {"attributionConfidence"}
                # Without a referrer there is no attribution that anybody could have emptied.
                gave -= set() if referrer(draft) else set(ATTRIBUTION)
                world.made[str(entry["contact_id"])] = Made(world.seen[ref], gave)
    for contact_id, columns in result.filled.items():
        world.merged_in.setdefault(contact_id, set()).update(columns)
    world.contacts, world.ledger = result.contacts, result.ledger
    looks = Looks(assignments=result.counts.assignments)
    if update:
        for source, table, row in list(_in_order(population)):
            if source in reference.SIGNUP_SOURCES and not with_signups:
                continue
            _one_row(world, population, source, table, row, looks)
    return looks


def _in_order(population: Population) -> Iterator[tuple[str, str, Row]]:
    """The rows that are to be migrated, in the one order in which they count."""
    for source in reference.SOURCES:
        for table, row in reference._rows_in_order(population):
            is_excluded = reference.exclusion(table, row, population.stages)
            if not is_excluded and reference.source_of(table, row) == source:
                yield source, table, row


def _one_row(world: World, population: Population, source: str, table: str, row: Row, looks: Looks) -> None:
    ref = f"{table}:{row['id']}"
    entry = world.ledger.get(ref)
    if not entry or entry["outcome"] not in reference.SETTLED or entry["contact_id"] not in world.contacts:
        return
    contact = world.contacts[str(entry["contact_id"])]
    wanted, kept = _verdict(world, population, source, ref, row, contact)
    assigning = _expected(world, population, contact)[1].get("assignment") if "assignment" in wanted else None
    preparer = _preparer(population, source, row)
    if not world.is_due(ref, row, preparer) and "email" not in wanted:
        return
    world.seen[ref], world.seen_preparer[ref] = reference.updated_at_of(row), preparer
    world.looked.add(ref)
    looks.revisited += 1
    if wanted:
        looks.updated += 1
        looks.updated_and_kept += bool(kept)
    elif kept:
        looks.kept += 1
    else:
        looks.unchanged += 1
    looks.updated_by_column.update(wanted.keys())
    looks.kept_by_column.update(kept)
    if assigning is not None:
        looks.assignments[str(reference.assignment_of(population, assigning.source, assigning.row)[2])] += 1
    if "stage" in wanted:
        world.history.add((contact["id"], contact["stage"], wanted["stage"]["stage"]))
    for name, values in wanted.items():
        contact.update(values)
        world.given.setdefault(contact["id"], set()).add(name)
        world.left.setdefault(contact["id"], set()).add(contact["updatedAt"])


def _preparer(population: Population, source: str, row: Row) -> str | None:
    """The preparer that a row gives to a contact; none where it makes no contact."""
    try:
        preparer: str | None = reference.contact_of(population, source, row)["assignedPreparerId"]
    except reference.Rejected:
        return None
    return preparer


def _is_of(world: World, population: Population, source: str, row: Row, contact: Row) -> Row | None:
    """What the row makes; None where its keys name another contact by now. Raises Rejected where it makes nothing."""
    draft = reference.contact_of(population, source, row)
    try:
        found = reference.find_of_row(population, world.ledger, world.contacts, source, row, draft)
    except reference.Rejected:
        return None
    return draft if found is None or found["id"] == contact["id"] else None


def _verdict(
    world: World, population: Population, source: str, ref: str, row: Row, contact: Row
) -> tuple[dict[str, Row], list[str]]:
    """What is written, by name, and the names of what is kept."""
    try:
        draft = _is_of(world, population, source, row, contact)
    except reference.Rejected:
        return {}, []
    if draft is None:
        return {}, ["identity"]
    wanted: dict[str, Row] = {}
    kept: list[str] = []
    untouched = world.is_untouched(contact)
    expected, origins, by_rows, origins_by_rows = _expected(world, population, contact)
    for name, origin in origins.items():
        mine = origin.ref == ref
        if not mine and world.is_due(origin.ref, origin.row, origin.draft["assignedPreparerId"]):
            continue
        told = "stage_entered_at" if name == "stage" and expected["stage"] == contact["stage"] else name
        verdict = _of(told, origin, expected, contact, world, population, completed="commission" in origins)
        if verdict:
            wanted[told] = {column: expected[column] for column in COLUMNS[told]}
            if told == "attribution" and "commission" in origins:
                wanted[told] |= {column: origin.draft[column] for column in COMMISSION}
        elif verdict is False and mine:
            kept.append(told)
    if not untouched:
        is_ours = contact["id"] in world.made
        kept += [
            name
            for name, origin in origins_by_rows.items()
            if origin.ref == ref
            and (name not in origins or name not in UNITS)
            and not (name == "contact_type" and _tells_of_a_lead(world, ref, source))
            and _would_change(
                name, by_rows, contact, population, is_ours=is_ours, completed="commission" in origins_by_rows
            )
        ]
    if source in reference.PROFILE_TYPES:
        _email(population, row, draft, contact, wanted, kept, untouched=untouched)
    return wanted, kept


def _expected(
    world: World, population: Population, contact: Row
) -> tuple[Row, dict[str, Speaker], Row, dict[str, Speaker]]:
    """What a contact is to be, and what it were by its rows alone; each with the rows that it comes from."""
    speakers, is_complete = _speakers(world, population, contact)
    by_rows = _fold(None, speakers, population)
    if world.is_untouched(contact) and is_complete:
        return *by_rows, *by_rows
    expected, origins = _fold(_not_ours(world, contact), speakers, population)
    if world.is_untouched(contact):
        _give_type(world, contact, speakers, expected, origins)
    return expected, origins, *by_rows


def _speakers(world: World, population: Population, contact: Row) -> tuple[list[Speaker], bool]:
    """The rows of a contact that still are its person's, in order; and whether these are all that it ever had."""
    refs = {
        ref
        for ref, entry in world.ledger.items()
        if entry["outcome"] in reference.SETTLED and entry["contact_id"] == contact["id"]
    }
    found = []
    for source, table, row in _in_order(population):
        ref = f"{table}:{row['id']}"
        if ref in refs:
            try:
                draft = _is_of(world, population, source, row, contact)
            except reference.Rejected:
                continue
            if draft is not None:
                found.append(Speaker(ref, source, row, draft))
    return found, len(found) == len(refs)


def _fold(base: Row | None, speakers: list[Speaker], population: Population) -> tuple[Row, dict[str, Speaker]]:
    """What one run over these rows makes, on top of what is there; for each unit and for what is first, the row."""
    origins: dict[str, Speaker] = {}
    result = base
    for speaker in speakers:
        before = dict.fromkeys(speaker.draft) if result is None else dict(result)
        if result is None:
            result = dict(speaker.draft)
            origins |= dict.fromkeys((*FIRST, "stage"), speaker)
        elif speaker.source in reference.OF_ACCOUNTS:
            reference.fill_from_profile(result, speaker.draft)
        else:
            reference.fill_from_lead(result, speaker.draft)
        if population.stages.index(speaker.draft["stage"]) > population.stages.index(result["stage"]):
            result |= {column: speaker.draft[column] for column in STAGE["stage"]}
            origins["stage"] = speaker
        attributed = bool(referrer(result)) and not referrer({"referrerUsername": before["referrerUsername"]})
        for name, columns in UNITS.items():
            if name == "attribution":
                changed = attributed
            else:
                changed = any(result[column] != before[column] for column in columns)
            if changed and not (name == "commission" and (attributed or not referrer(result))):
                origins[name] = speaker
    return result or {}, origins


def _not_ours(world: World, contact: Row) -> Row:
    """Somebody else's contact that nobody saved since we filled something, without that."""
    if contact["id"] in world.made or world.left.get(contact["id"]) != {contact["updatedAt"]}:
        return dict(contact)
    ours = world.given[contact["id"]] & UNITS.keys()
    telling = {column for name in ours for column in UNITS[name]} - {"attributionConfidence"}
    return contact | dict.fromkeys(telling)


def _give_type(world: World, contact: Row, speakers: list[Speaker], expected: Row, origins: dict[str, Speaker]) -> None:
    """Where not all rows are there to be asked, a contact has the type of its profile.

    A converted lead or intake promotes one that is a lead. A profile that has become a lead counts where no row stands
    before it.
    """
    is_lead = contact["contactType"] == "LEAD"
    for number, speaker in enumerate(speakers):
        if number and _has_become_a_lead(world, speaker.ref, speaker.source):
            continue
        tells = not _tells_of_a_lead(world, speaker.ref, speaker.source)
        if tells and (is_lead or speaker.source in reference.PROFILE_TYPES):
            expected["contactType"] = speaker.draft["contactType"]
            origins["contact_type"] = speaker
            return


def _tells_of_a_lead(world: World, ref: str, source: str) -> bool:
    """Whether a row only says that its person is no client yet."""
    return source in OF_LEADS and not _has_become_a_lead(world, ref, source)


def _has_become_a_lead(world: World, ref: str, source: str) -> bool:
    """Whether the row is a profile that had another role when it was settled."""
    return source == "lead_profiles" and world.ledger[ref]["source"] != source


def _is_there(contact: Row, name: str) -> bool:
    if name == "attribution":
        return bool(referrer(contact))
    if name == "commission":
        return contact["commissionRate"] is not None
    return any(contact[column] is not None for column in UNITS[name])


def _compared(name: str, *, completed: bool) -> tuple[str, ...]:
    """The columns of a unit; without the rate where another row completed the attribution by it."""
    if name == "attribution" and completed:
        return tuple(column for column in ATTRIBUTION if column not in COMMISSION)
    return COLUMNS[name]


def _of(
    name: str, origin: Speaker, expected: Row, contact: Row, world: World, population: Population, *, completed: bool
) -> bool | None:
    columns = _compared(name, completed=completed)
    if name in UNITS:
        if not _is_there(contact, name):
            return _may_fill(world, contact, name)
        return any(expected[column] != contact[column] for column in columns) or None
    if not world.is_untouched(contact):
        return None
    step = population.stages.index(expected["stage"]) - population.stages.index(contact["stage"])
    if name == "stage":
        return None if step <= 0 else contact["stage"] in STAGES_OF_LEADS
    if name == "contact_type" and step < 0 and origin.source not in reference.PROFILE_TYPES:
        return None
    return any(expected[column] != contact[column] for column in columns) or None


def _would_change(
    name: str, by_rows: Row, contact: Row, population: Population, *, is_ours: bool, completed: bool
) -> bool:
    if name in UNITS:
        compared = ("assignedPreparerId",) if name == "assignment" else _compared(name, completed=completed)
        return _is_there(contact, name) and any(by_rows[column] != contact[column] for column in compared)
    if not is_ours:
        return False
    if name == "stage":
        return population.stages.index(by_rows["stage"]) > population.stages.index(contact["stage"])
    return bool(by_rows[COLUMNS[name][0]] != contact[COLUMNS[name][0]])


def _may_fill(world: World, contact: Row, name: str) -> bool:
    """Whether nobody can have emptied it."""
    if name in world.given.get(contact["id"], set()):
        return False
    made = world.made.get(contact["id"])
    # No row ever empties an assignment, whatever the contact's `updatedAt` says.
    if made is None or (contact["updatedAt"] == made.updated_at and name != "assignment"):
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
    if not reference.address_of(reference.raw_email_of(population, row)):
        return
    names = {reference.placeholder_name(kind, row["id"]) for kind in PLACEHOLDER_KINDS}
    if contact["email"].rpartition("@")[0] in names:
        wanted["email"] = {"email": draft["email"]}
    elif contact["id"] == draft["id"] and not untouched and contact["email"] != draft["email"]:
        kept.append("email")

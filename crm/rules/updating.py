"""Finds what a revisited row changes in its contact. Pure: no database.

Rows are processed one after another: later rows find what earlier rows filled or promoted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from crm.outcome import ASSIGNMENT, Source, Totals, UpdateOutcome
from crm.rules.entry import Entry
from crm.rules.fold import FILLED_UNITS, STAGE, UNITS_OF_FIRST, fold, stage_order
from crm.rules.mapping import (
    CONTACT_TYPE_OF_SOURCE,
    ORIGINS,
    STAGES_OF_STATUS,
    ContactDraft,
    MappedRow,
    Rules,
    placeholder_name,
    referrer,
)
from crm.rules.matching import ATTRIBUTION_PARTS, Conflict, ExistingContact, ExistingContacts
from crm.rules.snapshot import ContactSnapshot

LEAD = "LEAD"
#: The sources of people who are not clients yet.
_OF_LEADS = (Source.ACTIVE_LEADS, Source.OPEN_INTAKES, Source.LEAD_PROFILES, Source.SIGNUPS)
#: The names under which a change is reported as kept if the row has the keys of another contact, or was refused.
IDENTITY, REFUSED = "identity", "refused"
ATTRIBUTION, COMMISSION = ATTRIBUTION_PARTS
EMAIL, TYPE, SOURCE, STAGE_ENTERED = "email", "contact_type", "source", "stage_entered_at"
#: The fields that an update may write, by the name under which they are reported.
FIELDS_OF_CHANGE: Mapping[str, tuple[str, ...]] = {
    **FILLED_UNITS,
    **{name: (name,) for name in UNITS_OF_FIRST},
    EMAIL: ("email",),
    STAGE: ("stage", "stage_entered_at"),
    STAGE_ENTERED: ("stage_entered_at",),
}
#: The units whose former value a record of a change may contain: ids and times, no personal data.
_NOTHING_PERSONAL = ("user_id", "clerk_user_id", "last_contacted_at", "assignment")
#: The sources whose rows have a role, which gives the type of the contact.
_OF_ROLE = tuple(CONTACT_TYPE_OF_SOURCE)
#: The units for whose former value a record of a change has its own column.
_RECORDED_APART = (EMAIL, TYPE, STAGE, STAGE_ENTERED)
# The fields that decide whether a unit is present: without a referrer, there is no attribution.
_TELLING = {**FIELDS_OF_CHANGE, ATTRIBUTION: ("referrer_username",), COMMISSION: ("commission_rate",)}
# The time of an assignment changes with every change of the row, so only the preparer is compared.
_COMPARED = {**FIELDS_OF_CHANGE, "assignment": ("assigned_preparer_id",)}


class RowOfContact(NamedTuple):
    """A row that created or matched a contact, as it maps now."""

    entry: Entry
    source: Source
    row: MappedRow

    @property
    def is_due(self) -> bool:
        """Whether the row itself is to be revisited."""
        return self.entry.is_due(self.row.updated_at, self.row.preparer_id)


@dataclass(slots=True)
class RevisitedContact:
    """A contact whose rows are revisited, with the changes by earlier rows of the batch.

    `made_at` is the `updatedAt` of the row that created it, or None if it was created elsewhere. `left_at` is the
    contact's `updatedAt` at its last update, or None if there was none. `given` are the units that the backfill filled
    before; it may be incomplete for an unmodified contact. `rows` are in canonical order. `has_all_rows` is False if
    one of them is missing or is excluded now. `was_assigned` is True if one of them gave it a preparer.
    """

    snapshot: ContactSnapshot
    made_at: str | None = None
    left_at: str | None = None
    given: set[str] = field(default_factory=set)
    rows: Sequence[RowOfContact] = ()
    has_all_rows: bool = True
    was_assigned: bool = False

    @property
    def values(self) -> ContactDraft:
        """The values of the contact."""
        return self.snapshot.values

    def write(self, values: Mapping[str, Any]) -> None:
        """Set these values."""
        self.snapshot = replace(self.snapshot, values=self.values._replace(**values))

    @property
    def is_as_written(self) -> bool:
        """Whether the backfill created it and it is unmodified: each write of the application changes `updatedAt`."""
        return self.made_at is not None and self.values.updated_at == self.made_at

    @property
    def is_as_left(self) -> bool:
        """Whether it was created elsewhere, and is unmodified since an update filled something in it."""
        return self.made_at is None and self.values.updated_at == self.left_at


class Change(NamedTuple):
    """The result of revisiting a row. `version` and `before` are those of the contact before this row.

    `origins` has the source row of each written value, by name. `kept` are the names of the values that stay although
    the row has others. `former` has the replaced value by name if it is not personal data, otherwise a reference to the
    row that has it, or None if no row has it.
    """

    row: MappedRow
    entry: Entry
    version: str
    before: ContactDraft
    values: dict[str, Any]
    origins: Mapping[str, RowOfContact]
    kept: tuple[str, ...] = ()
    former: Mapping[str, Any] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the written values."""
        return tuple(self.origins)

    @property
    def contact_id(self) -> str:
        """The id of the contact."""
        return self.before.id

    @property
    def outcome(self) -> UpdateOutcome:
        """The outcome of the row: `updated` if it changed anything, even if it also kept something."""
        if self.columns:
            return UpdateOutcome.UPDATED
        return UpdateOutcome.KEPT if self.kept else UpdateOutcome.UNCHANGED

    def refused(self) -> Change:
        """Return the change as one that PostgreSQL refused."""
        return self._replace(values={}, origins={}, kept=(*self.kept, REFUSED))


class _MatchingRow(NamedTuple):
    """A row that still matches its contact, and the contact that it would create alone."""

    origin: RowOfContact
    draft: ContactDraft


@dataclass(frozen=True, slots=True)
class _Expected:
    """The expected values of a contact with the source row of each unit; and those by its rows alone."""

    values: ContactDraft
    origins: Mapping[str, RowOfContact]
    by_rows: ContactDraft
    origins_by_rows: Mapping[str, RowOfContact]

    def written(self, name: str) -> dict[str, Any]:
        """Return the values to write for a name. An attribution whose rate comes from another row excludes the rate."""
        values = {each: getattr(self.values, each) for each in FIELDS_OF_CHANGE[name]}
        if name == ATTRIBUTION and COMMISSION in self.origins:
            draft = self.origins[name].row.draft
            values |= {each: getattr(draft, each) for each in FIELDS_OF_CHANGE[COMMISSION]}
        return values


@dataclass(slots=True)
class RevisitContext:
    """The data that the rows of a batch are compared with."""

    entries: Mapping[str, Entry]
    contacts: Mapping[str, RevisitedContact]
    known: ExistingContacts
    revisited_ids: set[str] = field(default_factory=set)
    expected: dict[str, _Expected] = field(default_factory=dict)


def find_changes(source: Source, rows: Iterable[MappedRow], context: RevisitContext, rules: Rules) -> Iterator[Change]:
    """Yield the changes of the rows to revisit, and apply them to `context`. Other rows have no change."""
    for row in rows:
        entry = context.entries.get(row.id)
        contact = context.contacts.get(entry.contact_id) if entry else None
        if entry is None or contact is None:
            continue
        revisited = RowOfContact(entry, source, row)
        change = _change(revisited, contact, context, rules)
        if revisited.is_due or EMAIL in change.columns:
            context.revisited_ids.add(entry.id)
            _apply(change, contact, context)
            yield change


def rows_of(contacts: Mapping[str, RevisitedContact], rows: Iterable[MappedRow]) -> list[MappedRow]:
    """Return these rows and those of the contacts, each once."""
    others = {found.row.id: found.row for contact in contacts.values() for found in contact.rows}
    return list((others | {row.id: row for row in rows}).values())


def totals_of(changes: Collection[Change]) -> Totals:
    """Return the counts of a batch of revisited rows."""
    outcomes = Counter(change.outcome for change in changes)
    return Totals(
        revisited=len(changes),
        updated=outcomes[UpdateOutcome.UPDATED],
        kept=outcomes[UpdateOutcome.KEPT],
        unchanged=outcomes[UpdateOutcome.UNCHANGED],
        updated_and_kept=sum(bool(change.columns and change.kept) for change in changes),
        updated_by_column=Counter(column for change in changes for column in change.columns),
        kept_by_column=Counter(column for change in changes for column in change.kept),
        assignments=Counter(
            str(change.origins[ASSIGNMENT].row.assigned_by) for change in changes if ASSIGNMENT in change.origins
        ),
    )


def _change(revisited: RowOfContact, contact: RevisitedContact, context: RevisitContext, rules: Rules) -> Change:
    """Return what the row changes in its contact: its own values, and those of rows that are not due."""
    row, entry = revisited.row, revisited.entry
    nothing = Change(row, entry, contact.snapshot.version, contact.values, {}, {})
    if row.draft is None:
        return nothing
    draft = _of_this_contact(row, row.draft, contact, context.known)
    if draft is None:
        return nothing._replace(kept=(IDENTITY,))
    expected = _expected(contact, context, rules)
    written: dict[str, RowOfContact] = {}
    kept: list[str] = []
    values: dict[str, Any] = {}
    for name, origin in expected.origins.items():
        is_its_own = origin.entry.id == entry.id
        if not is_its_own and origin.is_due and origin.entry.id not in context.revisited_ids:
            continue
        reported = STAGE_ENTERED if name == STAGE and expected.values.stage == contact.values.stage else name
        is_to_write = _is_to_write(reported, expected, contact, rules)
        if is_to_write:
            written[reported] = origin
            values |= expected.written(reported)
        elif is_to_write is False and is_its_own:
            kept.append(reported)
    kept += _kept_from(revisited, expected, contact, rules)
    if (is_to_write := _of_email(revisited, draft, contact)) is not None:
        if is_to_write:
            written[EMAIL] = revisited
            values["email"] = draft.email
        else:
            kept.append(EMAIL)
    former = {name: _former(name, contact) for name in written if name not in _RECORDED_APART}
    former = {name: what for name, what in former.items() if not _lacks(contact.values, name)}
    if ASSIGNMENT in written:
        # The rows do not show later who was assigned: a client gets another preparer without a trace in its profile.
        before, now = (
            [each[name] for name in FIELDS_OF_CHANGE[ASSIGNMENT]] for each in (contact.values._asdict(), values)
        )
        former[ASSIGNMENT] = {"values": before, "written": now}
    return nothing._replace(
        values=values,
        origins=written,
        kept=tuple(kept),
        former=former,
    )


def _expected(contact: RevisitedContact, context: RevisitContext, rules: Rules) -> _Expected:
    """Return the expected values of the contact. They are cached until a row of the batch changes keys of a contact."""
    expected = context.expected.get(contact.values.id)
    if expected is None:
        expected = context.expected[contact.values.id] = _fold(contact, context.known, rules)
    return expected


def _fold(contact: RevisitedContact, known: ExistingContacts, rules: Rules) -> _Expected:
    """Fold the rows of a contact alone, and after the existing values that must not be replaced."""
    matching = [
        _MatchingRow(origin, draft)
        for origin in contact.rows
        if origin.row.draft and (draft := _of_this_contact(origin.row, origin.row.draft, contact, known))
    ]
    if not matching:
        return _Expected(contact.values, {}, contact.values, {})
    by_rows = fold([found.draft for found in matching], rules)
    origins_by_rows = {name: matching[number].origin for name, number in by_rows.origins.items()}
    is_complete = contact.has_all_rows and len(matching) == len(contact.rows)
    if contact.is_as_written and is_complete:
        return _Expected(by_rows.values, origins_by_rows, by_rows.values, origins_by_rows)
    folded = fold([_not_ours(contact), *(found.draft for found in matching)], rules)
    origins = {name: matching[number - 1].origin for name, number in folded.origins.items() if number > 0}
    values = folded.values
    if contact.is_as_written and (typing := _giving_type(contact, matching)):
        values = values._replace(contact_type=typing.draft.contact_type)
        origins[TYPE] = typing.origin
    return _Expected(values, origins, by_rows.values, origins_by_rows)


def _not_ours(contact: RevisitedContact) -> ContactDraft:
    """Return the contact without what updates filled in it, which may be replaced if it is unmodified since."""
    if not contact.is_as_left:
        return contact.values
    ours: dict[str, Any] = dict.fromkeys(
        each for unit in contact.given & FILLED_UNITS.keys() for each in _TELLING[unit]
    )
    return contact.values._replace(**ours)


def _giving_type(contact: RevisitedContact, matching: Iterable[_MatchingRow]) -> _MatchingRow | None:
    """Return the row that determines the type of a contact although not all of its rows are there.

    That is a profile, by its role; for a contact that is a lead, also a converted lead or intake.
    """
    is_lead = contact.values.contact_type == LEAD
    for number, found in enumerate(matching):
        origin = found.origin
        # Whoever became a lead is one unless another row says more.
        if _has_become_lead(origin) and number > 0:
            continue
        if _is_of_more_than_a_lead(origin) and (is_lead or origin.source in _OF_ROLE):
            return found
    return None


def _is_of_more_than_a_lead(origin: RowOfContact) -> bool:
    """Return whether a row says of its person what they are, and not only that they are no client yet."""
    return origin.source not in _OF_LEADS or _has_become_lead(origin)


def _has_become_lead(origin: RowOfContact) -> bool:
    """Return whether a row is a profile that had another role when it was migrated."""
    return origin.source is Source.LEAD_PROFILES and origin.entry.source != Source.LEAD_PROFILES


def _of_this_contact(
    row: MappedRow, draft: ContactDraft, contact: RevisitedContact, known: ExistingContacts
) -> ContactDraft | None:
    """Return the draft of a row, or None if its keys belong to another contact now.

    Accounts that a resolution left with other contacts are removed.
    """
    try:
        found = known.find_resolved(draft, row.resolution) if row.resolution else known.find(draft, row.profile_id)
    except Conflict:
        return None
    if found is not None and found.id != contact.values.id:
        return None
    return known.without_others_accounts(draft, found) if row.resolution else draft


# These functions return True if a unit of a row is to be written, False if the contact's value is kept, and None if
# there is nothing to do.


def _lacks(values: ContactDraft, unit: str) -> bool:
    if unit == ATTRIBUTION:
        return referrer(values.referrer_username) is None
    return all(getattr(values, name) is None for name in _TELLING[unit])


def _fields_of(
    name: str, origins: Mapping[str, RowOfContact], fields: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """Return the fields of a unit; for an attribution whose rate comes from another row, those without the rate."""
    if name == ATTRIBUTION and COMMISSION in origins:
        return tuple(each for each in fields[name] if each not in fields[COMMISSION])
    return fields[name]


def _differs(one: ContactDraft, other: ContactDraft, fields: Iterable[str]) -> bool:
    return any(getattr(one, name) != getattr(other, name) for name in fields)


def _is_to_write(name: str, expected: _Expected, contact: RevisitedContact, rules: Rules) -> bool | None:
    if name not in FILLED_UNITS:
        return _of_written(name, expected, contact, rules) if contact.is_as_written else None
    if _lacks(contact.values, name):
        # No run empties an assignment: whoever did was a person, even if the application did not move `updatedAt`.
        is_removed = name == ASSIGNMENT and contact.was_assigned
        return name not in contact.given and not is_removed
    compared = _fields_of(name, expected.origins, FIELDS_OF_CHANGE)
    return True if _differs(expected.values, contact.values, compared) else None


def _of_written(name: str, expected: _Expected, contact: RevisitedContact, rules: Rules) -> bool | None:
    """Decide about the stage and the units of the first row of an unmodified contact."""
    step = _step(expected.values, contact, rules)
    if name == STAGE:
        return None if step <= 0 else _is_of_a_lead(contact.values.stage, rules)
    if name == TYPE and step < 0 and expected.origins[name].source not in _OF_ROLE:
        return None  # the type of a lead follows the stage, which never moves back
    return True if getattr(expected.values, name) != getattr(contact.values, name) else None


def _step(expected: ContactDraft, contact: RevisitedContact, rules: Rules) -> int:
    before = stage_order(contact.values.stage, rules)
    return stage_order(expected.stage, rules) - before if before >= 0 else 0


def _is_of_a_lead(stage: str, rules: Rules) -> bool:
    return stage in {rules.stage_of(status) for status in STAGES_OF_STATUS}


def _kept_from(revisited: RowOfContact, expected: _Expected, contact: RevisitedContact, rules: Rules) -> list[str]:
    """Return the units that the row would write if the contact were unmodified and created by the backfill."""
    if contact.is_as_written:
        return []
    kept = []
    for name, origin in expected.origins_by_rows.items():
        if origin.entry.id != revisited.entry.id:
            continue
        if name not in FILLED_UNITS:
            differs = contact.made_at is not None and _would_promote(name, revisited, expected.by_rows, contact, rules)
        else:
            differs = (
                name not in expected.origins
                and not _lacks(contact.values, name)
                and _differs(expected.by_rows, contact.values, _fields_of(name, expected.origins_by_rows, _COMPARED))
            )
        if differs:
            kept.append(name)
    return kept


def _would_promote(
    name: str, revisited: RowOfContact, by_rows: ContactDraft, contact: RevisitedContact, rules: Rules
) -> bool:
    if name == STAGE:
        return _step(by_rows, contact, rules) > 0
    if name == TYPE and not _is_of_more_than_a_lead(revisited):
        return False
    return bool(getattr(by_rows, name) != getattr(contact.values, name))


def _of_email(revisited: RowOfContact, draft: ContactDraft, contact: RevisitedContact) -> bool | None:
    row = revisited.row
    if revisited.source.table != "profiles" or row.raw_email is None:
        return None
    if (contact.values.email or "").rpartition("@")[0] in _placeholders(row):
        return True
    is_its_own = contact.values.id == row.id
    differs = is_its_own and contact.values.email != draft.email
    return False if differs and not contact.is_as_written else None


def _placeholders(row: MappedRow) -> frozenset[str]:
    """Return the local parts of all placeholders of this profile, for any role."""
    kinds = [kind.lower() for kind in CONTACT_TYPE_OF_SOURCE.values()]
    # Earlier versions converted every id to lower case and appended no hash.
    of_earlier_versions = {f"{kind}-{row.source_id.lower()}" for kind in kinds}
    return frozenset(of_earlier_versions | {placeholder_name(kind, row.source_id) for kind in kinds})


def _former(unit: str, contact: RevisitedContact) -> Any:
    """Return where a replaced value can be found: a reference to its row. Only non-personal values are repeated."""
    fields = FIELDS_OF_CHANGE[unit]
    if unit in _NOTHING_PERSONAL or (unit == SOURCE and contact.values.source in ORIGINS):
        return {"values": [getattr(contact.values, name) for name in fields]}
    for origin in contact.rows:
        if origin.row.draft and not _differs(origin.row.draft, contact.values, fields):
            reference = f"{origin.source.table}:{origin.row.source_id}"
            return {"row": reference, "updated_at": origin.row.updated_at}
    return None


def _apply(change: Change, contact: RevisitedContact, context: RevisitContext) -> None:
    if not change.columns:
        return
    contact.write(change.values)
    contact.given.update(change.columns)
    if change.values.keys() & {"email", "user_id", "clerk_user_id"}:
        context.known.add(ExistingContact.of_draft(contact.values))
        # These keys decide which rows match which contact.
        context.expected.clear()

"""What a row that is looked at again changes in its contact. Pure: no database.

Rows are decided one after another, in their order: what an earlier row fills or promotes is so for the later ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crm.backfill.mapping import ATTRIBUTION, CONTACT_TYPE_OF_SOURCE, STAGES_OF_STATUS, ContactDraft, MappedRow, Rules
from crm.backfill.outcome import Outcome, Source, Totals, UpdateOutcome
from crm.backfill.plan import ASSIGNMENT_UNIT, ATTRIBUTION_UNIT, PROFILE_FILLS, Conflict, KnownContact, KnownContacts

LEAD = "LEAD"
#: What a row's keys disagree in, and what PostgreSQL refused: kept under these names.
IDENTITY, REFUSED = "identity", "refused"
#: What is filled together, by the name under which it is told.
UNITS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*PROFILE_FILLS, "last_contacted_at")},
    "assignment": ASSIGNMENT_UNIT,
    "attribution": ATTRIBUTION_UNIT,
}
#: The fields of everything that an update may write.
FIELDS_OF_CHANGE: Mapping[str, tuple[str, ...]] = {
    **UNITS,
    "email": ("email",),
    "contact_type": ("contact_type",),
    "stage": ("stage", "stage_entered_at"),
}
# The fields that tell whether a unit is there: a confidence alone is no attribution.
_TELLING = {**UNITS, "attribution": ATTRIBUTION}
# When a lead was assigned moves with every change of its row: the preparer tells whether it is another assignment.
_COMPARED = {**UNITS, "assignment": ("assigned_preparer_id",)}


class SeenLine(NamedTuple):
    """A settled line of the ledger; `seen` is the row's `updatedAt` when it was last looked at."""

    id: str
    outcome: Outcome
    contact_id: str
    seen: str


@dataclass(slots=True)
class StandingContact:
    """A contact as it stands.

    `version` is PostgreSQL's own mark of the row's version. `made_at` is the `updatedAt` of the row that made it; None
    where somebody else did. `given` are the units that the backfill once filled, as far as it matters.
    """

    version: str
    values: ContactDraft
    made_at: str | None = None
    given: set[str] = field(default_factory=set)

    @property
    def is_as_written(self) -> bool:
        """Whether it is of our making and nobody touched it: the application moves `updatedAt` with every write."""
        return self.made_at is not None and self.values.updated_at == self.made_at


class Change(NamedTuple):
    """What becomes of a row that is looked at again, and the contact as it was seen and before this row.

    `columns` are names of what is written, `kept` of what is left as it is although the row has something else.
    """

    row: MappedRow
    line: SeenLine
    version: str
    before: ContactDraft
    values: dict[str, Any]
    columns: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def contact_id(self) -> str:
        """The contact."""
        return self.before.id

    @property
    def outcome(self) -> UpdateOutcome:
        """How the row is counted: a kept value outweighs a filled one."""
        if self.kept:
            return UpdateOutcome.KEPT
        return UpdateOutcome.UPDATED if self.columns else UpdateOutcome.UNCHANGED

    def refused(self) -> Change:
        """The same, where PostgreSQL would not have it."""
        return self._replace(values={}, columns=(), kept=(*self.kept, REFUSED))


@dataclass(slots=True)
class Look:
    """Everything that the rows of a batch are held against."""

    lines: Mapping[str, SeenLine]
    contacts: Mapping[str, StandingContact]
    known: KnownContacts


def decide(source: Source, rows: Iterable[MappedRow], look: Look, rules: Rules) -> Iterator[Change]:
    """Decide the rows that are to be looked at again; the others have no change. What `look` has changes along."""
    for row in rows:
        line = look.lines.get(row.id)
        contact = look.contacts.get(line.contact_id) if line else None
        if line is None or contact is None:
            continue
        change = _change(source, row, line, contact, look.known, rules)
        if _is_due(source, row, change):
            _apply(change, contact, look.known)
            yield change


def totals_of(changes: Collection[Change]) -> Totals:
    """Count a batch of rows that were looked at again."""
    outcomes = Counter(change.outcome for change in changes)
    return Totals(
        revisited=len(changes),
        updated=outcomes[UpdateOutcome.UPDATED],
        kept=outcomes[UpdateOutcome.KEPT],
        unchanged=outcomes[UpdateOutcome.UNCHANGED],
        updated_by_column=Counter(column for change in changes for column in change.columns),
        kept_by_column=Counter(column for change in changes for column in change.kept),
    )


def _is_due(source: Source, row: MappedRow, change: Change) -> bool:
    """Whether the row changed since; or brings something to somebody else's contact, or is a profile that promotes."""
    if row.updated_at != change.line.seen:
        return True
    return bool(change.columns) and (change.line.outcome is Outcome.EXISTS or source.table == "profiles")


def _change(
    source: Source, row: MappedRow, line: SeenLine, contact: StandingContact, known: KnownContacts, rules: Rules
) -> Change:
    """What the row changes in its contact."""
    nothing = Change(row, line, contact.version, contact.values, {})
    if row.draft is None:
        return nothing
    draft = _of_this_contact(row, row.draft, contact, known)
    if draft is None:
        return nothing._replace(kept=(IDENTITY,))
    written: list[str] = []
    kept: list[str] = []
    for name, verdict in (
        *((unit, _of_unit(unit, draft, contact)) for unit in UNITS),
        ("email", _of_email(source, row, draft, contact)),
        ("contact_type", _of_type(source, draft, contact)),
        ("stage", _of_stage(draft, contact, rules)),
    ):
        if verdict is not None:
            (written if verdict else kept).append(name)
    values = {field: getattr(draft, field) for name in written for field in FIELDS_OF_CHANGE[name]}
    return nothing._replace(values=values, columns=tuple(written), kept=tuple(kept))


def _of_this_contact(
    row: MappedRow, draft: ContactDraft, contact: StandingContact, known: KnownContacts
) -> ContactDraft | None:
    """The draft, without accounts that a decision left to others; None where its keys name another contact by now."""
    try:
        found = known.find_decided(draft, row.resolution) if row.resolution else known.find(draft)
    except Conflict:
        return None
    if found is not None and found.id != contact.values.id:
        return None
    return known.without_others_accounts(draft, found) if row.resolution else draft


# A verdict on what a row brings: True writes it, False keeps what is there, None finds nothing to do.


def _lacks(values: ContactDraft, unit: str) -> bool:
    return all(getattr(values, name) is None for name in _TELLING[unit])


def _of_unit(unit: str, draft: ContactDraft, contact: StandingContact) -> bool | None:
    if _lacks(draft, unit):
        return None
    if _lacks(contact.values, unit):
        return unit not in contact.given
    return _kept_if(any(getattr(draft, name) != getattr(contact.values, name) for name in _COMPARED[unit]), contact)


def _of_email(source: Source, row: MappedRow, draft: ContactDraft, contact: StandingContact) -> bool | None:
    if source.table != "profiles" or row.raw_email is None:
        return None
    if contact.values.email.rpartition("@")[0] in _placeholders(row):
        return True
    is_its_own = contact.values.id == row.id
    return _kept_if(is_its_own and contact.values.email != draft.email, contact)


def _of_type(source: Source, draft: ContactDraft, contact: StandingContact) -> bool | None:
    if source is Source.ACTIVE_LEADS or contact.made_at is None or draft.contact_type == contact.values.contact_type:
        return None
    if contact.is_as_written:
        return True if contact.values.contact_type == LEAD else None
    return False


def _of_stage(draft: ContactDraft, contact: StandingContact, rules: Rules) -> bool | None:
    if contact.made_at is None or not _is_forward(contact.values.stage, draft.stage, rules):
        return None
    return contact.is_as_written and contact.values.stage in {rules.stage_of(status) for status in STAGES_OF_STATUS}


def _is_forward(before: str, after: str, rules: Rules) -> bool:
    order = list(rules.stages.values())
    return before in order and after in order and order.index(before) < order.index(after)


def _kept_if(differs: bool, contact: StandingContact) -> bool | None:  # noqa: FBT001 - a condition, read with the name
    """What differs is kept if somebody else may have written it; what we wrote ourselves is just older."""
    return False if differs and not contact.is_as_written else None


def _placeholders(row: MappedRow) -> frozenset[str]:
    """What stands before the @ in a placeholder of this profile, whatever its role and the domain were."""
    return frozenset(f"{kind.lower()}-{row.source_id.lower()}" for kind in CONTACT_TYPE_OF_SOURCE.values())


def _apply(change: Change, contact: StandingContact, known: KnownContacts) -> None:
    if not change.columns:
        return
    contact.values = contact.values._replace(**change.values)
    contact.given.update(change.columns)
    if change.values.keys() & {"email", "user_id", "clerk_user_id"}:
        known.add(KnownContact.of_draft(contact.values))

"""Computes the contact that all rows of a person make, independent of the runs that migrated them. Pure: no database.

The rows of a contact have a canonical order: source by source, in the order in which a run reads them, and rows with a
resolution last. As in one run over all rows, the first row creates the contact, and each of the others fills what is
missing; an attribution and an assignment are filled as units. Only the stage is the furthest stage of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from crm.outcome import ASSIGNMENT
from crm.rules.mapping import ContactDraft, Rules
from crm.rules.matching import ASSIGNMENT_UNIT, ATTRIBUTION_PARTS, PROFILE_FILLS, ExistingContact, fill

#: The fields that a row fills if earlier rows left them empty, by the name under which they are reported.
FILLED_UNITS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*PROFILE_FILLS, "last_contacted_at")},
    ASSIGNMENT: ASSIGNMENT_UNIT,
    **ATTRIBUTION_PARTS,
}
#: The units that come from the first row only.
UNITS_OF_FIRST = ("first_name", "last_name", "contact_type", "source")
STAGE = "stage"


class Folded(NamedTuple):
    """The contact that rows make, and by unit the number of its source row, counted from 0.

    A unit that no row has is missing in `origins`. The id, email, `created_at` and `updated_at` are those of the first
    row.
    """

    values: ContactDraft
    origins: Mapping[str, int]


def fold(drafts: Sequence[ContactDraft], rules: Rules) -> Folded:
    """Fold the rows of a contact, at least one, in canonical order."""
    first = drafts[0]
    contact = ExistingContact.of_draft(first)
    origins = dict.fromkeys((*UNITS_OF_FIRST, *first_fills(first)), 0)
    for number, draft in enumerate(drafts[1:], start=1):
        origins |= dict.fromkeys(fill(contact, draft), number)
    furthest = furthest_stage(drafts, rules)
    stage: dict[str, Any] = {name: getattr(drafts[furthest], name) for name in ("stage", "stage_entered_at")}
    return Folded(first._replace(**contact.fills, **stage), {**origins, STAGE: furthest})


def first_fills(draft: ContactDraft) -> tuple[str, ...]:
    """Return the units that a contact has if this row created it."""
    lacking: dict[str, Any] = dict.fromkeys(name for fields in FILLED_UNITS.values() for name in fields)
    return fill(ExistingContact.of_draft(draft._replace(**lacking)), draft)


def furthest_stage(drafts: Sequence[ContactDraft], rules: Rules) -> int:
    """Return the number of the first row with the furthest stage of the pipeline."""
    return max(range(len(drafts)), key=lambda number: stage_order(drafts[number].stage, rules))


def stage_order(stage: str, rules: Rules) -> int:
    """Return the position of a stage in the pipeline, in the order of the enum; -1 if the enum does not have it."""
    order = list(rules.stages.values())
    return order.index(stage) if stage in order else -1

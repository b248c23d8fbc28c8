"""What a contact is by the rows of its person, whatever runs they came in. Pure: no database.

The rows of a contact have one order: source by source, each as a run reads it, and last those with a resolution
of a conflict. In one run over all of them the first makes the contact and each of the others fills what is missing, an
attribution and an assignment as the units that they are. The stage alone is the furthest that any of them has come to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from crm.outcome import ASSIGNMENT
from crm.rules.mapping import ContactDraft, Rules
from crm.rules.matching import ASSIGNMENT_UNIT, ATTRIBUTION_PARTS, PROFILE_FILLS, ExistingContact, fill

#: What one row fills where another left it empty, by the name under which it is reported.
FILLED_UNITS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*PROFILE_FILLS, "last_contacted_at")},
    ASSIGNMENT: ASSIGNMENT_UNIT,
    **ATTRIBUTION_PARTS,
}
#: What the first row alone says.
UNITS_OF_FIRST = ("first_name", "last_name", "contact_type", "source")
STAGE = "stage"


class Folded(NamedTuple):
    """What a contact is by its rows, and the number of the row, from 0 on, that each unit comes from.

    A unit that no row has is not in `origins`. The id, `created_at` and `updated_at` are those of the first row, and
    belong to the row that made the contact; so does the email.
    """

    values: ContactDraft
    origins: Mapping[str, int]


def fold(drafts: Sequence[ContactDraft], rules: Rules) -> Folded:
    """Fold the rows of one contact, at least one, in the order in which they count."""
    first = drafts[0]
    contact = ExistingContact.of_draft(first)
    origins = dict.fromkeys((*UNITS_OF_FIRST, *first_fills(first)), 0)
    for number, draft in enumerate(drafts[1:], start=1):
        origins |= dict.fromkeys(fill(contact, draft), number)
    furthest = furthest_stage(drafts, rules)
    stage: dict[str, Any] = {name: getattr(drafts[furthest], name) for name in ("stage", "stage_entered_at")}
    return Folded(first._replace(**contact.fills, **stage), {**origins, STAGE: furthest})


def first_fills(draft: ContactDraft) -> tuple[str, ...]:
    """The units that a contact has as soon as this row made it."""
    lacking: dict[str, Any] = dict.fromkeys(name for fields in FILLED_UNITS.values() for name in fields)
    return fill(ExistingContact.of_draft(draft._replace(**lacking)), draft)


def furthest_stage(drafts: Sequence[ContactDraft], rules: Rules) -> int:
    """The number of the first of the rows that have come the furthest along the pipeline."""
    return max(range(len(drafts)), key=lambda number: stage_order(drafts[number].stage, rules))


def stage_order(stage: str, rules: Rules) -> int:
    """Where a stage stands in the pipeline, which is the order of the database's enum; -1 for one that is not in it."""
    order = list(rules.stages.values())
    return order.index(stage) if stage in order else -1

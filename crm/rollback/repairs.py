"""Reverses a repair of contacts that were created elsewhere. Pure: no database.

A repair is reversed if it is still in place: the contact's `updatedAt` is the one after the repair, and the column has
the value that the repair wrote. An address is not recorded: it must be the one of the profile's user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crm.repair.rules import (
    COLUMN_OF_CHANGE,
    EMAIL,
    PREPARER,
    TYPE,
    is_placeholder_of,
    real_address,
)
from crm.rollback.updates import AssessedUpdates, Restored, UpdateRecord
from crm.rules.reverting import Assessment, KeepReason, Status
from crm.rules.snapshot import ContactSnapshot
from crm.rules.source_rows import ProfileRow


def assess_repairs(
    records: Sequence[UpdateRecord], contacts: Mapping[str, ContactSnapshot], profiles: Mapping[str, ProfileRow]
) -> AssessedUpdates:
    """Assess the repairs of a run. `profiles` are those that the values came from, by id, as they are now."""
    assessed = AssessedUpdates()
    for record in records:
        contact = contacts.get(record.entry.contact_id)
        if contact is None:
            assessed.assessments.append(Assessment(record.entry, Status.KEPT, KeepReason.DELETED))
        elif reason := _keep(record, contact, profiles.get(record.entry.source_id)):
            assessed.assessments.append(reason)
        else:
            nothing = Restored(contact.version, contact.values)
            restored = assessed.restored.setdefault(contact.values.id, nothing)
            restored.values = restored.values._replace(**before_repair(record))
            restored.records.append(record)
    return assessed


def before_repair(record: UpdateRecord) -> dict[str, Any]:
    """Return the value before a repair, by the field of the contact."""
    (changed,) = record.entry.filled
    if changed == PREPARER:
        (former,) = record.former_values[PREPARER]["values"]
        return {PREPARER: former}
    return {COLUMN_OF_CHANGE[changed]: record.from_type if changed == TYPE else record.placeholder}


def _keep(record: UpdateRecord, contact: ContactSnapshot, profile: ProfileRow | None) -> Assessment | None:
    (changed,) = record.entry.filled
    stands = getattr(contact.values, COLUMN_OF_CHANGE[changed])
    if contact.values.updated_at != record.entry.contact_updated_at:
        return Assessment(record.entry, Status.KEPT, KeepReason.EDITED, "updatedAt")
    if changed == PREPARER:
        is_in_place = stands == record.entry.source_id
    elif changed == TYPE:
        is_in_place = stands == record.to_type
    elif changed == EMAIL:
        if profile is None or real_address(profile) is None:
            return Assessment(record.entry, Status.KEPT, KeepReason.SOURCE_CHANGED)
        is_in_place = stands == real_address(profile)
    else:
        is_in_place = is_placeholder_of(record.entry.source_id, stands, record.placeholder)
    return None if is_in_place else Assessment(record.entry, Status.KEPT, KeepReason.EDITED, COLUMN_OF_CHANGE[changed])

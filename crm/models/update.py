"""Changes of contacts by --update, committed in the transactions of the changes."""

from __future__ import annotations

from django.db import models

from crm.fields import ExactTimestampField, KeyField
from crm.models.ledger import BackfillRun, LedgerEntry
from crm.outcome import Source


class ContactUpdate(models.Model):
    """The changes of one source row in one contact when a run revisited it.

    Contains names and labels, but no personal data: a rollback reads the values from the source row. A replaced
    placeholder is derived from the row's id. A rollback needs nothing else, not even a ledger entry of the row, which
    is missing if the run that migrated the row was rolled back before.
    """

    run = models.ForeignKey(BackfillRun, models.CASCADE, related_name="contact_updates")
    line = models.ForeignKey(LedgerEntry, models.DO_NOTHING, db_index=False, db_constraint=False, related_name="+")
    source = models.TextField(choices=[(source.value, source.value) for source in Source])
    source_id = models.TextField("source id")
    contact_id = KeyField("contact id", db_index=True)
    columns = models.TextField(help_text="The columns that were filled, replaced or promoted")
    source_updated_at = ExactTimestampField(help_text="The source row's updatedAt when it was revisited")
    contact_updated_at = ExactTimestampField(help_text="The contact's updatedAt, which an update does not change")
    from_type = models.TextField(null=True)
    to_type = models.TextField(null=True)
    from_stage = models.TextField(null=True)
    to_stage = models.TextField(null=True)
    stage_entered_before = ExactTimestampField(null=True)
    attribution_before = models.JSONField(null=True, help_text="The values that the attribution replaced")
    placeholder = models.TextField(null=True, help_text="The placeholder email that was replaced")
    former = models.JSONField(
        null=True, help_text="By column, the previous value, or the row that has it; empty columns are omitted"
    )

    class Meta:
        db_table = "contact_update"
        verbose_name = "update"

    def __str__(self) -> str:
        return f"update of {self.contact_id}"

    @property
    def row(self) -> str:
        """The row's reference, `<table>:<id>`."""
        return f"{Source(self.source).table}:{self.source_id}"

    @property
    def type_step(self) -> str:
        """The change of the type as text."""
        return _step(self.from_type, self.to_type)

    @property
    def stage_step(self) -> str:
        """The change of the stage as text."""
        return _step(self.from_stage, self.to_stage)


def _step(before: str | None, after: str | None) -> str:
    return f"{before} → {after}" if after else "-"

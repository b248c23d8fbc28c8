"""What --update changed in contacts. Written in the same transactions as they are."""

from __future__ import annotations

from django.db import models

from crm.fields import ExactTimestampField, KeyField
from crm.models.ledger import BackfillRun, LedgerEntry
from crm.outcome import Source


class ContactUpdate(models.Model):
    """What one source row changed in one contact when a run looked at it again.

    Names and labels, never a value of a person's: the values are those of the source row. The placeholder that was
    replaced is made of the row's id. Together they are what a rollback needs to take the change back: also when the run
    that settled the row was taken back before, so that there is no entry of it.
    """

    run = models.ForeignKey(BackfillRun, models.CASCADE, related_name="contact_updates")
    line = models.ForeignKey(LedgerEntry, models.DO_NOTHING, db_index=False, db_constraint=False, related_name="+")
    source = models.TextField(choices=[(source.value, source.value) for source in Source])
    source_id = models.TextField("source id")
    contact_id = KeyField("contact id", db_index=True)
    columns = models.TextField(help_text="What was filled, replaced or promoted")
    source_updated_at = ExactTimestampField(help_text="The source row's updatedAt when it was looked at")
    contact_updated_at = ExactTimestampField(help_text="The contact's updatedAt, which an update leaves as it is")
    from_type = models.TextField(null=True)
    to_type = models.TextField(null=True)
    from_stage = models.TextField(null=True)
    to_stage = models.TextField(null=True)
    stage_entered_before = ExactTimestampField(null=True)
    attribution_before = models.JSONField(null=True, help_text="What was replaced of an attribution that there was not")
    placeholder = models.TextField(null=True, help_text="The placeholder email that was replaced")
    former = models.JSONField(
        null=True, help_text="What was there before, or the row that has it: nothing where it was empty"
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
        """From what type to what, for people."""
        return _step(self.from_type, self.to_type)

    @property
    def stage_step(self) -> str:
        """From what stage to what, for people."""
        return _step(self.from_stage, self.to_stage)


def _step(before: str | None, after: str | None) -> str:
    return f"{before} → {after}" if after else "-"

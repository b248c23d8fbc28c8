"""The counts of a rollback, committed in the transactions of its batches."""

from __future__ import annotations

from django.db import models

from crm.models.ledger import BackfillRun


class Rollback(models.Model):
    """The counts of a run of the kind `rollback`, and the run that it rolls back.

    They count the entries that the run has in the ledger. Reversed entries are deleted, so their rows are pending
    again; kept and failed entries stay. `reasons` has their number by reason, as in a rollback's report.
    """

    run = models.OneToOneField(BackfillRun, models.CASCADE, primary_key=True, related_name="rollback")
    of = models.ForeignKey(
        BackfillRun, models.CASCADE, related_name="rollbacks", help_text="The run that is rolled back"
    )
    contacts_reversed = models.BigIntegerField(default=0)
    contacts_kept = models.BigIntegerField(default=0)
    contacts_failed = models.BigIntegerField(default=0)
    merges_reversed = models.BigIntegerField(default=0)
    merges_kept = models.BigIntegerField(default=0)
    merges_failed = models.BigIntegerField(default=0)
    updates_reversed = models.BigIntegerField(default=0)
    updates_kept = models.BigIntegerField(default=0)
    updates_failed = models.BigIntegerField(default=0)
    lines_reversed = models.BigIntegerField(
        default=0, help_text="Rows that matched a contact created elsewhere, or were in error"
    )
    lines_kept = models.BigIntegerField(default=0, help_text="Such rows whose contact has been deleted since")
    later_merges = models.BigIntegerField(
        default=0,
        help_text="Rows that other runs had merged into a reversed contact, or over a reversed merge: pending again",
    )
    reasons = models.JSONField(default=dict)

    class Meta:
        db_table = "rollback"

    def __str__(self) -> str:
        return f"rollback of run {self.of_id}"

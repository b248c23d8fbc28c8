"""What a rollback did, counted. Written in the same transactions as it."""

from __future__ import annotations

from django.db import models

from crm.models.ledger import BackfillRun


class Rollback(models.Model):
    """The counts of a run of the kind `rollback`, and which run it takes back.

    Of every entry that the run still has in the ledger: reversed ones are gone, so that their rows are pending again;
    kept and failed ones are there. `reasons` says why they are, by what stands in a rollback's report.
    """

    run = models.OneToOneField(BackfillRun, models.CASCADE, primary_key=True, related_name="rollback")
    of = models.ForeignKey(
        BackfillRun, models.CASCADE, related_name="rollbacks", help_text="The run that it takes back"
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
        default=0, help_text="Rows that had met somebody's contact, or had an error"
    )
    lines_kept = models.BigIntegerField(default=0, help_text="Such rows whose contact was deleted since")
    later_merges = models.BigIntegerField(
        default=0,
        help_text="Rows that other runs had merged into a reversed contact, or over a reversed merge: pending again",
    )
    reasons = models.JSONField(default=dict)

    class Meta:
        db_table = "rollback"

    def __str__(self) -> str:
        return f"rollback of run {self.of_id}"

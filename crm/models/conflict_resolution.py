"""What a person says about a row in conflict."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now


class ConflictResolution(models.Model):
    """Whose contact a row in conflict is: one that is there, or one of its own with another address.

    The key is that of the row's entry in the ledger. A table beside the ledger, since a resolution outlives the entry:
    it holds again when the run that carried it out is taken back, which deletes the entry. And the ledger names nobody,
    where a resolution may hold an address: the only personal data in the tables of the backfill.
    """

    id = models.TextField(primary_key=True)
    row = models.TextField(help_text="The row's reference, <table>:<id>")
    contact_id = models.TextField("contact id", null=True, help_text="The contact that is this person's")
    separate_email = models.TextField(null=True, unique=True, help_text="The address of a contact of the row's own")
    decided_by = models.TextField(help_text="The operating system's user who decided")
    decided_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "conflict_decision"
        verbose_name = "resolution of a conflict"
        verbose_name_plural = "resolutions of conflicts"
        constraints = (
            models.CheckConstraint(
                condition=Q(contact_id__isnull=False) ^ Q(separate_email__isnull=False),
                name="a_decision_is_one_of_two",
            ),
            models.CheckConstraint(
                condition=Q(row__startswith="profiles:") | Q(row__startswith="leads:"),
                name="a_decision_names_a_row",
            ),
        )

    def __str__(self) -> str:
        return self.row

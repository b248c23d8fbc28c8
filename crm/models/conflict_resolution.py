"""Resolutions of rows in conflict."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now


class ConflictResolution(models.Model):
    """Assigns a row in conflict to an existing contact, or to its own new contact with another address.

    The key is that of the row's ledger entry. Resolutions are separate from the ledger because they outlive the entry,
    which a rollback deletes: the resolution then applies again. And a resolution may contain an address, which the
    ledger never does. It is the only personal data in the tables of the backfill.
    """

    id = models.TextField(primary_key=True)
    row = models.TextField(help_text="The row's reference, <table>:<id>")
    contact_id = models.TextField("contact id", null=True, help_text="The contact to which the row belongs")
    separate_email = models.TextField(null=True, unique=True, help_text="The address of the row's own contact")
    decided_by = models.TextField(help_text="The operating system user who recorded it")
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
                condition=Q(row__startswith="profiles:")
                | Q(row__startswith="leads:")
                | Q(row__startswith="tax_intake_leads:")
                | Q(row__startswith="users:"),
                name="a_decision_names_a_row",
            ),
        )

    def __str__(self) -> str:
        return self.row

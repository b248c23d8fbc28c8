"""What a person decided about a row in conflict. The only table of ours that holds an address."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now


class ConflictDecision(models.Model):
    """Whose contact a row in conflict is: one that is there, or one of its own with another address.

    The key is that of the row's line in the ledger. A decision stays when it has been carried out: it says who decided,
    and holds again when the run that carried it out is taken back.
    """

    id = models.TextField(primary_key=True)
    contact_id = models.TextField("contact id", null=True, help_text="The contact that is this person's")
    separate_email = models.TextField(null=True, unique=True, help_text="The address of a contact of the row's own")
    decided_by = models.TextField(help_text="The operating system's user who decided")
    decided_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "conflict_decision"
        verbose_name = "decision on a conflict"
        verbose_name_plural = "decisions on conflicts"
        constraints = (
            models.CheckConstraint(
                condition=Q(contact_id__isnull=False) ^ Q(separate_email__isnull=False),
                name="a_decision_is_one_of_two",
            ),
        )

    def __str__(self) -> str:
        return str(self.pk)

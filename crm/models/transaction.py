"""Transactions that were committed, for whoever lost the answer to the commit."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now


class CommittedTransaction(models.Model):
    """A transaction by the token that its process gave it; see crm.postgres.transactions.

    Nobody asks for a token after its process has ended, so the claim of a run deletes old ones.
    """

    token = models.UUIDField(primary_key=True)
    committed_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "committed_transaction"

    def __str__(self) -> str:
        return str(self.token)

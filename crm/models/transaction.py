"""Tokens of committed transactions, for clients that lost the answer to a commit."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now


class CommittedTransaction(models.Model):
    """The token of a committed transaction; see crm.postgres.transactions.

    Only the process that committed it reads the token, so claiming a run deletes old tokens.
    """

    token = models.UUIDField(primary_key=True)
    committed_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "committed_transaction"

    def __str__(self) -> str:
        return str(self.token)

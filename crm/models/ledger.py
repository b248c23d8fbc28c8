"""The backfill's own tables: runs, batches, and the ledger with the outcome of each source row."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

from django.conf import settings
from django.db import models
from django.db.models import F, Q, Value
from django.db.models.functions import Now

from crm.fields import ExactTimestampField, KeyField
from crm.outcome import BREAKDOWNS, NUMBERS, Outcome, Repair, Source, Totals


class RunStatus(models.TextChoices):
    """The status of a run."""

    RUNNING = "running"  # a process executes it, or died less than five minutes ago
    PAUSED = "paused"  # stopped by an operator; no other run can start until it is resumed or cancelled
    CANCELLED = "cancelled"  # stopped by an operator
    INTERRUPTED = "interrupted"  # stopped by a signal, resumed after a pause, or found dead; the next run continues it
    FAILED = "failed"  # stopped by an error that retries did not cure; the next run continues it
    FINISHED = "finished"  # completed


#: The statuses that hold the lease: no other run can start meanwhile.
HOLDING = (RunStatus.RUNNING, RunStatus.PAUSED)


def examined_schema() -> str:
    """Return the schema of the application's tables from DATABASE_URL."""
    return str(settings.LEGACY_SCHEMA)


class RunQuerySet(models.QuerySet["BackfillRun"]):
    """Runs by status."""

    def running(self) -> Self:
        """Return the run that is running."""
        return self.filter(status=RunStatus.RUNNING)

    def holding(self) -> Self:
        """Return the run that holds the lease; a unique index allows only one."""
        return self.filter(status__in=HOLDING)


class BackfillRun(models.Model):
    """One execution of the backfill, of a rollback or of a repair: its options, operator, process and results."""

    class Kind(models.TextChoices):
        """The kind of a run."""

        BACKFILL = "backfill"
        ROLLBACK = "rollback"
        REPAIR = "repair"

    kind = models.TextField(choices=Kind.choices, default=Kind.BACKFILL)
    status = models.TextField(choices=RunStatus.choices, default=RunStatus.RUNNING)
    options = models.JSONField(default=dict, help_text="The options of the command, with defaults")
    version = models.TextField(help_text="The version of this project")
    rules = models.IntegerField(
        null=True, help_text="The number of the rules that it applied; unknown for runs of earlier versions"
    )
    generation = models.TextField(help_text="The generation of the application's tables")
    legacy_schema = models.TextField(
        default=examined_schema, help_text="The schema of the application's tables, to which the ledger belongs"
    )
    operator = models.TextField(help_text="The operating system user who started it")
    host = models.TextField()
    process_id = models.IntegerField()
    # Without these three, only the heartbeat shows whether the process is alive.
    boot_id = models.TextField(null=True, help_text="The id of the host's boot")
    pid_namespace = models.TextField(null=True, help_text="The namespace of the process id")
    process_started = models.BigIntegerField(
        null=True, help_text="The start of the process, in clock ticks since the boot"
    )
    started_at = models.DateTimeField(db_default=Now())
    heartbeat_at = models.DateTimeField(db_default=Now(), help_text="The time of the last committed batch")
    finished_at = models.DateTimeField(null=True)
    read = models.BigIntegerField(default=0)
    created = models.BigIntegerField(default=0)
    merged = models.BigIntegerField(default=0)
    exists = models.BigIntegerField(default=0)
    error = models.BigIntegerField(default=0)
    error_new = models.BigIntegerField(default=0, help_text="Rows whose ledger entry did not have this reason before")
    revisited = models.BigIntegerField(default=0, help_text="Rows that --update revisited")
    updated = models.BigIntegerField("changed", default=0, help_text="Rows that changed their contact")
    updated_and_kept = models.BigIntegerField(
        "kept a value as well",
        null=True,
        default=0,
        help_text="Of the rows that changed their contact; earlier versions counted them as kept",
    )
    kept = models.BigIntegerField(
        "kept only",
        default=0,
        help_text="Rows that changed nothing, because a person may have written the contact's value",
    )
    unchanged = models.BigIntegerField(default=0)
    census = models.JSONField(null=True, help_text="The tables at the end: rows = excluded + in the ledger + pending")
    balanced = models.BooleanField(null=True, help_text="Whether the reconciliation held at the end")
    failure = models.TextField(null=True, help_text="The reason why it did not finish")
    report_lost = models.BooleanField(
        default=False,
        db_default=False,
        help_text="Its report could not be written, and no later run has reported its new errors",
    )

    objects = RunQuerySet.as_manager()

    class Meta:
        db_table = "backfill_run"
        verbose_name = "run"
        ordering = ("-id",)
        constraints = (
            # On a constant, not the status: otherwise a run could start while another one is being paused.
            models.UniqueConstraint(Value(1), condition=Q(status__in=HOLDING), name="at_most_one_run_holds_the_fence"),
            models.CheckConstraint(
                condition=Q(read=F("created") + F("merged") + F("exists") + F("error")),
                name="every_read_row_has_an_outcome",
            ),
            models.CheckConstraint(
                condition=Q(revisited=F("updated") + F("kept") + F("unchanged")),
                name="every_revisited_row_has_an_outcome",
            ),
        )

    def __str__(self) -> str:
        return f"run {self.pk}"


class BackfillBatch(models.Model):
    """The counts of a batch, committed in the transaction of its rows. A repair has the name of `Repair` as source."""

    run = models.ForeignKey(BackfillRun, models.CASCADE, related_name="batches")
    source = models.TextField(choices=[(source.value, source.value) for source in (*Source, *Repair)])
    read = models.IntegerField()
    created = models.IntegerField()
    merged = models.IntegerField()
    exists = models.IntegerField()
    error = models.IntegerField()
    error_new = models.IntegerField()
    errors_by_reason = models.JSONField(default=dict)
    errors_new_by_reason = models.JSONField(default=dict)
    created_by_type = models.JSONField(default=dict)
    revisited = models.IntegerField(default=0)
    updated = models.IntegerField("changed", default=0)
    updated_and_kept = models.IntegerField("kept a value as well", null=True, default=0)
    kept = models.IntegerField("kept only", default=0)
    unchanged = models.IntegerField(default=0)
    updated_by_column = models.JSONField(default=dict)
    kept_by_column = models.JSONField(default=dict)
    assignments = models.JSONField(default=dict, db_default={})
    seconds = models.FloatField(help_text="From the first statement to just before the commit")
    committed_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "backfill_batch"
        verbose_name = "batch"
        verbose_name_plural = "batches"

    def __str__(self) -> str:
        return f"batch {self.pk} of run {self.run_id}"

    @classmethod
    def of(cls, run_id: int, source: Source | Repair, totals: Totals, seconds: float) -> Self:
        """Return a batch with these counts."""
        breakdowns = {name: dict(counts) for name, counts in totals.breakdowns.items()}
        return cls(run_id=run_id, source=source, seconds=seconds, **totals.numbers, **breakdowns)

    def totals(self) -> Totals:
        """Return the counts."""
        # Earlier versions left some of them NULL.
        counts: dict[str, Any] = {name: getattr(self, name) or 0 for name in NUMBERS}
        return Totals(**counts | {name: Counter(getattr(self, name)) for name in BREAKDOWNS})


class LedgerEntry(models.Model):
    """The outcome of a source row. Each row has at most one entry.

    The key is the contact id that is derived from the row (`crm.rules.mapping.contact_id`), a function of table and row
    id. So one index ensures one entry per row, finds the entry of a row, and answers whether the backfill created a
    contact: it did if the entry with the contact's id has the outcome `created`.

    `run` has neither index nor constraint in the database: both would slow down every insert, and only a page of the
    admin and a rollback query by run.
    """

    id = KeyField(primary_key=True)
    source = models.TextField(choices=[(source.value, source.value) for source in Source])
    source_id = models.TextField("source id")
    outcome = models.TextField(choices=[(outcome.value, outcome.value) for outcome in Outcome])
    reason = models.TextField(null=True, help_text="The reason of an error")
    contact_id = models.TextField(
        "contact id", null=True, help_text="The contact that it created or matched, or with which it is in conflict"
    )
    run = models.ForeignKey(BackfillRun, models.DO_NOTHING, db_index=False, db_constraint=False, related_name="+")
    source_updated_at = ExactTimestampField(
        null=True, help_text="The source row's updatedAt when it was processed; NULL for some rows in error"
    )
    seen_updated_at = ExactTimestampField(
        null=True, help_text="The source row's updatedAt when --update last revisited it"
    )
    seen_preparer = models.TextField(
        "seen preparer", null=True, help_text="The id of the row's preparer when a run last processed the row"
    )
    filled = models.TextField(null=True, help_text="The columns that the row filled in the contact")
    contact_updated_at = ExactTimestampField(
        null=True, help_text="The updatedAt of the contact that it was merged into, which a merge does not change"
    )
    attribution_before = models.JSONField(null=True, help_text="The values that the attribution replaced")
    identity_keys = models.JSONField(
        null=True, help_text="For a conflict: the contact that each key of the row matches, if any"
    )
    sqlstate = models.TextField(null=True, help_text="PostgreSQL's error code for a refused row")
    constraint = models.TextField(null=True, help_text="The constraint that refused the row")
    column = models.TextField(null=True, help_text="The column that was refused")
    table = models.TextField(null=True, help_text="The table that PostgreSQL named")
    trigger = models.TextField(null=True, help_text="The trigger that refused the row")
    former = models.JSONField(
        null=True, help_text="The previous entry, if the row was migrated again because its contact was missing"
    )

    class Meta:
        db_table = "ledger_entry"
        verbose_name = "ledger entry"
        verbose_name_plural = "ledger"
        indexes = (
            # The rows of a contact, except the one that created it. They are few, so it costs a first run little.
            models.Index(
                fields=["contact_id"], condition=Q(outcome__in=("merged", "exists")), name="ledger_entry_contact_id"
            ),
        )

    def __str__(self) -> str:
        return self.row

    @property
    def row(self) -> str:
        """The row's reference, `<table>:<id>`, as in logs and commands."""
        return f"{Source(self.source).table}:{self.source_id}"

"""Our own tables: what was run, batch by batch, and what became of every source row."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

from django.conf import settings
from django.db import models
from django.db.models import F, Q, Value
from django.db.models.functions import Now

from crm.fields import ExactTimestampField, KeyField
from crm.outcome import BREAKDOWNS, NUMBERS, Outcome, Source, Totals


class RunStatus(models.TextChoices):
    """Where a run stands."""

    RUNNING = "running"  # a process is at work, or died less than five minutes ago
    PAUSED = "paused"  # stopped from outside; no other run may start until it is resumed or cancelled
    CANCELLED = "cancelled"  # stopped from outside for good
    INTERRUPTED = "interrupted"  # stopped by a signal, resumed after a pause, or found dead; the next run goes on
    FAILED = "failed"  # stopped by an error that waiting did not cure; the next run goes on
    FINISHED = "finished"  # went through to its end


#: Who holds the lease: no other run starts meanwhile.
HOLDING = (RunStatus.RUNNING, RunStatus.PAUSED)


def examined_schema() -> str:
    """The schema of the application's tables, as DATABASE_URL names it."""
    return str(settings.LEGACY_SCHEMA)


class RunQuerySet(models.QuerySet["BackfillRun"]):
    """Runs by what became of them."""

    def running(self) -> Self:
        """The run that is at work."""
        return self.filter(status=RunStatus.RUNNING)

    def holding(self) -> Self:
        """The run that keeps another one from starting; at most one, by a unique index."""
        return self.filter(status__in=HOLDING)


class BackfillRun(models.Model):
    """One execution: what was asked, by whom and where, how it went."""

    class Kind(models.TextChoices):
        """What a run does."""

        BACKFILL = "backfill"
        ROLLBACK = "rollback"

    kind = models.TextField(choices=Kind.choices, default=Kind.BACKFILL)
    status = models.TextField(choices=RunStatus.choices, default=RunStatus.RUNNING)
    options = models.JSONField(default=dict, help_text="What was asked, as the command understood it")
    version = models.TextField(help_text="The version of this project")
    rules = models.IntegerField(
        null=True, help_text="The number of the rules that it went by; of runs of earlier versions nobody knows it"
    )
    generation = models.TextField(help_text="The generation of the application's tables")
    legacy_schema = models.TextField(
        default=examined_schema, help_text="The schema of the application's tables: the ledger is of no other"
    )
    operator = models.TextField(help_text="The operating system's user who started it")
    host = models.TextField()
    process_id = models.IntegerField()
    # Without these three, whether the process is alive is told by the heartbeat alone.
    boot_id = models.TextField(null=True, help_text="The boot of the host that it runs since")
    pid_namespace = models.TextField(null=True, help_text="Where the number of the process holds")
    process_started = models.BigIntegerField(null=True, help_text="When it was started, in ticks since the boot")
    started_at = models.DateTimeField(db_default=Now())
    heartbeat_at = models.DateTimeField(db_default=Now(), help_text="The last batch that committed")
    finished_at = models.DateTimeField(null=True)
    read = models.BigIntegerField(default=0)
    created = models.BigIntegerField(default=0)
    merged = models.BigIntegerField(default=0)
    exists = models.BigIntegerField(default=0)
    error = models.BigIntegerField(default=0)
    error_new = models.BigIntegerField(default=0, help_text="Errors that no earlier run had with the same reason")
    revisited = models.BigIntegerField(default=0, help_text="Rows that --update looked at again")
    updated = models.BigIntegerField("changed", default=0, help_text="Rows that changed their contact")
    updated_and_kept = models.BigIntegerField(
        "kept a value as well",
        null=True,
        default=0,
        help_text="Of the rows that changed their contact; earlier versions did not count them, but as kept",
    )
    kept = models.BigIntegerField(
        "kept only",
        default=0,
        help_text="Rows that changed nothing, since the contact has another value that is not ours to change",
    )
    unchanged = models.BigIntegerField(default=0)
    census = models.JSONField(null=True, help_text="The tables at the end: rows = excluded + in the ledger + pending")
    balanced = models.BooleanField(null=True, help_text="Whether the identity held at the end")
    failure = models.TextField(null=True, help_text="Why it did not finish")
    report_lost = models.BooleanField(
        default=False, db_default=False, help_text="Its report could not be written, and no later run has told of it"
    )

    objects = RunQuerySet.as_manager()

    class Meta:
        db_table = "backfill_run"
        verbose_name = "run"
        ordering = ("-id",)
        constraints = (
            # Over a constant, not the status: a run that was paused just after another one looked keeps that one out.
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
    """Rows that were committed together, counted. Written in the same transaction as they are."""

    run = models.ForeignKey(BackfillRun, models.CASCADE, related_name="batches")
    source = models.TextField(choices=[(source.value, source.value) for source in Source])
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
    seconds = models.FloatField(help_text="From the first statement to just before the commit")
    committed_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "backfill_batch"
        verbose_name = "batch"
        verbose_name_plural = "batches"

    def __str__(self) -> str:
        return f"batch {self.pk} of run {self.run_id}"

    @classmethod
    def of(cls, run_id: int, source: Source, totals: Totals, seconds: float) -> Self:
        """A batch with these counts."""
        breakdowns = {name: dict(counts) for name, counts in totals.breakdowns.items()}
        return cls(run_id=run_id, source=source, seconds=seconds, **totals.numbers, **breakdowns)

    def totals(self) -> Totals:
        """The counts, to be added up."""
        # Earlier versions did not count all of them.
        counts: dict[str, Any] = {name: getattr(self, name) or 0 for name in NUMBERS}
        return Totals(**counts | {name: Counter(getattr(self, name)) for name in BREAKDOWNS})


class LedgerEntry(models.Model):
    """What became of one source row: exactly one entry for each row that was decided.

    The key is the contact id that the row makes (`crm.rules.mapping.contact_id`), a function of (table, row id). So
    one index holds the promise of one entry a row, finds a row's entry, and tells whether a contact is of our making:
    it is when there is an entry with its id and the outcome `created`.

    `run` has neither index nor constraint in the database: both would cost every row, and only an admin page and a
    rollback look from that side.
    """

    id = KeyField(primary_key=True)
    source = models.TextField(choices=[(source.value, source.value) for source in Source])
    source_id = models.TextField("source id")
    outcome = models.TextField(choices=[(outcome.value, outcome.value) for outcome in Outcome])
    reason = models.TextField(null=True, help_text="Why it is an error")
    contact_id = models.TextField("contact id", null=True, help_text="The contact it made, met or is in conflict with")
    run = models.ForeignKey(BackfillRun, models.DO_NOTHING, db_index=False, db_constraint=False, related_name="+")
    source_updated_at = ExactTimestampField(
        null=True, help_text="The source row's updatedAt when this was decided; an error's row may have none"
    )
    seen_updated_at = ExactTimestampField(
        null=True, help_text="The source row's updatedAt when --update last looked at it again"
    )
    filled = models.TextField(null=True, help_text="What the row filled in the contact")
    contact_updated_at = ExactTimestampField(
        null=True, help_text="The updatedAt of the contact that it was merged into, which a fill leaves as it is"
    )
    attribution_before = models.JSONField(null=True, help_text="What was replaced of an attribution that there was not")
    identity_keys = models.JSONField(
        null=True, help_text="For a conflict: the contact to which each key of the row leads, if any"
    )
    sqlstate = models.TextField(null=True, help_text="PostgreSQL's code for a row that it refused")
    constraint = models.TextField(null=True, help_text="The constraint that refused the row")
    column = models.TextField(null=True, help_text="The column that was refused")
    table = models.TextField(null=True, help_text="The table that PostgreSQL named")
    trigger = models.TextField(null=True, help_text="The trigger that refused the row")
    former = models.JSONField(
        null=True, help_text="The line before the row was made a contact again, since its contact was gone"
    )

    class Meta:
        db_table = "ledger_entry"
        verbose_name = "ledger entry"
        verbose_name_plural = "ledger"
        indexes = (
            # The rows of a contact, but for the one that made it: few, so that a first run hardly pays for it.
            models.Index(
                fields=["contact_id"], condition=Q(outcome__in=("merged", "exists")), name="ledger_entry_contact_id"
            ),
        )

    def __str__(self) -> str:
        return self.row

    @property
    def row(self) -> str:
        """The row's reference, `<table>:<id>`, the form in which log lines and commands name it."""
        return f"{Source(self.source).table}:{self.source_id}"

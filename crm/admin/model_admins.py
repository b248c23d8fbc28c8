"""The admin: contacts, runs and the ledger, read-only.

The tables may have millions of rows. So a list counts up to a bound (`read_only`), uses the order of an index and runs
no query per row; a filter accepts only its own values (`filters`).
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.db import connection, models
from django.db.models import Case, Exists, OuterRef, Q, QuerySet, Value, When
from django.forms.models import BaseInlineFormSet, model_to_dict
from django.http import HttpRequest
from django.template.loader import render_to_string
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from crm.admin.filters import (
    MADE_BY_BACKFILL,
    OUTCOMES,
    AttributedFilter,
    KindFilter,
    MadeFilter,
    OutcomeFilter,
    ReasonFilter,
    RunFilter,
    SourceFilter,
    StageFilter,
    StatusFilter,
    TypeFilter,
)
from crm.admin.read_only import NothingToChange, ReadOnlyAdmin
from crm.conflicts.remedies import IDENTITY_KEYS, keys_by_contact, remedy
from crm.models import (
    BackfillBatch,
    BackfillRun,
    ConflictResolution,
    ContactUpdate,
    CRMContact,
    Lead,
    LedgerEntry,
    Profile,
    TaxIntakeLead,
    User,
)
from crm.models.ledger import RunStatus
from crm.outcome import Outcome, Source, UpdateOutcome
from crm.postgres.facts.catalog import present_tables
from crm.postgres.snapshot import in_pages
from crm.rules.mapping import ATTRIBUTION, contact_id
from crm.rules.source_rows import SOURCE_TABLES
from crm.runs import control, lease

admin.site.site_header = admin.site.site_title = "CRM contacts backfill"
admin.site.index_title = "Contacts, runs and ledger"

MAX_ENTRIES = 100
MAX_BATCHES = 100

UPDATE_COUNTS = (
    UpdateOutcome.UPDATED.value,
    "updated_and_kept",
    UpdateOutcome.KEPT.value,
    UpdateOutcome.UNCHANGED.value,
)
CONTACT_IS_THERE = Exists(CRMContact.objects.filter(pk=OuterRef("contact_id")))
_ATTRIBUTION = tuple("rate" if name == "commission_rate" else name for name in ATTRIBUTION)
#: The tables of source rows.
SOURCE_MODELS: tuple[type[models.Model], ...] = (Profile, Lead, TaxIntakeLead, User)
ROW_SEARCH = f"The complete id of a source row (optionally after {', '.join(f'{name}:' for name in SOURCE_TABLES)})"


def row_is_there() -> Case:
    """Return whether the source row of an entry exists. None does in a database that lacks its table."""
    there = present_tables(connection, SOURCE_TABLES)
    return Case(
        *(
            When(
                source__in=Source.of_table(model._meta.db_table),
                then=Exists(model._default_manager.filter(pk=OuterRef("source_id"))),
            )
            for model in SOURCE_MODELS
            if model._meta.db_table in there
        ),
        default=Value(False),  # noqa: FBT003 - a value of SQL
    )


@admin.register(CRMContact)
class ContactAdmin(ReadOnlyAdmin):
    """All contacts, each with its ledger entries and updates."""

    list_display = (
        "email",
        "name",
        "contact_type",
        "stage",
        "made_by_the_backfill",
        "referrer_username",
        "created_at",
    )
    list_filter = (MadeFilter, TypeFilter, StageFilter, AttributedFilter)
    search_fields = ("email",)
    search_help_text = "An id, or the beginning of an email address, a first name or a last name."
    # The email has a unique index; the creation time has no index.
    ordering = ("email",)
    fieldsets = (
        (None, {"fields": ("first_name", "last_name", "email", "phone", "company")}),
        ("Backfill", {"fields": ("made_by_the_backfill", "ledger", "updates")}),
        ("CRM", {"fields": ("contact_type", "stage", "stage_entered_at", "source", "last_contacted_at")}),
        ("Assignment", {"fields": ("assigned_preparer_id", "assigned_at")}),
        ("Attribution", {"fields": (*_ATTRIBUTION, "attribution_confidence")}),
        ("Keys", {"fields": ("id", "user_id", "clerk_user_id", "created_at", "updated_at")}),
    )

    def get_queryset(self, request: HttpRequest) -> Any:
        """Annotate whether the backfill created the contact."""
        return super().get_queryset(request).annotate(made=MADE_BY_BACKFILL)

    def get_search_results(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        queryset: QuerySet[Any],
        search_term: str,
    ) -> tuple[QuerySet[Any], bool]:
        """Search by key, which uses an index; if nothing matches, by the beginnings of address and names."""
        term = search_term.strip()
        if not term:
            return queryset, False
        by_key = queryset.filter(Q(pk=term) | Q(user_id=term) | Q(clerk_user_id=term))
        if by_key.exists():
            return by_key, False
        if "@" in term:
            return queryset.filter(email__istartswith=term), False
        for word in term.split():
            queryset = queryset.filter(
                Q(email__istartswith=word) | Q(first_name__istartswith=word) | Q(last_name__istartswith=word)
            )
        return queryset, False

    @admin.display
    def name(self, contact: CRMContact) -> str:
        """Return the first and last name."""
        return f"{contact.first_name} {contact.last_name}"

    @admin.display(boolean=True, description="created by the backfill")
    def made_by_the_backfill(self, contact: Any) -> bool:
        """Return whether the backfill created the contact."""
        return bool(contact.made)

    @admin.display(description="commission rate")
    def rate(self, contact: CRMContact) -> str:
        """Return the stored rate, which may be NaN. Django would round it."""
        return "-" if contact.commission_rate is None else f"{contact.commission_rate:f}"

    @admin.display(description="ledger entries")
    def ledger(self, contact: CRMContact) -> str:
        """Return the entries of source rows that created or matched the contact, or are in conflict with it."""
        entries = LedgerEntry.objects.filter(_names_contact(contact.pk)).order_by("source", "source_id")
        found = [
            {
                "entry": entry,
                "address": _address_of(LedgerEntry, entry.pk),
                "filled": _spaced(entry.filled),
                "keys": ", ".join(keys_by_contact(entry.contact_id, entry.identity_keys).get(contact.pk, ())),
            }
            for entry in entries[: MAX_ENTRIES + 1]
        ]
        return render_to_string(
            "crm/ledger_entries.html", {"entries": found[:MAX_ENTRIES], "has_more": len(found) > MAX_ENTRIES}
        )

    @admin.display
    def updates(self, contact: CRMContact) -> str:
        """Return the changes of the contact by --update, latest first."""
        changes = ContactUpdate.objects.filter(contact_id=contact.pk).order_by("-pk")[: MAX_ENTRIES + 1]
        found = [
            {
                "address": _address_of(ContactUpdate, change.pk),
                "change": change,
                "columns": _spaced(change.columns),
            }
            for change in changes
        ]
        return render_to_string(
            "crm/contact_updates.html", {"updates": found[:MAX_ENTRIES], "has_more": len(found) > MAX_ENTRIES}
        )


class LatestBatches(BaseInlineFormSet):  # type: ignore[type-arg] # django-stubs' formsets are generic, Django's are not
    """The latest batches of a run; a long run has thousands."""

    def get_queryset(self) -> QuerySet[Any]:
        """Return the latest batches."""
        if not hasattr(self, "_queryset"):
            self._queryset = super().get_queryset()[:MAX_BATCHES]
        return self._queryset


class BatchInline(NothingToChange, admin.TabularInline):  # type: ignore[type-arg] # django-stubs' admin is generic, Django's is not
    """The batches of a run."""

    model = BackfillBatch
    formset = LatestBatches
    verbose_name_plural = f"latest batches (at most {MAX_BATCHES})"
    ordering = ("-id",)
    readonly_fields = (
        *("source", "read", *OUTCOMES, "error_new", "revisited", *UPDATE_COUNTS),
        *("seconds", "committed_at"),
    )
    fields = readonly_fields
    can_delete = False
    extra = 0


@admin.register(BackfillRun)
class RunAdmin(ReadOnlyAdmin):
    """The runs, newest first."""

    list_display = (
        "id",
        "kind",
        "status",
        "started_at",
        "duration",
        "read",
        *OUTCOMES,
        "error_new",
        "updated",
        "balanced",
        "taken_back",
    )
    list_filter = (KindFilter, StatusFilter)
    inlines = (BatchInline,)
    fieldsets = (
        (None, {"fields": ("kind", "status", "failure", "report_is_lost", "ledger")}),
        ("Rows", {"fields": ("read", *OUTCOMES, "error_new", "balanced", "tables")}),
        ("Revisited rows", {"fields": ("revisited", *UPDATE_COUNTS, "changed_by_column", "changed")}),
        ("Rollback", {"fields": ("taken_back", "rollback_runs", "counts_of_the_rollback")}),
        ("Times", {"fields": ("started_at", "heartbeat_at", "finished_at", "duration")}),
        ("Operator and version", {"fields": ("operator", "version", "rules", "legacy_schema", "generation", "asked")}),
        ("Process", {"fields": ("host", "boot_id", "pid_namespace", "process_id", "process_started")}),
    )

    @admin.display
    def duration(self, run: BackfillRun) -> str:
        """Return the duration of the run up to its end or last heartbeat."""
        return str(timedelta(seconds=round(((run.finished_at or run.heartbeat_at) - run.started_at).total_seconds())))

    @admin.display(description="report lost", boolean=True)
    def report_is_lost(self, run: BackfillRun) -> bool:
        """Return whether the run ended without a report, and no later run has reported its new errors."""
        return run.report_lost and run.status != RunStatus.RUNNING and not lease.may_be_at_work(run)

    @admin.display(description="options")
    def asked(self, run: BackfillRun) -> str:
        """Return the options of the run."""
        return _indented(run.options)

    @admin.display(description="row counts at the end")
    def tables(self, run: BackfillRun) -> str:
        """Return the row counts at the end of the run."""
        return _indented(run.census) if run.census is not None else "-"

    def get_queryset(self, request: HttpRequest) -> Any:
        """Prefetch the rollbacks of the runs."""
        return control.with_rollbacks(super().get_queryset(request))

    @admin.display(description="rollback")
    def taken_back(self, run: BackfillRun) -> str:
        """Return what a rollback reversed, or which rollbacks reversed the run."""
        return control.taken_back(run) or "-"

    @admin.display(description="related runs")
    def rollback_runs(self, run: BackfillRun) -> str:
        """Return links to the run that a rollback reversed, or to the rollbacks of the run."""
        rollback = control.rollback_of(run)
        numbers = [rollback.of_id] if rollback else control.rolled_back_by(run)
        links = ((_link(BackfillRun, number, str(number)),) for number in numbers)
        return format_html_join(", ", "{}", links) or "-"

    @admin.display(description="rollback counts")
    def counts_of_the_rollback(self, run: BackfillRun) -> str:
        """Return all counts of a rollback."""
        rollback = control.rollback_of(run)
        return _indented(model_to_dict(rollback)) if rollback else "-"

    @admin.display(description="changed by column")
    def changed_by_column(self, run: BackfillRun) -> str:
        """Return how often --update changed each column."""
        columns: Counter[str] = Counter()
        for batch in in_pages(run.batches.filter(updated__gt=0)):
            columns.update(batch.updated_by_column)
        return _indented(dict(sorted(columns.items()))) if columns else "-"

    @admin.display(description="changes")
    def changed(self, run: BackfillRun) -> SafeString:
        """Return a link to the changes by --update."""
        address = reverse("admin:crm_contactupdate_changelist")
        return format_html('<a href="{}?{}">all</a>', address, urlencode({"run": run.pk}))

    @admin.display(description="ledger entries")
    def ledger(self, run: BackfillRun) -> SafeString:
        """Return links to the ledger entries of the run."""
        address = reverse("admin:crm_ledgerentry_changelist")
        return format_html(
            '<a href="{0}?{1}">all</a>, <a href="{0}?{2}">errors</a>',
            address,
            urlencode({"run": run.pk}),
            urlencode({"run": run.pk, "outcome": Outcome.ERROR}),
        )


class ContactNamingAdmin(ReadOnlyAdmin):
    """A model whose rows contain the id of a contact."""

    def get_queryset(self, request: HttpRequest) -> Any:
        """Annotate whether the contact exists."""
        return super().get_queryset(request).annotate(contact_is_there=CONTACT_IS_THERE)

    @admin.display
    def contact(self, entry: Any) -> str:
        """Return a link to the contact, or its id if it has been deleted."""
        if entry.contact_id is None:
            return "-"
        if not entry.contact_is_there:
            return f"{entry.contact_id} (deleted)"
        return _link(CRMContact, entry.contact_id, entry.contact_id)


@admin.register(LedgerEntry)
class LedgerAdmin(ContactNamingAdmin):
    """The ledger: the outcomes of source rows."""

    list_display = ("source_row", "outcome", "reason", "contacts", "what_was_filled", "run_link", "source_updated_at")
    list_filter = (OutcomeFilter, ReasonFilter, SourceFilter, RunFilter)
    search_fields = ("source_id",)
    search_help_text = f"{ROW_SEARCH} or of a contact."
    ordering = ("id",)
    fields = (
        "source",
        "source_id",
        "outcome",
        "reason",
        "what_to_do",
        "contacts",
        "what_was_filled",
        "attribution_before",
        "run_link",
        "source_updated_at",
        "seen_updated_at",
        "seen_preparer",
        "contact_updated_at",
        "sqlstate",
        "constraint",
        "column",
        "table",
        "trigger",
        "former_values",
        "resolution",
        "id",
    )

    def get_search_results(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        queryset: QuerySet[Any],
        search_term: str,
    ) -> tuple[QuerySet[Any], bool]:
        """Search a source row by the key derived from its id; if nothing matches, the entries of a contact."""
        term = search_term.strip()
        if not term:
            return queryset, False
        by_key = queryset.filter(pk__in=_keys_of(term))
        return (by_key if by_key.exists() else queryset.filter(_names_contact(term))), False

    @admin.display(description="contact")
    def contacts(self, entry: Any) -> str:
        """Return the contact; for a conflict, all contacts that the keys of the row match, with these keys."""
        if not entry.identity_keys:
            return self.contact(entry)
        by_contact = keys_by_contact(entry.contact_id, entry.identity_keys)
        named = (
            (self._one_of_them(entry, identifier), f" ({', '.join(keys)})" if keys else "")
            for identifier, keys in by_contact.items()
        )
        return format_html_join(", ", "{}{}", named)

    def _one_of_them(self, entry: Any, identifier: str | None) -> str:
        if identifier == entry.contact_id:
            return self.contact(entry)
        return "no contact" if identifier is None else _link(CRMContact, identifier, identifier)

    @admin.display(description="remedy")
    def what_to_do(self, entry: LedgerEntry) -> str:
        """Return the remedy for an error."""
        if entry.outcome != Outcome.ERROR:
            return "-"
        return remedy(entry.row, entry.reason, entry.contact_id, entry.identity_keys)

    def get_queryset(self, request: HttpRequest) -> Any:
        """Annotate whether the source row exists."""
        return super().get_queryset(request).annotate(row_is_there=row_is_there())

    @admin.display(description="row")
    def source_row(self, entry: Any) -> str:
        """Return the row's reference, marked if the row no longer exists in the application."""
        return str(entry.row) if entry.row_is_there else f"{entry.row} (gone)"

    @admin.display(description="filled")
    def what_was_filled(self, entry: LedgerEntry) -> str:
        """Return the columns that the row filled in the contact."""
        return _spaced(entry.filled)

    @admin.display(description="previous entry")
    def former_values(self, entry: LedgerEntry) -> str:
        """Return the previous entry of a row that was migrated again."""
        return _indented(entry.former) if entry.former else "-"

    @admin.display(description="resolution")
    def resolution(self, entry: LedgerEntry) -> str:
        """Return a link to the resolution of the row's conflict, if there is one."""
        found = ConflictResolution.objects.filter(pk=entry.pk).first()
        return _link(ConflictResolution, found.pk, f"by {found.decided_by}") if found else "-"

    @admin.display(description="run")
    def run_link(self, entry: LedgerEntry) -> str:
        """Return a link to the run that processed the row."""
        return _link(BackfillRun, entry.run_id, str(entry.run_id))


@admin.register(ConflictResolution)
class ResolutionAdmin(ContactNamingAdmin):
    """The resolutions of rows in conflict."""

    list_display = ("row", "contact", "separate_email", "decided_by", "decided_at", "entry")
    search_fields = ("row",)
    search_help_text = f"{ROW_SEARCH}."
    ordering = ("id",)
    fields = ("row", "contact", "separate_email", "decided_by", "decided_at", "entry", "id")

    def get_search_results(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        queryset: QuerySet[Any],
        search_term: str,
    ) -> tuple[QuerySet[Any], bool]:
        """Search a row by the key derived from its id."""
        term = search_term.strip()
        return (queryset.filter(pk__in=_keys_of(term)) if term else queryset), False

    @admin.display(description="ledger entry")
    def entry(self, resolution: ConflictResolution) -> str:
        """Return a link to the ledger entry of the row."""
        return _link(LedgerEntry, resolution.pk, resolution.row)


@admin.register(ContactUpdate)
class ContactUpdateAdmin(ContactNamingAdmin):
    """The changes of contacts by --update."""

    list_display = ("contact", "what_was_changed", "type_change", "stage_change", "entry_link", "run_link")
    list_filter = (RunFilter,)
    search_fields = ("contact_id",)
    search_help_text = "The complete id of a contact."
    ordering = ("-id",)
    fields = (
        *("contact", "what_was_changed", "type_change", "stage_change", "stage_entered_before"),
        *("former_values", "placeholder", "attribution_before", "entry_link", "source", "source_id", "run_link"),
        *("source_updated_at", "contact_updated_at"),
    )

    def get_search_results(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        queryset: QuerySet[Any],
        search_term: str,
    ) -> tuple[QuerySet[Any], bool]:
        """Search the updates of a contact, by index."""
        term = search_term.strip()
        return (queryset.filter(contact_id=term) if term else queryset), False

    @admin.display(description="ledger entry")
    def entry_link(self, change: ContactUpdate) -> str:
        """Return a link to the entry of the source row. It has no entry while it is pending again."""
        return _link(LedgerEntry, change.line_id, change.row)

    @admin.display(description="changed")
    def what_was_changed(self, change: ContactUpdate) -> str:
        """Return the changed columns."""
        return _spaced(change.columns)

    @admin.display(description="previous values")
    def former_values(self, change: ContactUpdate) -> str:
        """Return, by column, the previous value or the row that has it."""
        return _indented(change.former) if change.former else "-"

    @admin.display(description="type")
    def type_change(self, change: ContactUpdate) -> str:
        """Return the change of the type."""
        return change.type_step

    @admin.display(description="stage")
    def stage_change(self, change: ContactUpdate) -> str:
        """Return the change of the stage."""
        return change.stage_step

    @admin.display(description="run")
    def run_link(self, change: ContactUpdate) -> str:
        """Return a link to the run."""
        return _link(BackfillRun, change.run_id, str(change.run_id))


def _names_contact(identifier: str) -> Q:
    """Match ledger entries that name a contact, also as one that a key of a row in conflict matches."""
    by_key = Q(*((f"identity_keys__{key}", identifier) for key in IDENTITY_KEYS), _connector=Q.OR)
    return Q(contact_id=identifier) | (Q(identity_keys__isnull=False) & by_key)


def _keys_of(term: str) -> list[str]:
    """Return the keys of the entries of rows that a search term may refer to."""
    table, _, source_id = term.partition(":")
    return [contact_id(named, term) for named in SOURCE_TABLES] + [contact_id(table, source_id)]


def _address_of(model: type[models.Model], key: Any) -> str | None:
    try:
        return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_change", args=[quote(key)])
    except NoReverseMatch:
        return None


def _link(model: type[models.Model], key: Any, text: str) -> str:
    address = _address_of(model, key)
    return format_html('<a href="{}">{}</a>', address, text) if address else text


def _spaced(filled: str | None) -> str:
    return ", ".join(filled.split(",")) if filled else "-"


def _indented(value: Any) -> SafeString:
    return format_html('<pre style="margin: 0">{}</pre>', json.dumps(value, indent=2))

"""The filters of the admin. Each accepts only its own values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters
from django.db import connections
from django.db.models import Exists, OuterRef, Q, QuerySet
from django.http import HttpRequest

from crm.models import BackfillRun, CRMContact, LedgerEntry
from crm.models.ledger import RunStatus
from crm.outcome import Outcome, Reason, Source

MAX_RUNS_TO_CHOOSE = 25

OUTCOMES = tuple(outcome.value for outcome in Outcome)
MADE_BY_BACKFILL = Exists(LedgerEntry.objects.filter(pk=OuterRef("pk"), outcome=Outcome.CREATED))
HAS_ATTRIBUTION = Q(referrer_username__regex=r"\S")


class ValueFilter(admin.SimpleListFilter):
    """Rows with one of a few values. Any other value in the address is refused before a query."""

    def values(self) -> Iterable[str]:
        """Return the possible values."""
        raise NotImplementedError

    def narrowed(self, queryset: QuerySet[Any], value: str) -> QuerySet[Any]:
        """Return the rows that have the value."""
        return queryset.filter(**{str(self.parameter_name): value})

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002 - Django's signature
        """Return the values, with themselves as labels."""
        return [(value, value) for value in self.values()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:  # noqa: ARG002 - Django's signature
        """Return the selected rows. Raises IncorrectLookupParameters for an unknown value."""
        value = self.value()
        if value is None:
            return queryset
        if value not in dict(self.lookup_choices):
            raise IncorrectLookupParameters
        return self.narrowed(queryset, value)


class LabelFilter(ValueFilter):
    """Rows with one of the labels of this database's enum."""

    def values(self) -> list[str]:
        """Return the labels in the order of the enum."""
        connection = connections[CRMContact.objects.db]
        enum = CRMContact._meta.get_field(str(self.parameter_name)).db_type(connection)
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT unnest(enum_range(NULL::{enum}))::text")
            return [label for (label,) in cursor.fetchall()]


class TypeFilter(LabelFilter):
    """Filter by type."""

    title = "type"
    parameter_name = "contact_type"


class StageFilter(LabelFilter):
    """Filter by stage."""

    title = "stage"
    parameter_name = "stage"


class ConditionFilter(ValueFilter):
    """Rows that meet a condition, or those that do not."""

    condition: Q | Exists

    def values(self) -> tuple[str, ...]:
        """Return yes and no."""
        return ("yes", "no")

    def narrowed(self, queryset: QuerySet[Any], value: str) -> QuerySet[Any]:
        """Return the rows that meet the condition, or the others."""
        return queryset.filter(self.condition if value == "yes" else ~self.condition)


class MadeFilter(ConditionFilter):
    """Filter by whether the backfill created the contact."""

    title = "created by the backfill"
    parameter_name = "made"
    condition = MADE_BY_BACKFILL


class AttributedFilter(ConditionFilter):
    """Filter by whether the contact has any attribution, so that a commission may be due."""

    title = "attributed"
    parameter_name = "attributed"
    condition = HAS_ATTRIBUTION


class SourceFilter(ValueFilter):
    """Filter by source."""

    title = "source"
    parameter_name = "source"

    def values(self) -> Iterable[str]:
        """Return the sources."""
        return [source.value for source in Source]


class OutcomeFilter(ValueFilter):
    """Filter by outcome."""

    title = "outcome"
    parameter_name = "outcome"

    def values(self) -> Iterable[str]:
        """Return the outcomes."""
        return OUTCOMES


class ReasonFilter(ValueFilter):
    """Filter by the reason of an error."""

    title = "reason"
    parameter_name = "reason"

    def values(self) -> Iterable[str]:
        """Return the reasons."""
        return [reason.value for reason in Reason]


class RunFilter(ValueFilter):
    """Filter by run. The list contains the latest runs, and the one in the address."""

    title = "run"
    parameter_name = "run"

    def values(self) -> Iterable[str]:
        """Return the numbers of the runs, newest first."""
        runs = [str(run) for run in BackfillRun.objects.values_list("pk", flat=True)[:MAX_RUNS_TO_CHOOSE]]
        asked = self.value()
        is_older = asked is not None and asked.isascii() and asked.isdigit() and len(asked) < 19 and asked not in runs
        return [*runs, str(asked)] if is_older else runs


class KindFilter(ValueFilter):
    """Filter by kind of run."""

    title = "kind"
    parameter_name = "kind"

    def values(self) -> Iterable[str]:
        """Return the kinds."""
        return BackfillRun.Kind.values


class StatusFilter(ValueFilter):
    """Filter by status."""

    title = "status"
    parameter_name = "status"

    def values(self) -> Iterable[str]:
        """Return the statuses."""
        return RunStatus.values

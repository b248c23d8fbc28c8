"""Common parts of all lists of the admin: they are read-only, and count rows up to a bound."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Paginator
from django.http import HttpRequest
from django.utils.functional import cached_property

#: The maximum number of rows that a list counts and shows.
MAX_COUNTED = 10_000


class BoundedPaginator(Paginator):  # type: ignore[type-arg] # django-stubs' paginator is generic, Django's is not
    """Counts up to a bound, because counting millions of rows takes long."""

    @cached_property
    def count(self) -> int:
        """The number of rows, or the bound."""
        rows: Any = self.object_list
        return int(rows.order_by()[:MAX_COUNTED].count())

    @property
    def is_bounded(self) -> bool:
        """Whether there may be more rows than were counted."""
        return self.count == MAX_COUNTED


class BoundedChangeList(ChangeList):
    """A list that does not show the bound as the number of results."""

    def get_results(self, request: HttpRequest) -> None:
        """Fetch the rows of the page."""
        super().get_results(request)
        if self.result_count == MAX_COUNTED:
            # The search box shows the number of results only if the two differ.
            self.full_result_count = self.result_count


class NothingToChange:
    """Denies every permission except viewing."""

    def has_add_permission(self, *_request: Any) -> bool:
        """Deny adding."""
        return False

    def has_change_permission(self, *_request: Any) -> bool:
        """Deny changing."""
        return False

    def has_delete_permission(self, *_request: Any) -> bool:
        """Deny deleting."""
        return False


class ReadOnlyAdmin(NothingToChange, admin.ModelAdmin):  # type: ignore[type-arg] # django-stubs' admin is generic, Django's is not
    """A read-only list of a model's rows."""

    actions = None
    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest | None = None) -> bool:  # noqa: ARG002 - Django's signature
        """Allow only the parameters of the filters, because any other would pass arbitrary values to the database."""
        return lookup in {getattr(choice, "parameter_name", None) for choice in self.list_filter}

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """Return the row with the id. None for an id with a NUL, which PostgreSQL refuses."""
        return None if "\0" in object_id else super().get_object(request, object_id, from_field)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:  # noqa: ARG002 - Django's signature
        """Return BoundedChangeList."""
        return BoundedChangeList

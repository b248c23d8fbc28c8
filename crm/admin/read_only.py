"""What all lists of the admin have in common: nobody changes anything, and a list counts only so far."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Paginator
from django.http import HttpRequest
from django.utils.functional import cached_property

#: Lists count no further, and lead no further.
MAX_COUNTED = 10_000


class BoundedPaginator(Paginator):  # type: ignore[type-arg] # django-stubs' paginator is generic, Django's is not
    """Counts up to a bound: nobody leafs through a million rows, and counting them all takes a while."""

    @cached_property
    def count(self) -> int:
        """How many rows there are, or the bound."""
        rows: Any = self.object_list
        return int(rows.order_by()[:MAX_COUNTED].count())

    @property
    def is_bounded(self) -> bool:
        """Whether there may be more rows than were counted."""
        return self.count == MAX_COUNTED


class BoundedChangeList(ChangeList):
    """A list that does not call the bound a number of results."""

    def get_results(self, request: HttpRequest) -> None:
        """Fetch the page."""
        super().get_results(request)
        if self.result_count == MAX_COUNTED:
            # The search box tells the number where the two differ.
            self.full_result_count = self.result_count


class NothingToChange:
    """No permission but to view, for anybody."""

    def has_add_permission(self, *_request: Any) -> bool:
        """Nobody adds."""
        return False

    def has_change_permission(self, *_request: Any) -> bool:
        """Nobody changes."""
        return False

    def has_delete_permission(self, *_request: Any) -> bool:
        """Nobody deletes."""
        return False


class ReadOnlyAdmin(NothingToChange, admin.ModelAdmin):  # type: ignore[type-arg] # django-stubs' admin is generic, Django's is not
    """A table to look at."""

    actions = None
    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    sortable_by = ()

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest | None = None) -> bool:  # noqa: ARG002 - Django's signature
        """The filters' own parameters: another one would bring any value before the database."""
        return lookup in {getattr(choice, "parameter_name", None) for choice in self.list_filter}

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """The row with the id; PostgreSQL refuses to look for text with a NUL in it, which no row has."""
        return None if "\0" in object_id else super().get_object(request, object_id, from_field)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:  # noqa: ARG002 - Django's signature
        """The list that counts only so far."""
        return BoundedChangeList

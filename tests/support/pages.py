"""The pages of the admin, as a browser gets them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from django.contrib.admin.utils import quote
from django.db import models
from django.test import Client
from django.urls import reverse


def address(model: type[models.Model], page: str = "changelist", *arguments: Any) -> str:
    return reverse(f"admin:crm_{model._meta.model_name}_{page}", args=arguments)


def text(html: str) -> str:
    """What a page says, without its markup."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def page(browser: Client, model: type[models.Model], key: Any) -> str:
    """The page of a row."""
    answer = browser.get(address(model, "change", quote(key)))
    assert answer.status_code == 200
    return text(answer.content.decode())


def listed(browser: Client, model: type[models.Model], **parameters: str) -> set[Any]:
    """The keys of the rows that a list shows."""
    answer = browser.get(address(model), parameters)
    assert answer.status_code == 200
    return {row.pk for row in answer.context["cl"].result_list}

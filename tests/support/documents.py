"""The documents of the project, and what is written in them."""

from __future__ import annotations

import re
from pathlib import Path

from django.conf import settings

ROOT = Path(settings.BASE_DIR)
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def section(title: str, document: str = README) -> str:
    """A section of a document, to the next heading of its rank or above."""
    heading = re.search(rf"^(#+) {title}\n", document, re.MULTILINE)
    assert heading, f"there is no section {title}"
    rest = document[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def first_cells(table: str) -> list[str]:
    """What stands in the first column of a table."""
    return [line.split("|")[1].strip(" `") for line in table.splitlines() if line.startswith("|")][2:]

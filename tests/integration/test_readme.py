"""The picture in the README is what the commands print."""

from __future__ import annotations

from django.conf import settings

from crm.sample_data.loader import load
from tests.conftest import Database
from tests.support.commands import backfill

README = (settings.BASE_DIR / "README.md").read_text(encoding="utf-8")


def test_the_readmes_picture_is_what_make_demo_prints(database: Database) -> None:
    load(10_000, "2025_10", 1)
    printed = [line.rstrip() for line in backfill("--no-progress").stdout.splitlines()]
    counted = [line for line in printed if not line.startswith(("Run ", "Total Processed", "Database: "))]
    assert len(counted) > 15
    assert "\n".join(counted) in README
    (contacts,) = (line.split()[1] for line in counted if line.startswith("  Clients"))
    assert f"created {contacts} contacts of type `CLIENT`" in README

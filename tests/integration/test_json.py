"""docs/json.md and what --json prints have the same keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from django.conf import settings
from django.db import connection

from crm.models import BackfillRun
from crm.outcome import Repair
from tests.conftest import Database
from tests.support.builders import add_contact, add_lead, add_profile, add_user, contact_with
from tests.support.commands import backfill, called
from tests.support.documents import first_cells, section

PAGE = (settings.BASE_DIR / "docs" / "json.md").read_text(encoding="utf-8")


def keys_of(title: str) -> list[str]:
    return first_cells(section(title, PAGE))


#: What the runs, rollbacks and verifications print all.
COMMON = keys_of("Common keys")


def printed(answer: dict[str, Any], page: list[str]) -> Iterator[str]:
    """The keys of an answer as the page writes them: `key.*` where the names are data, else each inner key."""
    for key, value in answer.items():
        if f"{key}.*" in page:
            assert value is None or isinstance(value, dict)
            yield f"{key}.*"
            continue
        yield key
        inner = value if isinstance(value, list) else [value]
        yield from {f"{key}.{name}" for each in inner if isinstance(each, dict) for name in each}


def assert_documented(title: str, answer: dict[str, Any], *, common: Sequence[str] = COMMON) -> None:
    page = [*common, *keys_of(title)]
    assert sorted(printed(answer, page)) == sorted(page)


def test_every_key_of_each_command_is_documented_and_the_other_way_round(database: Database) -> None:
    add_contact("carl@example.com")
    add_profile(email="ann@example.com")
    for email in ("ann@example.com", "carl@example.com", "nobody"):
        add_lead(email)
    made = backfill("--json", "--no-progress").answer["run"]
    BackfillRun.objects.update(report_lost=True)
    again = backfill("--update", "--json", "--no-progress").answer
    assert again["lost_reports"] == [{"run_id": made, "error_new": 1}]
    assert_documented("Run", again)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE crm_contacts SET phone = '1' WHERE id = %s", [contact_with("ann@example.com")["id"]])
    verified = called("verify_crm_contacts", "--json").answer
    assert verified["findings"]
    assert_documented("Verification", verified)
    for arguments in ([], ["--apply"]):
        options = [repair.option for repair in Repair]
        finished = called("repair_crm_contacts", *options, "--json", "--no-progress", *arguments)
        assert_documented("Repair", finished.answer)
    for arguments in (["--dry-run"], []):
        finished = called("rollback_crm_backfill", str(made), "--json", "--no-progress", *arguments)
        assert_documented("Rollback", finished.answer)
    (newest, *_) = json.loads(called("backfill_runs", "list", "--json").stdout)
    assert_documented("List of runs", newest, common=[])
    shown = called("backfill_runs", "show", str(newest["run"]), "--json").answer
    assert_documented("Details of a run", shown, common=keys_of("List of runs"))


def test_every_key_of_a_trace_is_documented_and_the_other_way_round(database: Database) -> None:
    lead = f"leads:{add_lead('ann@example.com')}"
    add_contact("bob@example.com", userId=add_user("account@example.com"))
    profile = f"profiles:{add_profile(email='bob@example.com')}"
    backfill("--no-progress")
    called("resolve_crm_conflict", profile, "--separate", "bob.other@example.com")
    for status in ("CONVERTED", "CONTACTED"):
        with connection.cursor() as cursor:
            cursor.execute("""UPDATE leads SET status = %s, "updatedAt" = now()""", [status])
        updated = backfill("--update", "--json", "--no-progress").answer["run"]
        if status == "CONVERTED":
            called("rollback_crm_backfill", str(updated), "--no-progress")
    page = keys_of("Trace")
    traces = [called("trace_contact", row, "--json").answer for row in (lead, profile)]
    assert sorted({key for trace in traces for key in printed(trace, page)}) == sorted(page)


def test_each_key_of_the_page_has_a_unit_and_a_meaning() -> None:
    rows = re.findall(r"^\| `.*$", PAGE, re.MULTILINE)
    assert [row for row in rows if not re.fullmatch(r"\| `[\w.*]+` \| [^|]+ \| [^|]+ \|", row)] == []

"""The command as its users meet it: arguments, both streams, exit codes, the record of a run."""

from __future__ import annotations

import getpass
import os
import re
import socket
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from config import embedded
from crm.legacy_schema import ddl
from crm.management.arguments import MAX_ROWS
from crm.models import BackfillBatch, BackfillRun, LedgerEntry
from crm.models.ledger import RunStatus
from crm.outcome import Source
from crm.runs.lease import HEARTBEAT_LASTS
from crm.version import VERSION
from tests.conftest import Database
from tests.support.builders import (
    UPDATED_AT,
    add_contact,
    add_lead,
    add_many_leads,
    add_profile,
    add_user,
    contacts,
    ledger,
)
from tests.support.circumstances import (
    acting_as,
    address_of_the_test_database,
    in_batch,
    losing_ledger_entries,
    reading_role,
    refusing_contacts,
    set_status,
    without_own_schema,
)
from tests.support.commands import Finished, backfill, called, statements
from tests.support.populations import GENERATIONS
from tests.support.processes import SECRET, address, database_url, python
from tests.support.scratch import as_the_default, scratch_database, session

NEWS_OF_SOME_OF_EVERYTHING = "run {}: 2 rows newly in error (invalid_email 2); see export_backfill_errors\n"
KEYS = {
    *("run", "status", "dry_run", "generation", "read", "created", "merged", "exists", "error", "error_new"),
    *("already", "excluded", "created_by_type", "by_source", "by_reason", "started_at", "finished_at", "seconds"),
}
OF_ONE_RUN = {"run", "dry_run", "started_at", "finished_at", "seconds"}
ATTRIBUTION = (
    *("referrerUsername", "referrerType", "commissionRate", "commissionRateLockedAt"),
    *("attributionMethod", "attributionConfidence"),
)


def add_some_of_everything() -> None:
    """Four contacts of each type to be made, one merged, one that exists, two errors, three excluded."""
    for number, (role, status, lead_type) in enumerate(
        [
            ("CLIENT", "NEW", "CUSTOMER"),
            ("TAX_PREPARER", "CONTACTED", "TAX_PREPARER"),
            ("AFFILIATE", "CONVERTED", "AFFILIATE"),
        ]
    ):
        add_profile(role, email=f"profile-{number}@example.com")
        add_lead(f"lead-{number}@example.com", status, type=lead_type)
    add_lead("profile-0@example.com", referrerUsername="ref")
    add_contact("there@example.com")
    add_lead("There@example.com")
    add_lead("not-an-address")
    add_profile(email="not-an-address-either")
    add_profile("SUPER_ADMIN", email="root@example.com")
    add_profile("LEAD", email="lead@example.com")
    add_lead("no@example.com", "DISQUALIFIED")


def figures(summary: str) -> dict[str, int]:
    """The figures of the summary by label."""
    lines = re.findall(r"^ *(\S.*?) {2,}([\d,]+)(?: .*)?$", summary, re.MULTILINE)
    return {label: int(figure.replace(",", "")) for label, figure in lines}


# The summary


def test_the_summary_has_the_labels_that_people_know_and_what_is_new(database: Database) -> None:
    add_some_of_everything()
    finished = backfill("--no-progress")
    assert finished.code == 1
    assert figures(finished.stdout) == {
        "Total Processed": 10,
        "Contacts by type": 6,
        "Clients": 2,
        "Tax Preparers": 2,
        "Affiliates": 1,
        "Leads": 1,
        "Rows by source": 10,
        "clients": 2,
        "preparers": 1,
        "affiliates": 1,
        "converted_leads": 1,
        "active_leads": 5,
        "Skipped (exists)": 2,
        "already": 0,
        "exists": 1,
        "merged": 1,
        "Assigned": 0,
        "Errors": 2,
        "invalid_email": 2,
        "Excluded": 3,
        "disqualified": 1,
        "lead": 1,
        "super_admin": 1,
    }
    assert re.search(r"Errors +2 +2 new", finished.stdout)
    assert re.search(r"invalid_email +2 +2 new, 0 known", finished.stdout)
    assert "Reconciliation: 10 read = 6 created + 1 merged + 1 exists + 2 error" in finished.stdout
    assert re.search(r"13 rows = 3 excluded \+ 10 in the ledger \+ 0 pending +\(holds\)", finished.stdout)
    assert re.search(r"Run \d+: finished in [\d.]+ s on generation 2025_10", finished.stdout)
    assert re.search(r"[\d,]+ rows/s", finished.stdout)
    assert re.search(r"Excluded +3 +not to be migrated *\n", finished.stdout)
    of_clients = backfill("--only", "clients", "--no-progress").stdout
    assert re.search(r"Excluded +3 +not to be migrated; of all sources *\n", of_clients)


def test_the_summary_of_a_second_run_says_that_there_was_nothing_to_do(database: Database) -> None:
    add_some_of_everything()
    backfill()
    finished = backfill("--no-progress")
    shown = figures(finished.stdout)
    assert (finished.code, shown["Total Processed"], shown["already"], shown["Skipped (exists)"]) == (0, 2, 8, 8)
    assert re.search(r"invalid_email +2 +0 new, 2 known", finished.stdout)


def test_the_summary_of_a_dry_run_says_that_nothing_was_written(database: Database) -> None:
    add_some_of_everything()
    dry = backfill("--dry-run", "--no-progress")
    assert "Dry run, nothing was written" in dry.stdout
    assert "would be created" in dry.stdout
    assert figures(dry.stdout) == figures(backfill("--no-progress").stdout)


def test_without_a_terminal_progress_is_lines_on_stderr(database: Database) -> None:
    add_some_of_everything()
    finished = backfill()
    assert finished.stderr == f"10 source rows to process\n{NEWS_OF_SOME_OF_EVERYTHING.format(the_run())}"
    assert "rows to process" not in finished.stdout


def test_summaries_and_json_name_the_database_and_never_the_password(database: Database) -> None:
    add_some_of_everything()
    listens, name = address(), connection.settings_dict["NAME"]
    where = {"host": listens.host, "port": listens.port, "name": name, "schema": "public"}
    with as_the_default(database_url(role=f"{embedded.USER}:hunter2")):
        number = backfill("--json", "--no-progress").answer["run"]
        for command in (
            ("backfill_crm_contacts", "--no-progress"),
            ("verify_crm_contacts",),
            ("rollback_crm_backfill", str(number), "--dry-run", "--no-progress"),
        ):
            told, shown = called(*command, "--json"), called(*command)
            assert told.answer["database"] == where
            assert f"Database: {name} on {listens.host}:{listens.port}, schema public\n" in shown.stdout
            assert "hunter2" not in "".join((told.stdout, told.stderr, shown.stdout, shown.stderr))


# --json


def test_json_is_one_object_on_stdout_and_nothing_else(database: Database) -> None:
    add_some_of_everything()
    finished = backfill("--json", "--no-progress")
    answer = finished.answer
    assert (finished.code, finished.stderr) == (1, NEWS_OF_SOME_OF_EVERYTHING.format(answer["run"]))
    assert answer.keys() >= KEYS
    assert {name: answer[name] for name in KEYS - {"run", "started_at", "finished_at", "seconds"}} == {
        "status": "finished",
        "dry_run": False,
        "generation": "2025_10",
        "read": 10,
        "created": 6,
        "merged": 1,
        "exists": 1,
        "error": 2,
        "error_new": 2,
        "already": 0,
        "excluded": {"super_admin": 1, "lead": 1, "disqualified": 1},
        "created_by_type": {"AFFILIATE": 1, "CLIENT": 2, "LEAD": 1, "PREPARER": 2},
        "by_source": {
            "clients": {"created": 1, "merged": 0, "exists": 0, "error": 1},
            "preparers": {"created": 1, "merged": 0, "exists": 0, "error": 0},
            "affiliates": {"created": 1, "merged": 0, "exists": 0, "error": 0},
            "converted_leads": {"created": 1, "merged": 0, "exists": 0, "error": 0},
            "active_leads": {"created": 2, "merged": 1, "exists": 1, "error": 1},
        },
        "by_reason": {"invalid_email": 2},
    }
    assert answer["run"] == BackfillRun.objects.get().pk
    assert answer["seconds"] > 0
    started, finished_at = (datetime.fromisoformat(answer[name]) for name in ("started_at", "finished_at"))
    assert (finished_at - started).total_seconds() == pytest.approx(answer["seconds"], abs=0.001)
    assert started.utcoffset() == timedelta(0)


def test_json_of_a_dry_run_is_that_of_the_run(database: Database) -> None:
    add_some_of_everything()
    dry = backfill("--json", "--dry-run").answer
    wet = backfill("--json").answer
    assert (dry["run"], dry["dry_run"], wet["dry_run"]) == (None, True, False)
    assert {name: dry[name] for name in KEYS - OF_ONE_RUN} == {name: wet[name] for name in KEYS - OF_ONE_RUN}


def test_json_tells_of_a_failure_too(database: Database) -> None:
    add_lead("ann@example.com")
    with refusing_contacts("53100"):
        finished = backfill("--json", "--no-progress")
    assert finished.code == 5
    assert finished.answer["status"] == "failed"
    assert "53100" in finished.answer["failure"]


# Exit codes


def test_exit_code_0_when_nothing_is_wrong(database: Database) -> None:
    add_lead("ann@example.com")
    assert backfill().code == 0


def test_exit_code_1_for_new_errors_and_0_for_known_ones(database: Database) -> None:
    lead = add_lead("not-an-address")
    assert backfill().code == 1
    assert backfill().code == 0, "a night that tells nothing new must not cry"
    database.rows("UPDATE leads SET email = 'ann@example.com' WHERE id = %s RETURNING id", lead)
    assert backfill().code == 0
    assert [line["outcome"] for line in ledger().values()] == ["created"]


def test_every_exit_code_but_0_is_explained_on_stderr_and_a_night_without_news_is_silent(database: Database) -> None:
    lead = add_lead("not-an-address")
    dry = backfill("--dry-run", "--json", "--no-progress").stderr
    assert dry == "dry run: 1 row would be newly in error (invalid_email 1)\n"
    told = backfill("--json", "--no-progress").stderr
    assert told == f"run {the_run()}: 1 row newly in error (invalid_email 1); see export_backfill_errors\n"
    for silent in (("--json", "--no-progress"), ("--no-progress",)):
        assert backfill(*silent).stderr == ""
    strict = backfill("--json", "--no-progress", "--strict").stderr
    assert strict == f"run {the_run()}: 1 row in error, none newly (invalid_email 1); see export_backfill_errors\n"
    database.rows("UPDATE leads SET email = 'ann@example.com' WHERE id = %s RETURNING id", lead)
    with refusing_contacts("53100"):
        failed = backfill("--no-progress")
    assert (failed.code, failed.stderr.count("\n")) == (5, 1)
    assert failed.stderr.startswith("The run failed: ")


def test_a_known_error_with_a_new_reason_is_new(database: Database) -> None:
    user = add_user("not-an-address")
    add_profile(userId=user)
    add_contact("ann@example.com", userId=add_user("other@example.com"))
    assert backfill().code == 1
    database.rows("UPDATE users SET email = 'ann@example.com' WHERE id = %s RETURNING id", user)
    assert backfill().code == 1
    assert [line["reason"] for line in ledger().values()] == ["conflict"]


def test_exit_code_1_for_any_error_with_strict(database: Database) -> None:
    add_lead("not-an-address")
    assert [backfill("--strict").code for _ in range(2)] == [1, 1]


def test_a_dry_run_tells_of_errors_by_the_same_code(database: Database) -> None:
    add_lead("not-an-address")
    assert backfill("--dry-run").code == 1
    backfill()
    assert backfill("--dry-run").code == 0
    assert backfill("--dry-run", "--strict").code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch-size", "0"),
        ("--batch-size", "x"),
        ("--batch-size", "1.5"),
        ("--batch-size", ""),
        ("--batch-size", "9" * 20),
        ("--batch-size", "9" * 5000),
        ("--batch-size",),
        ("--only", "nobody"),
        ("--only", "clients", "nobody"),
        ("--only",),
        ("--limit", "-1"),
        ("--limit", "0"),
        ("--limit", "9" * 20),
        ("--since", "nonsense"),
        ("--since", "2025-13-01"),
        ("--since", "2025-02-30T10:00:00"),
        ("--since", ""),
        ("--since", "0001-01-01T00:00:00+14:00"),
        ("--since", "9999-12-31T23:59:59-14:00"),
        ("--workers", "0"),
        ("--max-rate", "0"),
        ("--up",),
        ("--max-errors", "some"),
        ("--max-replica-lag", "long"),
        ("--nonsense",),
        ("nonsense",),
    ],
)
def test_exit_code_2_for_an_argument_that_is_none(database: Database, arguments: tuple[str, ...]) -> None:
    add_lead("ann@example.com")
    before = database.dump()
    finished = backfill("--json", *arguments)
    assert (finished.code, finished.stdout) == (2, "")
    *usage, message = finished.stderr.splitlines()
    assert message.startswith("manage.py backfill_crm_contacts: error: ")
    assert arguments[0].strip("-") in message
    assert all(line.startswith(("usage: ", " ")) for line in usage)
    assert database.dump() == before


@pytest.mark.parametrize("given", ["two", "0", "-1", "1.5", "AUTO"])
def test_a_number_of_workers_that_is_none_is_told_what_is_possible(given: str) -> None:
    finished = backfill(f"--workers={given}")
    assert finished.code == 2
    assert f"{given!r} is neither a whole number from 1 to {MAX_ROWS} nor auto" in finished.stderr


@pytest.mark.parametrize("given", ["two", "-1", "0", "9" * 20])
def test_a_number_of_runs_that_is_none_is_told_what_is_possible(given: str) -> None:
    finished = called("backfill_runs", "list", f"--last={given}")
    assert (finished.code, f"{given!r} is not a whole number from 1 to" in finished.stderr) == (2, True)


@pytest.mark.parametrize("status", [RunStatus.RUNNING, RunStatus.PAUSED])
def test_exit_code_3_while_another_run_holds_the_fence(database: Database, status: RunStatus) -> None:
    other = a_run(status)
    add_lead("ann@example.com")
    before = database.dump()
    finished = backfill("--json")
    assert (finished.code, finished.stdout) == (3, "")
    assert finished.stderr.count("\n") == 1
    assert f"Run {other.pk} is {'in progress' if status == RunStatus.RUNNING else 'paused'}" in finished.stderr
    assert database.dump() == before


def test_a_dry_run_needs_no_fence(database: Database) -> None:
    a_run(RunStatus.RUNNING)
    assert backfill("--dry-run").code == 0


@pytest.mark.parametrize("status", [RunStatus.PAUSED, RunStatus.CANCELLED, RunStatus.INTERRUPTED])
def test_exit_code_4_for_a_run_that_was_stopped_from_outside(database: Database, status: RunStatus) -> None:
    add_many_leads(30)
    with in_batch(2, lambda: set_status(status)):
        finished = backfill("--batch-size", "10", "--json", "--no-progress")
    assert finished.code == 4
    assert (finished.answer["status"], finished.answer["created"]) == (status, 10)
    assert len(contacts()) == len(ledger()) == 10
    (record,) = BackfillRun.objects.all()
    assert (record.status, record.created) == (status, 10)


def test_exit_code_5_for_what_waiting_does_not_cure(database: Database) -> None:
    add_lead("ann@example.com")
    with refusing_contacts("53100"):
        finished = backfill("--no-progress")
    assert finished.code == 5
    assert "The run failed: " in finished.stderr
    assert "run the command again to continue" in finished.stderr
    (record,) = BackfillRun.objects.all()
    assert (record.status, record.balanced) == (RunStatus.FAILED, True)
    assert "53100" in (record.failure or "")
    assert contacts() == {}
    assert backfill().code == 0
    assert len(contacts()) == 1


def test_exit_code_5_when_the_reconciliation_does_not_hold(database: Database) -> None:
    add_many_leads(3)
    with losing_ledger_entries():
        finished = backfill("--no-progress")
    assert finished.code == 5
    assert "(DOES NOT HOLD)" in finished.stdout
    why = "the reconciliation does not hold: the batches counted 3 rows, the ledger has 0 entries of this run"
    assert f"The run failed: {why}." in finished.stderr
    (record,) = BackfillRun.objects.all()
    assert (record.status, record.balanced, record.failure) == (RunStatus.FAILED, False, why)


def test_json_tells_that_the_reconciliation_does_not_hold(database: Database) -> None:
    add_many_leads(3)
    with losing_ledger_entries():
        answer = backfill("--json", "--no-progress").answer
    assert (answer["status"], answer["balanced"]) == ("failed", False)
    assert answer["failure"].startswith("the reconciliation does not hold: ")


# What was asked


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_an_empty_database_gives_zeros_and_exit_code_0(
    database: Database, generation: str, arguments: tuple[str, ...]
) -> None:
    database.use(generation)
    finished = backfill("--json", *arguments)
    assert finished.code == 0
    assert (finished.answer["status"], finished.answer["generation"]) == ("finished", generation)
    counts = {name: value for name, value in finished.answer.items() if name in KEYS - OF_ONE_RUN}
    assert {name: value for name, value in counts.items() if value} == {"status": "finished", "generation": generation}
    shown = backfill(*arguments)
    assert shown.code == 0
    assert set(figures(shown.stdout).values()) == {0}


@pytest.mark.parametrize("batch_size", [2, 5, 1000])
def test_known_errors_leave_a_limit_to_the_rows_that_are_new(database: Database, batch_size: int) -> None:
    for number in range(7):
        add_lead(f"no address {number}", createdAt=f"2020-01-0{number + 1}")
    assert backfill("--json", "--limit", "99").answer["error_new"] == 7
    add_many_leads(5)
    options = ("--json", "--limit", "3", "--batch-size", str(batch_size))
    dry = backfill(*options, "--dry-run").answer
    first, second = backfill(*options).answer, backfill(*options).answer
    assert (dry["created"], dry["error_new"]) == (first["created"], first["error_new"]) == (3, 0)
    assert (second["created"], second["error"]) == (2, 7)


@pytest.mark.parametrize(("limit", "batch_size"), [(1, 10), (7, 3), (9, 3), (10, 10), (99, 4)])
def test_a_limit_is_the_number_of_rows_that_are_looked_at(database: Database, limit: int, batch_size: int) -> None:
    add_many_leads(10, "CONVERTED")
    add_many_leads(10, first=11)
    options = ("--json", "--limit", str(limit), "--batch-size", str(batch_size))
    assert backfill(*options, "--dry-run").answer["read"] == min(limit, 20)
    assert backfill(*options).answer["read"] == len(contacts()) == min(limit, 20)
    assert backfill("--json").answer["read"] == 20 - min(limit, 20)


def test_a_batch_has_no_more_rows_than_asked_for(database: Database) -> None:
    add_many_leads(10)
    backfill("--batch-size", "4")
    assert list(BackfillBatch.objects.order_by("id").values_list("read", flat=True)) == [4, 4, 2]


@pytest.mark.parametrize(
    ("since", "read"),
    [
        ("2025-03-01", ["at", "after"]),
        ("2025-03-01T00:00:00", ["at", "after"]),
        ("2025-03-01 00:00:00.001", ["after"]),
        ("2025-03-01T02:00:00+02:00", ["at", "after"]),
        ("2025-03-01T00:00:00Z", ["at", "after"]),
        ("2025-04-01", []),
    ],
)
def test_since_looks_at_no_row_that_has_not_changed_since(database: Database, since: str, read: list[str]) -> None:
    for name, moment in (
        ("before", "2025-02-28 23:59:59.999"),
        ("at", "2025-03-01 00:00:00"),
        ("after", "2025-03-02 00:00:00"),
    ):
        add_lead(f"{name}@example.com", updatedAt=moment)
        add_profile(email=f"{name}-profile@example.com", updatedAt=moment)
    assert backfill("--json", "--since", since).answer["read"] == 2 * len(read)
    expected = [f"{name}{kind}@example.com" for name in read for kind in ("", "-profile")]
    assert sorted(contact["email"] for contact in contacts().values()) == sorted(expected)
    assert backfill("--json").answer["read"] == 6 - 2 * len(read), "what was left out is still pending"


def test_only_looks_at_the_sources_that_are_named_in_the_order_of_a_run(database: Database) -> None:
    add_some_of_everything()
    answer = backfill("--json", "--only", "active_leads", "clients").answer
    assert list(answer["by_source"]) == ["clients", "active_leads"]
    assert {line["source"] for line in ledger().values()} == {"clients", "active_leads"}
    assert answer["balanced"] is True
    assert backfill("--json").answer["already"] == answer["read"] - answer["error"]


# The record


def test_a_run_is_recorded(database: Database) -> None:
    add_some_of_everything()
    before = timezone.now()
    options = ("--only", "active_leads", "clients", "--limit", "100", "--since", "2024-01-01", "--batch-size", "3")
    answer = backfill("--json", *options).answer
    record = BackfillRun.objects.get()
    asked = {"only": ["clients", "active_leads"], "limit": 100, "since": "2024-01-01 00:00:00", "batch_size": 3}
    assert {name: record.options[name] for name in asked} == asked
    assert (record.kind, record.status, record.version, record.generation) == (
        BackfillRun.Kind.BACKFILL,
        RunStatus.FINISHED,
        VERSION,
        "2025_10",
    )
    assert (record.operator, record.host, record.process_id) == (getpass.getuser(), socket.gethostname(), os.getpid())
    counters = ("read", "created", "merged", "exists", "error", "error_new")
    assert {name: getattr(record, name) for name in counters} == {name: answer[name] for name in counters}
    assert record.finished_at is not None
    assert before - HEARTBEAT_LASTS < record.started_at <= record.heartbeat_at <= record.finished_at
    assert (record.balanced, record.failure) == (True, None)


def test_the_census_at_the_end_is_stored_with_the_run(database: Database) -> None:
    add_some_of_everything()
    backfill("--only", "clients")
    (record,) = BackfillRun.objects.all()
    none = {source.value: 0 for source in Source}
    assert record.census == {
        "rows": 13,
        "excluded": {"disqualified": 1, "lead": 1, "super_admin": 1},
        "settled": none | {"clients": 1},
        "errors": none | {"clients": 1},
        "pending": none | {"preparers": 1, "affiliates": 1, "converted_leads": 1, "active_leads": 5},
        "lines": {"created": 1, "merged": 0, "exists": 0, "error": 1},
        "faults": {},
        "contacts_gone": 0,
    }


def test_every_line_of_the_ledger_tells_where_from_when_and_in_which_run(database: Database) -> None:
    lead = add_lead("ann@example.com")
    backfill()
    entry = LedgerEntry.objects.get()
    assert (entry.row, entry.source, entry.outcome, entry.run) == (
        f"leads:{lead}",
        "active_leads",
        "created",
        BackfillRun.objects.get(),
    )
    assert entry.source_updated_at.isoformat(" ", "milliseconds") == f"{UPDATED_AT}+00:00"
    assert entry.contact_id in contacts()


# A dry run


def test_a_dry_run_writes_nothing_at_all(database: Database) -> None:
    add_some_of_everything()
    before = database.dump()
    with statements() as sent:
        assert backfill("--dry-run", "--json").answer["created"] == 6
    assert database.dump() == before
    assert {statement.sql.split()[0] for statement in sent} == {"SELECT", "WITH", "SET", "DECLARE", "FETCH", "CLOSE"}


def test_a_dry_run_works_where_nothing_can_be_written(database: Database) -> None:
    add_some_of_everything()
    with reading_role(database) as role:
        database.change(f"ALTER ROLE {role} SET default_transaction_read_only = on")
        with acting_as(role):
            assert backfill("--dry-run", "--json").answer["created"] == 6


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("migrated", [True, False])
def test_a_dry_run_needs_nothing_but_to_read_the_applications_tables(
    database: Database, generation: str, *, migrated: bool
) -> None:
    database.use(generation)
    if not migrated:
        database.change("ALTER TABLE crm_contacts " + ", ".join(f'DROP COLUMN "{name}"' for name in ATTRIBUTION))
    add_contact("there@example.com")
    add_lead("There@example.com")
    add_lead("ann@example.com", referrerUsername="ref")
    add_lead("Ann@example.com", "CONVERTED")
    add_profile("CLIENT" if generation == "2025_10" else "client", email="ann@example.com")
    own_schema = nullcontext() if migrated else without_own_schema()
    with reading_role(database) as role, own_schema, acting_as(role):
        finished = backfill("--dry-run", "--json", "--no-progress")
    assert (finished.code, finished.stderr) == (0, "")
    assert {name: finished.answer[name] for name in ("created", "merged", "exists", "generation")} == {
        "created": 1,
        "merged": 2,
        "exists": 1,
        "generation": generation,
    }


def test_a_dry_run_that_may_not_read_the_ledger_says_so(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    backfill()
    with reading_role(database) as role:
        with acting_as(role):
            backfill("--dry-run")
        assert "this role may not read the ledger" in caplog.text
        caplog.clear()
        with without_own_schema(), acting_as(role):
            backfill("--dry-run")
        assert caplog.text == "", "before `migrate` every row is new"


@pytest.mark.process
def test_what_a_careful_operator_does_first() -> None:
    """The real command, over a role that may only read, before anything of ours has touched the database."""
    with scratch_database("careful") as database:
        with session(database) as owner:
            owner.execute(ddl("2025_12").encode())
            owner.execute("INSERT INTO users (id, email, \"updatedAt\") VALUES ('u', 'Ann@example.com', now())")
            owner.execute(
                "INSERT INTO profiles (id, \"userId\", role, \"updatedAt\") VALUES ('p', 'u', 'tax_preparer', now())"
            )
            owner.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {database.role}".encode())
            owner.commit()
        arguments = ("manage.py", "backfill_crm_contacts", "--dry-run", "--json", "--no-progress")
        result = python(*arguments, DATABASE_URL=database.url(role=database.role), SECRET_KEY=SECRET)
        schemas = database.execute("SELECT nspname::text FROM pg_namespace WHERE nspname = 'crm_backfill'")
    finished = Finished(result.returncode, result.stdout, result.stderr)
    assert (finished.code, finished.stderr) == (0, "")
    assert (finished.answer["generation"], finished.answer["created_by_type"]) == ("2025_12", {"PREPARER": 1})
    assert schemas == []


# No personal data


def test_no_persons_data_is_told_or_kept(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    secrets = ("zyxxy", "qwertz", "5550199", "vwxyzco", "refname", "landing9")
    person: dict[str, Any] = {"firstName": "Zyxxy", "lastName": "Zyxxy", "phone": "5550199"}
    add_profile(email="qwertz@example.com", companyName="VwxyzCo", **person)
    add_lead("Qwertz@example.com", referrerUsername="refname", source="landing9", **person)
    add_lead("qwertz is none", **person)
    add_lead("qwertz-refused@example.com", **(person | {"lastName": "Zyxxy-refused"}))
    add_contact("qwertz2@example.com", userId=add_user("qwertz3@example.com"))
    add_profile(email="qwertz2@example.com", **person)
    database.change("""ALTER TABLE crm_contacts ADD CONSTRAINT refuses CHECK ("lastName" <> 'Zyxxy-refused')""")
    finished = [backfill("--dry-run"), backfill(), backfill("--json"), a_failed_run(person)]
    assert BackfillRun.objects.order_by("id")[0].error == 3, "a refused row, a conflict, an invalid address"
    told = "".join(one.stdout + one.stderr for one in finished) + caplog.text
    kept = str(database.dump("ledger_entry", "backfill_run", "backfill_batch"))
    assert "data_error" in kept
    assert [secret for secret in secrets if secret in (told + kept).lower()] == []


# The command in a process of its own


@pytest.mark.process
def test_the_real_command_prints_its_answer_to_stdout_and_to_stderr_nothing_but_news(database: Database) -> None:
    add_some_of_everything()
    asked = ("backfill_crm_contacts", "--json", "--no-progress", "--max-rate", "50")
    result = python("manage.py", *asked, **address_of_the_test_database())
    assert result.returncode == 1
    assert Finished(result.returncode, result.stdout, result.stderr).answer["read"] == 10
    assert result.stderr == NEWS_OF_SOME_OF_EVERYTHING.format(the_run())
    assert len(contacts()) == 7


# What the tests arrange


def the_run() -> int:
    return BackfillRun.objects.latest("pk").pk


def a_run(status: RunStatus) -> BackfillRun:
    """Somebody's run, whose process (this one) is alive."""
    return BackfillRun.objects.create(
        status=status,
        version="1",
        generation="2025_10",
        operator="somebody",
        host=socket.gethostname(),
        process_id=os.getpid(),
    )


def a_failed_run(person: dict[str, Any]) -> Finished:
    add_lead("qwertz4@example.com", **person)
    with refusing_contacts("53100"):
        return backfill()

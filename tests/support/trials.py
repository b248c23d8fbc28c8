"""Commands whose line to the server is cut at one statement, and what they come to: the same as if it had not been.

A scenario says what there is before a command and which command it is. Its tables are put aside once, and put back
before every trial, down to the numbers that sequences give next: so reports, lists and tables are comparable whole.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.outcome import Repair
from crm.repair.runner import repair_contacts
from crm.runs import retrying
from tests.conftest import Database
from tests.support.builders import LATER, add_contact, add_lead, add_many_leads, add_profile, add_user
from tests.support.commands import Finished, called, run
from tests.support.processes import manage
from tests.support.wire import Cut, Place, Wire, wait_for_the_server, wire, wired

#: What differs from one go to the next: moments, processes, and numbers that a transaction which was lost has used up.
_CHANCE = ("started_at", "heartbeat_at", "finished_at", "committed_at", "decided_at", "seconds", "process_id")
_NUMBERED = ("backfill_batch", "contact_update")
#: Tables that tell how the work was divided.
_DIVIDED = ("backfill_run", "backfill_batch")
#: A file that a command is to write; where it is differs from one trial to the next.
LIST = "LIST"


@dataclass(frozen=True, slots=True)
class End:
    """What a command came to: its exit code, report and list, and every row of every table."""

    code: object
    report: Any
    listed: list[list[str]]
    tables: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What there is before a command, which returns the command."""

    name: str
    prepare: Callable[[], list[str]]

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True)
class Bench:
    """A scenario, ready for as many trials as one likes."""

    database: Database
    command: list[str]
    end: End
    before: dict[str, list[str]]
    places: dict[Place, str]

    def trial(self, cut: Cut) -> str | None:
        """Run the command over a line that is cut; what is wrong with what it came to, if anything is."""
        _put_back(self.database)
        with wired(cut) as line:
            finished, listed = carried_out(self.command)
        if not line.was_cut:
            return "the command never came there"
        if is_refusal(finished):
            if _tables(self.database) != self.before:
                return f"it said that nothing was written, and something was: {finished.stderr}"
            # What was rolled back may have used up a number.
            _put_back(self.database)
            finished, listed = carried_out(self.command)
        return _difference(self.end, _end(self.database, finished, listed))

    def trial_of_processes(self, cut: Cut, *arguments: str) -> str | None:
        """The same as a process, with more arguments; how the work is divided into batches may differ then."""
        _put_back(self.database)
        with wire(cut) as (line, url):
            process = manage(*self.command, *arguments, url=url)
        wait_for_the_server()
        if not line.was_cut:
            return "the command never came there"
        end = _end(self.database, Finished(process.returncode, process.stdout, process.stderr), [])
        tables = {name: rows for name, rows in self.end.tables.items() if name not in _DIVIDED}
        return _difference(replace(self.end, tables=tables), end)


@contextmanager
def bench(database: Database, scenario: Scenario) -> Iterator[Bench]:
    """Put up a scenario, and see what its command comes to when nobody disturbs it."""
    command = scenario.prepare()
    before = _tables(database)
    with _put_aside(database):
        with wired() as line:
            finished, listed = carried_out(command)
        end = _end(database, finished, listed)
        # Once more, to be certain that nothing but the cuts makes a difference.
        _put_back(database)
        assert _tables(database) == before
        again: Wire
        with wired() as again:
            finished, listed = carried_out(command)
        difference = _difference(end, _end(database, finished, listed))
        assert difference is None, difference
        assert set(again.sent) == set(line.sent)
        _put_back(database)
        yield Bench(database, command, end, before, line.sent)


@contextmanager
def impatience() -> Iterator[None]:
    """Let no try wait for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrying, "WAITS_BEFORE_ANOTHER_LOOK", (0.001, 0.001))
        patch.setattr(retrying, "MAX_RETRIES", 5)
        yield


def carried_out(command: list[str]) -> tuple[Finished, list[list[str]]]:
    """Run a command in this process; how it ended, and what it listed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.csv"
        finished = called(*[str(path) if argument == LIST else argument for argument in command])
        connection.close()
        if not path.exists():
            return finished, []
        with path.open(newline="", encoding="utf-8") as file:
            return finished, sorted(csv.reader(file))


def is_refusal(finished: Finished) -> bool:
    """Whether it told in one line that it has done nothing."""
    return finished.code in (2, 5) and finished.stdout == "" and finished.stderr.count("\n") == 1


def _end(database: Database, finished: Finished, listed: list[list[str]]) -> End:
    return End(finished.code, _report(finished.stdout), listed, _tables(database))


def _report(stdout: str) -> Any:
    try:
        report = json.loads(stdout)
    except ValueError:
        return stdout
    if not isinstance(report, dict):
        return report
    # Each line has a folder of its own.
    return {name: value for name, value in report.items() if name not in (*_CHANCE, "database")}


def _difference(expected: End, end: End) -> str | None:
    told = []
    for name in ("code", "report", "listed"):
        before, after = getattr(expected, name), getattr(end, name)
        if before != after:
            told.append(f"{name}: {_describe(before, after)}")
    told += [
        f"{table}: {_describe(rows, end.tables[table])}"
        for table, rows in expected.tables.items()
        if rows != end.tables[table]
    ]
    return "; ".join(told) or None


def _describe(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        return str(
            {name: (before.get(name), after.get(name)) for name in before if before.get(name) != after.get(name)}
        )
    if isinstance(before, list) and isinstance(after, list):
        missing, more = [row for row in before if row not in after], [row for row in after if row not in before]
        return f"{len(before)} -> {len(after)} rows, missing {missing[:3]}, more {more[:3]}"
    return f"{before!r} -> {after!r}"


def _tables(database: Database) -> dict[str, list[str]]:
    tables = {}
    for table in database.tables():
        chance = [*_CHANCE, "id"] if table in _NUMBERED else list(_CHANCE)
        tables[table] = [
            row
            for (row,) in database.rows(f"SELECT (to_jsonb(t) - %s::text[])::text FROM {table} t ORDER BY 1", chance)
        ]
    return tables


@contextmanager
def _put_aside(database: Database) -> Iterator[None]:
    statements = ["DROP SCHEMA IF EXISTS aside CASCADE", "CREATE SCHEMA aside"]
    statements += [f"CREATE TABLE aside.{table} AS TABLE {table}" for table in database.tables()]
    statements.append(
        "CREATE TABLE aside.sequences AS SELECT format('%I.%I', schemaname, sequencename)::regclass::oid AS sequence, "
        "last_value FROM pg_sequences WHERE schemaname = 'crm_backfill'"
    )
    _execute(*statements)
    try:
        yield
    finally:
        _execute("DROP SCHEMA aside CASCADE")


def _put_back(database: Database) -> None:
    database.empty()
    _execute(
        *(
            f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM aside.{table}"
            for table in reversed(database.tables())
        ),
        "SELECT setval(sequence::regclass, COALESCE(last_value, 1), last_value IS NOT NULL) FROM aside.sequences",
    )


def _execute(*statements: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("; ".join(statements))


# Scenarios


def _change(statement: str, *parameters: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters or None)


def _resolve(*arguments: str) -> None:
    assert called("resolve_crm_conflict", *arguments).code == 0


def _first_night() -> list[str]:
    """A run that makes contacts, and has errors and three conflicts; the rows in conflict."""
    add_many_leads(3)
    add_lead("not an address")
    add_lead("nor is this")
    conflicts = []
    for number in range(3):
        address = f"shared-{number}@example.com"
        add_contact(address, id=f"theirs{number}", userId=add_user(f"other-{number}@example.com"))
        conflicts.append(f"profiles:{add_profile(email=address)}")
    assert run()["by_reason"] == {"conflict": 3, "invalid_email": 2}
    return conflicts


def _day() -> None:
    """After the first night: resolutions, and rows that make contacts, meet ours and others', and are in error."""
    first, second, _ = _first_night()
    _resolve(first, "--contact", "theirs0")
    _resolve(second, "--separate", "separate@example.com")
    add_many_leads(12, first=10)
    add_many_leads(4, "CONVERTED", first=8)
    add_contact("Person-12@example.com")
    add_contact("person-13@example.com")
    add_lead("no address either")
    add_lead("person-2@example.com", referrerUsername="ref")
    for number in (1, 11, 12, 30):
        add_profile(email=f"person-{number}@example.com", companyName="A company")
    add_profile("TAX_PREPARER", email="preparer@example.com")
    add_profile("AFFILIATE")
    add_profile("ADMIN", email="admin@example.com")


def _news() -> None:
    """After a run: rows that changed, contacts that people touched, and rows that are new."""
    _day()
    add_profile(userId=add_user(" ", id="no-address"))
    assert run()["created"] > 10
    _change(
        """UPDATE leads SET status = 'CONVERTED', "referrerUsername" = 'ref', "updatedAt" = %s
                WHERE id ~ '^new.*[02468]$'""",
        LATER,
    )
    _change("""UPDATE users SET email = 'late@example.com', "updatedAt" = '2099-01-01' WHERE id = 'no-address'""")
    _change("""UPDATE profiles SET phone = '555 0155', "updatedAt" = %s""", LATER)
    _change("""UPDATE crm_contacts SET phone = '555 0199', "updatedAt" = %s WHERE email ~ 'person-1[46]@'""", LATER)
    add_many_leads(5, first=40)


def _touch() -> None:
    """People edit, refer to and delete some of the contacts."""
    _change(
        """UPDATE crm_contacts SET "firstName" = 'Edited', "updatedAt" = %s WHERE email ~ 'person-(15|18|40)@'""", LATER
    )
    _change("""INSERT INTO crm_interactions (id, "contactId", type, "updatedAt")
               SELECT 'interaction' || id, id, 'NOTE', now() FROM crm_contacts WHERE email ~ 'person-(17|41)@'""")
    _change("DELETE FROM crm_contacts WHERE email ~ 'person-(19|42)@'")


def _backfill() -> list[str]:
    _day()
    return ["backfill_crm_contacts", "--batch-size", "4", "--json", "--no-progress"]


def _update() -> list[str]:
    _news()
    return ["backfill_crm_contacts", "--update", "--batch-size", "4", "--json", "--no-progress"]


def _rollback_of(number: int) -> list[str]:
    return ["rollback_crm_backfill", str(number), "--batch-size", "4", "--json", "--no-progress", "--csv", LIST]


def _rollback() -> list[str]:
    """Of a run on whose contacts a later one merged."""
    _day()
    number = run()["run"]
    add_lead("person-20@example.com", referrerUsername="ref")
    add_lead("preparer@example.com", referrerUsername="ref")
    assert run()["merged"] == 2
    _touch()
    return _rollback_of(number)


def _rollback_of_updates() -> list[str]:
    _news()
    answer = run(update=True)
    assert answer["updated"] > 5
    assert answer["created"] >= 5
    _touch()
    return _rollback_of(answer["run"])


def _repairs(number: int) -> None:
    """So many contacts of the old script, with everything that can be repaired, and one that keeps its address."""
    user = add_user("a-preparer@example.com")
    add_profile("TAX_PREPARER", userId=user)
    for each in range(number):
        profile = add_profile("AFFILIATE", email=f"affiliate-{each}@example.com")
        email = f"client-{profile}@unknown.com"
        moments = dict.fromkeys(("createdAt", "updatedAt"), LATER)
        add_contact(email, contactType="CLIENT", source="backfill", assignedPreparerId=user, **moments)
    add_contact("Affiliate-1@Example.com", assignedPreparerId="nobody")


def _repair() -> list[str]:
    _repairs(9)
    options = [repair.option for repair in Repair]
    return ["repair_crm_contacts", *options, "--apply", "--batch-size", "4", "--json", "--no-progress", "--csv", LIST]


def _rollback_of_repair() -> list[str]:
    _repairs(9)
    report = repair_contacts(list(Repair), apply=True)
    assert report.totals.updated == 26
    _change("""UPDATE crm_contacts SET phone = '555 0199', "updatedAt" = now() WHERE email ~ 'affiliate-[35]@'""")
    return _rollback_of(report.run_id or 0)


def _belongs_to() -> list[str]:
    return ["resolve_crm_conflict", _first_night()[0], "--contact", "theirs0"]


def _is_separate() -> list[str]:
    row = _first_night()[1]
    _resolve(row, "--contact", "theirs0")
    return ["resolve_crm_conflict", row, "--separate", "separate@example.com"]


def _acted_on(action: str, status: RunStatus) -> list[str]:
    """A run that another machine is at."""
    going = BackfillRun.objects.create(
        status=status, version="1", generation="2025_10", operator="somebody", host="elsewhere", process_id=1
    )
    return ["backfill_runs", action, str(going.pk)]


def _exported() -> list[str]:
    _day()
    run()
    return ["export_backfill_errors", "--with-email", "--output", LIST]


def _verified() -> list[str]:
    _rollback_of_updates()
    return ["verify_crm_contacts", "--json", "--csv", LIST]


BACKFILL = Scenario("backfill", _backfill)
PAUSE = Scenario("pause", lambda: _acted_on("pause", RunStatus.RUNNING))
SCENARIOS = [
    BACKFILL,
    Scenario("update", _update),
    Scenario("rollback", _rollback),
    Scenario("rollback of updates", _rollback_of_updates),
    Scenario("repair", _repair),
    Scenario("rollback of a repair", _rollback_of_repair),
    Scenario("belongs to", _belongs_to),
    Scenario("is separate", _is_separate),
    PAUSE,
    Scenario("resume", lambda: _acted_on("resume", RunStatus.PAUSED)),
    Scenario("cancel", lambda: _acted_on("cancel", RunStatus.RUNNING)),
    Scenario("show", lambda: [*_acted_on("show", RunStatus.PAUSED), "--json"]),
    Scenario("export", _exported),
    Scenario("verify", _verified),
]

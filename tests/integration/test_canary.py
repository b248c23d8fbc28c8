"""Nobody's data leaves the tables: all that is known of people carries a mark, and no failure tells it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.db import DataError, connection
from django.db.models import Model
from django.test import Client
from django.urls import reverse

from crm.backfill import context
from crm.models import BackfillRun, CRMContact, LedgerEntry
from crm.postgres.transactions import Timeouts
from crm.runs import retrying
from tests.conftest import OWN_TABLES, Database
from tests.support.builders import (
    add_contact,
    add_intake,
    add_lead,
    add_many_leads,
    add_profile,
    add_user,
    assign_client,
)
from tests.support.circumstances import refusing_contacts
from tests.support.commands import backfill, called, run
from tests.support.processes import database_url, manage, server_log, session

INSERTS_CONTACTS = 'INSERT INTO "crm_contacts"'
MARK = "canary7q"
#: The mark in every text that a person may have given.
PERSON = {"firstName": f"First{MARK}", "lastName": f"Last{MARK}", "phone": f"555{MARK}"}
LEAD = PERSON | {
    name: f"{name}{MARK}"
    for name in (
        *("source", "referrerUsername", "referrerType", "attributionMethod", "message", "contactNotes", "userAgent"),
        *("utmCampaign", "assignedPreparerId", "taxSituation", "ptin"),
    )
}
INTAKE = {
    name: f"{name}{MARK}"
    for name in (
        *("first_name", "last_name", "middle_name", "phone", "country_code", "address_line_1", "city", "contactNotes"),
        *("referrerUsername", "referrerType", "attributionMethod", "assignedPreparerId"),
    )
} | {"full_form_data": f'{{"ssn": "{MARK}"}}'}
QUOTING = f"""
    CREATE FUNCTION public.quoting() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.email LIKE 'trigger%' THEN
            RAISE EXCEPTION 'no %', NEW.email USING ERRCODE = '23514', DETAIL = NEW."firstName", HINT = NEW.phone,
                CONSTRAINT = NEW.email, COLUMN = NEW."lastName", TABLE = NEW.phone, SCHEMA = NEW.email,
                DATATYPE = NEW."firstName";
        END IF;
        RAISE WARNING 'seen {MARK} %', NEW.email;
        RETURN NEW;
    END $$;
    CREATE TRIGGER quoting BEFORE INSERT OR UPDATE ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.quoting()
"""


def populate() -> None:
    """Rows that end in every outcome and every error."""
    clerk_id = f"clerk{MARK}"
    for number in range(3):
        add_profile(email=f"person-{number}@{MARK}.example", companyName=f"Company {MARK}", **PERSON)
        add_lead(f"person-{number}@{MARK}.example", **LEAD)
        add_lead(f"lead-{number}@{MARK}.example", **LEAD)
        add_intake(f"person-{number}@{MARK}.example", **INTAKE)
        add_intake(f"intake-{number}@{MARK}.example", **INTAKE)
    for kind in ("check", "trigger"):
        add_profile(email=f"{kind}@{MARK}.example", companyName=f"Company {MARK}", **PERSON)
        add_lead(f"{kind}-lead@{MARK}.example", **LEAD)
        add_intake(f"{kind}-intake@{MARK}.example", **INTAKE)
    add_profile(email=f"not an address {MARK}", **PERSON)
    add_lead(f"not an address {MARK}", **LEAD)
    add_intake(f"not an address {MARK}", **INTAKE)
    add_lead(f"rate@{MARK}.example", **LEAD | {"commissionRate": "99.50"})
    add_contact(f"Conflict@{MARK}.example", clerkUserId=clerk_id, company=MARK, **PERSON)
    add_profile(email=f"conflict@{MARK}.example", clerkUserId=f"other{MARK}", **PERSON)
    add_contact(f"there@{MARK}.example", userId=add_user(f"account@{MARK}.example"), **PERSON)
    add_lead(f"There@{MARK}.example", **LEAD)
    codes = {"trackingCode": LEAD["referrerUsername"], "customTrackingCode": MARK, "shortLinkUsername": f"link{MARK}"}
    preparer = add_profile("TAX_PREPARER", **codes, **PERSON)
    assign_client(add_profile(email=f"client@{MARK}.example", **PERSON), preparer)
    for add, row in ((add_lead, LEAD), (add_intake, INTAKE)):
        row = {name: value for name, value in row.items() if name != "assignedPreparerId"}
        add(f"referred-{add.__name__}@{MARK}.example", **row | {"referrerUsername": LEAD["referrerUsername"]})


def put_obstacles(database: Database) -> None:
    database.change("ALTER TABLE crm_contacts ADD CONSTRAINT no_such_people CHECK (email NOT LIKE 'check%')")
    database.change('ALTER TABLE crm_contacts ALTER "commissionRate" TYPE numeric(3,2)')
    database.change(QUOTING)


#: What triggers and functions of the application write into the server's log in their own words.
THEIR_OWN_WORDS = re.compile(
    r"^.*(WARNING:  seen |ERROR:  no room for |ERROR:  no [^ ]+@).*$|^.*DETAIL:  First[^ ]*$", re.MULTILINE
)


class Overheard:
    """Everything that anybody may read who has no right to the tables of the application."""

    def __init__(
        self,
        database: Database,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
        logged: Callable[[], str],
    ) -> None:
        self._logged = logged
        self._database = database
        self._caplog = caplog
        self._capfd = capfd
        self._printed: list[str] = []

    def command(self, *arguments: str) -> object:
        """The backfill, in this process; its exit code."""
        finished = backfill(*arguments)
        self._printed += [finished.stdout, finished.stderr]
        return finished.code

    def process(self, *arguments: str) -> int:
        """Any command as an operator runs it; its exit code."""
        finished = manage(*arguments, url=database_url())
        self._printed += [finished.stdout, finished.stderr]
        return finished.returncode

    def logged(self) -> str:
        """What the server has logged."""
        return self._logged()

    def heard(self, *texts: str) -> None:
        """What was told otherwise."""
        self._printed += texts

    def look(self, *arguments: str) -> None:
        """A command that shows something."""
        shown = StringIO()
        with redirect_stdout(shown), redirect_stderr(shown), suppress(SystemExit):
            call_command(*arguments, stdout=shown, stderr=shown)
        self._printed.append(shown.getvalue())

    def page(self, browser: Client, model: type[Model], page: str = "changelist", *key: Any, **query: str) -> int:
        """A page of the admin; its status."""
        answer = browser.get(
            reverse(f"admin:crm_{model._meta.model_name}_{page}", args=[quote(one) for one in key]), query
        )
        self._printed.append(answer.content.decode())
        return answer.status_code

    def assert_nothing_of_people(self) -> None:
        told = [*self._printed, *self._capfd.readouterr(), self._caplog.text]
        told += THEIR_OWN_WORDS.sub("", self._logged()).splitlines()
        for record in self._caplog.records:
            told += [record.getMessage(), repr(record.args), repr(record.exc_info)]
        for rows in self._database.dump(*OWN_TABLES, "django_admin_log").values():
            told += [str(row) for row in rows]
        assert sum(map(len, told)) > 1000, "a lot was told"
        found = [text for text in told if MARK in text.lower()]
        assert found == []


@pytest.fixture
def overheard(
    database: Database,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Overheard]:
    monkeypatch.setattr(retrying, "MAX_RETRIES", 2)
    caplog.set_level(logging.DEBUG)
    # Django's own log of statements, which an operator would have to ask for, has all parameters in it.
    caplog.set_level(logging.INFO, logger="django.db.backends")
    with server_log() as logged:
        yield Overheard(database, caplog, capfd, logged)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "arguments", [(), ("--json",), ("--batch-size", "3"), ("--max-errors", "1"), ("--strict",), ("--workers", "2")]
)
def test_rows_in_error(database: Database, overheard: Overheard, arguments: tuple[str, ...]) -> None:
    populate()
    put_obstacles(database)
    overheard.command("--dry-run", *arguments)
    assert overheard.command(*arguments) == (5 if "--max-errors" in arguments else 1)
    reasons = {reason for (reason,) in database.rows("SELECT DISTINCT reason FROM ledger_entry WHERE reason <> ''")}
    assert reasons == {"data_error", "invalid_email", "conflict"}
    overheard.command(*arguments)
    overheard.look("backfill_runs", "list")
    overheard.look("backfill_runs", "show", str(database.rows("SELECT max(id) FROM backfill_run")[0][0]))
    overheard.look("backfill_runs", "watch", "latest")
    for contact in CRMContact.objects.values_list("pk", flat=True)[:5]:
        overheard.look("trace_contact", contact)
    overheard.look("verify_crm_contacts")
    overheard.assert_nothing_of_people()


@pytest.mark.process
@pytest.mark.sampled(3)
@pytest.mark.parametrize("arguments", [("--workers", "2"), (), ("--json",)])
def test_the_real_command(database: Database, overheard: Overheard, arguments: tuple[str, ...]) -> None:
    populate()
    put_obstacles(database)
    assert overheard.process("backfill_crm_contacts", *arguments) == 1
    overheard.process("backfill_runs", "list")
    overheard.process("verify_crm_contacts")
    overheard.process("export_backfill_errors")
    overheard.assert_nothing_of_people()


@pytest.mark.process
def test_the_real_command_when_it_fails(database: Database, overheard: Overheard) -> None:
    with refusing_contacts("53100"):
        add_lead(f"new@{MARK}.example", **LEAD)
        assert overheard.process("backfill_crm_contacts") == 5
    overheard.assert_nothing_of_people()


REFUSING = f"""
    CREATE FUNCTION public.refusing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF OLD.email LIKE 'refused%' THEN
            RAISE EXCEPTION 'not {MARK} %', OLD.email USING ERRCODE = '23514', DETAIL = OLD."firstName";
        END IF;
        RETURN COALESCE(NEW, OLD);
    END $$;
    CREATE TRIGGER refusing BEFORE UPDATE OR DELETE ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.refusing()
"""
NO_NEWS = "ALTER TABLE crm_contacts ADD CONSTRAINT no_news CHECK (email NOT LIKE 'news%' OR phone IS NULL) NOT VALID"


def many_people(*others: str) -> None:
    """Hundreds of them, and these among them."""
    add_many_leads(300)
    with connection.cursor() as cursor:
        cursor.execute("""UPDATE leads SET "firstName" = %s, email = id || %s""", [MARK, f"@{MARK}.example"])
    for name in others:
        add_lead(f"{name}@{MARK}.example", id=f"new0000000001{name}", **PERSON)


def test_the_server_logs_nothing_of_a_row_that_it_refuses_among_many(database: Database, overheard: Overheard) -> None:
    many_people("check", "trigger", "phone", "phone-too")
    put_obstacles(database)
    database.change(f"CREATE UNIQUE INDEX one_such_phone ON crm_contacts (phone) WHERE phone LIKE '%{MARK}'")
    assert backfill("--no-progress", "--json").answer["error_new"] == 3
    assert "ERROR" not in overheard.logged()
    overheard.assert_nothing_of_people()


def test_the_server_logs_nothing_of_what_an_update_or_a_rollback_is_refused(
    database: Database, overheard: Overheard
) -> None:
    many_people("news", "refused")
    add_contact(f"refused-too@{MARK}.example", **PERSON | {"phone": None})
    add_lead(f"refused-too@{MARK}.example", **PERSON)
    made = run()["run"]
    database.change(f"""UPDATE leads SET phone = '556{MARK}', "updatedAt" = now()""")
    database.change(NO_NEWS)
    database.change(REFUSING)
    updated = backfill("--update", "--no-progress", "--json").answer
    assert updated["kept_by_column"]["refused"] == 3
    back = [called("rollback_crm_backfill", str(run), "--no-progress", "--json") for run in (updated["run"], made)]
    overheard.heard(*(text for finished in back for text in (finished.stdout, finished.stderr)))
    assert back[-1].answer["failed"] > 0
    assert "ERROR" not in overheard.logged()
    overheard.assert_nothing_of_people()


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_repair_and_its_rollback(
    database: Database,
    overheard: Overheard,
    tmp_path: Path,
    is_refused: bool,  # noqa: FBT001 - a parameter
) -> None:
    preparer = add_user(f"preparer@{MARK}.example")
    add_profile("TAX_PREPARER", userId=preparer, **PERSON)
    moments = dict.fromkeys(("createdAt", "updatedAt"), "2025-01-01")
    for name in ("person-0", "person-1", "check", "trigger", "refused"):
        profile = add_profile("AFFILIATE", email=f"{name}@{MARK}.example", **PERSON)
        columns = {"source": "backfill", "assignedPreparerId": preparer, **moments, **PERSON}
        add_contact(f"client-{profile}@unknown.com", id=f"{name}-contact", **columns)
    add_contact(f"Person-1@{MARK}.example", assignedPreparerId=f"nobody{MARK}", **PERSON)
    if is_refused:
        put_obstacles(database)
    options = ("--preparer-ids", "--types", "--placeholders", "--no-progress")
    lists = [str(tmp_path / f"{number}.csv") for number in range(4)]
    ended = [
        called("repair_crm_contacts", *options, "--csv", lists[0]),
        called("repair_crm_contacts", *options, "--json", "--apply", "--csv", lists[1]),
    ]
    number = str(ended[1].answer["run"])
    assert ended[1].answer["placeholders"]["kept_by_reason"] == {
        "conflict": 1,
        **({"refused": 2} if is_refused else {}),
    }
    database.change(REFUSING.replace("'refused%'", f"'refused@{MARK}%'"))
    ended += [
        called("rollback_crm_backfill", number, *arguments, "--no-progress", "--csv", path)
        for arguments, path in zip((("--dry-run",), ()), lists[2:], strict=True)
    ]
    assert ended[-1].code == 1
    ended += [called("backfill_runs", "show", number), called("trace_contact", "person-0-contact")]
    overheard.heard(*(text for finished in ended for text in (finished.stdout, finished.stderr)))
    overheard.heard(*(Path(path).read_text(encoding="utf-8") for path in lists))
    assert "ERROR" not in overheard.logged()
    overheard.assert_nothing_of_people()


def test_the_values_of_a_statement_that_fails_are_not_logged_where_the_server_would(
    database: Database, overheard: Overheard
) -> None:
    with session() as owner:
        owner.autocommit = True
        owner.execute("ALTER ROLE CURRENT_USER SET log_parameter_max_length_on_error = -1")
    connection.close()
    try:
        with pytest.raises(DataError), connection.cursor() as cursor:
            cursor.execute("SELECT 1 / length(btrim(%s, %s))", [MARK, MARK])
    finally:
        with session() as owner:
            owner.autocommit = True
            owner.execute("ALTER ROLE CURRENT_USER RESET log_parameter_max_length_on_error")
    assert "ERROR:  division by zero" in overheard.logged()
    assert MARK not in overheard.logged()


@contextmanager
def somebody_holds_a_lock() -> Iterator[None]:
    with session() as somebody:
        somebody.execute(
            'INSERT INTO public.crm_contacts (id, "contactType", "firstName", "lastName", email, "updatedAt") '
            "VALUES ('somebody', 'LEAD', '', '', %s, now())",
            [f"person-1@{MARK}.example"],
        )
        yield
        somebody.rollback()


@contextmanager
def terminated() -> Iterator[None]:
    """Every insert of contacts loses its connection."""

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if INSERTS_CONTACTS in str(sql):
            with session() as administrator:
                administrator.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.connection.info.backend_pid])
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        yield


FAILURES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "lock timeout": somebody_holds_a_lock,
    "lost connection": terminated,
    "deadlock": lambda: refusing_contacts("40P01"),
    "serialization failure": lambda: refusing_contacts("40001"),
    "statement timeout": lambda: refusing_contacts("57014"),
    "no privilege": lambda: refusing_contacts("42501"),
    "a SQLSTATE of somebody's own": lambda: refusing_contacts("CR001"),
    "every row": lambda: refusing_contacts("23514"),
    "nothing": nullcontext,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("arguments", [(), ("--json", "--batch-size", "2"), ("--workers", "2")])
def test_runs_that_fail(
    database: Database,
    overheard: Overheard,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setattr(context, "Timeouts", lambda: Timeouts(lock=20))
    populate()
    with FAILURES[name]():
        code = overheard.command(*arguments)
    # What a trigger refuses, with whichever code, costs its rows and not the run.
    expected = 1 if name in ("every row", "no privilege", "a SQLSTATE of somebody's own", "nothing") else 5
    if not (name == "lost connection" and "--workers" in arguments):
        assert code == expected
    overheard.look("backfill_runs", "list")
    overheard.assert_nothing_of_people()


@pytest.fixture
def browser(database: Database) -> Iterator[Client]:
    """The browser of a superuser, who is shown what everybody is shown when something goes wrong."""
    operator = User.objects.create_user("operator", is_staff=True, is_superuser=True)
    client = Client(raise_request_exception=False)
    client.force_login(operator)
    yield client
    operator.delete()
    Session.objects.all().delete()


def test_the_admin_shows_people_on_the_pages_of_contacts_alone(
    database: Database, overheard: Overheard, browser: Client
) -> None:
    populate()
    put_obstacles(database)
    assert overheard.command() == 1
    database.change("DROP TRIGGER quoting ON crm_contacts")
    with refusing_contacts("53100"):
        add_lead(f"new@{MARK}.example", **LEAD)
        assert overheard.command() == 5
    for model in (BackfillRun, LedgerEntry):
        assert overheard.page(browser, model) == 200
        for key in model._default_manager.values_list("pk", flat=True):
            assert overheard.page(browser, model, "change", key) == 200
            for page in ("history", "delete"):
                overheard.page(browser, model, page, key)
    overheard.page(browser, LedgerEntry, reason="nothing")
    for contact in CRMContact.objects.values_list("pk", flat=True):
        overheard.page(browser, CRMContact, "delete", contact)
    overheard.assert_nothing_of_people()


@contextmanager
def without_the_contacts(database: Database) -> Iterator[None]:
    database.change("ALTER TABLE crm_contacts RENAME TO aside")
    yield


@contextmanager
def terminated_at_each_statement_on_contacts(_database: Database) -> Iterator[None]:
    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if "crm_contacts" in str(sql):
            with session() as administrator:
                administrator.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.connection.info.backend_pid])
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(watch):
        yield
    connection.close()


@pytest.mark.parametrize("failure", [without_the_contacts, terminated_at_each_statement_on_contacts])
def test_the_admin_that_fails(
    database: Database,
    overheard: Overheard,
    browser: Client,
    failure: Callable[[Database], AbstractContextManager[None]],
) -> None:
    populate()
    overheard.command()
    key = CRMContact.objects.values_list("pk", flat=True)[0]
    with failure(database):
        for query in ({}, {"q": "person"}, {"q": f"person-1@{MARK}.example"}, {"q": f"First{MARK}"}):
            assert overheard.page(browser, CRMContact, **query) == 500
        assert overheard.page(browser, CRMContact, "change", key) == 500
        overheard.page(browser, LedgerEntry)
    overheard.assert_nothing_of_people()

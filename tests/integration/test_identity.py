"""One person is one contact: after a failure, in whatever spelling, under whichever address, and in a dry run alike."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection
from django.db.models import Sum

from crm.backfill import latecomers
from crm.backfill.read import noncanonical_emails
from crm.backfill.read.noncanonical_emails import NoncanonicalAddresses
from crm.errors import OperatorError
from crm.models import BackfillRun, LedgerEntry
from crm.rules.mapping import contact_id
from crm.runs import retrying
from crm.tracing import trace_address
from crm.verification import verify
from tests.conftest import Database
from tests.support.builders import add_contact, add_lead, add_many_leads, add_profile, add_user, contacts, ledger
from tests.support.commands import called, each_statement, run, statement_in
from tests.support.processes import session
from tests.support.profiles import every
from tests.support.reference import address_of


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no try wait for long."""
    monkeypatch.setattr(retrying, "WAITS_BEFORE_ANOTHER_LOOK", (0.01, 0.01))
    monkeypatch.setattr(retrying, "MAX_RETRIES", 5)


@contextmanager
def watched(watch: Callable[[int, str, Callable[[str], Any]], object]) -> Iterator[list[str]]:
    """Call `watch` before every statement, of whichever thread: with its number from 0 on, and a way to send another
    on its connection. Collects the statements."""
    sent: list[str] = []

    def send(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        sent.append(" ".join(str(sql).split()))
        watch(len(sent) - 1, sent[-1], lambda statement: execute(statement, None, False, context))  # noqa: FBT003
        return execute(sql, parameters, many, context)

    with each_statement(send):
        yield sent


def failing(send: Callable[[str], Any]) -> None:
    send("DO $$ BEGIN RAISE 'no' USING ERRCODE = '55P03'; END $$")


@contextmanager
def failing_once(is_it: Callable[[str], bool]) -> Iterator[None]:
    """The first statement that is so fails with a lock timeout."""
    failed: list[str] = []

    def watch(_number: int, sql: str, send: Callable[[str], Any]) -> None:
        if not failed and is_it(sql):
            failed.append(sql)
            failing(send)

    with watched(watch):
        yield
    assert failed, "there was no such statement"


def counts(answer: dict[str, Any]) -> dict[str, Any]:
    names = ("read", "created", "merged", "exists", "error", "error_new", "by_source", "by_reason", "created_by_type")
    more = ("revisited", "updated", "kept", "unchanged", "updated_and_kept", "updated_by_column", "status", "balanced")
    return {name: answer[name] for name in (*names, *more)}


# Failures


def asks_for_spellings(sql: str) -> bool:
    return sql.startswith(("DECLARE noncanonical_crm_contacts", "FETCH", "SELECT email FROM crm_contacts"))


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_a_person_is_found_after_the_query_for_other_spellings_failed(
    database: Database,
    dry_run: bool,  # noqa: FBT001 - parametrized
    number: int,
) -> None:
    contact = add_contact("Ann@Example.com")
    add_lead("ann@example.com")
    asked = 0

    def is_it(sql: str) -> bool:
        nonlocal asked
        asked += asks_for_spellings(sql)
        return asked == number

    with failing_once(is_it):
        assert run(dry_run=dry_run)["exists"] == 1
    assert list(contacts()) == [contact]


def a_little_of_everything() -> None:
    """Rows of every outcome, of people who meet within a run and before it; with an update to come."""
    add_contact("Ann@Example.com")
    add_profile(email="ann@example.com", companyName="Ann & Co")
    add_profile(email="bob@example.com")
    add_profile("TAX_PREPARER", id="preparer")
    add_lead("bob@example.com", "CONVERTED", referrerUsername="ref")
    add_lead("cid@example.com", "CONVERTED")
    add_lead("nonsense")
    add_lead("Cid@example.com")
    add_lead("dan@example.com")


@pytest.mark.sampled
@pytest.mark.parametrize("dry_run", [True, False])
def test_wherever_a_statement_fails_a_run_and_a_dry_run_end_as_undisturbed_ones(
    database: Database,
    dry_run: bool,  # noqa: FBT001 - parametrized
) -> None:
    options: dict[str, Any] = {"update": True, "batch_size": 2, "dry_run": dry_run}
    a_little_of_everything()
    with watched(lambda *_: None) as sent:
        undisturbed = counts(run(**options))
    end = sorted(contact["email"] for contact in contacts().values())
    assert undisturbed["balanced"] is True
    disturbed = 0
    # All of them in `make soak`; by a step that meets every kind of batch, else.
    for number in range(0, len(sent), every(15)):
        database.empty()
        a_little_of_everything()

        def watch(count: int, sql: str, send: Callable[[str], Any], *, number: int = number) -> None:
            # What has no transaction of its own to fail in is not for the server to refuse.
            if count == number and not sql.startswith(("SAVEPOINT", "ROLLBACK", "RELEASE")):
                failing(send)

        with watched(watch):
            try:
                answer = run(**options)
            except OperatorError:
                continue  # before anything began
        if answer["status"] == "failed":
            # Said so, and the next one goes on. A dry run has nothing to go on with.
            assert dry_run or run(**options)["balanced"] is True
        else:
            assert counts(answer) == undisturbed, sent[number]
            disturbed += 1
        assert sorted(contact["email"] for contact in contacts().values()) == end
    assert disturbed


def test_a_dry_run_forgets_what_a_failed_batch_would_have_made(database: Database) -> None:
    add_many_leads(100, "CONVERTED")
    add_many_leads(111)
    undisturbed = counts(run(dry_run=True))
    with failing_once(lambda sql: sql.startswith('SELECT id, email, "userId"')):
        assert counts(run(dry_run=True)) == undisturbed


# Stored meanwhile


def store(email: str, identifier: str = "c-other", **columns: Any) -> None:
    with session() as other:
        names = ", ".join(f', "{name}"' for name in columns)
        values = "".join(", %s" for _ in columns)
        other.execute(
            f'INSERT INTO crm_contacts (id, "contactType", "firstName", "lastName", email, "updatedAt"{names}) '
            f"VALUES (%s, 'LEAD', 'Con', 'Tact', %s, now(){values})",
            [identifier, email, *columns.values()],
        )
        other.commit()


@contextmanager
def after_batch(number: int, happening: Callable[[], object]) -> Iterator[None]:
    """Call `happening` when so many batches have been committed."""
    batches = 0

    def watch(_number: int, sql: str, _send: Callable[[str], Any]) -> None:
        nonlocal batches
        if sql.startswith("SET LOCAL"):
            if batches == number:
                happening()
            batches += 1

    with watched(watch):
        yield
    assert batches > number, "there was no such batch"


@pytest.mark.parametrize("spelling", [str.upper, str.capitalize, " {}\n".format])
def test_a_likely_spelling_that_is_stored_during_the_run_is_met_by_the_next_batch(
    database: Database, spelling: Callable[[str], str]
) -> None:
    add_many_leads(4)
    add_lead(spelling("person-5@example.com"), id="the-last")
    with after_batch(1, lambda: store(spelling("person-5@example.com"))):
        report = run(batch_size=2)
    assert (report["created"], report["exists"], report["balanced"]) == (4, 1, True)
    assert len(contacts()) == 5


class Meanwhile:
    """A lead's person is stored in a spelling that no batch asks for, when the lead's own batch has been committed."""

    email = "person-1@example.com"
    spelling = "pErson-1@example.com"

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def run(self, **options: Any) -> dict[str, Any]:
        with after_batch(2, lambda: store(self.spelling, **self.columns)):
            report = run(batch_size=2, **options)
        assert report["balanced"] is True
        return report


def books_agree() -> bool:
    """Whether the last run's record, its batches and the ledger say the same."""
    of_ledger = Counter(
        LedgerEntry.objects.filter(run=BackfillRun.objects.latest("id")).values_list("outcome", flat=True)
    )
    latest = BackfillRun.objects.latest("id")
    of_record = {name: getattr(latest, name) for name in ("created", "merged", "exists", "error")}
    of_batches = latest.batches.aggregate(**{name: Sum(name) for name in of_record})
    return of_record == of_batches == {name: of_ledger[name] for name in of_record}


def twice() -> list[tuple[str, str | None]]:
    """What a verification says of contacts that are there twice: the kind and the contact."""
    findings = verify(connection).findings.kept
    return [(finding.kind, finding.contact_id) for finding in findings if finding.check == "contact_twice"]


def test_who_is_stored_in_any_other_spelling_during_the_run_is_one_person_at_its_end(database: Database) -> None:
    add_many_leads(6)
    add_lead("person-1@example.com", "CONVERTED", referrerUsername="ref")
    report = Meanwhile().run()
    assert (report["read"], report["created"], report["exists"], report["merged"]) == (7, 5, 2, 0)
    assert sum(report["created_by_type"].values()) == 5
    assert [c["id"] for c in contacts().values() if address_of(c["email"]) == Meanwhile.email] == ["c-other"]
    assert {line["outcome"] for line in ledger().values() if line["contact_id"] == "c-other"} == {"exists"}
    assert books_agree()
    assert verify(connection).findings.kept == []
    assert run()["read"] == 0


def test_with_update_the_other_contact_is_filled_in_the_same_run(database: Database) -> None:
    add_many_leads(6)
    report = Meanwhile().run(update=True)
    assert report["updated_by_column"] == {"phone": 1}


def test_a_profile_whose_account_is_another_than_the_other_contacts_is_in_conflict(database: Database) -> None:
    stranger = add_user("stranger@example.com")
    add_profile(email="person-1@example.com")
    add_many_leads(6)
    report = Meanwhile(userId=stranger).run()
    assert (report["created"], report["error"], report["by_reason"]["conflict"]) == (5, 1, 1)
    assert report["exists"] == 1
    assert books_agree()


@pytest.mark.parametrize("use", ["referred to", "touched", "edited"])
def test_a_contact_of_ours_that_is_in_use_by_then_stays_and_every_run_reports_it(database: Database, use: str) -> None:
    add_many_leads(6)
    statements = {
        "referred to": """INSERT INTO crm_interactions (id, "contactId", type, "updatedAt")
                          SELECT 'i', id, 'NOTE', now() FROM crm_contacts WHERE email = %s""",
        "touched": """UPDATE crm_contacts SET "updatedAt" = now() WHERE email = %s""",
        "edited": "UPDATE crm_contacts SET phone = '1' WHERE email = %s",
    }

    def happen() -> None:
        store(Meanwhile.spelling)
        with session() as other:
            other.execute(statements[use], [Meanwhile.email])
            other.commit()

    with after_batch(2, happen):
        report = run(batch_size=2)
    assert (report["created"], report["balanced"]) == (6, True)
    assert len(contacts()) == 7
    assert books_agree()
    (ours,) = report["contacts_twice"]
    assert contacts()[ours]["email"] == Meanwhile.email
    # Until one of the two is gone, by whomever.
    answer = called("backfill_crm_contacts")
    assert answer.code == 1
    assert "1 contact has a duplicate with the same address in another spelling" in answer.stderr
    assert ours in answer.stderr
    assert "person-1" not in answer.stderr.lower()
    assert twice() == [("defect", ours)]
    database.change("DELETE FROM crm_contacts WHERE id = 'c-other'")
    assert called("backfill_crm_contacts").code == 0
    assert twice() == []


def test_what_a_run_made_that_was_stopped_is_looked_at_by_the_next(database: Database) -> None:
    add_many_leads(6)
    assert run(batch_size=2, limit=2)["created"] == 2
    BackfillRun.objects.update(status="failed")
    store(Meanwhile.spelling)
    report = run()
    assert (report["created"], report["exists"], report["balanced"]) == (4, 1, True)
    assert books_agree()
    assert len(contacts()) == 6


def test_a_contact_that_is_stored_after_a_run_is_somebody_elses_business(database: Database) -> None:
    add_many_leads(2)
    run()
    store(Meanwhile.spelling)
    add_lead("new@example.com")
    assert run()["created"] == 1
    assert len(contacts()) == 4


def test_a_role_that_may_not_delete_is_told_every_night_until_it_may(database: Database) -> None:
    add_many_leads(6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latecomers, "_MAY_DELETE", "SELECT false")
        (ours,) = Meanwhile().run()["contacts_twice"]
        # One that was stored after the run is not its business, and is told of by nobody.
        store("Person-2@EXAMPLE.com", "c-later")
        for _ in range(2):
            answer = called("backfill_crm_contacts")
            assert answer.code == 1
            assert "this role may not delete contacts" in answer.stderr
            assert ours in answer.stderr
    assert len(contacts()) == 8
    report = run()
    assert (report["exists"], report["contacts_twice"], report["balanced"]) == (1, [], True)
    assert ours not in contacts()
    assert books_agree()
    assert called("backfill_crm_contacts").code == 0


def test_what_is_stored_in_another_spelling_is_seen_before_the_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latecomers, "_MAY_DELETE", "SELECT false")
    monkeypatch.setattr(noncanonical_emails, "MIN_AGE", 0.0)
    monkeypatch.setattr(noncanonical_emails, "READINGS", 0)
    add_many_leads(6)
    with after_batch(1, lambda: store("pErson-5@example.com")):
        report = run(batch_size=2)
    assert (report["created"], report["exists"], report["contacts_twice"]) == (5, 1, [])


# Stored while an update writes an address


@contextmanager
def before_statement(beginning: str, number: int, happening: Callable[[], object]) -> Iterator[None]:
    """Call `happening` before the statement of this number, from 1 on, of those that begin like this."""
    seen = 0

    def watch(_number: int, sql: str, _send: Callable[[str], Any]) -> None:
        nonlocal seen
        if statement_in(sql).startswith(beginning):
            seen += 1
            if seen == number:
                happening()

    with watched(watch):
        yield
    assert seen >= number, "there was no such statement"


def a_placeholder_that_is_to_be_replaced() -> str:
    user = add_user("")
    profile = add_profile(userId=user)
    run()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE users SET email = 'bob@example.com' WHERE id = %s", [user])
    return contact_id("profiles", profile)


def test_an_address_that_was_stored_since_the_cache_was_read_is_not_written_by_an_update(database: Database) -> None:
    ours = a_placeholder_that_is_to_be_replaced()
    before = contacts()[ours]
    # When the cache has been read and the contacts are looked up.
    with before_statement('SELECT c.id, c.email, c."userId"', 1, lambda: store("bOB@Example.com")):
        report = run(update=True)
    assert report["updated_by_column"] == {}
    assert contacts()[ours] == before
    assert report["contacts_twice"] == []


def test_an_address_that_is_stored_while_an_update_writes_it_is_reported_by_every_run(database: Database) -> None:
    ours = a_placeholder_that_is_to_be_replaced()
    with before_statement("UPDATE crm_contacts", 1, lambda: store("bOB@Example.com")):
        report = run(update=True)
    assert (report["updated_by_column"], report["balanced"]) == ({"email": 1}, True)
    assert report["contacts_twice"] == [ours]
    assert called("backfill_crm_contacts").code == 1
    assert twice() == [("defect", ours)]
    database.change("DELETE FROM crm_contacts WHERE id = 'c-other'")
    assert called("backfill_crm_contacts").code == 0


def test_who_is_stored_while_an_update_is_at_work_is_one_person_at_its_end(database: Database) -> None:
    a_placeholder_that_is_to_be_replaced()
    add_many_leads(2)
    with before_statement("UPDATE crm_contacts", 1, lambda: store(Meanwhile.spelling)):
        report = run(update=True)
    assert (report["created"], report["exists"], report["balanced"]) == (1, 1, True)
    assert [c["id"] for c in contacts().values() if address_of(c["email"]) == Meanwhile.email] == ["c-other"]
    assert books_agree()


# Memory


def test_stored_spellings_take_no_memory_that_grows_with_them(database: Database) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            """INSERT INTO crm_contacts (id, "contactType", "firstName", "lastName", email, "updatedAt")
               SELECT 'contact' || n, 'LEAD', '', '', 'Person-' || n || '@Example.com', now()
                 FROM generate_series(1, 20000) AS n"""
        )
    stored = NoncanonicalAddresses(connection, "crm_contacts")
    stored.find(["person-1@example.com"])
    tracemalloc.start()
    assert stored.find(["person-7@example.com"]) == {"person-7@example.com": {"contact7"}}
    stored = NoncanonicalAddresses(connection, "crm_contacts")
    stored.find([])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A page of rows and what Python needs to fetch it; a set of 20,000 addresses is ten times as much.
    assert peak < 1_500_000


# The contact of a profile under another address


@pytest.mark.sampled(3)
@pytest.mark.parametrize("spelling", ["ann@example.com", "ANN@Example.com", "aNN@example.com\u200b"])
@pytest.mark.parametrize("batch_size", [1, 1000])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_lead_meets_the_contact_of_the_profile_whose_user_has_its_address(
    database: Database, spelling: str, batch_size: int, workers: int
) -> None:
    user = add_user(spelling)
    contact = add_contact("other@example.com", userId=user)
    profile = add_profile(userId=user)
    lead = add_lead("ann@example.com", referrerUsername="ref")
    foretold = run(dry_run=True, batch_size=batch_size, workers=workers)
    done = run(batch_size=batch_size, workers=workers)
    assert foretold["exists"] == done["exists"] == 2
    assert list(contacts()) == [contact]
    assert {ledger()[row]["contact_id"] for row in (f"profiles:{profile}", f"leads:{lead}")} == {contact}
    foretold, done = run(dry_run=True, update=True), run(update=True)
    assert foretold["updated_by_column"] == done["updated_by_column"]
    assert done["updated_by_column"]["attribution"] == 1


@pytest.mark.parametrize("generation", ["2026_01"])
@pytest.mark.parametrize("spelling", ["ann@example.com", " Ann@Example.com"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_lead_meets_the_contact_of_the_profile_that_has_its_address_where_the_user_has_none(
    database: Database, generation: str, spelling: str, workers: int
) -> None:
    user = add_user(" ")
    contact = add_contact("other@example.com", userId=user)
    profile = add_profile("client", userId=user)
    # Whose user has an address goes by that.
    other = add_profile("client", email="bob@example.com")
    for row, email in ((profile, spelling), (other, "ann@example.com")):
        database.rows("UPDATE profiles SET email = %s WHERE id = %s RETURNING id", email, row)
    lead = add_lead("ann@example.com")
    foretold, done = run(dry_run=True, workers=workers), run(workers=workers)
    assert foretold["exists"] == done["exists"] == 2
    assert {ledger()[row]["contact_id"] for row in (f"profiles:{profile}", f"leads:{lead}")} == {contact}
    assert sorted(row["email"] for row in contacts().values()) == ["bob@example.com", "other@example.com"]
    trace = trace_address(connection, "ANN@example.com")
    assert {row["row"] for row in trace["rows"]} == {f"profiles:{profile}", f"leads:{lead}"}
    # When the user gets one, the profile's own counts no more.
    database.rows("UPDATE users SET email = 'new@example.com' WHERE id = %s RETURNING id", user)
    add_lead("Ann@example.com")
    assert run()["created"] == 1


def test_a_lead_that_comes_a_night_later_meets_the_contact_of_the_profile(database: Database) -> None:
    user = add_user("ann@example.com")
    contact = add_contact("other@example.com", userId=user)
    add_profile(userId=user)
    run()
    add_lead("Ann@Example.com")
    assert run(dry_run=True)["exists"] == run()["exists"] == 1
    assert list(contacts()) == [contact]


def test_a_contact_that_has_the_leads_address_comes_before_the_profiles(database: Database) -> None:
    user = add_user("ann@example.com")
    add_contact("other@example.com", userId=user)
    add_profile(userId=user)
    run()
    theirs = add_contact("ANN@example.com")
    lead = add_lead("ann@example.com")
    assert run(dry_run=True)["exists"] == run()["exists"] == 1
    assert ledger()[f"leads:{lead}"]["contact_id"] == theirs


def test_a_deleted_contact_of_a_profile_is_nobodys(database: Database) -> None:
    user = add_user("ann@example.com")
    contact = add_contact("other@example.com", userId=user)
    add_profile(userId=user)
    run()
    database.rows("DELETE FROM crm_contacts WHERE id = %s RETURNING id", contact)
    add_lead("ann@example.com")
    assert run(dry_run=True)["created"] == run()["created"] == 1


# A dry run's update


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_a_placeholder_that_an_update_replaces_is_the_persons_only_address_from_then_on(
    database: Database, batch_size: int
) -> None:
    user = add_user(" ")
    add_profile(userId=user, clerkUserId="clerk")
    run()
    database.rows("UPDATE users SET email = 'Ann@example.com' WHERE id = %s RETURNING id", user)
    # Revisited after the profile whose address it has now got.
    add_profile("TAX_PREPARER", email="ann@example.com", phone="555")
    add_lead("ann@example.com")
    foretold, done = (counts(run(update=True, batch_size=batch_size, dry_run=dry_run)) for dry_run in (True, False))
    assert foretold == done
    connection.close()


@pytest.mark.parametrize(
    ("names_profile", "counted"), [(True, {}), (False, {"unresolved_preparer": 1})], ids=["resolved", "unresolved"]
)
def test_a_preparer_whom_a_removed_contact_had_is_not_counted(
    database: Database,
    names_profile: bool,  # noqa: FBT001 - a parameter
    counted: dict[str, int],
) -> None:
    profile = add_profile("TAX_PREPARER", email="preparer@example.com")
    add_many_leads(5, first=3)
    preparer = profile if names_profile else "nobody"
    add_lead(Meanwhile.email, id="a0", assignedPreparerId=preparer, createdAt="2020-01-01")
    with after_batch(3, lambda: store(Meanwhile.spelling)):
        report = run(batch_size=2)
    assert report["balanced"]
    assert {way: count for way, count in report["assignments"].items() if count} == counted

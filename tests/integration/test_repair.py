"""A repair mends what others left in contacts, foretells it to the last count, and can be taken back."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from hypothesis import given
from hypothesis import strategies as st

from crm.models import BackfillBatch, BackfillRun, ContactUpdate
from crm.models.ledger import RunStatus
from crm.outcome import Repair
from crm.postgres.facts.rights import OPTIONS, Operation
from crm.repair import reader
from crm.repair.runner import repair_contacts
from crm.rules.mapping import contact_id
from crm.verification import verify
from tests.conftest import LEGACY_TABLES, Database
from tests.support import processes
from tests.support.builders import (
    CREATED_AT,
    LATER,
    UPDATED_AT,
    add_contact,
    add_intake,
    add_lead,
    add_profile,
    add_user,
    change,
    contact_with,
    contacts,
)
from tests.support.circumstances import acting_as, reading_role, set_status, without_own_schema
from tests.support.commands import Finished, called, each_statement, rollback, run, statement_in, statements, update
from tests.support.populations import GENERATIONS, ROLES
from tests.support.processes import wait_until
from tests.support.profiles import against_the_database
from tests.support.reference import Row
from tests.support.roles import ROLE, role_made_by_script
from tests.support.runs import make_run
from tests.support.sessions import managed

ALL = tuple(repair.option for repair in Repair)
SOME_DOMAIN = "crm-backfill.invalid"
READ_ONLY = tuple(table for table in LEGACY_TABLES if table != "crm_contacts")


def repair(*arguments: str) -> Finished:
    return called("repair_crm_contacts", *arguments, "--no-progress")


def repaired(*options: str) -> dict[str, Any]:
    """A repair that a dry run has foretold to the last count, and that wrote nothing."""
    options = options or ALL
    before = everything()
    foretold = repair(*options, "--json")
    assert (foretold.code, foretold.stderr) == (0, "")
    assert everything() == before, "a dry run writes nothing"
    done = repair(*options, "--apply", "--json")
    assert (done.code, done.stderr) == (0, "")
    assert told(foretold.answer) == told(done.answer)
    assert foretold.answer["balanced"] is done.answer["balanced"] is True
    return done.answer


def told(answer: dict[str, Any]) -> dict[str, Any]:
    of_one_go = ("run", "dry_run", "started_at", "finished_at", "seconds")
    return {name: value for name, value in answer.items() if name not in of_one_go}


def everything() -> dict[str, Any]:
    with connection.cursor() as cursor:
        found = {}
        for table in (*LEGACY_TABLES, "backfill_run", "backfill_batch", "ledger_entry", "contact_update"):
            cursor.execute(f"SELECT t::text FROM {table} t ORDER BY 1")
            found[table] = cursor.fetchall()
    return found


def changes(before: dict[str, Row], after: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """What differs, by contact and column."""
    assert before.keys() == after.keys()
    found = {
        contact: {column: value for column, value in after[contact].items() if value != before[contact][column]}
        for contact in after
    }
    return {contact: columns for contact, columns in found.items() if columns}


def old_contact(email: str, **columns: Any) -> str:
    """A contact as the old script made it."""
    made = {"contactType": "CLIENT", "source": "backfill", "createdAt": CREATED_AT, "updatedAt": CREATED_AT}
    return add_contact(email, **made | columns)


def taken_back(number: int) -> dict[str, Any]:
    """What a rollback prints of the repairs; a dry run has foretold it."""
    foretold = rollback(str(number), "--dry-run", "--json").answer
    answer = rollback(str(number), "--json").answer
    for name in ("updates", "by_reason"):
        assert foretold[name] == answer[name]
    assert answer["balanced"] is True
    return {"by_reason": answer["by_reason"], **answer["updates"]}


# Preparers


def test_a_preparer_given_as_a_user_becomes_the_profile(database: Database) -> None:
    user = add_user("pat@example.com")
    preparer = add_profile("TAX_PREPARER", userId=user)
    mended = add_contact("ann@example.com", assignedPreparerId=user, assignedAt=LATER)
    add_contact("bob@example.com", assignedPreparerId=preparer)
    add_contact("carl@example.com", assignedPreparerId="nobody")
    add_contact("dora@example.com", assignedPreparerId=" ")
    add_contact("emil@example.com")
    before = contacts()
    answer = repaired("--preparer-ids")
    assert changes(before, contacts()) == {mended: {"assignedPreparerId": preparer}}
    counts = answer["preparer_ids"]
    assert (counts["updated"], counts["kept"], counts["unchanged"]) == (1, 1, 1)
    assert counts["kept_by_reason"] == {"no_profile": 1}
    assert counts["updated_by_column"] == {"assigned_preparer_id": 1}


def test_of_several_profiles_of_a_user_none_is_chosen(database: Database) -> None:
    database.change('ALTER TABLE profiles DROP CONSTRAINT IF EXISTS "profiles_userId_key"')
    database.change('DROP INDEX IF EXISTS "profiles_userId_key"')
    user = add_user("pat@example.com")
    for _ in range(2):
        add_profile("TAX_PREPARER", userId=user)
    add_contact("ann@example.com", assignedPreparerId=user)
    before = contacts()
    assert repaired("--preparer-ids")["preparer_ids"]["kept_by_reason"] == {"ambiguous": 1}
    assert contacts() == before


def test_a_contact_of_the_backfill_is_never_repaired(database: Database) -> None:
    user = add_user("pat@example.com")
    add_profile("TAX_PREPARER", userId=user)
    add_profile("CLIENT", email="ann@example.com")
    add_profile("AFFILIATE")
    run()
    database.rows('UPDATE crm_contacts SET "assignedPreparerId" = %s RETURNING id', user)
    database.rows("""UPDATE profiles SET role = 'AFFILIATE' RETURNING id""")
    database.rows("""UPDATE crm_contacts SET email = replace(email, %s, 'unknown.com') RETURNING id""", SOME_DOMAIN)
    before = contacts()
    assert repaired()["revisited"] == 0
    assert contacts() == before


# Types


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_contact_of_the_old_script_gets_the_type_of_its_role(database: Database, generation: str) -> None:
    database.use(generation)
    spelling = next(spelling for spelling in (str.upper, str.lower) if spelling("CLIENT") in ROLES[generation])
    types = {"CLIENT": "CLIENT", "TAX_PREPARER": "PREPARER", "AFFILIATE": "AFFILIATE", "LEAD": "LEAD"}
    wanted: dict[str, dict[str, Any]] = {}
    for role, contact_type in types.items():
        for stands in types.values() if spelling(role) in ROLES[generation] else ():
            user = add_user(f"{role}-{stands}@example.com")
            add_profile(spelling(role), userId=user)
            contact = old_contact(f"{role}-{stands}@example.com", userId=user, contactType=stands)
            if stands != contact_type:
                wanted[contact] = {"contactType": contact_type}
    admins = [role for role in ("ADMIN", "SUPER_ADMIN") if spelling(role) in ROLES[generation]]
    for role in admins:
        user = add_user(f"{role}@example.com")
        add_profile(spelling(role), userId=user)
        old_contact(f"{role}@example.com", userId=user)
    before = contacts()
    answer = repaired("--types")
    assert changes(before, contacts()) == wanted
    counts = answer["types"]
    roles = sum(spelling(role) in ROLES[generation] for role in types)
    assert (counts["updated"], counts["unchanged"]) == (3 * roles, roles)
    assert counts["kept_by_reason"] == ({"excluded_role": len(admins)} if admins else {})


def test_a_contact_that_somebody_touched_since_or_made_otherwise_keeps_its_type(database: Database) -> None:
    columns: tuple[dict[str, Any], ...] = (
        {"updatedAt": UPDATED_AT},
        {"stage": "CONTACTED"},
        {"source": "manual"},
        {"source": None},
    )
    for number, differing in enumerate(columns):
        user = add_user(f"person-{number}@example.com")
        add_profile("AFFILIATE", userId=user)
        old_contact(f"person-{number}@example.com", userId=user, **differing)
    old_contact("nobody@example.com")
    before = contacts()
    assert repaired("--types")["types"]["kept_by_reason"] == {"modified": 2, "no_profile": 1}
    assert contacts() == before


def test_the_profile_is_found_by_clerks_id_and_by_the_invented_address(database: Database) -> None:
    add_profile("AFFILIATE", clerkUserId="clerk-1")
    by_clerk = old_contact("ann@example.com", clerkUserId="clerk-1")
    by_address = old_contact(f"client-{add_profile('TAX_PREPARER')}@unknown.com")
    add_profile("AFFILIATE", clerkUserId="clerk-2")
    user = add_user("both@example.com")
    add_profile("AFFILIATE", userId=user)
    old_contact("both@example.com", userId=user, clerkUserId="clerk-2")
    before = contacts()
    assert repaired("--types")["types"]["kept_by_reason"] == {"ambiguous": 1}
    assert changes(before, contacts()) == {
        by_clerk: {"contactType": "AFFILIATE"},
        by_address: {"contactType": "PREPARER"},
    }


# Invented addresses


def test_an_invented_address_becomes_the_real_one_or_one_of_ours(database: Database) -> None:
    with_email, without, admin = add_profile(email=" Ann@Example.com"), add_profile("AFFILIATE"), add_profile("ADMIN")
    invalid = add_profile(email="nobody")
    made = [old_contact(f"client-{profile}@unknown.com") for profile in (with_email, without, admin, invalid)]
    old_contact("client-nobody@unknown.com")
    add_contact("somebody@unknown.com")
    before = contacts()
    answer = repaired("--placeholders")
    assert changes(before, contacts()) == {
        made[0]: {"email": "ann@example.com"},
        made[1]: {"email": f"affiliate-{without}@{SOME_DOMAIN}"},
        made[2]: {"email": f"client-{admin}@{SOME_DOMAIN}"},
        made[3]: {"email": f"client-{invalid}@{SOME_DOMAIN}"},
    }
    assert answer["placeholders"]["updated_by_column"] == {"email": 1, "placeholder": 3}
    assert answer["placeholders"]["kept_by_reason"] == {"no_profile": 1}


def test_an_address_that_another_contact_has_in_any_spelling_is_left_to_it(database: Database) -> None:
    for spelling in ("ann@example.com", "Bob@Example.com"):
        add_contact(spelling)
        old_contact(f"client-{add_profile(email=spelling.lower())}@unknown.com")
    ours = add_profile()
    add_contact(f"client-{ours}@{SOME_DOMAIN}")
    old_contact(f"client-{ours}@unknown.com")
    before = contacts()
    assert repaired("--placeholders")["placeholders"]["kept_by_reason"] == {"conflict": 3}
    assert contacts() == before


def test_of_two_contacts_that_could_have_an_address_the_first_gets_it(database: Database) -> None:
    profile = add_profile(email="ann@example.com")
    first, _ = (old_contact(f"{kind}-{profile}@unknown.com") for kind in ("affiliate", "client"))
    other = add_profile(email="Ann@Example.com")
    old_contact(f"client-{other}@unknown.com")
    for size in (1, 1_000):
        foretold = repair_contacts([Repair.PLACEHOLDERS], apply=False, batch_size=size)
        assert foretold.totals.kept_by_column == {"conflict": 2}, size
    before = contacts()
    repaired("--placeholders")
    assert changes(before, contacts()) == {first: {"email": "ann@example.com"}}


def test_a_repaired_contact_is_met_by_its_profile(database: Database) -> None:
    profile = add_profile("AFFILIATE")
    contact = old_contact(f"client-{profile}@unknown.com")
    repaired("--placeholders")
    answer = run()
    assert (answer["exists"], answer["created"]) == (1, 0)
    assert contacts().keys() == {contact}


# All of it


def a_bit_of_everything() -> dict[str, dict[str, Any]]:
    """Contacts with one, two and three things to repair, and what becomes of them."""
    user = add_user("pat@example.com")
    preparer = add_profile("TAX_PREPARER", userId=user)
    wanted = {add_contact("one@example.com", assignedPreparerId=user): {"assignedPreparerId": preparer}}
    for number in range(5):
        profile = add_profile("AFFILIATE", email=f"person-{number}@example.com")
        contact = old_contact(f"client-{profile}@unknown.com", assignedPreparerId=user)
        wanted[contact] = {
            "assignedPreparerId": preparer,
            "contactType": "AFFILIATE",
            "email": f"person-{number}@example.com",
        }
    bare = add_profile("TAX_PREPARER")
    wanted[old_contact(f"client-{bare}@unknown.com")] = {
        "contactType": "PREPARER",
        "email": f"preparer-{bare}@{SOME_DOMAIN}",
    }
    return wanted


@pytest.mark.parametrize(("size", "listed"), [(1, 3), (2, 20_000), (3, 2), (1_000, 20_000)])
def test_everything_at_once_in_batches_of_any_size(
    database: Database, size: int, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_LISTED", listed)
    wanted = a_bit_of_everything()
    before, others = contacts(), database.dump(*READ_ONLY, "ledger_entry")
    foretold = repair_contacts(list(Repair), apply=False, batch_size=size)
    report = repair_contacts(list(Repair), apply=True, batch_size=size)
    assert foretold.counts == report.counts
    assert changes(before, contacts()) == wanted
    assert database.dump(*READ_ONLY, "ledger_entry") == others
    assert ContactUpdate.objects.count() == report.totals.updated == 1 + 3 * 5 + 2
    record = BackfillRun.objects.get()
    assert (record.kind, record.status, record.balanced) == ("repair", "finished", True)
    assert (record.revisited, record.updated, record.read) == (18, 18, 0)
    assert set(BackfillBatch.objects.values_list("source", flat=True)) == {repair.value for repair in Repair}


def test_a_second_repair_has_nothing_left_to_change(database: Database) -> None:
    a_bit_of_everything()
    add_contact("two@example.com", assignedPreparerId="nobody")
    first = repaired()
    after = contacts()
    second = repaired()
    assert contacts() == after
    assert (first["kept"], second["kept"], second["updated"]) == (1, 1, 0)


def test_a_repair_does_what_it_is_asked_for_and_no_more(database: Database) -> None:
    wanted = a_bit_of_everything()
    column = {"--preparer-ids": "assignedPreparerId", "--types": "contactType", "--placeholders": "email"}
    for option in reversed(ALL):
        before = contacts()
        answer = repaired(option)
        assert [repair.value for repair in Repair if repair.value in answer] == [option[2:].replace("-", "_")]
        done = changes(before, contacts())
        expected = {
            contact: {column[option]: columns[column[option]]}
            for contact, columns in wanted.items()
            if column[option] in columns
        }
        assert done == expected


def test_an_update_leaves_a_repaired_value_and_fills_the_rest(database: Database) -> None:
    user = add_user("pat@example.com")
    preparer = add_profile("TAX_PREPARER", userId=user)
    add_contact("ann@example.com", assignedPreparerId=user)
    other = add_profile("TAX_PREPARER")
    add_lead("ann@example.com", assignedPreparerId=other, phone="555 0101")
    repaired("--preparer-ids")
    run()
    update()
    contact = contact_with("ann@example.com")
    assert (contact["assignedPreparerId"], contact["phone"]) == (preparer, "555 0101")


# Taking it back


def test_a_rollback_puts_back_what_stood_there(database: Database) -> None:
    a_bit_of_everything()
    before = contacts()
    answer = repaired()
    verified = verify(connection)
    assert verified.exit_code == 0
    assert taken_back(answer["run"]) == {"by_reason": {}, "reversed": 18, "kept": 0, "failed": 0}
    assert contacts() == before
    assert ContactUpdate.objects.count() == 0
    assert told(repaired()) == told(answer)


def test_an_update_before_a_repair_is_reversed_although_its_row_is_gone(database: Database) -> None:
    database.use("2026_01")
    user = add_user("pat@example.com")
    profile = add_profile("tax_preparer", userId=user)
    add_contact("ann@example.com", assignedPreparerId=user)
    intake = add_intake("ann@example.com", phone="555 0199")
    first = update()
    repaired("--preparer-ids")
    database.rows("DELETE FROM tax_intake_leads WHERE id = %s RETURNING id", intake)
    foretold = rollback(str(first["run"]), "--dry-run", "--json").answer
    answer = rollback(str(first["run"]), "--json").answer
    assert foretold["by_reason"] == answer["by_reason"] == {}
    contact = contact_with("ann@example.com")
    assert (contact["phone"], contact["assignedPreparerId"]) == (None, profile)


def test_a_rollback_says_how_to_repair_again(database: Database) -> None:
    a_bit_of_everything()
    finished = rollback(str(repaired()["run"]))
    assert finished.code == 0
    assert "Repairs                             18" in finished.stdout
    assert "`python manage.py repair_crm_contacts` with --apply makes them again." in finished.stdout
    assert "--update" not in finished.stdout


@pytest.mark.parametrize("moved", [True, False], ids=["updatedAt moved", "updatedAt left"])
def test_a_rollback_keeps_what_somebody_changed_since(database: Database, moved: bool) -> None:  # noqa: FBT001 - a parameter
    a_bit_of_everything()
    answer = repaired()
    other = add_profile("TAX_PREPARER")
    values = {"assignedPreparerId": other, "contactType": "CLIENT", "email": "new@example.com"}
    repaired_contacts = sorted(contact["id"] for contact in contacts().values() if "person-" in contact["email"])
    for contact, (column, value) in zip(repaired_contacts, values.items(), strict=False):
        change("crm_contacts", contact, **{column: value, "updatedAt": LATER if moved else CREATED_AT})
    before = contacts()
    kept = 9 if moved else 3
    assert taken_back(answer["run"]) == {
        "by_reason": {"edited": kept},
        "reversed": 18 - kept,
        "kept": kept,
        "failed": 0,
    }
    after = contacts()
    for contact, (column, value) in zip(repaired_contacts, values.items(), strict=False):
        assert after[contact][column] == value
        assert not moved or after[contact] == before[contact]


def test_a_rollback_keeps_an_address_that_the_account_has_no_longer_and_a_contact_that_is_gone(
    database: Database,
) -> None:
    profile, gone = (add_profile(email=f"{name}@example.com") for name in ("ann", "bob"))
    kept = old_contact(f"client-{profile}@unknown.com")
    deleted = old_contact(f"client-{gone}@unknown.com")
    answer = repaired("--placeholders")
    database.rows("DELETE FROM crm_contacts WHERE id = %s RETURNING id", deleted)
    database.rows("UPDATE users SET email = '' WHERE email = 'ann@example.com' RETURNING id")
    assert taken_back(answer["run"])["by_reason"] == {"deleted": 1, "source_changed": 1}
    assert contacts()[kept]["email"] == "ann@example.com"


def test_a_trigger_that_stamps_the_contact_is_no_change(database: Database) -> None:
    a_bit_of_everything()
    database.change("""
        CREATE FUNCTION public.stamp() RETURNS trigger LANGUAGE plpgsql AS
          $$ BEGIN NEW."updatedAt" := clock_timestamp(); RETURN NEW; END $$;
        CREATE TRIGGER stamp BEFORE UPDATE ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.stamp()""")
    assert taken_back(repaired()["run"])["reversed"] == 18


def test_a_repair_names_the_runs_after_it_and_is_named_by_those_before(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_lead("zoe@example.com")
    first = run()["run"]
    a_bit_of_everything()
    second = repaired()["run"]
    assert rollback(str(first), "--dry-run", "--json").answer["later_runs"] == [second]


# When others are at work


@contextmanager
def before_each_write(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` before each UPDATE of contacts, when the contacts have been read."""

    def watch(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        if statement_in(sql).startswith("SELECT FROM crm_contacts WHERE id = ANY"):
            act()
        return execute(sql, parameters, many, context)

    with each_statement(watch):
        yield


def test_a_contact_that_changes_after_it_was_read_is_read_again(database: Database) -> None:
    user = add_user("pat@example.com")
    preparer = add_profile("TAX_PREPARER", userId=user)
    other = add_profile("TAX_PREPARER")
    contact, rest = (add_contact(f"{name}@example.com", assignedPreparerId=user) for name in ("ann", "bob"))
    pending = [contact]

    def reassign() -> None:
        if pending:
            change("crm_contacts", pending.pop(), assignedPreparerId=other)

    with before_each_write(reassign):
        report = repair_contacts([Repair.PREPARER_IDS], apply=True)
    assert (report.totals.updated, report.totals.unchanged) == (1, 1)
    assert contacts()[contact]["assignedPreparerId"] == other
    assert contacts()[rest]["assignedPreparerId"] == preparer


@pytest.mark.parametrize(
    "obstacle",
    [
        "ALTER TABLE crm_contacts ADD CONSTRAINT nobody CHECK (email <> 'person-2@example.com')",
        """CREATE FUNCTION public.not_two() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN IF NEW.email = 'person-2@example.com' THEN RETURN NULL; END IF; RETURN NEW; END $$;
               CREATE TRIGGER not_two BEFORE UPDATE ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.not_two()""",
        """CREATE FUNCTION public.otherwise() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN IF NEW.email = 'person-2@example.com' THEN NEW.email := 'x@example.com'; END IF;
                 RETURN NEW; END $$;
               CREATE TRIGGER otherwise BEFORE UPDATE ON crm_contacts
                 FOR EACH ROW EXECUTE FUNCTION public.otherwise()""",
    ],
    ids=["a constraint", "a trigger that suppresses", "a trigger that rewrites"],
)
def test_what_the_database_refuses_keeps_no_other_contact_from_its_repair(database: Database, obstacle: str) -> None:
    wanted = a_bit_of_everything()
    database.change(obstacle)
    before = contacts()
    finished = repair(*ALL, "--apply", "--json")
    assert (finished.code, finished.answer["status"], finished.answer["balanced"]) == (1, "finished", True)
    assert f"run {finished.answer['run']}: the database refused 3 of the repairs; --csv lists them\n" == finished.stderr
    refused = next(contact for contact, columns in wanted.items() if columns.get("email") == "person-2@example.com")
    del wanted[refused]
    assert changes(before, contacts()) == wanted
    for name in Repair:
        assert finished.answer[name]["kept_by_reason"] == {"refused": 1}


class Boom(Exception):  # noqa: N818 - a test's own
    """Ends a run as nothing else does."""


def test_a_repair_that_dies_in_the_middle_goes_on_where_it_stopped(database: Database) -> None:
    wanted = a_bit_of_everything()
    before = contacts()
    batches = 0

    def die() -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise Boom

    with pytest.raises(Boom), before_each_write(die):
        repair_contacts(list(Repair), apply=True, batch_size=1)
    first = BackfillRun.objects.get()
    assert (first.status, ContactUpdate.objects.count()) == ("failed", first.updated)
    done = changes(before, contacts())
    assert len(done) == 2
    assert done.items() <= wanted.items()
    second = repair_contacts(list(Repair), apply=True, batch_size=1)
    assert changes(before, contacts()) == wanted
    assert first.updated + second.totals.updated == 18
    for number in (second.run_id, first.pk):
        assert rollback(str(number)).code == 0
    assert contacts() == before


@pytest.mark.process
def test_a_repair_that_is_killed_in_the_middle_goes_on_when_it_is_run_again(database: Database) -> None:
    wanted = a_bit_of_everything()
    before = contacts()
    database.change("""
        CREATE FUNCTION public.slowly() RETURNS trigger LANGUAGE plpgsql AS
          $$ BEGIN PERFORM pg_sleep(0.3); RETURN NEW; END $$;
        CREATE TRIGGER slowly BEFORE UPDATE ON crm_contacts FOR EACH ROW EXECUTE FUNCTION public.slowly()""")
    process = processes.start(
        "repair_crm_contacts", *ALL, "--apply", "--batch-size=1", "--no-progress", url=processes.database_url()
    )
    wait_until(lambda: ContactUpdate.objects.count() > 0 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not others_at_work(database))
    (dead,) = BackfillRun.objects.running()
    done = changes(before, contacts())
    assert 0 < len(done) < len(wanted)
    assert done.items() <= wanted.items()
    assert dead.updated == ContactUpdate.objects.count() == sum(map(len, done.values()))
    finished = repair(*ALL, "--apply", "--json")
    assert (finished.code, finished.answer["updated"]) == (0, 18 - dead.updated)
    assert changes(before, contacts()) == wanted
    dead.refresh_from_db()
    assert (dead.status, "taken over" in str(dead.failure)) == ("interrupted", True)
    for number in (finished.answer["run"], dead.pk):
        assert taken_back(number)["kept"] == 0
    assert contacts() == before


def others_at_work(database: Database) -> list[Any]:
    return database.rows(
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND state <> 'idle'"
    )


@pytest.mark.parametrize(("status", "code"), [(RunStatus.PAUSED, 4), (RunStatus.CANCELLED, 4)])
def test_a_repair_that_is_paused_or_cancelled_stops_at_its_next_batch(
    database: Database, status: RunStatus, code: int
) -> None:
    a_bit_of_everything()
    before = contacts()
    pending = [status]

    def stop() -> None:
        if pending:
            set_status(pending.pop())

    with before_each_write(stop):
        finished = repair(*ALL, "--apply")
    assert finished.code == code
    assert contacts() == before
    assert f"The repair was {status}" in finished.stderr
    assert "run the command again to continue" in finished.stderr


def test_a_repair_waits_for_no_other_run_and_no_run_for_it(database: Database) -> None:
    going = make_run("running")
    finished = repair(*ALL, "--apply")
    assert finished.code == 3
    assert f"Run {going.pk} is in progress" in finished.stderr
    assert repair(*ALL).code == 0, "a dry run needs no lease"


def test_a_paused_repair_is_continued_by_its_own_command(database: Database) -> None:
    paused = make_run("paused", kind="repair", options={"repairs": ["preparer_ids", "types"]})
    said = called("backfill_runs", "resume", str(paused.pk)).stdout
    assert "only `python manage.py repair_crm_contacts --preparer-ids --types --apply` continues it" in said
    again = make_run("running", kind="repair", options={"repairs": ["types"]})
    assert "lets the repair continue" in called("backfill_runs", "pause", str(again.pk)).stdout


# What is asked and told


@pytest.mark.parametrize("arguments", [(), ("--apply",), ("--json",), ("--apply", "--json")])
def test_without_a_repair_nothing_is_done(database: Database, arguments: tuple[str, ...]) -> None:
    a_bit_of_everything()
    before = everything()
    finished = repair(*arguments)
    assert (finished.code, finished.stdout) == (2, "")
    assert finished.stderr == (
        "CommandError: Nothing to repair: give at least one of --preparer-ids, --types, --placeholders. Nothing was "
        "written.\n"
    )
    assert everything() == before


def test_the_list_has_ids_and_reasons_alone(database: Database, tmp_path: Path) -> None:
    a_bit_of_everything()
    kept = add_contact("two@example.com", assignedPreparerId="nobody")
    add_contact("three@example.com", assignedPreparerId=add_profile("TAX_PREPARER"))
    lists = [tmp_path / "dry.csv", tmp_path / "applied.csv"]
    assert repair(*ALL, "--csv", str(lists[0])).code == 0
    assert repair(*ALL, "--apply", "--csv", str(lists[1])).code == 0
    dry, applied = (list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) for path in lists)
    assert sorted(map(str, dry)) == sorted(map(str, applied))
    assert len(applied) == 19
    ids = {row for table in ("profiles", "crm_contacts") for (row,) in database.rows(f"SELECT id FROM {table}")}
    for row in applied:
        assert row["contact_id"] in ids
        assert row["row"] == "" or row["row"].removeprefix("profiles:") in ids
    (left,) = [row for row in applied if row["outcome"] == "kept"]
    assert left == {
        "repair": "preparer_ids", "contact_id": kept, "outcome": "kept", "why": "no_profile", "changed": "", "row": "",
    }  # fmt: skip
    assert "example.com" not in lists[1].read_text(encoding="utf-8")
    again = repair(*ALL, "--apply", "--csv", str(lists[1]))
    assert (again.code, "already exists" in again.stderr) == (2, True)


def test_the_summary_has_the_counts_and_what_to_do_next(database: Database) -> None:
    a_bit_of_everything()
    dry = repair(*ALL)
    assert "would be repaired" in dry.stdout
    assert "Nothing was written: with --apply, the same command repairs these contacts." in dry.stdout
    done = repair(*ALL, "--apply")
    number = BackfillRun.objects.get().pk
    assert "Reconciliation: 18 read = 18 changed + 0 kept + 0 unchanged  (holds)" in done.stdout
    assert f"`python manage.py rollback_crm_backfill {number} --dry-run` shows how to take this back." in done.stdout
    assert called("backfill_runs", "watch", str(number)).stdout.endswith("18 read: 18 changed, 0 kept, 0 unchanged.\n")
    shown = json.loads(called("backfill_runs", "show", str(number), "--json").stdout)
    assert shown["by_source"]["types"] == {"updated": 6, "kept": 0, "unchanged": 0}
    assert (shown["kind"], shown["options"]["repairs"]) == ("repair", ["preparer_ids", "types", "placeholders"])


def test_the_trace_of_a_person_does_not_follow_the_preparer(database: Database) -> None:
    user = add_user("pat@example.com")
    preparer = add_profile("TAX_PREPARER", userId=user)
    ann, bob = (add_contact(f"{name}@example.com", assignedPreparerId=user) for name in ("ann", "bob"))
    number = repaired("--preparer-ids")["run"]
    trace = called("trace_contact", ann, "--json").answer
    assert [contact["contact_id"] for contact in trace["contacts"]] == [ann]
    assert trace["rows"] == []
    (found,) = trace["updates"]
    assert (found["run"], found["columns"]) == (number, ["assigned_preparer_id"])
    of_preparer = called("trace_contact", f"profiles:{preparer}", "--json").answer
    assert (of_preparer["contacts"], of_preparer["updates"]) == ([], [])
    assert bob in called("trace_contact", bob).stdout


# Rights


def test_a_dry_run_needs_nothing_but_reading_and_works_before_migrate(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    a_bit_of_everything()
    with reading_role(database) as role, acting_as(role), without_ledger():
        finished = repair(*ALL, "--json")
    assert (finished.code, finished.answer["updated"]) == (0, 18)
    assert "takes contacts of the backfill for contacts that were created elsewhere" in caplog.text
    refused = None
    with reading_role(database) as role, acting_as(role):
        refused = repair(*ALL, "--apply")
    assert (refused.code, refused.stdout) == (2, "")


@contextmanager
def without_ledger() -> Iterator[None]:
    with acting_as("postgres"), without_own_schema():
        yield


def test_the_role_of_the_script_repairs_what_its_options_allow(database: Database) -> None:
    a_bit_of_everything()
    before = contacts()
    with role_made_by_script() as url:
        allowed = managed("repair_crm_contacts", "--preparer-ids", "--apply", "--json", "--no-progress", url=url)
        assert (allowed.code, allowed.stderr, json.loads(allowed.stdout)["updated"]) == (0, "", 6)
        everything_else = everything()
        for option, column in (("--types", "contactType"), ("--placeholders", "email")):
            refused = managed("repair_crm_contacts", option, "--apply", "--no-progress", url=url)
            assert (refused.code, refused.stdout) == (2, "")
            assert f"This role lacks: UPDATE on crm_contacts.{column}." in refused.stderr
            assert "least_privilege.sql again with --set update=on, or leave --apply out first" in refused.stderr
            assert "crm_stage_history" not in refused.stderr
        assert everything() == everything_else
    with role_made_by_script(update="on") as url:
        done = managed("repair_crm_contacts", *ALL, "--apply", "--json", "--no-progress", url=url)
        assert (done.code, done.stderr, json.loads(done.stdout)["updated"]) == (0, "", 12)
    numbers = [json.loads(ended.stdout)["run"] for ended in (done, allowed)]
    with role_made_by_script(update="on", rollback="on") as url:
        taken = managed("rollback_crm_backfill", str(numbers[0]), "--no-progress", url=url)
        assert (taken.code, taken.stderr) == (0, "")
    with role_made_by_script(rollback="on") as url:
        taken = managed("rollback_crm_backfill", str(numbers[1]), "--no-progress", url=url)
        assert (taken.code, taken.stderr) == (0, "")
    assert contacts() == before
    assert OPTIONS[Operation.REPAIR_TYPES] == OPTIONS[Operation.REPAIR_PLACEHOLDERS] == ("update",)
    assert ROLE


def test_only_the_repaired_columns_are_written(database: Database) -> None:
    a_bit_of_everything()
    with statements() as sent:
        repair_contacts([Repair.PREPARER_IDS], apply=True)
    (written,) = [statement.sql for statement in sent if statement.sql.startswith("UPDATE crm_contacts")]
    assert written.startswith('UPDATE crm_contacts c SET "assignedPreparerId" = v."assignedPreparerId" FROM')


def test_the_record_of_a_change_is_derived_from_ids(database: Database) -> None:
    profile = add_profile("AFFILIATE", email="ann@example.com")
    contact = old_contact(f"client-{profile}@unknown.com")
    repaired()
    records = {record.columns: record for record in ContactUpdate.objects.all()}
    assert records.keys() == {"contact_type", "email"}
    email = records["email"]
    assert (email.placeholder, email.former, email.line_id) == (
        f"client-{profile}@unknown.com",
        None,
        contact_id("profiles", profile),
    )
    assert (email.contact_id, email.row, email.source) == (contact, f"profiles:{profile}", "affiliates")
    assert "ann@example.com" not in str(database.dump("contact_update", "backfill_run", "backfill_batch"))


# Any contacts

USERS, PROFILES = 4, 4


@st.composite
def people(draw: st.DrawFn) -> tuple[list[Row], list[Row], list[Row]]:
    """Users, profiles and contacts that may have any of the faults, and keys that cross."""
    users = [
        {
            "id": f"u{number}",
            "email": draw(st.sampled_from([f"p{number}@example.com", f"P{number}@X.com", str(number)])),
        }
        for number in range(USERS)
    ]
    roles = st.sampled_from(["CLIENT", "TAX_PREPARER", "AFFILIATE", "LEAD", "ADMIN"])
    links = draw(st.permutations([user["id"] for user in users]))
    profiles: list[Row] = [
        {"id": f"c{number}", "role": draw(roles), "userId": draw(st.sampled_from([links[number], None]))}
        for number in range(PROFILES)
    ]
    ids = [row["id"] for row in (*users, *profiles)]
    addresses = [
        *(f"{kind}-{profile['id']}@unknown.com" for kind in ("client", "affiliate") for profile in profiles),
        *(user["email"] for user in users),
        *(f"client-{profile['id']}@{SOME_DOMAIN}" for profile in profiles),
        *("client-nobody@unknown.com", "x@unknown.com", "P1@EXAMPLE.com"),
    ]
    found = []
    user_ids = draw(st.permutations([user["id"] for user in users]))
    for number, email in enumerate(draw(st.lists(st.sampled_from(addresses), unique=True, max_size=8))):
        found.append(
            {
                "id": f"contact-{number}",
                "email": email,
                "contactType": draw(st.sampled_from(["CLIENT", "PREPARER", "AFFILIATE", "LEAD"])),
                "source": draw(st.sampled_from(["backfill", "manual", None])),
                "assignedPreparerId": draw(st.sampled_from([*ids, "nobody", "", None])),
                "userId": draw(st.sampled_from([*user_ids[number : number + 1], None])),
                "updatedAt": draw(st.sampled_from([CREATED_AT, UPDATED_AT])),
                "createdAt": CREATED_AT,
            }
        )
    return users, profiles, found


@against_the_database(15)
@given(
    everyone=people(), options=st.sets(st.sampled_from(list(Repair)), min_size=1), size=st.sampled_from([1, 2, 1000])
)
def test_whatever_stands_there_a_repair_is_foretold_settles_and_is_taken_back(
    database: Database, everyone: tuple[list[Row], list[Row], list[Row]], options: set[Repair], size: int
) -> None:
    database.empty()
    users, profiles, found = everyone
    for user in users:
        add_user(**user)
    for profile in profiles:
        add_profile(**profile)
    for contact in found:
        add_contact(**contact)
    before = contacts()
    foretold = repair_contacts(options, apply=False, batch_size=1_001 - size)
    assert contacts() == before
    report = repair_contacts(options, apply=True, batch_size=size)
    assert (report.counts, report.balanced) == (foretold.counts, True)
    after = contacts()
    columns = {Repair.PREPARER_IDS: "assignedPreparerId", Repair.TYPES: "contactType", Repair.PLACEHOLDERS: "email"}
    done = changes(before, after)
    assert {name for columns_of in done.values() for name in columns_of} <= {columns[option] for option in options}
    assert sum(map(len, done.values())) == report.totals.updated
    again = repair_contacts(options, apply=True, batch_size=size)
    settled = contacts()
    assert (again.totals.updated, settled) == (0, after)
    for number in (again.run_id, report.run_id):
        assert number is not None
        if ContactUpdate.objects.filter(run=number).exists():
            assert taken_back(number)["kept"] == 0
    assert contacts() == before

"""A person resolves a conflict of a row: who, when and what is recorded, and what is no resolution is refused."""

from __future__ import annotations

import getpass
import logging

import pytest
from django.db import IntegrityError, OperationalError, connection
from django.db.models.functions import Now

from crm.conflicts import resolving
from crm.models import BackfillRun, ConflictResolution
from crm.models.ledger import RunStatus
from crm.rollback.runner import roll_back
from crm.runs import lease
from tests.conftest import Database
from tests.support.builders import add_contact, add_intake, add_lead, add_profile, add_user, ledger
from tests.support.circumstances import acting_as, reading_role
from tests.support.commands import run
from tests.support.conflicts import ANN, OTHER, entry_of, resolve, resolved, somebody_elses_account
from tests.support.processes import database_url, manage, server_log, session
from tests.support.roles import role_made_by_script
from tests.support.sessions import managed

# The record


def test_a_resolution_says_who_and_when_and_a_later_one_replaces_it(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    resolved(row, "--separate", OTHER)
    first = ConflictResolution.objects.get()
    resolved(row, "--contact", contact)
    second = ConflictResolution.objects.get()
    assert (first.contact_id, first.separate_email) == (None, OTHER)
    assert (second.contact_id, second.separate_email) == (contact, None)
    assert second.decided_by == getpass.getuser()
    assert second.row == row
    assert second.decided_at > first.decided_at


@pytest.mark.parametrize("columns", [{}, {"contact_id": "c", "separate_email": OTHER}])
def test_the_table_takes_one_of_the_two(database: Database, columns: dict[str, str]) -> None:
    with pytest.raises(IntegrityError):
        ConflictResolution.objects.create(id="1", row="leads:1", decided_by="me", **columns)


def test_the_address_is_in_the_resolution_and_nowhere_else(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    row, _, _ = somebody_elses_account()
    outputs = [resolve(row, "--separate", address) for address in (OTHER, "ann@", "elsewhere@example.com")]
    run()
    texts = [text for output in outputs for text in (output.stdout, output.stderr)]
    for text in (*texts, caplog.text, str(database.dump("ledger_entry", "backfill_run", "backfill_batch"))):
        assert "example.com" not in text
        assert "ann@" not in text


def test_the_address_of_a_decision_that_postgresql_refuses_is_not_in_the_servers_log(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    with role_made_by_script() as url, session() as owner:
        owner.autocommit = True
        owner.execute("ALTER TABLE conflict_decision ADD CONSTRAINT closed CHECK (decided_by = '') NOT VALID")
        try:
            with server_log() as logged:
                refused = [
                    managed("resolve_crm_conflict", row, *decision, url=url)
                    for decision in (("--separate", OTHER), ("--contact", contact))
                ]
                log = logged()
        finally:
            owner.execute("ALTER TABLE conflict_decision DROP CONSTRAINT closed")
    for finished in refused:
        assert (finished.code, finished.stdout) == (2, "")
        assert "Nothing was recorded: run the command again." in finished.stderr
        assert "IntegrityError (23514)" in finished.stderr
    assert log == ""
    assert not ConflictResolution.objects.exists()


# Refusals


def test_what_is_no_resolution_is_refused_and_nothing_is_recorded(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    add_user("account@example.com")
    add_lead("Lead@example.com")
    add_lead("broken")
    run()
    settled = next(name for name, entry in ledger().items() if entry["outcome"] == "created")
    invalid = next(name for name, entry in ledger().items() if entry["reason"] == "invalid_email")
    for arguments, words in (
        (("profiles:nobody", "--contact", contact), "has no row profiles:nobody"),
        ((settled, "--contact", contact), "not in conflict, it is created"),
        ((invalid, "--contact", contact), "not in conflict, it is an error (invalid_email)"),
        ((row, "--contact", "nobody"), "There is no contact nobody"),
        ((row, "--separate", "ann@"), "not a valid email address"),
        ((row, "--separate", ""), "not a valid email address"),
        ((row, "--separate", ANN.upper()), f"already used by contact {contact}"),
        ((row, "--separate", "Account@Example.com"), "already used by user"),
        ((row, "--separate", "lead@example.com"), "already used by contact"),
        ((row, "--separate", "BROKEN"), "not a valid"),
        (("users:1", "--contact", contact), "has no row users:1"),
        (("contacts:1", "--contact", contact), "names no row"),
        (("profiles:", "--contact", contact), "names no row"),
        (("nothing", "--contact", contact), "names no row"),
    ):
        finished = resolve(*arguments)
        assert (finished.code, finished.stdout) == (2, ""), arguments
        assert words in finished.stderr
        assert finished.stderr.count("\n") == 1
        assert ("Nothing was recorded." in finished.stderr) == ("names no row" not in words)
        assert "recorded" not in resolve(arguments[0]).stderr
    assert not ConflictResolution.objects.exists()


@pytest.mark.parametrize("generation", ["2026_01"])
def test_an_address_of_another_profile_itself_is_somebodys(database: Database, generation: str) -> None:
    user = add_user(ANN)
    add_contact(ANN, userId=add_user("other@example.com"))
    row, other = f"profiles:{add_profile('client', userId=user)}", add_profile("admin", userId=add_user(""))
    run()
    database.rows("UPDATE profiles SET email = 'Own@example.com' WHERE id = %s RETURNING id", other)
    assert f"already used by profiles:{other}" in resolve(row, "--separate", "own@example.com").stderr
    database.rows("UPDATE profiles SET email = %s WHERE id = %s RETURNING id", OTHER, row.partition(":")[2])
    assert resolve(row, "--separate", OTHER).code == 0


def test_an_address_of_another_row_or_resolution_is_somebodys(database: Database) -> None:
    row, _, _ = somebody_elses_account()
    lead, intake = add_lead("pending@example.com"), add_intake("taxes@example.com")
    assert f"already used by leads:{lead}" in resolve(row, "--separate", "Pending@example.com").stderr
    assert f"already used by tax_intake_leads:{intake}" in resolve(row, "--separate", "Taxes@example.com").stderr
    database.change("DROP TABLE tax_intake_leads CASCADE")
    assert f"already used by leads:{lead}" in resolve(row, "--separate", "pending@example.com").stderr
    ConflictResolution.objects.create(id="1", row="leads:1", separate_email=OTHER, decided_by="me")
    finished = resolve(row, "--separate", OTHER)
    assert (finished.code, "another row" in finished.stderr) == (2, True)


def test_a_resolution_is_one_of_the_two(database: Database) -> None:
    assert resolve("profiles:1", "--contact", "c", "--separate", OTHER).code == 2


def test_without_a_resolution_the_conflict_is_shown_and_nothing_is_written(database: Database) -> None:
    row, user, contact = somebody_elses_account()
    by_user = add_contact("ann@elsewhere.example", userId=user)
    run()
    before = database.dump()
    shown = resolve(row)
    assert (shown.code, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"{row}: {contact} (email), {by_user} (userId)\n")
    assert f"--contact {contact} or {by_user} if" in shown.stdout
    assert "--separate" in shown.stdout
    refused = resolve("profiles:nobody")
    assert (refused.code, "has no row profiles:nobody" in refused.stderr) == (2, True)
    assert "recorded" not in refused.stderr
    assert database.dump() == before
    resolved(row, "--contact", contact)
    told = resolve(row).stdout
    assert f"it belongs to the contact {contact}. The next run applies this." in told
    assert "Resolve the conflict with" not in told
    database.rows("DELETE FROM ledger_entry RETURNING id")
    assert "the next run applies the resolution" in resolve(row).stdout


def test_what_a_resolution_that_holds_no_more_is_about_is_shown(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    other = add_contact("other@example.com")
    resolved(row, "--contact", other)
    database.rows("DELETE FROM crm_contacts WHERE id = %s RETURNING id", other)
    run()
    assert resolve(row).stdout.startswith(
        f"{row}: {contact} (email), no contact (userId), {other}\nResolve the conflict again"
    )


def test_a_resolution_for_a_contact_that_is_gone_is_not_shown_as_good(database: Database) -> None:
    row, _, _ = somebody_elses_account()
    other = add_contact("other@example.com")
    resolved(row, "--contact", other)
    assert "The next run applies this." in resolve(row).stdout
    database.rows("DELETE FROM crm_contacts WHERE id = %s RETURNING id", other)
    for _ in ("in conflict", "pending"):
        shown = resolve(row)
        assert (shown.code, shown.stderr) == (0, "")
        assert f"The contact {other} no longer exists: resolve the conflict again" in shown.stdout
        assert "carries" not in shown.stdout
        database.rows("DELETE FROM ledger_entry RETURNING id")


def test_what_the_database_breaks_off_while_a_conflict_is_shown_was_not_to_be_recorded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OperationalError("gone")

    monkeypatch.setattr(resolving, "_require_conflict", broken)
    shown, recorded = resolve("leads:1"), resolve("leads:1", "--contact", "c")
    assert (shown.code, recorded.code) == (2, 2)
    assert ("recorded" in shown.stderr, "Nothing was recorded" in recorded.stderr) == (False, True)


def test_nothing_is_resolved_while_a_run_is_going(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    BackfillRun.objects.update(status=RunStatus.RUNNING, host="another machine", heartbeat_at=Now())
    refused = resolve(row, "--contact", contact)
    assert (refused.code, "is in progress" in refused.stderr) == (3, True)
    assert not ConflictResolution.objects.exists()
    BackfillRun.objects.update(heartbeat_at=Now() - lease.HEARTBEAT_LASTS * 2)
    resolved(row, "--contact", contact)
    assert BackfillRun.objects.get().status == RunStatus.INTERRUPTED


def test_a_run_that_was_taken_back_can_be_resolved_anew(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    resolved(row, "--separate", OTHER)
    roll_back(run()["run"])
    assert row not in ledger()
    resolved(row, "--contact", contact)
    assert run()["exists"] == 1
    assert entry_of(row) == ("exists", None, contact)


def test_a_role_that_may_not_decide_is_told_so(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    with reading_role(database) as role:
        with acting_as(role):
            blind = resolve(row, "--contact", contact)
        with connection.cursor() as cursor:
            cursor.execute(f"GRANT USAGE ON SCHEMA crm_backfill TO {role}")
            cursor.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA crm_backfill TO {role}")
        with acting_as(role):
            refused = resolve(row, "--contact", contact)
    assert (blind.code, "GRANT USAGE on the schema crm_backfill" in blind.stderr) == (2, True)
    assert (refused.code, "may not read the row or record a resolution" in refused.stderr) == (2, True)


@pytest.mark.process
def test_an_operator_decides_on_the_command_line(database: Database) -> None:
    row, _, contact = somebody_elses_account()
    finished = manage("resolve_crm_conflict", row, "--contact", contact, url=database_url())
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(f"{row} belongs to the contact {contact}.")
    assert manage("resolve_crm_conflict", row, "--contact", "nobody", url=database_url()).returncode == 2

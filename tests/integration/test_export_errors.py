"""The export of the rows in error: every one, what to do about it, and nobody's name unless asked for."""

from __future__ import annotations

import csv
import re
import stat
import unicodedata
from io import StringIO
from pathlib import Path

import pytest
from django.db import connection
from hypothesis import example, given
from hypothesis import strategies as st

from crm.conflicts import dead_letters, remedies
from crm.outcome import Reason, Source
from crm.output.spreadsheet import cell, row_writer
from crm.postgres import snapshot
from tests.conftest import Database
from tests.support import builders
from tests.support.circumstances import acting_as, reading_role, refusing_contacts, without_own_schema
from tests.support.commands import Finished, called, run, statements
from tests.support.processes import database_url, start

COLUMNS = [
    *("source", "row", "id", "reason", "what_to_do", "contact_id", "contacts"),
    *("sqlstate", "constraint", "column", "table", "trigger", "row_gone", "decision"),
]


def command(*arguments: str) -> Finished:
    """`manage.py export_backfill_errors` with these arguments, in this process."""
    return called("export_backfill_errors", *arguments)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text, newline="")))


def add_a_conflict(email: str = "zelda.quimby@example.com") -> tuple[str, str]:
    """A profile whose address is in another account's contact; returns the profile and the contact."""
    contact = builders.add_contact(email, userId=builders.add_user(f"other-{email}"))
    return builders.add_profile(email=email, firstName="Zelda"), contact


def user_of(profile: str) -> str:
    with connection.cursor() as cursor:
        cursor.execute('SELECT "userId" FROM profiles WHERE id = %s', [profile])
        return str(cursor.fetchone()[0])


def test_every_row_in_error_has_one_line_and_others_have_none(database: Database) -> None:
    profile, contact = add_a_conflict()
    by_user = builders.add_contact("zelda@elsewhere.example", userId=user_of(profile))
    first, second = builders.add_lead("zelda"), builders.add_lead("quimby", "CONVERTED")
    intake = builders.add_intake("zelda")
    builders.add_lead("good@example.com")
    builders.add_lead("GOOD@example.com")
    builders.add_profile("ADMIN", email="admin@example.com")
    run()
    ended = command()
    rows = rows_of(ended.stdout)
    assert (ended.code, ended.stderr) == (0, "Rows in error: 4\n")
    assert list(rows[0]) == COLUMNS
    assert [(row["source"], row["row"], row["id"], row["reason"], row["contact_id"]) for row in rows] == [
        ("clients", f"profiles:{profile}", profile, "conflict", contact),
        ("converted_leads", f"leads:{second}", second, "invalid_email", ""),
        ("active_leads", f"leads:{first}", first, "invalid_email", ""),
        ("open_intakes", f"tax_intake_leads:{intake}", intake, "invalid_email", ""),
    ]
    assert rows[0]["contacts"] == f"{contact} (email), {by_user} (userId)"
    assert rows[0]["what_to_do"] == (
        f"Resolve the conflict with resolve_crm_conflict profiles:{profile}: --contact {contact} or {by_user} if that "
        "is the same person, --separate with another address if none is."
    )


def test_what_the_database_said_of_a_row_is_told(database: Database) -> None:
    builders.add_lead("zelda.quimby@example.com", firstName="Zelda")
    with refusing_contacts("23514"):
        run()
    ended = command()
    (row,) = rows_of(ended.stdout)
    assert (row["reason"], row["sqlstate"]) == ("data_error", "23514")
    assert "zelda" not in ended.stdout.lower()


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_has_one_sentence_that_says_what_to_do(reason: Reason) -> None:
    sentence = remedies.remedy("leads:1", reason, "c1", {"email": "c1", "userId": None})
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")


def test_a_reason_of_a_later_version_is_exported_too(database: Database) -> None:
    builders.add_lead("nobody")
    run()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE ledger_entry SET reason = 'something_new'")
    (row,) = rows_of(command().stdout)
    assert (row["reason"], row["what_to_do"]) == ("something_new", remedies.REMEDY_OF_OTHERS)


def test_no_personal_data_unless_it_is_asked_for(database: Database) -> None:
    add_a_conflict()
    builders.add_profile(email="Zelda Quimby")
    lead = builders.add_lead(" =cmd|zelda", firstName="Zelda", lastName="Quimby", phone="555 0199")
    gone = builders.add_lead("gone")
    builders.add_intake("Zelda's form", first_name="Zelda", phone="555 0199")
    run()
    database.rows("DELETE FROM leads WHERE id = %s RETURNING id", gone)
    with statements() as sent:
        ended = command()
    assert [statement for statement in sent if "users.email" in statement.sql] == []
    assert [word for word in ("zelda", "quimby", "555 0199") if word in (ended.stdout + ended.stderr).lower()] == []
    rows = rows_of(command("--with-email").stdout)
    assert list(rows[0]) == [*COLUMNS, "email"]
    assert sorted(row["email"] for row in rows) == [
        "",
        "' =cmd|zelda",
        "Zelda Quimby",
        "Zelda's form",
        "zelda.quimby@example.com",
    ]
    assert [row["email"] for row in rows if row["id"] == lead] == ["' =cmd|zelda"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", " =1", "\N{NO-BREAK SPACE}=1", "+1 555 0199"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\u200b", "\x01", " \N{NO-BREAK SPACE}"])
def test_no_cell_is_a_formula(before: str, text: str) -> None:
    assert cell(before + text) == f"'{before}{text}"


@pytest.mark.parametrize("text", ["\N{FULLWIDTH EQUALS SIGN}1+1", "\N{FULLWIDTH COMMERCIAL AT}SUM(1)", "=\u0338 1"])
def test_no_cell_is_a_formula_in_other_characters(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a;=1+1", "a;'=1+1"),
        ("a\t=1+1", "a\t'=1+1"),
        ("a| -1;b;@x", "a|' -1;b;'@x"),
        ('a;"=1"', 'a;\'"=1"'),
        ("a\n=1", "a\n'=1"),
        ("\tx", "'\tx"),
        ("\t=1", "'\t'=1"),
        ("\r\n@x", "'\r\n'@x"),
    ],
)
def test_no_part_of_a_cell_is_a_formula_wherever_it_is_split(text: str, expected: str) -> None:
    assert cell(text) == expected


@given(st.text(st.sampled_from("=+-@;|\t\r\n\" '\ufeff\x01a1\N{FULLWIDTH EQUALS SIGN}\u0338") | st.characters()))
def test_whatever_a_cell_is_split_at_no_part_begins_a_formula_and_nothing_is_lost(text: str) -> None:
    shown = cell(text)
    for part in re.split(r"[;|\t\r\n]", shown):
        seen = [character for character in part if unicodedata.category(character)[0] not in "CZ" and character != '"']
        assert unicodedata.normalize("NFKC", "".join(seen[:1]))[:1] not in {"=", "+", "-", "@"}
    assert shown.replace("'", "") == text.replace("'", "")


@given(st.lists(st.text(st.sampled_from("\r\na,\"' ;=\N{LINE SEPARATOR}"), max_size=4), min_size=2, max_size=4))
@example(["a\rb", "c"])
def test_every_row_is_read_as_it_was_written(values: list[str]) -> None:
    file = StringIO(newline="")
    write = row_writer(file)
    names = [str(number) for number in range(len(values))]
    write(names)
    write(values)
    assert rows_of(file.getvalue()) == [dict(zip(names, map(cell, values), strict=True))]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("export_backfill_errors", ("--output", "-")),
        ("verify_crm_contacts", ("--csv", "-")),
        ("rollback_crm_backfill", ("1", "--csv", "-")),
    ],
)
def test_a_dash_is_no_file(name: str, arguments: tuple[str, ...]) -> None:
    ended = called(name, *arguments)
    assert (ended.code, ended.stdout) == (2, "")
    assert "leave the option out to write to standard output" in ended.stderr


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ""), ("", ""), ("a=1", "a=1"), ("x@y", "x@y"), (3, "3"), ("a; b", "a; b")]
)
def test_other_cells_are_as_they_are(value: object, expected: str) -> None:
    assert cell(value) == expected


def test_a_row_that_is_gone_from_the_application_is_marked_so(database: Database) -> None:
    profile, _ = add_a_conflict()
    left = builders.add_lead("nobody")
    for email in ("not there", "nor there"):
        builders.add_lead(email)
    intake = builders.add_intake("nobody")
    builders.add_intake("expired")
    run()
    database.rows("DELETE FROM leads WHERE id <> %s RETURNING id", left)
    database.rows("DELETE FROM tax_intake_leads WHERE id <> %s RETURNING id", intake)
    ended = command()
    assert ended.stderr == "Rows in error: 6, of which 3 no longer exist in the application\n"
    rows = rows_of(ended.stdout)
    assert {row["id"] for row in rows if not row["row_gone"]} == {left, profile, intake}
    assert {(row["row_gone"], row["what_to_do"]) for row in rows if row["row_gone"]} == {
        (dead_letters.GONE, remedies.REMEDY_OF_GONE)
    }


def test_a_conflict_that_was_decided_says_so_in_the_words_of_the_command_that_decides(database: Database) -> None:
    (profile, contact), (other, _) = add_a_conflict(), add_a_conflict("bo@example.com")
    builders.add_lead("nobody")
    run()
    for arguments, whose in (
        (("--separate", "zoe@example.com"), "it gets its own contact"),
        (("--contact", contact), f"it belongs to the contact {contact}"),
    ):
        assert called("resolve_crm_conflict", f"profiles:{profile}", *arguments).code == 0
        ended = command()
        rows = {row["id"]: row for row in rows_of(ended.stdout)}
        shown = called("resolve_crm_conflict", f"profiles:{profile}").stdout
        assert rows[profile]["decision"].startswith("Resolved at ")
        assert rows[profile]["decision"].endswith(f" (UTC): {whose}")
        assert rows[profile]["decision"].removeprefix("Resolved ") in shown
        assert rows[profile]["what_to_do"] == (
            "Nothing: the next run applies the resolution. To change it, use resolve_crm_conflict "
            f"profiles:{profile} again."
        )
        assert [row["decision"] for row in rows.values() if row["id"] != profile] == ["", ""]
        assert rows[other]["what_to_do"].startswith("Resolve the conflict with")
        assert "zoe" not in ended.stdout
    database.rows("DELETE FROM crm_contacts WHERE id = %s RETURNING id", contact)
    (row,) = [row for row in rows_of(command().stdout) if row["id"] == profile]
    assert row["what_to_do"].startswith("Resolve the conflict with"), "no run can apply that resolution"
    run()
    (row,) = [row for row in rows_of(command().stdout) if row["id"] == profile]
    assert (row["reason"], row["what_to_do"][:26]) == ("stale_decision", "Resolve the conflict again")
    assert row["decision"].endswith(f"it belongs to the contact {contact}")


def test_a_file_is_readable_by_its_owner_alone(database: Database, tmp_path: Path) -> None:
    builders.add_lead("nobody")
    run()
    file = tmp_path / "errors.csv"
    ended = command("--with-email", "--output", str(file))
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "Rows in error: 1\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text(encoding="utf-8") == command("--with-email").stdout


def test_wrong_usage_and_databases_that_do_not_fit_exit_with_two(database: Database, tmp_path: Path) -> None:
    assert command("--no-such-thing").code == 2
    ended = command("--output", str(tmp_path / "missing" / "errors.csv"))
    assert ended.code == 2
    assert "--output" in ended.stderr
    with without_own_schema():
        ended = command("--output", str(tmp_path / "errors.csv"))
    assert (ended.code, ended.stderr.count("\n"), list(tmp_path.iterdir())) == (2, 1, [])
    assert "no ledger" in ended.stderr


def test_a_file_that_is_there_is_never_replaced(database: Database, tmp_path: Path) -> None:
    yesterdays = tmp_path / "errors.csv"
    yesterdays.write_text("as it was")
    with statements() as sent:
        for name, option in (("export_backfill_errors", "--output"), ("verify_crm_contacts", "--csv")):
            refused = called(name, option, str(yesterdays))
            assert (refused.code, refused.stdout) == (2, "")
            reason = f"{yesterdays} already exists: name a new file with {option}. Nothing was written.\n"
            assert refused.stderr.endswith(reason)
    assert (sent, yesterdays.read_text(), list(tmp_path.iterdir())) == ([], "as it was", [yesterdays])


def test_a_database_that_breaks_off_quotes_nobody(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "_DEAD_LETTERS", "SELECT 'zelda'::integer")
    ended = command()
    assert ended.code == 2
    assert "DataError (22P02)" in ended.stderr
    assert "zelda" not in ended.stderr


def test_nothing_is_written_and_the_right_to_select_is_enough(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_a_conflict()
    run()
    before = database.dump()
    with reading_role(database) as role:
        with connection.cursor() as cursor:
            cursor.execute(
                f"GRANT USAGE ON SCHEMA crm_backfill TO {role}; GRANT SELECT ON ledger_entry, contact_update TO {role}"
            )
        with acting_as(role):
            ended = command("--with-email")
        assert [record.getMessage() for record in caplog.records] == [
            "this role may not read conflict_decision: the export contains no resolutions"
        ]
        with connection.cursor() as cursor:
            cursor.execute(f"GRANT SELECT ON conflict_decision TO {role}")
        caplog.clear()
        with acting_as(role):
            assert command("--with-email") == ended
    assert ended.code == 0
    assert len(rows_of(ended.stdout)) == 1
    assert (caplog.records, database.dump()) == ([], before)


def test_lines_are_streamed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO ledger_entry (id, source, source_id, outcome, reason, run_id, source_updated_at) "
            "SELECT n, 'active_leads', n, 'error', 'invalid_email', 1, now() FROM generate_series(1, 95) AS n"
        )
    monkeypatch.setattr(snapshot, "PAGE", 10)
    with statements() as sent:
        letters = dead_letters.dead_letters(connection, with_email=False)
        next(letters)
        fetched = [statement.rows for statement in sent if "FETCH" in statement.sql]
        assert fetched == [10]
        assert len(list(letters)) == 94
    assert sum("FETCH" in statement.sql for statement in sent) == 10


@pytest.mark.process
def test_a_reader_who_has_seen_enough_gets_no_traceback(database: Database) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO ledger_entry (id, source, source_id, outcome, reason, run_id, source_updated_at) "
            "SELECT n, 'active_leads', n, 'error', 'invalid_email', 1, now() FROM generate_series(1, 20000) AS n"
        )
    process = start("export_backfill_errors", url=database_url())
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        assert process.stdout.readline().startswith("source,")
        process.stdout.close()
        assert "Standard output could not be written (Broken pipe)" in process.stderr.read()
    assert process.wait(timeout=60) == 6


def test_the_order_is_that_of_a_run(database: Database) -> None:
    for source in reversed(Source):
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO ledger_entry (id, source, source_id, outcome, reason, run_id, source_updated_at) "
                "VALUES (%s, %s, '1', 'error', 'conflict', 1, now())",
                [source, source],
            )
    assert [row["source"] for row in rows_of(command().stdout)] == list(Source)


def test_a_conflict_of_an_earlier_version_names_the_contact_that_it_has(database: Database) -> None:
    _, contact = add_a_conflict()
    run()
    database.rows("UPDATE ledger_entry SET identity_keys = NULL RETURNING id")
    (row,) = rows_of(command().stdout)
    assert (row["contact_id"], row["contacts"]) == (contact, contact)
    assert f"--contact {contact} if" in row["what_to_do"]
    run()
    (row,) = rows_of(command().stdout)
    assert row["contacts"] == f"{contact} (email), no contact (userId)", "the next run tries the row again"


@pytest.mark.parametrize(
    ("contact", "keys", "named"),
    [
        (None, None, ""),
        ("c1", None, "c1"),
        ("c1", {"email": "c1", "userId": "c2", "clerkUserId": "c3"}, "c1 (email), c2 (userId), c3 (clerkUserId)"),
        ("c1", {"clerkUserId": "c1", "userId": "c1", "email": "c2"}, "c2 (email), c1 (userId, clerkUserId)"),
        ("c1", {"email": "c1", "userId": None, "clerkUserId": None}, "c1 (email), no contact (userId, clerkUserId)"),
        ("gone", {"email": "c1", "id": "c2"}, "c1 (email), c2 (id), gone"),
        ("", {"email": "", "userId": None}, " (email), no contact (userId)"),
    ],
)
def test_each_contact_of_a_conflict_is_named_once_with_the_keys_that_lead_to_it(
    contact: str | None, keys: dict[str, str | None] | None, named: str
) -> None:
    assert remedies.named_contacts(contact, keys) == named

"""What other rules wrote is no defect of these: runs know the rules that they went by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from django.db import connection

from crm.models import BackfillRun
from crm.rollback.report import as_json
from crm.rollback.runner import roll_back
from crm.rules import mapping
from crm.runs import lease
from crm.verification import verify
from crm.verification.findings import Check, Finding, Kind
from crm.version import RULES, VERSION
from tests.conftest import Database
from tests.support.builders import add_lead, add_profile, contact_with, contacts
from tests.support.commands import called, run

#: The rules written down a second time. The property tests hold the code to these, so no rule changes without them, and
#: a new name or a new form of the code leaves them as they are.
REFERENCE = ("reference.py", "reference_update.py")
#: `RULES`, and the digest of the reference when somebody last said that they belong together.
LOOKED_AT = (3, "51280ec62573fb1d49595188e0e0fabd2fb7e0cf7cf105e6a8d76fbbcbdf5445")

LATER = "2099-01-01"
EARLIER = pytest.mark.parametrize(("rules", "named"), [(None, "not recorded"), (RULES - 1, str(RULES - 1))])


def test_whoever_changes_a_rule_says_whether_rows_become_other_contacts() -> None:
    texts = [(Path(__file__).parents[1] / "support" / name).read_bytes() for name in REFERENCE]
    digest = sha256(b"".join(texts)).hexdigest()
    assert (RULES, digest) == LOOKED_AT, (
        f"The reference changed. May a row become another contact than before? Then raise RULES in crm/version.py. "
        f"In any case write its number and {digest} into LOOKED_AT. docs/architecture.md, Changing a rule, says more."
    )


@contextmanager
def an_earlier_version(rules: int | None = RULES - 1) -> Iterator[None]:
    """Rules by which people without a name had another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "UNKNOWN_NAME", "Nobody")
        patch.setattr(lease, "RULES", rules)
        yield


def nameless() -> str:
    """A profile whose name is a matter of the rules; its reference."""
    return f"profiles:{add_profile(email='pat@example.com', firstName=' ')}"


@EARLIER
def test_what_other_rules_wrote_is_named_counted_and_no_defect(
    database: Database, rules: int | None, named: str
) -> None:
    row = nameless()
    with an_earlier_version(rules):
        run()
    contact = contact_with("pat@example.com")
    assert contact["firstName"] == "Nobody"
    by = f"version {VERSION}, rules {named}"
    (found,) = verify(connection).findings.kept
    assert found == Finding(Check.FIELDS, Kind.RULES_CHANGED, row, contact["id"], ("firstName",), by)
    finished = called("verify_crm_contacts", "--json")
    assert (finished.code, finished.stderr, finished.answer["defects"]) == (0, "", 0)
    assert finished.answer["written_by_other_rules"] == {by: 1}
    shown = called("verify_crm_contacts").stdout
    assert "Written by other rules than those of this version: no defect" in shown
    assert f"Findings written by {by}: 1. This is version {VERSION}, rules {RULES}." in shown


def test_what_the_rules_of_this_version_wrote_otherwise_is_a_defect(database: Database) -> None:
    nameless()
    with an_earlier_version(RULES):
        run()
    (found,) = verify(connection).findings.kept
    assert (found.kind, found.written_by) == (Kind.DEFECT, None)


@pytest.mark.parametrize(
    ("happening", "kind"),
    [
        ("""UPDATE crm_contacts SET "updatedAt" = %s""", Kind.CRM_CHANGED),
        ("""UPDATE profiles SET "updatedAt" = %s""", Kind.SOURCE_CHANGED),
    ],
)
def test_what_people_changed_since_is_not_said_of_the_rules(database: Database, happening: str, kind: Kind) -> None:
    nameless()
    with an_earlier_version():
        run()
    database.rows(f"{happening} RETURNING id", LATER)
    assert [finding.kind for finding in verify(connection).findings.kept] == [kind]


@pytest.mark.parametrize(
    ("check", "planted"),
    [
        (Check.FIELDS, "UPDATE crm_contacts SET phone = 'planted' WHERE email = 'pat@example.com' RETURNING id"),
        (Check.EXCLUDED_MIGRATED, "UPDATE profiles SET role = 'ADMIN' RETURNING id"),
        (
            Check.CONTACT_TWICE,
            "UPDATE crm_contacts SET email = 'PAT@example.com' WHERE email = 'lee@example.com' RETURNING id",
        ),
    ],
)
def test_each_check_that_goes_by_the_rules_takes_them_into_account(
    database: Database, check: Check, planted: str
) -> None:
    add_profile(email="pat@example.com")
    add_lead("lee@example.com")
    run()
    database.rows(planted)
    found = verify(connection).findings.kept
    assert {finding.kind for finding in found} == {Kind.DEFECT}
    assert check in {finding.check for finding in found}
    BackfillRun.objects.update(rules=RULES - 1)
    report = verify(connection)
    assert {finding.kind for finding in report.findings.kept} == {Kind.RULES_CHANGED}
    assert [finding.check for finding in report.findings.kept] == [finding.check for finding in found]
    assert report.exit_code == 0


def test_a_row_that_came_later_speaks_by_the_rules_of_its_own_run(database: Database) -> None:
    """Where one of several rows was migrated by other rules, the whole contact is a matter of these."""
    nameless()
    with an_earlier_version():
        run()
    add_lead("pat@example.com", phone="555 0199")
    assert run()["merged"] == 1
    database.rows("UPDATE crm_contacts SET phone = 'planted' RETURNING id")
    assert [finding.kind for finding in verify(connection).findings.kept] == [Kind.RULES_CHANGED]


def test_a_rollback_takes_nothing_back_that_other_rules_wrote_and_blames_nobody(database: Database) -> None:
    nameless()
    add_lead("lee@example.com")
    with an_earlier_version():
        made = run()["run"]
    before = contacts()
    dry = json.loads(as_json(roll_back(made, dry_run=True)))
    done = json.loads(as_json(roll_back(made)))
    for report in (dry, done):
        assert (report["reversed"], report["kept"], report["by_reason"]) == (1, 1, {"other_rules": 1})
    assert list(contacts()) == [contact for contact in before if before[contact]["firstName"] == "Nobody"]
    with an_earlier_version():
        assert json.loads(as_json(roll_back(made)))["reversed"] == 1
    assert contacts() == {}


def test_nor_does_it_what_they_merged_or_updated(database: Database) -> None:
    """Phones are a matter of the rules as well: by those of then, they were written in another form."""
    add_profile(email="pat@example.com")
    run()
    lead = add_lead("pat@example.com", phone="555 0199")
    with an_earlier_version():
        merged = run()["run"]
    database.rows("UPDATE crm_contacts SET phone = '+1 555 0199' RETURNING id")
    assert json.loads(as_json(roll_back(merged)))["by_reason"] == {"other_rules": 1}
    database.rows("UPDATE crm_contacts SET phone = '555 0199' RETURNING id")
    database.rows(
        """UPDATE leads SET "lastContactedAt" = %s, "updatedAt" = %s WHERE id = %s RETURNING id""", LATER, LATER, lead
    )
    with an_earlier_version():
        updated = run(update=True)["run"]
    database.rows("""UPDATE crm_contacts SET "lastContactedAt" = '2098-01-01' RETURNING id""")
    assert json.loads(as_json(roll_back(updated)))["by_reason"] == {"other_rules": 1}


@pytest.mark.parametrize("command", [("verify_crm_contacts",), ("backfill_runs", "list"), ("backfill_crm_contacts",)])
def test_a_new_version_before_its_migrations_says_in_one_line_what_to_do(
    database: Database, command: tuple[str, ...]
) -> None:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE backfill_run RENAME COLUMN rules TO elsewhere")
    try:
        finished = called(*command)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE backfill_run RENAME COLUMN elsewhere TO rules")
    assert (finished.code, finished.stdout, finished.stderr.count("\n")) == (2, "", 1)
    assert "python manage.py migrate" in finished.stderr

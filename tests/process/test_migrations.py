"""What an existing installation becomes: its ledger remembers the schema, keeps what is in it, and serves on."""

from __future__ import annotations

import json

import pytest

from crm.legacy_schema import ddl
from tests.support.processes import manage
from tests.support.scratch import scratch_database

BEFORE, SINCE = "0005_update", "0006_exact_timestamps"
RUN = """
INSERT INTO crm_backfill.backfill_run (kind, status, options, version, generation, operator, host, process_id, read,
  created, merged, exists, error, error_new, revisited, updated, kept, unchanged, finished_at)
VALUES ('backfill', 'finished', '{{}}', '1', '2025_12', 'o', 'h', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, now());
INSERT INTO crm_backfill.ledger_entry (id, source, source_id, outcome, run_id, source_updated_at, seen_updated_at)
SELECT 'c1', 'clients', '1', 'created', id, '2025-01-02 03:04:05.678', '2025-01-02 03:04:05.679'
  FROM crm_backfill.backfill_run;
INSERT INTO crm_backfill.ledger_entry (id, source, source_id, outcome, reason, contact_id, run_id, source_updated_at)
SELECT 'c2', 'clients', '2', 'error', 'conflict', 'k1', id, 'infinity' FROM crm_backfill.backfill_run;
INSERT INTO crm_backfill.contact_update (run_id, line_id, source, source_id, contact_id, columns, source_updated_at,
  contact_updated_at, stage_entered_before, confidence_before)
SELECT id, 'c1', 'clients', '1', 'c1', 'phone', '2025-01-02 03:04:05.678', '-infinity', '0044-03-15 BC', 90
  FROM crm_backfill.backfill_run
"""
LEDGER = """
SELECT concat_ws(' | ', line.source_updated_at, seen_updated_at, change.source_updated_at, change.contact_updated_at,
                 stage_entered_before, {confidence})
  FROM crm_backfill.ledger_entry line JOIN crm_backfill.contact_update change ON line_id = line.id
"""
KNOWN_SINCE = "SELECT num_nulls(rules, updated_and_kept) FROM crm_backfill.backfill_run"
PRECISIONS = """
SELECT DISTINCT format_type(atttypid, atttypmod) FROM pg_attribute
 WHERE attrelid IN ('crm_backfill.ledger_entry'::regclass, 'crm_backfill.contact_update'::regclass)
   AND attname ~ '_updated_at|_entered_before'
"""
#: An entry that took the place of another one, of which it remembers the confidence.
FORMER = """
UPDATE crm_backfill.ledger_entry line
   SET former = (SELECT to_jsonb(before) || jsonb_build_object('confidence_before', 80)
                   FROM crm_backfill.ledger_entry before
                  WHERE before.id = line.id) WHERE id = 'c2'
"""
FORMER_CONFIDENCE = "SELECT former -> 'attribution_before' ->> 'attribution_confidence' FROM crm_backfill.ledger_entry"
IS_THERE = """
SELECT true FROM pg_attribute
 WHERE attrelid = 'crm_backfill.backfill_run'::regclass AND attname = 'legacy_schema'
"""


BEFORE_RESOLUTIONS = "0017_committed_transaction"
#: Somebody who may look at the decisions, as the model was called, and what one of them says.
RESOLUTION = """
INSERT INTO crm_backfill.conflict_decision (id, "row", contact_id, decided_by) VALUES ('c2', 'profiles:2', 'k1', 'Eve');
INSERT INTO crm_backfill.auth_group (name) VALUES ('support');
INSERT INTO crm_backfill.auth_group_permissions (group_id, permission_id)
SELECT g.id, p.id FROM crm_backfill.auth_group g, crm_backfill.auth_permission p
 WHERE codename = 'view_conflictdecision'
"""
PERMISSIONS = """
SELECT concat_ws(' | ', model, codename, name, t.id)
  FROM crm_backfill.auth_permission p JOIN crm_backfill.django_content_type t ON t.id = content_type_id
 WHERE codename ~ 'conflict' ORDER BY codename
"""
OF_GROUPS = """
SELECT codename FROM crm_backfill.auth_group_permissions JOIN crm_backfill.auth_permission p ON p.id = permission_id
"""
RECORDED = "SELECT concat_ws(' | ', id, \"row\", contact_id, decided_by) FROM crm_backfill.conflict_decision"


@pytest.mark.process
def test_who_might_see_the_resolutions_of_conflicts_may_do_so_under_their_new_name(
    django_test_environment: None,
) -> None:
    with scratch_database("permissions") as database:
        database.execute("CREATE SCHEMA app; SET search_path = app; " + ddl("2025_12"))
        url = database.url(parameters="&schema=app")
        for target in (("crm", BEFORE_RESOLUTIONS), ("auth",)):
            made = manage("migrate", *target, "--verbosity", "0", url=url)
            assert made.returncode == 0, made.stderr
        before = database.execute(PERMISSIONS)
        assert [line.split(" | ")[1] for line in before] == [
            f"{action}_conflictdecision" for action in ("add", "change", "delete", "view")
        ]
        database.execute(RESOLUTION)

        migrated = manage("migrate", "--verbosity", "0", url=url)
        assert migrated.returncode == 0, migrated.stderr
        assert database.execute(PERMISSIONS) == [
            line.replace("conflictdecision", "conflictresolution").replace("decision on a", "resolution of a")
            for line in before
        ], "and no other, and the content type is the same"
        assert database.execute(OF_GROUPS) == ["view_conflictresolution"]
        assert database.execute(RECORDED) == ["c2 | profiles:2 | k1 | Eve"]

        back = manage("migrate", "crm", BEFORE_RESOLUTIONS, "--verbosity", "0", url=url)
        assert back.returncode == 0, back.stderr
        assert database.execute(PERMISSIONS) == before
        assert database.execute(OF_GROUPS) == ["view_conflictdecision"]


@pytest.mark.process
def test_an_existing_installation_keeps_its_data_and_remembers_its_schema(django_test_environment: None) -> None:
    with scratch_database("older") as database:
        database.execute("CREATE SCHEMA app; SET search_path = app; " + ddl("2025_12"))
        url = database.url(parameters="&schema=app")
        assert manage("migrate", "crm", BEFORE, "--verbosity", "0", url=url).returncode == 0
        assert database.execute(IS_THERE) == []
        database.execute(RUN)
        before = database.execute(LEDGER.format(confidence="change.confidence_before"))

        migrated = manage("migrate", "crm", SINCE, "--verbosity", "0", url=url)
        assert migrated.returncode == 0, migrated.stderr
        assert database.execute(LEDGER.format(confidence="change.confidence_before")) == before
        assert database.execute("SELECT legacy_schema FROM crm_backfill.backfill_run") == ["app"]
        assert database.execute(PRECISIONS) == ["timestamp without time zone"]
        database.execute("UPDATE crm_backfill.ledger_entry SET source_updated_at = '2025-01-02 03:04:05.678901'")
        assert "678901" in database.execute(LEDGER.format(confidence="''"))[0]
        refused = manage("backfill_runs", "list", url=database.url())
        assert (refused.returncode, "schema app" in refused.stderr) == (2, True)

        assert manage("migrate", "crm", "0018", "--verbosity", "0", url=url).returncode == 0
        database.execute(FORMER)
        newest = manage("migrate", "--verbosity", "0", url=url)
        assert newest.returncode == 0, newest.stderr
        assert database.execute(KNOWN_SINCE) == [2], "of a run of then nobody knows what was not recorded"
        (line,) = database.execute(LEDGER.format(confidence="change.attribution_before ->> 'attribution_confidence'"))
        assert "678901" in line
        assert line.endswith(" | 90")
        assert "80" in database.execute(FORMER_CONFIDENCE)
        exported = manage("export_backfill_errors", url=url)
        assert (exported.returncode, "profiles:2,2,conflict," in exported.stdout) == (0, True), exported.stderr
        assert ",k1,k1," in exported.stdout, "of the other contact of an older conflict nothing is known"
        assert database.execute("SELECT report_lost::text FROM crm_backfill.backfill_run") == ["false"]
        undone = manage("rollback_crm_backfill", "1", "--dry-run", "--json", url=url)
        assert undone.returncode == 0, undone.stderr
        assert json.loads(undone.stdout)["failure"] is None

        back = manage("migrate", "crm", BEFORE, "--verbosity", "0", url=url)
        assert back.returncode == 0, back.stderr

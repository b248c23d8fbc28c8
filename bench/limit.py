"""The limit: what the server can do by itself.

`INSERT ... SELECT ... ON CONFLICT DO NOTHING` in chunks that commit, with the same ledger lines. It knows no merges,
conflicts or bad addresses: it is a floor for the time and no backfill.
"""

from __future__ import annotations

from typing import Any

import psycopg

CHUNK = 5_000
_ID = "'c' || left(encode(sha256(convert_to('{table}:' || r.id, 'UTF8')), 'hex'), 24)"
_NAME = "COALESCE(NULLIF(btrim(r.\"{column}\"), ''), 'Unknown')"
_CONTACT = """
WITH page AS MATERIALIZED ({page}),
     made AS (
       INSERT INTO crm_contacts ("id", "userId", "clerkUserId", "contactType", "firstName", "lastName", email, phone,
              company, stage, "stageEnteredAt", source, "assignedPreparerId", "assignedAt", "referrerUsername",
              "referrerType", "commissionRate", "commissionRateLockedAt", "attributionMethod", "attributionConfidence",
              "createdAt", "updatedAt", "lastContactedAt")
       SELECT * FROM (SELECT {columns} FROM page r) drafts ON CONFLICT DO NOTHING RETURNING id
     )
INSERT INTO ledger_entry (id, source, source_id, outcome, contact_id, run_id, source_updated_at)
SELECT page.contact_id, '{source}', page.id, CASE WHEN made.id IS NULL THEN 'exists' ELSE 'created' END,
       page.contact_id, 1, page."updatedAt"
  FROM page LEFT JOIN made ON made.id = page.contact_id
RETURNING source_id
"""
_PROFILE_COLUMNS = f"""
r.contact_id, r."userId", r."clerkUserId", '{{contact_type}}'::"ContactType", {_NAME.format(column="firstName")},
{_NAME.format(column="lastName")},
COALESCE(NULLIF(lower(btrim(r.email)), ''), lower('{{contact_type}}') || '-' || r.id || '@crm-backfill.invalid'),
NULLIF(btrim(r.phone), ''), NULLIF(btrim(r."companyName"), ''), 'NEW'::"PipelineStage", r."createdAt", 'backfill',
NULL, NULL::timestamp, NULL, NULL, NULL::numeric, NULL::timestamp, NULL, 100, r."createdAt", r."updatedAt",
NULL::timestamp
"""
_LEAD_COLUMNS = f"""
r.contact_id, NULL, NULL, {{contact_type}}, {_NAME.format(column="firstName")}, {_NAME.format(column="lastName")},
lower(btrim(r.email)), NULLIF(btrim(r.phone), ''), NULL, {{stage}}, {{entered}},
COALESCE(NULLIF(btrim(r.source), ''), 'lead_form'), COALESCE(r.preparer, r."assignedPreparerId"),
CASE WHEN r."assignedPreparerId" IS NOT NULL THEN r."updatedAt" END, r."referrerUsername", r."referrerType",
r."commissionRate", r."commissionRateLockedAt", r."attributionMethod", r."attributionConfidence", r."createdAt",
r."updatedAt", r."lastContactedAt"
"""
_PROFILES = f"""
SELECT r.*, u.email, {_ID.format(table="profiles")} AS contact_id
  FROM (SELECT * FROM profiles WHERE role = '{{role}}' AND id > %(id)s ORDER BY id LIMIT {CHUNK}) r
       LEFT JOIN LATERAL (SELECT email FROM users WHERE id = r."userId" LIMIT 1) u ON true
"""
_LEADS = f"""
SELECT r.*, p.id AS preparer, {_ID.format(table="leads")} AS contact_id
  FROM (SELECT * FROM leads WHERE {{which}} AND ("createdAt", id) > (%(at)s, %(id)s)
         ORDER BY "createdAt", id LIMIT {CHUNK}) r
       LEFT JOIN LATERAL (SELECT id FROM profiles WHERE "userId" = r."assignedPreparerId" LIMIT 1) p ON true
"""
_STAGE = """CASE r.status WHEN 'NEW' THEN 'NEW' ELSE 'CONTACTED' END::"PipelineStage" """
_ENTERED = """CASE r.status WHEN 'NEW' THEN r."createdAt" ELSE COALESCE(r."lastContactedAt", r."updatedAt") END"""
_TYPE = """(CASE r.type WHEN 'TAX_PREPARER' THEN 'PREPARER' WHEN 'AFFILIATE' THEN 'AFFILIATE' ELSE 'LEAD' END)
::"ContactType" """


def run_limit(connection: psycopg.Connection[Any]) -> None:
    """Do it, on a connection in autocommit: every chunk is a transaction."""
    for source, role, contact_type in (
        ("clients", "CLIENT", "CLIENT"),
        ("preparers", "TAX_PREPARER", "PREPARER"),
        ("affiliates", "AFFILIATE", "AFFILIATE"),
    ):
        statement = _CONTACT.format(
            page=_PROFILES.format(role=role), columns=_PROFILE_COLUMNS.format(contact_type=contact_type), source=source
        )
        _in_chunks(connection, statement, "SELECT NULL, max(id) FROM unnest(%s::text[]) AS id")
    converted = _LEAD_COLUMNS.format(
        contact_type="'CLIENT'::\"ContactType\"", stage="'COMPLETE'::\"PipelineStage\"", entered='r."updatedAt"'
    )
    active = _LEAD_COLUMNS.format(contact_type=_TYPE, stage=_STAGE, entered=_ENTERED)
    for source, which, columns in (
        ("converted_leads", "status = 'CONVERTED'", converted),
        ("active_leads", "status IN ('NEW', 'CONTACTED', 'QUALIFIED')", active),
    ):
        statement = _CONTACT.format(page=_LEADS.format(which=which), columns=columns, source=source)
        _in_chunks(
            connection,
            statement,
            'SELECT "createdAt", id FROM leads WHERE id = ANY(%s) ORDER BY "createdAt" DESC, id DESC LIMIT 1',
        )


def _in_chunks(connection: psycopg.Connection[Any], statement: str, last_key: str) -> None:
    at: Any = "-infinity"
    identifier = ""
    while rows := connection.execute(statement, {"id": identifier, "at": at}).fetchall():
        at, identifier = connection.execute(last_key, [[row[0] for row in rows]]).fetchone()  # type: ignore[misc] # there is a last key

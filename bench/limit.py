"""The limit: what the server can do by itself, when it has to end with the same contacts.

`INSERT ... SELECT ... ON CONFLICT DO NOTHING` in chunks that commit, then one statement for the rows that did not land:
they are looked up, fill what is NULL, and get their ledger lines. No row leaves the server.
"""

from __future__ import annotations

from typing import Any

import psycopg

CHUNK = 5_000
_ID = "'c' || left(encode(sha256(convert_to('{table}:' || r.id, 'UTF8')), 'hex'), 24)"
_SPACE = r"E' \t\n\r\u00a0'"
_VALID = r"email ~ '^[!-?A-~]+@([a-z0-9-]+\.)+[a-z]{{2,}}$'"


def _trimmed(column: str) -> str:
    return f'btrim(r."{column}", {_SPACE})'


def _name(column: str) -> str:
    return f"COALESCE(NULLIF({_trimmed(column)}, ''), 'Unknown')"


_CONTACT = """
id, "userId", "clerkUserId", "contactType", "firstName", "lastName", email, phone, company, stage, "stageEnteredAt",
source, "assignedPreparerId", "assignedAt", "referrerUsername", "referrerType", "commissionRate",
"commissionRateLockedAt", "attributionMethod", "attributionConfidence", "createdAt", "updatedAt", "lastContactedAt"
"""
_UNATTRIBUTED = """COALESCE("referrerUsername", "referrerType", "commissionRate"::text, "commissionRateLockedAt"::text,
"attributionMethod") IS NULL"""
_BROUGHT = f"""
NULLIF(concat_ws(',', CASE WHEN "userId" IS NOT NULL THEN 'user_id' END,
  CASE WHEN "clerkUserId" IS NOT NULL THEN 'clerk_user_id' END, CASE WHEN phone IS NOT NULL THEN 'phone' END,
  CASE WHEN company IS NOT NULL THEN 'company' END,
  CASE WHEN "lastContactedAt" IS NOT NULL THEN 'last_contacted_at' END,
  CASE WHEN "assignedPreparerId" IS NOT NULL THEN 'assignment' END,
  CASE WHEN NOT ({_UNATTRIBUTED}) THEN 'attribution' END), '')
"""
_PREPARE = f"""
CREATE TEMPORARY TABLE odd_spelling AS
  SELECT id, lower(btrim(email, {_SPACE})) AS address FROM crm_contacts WHERE email <> lower(btrim(email, {_SPACE}));
CREATE TEMPORARY TABLE waiting AS SELECT 1::bigint AS place, ''::text AS source_id, {_CONTACT} FROM crm_contacts LIMIT 0
"""
_INSERT = f"""
WITH page AS MATERIALIZED ({{page}}),
     draft AS MATERIALIZED (SELECT {{columns}} FROM page r),
     made AS (
       INSERT INTO crm_contacts ({_CONTACT})
       SELECT {_CONTACT} FROM draft
        WHERE {_VALID} AND NOT EXISTS (SELECT FROM odd_spelling WHERE address = draft.email) ORDER BY email, place
       ON CONFLICT DO NOTHING RETURNING id
     ),
     lines AS (
       INSERT INTO ledger_entry (id, source, source_id, outcome, contact_id, run_id, source_updated_at, filled)
       SELECT id, '{{source}}', source_id, 'created', id, 1, "updatedAt", {_BROUGHT} FROM draft JOIN made USING (id)
     ),
     left_over AS (
       INSERT INTO waiting SELECT place, source_id, {_CONTACT} FROM draft
        WHERE NOT EXISTS (SELECT FROM made WHERE made.id = draft.id)
     )
SELECT "createdAt", source_id FROM draft ORDER BY place DESC LIMIT 1
"""
_OF_CONTACT = f"""
c.id, c."userId", c."clerkUserId",
EXISTS (SELECT FROM ledger_entry line WHERE line.id = c.id AND outcome = 'created') AS ours,
concat_ws(',', CASE WHEN c."userId" IS NULL THEN 'user_id' END,
  CASE WHEN c."clerkUserId" IS NULL THEN 'clerk_user_id' END, CASE WHEN c.phone IS NULL THEN 'phone' END,
  CASE WHEN c.company IS NULL THEN 'company' END, CASE WHEN c."lastContactedAt" IS NULL THEN 'last_contacted_at' END,
  CASE WHEN c."assignedPreparerId" IS NULL THEN 'assignment' END,
  CASE WHEN {_UNATTRIBUTED} THEN 'attribution' END) AS blanks
"""
_SETTLE = f"""
WITH met AS (
       SELECT w.place, w.id AS line, w.source_id, w."updatedAt", {_VALID.replace("email", "w.email")} AS is_valid,
              CASE WHEN u.id <> k.id THEN u.id ELSE COALESCE(e.id, u.id, k.id) END AS contact,
              COALESCE(e.ours, u.ours, k.ours) AS ours,
              string_to_array(COALESCE(e.blanks, u.blanks, k.blanks), ',') AS blanks,
              (u.id <> k.id) IS TRUE OR (u.id <> e.id) IS TRUE OR (k.id <> e.id) IS TRUE
                OR (e."userId" <> w."userId") IS TRUE OR (e."clerkUserId" <> w."clerkUserId") IS TRUE AS is_conflict
         FROM waiting w
         LEFT JOIN LATERAL (
           SELECT {_OF_CONTACT} FROM crm_contacts c WHERE c.email = w.email
            UNION ALL SELECT {_OF_CONTACT} FROM odd_spelling JOIN crm_contacts c USING (id) WHERE address = w.email
            LIMIT 1
         ) e ON true
         LEFT JOIN LATERAL (SELECT {_OF_CONTACT} FROM crm_contacts c WHERE c."userId" = w."userId") u ON true
         LEFT JOIN LATERAL (SELECT {_OF_CONTACT} FROM crm_contacts c WHERE c."clerkUserId" = w."clerkUserId") k ON true
     ),
     verdict AS MATERIALIZED (
       SELECT *, CASE WHEN is_conflict OR NOT is_valid THEN 'error' WHEN ours THEN 'merged' ELSE 'exists' END AS outcome
         FROM met
     ),
     first AS (
       SELECT contact, min(place) FILTER (WHERE "userId" IS NOT NULL) AS account,
              min(place) FILTER (WHERE "clerkUserId" IS NOT NULL) AS clerk_account,
              min(place) FILTER (WHERE phone IS NOT NULL) AS phone,
              min(place) FILTER (WHERE company IS NOT NULL) AS company,
              min(place) FILTER (WHERE "lastContactedAt" IS NOT NULL) AS last_contact,
              min(place) FILTER (WHERE "assignedPreparerId" IS NOT NULL) AS assignment,
              min(place) FILTER (WHERE NOT ({_UNATTRIBUTED})) AS attribution
         FROM verdict JOIN waiting USING (place) WHERE outcome = 'merged' GROUP BY contact
     ),
     filled AS (
       UPDATE crm_contacts c
          SET "userId" = COALESCE(c."userId", account."userId"),
              "clerkUserId" = COALESCE(c."clerkUserId", clerk_account."clerkUserId"),
              phone = COALESCE(c.phone, phone.phone), company = COALESCE(c.company, company.company),
              "lastContactedAt" = COALESCE(c."lastContactedAt", last_contact."lastContactedAt"),
              "assignedPreparerId" = COALESCE(c."assignedPreparerId", assignment."assignedPreparerId"),
              "assignedAt" = COALESCE(c."assignedAt", assignment."assignedAt"),
              ("referrerUsername", "referrerType", "commissionRate", "commissionRateLockedAt", "attributionMethod",
               "attributionConfidence") = (
                SELECT CASE WHEN has THEN c."referrerUsername" ELSE attribution."referrerUsername" END,
                       CASE WHEN has THEN c."referrerType" ELSE attribution."referrerType" END,
                       CASE WHEN has THEN c."commissionRate" ELSE attribution."commissionRate" END,
                       CASE WHEN has THEN c."commissionRateLockedAt" ELSE attribution."commissionRateLockedAt" END,
                       CASE WHEN has THEN c."attributionMethod" ELSE attribution."attributionMethod" END,
                       CASE WHEN has THEN c."attributionConfidence" ELSE attribution."attributionConfidence" END
                  FROM (SELECT attribution.place IS NULL OR COALESCE(c."referrerUsername", c."referrerType",
                          c."commissionRate"::text, c."commissionRateLockedAt"::text, c."attributionMethod")
                          IS NOT NULL) AS attributed(has))
         FROM first
         LEFT JOIN waiting account ON account.place = first.account
         LEFT JOIN waiting clerk_account ON clerk_account.place = first.clerk_account
         LEFT JOIN waiting phone ON phone.place = first.phone
         LEFT JOIN waiting company ON company.place = first.company
         LEFT JOIN waiting last_contact ON last_contact.place = first.last_contact
         LEFT JOIN waiting assignment ON assignment.place = first.assignment
         LEFT JOIN waiting attribution ON attribution.place = first.attribution
        WHERE c.id = first.contact AND (
              (c."userId" IS NULL AND account.place IS NOT NULL)
           OR (c."clerkUserId" IS NULL AND clerk_account.place IS NOT NULL)
           OR (c.phone IS NULL AND phone.place IS NOT NULL)
           OR (c.company IS NULL AND company.place IS NOT NULL) OR attribution.place IS NOT NULL
           OR (c."lastContactedAt" IS NULL AND last_contact.place IS NOT NULL)
           OR (c."assignedPreparerId" IS NULL AND assignment.place IS NOT NULL))
     )
INSERT INTO ledger_entry (id, source, source_id, outcome, reason, contact_id, run_id, source_updated_at, filled)
SELECT line, '{{source}}', source_id, outcome,
       CASE WHEN NOT is_valid THEN 'invalid_email' WHEN is_conflict THEN 'conflict' END,
       CASE WHEN is_valid THEN contact END, 1, "updatedAt",
       CASE WHEN outcome = 'merged' THEN NULLIF(concat_ws(',',
         CASE WHEN account = place AND 'user_id' = ANY(blanks) THEN 'user_id' END,
         CASE WHEN clerk_account = place AND 'clerk_user_id' = ANY(blanks) THEN 'clerk_user_id' END,
         CASE WHEN first.phone = place AND 'phone' = ANY(blanks) THEN 'phone' END,
         CASE WHEN first.company = place AND 'company' = ANY(blanks) THEN 'company' END,
         CASE WHEN last_contact = place AND 'last_contacted_at' = ANY(blanks) THEN 'last_contacted_at' END,
         CASE WHEN assignment = place AND 'assignment' = ANY(blanks) THEN 'assignment' END,
         CASE WHEN attribution = place AND 'attribution' = ANY(blanks) THEN 'attribution' END), '') END
  FROM verdict LEFT JOIN first USING (contact)
"""
_PROFILE_COLUMNS = f"""
r.place, r.id AS source_id, r.contact_id AS id, r."userId", r."clerkUserId",
'{{contact_type}}'::"ContactType" AS "contactType", {_name("firstName")} AS "firstName",
{_name("lastName")} AS "lastName",
COALESCE(NULLIF(lower({_trimmed("email")}), ''), lower('{{contact_type}}') || '-' || r.id || '@crm-backfill.invalid')
AS email, NULLIF({_trimmed("phone")}, '') AS phone, NULLIF({_trimmed("companyName")}, '') AS company,
'NEW'::"PipelineStage" AS stage,
r."createdAt" AS "stageEnteredAt", 'backfill' AS source, NULL::text AS "assignedPreparerId",
NULL::timestamp AS "assignedAt", NULL::text AS "referrerUsername", NULL::text AS "referrerType",
NULL::numeric AS "commissionRate", NULL::timestamp AS "commissionRateLockedAt", NULL::text AS "attributionMethod",
100 AS "attributionConfidence", r."createdAt", r."updatedAt", NULL::timestamp AS "lastContactedAt"
"""
_LEAD_COLUMNS = f"""
r.place, r.id AS source_id, r.contact_id AS id, NULL::text AS "userId", NULL::text AS "clerkUserId",
{{contact_type}} AS "contactType", {_name("firstName")} AS "firstName",
{_name("lastName")} AS "lastName", lower({_trimmed("email")}) AS email,
NULLIF({_trimmed("phone")}, '') AS phone, NULL::text AS company, {{stage}} AS stage, {{entered}} AS "stageEnteredAt",
COALESCE(NULLIF({_trimmed("source")}, ''), 'lead_form') AS source,
COALESCE(r.preparer, NULLIF(r."assignedPreparerId", '')) AS "assignedPreparerId",
CASE WHEN r."assignedPreparerId" <> '' THEN r."updatedAt" END AS "assignedAt",
r."referrerUsername", r."referrerType", r."commissionRate", r."commissionRateLockedAt", r."attributionMethod",
r."attributionConfidence", r."createdAt", r."updatedAt", r."lastContactedAt"
"""
_PROFILES = f"""
SELECT r.*, u.email, {_ID.format(table="profiles")} AS contact_id, row_number() OVER (ORDER BY r.id) AS place
  FROM (SELECT * FROM profiles WHERE role = '{{role}}' AND id > %(id)s ORDER BY id LIMIT {CHUNK}) r
       LEFT JOIN LATERAL (SELECT email FROM users WHERE id = r."userId" LIMIT 1) u ON true
"""
_LEADS = f"""
SELECT r.*, p.id AS preparer, {_ID.format(table="leads")} AS contact_id,
       row_number() OVER (ORDER BY r."createdAt", r.id) AS place
  FROM (SELECT * FROM leads WHERE {{which}} AND ("createdAt", id) > (%(at)s, %(id)s)
         ORDER BY "createdAt", id LIMIT {CHUNK}) r
       LEFT JOIN LATERAL (
         SELECT id FROM profiles WHERE id = r."assignedPreparerId" OR "userId" = r."assignedPreparerId" LIMIT 1
       ) p ON r."assignedPreparerId" IS NOT NULL
"""
_STAGE = """CASE r.status WHEN 'NEW' THEN 'NEW' ELSE 'CONTACTED' END::"PipelineStage" """
_ENTERED = """CASE r.status WHEN 'NEW' THEN r."createdAt" ELSE COALESCE(r."lastContactedAt", r."updatedAt") END"""
_TYPE = """(CASE r.type WHEN 'TAX_PREPARER' THEN 'PREPARER' WHEN 'AFFILIATE' THEN 'AFFILIATE' ELSE 'LEAD' END)
::"ContactType" """


def run_limit(connection: psycopg.Connection[Any]) -> int:
    """Do it, on a connection in autocommit: every chunk is a transaction. The rows that were settled."""
    connection.execute(_PREPARE)
    for source, role, contact_type in (
        ("clients", "CLIENT", "CLIENT"),
        ("preparers", "TAX_PREPARER", "PREPARER"),
        ("affiliates", "AFFILIATE", "AFFILIATE"),
    ):
        columns = _PROFILE_COLUMNS.format(contact_type=contact_type)
        _in_chunks(connection, source, _PROFILES.format(role=role), columns)
    converted = _LEAD_COLUMNS.format(
        contact_type="'CLIENT'::\"ContactType\"", stage="'COMPLETE'::\"PipelineStage\"", entered='r."updatedAt"'
    )
    active = _LEAD_COLUMNS.format(contact_type=_TYPE, stage=_STAGE, entered=_ENTERED)
    for source, which, columns in (
        ("converted_leads", "status = 'CONVERTED'", converted),
        ("active_leads", "status IN ('NEW', 'CONTACTED', 'QUALIFIED')", active),
    ):
        _in_chunks(connection, source, _LEADS.format(which=which), columns)
    (rows,) = connection.execute("SELECT count(*) FROM ledger_entry").fetchone() or (0,)
    return int(rows)


def _in_chunks(connection: psycopg.Connection[Any], source: str, page: str, columns: str) -> None:
    insert = _INSERT.format(page=page, columns=columns, source=source)
    settle = _SETTLE.format(source=source)
    last: tuple[Any, str] | None = ("-infinity", "")
    while last is not None:
        with connection.transaction():
            last = connection.execute(insert, {"at": last[0], "id": last[1]}).fetchone()
            connection.execute(settle)
            connection.execute("TRUNCATE waiting")

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
#: What a row may bring and a contact may lack, by the ledger's name for it: whether it is there, in a row `{of}`.
_UNITS = {
    "user_id": '{of}."userId" IS NOT NULL',
    "clerk_user_id": '{of}."clerkUserId" IS NOT NULL',
    "phone": "{of}.phone IS NOT NULL",
    "company": "{of}.company IS NOT NULL",
    "last_contacted_at": '{of}."lastContactedAt" IS NOT NULL',
    "assignment": '{of}."assignedPreparerId" IS NOT NULL',
    # Without the rate that completes an attribution: it takes two leads of one person from the same referrer.
    "attribution": f"btrim({{of}}.\"referrerUsername\", {_SPACE}) <> ''",
}


def _units_where(condition: str, of: str = "") -> str:
    """The names of the units that are so: SQL for a list with commas; NULL for none."""
    cases = (
        f"CASE WHEN {condition.format(unit=unit, there=there.format(of=of))} THEN '{unit}' END"
        for unit, there in _UNITS.items()
    )
    return f"NULLIF(concat_ws(',', {', '.join(cases)}), '')"


_FIRST_PLACES = ", ".join(
    f"min(place) FILTER (WHERE {there.format(of='waiting')}) AS {unit}" for unit, there in _UNITS.items()
)
_FIRST_ROWS = " ".join(f"LEFT JOIN waiting {unit} ON {unit}.place = first.{unit}" for unit in _UNITS)
_ANYTHING_TO_FILL = " OR ".join(
    f"({unit}.place IS NOT NULL AND ({there.format(of='c')}) IS NOT TRUE)" for unit, there in _UNITS.items()
)
_PREPARE = f"""
CREATE TEMPORARY TABLE other_address AS
  SELECT id, lower(btrim(email, {_SPACE})) AS address FROM crm_contacts WHERE email <> lower(btrim(email, {_SPACE}));
CREATE TEMPORARY TABLE preparer_code AS
  SELECT lower(btrim(code, {_SPACE})) AS code, min(id) AS id
    FROM profiles CROSS JOIN LATERAL unnest(ARRAY["trackingCode", "customTrackingCode", "shortLinkUsername"]) AS code
   WHERE role = 'TAX_PREPARER' AND code IS NOT NULL GROUP BY 1;
CREATE INDEX ON preparer_code (code);
CREATE TEMPORARY TABLE waiting AS SELECT 1::bigint AS place, ''::text AS source_id, {_CONTACT} FROM crm_contacts LIMIT 0
"""
# A lead meets the contact that its user's profile met under another address.
_ADDRESSES_OF_USERS = f"""
INSERT INTO other_address
SELECT line.contact_id, lower(btrim(u.email, {_SPACE}))
  FROM ledger_entry line
  JOIN profiles p ON p.id = line.source_id
  JOIN users u ON u.id = p."userId"
  JOIN crm_contacts c ON c.id = line.contact_id AND c.email <> lower(btrim(u.email, {_SPACE}))
 WHERE outcome IN ('merged', 'exists')
"""
_INSERT = f"""
WITH page AS MATERIALIZED ({{page}}),
     draft AS MATERIALIZED (SELECT {{columns}} FROM page r),
     made AS (
       INSERT INTO crm_contacts ({_CONTACT})
       SELECT {_CONTACT} FROM draft
        WHERE {_VALID} AND NOT EXISTS (SELECT FROM other_address WHERE address = draft.email) ORDER BY email, place
       ON CONFLICT DO NOTHING RETURNING id
     ),
     lines AS (
       INSERT INTO ledger_entry (id, source, source_id, outcome, contact_id, run_id, source_updated_at, seen_preparer,
                                 filled)
       SELECT id, '{{source}}', source_id, 'created', id, 1, "updatedAt", "assignedPreparerId",
              {_units_where("{there}", "draft")}
         FROM draft JOIN made USING (id)
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
{_units_where("({there}) IS NOT TRUE", "c")} AS blanks
"""
_SETTLE = f"""
WITH met AS (
       SELECT w.place, w.id AS line, w.source_id, w."updatedAt", w."assignedPreparerId",
              {_VALID.replace("email", "w.email")} AS is_valid,
              CASE WHEN u.id <> k.id THEN u.id ELSE COALESCE(e.id, u.id, k.id) END AS contact,
              COALESCE(e.ours, u.ours, k.ours) AS ours,
              string_to_array(COALESCE(e.blanks, u.blanks, k.blanks), ',') AS blanks,
              (u.id <> k.id) IS TRUE OR (u.id <> e.id) IS TRUE OR (k.id <> e.id) IS TRUE
                OR (e."userId" <> w."userId") IS TRUE OR (e."clerkUserId" <> w."clerkUserId") IS TRUE AS is_conflict
         FROM waiting w
         LEFT JOIN LATERAL (
           SELECT {_OF_CONTACT} FROM crm_contacts c WHERE c.email = w.email
            UNION ALL SELECT {_OF_CONTACT} FROM other_address JOIN crm_contacts c USING (id) WHERE address = w.email
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
       SELECT contact, {_FIRST_PLACES}
         FROM verdict JOIN waiting USING (place) WHERE outcome = 'merged' GROUP BY contact
     ),
     filled AS (
       UPDATE crm_contacts c
          SET "userId" = COALESCE(c."userId", user_id."userId"),
              "clerkUserId" = COALESCE(c."clerkUserId", clerk_user_id."clerkUserId"),
              phone = COALESCE(c.phone, phone.phone), company = COALESCE(c.company, company.company),
              "lastContactedAt" = COALESCE(c."lastContactedAt", last_contacted_at."lastContactedAt"),
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
                  FROM (SELECT attribution.place IS NULL OR ({_UNITS["attribution"].format(of="c")}) IS TRUE)
                    AS attributed(has))
         FROM first {_FIRST_ROWS}
        WHERE c.id = first.contact AND ({_ANYTHING_TO_FILL})
     )
INSERT INTO ledger_entry (id, source, source_id, outcome, reason, contact_id, run_id, source_updated_at, seen_preparer,
                          filled)
SELECT line, '{{source}}', source_id, outcome,
       CASE WHEN NOT is_valid THEN 'invalid_email' WHEN is_conflict THEN 'conflict' END,
       CASE WHEN is_valid THEN contact END, 1, "updatedAt", CASE WHEN is_valid THEN "assignedPreparerId" END,
       CASE WHEN outcome = 'merged' THEN {_units_where("first.{unit} = place AND '{unit}' = ANY(blanks)")} END
  FROM verdict LEFT JOIN first USING (contact)
"""
_PROFILE_COLUMNS = f"""
r.place, r.id AS source_id, r.contact_id AS id, r."userId", r."clerkUserId",
'{{contact_type}}'::"ContactType" AS "contactType", {_name("firstName")} AS "firstName",
{_name("lastName")} AS "lastName",
COALESCE(NULLIF(lower({_trimmed("email")}), ''), lower('{{contact_type}}') || '-' || r.id || '@crm-backfill.invalid')
AS email, NULLIF({_trimmed("phone")}, '') AS phone, NULLIF({_trimmed("companyName")}, '') AS company,
'NEW'::"PipelineStage" AS stage,
r."createdAt" AS "stageEnteredAt", 'backfill' AS source, r.preparer AS "assignedPreparerId",
r."assignedAt", NULL::text AS "referrerUsername", NULL::text AS "referrerType",
NULL::numeric AS "commissionRate", NULL::timestamp AS "commissionRateLockedAt", NULL::text AS "attributionMethod",
100 AS "attributionConfidence", r."createdAt", r."updatedAt", NULL::timestamp AS "lastContactedAt"
"""
_LEAD_COLUMNS = f"""
r.place, r.id AS source_id, r.contact_id AS id, NULL::text AS "userId", NULL::text AS "clerkUserId",
{{contact_type}} AS "contactType", {_name("firstName")} AS "firstName",
{_name("lastName")} AS "lastName", lower({_trimmed("email")}) AS email,
NULLIF({_trimmed("phone")}, '') AS phone, NULL::text AS company, {{stage}} AS stage, {{entered}} AS "stageEnteredAt",
COALESCE(NULLIF({_trimmed("source")}, ''), 'lead_form') AS source,
r.preparer AS "assignedPreparerId", CASE WHEN r.preparer IS NOT NULL THEN r."updatedAt" END AS "assignedAt",
r."referrerUsername", r."referrerType", r."commissionRate", r."commissionRateLockedAt", r."attributionMethod",
r."attributionConfidence", r."createdAt", r."updatedAt", r."lastContactedAt"
"""
_PROFILES = f"""
SELECT r.*, u.email, assigned.preparer, assigned."assignedAt", {_ID.format(table="profiles")} AS contact_id,
       row_number() OVER (ORDER BY r.id) AS place
  FROM (SELECT * FROM profiles WHERE role = '{{role}}' AND id > %(id)s ORDER BY id LIMIT {CHUNK}) r
       LEFT JOIN LATERAL (SELECT email FROM users WHERE id = r."userId" LIMIT 1) u ON true
       LEFT JOIN LATERAL (
         SELECT "preparerId" AS preparer, "assignedAt" FROM client_preparers WHERE "clientId" = r.id AND "isActive"
          ORDER BY "assignedAt" DESC, id COLLATE "C" LIMIT 1
       ) assigned ON r.role = 'CLIENT'
"""
_PREPARER = f"CASE WHEN {_trimmed('assignedPreparerId')} <> '' THEN p.id ELSE referrer.id END AS preparer"
_JOIN_PREPARER = f"""
       LEFT JOIN LATERAL (
         SELECT id FROM profiles WHERE id = r."assignedPreparerId" OR "userId" = r."assignedPreparerId" LIMIT 1
       ) p ON r."assignedPreparerId" IS NOT NULL
       LEFT JOIN preparer_code referrer ON referrer.code = lower({_trimmed("referrerUsername")})
"""
_LEADS = f"""
SELECT r.*, {_PREPARER},
       {_ID.format(table="leads")} AS contact_id,
       row_number() OVER (ORDER BY r."createdAt", r.id) AS place
  FROM (SELECT * FROM leads WHERE {{which}} AND ("createdAt", id) > (%(at)s, %(id)s)
         ORDER BY "createdAt", id LIMIT {CHUNK}) r {_JOIN_PREPARER}
"""
# In the words of a lead, without what is the same of all of them.
_INTAKES = f"""
SELECT r.*, {_PREPARER}, {_ID.format(table="tax_intake_leads")} AS contact_id,
       row_number() OVER (ORDER BY r."createdAt", r.id) AS place
  FROM (SELECT id, first_name AS "firstName", last_name AS "lastName", email, 'tax_intake_form' AS source,
               CASE WHEN country_code = '+1' OR position('+' IN phone) > 0 THEN phone
                    ELSE country_code || ' ' || btrim(phone) END AS phone,
               "assignedPreparerId", referrer[1] AS "referrerUsername", referrer[2] AS "referrerType",
               NULL::numeric AS "commissionRate", NULL::timestamp AS "commissionRateLockedAt",
               referrer[3] AS "attributionMethod",
               CASE referrer[3] WHEN 'email_match' THEN 90 WHEN 'phone_match' THEN 85 ELSE 100 END
                    AS "attributionConfidence",
               created_at AS "createdAt", updated_at AS "updatedAt", "lastContactedAt"
          FROM tax_intake_leads, LATERAL (
            SELECT CASE WHEN btrim("referrerUsername") <> ''
                        THEN ARRAY["referrerUsername", "referrerType", "attributionMethod"] END) AS found(referrer)
         WHERE (created_at, id) > (%(at)s, %(id)s) ORDER BY created_at, id LIMIT {CHUNK}) r {_JOIN_PREPARER}
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
    connection.execute(_ADDRESSES_OF_USERS)
    converted = _LEAD_COLUMNS.format(
        contact_type="'CLIENT'::\"ContactType\"", stage="'COMPLETE'::\"PipelineStage\"", entered='r."updatedAt"'
    )
    active = _LEAD_COLUMNS.format(contact_type=_TYPE, stage=_STAGE, entered=_ENTERED)
    for source, which, columns in (
        ("converted_leads", "status = 'CONVERTED'", converted),
        ("active_leads", "status IN ('NEW', 'CONTACTED', 'QUALIFIED')", active),
    ):
        _in_chunks(connection, source, _LEADS.format(which=which), columns)
    contacted = 'r."lastContactedAt" IS NOT NULL'
    _in_chunks(
        connection,
        "open_intakes",
        _INTAKES,
        _LEAD_COLUMNS.format(
            contact_type="'LEAD'::\"ContactType\"",
            stage=f"""(CASE WHEN {contacted} THEN 'CONTACTED' ELSE 'NEW' END)::"PipelineStage\"""",
            entered='COALESCE(r."lastContactedAt", r."createdAt")',
        ),
    )
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

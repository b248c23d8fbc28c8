"""Builds the query for contacts that PostgreSQL can prove to be what their source row maps to.

Nearly every contact comes from one row with plain values, so one query can compare these contacts on the server. The
conditions must not accept more than `crm.rules.mapping`, because a proven contact is not compared again. All others are
compared in Python by the rules themselves, so a rule that is missing here costs time, but no finding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from crm.backfill.read.referrers import codes_of_preparers, preparer_labels
from crm.outcome import Source
from crm.postgres.facts.columns import ATTRIBUTION_COLUMNS
from crm.postgres.facts.requirements import CONFIDENCE
from crm.postgres.facts.schema import DatabaseFacts
from crm.rules.mapping import (
    CONFIDENCE_OF_METHOD,
    CONTACT_TYPE_OF_LEAD_TYPE,
    CONTACT_TYPE_OF_SOURCE,
    CONVERTED_CONTACT_TYPE,
    FULL_CONFIDENCE,
    INTAKE_ORIGIN,
    LEAD_ORIGIN,
    OWN_COUNTRY,
    PROFILE_ORIGIN,
    SIGNUP_ORIGIN,
    SOURCE_OF_ROLE,
    STAGES_OF_STATUS,
    UNKNOWN_NAME,
    canonical_username_sql,
    trimmed_username_sql,
)
from crm.rules.source_rows import CLIENT_PREPARERS, SOURCE_TABLES, WHITE_SPACE

# Accepts no address that `crm.rules.mapping` rejects. Quantifiers with bounds would make it a hundred times slower in
# PostgreSQL. Instead, the parts before and after the @ are limited to a length at which no label can be too long.
_PLAIN_EMAIL = "^[a-z0-9_+-]+([.][a-z0-9_+-]+)*@([a-z0-9]+(-+[a-z0-9]+)*[.])+[a-z][a-z]+$"
_MAX_PART = 60


def _trimmed(column: str) -> str:
    return f"NULLIF(btrim({column}, %(white_space)s), '')"


def _is(contact: str, value: str) -> str:
    """Return the condition that a column of the contact has a value, or both are NULL."""
    return f'c."{contact}" IS NOT DISTINCT FROM {value}'


def _is_address(given: str) -> str:
    """Return the condition that the contact has the given address, and that it is a valid plain address."""
    return (
        f'(lower(btrim({given}, %(white_space)s) COLLATE "C") = c.email AND octet_length(c.email) = length(c.email) '
        "AND position('@' IN c.email) <= %(longest_part)s "
        "AND length(c.email) - position('@' IN c.email) <= %(longest_part)s "
        'AND c.email COLLATE "C" ~ %(plain_email)s)'
    )


def _or(given: str, otherwise: str) -> str:
    return f"COALESCE({_trimmed(given)}, %({otherwise})s)"


def _is_moment(column: str) -> str:
    return f"{column} BETWEEN '0001-01-01' AND '9999-12-31 23:59:59.999999'"


_OF_EVERY_ROW = [
    _is_moment('r."createdAt"'),
    _is_moment('r."updatedAt"'),
    _is("firstName", _or('r."firstName"', "unknown_name")),
    _is("lastName", _or('r."lastName"', "unknown_name")),
    _is("phone", _trimmed("r.phone")),
    _is("createdAt", 'r."createdAt"'),
]
_NOTHING = ("lastContactedAt", *(name for name in ATTRIBUTION_COLUMNS if name != CONFIDENCE))
_UNASSIGNED = 'c."assignedPreparerId" IS NULL AND c."assignedAt" IS NULL'
_REFERRER = 'r."referrerUsername"'


def _is_assigned_since(moment: str) -> str:
    """Return the condition that the contact has the preparer of a lead or an intake, since a moment.

    As with profiles. A referrer is the one preparer with the code, or none if no preparer has a code like it.
    """
    return f"""CASE WHEN r."assignedPreparerId" IS NOT NULL
             THEN p.id = c."assignedPreparerId" AND c."assignedAt" = {moment} AND btrim(p.id, %(white_space)s) <> ''
             WHEN referrer.id IS NOT NULL THEN referrer.id = c."assignedPreparerId" AND c."assignedAt" = {moment}
             WHEN COALESCE({canonical_username_sql(_REFERRER)}, '') NOT IN (
                    SELECT {canonical_username_sql("code")} FROM preparer_code) THEN {_UNASSIGNED} END"""


_OF_PROFILE = [
    *_OF_EVERY_ROW,
    _is("userId", 'r."userId"'),
    _is("clerkUserId", "{clerk_user_id}"),
    _is("company", _trimmed('r."companyName"')),
    'c."contactType"::text = (%(type_of_role)s::jsonb ->> r.role::text)',
    "c.stage::text = %(new)s",
    _is("stageEnteredAt", 'r."createdAt"'),
    """c.source = CASE c."contactType"::text WHEN %(lead_type)s THEN %(signup_origin)s ELSE %(profile_origin)s END""",
    f'c."{CONFIDENCE}" = %(full_confidence)s',
    *(f'c."{name}" IS NULL' for name in _NOTHING),
    # A preparer who is given by the profile's own id; whoever is given otherwise, Python looks for.
    f"""CASE WHEN assigned."preparerId" IS NULL OR r.role::text <> ALL(%(client_roles)s) THEN {_UNASSIGNED}
             ELSE p.id = c."assignedPreparerId" AND {_is("assignedAt", 'assigned."assignedAt"')}
              AND COALESCE({_is_moment('assigned."assignedAt"')}, true) AND btrim(p.id, %(white_space)s) <> '' END""",
    f"""CASE WHEN btrim(u.email, %(white_space)s) <> '' THEN {_is_address("u.email")}
             WHEN btrim({{own_email}}, %(white_space)s) <> '' THEN {_is_address("{own_email}")}
             ELSE c.email = lower(c."contactType"::text) || '-' || r.id || '@' || %(placeholder_domain)s
              AND r.id = lower(r.id COLLATE "C") AND octet_length(r.id) = length(r.id) END""",
]
_OF_LEAD = [
    *_OF_EVERY_ROW,
    *(f'c."{name}" IS NULL' for name in ("userId", "clerkUserId", "company")),
    """c."contactType"::text = CASE WHEN r.status::text = ANY(%(converted)s) THEN %(converted_type)s
                                   ELSE %(type_of_type)s::jsonb ->> r.type::text END""",
    "c.stage::text = (%(stage_of_status)s::jsonb ->> r.status::text)",
    """c."stageEnteredAt" = CASE c.stage::text WHEN %(new)s THEN r."createdAt"
                             WHEN %(contacted)s THEN COALESCE(r."lastContactedAt", r."updatedAt")
                             ELSE r."updatedAt" END""",
    _is("source", _or("r.source", "lead_origin")),
    _is_assigned_since('r."updatedAt"'),
    *(_is(name, f'r."{name}"') for name in (*ATTRIBUTION_COLUMNS, "lastContactedAt")),
    *(f"COALESCE({_is_moment(column)}, true)" for column in ('r."lastContactedAt"', 'r."commissionRateLockedAt"')),
    'COALESCE(r."commissionRate" BETWEEN -1e9 AND 1e9, true)',
    _is_address("r.email"),
]
_IS_REFERRED = _trimmed('r."referrerUsername"') + " IS NOT NULL"
_OF_INTAKE = [
    *(_is_moment(column) for column in ("r.created_at", "r.updated_at")),
    *(
        f"COALESCE({_is_moment(column)}, true)"
        for column in ('r."lastContactedAt"', 'r."convertedAt"', 'r."unqualifiedAt"')
    ),
    _is("firstName", _or("r.first_name", "unknown_name")),
    _is("lastName", _or("r.last_name", "unknown_name")),
    # With the code of another country, Python puts the number together.
    f"COALESCE({_trimmed('r.country_code')}, %(own_country)s) = %(own_country)s",
    _is("phone", _trimmed("r.phone")),
    *(
        f'c."{name}" IS NULL'
        for name in ("userId", "clerkUserId", "company", "commissionRate", "commissionRateLockedAt")
    ),
    """c."contactType"::text = CASE WHEN r."convertedToClient" IS TRUE
                                   THEN %(converted_type)s ELSE %(lead_type)s END""",
    """c.stage::text = CASE WHEN r.unqualified IS TRUE THEN %(lost)s WHEN r."convertedToClient" IS TRUE THEN %(closed)s
                        WHEN r."lastContactedAt" IS NOT NULL THEN %(contacted)s ELSE %(new)s END""",
    """c."stageEnteredAt" = CASE
         WHEN r.unqualified IS TRUE THEN COALESCE(r."unqualifiedAt", r.updated_at)
         WHEN r."convertedToClient" IS TRUE THEN COALESCE(r."convertedAt", r.updated_at)
         ELSE COALESCE(r."lastContactedAt", r.created_at) END""",
    "c.source = %(intake_origin)s",
    _is_assigned_since("r.updated_at"),
    # Where the person has another intake with a preparer, Python finds out whose counts.
    "{no_others}",
    *(
        _is(name, f'CASE WHEN {_IS_REFERRED} THEN r."{name}" END')
        for name in ("referrerUsername", "referrerType", "attributionMethod")
    ),
    f"""c."{CONFIDENCE}" = CASE WHEN {_IS_REFERRED}
         THEN COALESCE((%(confidence_of_method)s::jsonb ->> r."attributionMethod")::int, %(full_confidence)s)
         ELSE %(full_confidence)s END""",
    _is("createdAt", "r.created_at"),
    _is("lastContactedAt", 'r."lastContactedAt"'),
    _is_address("r.email"),
]
_NO_OTHER = """NOT EXISTS (SELECT FROM tax_intake_leads o
                        WHERE o."{key}" = r."{key}" AND o.id <> r.id AND o."assignedPreparerId" IS NOT NULL)"""
_MADE = """
SELECT c.id, c."updatedAt" IS DISTINCT FROM entry.source_updated_at::timestamp({second_digits}) AS touched
  FROM ledger_entry entry
  JOIN crm_contacts c ON c.id = entry.id
  {rows}
 WHERE entry.outcome = 'created' AND entry.contact_id = entry.id AND entry.source = ANY(%({sources})s)
   AND entry.id <> ALL(%(resolved)s) AND entry.source_id <> ALL(%({repeated})s)
   AND NOT EXISTS (SELECT FROM ledger_entry merged WHERE merged.outcome = 'merged' AND merged.contact_id = entry.id)
   AND NOT EXISTS (SELECT FROM contact_update change WHERE change.contact_id = entry.id)
   AND {conditions}
"""
_REFERRING_PREPARER = f"""LEFT JOIN (
    SELECT code, min(id) AS id FROM preparer_code GROUP BY code HAVING count(DISTINCT id) = 1
  ) referrer ON referrer.code = {trimmed_username_sql(_REFERRER)}"""
_PROFILES = _MADE.format(
    second_digits="{second_digits}",
    rows="""JOIN profiles r ON r.id = entry.source_id LEFT JOIN users u ON u.id = r."userId"
  {assigned}
  LEFT JOIN profiles p ON p.id = assigned."preparerId" """,
    sources="profile_sources",
    repeated="repeated_profiles",
    conditions="\n   AND ".join(_OF_PROFILE),
)
_LEADS = _MADE.format(
    second_digits="{second_digits}",
    rows=f"""JOIN leads r ON r.id = entry.source_id LEFT JOIN profiles p ON p.id = r."assignedPreparerId"
  {_REFERRING_PREPARER}""",
    sources="lead_sources",
    repeated="repeated_leads",
    conditions="\n   AND ".join(_OF_LEAD),
)
_INTAKES = _MADE.format(
    second_digits="{second_digits}",
    rows=f"""JOIN (SELECT {{columns}} FROM tax_intake_leads r) r ON r.id = entry.source_id
  LEFT JOIN profiles p ON p.id = r."assignedPreparerId"
  {_REFERRING_PREPARER}""",
    sources="intake_sources",
    repeated="repeated_intakes",
    conditions="\n   AND ".join(_OF_INTAKE),
)
_ASSIGNED = f"""LEFT JOIN (
    SELECT DISTINCT ON ("clientId") "clientId", "preparerId", "assignedAt" FROM {CLIENT_PREPARERS} WHERE "isActive"
     ORDER BY "clientId", "assignedAt" DESC NULLS LAST, id COLLATE "C"
  ) assigned ON assigned."clientId" = r.id"""
_NOT_ASSIGNED = 'CROSS JOIN (SELECT NULL::text AS "preparerId", NULL::timestamp AS "assignedAt") assigned'


def _intakes(facts: DatabaseFacts) -> str:
    """The query of the contacts that intakes made."""
    keys = [key for key in ("email", "profileId") if f"tax_intake_leads.{key}" not in facts.missing]
    names_preparers = "tax_intake_leads.assignedPreparerId" not in facts.missing
    no_others = " AND ".join(_NO_OTHER.format(key=key) for key in keys) if names_preparers else "true"
    columns = SOURCE_TABLES["tax_intake_leads"].columns(facts.missing)
    return _INTAKES.replace("{columns}", columns).replace("{no_others}", no_others)


def proven_contacts(facts: DatabaseFacts, resolved: Mapping[str, object]) -> tuple[str, dict[str, Any]]:
    """Return the query of the proven contacts, with whether each was modified since, and its parameters.

    `resolved` has the entry ids of the rows with a resolution, which are never proven here. PostgreSQL can refuse the
    query if a row cannot be read or a column has another type.
    """
    rules = facts.rules()
    clerk_user_id = "NULL" if "profiles.clerkUserId" in facts.missing else "NULLIF(r.\"clerkUserId\", '')"
    codes = f"WITH preparer_code(id, code) AS MATERIALIZED ({codes_of_preparers(facts)}) "
    queries = [_PROFILES, _LEADS, *([_intakes(facts)] if "tax_intake_leads" in facts.tables else [])]
    query = codes + " UNION ALL ".join(queries).replace("{clerk_user_id}", clerk_user_id)
    own_email = "NULL::text" if "profiles.email" in facts.missing else "r.email"
    query = query.replace("{own_email}", own_email)
    query = query.replace("{assigned}", _NOT_ASSIGNED if CLIENT_PREPARERS in facts.missing else _ASSIGNED)
    query = query.replace("{second_digits}", str(facts.second_digits))
    return query, {
        "white_space": WHITE_SPACE,
        "plain_email": _PLAIN_EMAIL,
        "longest_part": _MAX_PART,
        "unknown_name": UNKNOWN_NAME,
        "profile_origin": PROFILE_ORIGIN,
        "signup_origin": SIGNUP_ORIGIN,
        "lead_origin": LEAD_ORIGIN,
        "full_confidence": FULL_CONFIDENCE,
        "placeholder_domain": rules.placeholder_domain,
        "new": rules.stages["NEW"],
        "contacted": rules.stages["CONTACTED"],
        "profile_sources": [source.value for source in Source.of_table("profiles")],
        "lead_sources": [source.value for source in Source.of_table("leads")],
        "resolved": list(resolved),
        "repeated_profiles": list(facts.repeated_ids.get("profiles", ())),
        "client_roles": list(facts.roles.get("CLIENT", ())),
        "preparer_labels": preparer_labels(facts),
        "repeated_leads": list(facts.repeated_ids.get("leads", ())),
        "repeated_intakes": list(facts.repeated_ids.get("tax_intake_leads", ())),
        "intake_sources": [source.value for source in Source.of_table("tax_intake_leads")],
        "intake_origin": INTAKE_ORIGIN,
        "own_country": OWN_COUNTRY,
        "lead_type": CONTACT_TYPE_OF_LEAD_TYPE["CUSTOMER"],
        "closed": rules.stage_of("CONVERTED"),
        "lost": rules.stage_of("DISQUALIFIED"),
        "confidence_of_method": json.dumps(CONFIDENCE_OF_METHOD),
        "converted": list(facts.statuses.get("CONVERTED", ())),
        "converted_type": CONVERTED_CONTACT_TYPE,
        "type_of_role": json.dumps(
            {
                label: CONTACT_TYPE_OF_SOURCE[SOURCE_OF_ROLE[role]]
                for role, labels in facts.roles.items()
                if role in SOURCE_OF_ROLE
                for label in labels
            }
        ),
        "type_of_type": json.dumps(
            {
                spelling: contact_type
                for label, contact_type in CONTACT_TYPE_OF_LEAD_TYPE.items()
                for spelling in (label, label.lower())
            }
        ),
        "stage_of_status": json.dumps(
            {
                label: rules.stage_of(status)
                for status, labels in facts.statuses.items()
                if status in STAGES_OF_STATUS
                for label in labels
            }
        ),
    }

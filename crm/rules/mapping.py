"""The rules that map a source row to a contact. Pure: no database, no settings.

Timestamps and rates are PostgreSQL's text. They are copied, and not parsed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from django.core.exceptions import ValidationError
from django.core.validators import validate_email

from crm.outcome import AssignedBy, Reason, Refusal, Source
from crm.rules.addresses import canonical_address, hides_something, literal, trimmed_address
from crm.rules.source_rows import WHITE_SPACE, IntakeRow, LeadRow, ProfileRow, RawRow, SignupRow

UNKNOWN_NAME = "Unknown"
PROFILE_ORIGIN = "backfill"
LEAD_ORIGIN = "lead_form"
SIGNUP_ORIGIN = "signup"
INTAKE_ORIGIN = "tax_intake_form"
#: The values of `source` that are ours. Others come from a lead's row.
ORIGINS = frozenset({PROFILE_ORIGIN, LEAD_ORIGIN, SIGNUP_ORIGIN, INTAKE_ORIGIN})
FULL_CONFIDENCE = 100

#: The five nullable fields of an attribution; with the confidence they are one unit. It is present if it has a
#: referrer: for people without one, the application stores the method `direct` and a rate of zero.
ATTRIBUTION = (
    "referrer_username",
    "referrer_type",
    "commission_rate",
    "commission_rate_locked_at",
    "attribution_method",
)
ATTRIBUTION_UNIT = (*ATTRIBUTION, "attribution_confidence")

#: The timestamps of a contact, and the number of fractional digits of a second in PostgreSQL.
MOMENTS = (
    *("stage_entered_at", "assigned_at", "commission_rate_locked_at", "created_at", "updated_at"),
    "last_contacted_at",
)
MAX_SECOND_DIGITS = 6

SOURCE_OF_ROLE = {
    "CLIENT": Source.CLIENTS,
    "TAX_PREPARER": Source.PREPARERS,
    "AFFILIATE": Source.AFFILIATES,
    "LEAD": Source.LEAD_PROFILES,
}
EXCLUDED_ROLES = {"SUPER_ADMIN": "super_admin", "ADMIN": "admin"}
#: Why rows of these sources are excluded as long as no run has migrated them.
EXCLUDED_SIGNUPS = {Source.LEAD_PROFILES: "lead", Source.SIGNUPS: "no_profile"}
DISQUALIFIED = "disqualified"
UNQUALIFIED = "unqualified"
#: By kind of intake (`crm.rules.source_rows`): its source, and the status of leads with the same stage.
KINDS_OF_INTAKES = {
    "open": (Source.OPEN_INTAKES, "NEW"),
    "converted": (Source.CONVERTED_INTAKES, "CONVERTED"),
    UNQUALIFIED: (Source.OPEN_INTAKES, "DISQUALIFIED"),
    "unqualified_client": (Source.CONVERTED_INTAKES, "DISQUALIFIED"),
}
#: The confidence of a referrer whom the application found by a person's address or phone.
CONFIDENCE_OF_METHOD = {"email_match": 90, "phone_match": 85}
OWN_COUNTRY = "+1"
CONTACT_TYPE_OF_SOURCE = {
    Source.CLIENTS: "CLIENT",
    Source.PREPARERS: "PREPARER",
    Source.AFFILIATES: "AFFILIATE",
    Source.LEAD_PROFILES: "LEAD",
}
CONTACT_TYPE_OF_LEAD_TYPE = {"CUSTOMER": "LEAD", "TAX_PREPARER": "PREPARER", "AFFILIATE": "AFFILIATE"}
CONVERTED_CONTACT_TYPE = "CLIENT"

#: The stages for the status of a lead: the first one that the database has. If it has none, the row is excluded.
STAGES_OF_STATUS = {
    "NEW": ("NEW",),
    "CONTACTED": ("CONTACTED",),
    "QUALIFIED": ("QUALIFIED", "CONTACTED"),
    "CONVERTED": ("COMPLETE", "CLOSED"),
    "DISQUALIFIED": ("LOST",),
}


class ContactDraft(NamedTuple):
    """A contact, not yet written. The fields are those of `crm.models.CRMContact`, in its order."""

    id: str
    user_id: str | None
    clerk_user_id: str | None
    contact_type: str
    first_name: str
    last_name: str
    email: str
    phone: str | None
    company: str | None
    stage: str
    stage_entered_at: str
    source: str
    assigned_preparer_id: str | None
    assigned_at: str | None
    referrer_username: str | None
    referrer_type: str | None
    commission_rate: str | None
    commission_rate_locked_at: str | None
    attribution_method: str | None
    attribution_confidence: int
    created_at: str
    updated_at: str
    last_contacted_at: str | None


class Resolution(NamedTuple):
    """A person's resolution of a row in conflict: the contact that it belongs to, or the address of its own contact."""

    contact_id: str | None
    separate_email: str | None


class MappedRow(NamedTuple):
    """A source row with its draft, or with the reason why it cannot become a contact.

    `raw_email` is the address as it is stored, or None. `updated_at` is None if the row has no valid one. `assigned_by`
    is None for a row without a preparer.
    """

    id: str
    source_id: str
    updated_at: str | None
    known_reason: str | None
    raw_email: str | None
    draft: ContactDraft | None
    rejection: Reason | None
    resolution: Resolution | None = None
    refusal: Refusal | None = None
    #: The profile whose contact is the row's, if the row names one.
    profile_id: str | None = None
    assigned_by: AssignedBy | None = None

    @property
    def preparer_id(self) -> str | None:
        """The id of the row's preparer, if it has one."""
        return self.draft.assigned_preparer_id if self.draft else None


class Assignment(NamedTuple):
    """The preparer that a row gives to its contact, the date, and the way by which the row has the preparer."""

    preparer_id: str | None = None
    assigned_at: str | None = None
    by: AssignedBy | None = None


_UNASSIGNED = Assignment()


@dataclass(frozen=True, slots=True)
class Rules:
    """The facts of the database and the settings that the mapping needs."""

    stages: Mapping[str, str]
    placeholder_domain: str
    second_digits: int = 6
    rate_decimals: int | None = None

    def stage_of(self, status: str) -> str | None:
        """Return the label of the stage for a normalised status of a lead; None if the database has none."""
        wanted = STAGES_OF_STATUS.get(status, ())
        return next((self.stages[stage] for stage in wanted if stage in self.stages), None)

    def as_stored(self, moment: str) -> str:
        """Return a timestamp rounded to the precision of a contact's columns."""
        return rounded(moment, self.second_digits)

    def keeps(self, rate: str | None) -> bool:
        """Return whether the column of a contact can store a rate exactly: money is not rounded."""
        if rate is None or self.rate_decimals is None:
            return True
        return len(rate.partition(".")[2].rstrip("0")) <= self.rate_decimals


def rounded(moment: str, digits: int) -> str:
    """Return PostgreSQL's text of a timestamp with at most `digits` fractional digits of a second, rounded half up.

    If Python does not support the year, the other digits are cut off instead.
    """
    whole, _, fraction = moment.partition(".")
    if len(fraction) <= digits:
        return moment
    half = timedelta(microseconds=10 ** (6 - digits) // 2)
    try:
        whole, _, fraction = (datetime.fromisoformat(moment) + half).isoformat(" ", "microseconds").partition(".")
        era = ""
    except (ValueError, OverflowError):
        fraction, blank, era = fraction.partition(" ")
        era = blank + era
    kept = fraction[:digits].rstrip("0")
    return f"{whole}.{kept}{era}" if kept else f"{whole}{era}"


def contact_id(table: str, source_id: str) -> str:
    """Return the id of the contact that the row `source_id` of `table` creates. It looks like a cuid, and is stable."""
    return "c" + hashlib.sha256(f"{table}:{source_id}".encode()).hexdigest()[:24]


def contact_id_sql(reference: str) -> str:
    """Return `contact_id` as an SQL expression, for an expression with the value `<table>:<source id>`."""
    return f"'c' || left(encode(sha256(convert_to({reference}, 'UTF8')), 'hex'), 24)"


def normalised(label: str) -> str:
    """Return a role, status or type in one spelling: generations use upper or lower case."""
    return label.strip().upper().replace("-", "_").replace(" ", "_")


def referrer(username: str | None) -> str | None:
    """Return the username of a referrer in lower case, because usernames have no case; None if it is blank."""
    return (username.strip().lower() or None) if username else None


def has_no_referrer_sql(username: str) -> str:
    """Return the SQL condition that a username is blank."""
    return f"COALESCE(btrim({username}, {literal(WHITE_SPACE)}), '') = ''"


def trimmed(text: str | None) -> str | None:
    """Return the text without white space around it, or None if it is blank."""
    return (text.strip() or None) if text else None


_ASCII_LOWER_CASE = {code: code + 0x20 for code in range(ord("A"), ord("Z") + 1)}


def canonical_username(raw: str) -> str:
    """Return the form in which usernames are compared: trimmed, with ASCII letters in lower case.

    So the rule depends on no locale. The application creates no other letters.
    """
    return raw.strip().translate(_ASCII_LOWER_CASE)


def trimmed_username_sql(expression: str) -> str:
    """Return the SQL of a trimmed username."""
    return f"btrim({expression}, {literal(WHITE_SPACE)})"


def canonical_username_sql(expression: str) -> str:
    """Return the SQL of `canonical_username`."""
    return f'lower({trimmed_username_sql(expression)} COLLATE "C")'


# Matches nearly every address. All matches are also valid for Django's validator, which takes six times as long.
_ORDINARY_EMAIL = re.compile(
    r"[a-z0-9_+-]{1,64}(?:\.[a-z0-9_+-]{1,64})*@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}"
)
_LONGEST_ORDINARY_EMAIL = 254


def normalised_email(raw: str) -> str | None:
    """Return the address in its canonical form, or None if it is invalid.

    The local part must be ASCII. Django's validator accepts a few letters that become ASCII when their case is folded,
    so that two addresses would become one, and invisible characters in a domain.
    """
    email = canonical_address(raw)
    if len(email) <= _LONGEST_ORDINARY_EMAIL and _ORDINARY_EMAIL.fullmatch(email):
        return email
    if hides_something(email) or not email.rpartition("@")[0].isascii():
        return None
    try:
        validate_email(email)
    except ValidationError as error:
        # Its traceback refers to the whole batch, which would stay in memory until the next garbage collection.
        error.__traceback__ = None
        return None
    return email


def _is_no_moment(text: str) -> bool:
    """Return whether a timestamp is not in the years 1 to 9999, so that the application cannot read it."""
    return text[4] != "-" or text[-1] == "C"


def _fault(required: Mapping[str, str | None], optional: Mapping[str, str | None]) -> tuple[Reason, Refusal]:
    """Return the fault of the first missing or invalid timestamp, of which there is at least one."""
    for column, text in required.items():
        if text is None:
            return Reason.MISSING_VALUE, Refusal(column=column)
    moments = {column: text for column, text in {**required, **optional}.items() if text is not None}
    return Reason.INVALID_VALUE, Refusal(column=next(column for column in moments if _is_no_moment(moments[column])))


def _rejected(table: str, row: RawRow, reason: Reason, refusal: Refusal | None = None) -> MappedRow:
    updated_at = None if row.updated_at is None or _is_no_moment(row.updated_at) else row.updated_at
    identifier = contact_id(table, row.id)
    return MappedRow(identifier, row.id, updated_at, row.known_reason, None, None, reason, None, refusal)


def assignment(
    raw: str | None, profile_id: str | None, assigned_at: str | None, by: AssignedBy, referrer: str | None = None
) -> Assignment:
    """Return the assignment of a row.

    Arguments:
        raw: The preparer as the row names it.
        profile_id: The profile to which that is resolved. Without one, the preparer is not copied: the CRM shows a
            preparer only contacts with the id of the own profile.
        assigned_at: The date of the assignment.
        by: The way, if the row names a preparer.
        referrer: The tax preparer who referred the person, used if the row names no preparer.
    """
    if raw and raw.strip():
        return Assignment(profile_id, assigned_at, by) if profile_id else Assignment(by=AssignedBy.UNRESOLVED)
    return Assignment(referrer, assigned_at, AssignedBy.REFERRER) if referrer else _UNASSIGNED


#: An id in lower case with only characters that are valid in an address.
_ORDINARY_ID = re.compile(r"[a-z0-9_-]+")


def placeholder_name(kind: str, profile_id: str) -> str:
    """Return the local part of the placeholder address of a profile. `kind` is the kind of contact, such as `client`.

    It is `<kind>-<profile id>`. If the id is not in lower case, a part of its hash is appended: profiles whose ids
    differ only in case are two people, but addresses are compared without case.
    """
    if _ORDINARY_ID.fullmatch(profile_id):
        return f"{kind}-{profile_id}"
    return f"{kind}-{profile_id.lower()}-{hashlib.sha256(profile_id.encode()).hexdigest()[:12]}"


def email_of_profile(row: ProfileRow) -> str | None:
    """Return the address of a profile as stored: that of its user, else its own; None if neither has one."""
    return next((email for email in (row.email, row.own_email) if email and trimmed_address(email)), None)


def profile_mapper(source: Source, rules: Rules) -> Callable[[ProfileRow], MappedRow]:
    """Return the function that maps the rows of a source of profiles."""
    contact_type = CONTACT_TYPE_OF_SOURCE[source]
    kind = contact_type.lower()
    origin = SIGNUP_ORIGIN if source.is_of_signups else PROFILE_ORIGIN
    is_client = source is Source.CLIENTS
    domain = rules.placeholder_domain
    label_belongs = lru_cache(lambda role: SOURCE_OF_ROLE.get(normalised(role)) is source)

    def mapped(row: ProfileRow) -> MappedRow:
        raw_email = email_of_profile(row)
        email = normalised_email(raw_email) if raw_email else f"{placeholder_name(kind, row.id)}@{domain}"
        if row.role is None:
            return _rejected("profiles", row, Reason.MISSING_VALUE, Refusal(column="role"))
        if not label_belongs(row.role):
            return _rejected("profiles", row, Reason.UNKNOWN_ROLE)
        if email is None:
            return _rejected("profiles", row, Reason.INVALID_EMAIL)
        created_at, updated_at = row.created_at, row.updated_at
        if created_at is None or updated_at is None or _is_no_moment(created_at) or _is_no_moment(updated_at):
            return _rejected("profiles", row, *_fault({"createdAt": created_at, "updatedAt": updated_at}, {}))
        assigned = _UNASSIGNED
        if is_client and row.raw_assigned_preparer_id is not None:
            by = AssignedBy.CLIENT_PREPARERS
            assigned = assignment(row.raw_assigned_preparer_id, row.assigned_preparer_id, row.assigned_at, by)
            if assigned.assigned_at is not None and _is_no_moment(assigned.assigned_at):
                return _rejected("profiles", row, Reason.INVALID_VALUE, Refusal(column="assignedAt"))
        identifier = contact_id("profiles", row.id)
        draft = ContactDraft(
            identifier,
            row.user_id,
            row.clerk_user_id or None,
            contact_type,
            trimmed(row.first_name) or UNKNOWN_NAME,
            trimmed(row.last_name) or UNKNOWN_NAME,
            email,
            trimmed(row.phone),
            trimmed(row.company_name),
            rules.stages["NEW"],
            created_at,
            origin,
            assigned.preparer_id,
            assigned.assigned_at,
            None,
            None,
            None,
            None,
            None,
            FULL_CONFIDENCE,
            created_at,
            updated_at,
            None,
        )
        return MappedRow(
            identifier, row.id, updated_at, row.known_reason, raw_email, draft, None, assigned_by=assigned.by
        )

    return mapped


def lead_mapper(source: Source, rules: Rules) -> Callable[[LeadRow], MappedRow]:
    """Return the function that maps the rows of a source of leads."""
    converted = source is Source.CONVERTED_LEADS
    stage_of = lru_cache(lambda status: rules.stage_of(normalised(status)))
    contact_type_of = lru_cache(
        lambda label: CONVERTED_CONTACT_TYPE if converted else CONTACT_TYPE_OF_LEAD_TYPE.get(normalised(label or ""))
    )
    new, contacted = rules.stages["NEW"], rules.stages["CONTACTED"]

    def mapped(row: LeadRow) -> MappedRow:
        if row.status is None:
            return _rejected("leads", row, Reason.MISSING_VALUE, Refusal(column="status"))
        stage = stage_of(row.status)
        if stage is None:
            return _rejected("leads", row, Reason.UNKNOWN_STATUS)
        contact_type = contact_type_of(row.type)
        if contact_type is None:
            missing = row.type is None
            reason = Reason.MISSING_VALUE if missing else Reason.UNKNOWN_TYPE
            return _rejected("leads", row, reason, Refusal(column="type") if missing else None)
        email = normalised_email(row.email) if row.email is not None else None
        if email is None or row.email is None:
            return _rejected("leads", row, Reason.INVALID_EMAIL)
        created_at, updated_at = row.created_at, row.updated_at
        contacted_at, locked_at = row.last_contacted_at, row.commission_rate_locked_at
        if (
            created_at is None
            or updated_at is None
            or _is_no_moment(created_at)
            or _is_no_moment(updated_at)
            or (contacted_at is not None and _is_no_moment(contacted_at))
            or (locked_at is not None and _is_no_moment(locked_at))
        ):
            required = {"createdAt": created_at, "updatedAt": updated_at}
            optional = {"lastContactedAt": contacted_at, "commissionRateLockedAt": locked_at}
            return _rejected("leads", row, *_fault(required, optional))
        rate = row.commission_rate
        if rate is not None and not (rate[-1:].isdigit() and rules.keeps(rate)):
            return _rejected("leads", row, Reason.INVALID_VALUE, Refusal(column="commissionRate"))
        identifier = contact_id("leads", row.id)
        assigned = assignment(
            row.raw_assigned_preparer_id,
            row.assigned_preparer_id,
            updated_at,
            AssignedBy.OWN,
            row.referring_preparer_id,
        )
        entered = created_at if stage == new else (contacted_at if stage == contacted else None) or updated_at
        draft = ContactDraft(
            identifier,
            None,
            None,
            contact_type,
            trimmed(row.first_name) or UNKNOWN_NAME,
            trimmed(row.last_name) or UNKNOWN_NAME,
            email,
            trimmed(row.phone),
            None,
            stage,
            entered,
            trimmed(row.source) or LEAD_ORIGIN,
            assigned.preparer_id,
            assigned.assigned_at,
            row.referrer_username,
            row.referrer_type,
            row.commission_rate,
            locked_at,
            row.attribution_method,
            FULL_CONFIDENCE if row.attribution_confidence is None else row.attribution_confidence,
            created_at,
            updated_at,
            contacted_at,
        )
        return MappedRow(
            identifier, row.id, updated_at, row.known_reason, row.email, draft, None, assigned_by=assigned.by
        )

    return mapped


def intake_mapper(source: Source, rules: Rules) -> Callable[[IntakeRow], MappedRow]:
    """Return the mapping of one source of intakes."""
    is_converted = source is Source.CONVERTED_INTAKES
    contact_type = CONVERTED_CONTACT_TYPE if is_converted else CONTACT_TYPE_OF_LEAD_TYPE["CUSTOMER"]
    new, contacted = rules.stages["NEW"], rules.stages["CONTACTED"]
    converted, lost = rules.stage_of("CONVERTED"), rules.stage_of("DISQUALIFIED")

    def stage(row: IntakeRow, created_at: str, updated_at: str) -> tuple[str | None, str]:
        if row.unqualified:
            return lost, row.unqualified_at or updated_at
        if is_converted:
            return converted, row.converted_at or updated_at
        return (contacted, row.last_contacted_at) if row.last_contacted_at else (new, created_at)

    def mapped(row: IntakeRow) -> MappedRow:
        email = normalised_email(row.email) if row.email is not None else None
        if email is None or row.email is None:
            return _rejected("tax_intake_leads", row, Reason.INVALID_EMAIL)
        created_at, updated_at = row.created_at, row.updated_at
        required = {"created_at": created_at, "updated_at": updated_at}
        optional = {
            "lastContactedAt": row.last_contacted_at,
            "convertedAt": row.converted_at if is_converted else None,
            "unqualifiedAt": row.unqualified_at if row.unqualified else None,
        }
        if (
            created_at is None
            or updated_at is None
            or any(map(_is_no_moment, filter(None, (*required.values(), *optional.values()))))
        ):
            return _rejected("tax_intake_leads", row, *_fault(required, optional))
        reached, entered = stage(row, created_at, updated_at)
        if reached is None:
            return _rejected("tax_intake_leads", row, Reason.UNKNOWN_STATUS)
        identifier = contact_id("tax_intake_leads", row.id)
        assigned = _UNASSIGNED
        if not row.is_outranked:
            raw, profile_id, by = row.raw_assigned_preparer_id, row.assigned_preparer_id, AssignedBy.OWN
            assigned = assignment(raw, profile_id, updated_at, by, row.referring_preparer_id)
        referrer = row.referrer_username if trimmed(row.referrer_username) else None
        method = row.attribution_method if referrer else None
        draft = ContactDraft(
            identifier,
            None,
            None,
            contact_type,
            trimmed(row.first_name) or UNKNOWN_NAME,
            trimmed(row.last_name) or UNKNOWN_NAME,
            email,
            _phone(row),
            None,
            reached,
            entered,
            INTAKE_ORIGIN,
            assigned.preparer_id,
            assigned.assigned_at,
            referrer,
            row.referrer_type if referrer else None,
            None,
            None,
            method,
            CONFIDENCE_OF_METHOD.get(method or "", FULL_CONFIDENCE),
            created_at,
            updated_at,
            row.last_contacted_at,
        )
        return MappedRow(
            identifier,
            row.id,
            updated_at,
            row.known_reason,
            row.email,
            draft,
            None,
            profile_id=row.profile_id or None,
            assigned_by=assigned.by,
        )

    return mapped


def _phone(row: IntakeRow) -> str | None:
    """Return the phone number, with the code of another country, which the form stores apart, in front."""
    phone, country = trimmed(row.phone), trimmed(row.country_code)
    if phone is None or country in (None, OWN_COUNTRY) or "+" in phone:
        return phone
    return f"{country} {phone}"


def signup_mapper(_source: Source, rules: Rules) -> Callable[[SignupRow], MappedRow]:
    """The mapping of users without a profile."""

    def mapped(row: SignupRow) -> MappedRow:
        email = normalised_email(row.email) if row.email is not None else None
        if email is None or row.email is None:
            return _rejected("users", row, Reason.INVALID_EMAIL)
        created_at, updated_at = row.created_at, row.updated_at
        if created_at is None or updated_at is None or _is_no_moment(created_at) or _is_no_moment(updated_at):
            return _rejected("users", row, *_fault({"createdAt": created_at, "updatedAt": updated_at}, {}))
        identifier = contact_id("users", row.id)
        # A user has one name: its first word is the first name.
        first_name, last_name, *_ = *(row.name or "").split(maxsplit=1), None, None
        draft = ContactDraft(
            identifier,
            row.id,
            None,
            CONTACT_TYPE_OF_LEAD_TYPE["CUSTOMER"],
            first_name or UNKNOWN_NAME,
            trimmed(last_name) or UNKNOWN_NAME,
            email,
            None,
            None,
            rules.stages["NEW"],
            created_at,
            SIGNUP_ORIGIN,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            FULL_CONFIDENCE,
            created_at,
            updated_at,
            None,
        )
        return MappedRow(identifier, row.id, updated_at, row.known_reason, row.email, draft, None)

    return mapped


def unmapped(table: str, source_id: str, known_reason: str | None, reason: Reason, refusal: Refusal) -> MappedRow:
    """Return a row of which only the id is known, with the reason."""
    return MappedRow(contact_id(table, source_id), source_id, None, known_reason, None, None, reason, None, refusal)


_MAPPERS: Mapping[str, Callable[[Source, Rules], Callable[[Any], MappedRow]]] = {
    "profiles": profile_mapper,
    "leads": lead_mapper,
    "tax_intake_leads": intake_mapper,
    "users": signup_mapper,
}


def map_rows(source: Source, rows: Iterable[RawRow], rules: Rules) -> list[MappedRow]:
    """Map rows of a source."""
    mapped = list(map(_MAPPERS[source.table](source, rules), rows))
    # The `updated_at` of the row itself is not rounded, because it shows whether the row changed.
    return [_as_stored(row, rules) for row in mapped] if rules.second_digits < MAX_SECOND_DIGITS else mapped


def _as_stored(row: MappedRow, rules: Rules) -> MappedRow:
    draft = row.draft
    if draft is None:
        return row
    longest = len("YYYY-MM-DD HH:MM:SS.") + rules.second_digits
    found: dict[str, Any] = {
        name: rules.as_stored(moment)
        for name in MOMENTS
        if (moment := getattr(draft, name)) is not None and len(moment) > longest
    }
    return row._replace(draft=draft._replace(**found)) if found else row

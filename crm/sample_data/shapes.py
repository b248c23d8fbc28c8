"""Differences between the generations of the application's tables that concern sample rows."""

from dataclasses import dataclass
from datetime import date
from typing import Final

#: In the order that foreign keys require.
TABLES: Final = (
    *("users", "profiles", "leads", "tax_intake_leads", "client_preparers"),
    *("crm_contacts", "crm_interactions", "crm_stage_history"),
)

_ATTRIBUTION: Final = (
    *("referrerUsername", "referrerType", "commissionRate", "commissionRateLockedAt"),
    *("attributionMethod", "attributionConfidence"),
)

FIRST_DAY: Final = date(2022, 11, 1)

_USERS: Final = ("id", "email", "hashedPassword", "emailVerified", "createdAt", "updatedAt")
_PROFILES: Final = (
    "id",
    "userId",
    "role",
    "firstName",
    "lastName",
    "phone",
    "companyName",
    "vanitySlug",
    "bio",
    "licenseNo",
    "trackingCode",
    "customTrackingCode",
    "trackingCodeChanged",
    "shortLinkUsername",
    "affiliateBondedToPreparerId",
    "ssn",
    "dateOfBirth",
    "address",
    "bankDetails",
    "createdAt",
    "updatedAt",
)
_LEADS: Final = (
    "id",
    "type",
    "status",
    "firstName",
    "lastName",
    "email",
    "phone",
    "taxSituation",
    "estimatedIncome",
    "ptin",
    "certification",
    "experience",
    "marketingExperience",
    "audience",
    "message",
    "source",
    "utmSource",
    "utmMedium",
    "utmCampaign",
    "ipAddress",
    "userAgent",
    *_ATTRIBUTION,
    "attributionCookieId",
    "assignedPreparerId",
    "contactRequested",
    "contactMethod",
    "lastContactedAt",
    "contactNotes",
    "createdAt",
    "updatedAt",
)
_INTAKES: Final = (
    "id",
    "first_name",
    "middle_name",
    "last_name",
    "email",
    "phone",
    "country_code",
    "address_line_1",
    "city",
    "state",
    "zip_code",
    "full_form_data",
    "completed",
    "referrerUsername",
    "referrerType",
    "attributionMethod",
    "assignedPreparerId",
    "contactRequested",
    "contactMethod",
    "lastContactedAt",
    "contactNotes",
    "created_at",
    "updated_at",
)
_CONVERSION: Final = ("profileId", "convertedToClient", "convertedAt")
_TAX_YEAR: Final = (*_CONVERSION, "tax_year")
_EXPIRY: Final = (*_TAX_YEAR, "unqualified", "unqualifiedReason", "unqualifiedAt", "unqualifiedNotes", "expiresAt")
_CLIENT_PREPARERS: Final = ("id", "clientId", "preparerId", "assignedAt", "isActive")
_CONTACTS: Final = (
    "id",
    "userId",
    "clerkUserId",
    "contactType",
    "firstName",
    "lastName",
    "email",
    "phone",
    "company",
    "filingStatus",
    "dependents",
    "previousYearAGI",
    "taxYear",
    "stage",
    "stageEnteredAt",
    "source",
    "assignedPreparerId",
    "assignedAt",
    *_ATTRIBUTION,
    "createdAt",
    "updatedAt",
    "lastContactedAt",
)
_INTERACTIONS: Final = (
    "id",
    "contactId",
    "userId",
    "type",
    "direction",
    "subject",
    "body",
    "duration",
    "emailId",
    "emailTo",
    "createdAt",
    "updatedAt",
    "occurredAt",
)
_STAGE_HISTORY: Final = ("id", "contactId", "fromStage", "toStage", "changedBy", "reason", "createdAt")

_LATER_PROFILES: Final = ("middleName", "professionalTitle", "website", "bookingEnabled")


@dataclass(frozen=True)
class Shape:
    """The properties of a generation that the generator needs. Omitted columns get their defaults."""

    last_day: date
    #: "upper", "lower", or "both" if the enum has both spellings.
    roles: str
    #: Profiles hold Clerk ids and may have no user.
    clerk: bool
    stages: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]
    #: Roles that the generation does not have.
    missing_roles: frozenset[str] = frozenset()


def _columns(
    *,
    users: tuple[str, ...] = (),
    profiles: tuple[str, ...] = (),
    contacts: tuple[str, ...] = (),
    intakes: tuple[str, ...] = (),
) -> dict[str, tuple[str, ...]]:
    return {
        "users": _USERS + users,
        "profiles": _PROFILES + profiles,
        "leads": _LEADS,
        "tax_intake_leads": _INTAKES + intakes,
        "client_preparers": _CLIENT_PREPARERS,
        "crm_contacts": _CONTACTS + contacts,
        "crm_interactions": _INTERACTIONS,
        "crm_stage_history": _STAGE_HISTORY,
    }


_OCTOBER_STAGES: Final = ("NEW", "CONTACTED", "DOCUMENTS", "PREPARING", "COMPLETE")
_LATER_STAGES: Final = ("NEW", "CONTACTED", "QUALIFIED", "DOCUMENTS", "FILED", "CLOSED", "LOST")
_CRM_SWITCHES: Final = (*_LATER_PROFILES, "crmActivityTracking", "crmLeadScoring")
_SCORES: Final = ("leadScore", "lastScoredAt")
_OCTOBER_COLUMNS: Final = _columns(profiles=("clerkUserId",))
_OCTOBER_21_COLUMNS: Final = _columns(profiles=("clerkUserId",), intakes=_CONVERSION)
_NOVEMBER_COLUMNS: Final = _columns(users=("name",), profiles=_LATER_PROFILES, contacts=_SCORES, intakes=_CONVERSION)


def _since_december(*, profiles: tuple[str, ...] = (), intakes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return _columns(users=("name",), profiles=(*_CRM_SWITCHES, *profiles), contacts=_SCORES, intakes=intakes)


SHAPES: Final = {
    "2025_10": Shape(date(2025, 10, 31), roles="upper", clerk=True, stages=_OCTOBER_STAGES, columns=_OCTOBER_COLUMNS),
    "2025_10_mixed": Shape(
        date(2025, 10, 31), roles="both", clerk=True, stages=_OCTOBER_STAGES, columns=_OCTOBER_COLUMNS
    ),
    "2025_10_21": Shape(
        date(2025, 10, 31), roles="upper", clerk=True, stages=_OCTOBER_STAGES, columns=_OCTOBER_21_COLUMNS
    ),
    "2025_11": Shape(date(2025, 11, 30), roles="lower", clerk=False, stages=_LATER_STAGES, columns=_NOVEMBER_COLUMNS),
    "2025_12": Shape(
        date(2025, 12, 31),
        roles="lower",
        clerk=False,
        stages=_LATER_STAGES,
        columns=_since_december(intakes=_CONVERSION),
    ),
    "2025_12_b": Shape(
        date(2025, 12, 31),
        roles="lower",
        clerk=False,
        stages=_LATER_STAGES,
        columns=_since_december(profiles=("affiliateStatus",), intakes=_TAX_YEAR),
        missing_roles=frozenset({"SUPER_ADMIN", "AFFILIATE"}),
    ),
    "2025_12_c": Shape(
        date(2025, 12, 31),
        roles="lower",
        clerk=False,
        stages=_LATER_STAGES,
        columns=_since_december(profiles=("affiliateStatus", "googleDriveFolderId"), intakes=_EXPIRY),
        missing_roles=frozenset({"SUPER_ADMIN", "AFFILIATE", "LEAD"}),
    ),
    "2026_01": Shape(
        date(2026, 1, 31),
        roles="lower",
        clerk=False,
        stages=_LATER_STAGES,
        columns=_since_december(
            profiles=("affiliateStatus", "googleDriveFolderId", "email", "supabaseUserId"), intakes=_EXPIRY
        ),
        missing_roles=frozenset({"SUPER_ADMIN", "LEAD"}),
    ),
}

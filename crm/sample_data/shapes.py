"""What differs between the generations of the application's tables, as far as sample rows are concerned."""

from dataclasses import dataclass
from datetime import date
from typing import Final

from crm.postgres.facts.columns import ATTRIBUTION_COLUMNS

#: In the order in which foreign keys let them be filled.
TABLES: Final = ("users", "profiles", "leads", "crm_contacts", "crm_interactions", "crm_stage_history")

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
    *ATTRIBUTION_COLUMNS,
    "attributionCookieId",
    "assignedPreparerId",
    "contactRequested",
    "contactMethod",
    "lastContactedAt",
    "contactNotes",
    "createdAt",
    "updatedAt",
)
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
    *ATTRIBUTION_COLUMNS,
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
    """What the generator has to know of a generation. Columns that are left out take their defaults."""

    last_day: date
    #: "upper", "lower", or "both" where the two spellings live side by side.
    roles: str
    #: Profiles hold Clerk ids and may have no user.
    clerk: bool
    stages: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]


def _columns(
    *, users: tuple[str, ...] = (), profiles: tuple[str, ...] = (), contacts: tuple[str, ...] = ()
) -> dict[str, tuple[str, ...]]:
    return {
        "users": _USERS + users,
        "profiles": _PROFILES + profiles,
        "leads": _LEADS,
        "crm_contacts": _CONTACTS + contacts,
        "crm_interactions": _INTERACTIONS,
        "crm_stage_history": _STAGE_HISTORY,
    }


_OCTOBER_STAGES: Final = ("NEW", "CONTACTED", "DOCUMENTS", "PREPARING", "COMPLETE")
_LATER_STAGES: Final = ("NEW", "CONTACTED", "QUALIFIED", "DOCUMENTS", "FILED", "CLOSED", "LOST")
_OCTOBER_COLUMNS: Final = _columns(profiles=("clerkUserId",))
_NOVEMBER_COLUMNS: Final = _columns(users=("name",), profiles=_LATER_PROFILES, contacts=("leadScore", "lastScoredAt"))
_DECEMBER_COLUMNS: Final = _columns(
    users=("name",),
    profiles=(*_LATER_PROFILES, "crmActivityTracking", "crmLeadScoring"),
    contacts=("leadScore", "lastScoredAt"),
)

SHAPES: Final = {
    "2025_10": Shape(date(2025, 10, 31), roles="upper", clerk=True, stages=_OCTOBER_STAGES, columns=_OCTOBER_COLUMNS),
    "2025_10_mixed": Shape(
        date(2025, 10, 31), roles="both", clerk=True, stages=_OCTOBER_STAGES, columns=_OCTOBER_COLUMNS
    ),
    "2025_11": Shape(date(2025, 11, 30), roles="lower", clerk=False, stages=_LATER_STAGES, columns=_NOVEMBER_COLUMNS),
    "2025_12": Shape(date(2025, 12, 31), roles="lower", clerk=False, stages=_LATER_STAGES, columns=_DECEMBER_COLUMNS),
}

"""The rules of the mapping as examples that a reader can check by eye, one table for both who must keep to them.

The project's mapping is held to it in tests/unit/test_mapping.py, the reference in tests/property/test_reference.py. So
they cannot come to differ in what is written here. Rows and contacts have the names that the database gives columns;
a profile comes with the email of its user, its own stands beside it, and with the preparer of its active row in
client_preparers.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

Row = dict[str, Any]

OLD_STAGES = ("NEW", "CONTACTED", "DOCUMENTS", "PREPARING", "COMPLETE")
NEW_STAGES = ("NEW", "CONTACTED", "QUALIFIED", "DOCUMENTS", "FILED", "CLOSED", "LOST")
CREATED, UPDATED, CALLED, LOCKED = (datetime(2025, 1, day, 0, 0, 0, 123000, tzinfo=UTC) for day in range(1, 5))
PLACEHOLDER_DOMAIN = "nobody.invalid"
#: What nothing is written in.
BLANKS = ("", " ", " \t\n", "\N{NO-BREAK SPACE}")

PROFILE: Row = {
    "id": "profile1",
    "createdAt": CREATED,
    "updatedAt": UPDATED,
    "role": "CLIENT",
    "firstName": "Ann",
    "lastName": "Lee",
    "phone": "555 0100",
    "companyName": "Lee & Co",
    "userId": "user1",
    "clerkUserId": "user_clerk1",
    "email": "ann@example.com",
    "ownEmail": None,
    "preparerId": None,
    "assignedAt": None,
}
LEAD: Row = {
    "id": "lead1",
    "createdAt": CREATED,
    "updatedAt": UPDATED,
    "status": "NEW",
    "type": "CUSTOMER",
    "email": "ann@example.com",
    "firstName": "Ann",
    "lastName": "Lee",
    "phone": "555 0100",
    "source": "landing",
    "lastContactedAt": None,
    "referrerUsername": "ref",
    "referrerType": "AFFILIATE",
    "commissionRate": Decimal("12.50"),
    "commissionRateLockedAt": LOCKED,
    "attributionMethod": "cookie",
    "attributionConfidence": 85,
    "assignedPreparerId": None,
}
INTAKE: Row = {
    "id": "intake1",
    "created_at": CREATED,
    "updated_at": UPDATED,
    "email": "ann@example.com",
    "first_name": "Ann",
    "last_name": "Lee",
    "phone": "555 0100",
    "country_code": "+1",
    "lastContactedAt": None,
    "convertedToClient": False,
    "convertedAt": None,
    "unqualified": False,
    "unqualifiedAt": None,
    "referrerUsername": "ref",
    "referrerType": "AFFILIATE",
    "attributionMethod": "cookie",
    "profileId": None,
    "assignedPreparerId": None,
}
#: A user without a profile.
SIGNUP: Row = {
    "id": "user1",
    "createdAt": CREATED,
    "updatedAt": UPDATED,
    "email": "ann@example.com",
    "name": "Ann Lee",
}
#: The one tax preparer there is: how rows refer to them, and the id of their profile.
PREPARER = "profile9"
PREPARERS_BY_ID = {"profile9": PREPARER, "user9": PREPARER}
PREPARERS_BY_CODE = {"Prep-9": PREPARER}


class Example(NamedTuple):
    """A row, and what becomes of it: columns of its contact, or the reason why it makes none."""

    row: Row
    source: str
    expected: Row | str
    stages: tuple[str, ...] = OLD_STAGES

    def __str__(self) -> str:
        plain = next(plain for plain in (PROFILE, LEAD, INTAKE, SIGNUP) if plain.keys() == self.row.keys())
        differing = ", ".join(f"{name}={value!r}" for name, value in self.row.items() if value != plain[name])
        return f"{self.source}: {differing or 'plain'}" + (", new stages" if self.stages == NEW_STAGES else "")


def profile(expected: Row | str, source: str = "clients", **columns: Any) -> Example:
    return Example(PROFILE | columns, source, expected)


def lead(expected: Row | str, stages: tuple[str, ...] = OLD_STAGES, **columns: Any) -> Example:
    row = LEAD | columns
    return Example(row, "converted_leads" if row["status"] == "CONVERTED" else "active_leads", expected, stages)


def intake(expected: Row | str, stages: tuple[str, ...] = NEW_STAGES, **columns: Any) -> Example:
    row = INTAKE | columns
    return Example(row, "converted_intakes" if row["convertedToClient"] else "open_intakes", expected, stages)


def signup(expected: Row | str, **columns: Any) -> Example:
    return Example(SIGNUP | columns, "signups", expected)


ASSIGNED: Row = {"assignedPreparerId": PREPARER, "assignedAt": UPDATED}
UNASSIGNED: Row = dict.fromkeys(ASSIGNED)

EXAMPLES: tuple[Example, ...] = (
    # A profile brings what it has and nothing else.
    profile(
        {
            "id": "c5553e87145513b2e3947d1c8",
            "userId": "user1",
            "clerkUserId": "user_clerk1",
            "contactType": "CLIENT",
            "firstName": "Ann",
            "lastName": "Lee",
            "email": "ann@example.com",
            "phone": "555 0100",
            "company": "Lee & Co",
            "stage": "NEW",
            "stageEnteredAt": CREATED,
            "source": "backfill",
            "assignedPreparerId": None,
            "assignedAt": None,
            "referrerUsername": None,
            "referrerType": None,
            "commissionRate": None,
            "commissionRateLockedAt": None,
            "attributionMethod": None,
            "attributionConfidence": 100,
            "createdAt": CREATED,
            "updatedAt": UPDATED,
            "lastContactedAt": None,
        }
    ),
    # Its role gives the type, whatever its spelling; a role that is not the source's is never a client.
    profile({"contactType": "PREPARER"}, "preparers", role="TAX_PREPARER"),
    profile({"contactType": "AFFILIATE"}, "affiliates", role="AFFILIATE"),
    profile({"contactType": "CLIENT"}, role="client"),
    profile({"contactType": "AFFILIATE"}, "affiliates", role="affiliate"),
    profile({"contactType": "PREPARER"}, "preparers", role="tax_preparer"),
    profile({"contactType": "PREPARER"}, "preparers", role="Tax-Preparer"),
    profile({"contactType": "PREPARER"}, "preparers", role="tax preparer"),
    profile("unknown_role", role="PARTNER"),
    profile("unknown_role", role=""),
    profile("unknown_role", role="PARTNER", email="nope"),
    # Without an email it gets a placeholder; one that is none is an error.
    *(profile({"email": "client-profile1@nobody.invalid"}, email=blank) for blank in (None, *BLANKS)),
    *(
        profile({"email": f"{kind}-profile1@nobody.invalid"}, source, role=role, email=blank)
        for role, source, kind in (
            ("TAX_PREPARER", "preparers", "preparer"),
            ("AFFILIATE", "affiliates", "affiliate"),
        )
        for blank in (None, "", " \t")
    ),
    # Its own email counts only where its user has none.
    *(profile({"email": "own@example.com"}, email=blank, ownEmail=" Own@example.com\t") for blank in (None, *BLANKS)),
    *(profile({"email": "client-profile1@nobody.invalid"}, email=None, ownEmail=blank) for blank in BLANKS),
    profile({"email": "ann@example.com"}, ownEmail="own@example.com"),
    profile("invalid_email", email="", ownEmail="not-an-email"),
    profile("invalid_email", email="not-an-email", ownEmail="own@example.com"),
    # Ids that differ in case are two people, and addresses are compared without it.
    profile({"email": "client-profile1-874c5f4f1dbc@nobody.invalid"}, id="Profile1", email=None),
    profile({"email": "client-profile1-712abfa66e47@nobody.invalid"}, id="PROFILE1", email=None),
    profile("invalid_email", email="not-an-email"),
    # Texts are trimmed; a blank name is unknown, and other blanks are nothing.
    profile(
        {"firstName": "José", "lastName": "de  la Cruz", "phone": "1", "company": "A B"},
        firstName=" José\t",
        lastName="\nde  la Cruz ",
        phone=" 1 ",
        companyName=" A B ",
    ),
    *(
        profile(
            {"firstName": "Unknown", "lastName": "Unknown", "phone": None, "company": None},
            **dict.fromkeys(("firstName", "lastName", "phone", "companyName"), blank),
        )
        for blank in (None, *BLANKS)
    ),
    profile({"clerkUserId": None}, clerkUserId=None),
    # A lead brings its attribution as it is, and its dates; it has no account and no company.
    lead(
        {
            "id": "c87d86343e222704d593c1884",
            "userId": None,
            "clerkUserId": None,
            "contactType": "LEAD",
            "firstName": "Ann",
            "lastName": "Lee",
            "email": "ann@example.com",
            "phone": "1",
            "company": None,
            "stage": "NEW",
            "stageEnteredAt": CREATED,
            "source": "web",
            "assignedPreparerId": "profile9",
            "assignedAt": UPDATED,
            "referrerUsername": " Ref ",
            "referrerType": "AFFILIATE",
            "commissionRate": Decimal("100.10"),
            "commissionRateLockedAt": LOCKED,
            "attributionMethod": "",
            "attributionConfidence": 85,
            "createdAt": CREATED,
            "updatedAt": UPDATED,
            "lastContactedAt": CALLED,
        },
        phone=" 1 ",
        source=" web ",
        assignedPreparerId="profile9",
        lastContactedAt=CALLED,
        referrerUsername=" Ref ",
        commissionRate=Decimal("100.10"),
        attributionMethod="",
    ),
    *(lead({"firstName": "Unknown", "lastName": "Unknown"}, firstName=blank, lastName=blank) for blank in BLANKS),
    # Its status gives the nearest stage that the database has.
    lead({"stage": "CONTACTED"}, status="CONTACTED"),
    lead({"stage": "CONTACTED"}, status="QUALIFIED"),
    lead({"stage": "COMPLETE"}, status="CONVERTED"),
    lead({"stage": "NEW"}, NEW_STAGES),
    lead({"stage": "CONTACTED"}, NEW_STAGES, status="CONTACTED"),
    lead({"stage": "QUALIFIED"}, NEW_STAGES, status="QUALIFIED"),
    lead({"stage": "QUALIFIED"}, NEW_STAGES, status="qualified"),
    lead({"stage": "CLOSED"}, NEW_STAGES, status="CONVERTED"),
    lead({"stage": "LOST"}, NEW_STAGES, status="DISQUALIFIED"),
    lead({"stage": "COMPLETE"}, (*NEW_STAGES, "COMPLETE"), status="CONVERTED"),
    # It was entered at the closest recorded moment.
    lead({"stageEnteredAt": CREATED}, lastContactedAt=CALLED),
    lead({"stageEnteredAt": CALLED}, status="CONTACTED", lastContactedAt=CALLED),
    lead({"stageEnteredAt": UPDATED}, status="CONTACTED"),
    lead({"stageEnteredAt": CALLED}, status="QUALIFIED", lastContactedAt=CALLED),
    lead({"stageEnteredAt": UPDATED}, NEW_STAGES, status="QUALIFIED", lastContactedAt=CALLED),
    lead({"stageEnteredAt": UPDATED}, status="CONVERTED", lastContactedAt=CALLED),
    lead({"stageEnteredAt": UPDATED}, NEW_STAGES, status="DISQUALIFIED", lastContactedAt=CALLED),
    # Of an active lead the type gives the contact's; a converted one is a client.
    lead({"contactType": "PREPARER"}, type="TAX_PREPARER"),
    lead({"contactType": "PREPARER"}, type="tax-preparer"),
    lead({"contactType": "AFFILIATE"}, type="AFFILIATE"),
    *(
        lead({"contactType": "CLIENT"}, status="CONVERTED", type=lead_type)
        for lead_type in ("CUSTOMER", "TAX_PREPARER", "AFFILIATE", "FRANCHISE")
    ),
    # What is wrong with it is told in this order.
    lead("unknown_status", status="ARCHIVED"),
    lead("unknown_status", status="ARCHIVED", type="FRANCHISE", email="nope"),
    lead("unknown_type", type="FRANCHISE"),
    lead("unknown_type", type="FRANCHISE", email="nope"),
    *(lead("invalid_email", email=email) for email in ("nope", *BLANKS)),
    # Where it came from, and who has it in hand.
    *(lead({"source": "lead_form"}, source=blank) for blank in (None, *BLANKS)),
    lead({"source": "a b"}, source=" a b "),
    # An intake brings who referred a person and how, but no rate.
    intake(
        {
            "id": "c55e2e92b576e65a8bf1969df",
            "userId": None,
            "clerkUserId": None,
            "contactType": "LEAD",
            "firstName": "Ann",
            "lastName": "Lee",
            "email": "ann@example.com",
            "phone": "+52 55 5550 0100",
            "company": None,
            "stage": "CONTACTED",
            "stageEnteredAt": CALLED,
            "source": "tax_intake_form",
            "assignedPreparerId": "profile9",
            "assignedAt": UPDATED,
            "referrerUsername": " Ref ",
            "referrerType": "AFFILIATE",
            "commissionRate": None,
            "commissionRateLockedAt": None,
            "attributionMethod": "email_match",
            "attributionConfidence": 90,
            "createdAt": CREATED,
            "updatedAt": UPDATED,
            "lastContactedAt": CALLED,
        },
        phone=" 55 5550 0100 ",
        country_code="+52",
        assignedPreparerId="profile9",
        lastContactedAt=CALLED,
        referrerUsername=" Ref ",
        attributionMethod="email_match",
    ),
    *(intake({"firstName": "Unknown", "lastName": "Unknown"}, first_name=blank, last_name=blank) for blank in BLANKS),
    *(intake("invalid_email", email=email) for email in ("nope", *BLANKS)),
    # What happened to it gives its stage, and the moment when it was entered.
    intake({"contactType": "LEAD", "stage": "NEW", "stageEnteredAt": CREATED}),
    intake({"stage": "CONTACTED", "stageEnteredAt": CALLED}, lastContactedAt=CALLED),
    intake(
        {"contactType": "CLIENT", "stage": "CLOSED", "stageEnteredAt": LOCKED},
        convertedToClient=True,
        convertedAt=LOCKED,
    ),
    intake({"stage": "CLOSED", "stageEnteredAt": UPDATED}, convertedToClient=True, lastContactedAt=CALLED),
    intake({"contactType": "CLIENT", "stage": "COMPLETE"}, OLD_STAGES, convertedToClient=True),
    intake({"contactType": "LEAD", "stage": "LOST", "stageEnteredAt": LOCKED}, unqualified=True, unqualifiedAt=LOCKED),
    intake({"stage": "LOST", "stageEnteredAt": UPDATED}, unqualified=True, lastContactedAt=CALLED),
    intake(
        {"contactType": "CLIENT", "stage": "LOST", "stageEnteredAt": UPDATED},
        unqualified=True,
        convertedToClient=True,
        convertedAt=LOCKED,
    ),
    intake({"stage": "NEW", "stageEnteredAt": CREATED}, convertedAt=LOCKED, unqualifiedAt=LOCKED),
    intake({"contactType": "LEAD", "stage": "NEW"}, convertedToClient=None, unqualified=None),
    # Only the code of another country stands before the number.
    *(intake({"phone": "555 0100"}, phone=" 555 0100", country_code=code) for code in ("+1", " +1 ", None, "", " ")),
    intake({"phone": "+44 20"}, phone="+44 20", country_code="+52"),
    intake({"phone": "0044+20"}, phone="0044+20", country_code="+52"),
    *(intake({"phone": None}, phone=blank, country_code="+52") for blank in BLANKS),
    # The method tells the confidence; without a referrer there is no attribution.
    *(
        intake({"attributionMethod": method, "attributionConfidence": confidence}, attributionMethod=method)
        for method, confidence in (("email_match", 90), ("phone_match", 85), ("cookie", 100), ("", 100), (None, 100))
    ),
    *(
        intake(
            {
                **dict.fromkeys(("referrerUsername", "referrerType", "attributionMethod"), None),
                "attributionConfidence": 100,
            },
            referrerUsername=blank,
            attributionMethod="email_match",
        )
        for blank in (None, *BLANKS)
    ),
    # Who signed up and waits for approval is a lead: as a profile, or as a user without one.
    profile(
        {
            "id": "c5553e87145513b2e3947d1c8",
            "userId": "user1",
            "contactType": "LEAD",
            "stage": "NEW",
            "stageEnteredAt": CREATED,
            "source": "signup",
            "company": "Lee & Co",
            "updatedAt": UPDATED,
        },
        "lead_profiles",
        role="LEAD",
    ),
    profile({"contactType": "LEAD", "source": "signup"}, "lead_profiles", role="lead"),
    profile({"email": "lead-profile1@nobody.invalid"}, "lead_profiles", role="LEAD", email=""),
    signup(
        {
            "id": "cf5fb588823516dc8a96d68bb",
            "userId": "user1",
            "clerkUserId": None,
            "contactType": "LEAD",
            "firstName": "Ann",
            "lastName": "Lee",
            "email": "ann@example.com",
            "phone": None,
            "company": None,
            "stage": "NEW",
            "stageEnteredAt": CREATED,
            "source": "signup",
            "assignedPreparerId": None,
            "assignedAt": None,
            "referrerUsername": None,
            "referrerType": None,
            "commissionRate": None,
            "commissionRateLockedAt": None,
            "attributionMethod": None,
            "attributionConfidence": 100,
            "createdAt": CREATED,
            "updatedAt": UPDATED,
            "lastContactedAt": None,
        },
        email=" Ann@example.com",
    ),
    # The first word of a user's name is the first name.
    signup({"firstName": "Ann", "lastName": "de  la Cruz"}, name=" Ann\tde  la Cruz\n"),
    signup({"firstName": "Ann", "lastName": "Unknown"}, name="Ann"),
    *(signup({"firstName": "Unknown", "lastName": "Unknown"}, name=blank) for blank in (None, *BLANKS)),
    # Without an address there is nothing by which anybody could know them.
    *(signup("invalid_email", email=email) for email in ("nope", *BLANKS)),
    # Of a lead and of an intake: a user's id is resolved to the profile's. A preparer without a profile is not copied,
    # and no referrer is instead.
    *(
        example
        for make in (lead, intake)
        for example in (
            *(make(UNASSIGNED, assignedPreparerId=blank) for blank in (None, *BLANKS)),
            *(make(ASSIGNED, assignedPreparerId=named) for named in PREPARERS_BY_ID),
            make(UNASSIGNED, assignedPreparerId="gone"),
            make(UNASSIGNED, assignedPreparerId="gone", referrerUsername="Prep-9"),
            # Without a preparer it gets the tax preparer who referred the person, without case.
            *(
                make(ASSIGNED, assignedPreparerId=blank, referrerUsername=spelling)
                for blank in (None, *BLANKS)
                for spelling in ("Prep-9", " pREP-9\t")
            ),
            make(UNASSIGNED, referrerUsername="Prep-8"),
        )
    ),
    # A client has the preparer of client_preparers, since then; other profiles have none.
    *(profile(ASSIGNED | {"assignedAt": CALLED}, preparerId=named, assignedAt=CALLED) for named in PREPARERS_BY_ID),
    profile(UNASSIGNED, preparerId="gone", assignedAt=CALLED),
    profile(UNASSIGNED, "affiliates", role="AFFILIATE", preparerId=PREPARER, assignedAt=CALLED),
)

#: What stands in a column, and the address that it is, if it is one.
EMAILS: tuple[tuple[str, str | None], ...] = (
    ("ann@example.com", "ann@example.com"),
    (" Ann@Example.COM\n", "ann@example.com"),
    ("\N{NO-BREAK SPACE}ann@example.com\t", "ann@example.com"),
    ("bob.o'neil+tax@example.org", "bob.o'neil+tax@example.org"),
    ("max@BÜRO.example", "max@büro.example"),
    ("root@localhost", "root@localhost"),
    ("jösé@example.com", None),
    ("\N{KELVIN SIGN}arl@example.com", None),
    ("\N{LATIN SMALL LETTER LONG S}am@example.com", None),
    ("ann@@example.com", None),
    ("a..b@example.com", None),
    (".ab@example.com", None),
    ("ab.@example.com", None),
    ("ab@example..com", None),
    ("ab@-example.com", None),
    ("ab@example-.com", None),
    ("ab@example.c", None),
    ("ab@example.com.", None),
    ("ab@ex_ample.com", None),
    ("ab@" + "e" * 63 + ".com", "ab@" + "e" * 63 + ".com"),
    ("ab@" + "e" * 64 + ".com", None),
    ("a" * 300 + "@example.com", "a" * 300 + "@example.com"),
    ("a" * 309 + "@example.com", None),
    ("ann", None),
    ("@example.com", None),
    ("ann@", None),
    ("a b@example.com", None),
    ("ann@example.com, bob@example.com", None),
    ("", None),
    (" ", None),
)

#: The spellings of one label.
SUPER_ADMIN = ("SUPER_ADMIN", "super_admin", "Super-Admin", "super admin", "sUPER aDMIN")

#: The id of the contact that a row of a table makes, for ever.
CONTACT_IDS = {
    ("leads", "1"): "c591960b957b66547385f92a3",
    ("leads", "l1"): "c55ba79a2e7b33c1bf1a4ec4b",
    ("profiles", "1"): "c2d0ef52da9e25776f534157a",
    ("tax_intake_leads", "1"): "cf311252366a81535807f3942",
    ("users", "1"): "c646351ee1ddd222ff27d1881",
}

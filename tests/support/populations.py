"""Populations for the judge: hypothesis strategies, and the way into the database and back.

Pools are small, so that people meet: a handful of addresses in many spellings, a handful of accounts, moments that tie.
Ids are one letter and digits of one length (or hexadecimal), which every collation puts in the same order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Protocol

from hypothesis import strategies as st

from tests.support.reference import (
    ATTRIBUTION,
    CONTACT_COLUMNS,
    PLACEHOLDER_DOMAIN,
    PROFILE_SOURCES,
    Entry,
    Population,
    Result,
    Row,
    address_of,
    contact_id_of,
)

GENERATIONS = ("2025_10", "2025_10_mixed", "2025_11", "2025_12", "2026_01")
LEDGER_TABLE = '"crm_backfill"."ledger_entry"'

_UPPER_ROLES = ("SUPER_ADMIN", "ADMIN", "LEAD", "CLIENT", "TAX_PREPARER", "AFFILIATE")
_LOWER_ROLES = tuple(role.lower() for role in _UPPER_ROLES)
ROLES = {
    "2025_10": _UPPER_ROLES,
    "2025_10_mixed": _UPPER_ROLES + _LOWER_ROLES,
    "2025_11": _LOWER_ROLES,
    "2025_12": _LOWER_ROLES,
    "2026_01": tuple(role for role in _LOWER_ROLES if role not in ("super_admin", "lead")),
}
_OLD_STAGES = ("NEW", "CONTACTED", "DOCUMENTS", "PREPARING", "COMPLETE")
_NEW_STAGES = ("NEW", "CONTACTED", "QUALIFIED", "DOCUMENTS", "FILED", "CLOSED", "LOST")
STAGE_LABELS = {
    **dict.fromkeys(("2025_10", "2025_10_mixed"), _OLD_STAGES),
    **dict.fromkeys(("2025_11", "2025_12", "2026_01"), _NEW_STAGES),
}
HAS_CLERK_USER_ID = ("2025_10", "2025_10_mixed")
HAS_EMAIL_OF_PROFILE = ("2026_01",)
HAS_NAME_OF_USER = ("2025_11", "2025_12", "2026_01")
#: Intakes know of profiles and clients; one each tax year, and some are given up.
HAS_CONVERSIONS = ("2025_11", "2025_12", "2026_01")
HAS_TAX_YEARS = ("2026_01",)

# Labels that somebody added to a database by hand: some that nobody knows, some that are another spelling.
ADDED_LABELS: Mapping[str, tuple[str, ...]] = {
    "UserRole": ("PARTNER", "Tax-Preparer", "super admin"),
    "LeadStatus": ("ARCHIVED", "converted"),
    "LeadType": ("FRANCHISE", "tax-preparer"),
}

ADDRESSES = (
    "ann@example.com",
    "bob.o'neil+tax@example.org",
    "x_y@sub.example.co.uk",
    "max@büro.example",
    "root@localhost",
)
SPELLINGS: tuple[Callable[[str], str], ...] = (str, str.upper, str.title, str.swapcase, "  {} ".format)
ODD_SPELLINGS: tuple[Callable[[str], str], ...] = (
    "\t{}\n".format,
    "\N{NO-BREAK SPACE}{}".format,
    "{}\N{ZERO WIDTH SPACE}".format,
    "\N{ZERO WIDTH NO-BREAK SPACE}{}\N{INFORMATION SEPARATOR ONE}".format,
)
BLANKS = ("", " ", "\t \n", "\N{NO-BREAK SPACE}")
NOT_ADDRESSES = (
    "not-an-email",
    "jösé@example.com",
    "\N{LATIN SMALL LETTER LONG S}am@example.com",
    "two@@example.com",
    "a b@example.com",
    "ann@example.com,bob@example.com",
    "@example.com",
    "ann@",
    "ann@-bad-.example",
    "ann@exam\N{WORD JOINER}ple.com",
    "NULL",
    f"{'a' * 320}@example.com",
)
CLERK_IDS = tuple(f"user_{letter * 27}" for letter in "2aZk")
#: Codes that people are referred by. Each column keeps them unique in one spelling alone.
CODES = ("ref", "REF", " ref", "tgp-1", "TGP-1", "rené", "RENÉ", "", "other")
CODE_COLUMNS = ("trackingCode", "customTrackingCode", "shortLinkUsername")
UNKNOWN_ID = "c" + "9" * 24
_EPOCH = datetime(2024, 2, 29, 23, 59, 59, 999000, tzinfo=UTC)
MOMENTS = tuple(_EPOCH + timedelta(milliseconds=step) for step in (0, 1, 86_400_000))
TEXTS = (
    *(
        "Ann",
        "  José ",
        "O'Brien",
        "Zoë\n",
        "李小龙",
        "👩\N{ZERO WIDTH JOINER}💻",
        "ǅ",
        "a\tb",
        "line\r\nline",
        "  a  b  ",
    ),
    *(
        "NULL",
        "null",
        "\\N",
        "\\",
        "\\.",
        '"quoted"',
        '{"a": [1]}',
        "{",
        "}",
        "%s",
        "%(id)s",
        ";--",
        "$$",
        "Unknown",
        "0",
    ),
)

_free_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
texts = st.one_of(st.sampled_from(TEXTS), st.sampled_from(BLANKS), _free_texts)
nullable_texts = st.none() | texts
#: A user has one name for all of them.
names = st.one_of(nullable_texts, st.lists(texts, min_size=2, max_size=3).map(" ".join))
moments = st.one_of(
    st.sampled_from(MOMENTS),
    st.sampled_from(MOMENTS),
    st.integers(-(10**12), 4 * 10**12).map(lambda step: _EPOCH + timedelta(milliseconds=step)),
)
nullable_moments = st.none() | moments
rates = st.one_of(
    st.none(),
    st.sampled_from([Decimal("0.00"), Decimal("0.01"), Decimal("12.50"), Decimal("999.99")]),
    st.decimals(Decimal("0.00"), Decimal("999.99"), places=2),
)


def _spelled(spellings: Sequence[Callable[[str], str]]) -> st.SearchStrategy[str]:
    return st.builds(_respelled, st.sampled_from(ADDRESSES), st.sampled_from(spellings))


def _respelled(address: str, spelling: Callable[[str], str]) -> str:
    return spelling(address)


source_emails = st.one_of(
    _spelled(SPELLINGS), _spelled(SPELLINGS), _spelled(ODD_SPELLINGS), st.sampled_from((*BLANKS, *NOT_ADDRESSES))
)
_attribution = {
    "referrerUsername": st.none() | st.sampled_from(["ref", " Ref ", "", "rené", "tgp-1", "TGP-1\t"]),
    "referrerType": st.none() | st.sampled_from(["AFFILIATE", "tax_preparer", ""]),
    "commissionRate": rates,
    "commissionRateLockedAt": nullable_moments,
    "attributionMethod": st.none() | st.sampled_from(["cookie", "email_match", ""]),
    "attributionConfidence": st.sampled_from([100, 100, 0, 85]),
}


@st.composite
def attributions(draw: st.DrawFn) -> Row:
    """The six attribution fields; often nothing at all but the confidence."""
    if draw(st.booleans()):
        return {column: draw(strategy) for column, strategy in _attribution.items()}
    return {**dict.fromkeys(ATTRIBUTION), "attributionConfidence": draw(_attribution["attributionConfidence"])}


def _ids(draw: st.DrawFn, table: int, count: int) -> list[str]:
    """Ids in any order, so that neither insertion nor creation gives the order away."""
    numbers = draw(st.permutations(range(count)))
    return [f"c{table:012d}{number:012d}" for number in numbers]


def _labels(kind: str, known: Sequence[str], *, added: bool) -> st.SearchStrategy[str]:
    return st.sampled_from((*known, *(ADDED_LABELS[kind] if added else ())))


def _distinct(draw: st.DrawFn, pool: Iterable[str], count: int) -> list[str | None]:
    """For each of `count` rows a value of the pool that no other row has, or NULL."""
    left = list(pool)
    values: list[str | None] = []
    for _ in range(count):
        value = draw(st.sampled_from(left)) if left and draw(st.integers(0, 3)) > 0 else None
        if value is not None:
            left.remove(value)
        values.append(value)
    return values


@st.composite
def user_lists(draw: st.DrawFn, generation: str, *, taken: Collection[str] = (), table: int = 1) -> list[Row]:
    """Users with distinct stored emails, of which some differ by case or white space alone."""
    emails = draw(
        st.lists(
            source_emails.filter(lambda email: email not in taken),
            min_size=draw(st.integers(0, 5)),
            max_size=6,
            unique=True,
        )
    )
    return [
        {
            "id": identifier,
            "email": email,
            "createdAt": draw(moments),
            "updatedAt": draw(moments),
            **({"name": draw(names)} if generation in HAS_NAME_OF_USER else {}),
        }
        for identifier, email in zip(_ids(draw, table, len(emails)), emails, strict=True)
    ]


@st.composite
def profile_lists(
    draw: st.DrawFn,
    generation: str,
    users: Sequence[Row],
    *,
    added: bool,
    clerk_ids: Collection[str] = CLERK_IDS,
    taken_codes: Collection[str | None] = (),
    table: int = 2,
) -> list[Row]:
    """Profiles: at most one a user, without a user only where the column allows it."""
    account_ids = [user["id"] for user in users]
    with_clerk = generation in HAS_CLERK_USER_ID
    if with_clerk:
        user_ids = _distinct(draw, account_ids, draw(st.integers(0, 6)))
    else:
        with_profile = draw(st.integers(0, len(account_ids)))
        user_ids = draw(st.permutations(account_ids))[:with_profile]
    roles = st.one_of(
        _labels("UserRole", ROLES[generation], added=added),
        st.sampled_from([role for role in ROLES[generation] if role.upper() in PROFILE_SOURCES]),
    )
    profiles = [
        {
            "id": identifier,
            "userId": user_id,
            "role": draw(roles),
            "firstName": draw(nullable_texts),
            "lastName": draw(nullable_texts),
            "phone": draw(nullable_texts),
            "companyName": draw(nullable_texts),
            "createdAt": draw(moments),
            "updatedAt": draw(moments),
        }
        for identifier, user_id in zip(_ids(draw, table, len(user_ids)), user_ids, strict=True)
    ]
    if with_clerk:
        for profile, clerk_id in zip(profiles, _distinct(draw, clerk_ids, len(profiles)), strict=True):
            profile["clerkUserId"] = clerk_id
    if generation in HAS_EMAIL_OF_PROFILE:
        for profile in profiles:
            profile["email"] = draw(st.none() | source_emails)
    for column in CODE_COLUMNS:
        free = [code for code in CODES if code not in taken_codes]
        for profile, code in zip(profiles, _distinct(draw, free, len(profiles)), strict=True):
            profile[column] = code
    return profiles


@st.composite
def client_preparer_lists(draw: st.DrawFn, profiles: Sequence[Row]) -> list[Row]:
    """Who is whose preparer: any profile of any other, several of one, active or not."""
    ids = [row["id"] for row in profiles]
    pairs = (
        draw(st.lists(st.tuples(st.sampled_from(ids), st.sampled_from(ids)), max_size=8, unique=True)) if ids else []
    )
    return [
        {
            "id": identifier,
            "clientId": client,
            "preparerId": preparer,
            "assignedAt": draw(st.sampled_from(MOMENTS) | moments),
            "isActive": draw(st.sampled_from([True, True, False])),
        }
        for identifier, (client, preparer) in zip(_ids(draw, 8, len(pairs)), pairs, strict=True)
    ]


@st.composite
def lead_lists(
    draw: st.DrawFn, users: Sequence[Row], profiles: Sequence[Row], *, added: bool, table: int = 3
) -> list[Row]:
    """Leads; many of one person, many of a profile's person."""
    preparer_ids = [UNKNOWN_ID, *BLANKS, *(row["id"] for row in (*profiles, *users))]
    statuses = st.one_of(
        _labels("LeadStatus", ("NEW", "CONTACTED", "QUALIFIED", "CONVERTED", "DISQUALIFIED"), added=added),
        st.just("CONVERTED"),
    )
    return [
        {
            "id": identifier,
            "type": draw(_labels("LeadType", ("CUSTOMER", "TAX_PREPARER", "AFFILIATE"), added=added)),
            "status": draw(statuses),
            "firstName": draw(texts),
            "lastName": draw(texts),
            "email": draw(source_emails),
            "phone": draw(texts),
            "source": draw(nullable_texts),
            **draw(attributions()),
            "assignedPreparerId": draw(st.none() | st.sampled_from(preparer_ids)),
            "lastContactedAt": draw(nullable_moments),
            "createdAt": draw(moments),
            "updatedAt": draw(moments),
        }
        for identifier in _ids(draw, table, draw(st.integers(0, 8)))
    ]


@st.composite
def intake_lists(
    draw: st.DrawFn,
    generation: str,
    users: Sequence[Row],
    profiles: Sequence[Row],
    *,
    taken: Collection[tuple[str, int]] = (),
    table: int = 8,
) -> list[Row]:
    """Intakes: one for each address as it is stored, and where there are tax years, one for each of them."""
    years = (2023, 2024) if generation in HAS_TAX_YEARS else (2024,)
    keys = draw(
        st.lists(
            st.tuples(source_emails, st.sampled_from(years)).filter(lambda key: key not in taken),
            max_size=6,
            unique=True,
        )
    )
    preparer_ids = [UNKNOWN_ID, *BLANKS, *(row["id"] for row in (*profiles, *users))]
    intakes = []
    for identifier, (email, year) in zip(_ids(draw, table, len(keys)), keys, strict=True):
        intake = {
            "id": identifier,
            "first_name": draw(texts),
            "last_name": draw(texts),
            "email": email,
            "phone": draw(texts | st.sampled_from(["555 0100", "+44 20"])),
            "country_code": draw(st.sampled_from(["+1", "+1", "+52", " +44 ", ""])),
            **{name: draw(_attribution[name]) for name in ("referrerUsername", "referrerType")},
            "attributionMethod": draw(st.none() | st.sampled_from(["cookie", "email_match", "phone_match", "direct"])),
            "assignedPreparerId": draw(st.none() | st.sampled_from(preparer_ids)),
            "lastContactedAt": draw(nullable_moments),
            "created_at": draw(moments),
            "updated_at": draw(moments),
        }
        if generation in HAS_CONVERSIONS:
            intake["profileId"] = draw(st.sampled_from([None, *(row["id"] for row in profiles)]))
            intake |= {"convertedToClient": draw(st.booleans()), "convertedAt": draw(nullable_moments)}
        if generation in HAS_TAX_YEARS:
            intake |= {"tax_year": year, "unqualified": draw(st.booleans()), "unqualifiedAt": draw(nullable_moments)}
        intakes.append(intake)
    return intakes


@st.composite
def contact_keys(draw: st.DrawFn, users: Sequence[Row], profiles: Sequence[Row]) -> list[Row]:
    """The keys of contacts, each key unique: any combination, with a liking for those of one profile's person."""
    addresses = {user["id"]: address_of(user["email"]) for user in users}
    placeholders = [f"{kind}-{row['id']}@{PLACEHOLDER_DOMAIN}" for row in profiles for kind in ("client", "Preparer")]
    anyones = _spelled(SPELLINGS) | _spelled(ODD_SPELLINGS) | st.sampled_from(("", "not-an-email", *placeholders))
    rows: list[Row] = []
    for _ in range(draw(st.integers(0, 5))):
        profile = draw(st.sampled_from([{}, *profiles, *profiles]))
        address = addresses.get(profile.get("userId"))
        theirs = st.sampled_from(SPELLINGS).map(partial(_respelled, address)) if address else anyones
        email = draw(theirs | anyones)
        if all(email != row["email"] for row in rows):
            user_id = _free(draw, "userId", rows, profile, addresses)
            clerk_id = _free(draw, "clerkUserId", rows, profile, CLERK_IDS)
            rows.append({"email": email, "userId": user_id, "clerkUserId": clerk_id})
    return rows


def _free(draw: st.DrawFn, key: str, rows: Sequence[Row], profile: Row, pool: Iterable[str]) -> str | None:
    taken = {row[key] for row in rows}
    free = [value for value in pool if value not in taken]
    choices = [None, *([profile[key]] * 4 if profile.get(key) in free else free)]
    return draw(st.sampled_from(choices)) if draw(st.integers(0, 3)) else draw(st.sampled_from([None, *free]))


@st.composite
def contact_lists(
    draw: st.DrawFn,
    stages: Sequence[str],
    users: Sequence[Row],
    profiles: Sequence[Row],
    leads: Sequence[Row],
    intakes: Sequence[Row],
) -> list[Row]:
    """Contacts from before: by whomever, and now and then one that the backfill made and whose ledger was lost."""
    keys = draw(contact_keys(users, profiles))
    own_ids = [contact_id_of(f"profiles:{row['id']}") for row in profiles]
    own_ids += [contact_id_of(f"leads:{row['id']}") for row in leads]
    own_ids += [contact_id_of(f"users:{row['id']}") for row in users]
    own_ids += [contact_id_of(f"tax_intake_leads:{row['id']}") for row in intakes]
    replaced = iter(_distinct(draw, own_ids, len(keys) if draw(st.integers(0, 4)) == 4 else 0))
    return [
        {
            **row,
            "id": next(replaced, None) or identifier,
            "contactType": draw(st.sampled_from(["CLIENT", "LEAD", "AFFILIATE", "PREPARER"])),
            "firstName": draw(texts),
            "lastName": draw(texts),
            "phone": draw(nullable_texts),
            "company": draw(nullable_texts),
            "stage": draw(st.sampled_from(stages)),
            "stageEnteredAt": draw(moments),
            "source": draw(nullable_texts),
            "assignedPreparerId": draw(st.none() | st.just(UNKNOWN_ID)),
            "assignedAt": draw(nullable_moments),
            **draw(attributions()),
            "createdAt": draw(moments),
            "updatedAt": draw(moments),
            "lastContactedAt": draw(nullable_moments),
        }
        for row, identifier in zip(keys, _ids(draw, 4, len(keys)), strict=True)
    ]


@st.composite
def populations(draw: st.DrawFn, generation: str | None = None, *, added_labels: bool = False) -> Population:
    """A small population that obeys the constraints of its tables.

    Takes one of GENERATIONS (None: any of them). With `added_labels` rows may use ADDED_LABELS as well, which the
    database must have been given by `add_labels` first; without it there is no unknown role, status or type.
    """
    generation = generation or draw(st.sampled_from(GENERATIONS))
    users = draw(user_lists(generation))
    profiles = draw(profile_lists(generation, users, added=added_labels))
    leads = draw(lead_lists(users, profiles, added=added_labels))
    intakes = draw(intake_lists(generation, users, profiles))
    return Population(
        generation=generation,
        stages=STAGE_LABELS[generation],
        has_clerk_user_id=generation in HAS_CLERK_USER_ID,
        users=users,
        profiles=profiles,
        leads=leads,
        tax_intake_leads=intakes,
        contacts=draw(contact_lists(STAGE_LABELS[generation], users, profiles, leads, intakes)),
        client_preparers=draw(client_preparer_lists(profiles)),
    )


@st.composite
def aftermaths(draw: st.DrawFn, population: Population, result: Result) -> Population:
    """The same population some time after a run: people worked in the CRM, and the application went on.

    Contacts are deleted and edited; pending profiles become clients; leads convert, or get another email; intakes
    convert, or expire; leads, intakes, users and profiles come in. No key of a contact is touched.
    """
    contacts = [dict(contact) for contact in result.contacts.values() if draw(st.integers(0, 3))]
    for contact in contacts:
        edited = draw(st.sampled_from(["", "", "lastName", "phone", "company", "lastContactedAt"]))
        if edited:
            contact[edited] = draw(moments if edited == "lastContactedAt" else texts)
    profiles = [dict(profile) for profile in population.profiles]
    for profile in profiles:
        if profile["role"].upper() == "LEAD" and draw(st.booleans()):
            profile["role"] = "CLIENT" if profile["role"] == "LEAD" else "client"
    leads = [dict(lead) for lead in population.leads]
    for lead in leads:
        if draw(st.booleans()):
            lead["email"] = draw(source_emails)
        if not draw(st.integers(0, 3)):
            lead["status"] = "CONVERTED"
    newcomers = draw(user_lists(population.generation, taken={user["email"] for user in population.users}, table=5))
    clerk_ids = set(CLERK_IDS) - {profile.get("clerkUserId") for profile in profiles}
    # Some who signed up get a profile.
    account_ids = {profile["userId"] for profile in profiles}
    waiting = [user for user in population.users if user["id"] not in account_ids]
    for accounts, table in ((newcomers, 6), (waiting, 10)):
        profiles += draw(
            profile_lists(
                population.generation,
                accounts,
                added=False,
                clerk_ids=sorted(clerk_ids - {profile.get("clerkUserId") for profile in profiles}),
                taken_codes={profile[column] for profile in profiles for column in CODE_COLUMNS},
                table=table,
            )
        )
    users = [*population.users, *newcomers]
    leads += draw(lead_lists(users, profiles, added=False, table=7))
    intakes = draw(_intakes_later(population, profiles))
    keys = {(intake["email"], intake.get("tax_year", 2024)) for intake in intakes}
    intakes += draw(intake_lists(population.generation, users, profiles, taken=keys, table=9))
    return dataclasses.replace(
        population,
        users=users,
        profiles=profiles,
        leads=leads,
        tax_intake_leads=intakes,
        contacts=contacts,
        client_preparers=draw(client_preparer_lists(profiles)),
    )


@st.composite
def _intakes_later(draw: st.DrawFn, population: Population, profiles: Sequence[Row]) -> list[Row]:
    """The intakes that have not expired, some of them converted."""
    intakes = [dict(intake) for intake in population.tax_intake_leads if draw(st.integers(0, 3))]
    for intake in intakes:
        if "convertedToClient" in intake and draw(st.booleans()):
            intake |= {
                "convertedToClient": True,
                "profileId": draw(st.sampled_from([None, *(profile["id"] for profile in profiles)])),
            }
    return intakes


class Cursor(Protocol):
    """What is needed of a cursor; psycopg's and Django's both do."""

    def execute(self, query: Any, params: Any = ..., /) -> Any: ...

    def executemany(self, query: Any, params_seq: Any, /) -> Any: ...

    def fetchall(self) -> list[Any]: ...


_TABLES = ("users", "profiles", "leads", "tax_intake_leads", "client_preparers", "crm_contacts")
_ENUM_COLUMNS = {
    "profiles": {"role": "UserRole"},
    "leads": {"type": "LeadType", "status": "LeadStatus"},
    "crm_contacts": {"contactType": "ContactType", "stage": "PipelineStage"},
}


def add_labels(cursor: Cursor) -> None:
    """Give the database ADDED_LABELS. They can be used once this is committed."""
    for name, labels in ADDED_LABELS.items():
        for new_label in labels:
            cursor.execute(f"ALTER TYPE \"{name}\" ADD VALUE IF NOT EXISTS '{new_label}'")


def insert_population(cursor: Cursor, population: Population) -> None:
    """Put every row into its (empty) table, users first for the sake of the foreign keys."""
    tables = (
        *(population.users, population.profiles, population.leads),
        *(population.tax_intake_leads, population.client_preparers, population.contacts),
    )
    for table, rows in zip(_TABLES, tables, strict=True):
        if rows:
            _insert(cursor, table, rows)


def replace_population(cursor: Cursor, population: Population) -> None:
    """The same, for tables that hold an earlier population. The ledger stays."""
    for table in reversed(_TABLES):
        cursor.execute(f'DELETE FROM "{table}"')
    insert_population(cursor, population)


def _insert(cursor: Cursor, table: str, rows: Sequence[Row]) -> None:
    columns = list(rows[0])
    enums = _ENUM_COLUMNS.get(table, {})
    names = ", ".join(f'"{column}"' for column in columns)
    values = ", ".join(f'%s::"{enums[column]}"' if column in enums else "%s" for column in columns)
    statement = f'INSERT INTO "{table}" ({names}) VALUES ({values})'
    cursor.executemany(statement, [[_stored(row[column]) for column in columns] for row in rows])


def _stored(value: Any) -> Any:
    """Prisma's timestamps have no zone and mean UTC."""
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) else value


def _loaded(value: Any) -> Any:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) else value


def read_contacts(cursor: Cursor) -> dict[str, Row]:
    """The contacts by id, in the shape of the reference."""
    names = ", ".join(f'"{column}"' for column in CONTACT_COLUMNS)
    cursor.execute(f"SELECT {names} FROM crm_contacts")
    rows = [dict(zip(CONTACT_COLUMNS, map(_loaded, row), strict=True)) for row in cursor.fetchall()]
    return {row["id"]: row for row in rows}


def read_ledger(cursor: Cursor) -> dict[str, Entry]:
    """The ledger entries by row reference, in the shape of the reference; an empty text means none."""
    cursor.execute(
        "SELECT CASE WHEN source LIKE '%%intakes' THEN 'tax_intake_leads' WHEN source LIKE '%%leads' THEN 'leads' "
        "WHEN source = 'signups' THEN 'users' ELSE 'profiles' END, "
        f"source_id, source, outcome, reason, contact_id, identity_keys::text FROM {LEDGER_TABLE}",
        (),
    )
    return {
        f"{table}:{identifier}": {
            "source": source,
            "outcome": outcome,
            "reason": reason or None,
            "contact_id": contact_id or None,
            "keys": json.loads(keys) if keys else None,
        }
        for table, identifier, source, outcome, reason, contact_id, keys in cursor.fetchall()
    }

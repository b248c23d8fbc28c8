"""Generates rows of the application's tables for a number of people, a chunk at a time, in constant memory.

About 40 % of the people have an account (a user and a profile), often after one or more leads. The others have only
leads, mostly one, sometimes several. So ten thousand people have about four thousand profiles and nine thousand leads.
People arrive evenly over three years, in order. The first ones are the staff: they have all roles, so that even a small
number of people includes each role.

Rows are tuples of text in PostgreSQL's format, None for NULL, in the order of `Shape.columns`. The same number of
people, generation and seed give identical rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from crm.sample_data import words
from crm.sample_data.chance import DAY, MINUTE, SECOND, Chance, weighted
from crm.sample_data.crm import Crm
from crm.sample_data.people import Account, Lead, Person, Row
from crm.sample_data.shapes import FIRST_DAY, SHAPES, TABLES

Chunk = dict[str, list[Row]]

CHUNK: Final = 5_000
# The maximum number of people to whom leads are assigned, or who refer others, so that memory stays constant.
_REMEMBERED: Final = 250

_ACCOUNT_SHARE: Final = 0.4
_FOUNDERS: Final = (
    "SUPER_ADMIN",
    "ADMIN",
    "TAX_PREPARER",
    "AFFILIATE",
    "TAX_PREPARER",
    "CLIENT",
    "LEAD",
    "CLIENT",
)
# One account has an empty email. There can be only one, because addresses are unique.
_WITHOUT_EMAIL: Final = len(_FOUNDERS) - 1

_CULTURES: Final = weighted(words.CULTURES)
_PHONE_FORMS: Final = weighted(words.PHONE_FORMS)
_SOURCES: Final = weighted(words.LEAD_SOURCES)
_REFERRER_TYPES: Final = weighted(words.REFERRER_TYPES)
_RATES: Final = weighted(words.COMMISSION_RATES)
_METHODS: Final = weighted(words.ATTRIBUTION_METHODS)
_ROLES: Final = weighted({"CLIENT": 780, "TAX_PREPARER": 90, "AFFILIATE": 80, "LEAD": 38, "ADMIN": 9, "SUPER_ADMIN": 3})
_LEAD_TYPES: Final = weighted({"CUSTOMER": 76, "TAX_PREPARER": 13, "AFFILIATE": 11})
_LEAD_TYPE_OF_ROLE: Final = {"TAX_PREPARER": "TAX_PREPARER", "AFFILIATE": "AFFILIATE"}
_STATUSES: Final = weighted({"NEW": 42, "CONTACTED": 26, "QUALIFIED": 13, "CONVERTED": 10, "DISQUALIFIED": 9})
_STATUSES_OF_ACCOUNTS: Final = weighted({"NEW": 8, "CONTACTED": 9, "QUALIFIED": 10, "CONVERTED": 72, "DISQUALIFIED": 1})
# What becomes of those whom a generation has no role for.
_INSTEAD: Final = {"SUPER_ADMIN": "ADMIN", "AFFILIATE": "CLIENT"}
_LEADS_EACH: Final = weighted({1: 83, 2: 12, 3: 4, 6: 1})
_CONTACTED: Final = frozenset({"CONTACTED", "QUALIFIED", "CONVERTED"})
_NO_ATTRIBUTION: Final = (None, None, None, None, None, "100", None)
# What the application writes for whom nobody referred.
_DIRECT: Final = (None, None, "0.00", None, "direct", "100", None)
# Those who sign up mostly came by the intake, which has been there for the last of the three years.
_INTAKE_OF_CLIENT: Final = 0.55
_INTAKE_OF_LEAD: Final = 0.2
_CONVERTED: Final = 0.85
_INTAKE_YEARS: Final = (2023, 2024, 2025)


@dataclass(frozen=True, slots=True)
class _Colleague:
    """A person to whom leads are assigned, or who referred them."""

    profile_id: str
    user_id: str | None
    username: str


def generate(people: int, generation: str, seed: int) -> Iterator[Chunk]:
    """Yield the rows of this number of people, by table, CHUNK people at a time.

    Foreign keys refer to the same chunk or an earlier one. Raises KeyError for an unknown generation.
    """
    population = _Population(people, generation, seed)
    for start in range(0, people, CHUNK):
        yield population.chunk(range(start, min(start + CHUNK, people)))


class _Population:
    def __init__(self, people: int, generation: str, seed: int) -> None:
        self._people = people
        self._shape = SHAPES[generation]
        self._chance = Chance(f"{generation}/{people}/{seed}", FIRST_DAY, self._shape.last_day)
        self._crm = Crm(self._chance, self._shape)
        self._rows: Chunk = {}
        self._preparers: list[_Colleague] = []
        self._referrers: list[_Colleague] = []
        self._household_email: str | None = None

    def chunk(self, numbers: range) -> Chunk:
        self._rows = {table: [] for table in TABLES}
        for number in numbers:
            person = self._person(number)
            if number < len(_FOUNDERS):
                self._with_account(person, _FOUNDERS[number])
            elif self._chance.happens(_ACCOUNT_SHARE):
                self._with_account(person, self._chance.pick(_ROLES))
            else:
                self._with_leads_only(person)
        return self._rows

    # People

    def _person(self, number: int) -> Person:
        chance = self._chance
        culture = chance.pick(_CULTURES)
        first, last = chance.pick(culture.first), chance.pick(culture.last)
        last_written = last.written
        if chance.happens(0.03):
            last_written = f"{last_written}-{chance.pick(culture.last).written}"
        own = chance.pick(words.EMAIL_FORMS).format(first=first.handle, last=last.handle, number=number)
        return Person(
            number=number,
            arrived=int(chance.end * (number + chance.random()) / self._people),
            first=first.written,
            last=last_written,
            handle=first.handle,
            own=own,
            email=f"{own}@{chance.pick(words.EMAIL_DOMAINS)}",
            area=chance.pick(words.AREA_CODES),
            line=f"{100 + chance.number(100):04d}",
        )

    def _typed_name(self, name: str) -> str:
        """Return the name as typed into a form."""
        luck = self._chance.random()
        if luck < 0.9:
            return name
        if luck < 0.93:
            return name.upper()
        if luck < 0.96:
            return name.lower()
        if luck < 0.99:
            return self._chance.pick(words.SPACED).format(name)
        return self._chance.pick(words.BLANKS)

    def _typed_email(self, email: str, as_it_is: float) -> str:
        """Return the email as typed into a form: maybe in another case, or with spaces around it."""
        if self._chance.happens(as_it_is):
            return email
        luck = self._chance.random()
        if luck < 0.15:
            return f" {email} "
        if luck < 0.2:
            return f"{email.upper()}\t"
        return self._crm.in_another_case(email)

    def _typed_phone(self, person: Person) -> str:
        return self._chance.pick(_PHONE_FORMS).format(area=person.area, line=person.line)

    # Accounts

    def _with_account(self, person: Person, role: str) -> None:
        chance = self._chance
        if role in self._shape.missing_roles:
            if role == "LEAD":
                # Whoever signs up waits for approval: a user without a profile.
                self._user(person, self._typed_email(person.email, 0.95))
                return
            role = _INSTEAD[role]
        lead = None
        if person.number >= len(_FOUNDERS) and chance.happens(0.35):
            lead = self._leads_before_the_account(person, role)
        user_id, email = None, ""
        if not self._shape.clerk or person.number <= _WITHOUT_EMAIL or not chance.happens(0.08):
            email = self._account_email(person)
            user_id = self._user(person, email)
        clerk_id = chance.clerk_id(person.arrived) if self._shape.clerk and chance.happens(0.7) else None
        account = self._profile(person, role, user_id, clerk_id, email)
        if role == "CLIENT":
            self._client(person, account)
        if email and chance.happens(0.004):
            self._second_account(person, email)
        elif person.number >= len(_FOUNDERS):
            self._crm.meet_account(self._rows, person, account, lead)

    def _account_email(self, person: Person) -> str:
        if person.number == _WITHOUT_EMAIL:
            return ""
        if person.number >= len(_FOUNDERS) and self._chance.happens(0.002):
            return self._chance.pick(words.NOT_ACCOUNT_EMAILS).format(own=person.own)
        return self._typed_email(person.email, 0.95)

    def _second_account(self, person: Person, email: str) -> None:
        """Add a second account of the same person, with the address in another case: a conflict for an operator."""
        user_id = self._user(person, email.swapcase())
        clerk_id = self._chance.clerk_id(person.arrived) if self._shape.clerk else None
        self._profile(person, "CLIENT", user_id, clerk_id, email.swapcase())

    def _client(self, person: Person, account: Account) -> None:
        """The intake by which the client came, and the preparers whom the client has had."""
        chance = self._chance
        if person.number >= len(_FOUNDERS) and chance.happens(_INTAKE_OF_CLIENT):
            became = account if chance.happens(_CONVERTED) else None
            self._intake(person, chance.before(person.arrived, 30 * DAY), self._typed_email(person.email, 0.9), became)
        if not self._preparers or not chance.happens(0.45):
            return
        theirs = {chance.pick(self._preparers).profile_id for _ in range(1 + chance.happens(0.15))} - {
            account.profile_id
        }
        for number, preparer in enumerate(sorted(theirs)):
            at = chance.after(account.at, 300 * DAY)
            active = "t" if number == 0 or chance.happens(0.2) else "f"
            self._rows["client_preparers"].append(
                (chance.cuid(at), account.profile_id, preparer, chance.timestamp(at), active)
            )

    def _user(self, person: Person, email: str) -> str:
        chance = self._chance
        user_id = chance.cuid(person.arrived)
        created = chance.timestamp(person.arrived)
        verified = chance.timestamp(chance.after(person.arrived, 2 * DAY)) if chance.happens(0.8) else None
        password = f"$2b$10$not.a.real.hash.{person.number}" if chance.happens(0.5) else None
        row: Row = (
            user_id,
            email,
            password,
            verified,
            created,
            chance.timestamp(chance.after(person.arrived, 400 * DAY)),
        )
        if not self._shape.clerk:
            row += (f"{person.first} {person.last}",)
        self._rows["users"].append(row)
        return user_id

    def _profile(self, person: Person, role: str, user_id: str | None, clerk_id: str | None, email: str) -> Account:
        chance = self._chance
        at = chance.after(person.arrived, 10 * MINUTE)
        profile_id = chance.cuid(at)
        first = self._typed_name(person.first) if chance.happens(0.985) else None
        last = self._typed_name(person.last) if chance.happens(0.985) else None
        phone = self._profile_phone(person)
        company = chance.pick(words.COMPANIES) if role != "CLIENT" or chance.happens(0.05) else None
        row: Row = (
            profile_id,
            user_id,
            self._spelt(role),
            first,
            last,
            phone,
            company,
            *self._public_page(person, role, profile_id, user_id),
            *self._secrets(person),
            chance.timestamp(at),
            chance.timestamp(chance.after(at, 500 * DAY)),
            *self._columns_of_this_generation(clerk_id, email),
        )
        self._rows["profiles"].append(row)
        return Account(profile_id, user_id, clerk_id, role, at, first, last, phone)

    def _profile_phone(self, person: Person) -> str | None:
        luck = self._chance.random()
        if luck < 0.25:
            return None
        if luck < 0.28:
            return self._chance.pick(words.BLANKS)
        return self._typed_phone(person)

    def _spelt(self, role: str) -> str:
        if self._shape.roles == "upper" or (self._shape.roles == "both" and self._chance.happens(0.5)):
            return role
        return role.lower()

    def _public_page(self, person: Person, role: str, profile_id: str, user_id: str | None) -> Row:
        """Return slug, bio, licence, tracking codes and bond, which only preparers and affiliates have."""
        chance = self._chance
        if role not in ("TAX_PREPARER", "AFFILIATE"):
            return (None, None, None, None, None, "f", None, None)
        username = f"{person.handle}{person.number}"
        self._remember(self._referrers, _Colleague(profile_id, user_id, username))
        if role == "TAX_PREPARER":
            bond = None
            self._remember(self._preparers, _Colleague(profile_id, user_id, username))
        else:
            bond = chance.pick(self._preparers).profile_id if self._preparers and chance.happens(0.5) else None
        changed = chance.happens(0.3)
        return (
            f"{person.handle}-{person.number}",
            chance.maybe(0.4, words.BIOS),
            f"P{person.number:08d}" if role == "TAX_PREPARER" else None,
            f"TGP-{person.number:06d}",
            f"{person.handle}tax{person.number}" if changed else None,
            "t" if changed else "f",
            username,
            bond,
        )

    def _remember(self, colleagues: list[_Colleague], colleague: _Colleague) -> None:
        if len(colleagues) < _REMEMBERED:
            colleagues.append(colleague)
        else:
            colleagues[self._chance.number(_REMEMBERED)] = colleague

    def _secrets(self, person: Person) -> Row:
        """Return the columns that the backfill must never read. These numbers are never issued."""
        chance = self._chance
        if not chance.happens(0.3):
            return (None, None, None, None)
        last_four = f"{person.number % 10_000:04d}"
        bank = f'{{"bank": "Sample Bank", "routing": "000000000", "account": "000000{last_four}"}}'
        return (
            f"000-00-{last_four}",
            f"{1940 + chance.number(65)}-{1 + chance.number(12):02d}-{1 + chance.number(28):02d}",
            f'{{"street": "{1 + chance.number(900)} Sample Street", "city": "{chance.pick(words.CITIES)}"}}',
            bank if chance.happens(0.4) else None,
        )

    def _columns_of_this_generation(self, clerk_id: str | None, email: str) -> Row:
        chance = self._chance
        columns = self._shape.columns["profiles"]
        if self._shape.clerk:
            return (clerk_id,)
        row: Row = (
            chance.maybe(0.15, words.MIDDLE_NAMES),
            chance.maybe(0.05, words.CERTIFICATIONS),
            "https://www.example.com/" if chance.happens(0.03) else None,
            "t" if chance.happens(0.9) else "f",
        )
        if "crmLeadScoring" in columns:
            row += ("t" if chance.happens(0.2) else "f", "t" if chance.happens(0.1) else "f")
        if "affiliateStatus" in columns:
            row += (chance.pick(("NONE", "NONE", "PENDING", "APPROVED")),)
        if "googleDriveFolderId" in columns:
            row += (None,)
        if "supabaseUserId" in columns:
            row += (email if email and chance.happens(0.6) else None, None)
        return row

    # Intakes

    def _intake(self, person: Person, at: int, email: str, became: Account | None) -> None:
        """An intake of this person, who became this client by it, or is still to be called."""
        chance = self._chance
        updated = chance.after(at, 60 * DAY)
        contacted = chance.timestamp(at + chance.number(updated - at + 1)) if chance.happens(0.4) else None
        username, kind, _, _, method, _, _ = self._attribution(at)
        country, phone = ("+1", self._typed_phone(person)) if chance.happens(0.95) else ("+52", "55 5550 0100")
        row: Row = (
            chance.cuid(at),
            self._typed_name(person.first),
            chance.maybe(0.15, words.MIDDLE_NAMES),
            self._typed_name(person.last),
            email,
            phone,
            country,
            f"{1 + chance.number(900)} Sample Street",
            chance.pick(words.CITIES),
            "GA",
            "00000",
            f'{{"ssn": "000-00-{person.number % 10_000:04d}"}}' if chance.happens(0.7) else None,
            "t" if became or chance.happens(0.5) else "f",
            username,
            kind,
            method,
            self._assignment(at),
            "t" if chance.happens(0.25) else "f",
            chance.maybe(0.3, words.CONTACT_METHODS),
            contacted,
            chance.maybe(0.3, words.NOTES) if contacted else None,
            chance.timestamp(at),
            chance.timestamp(updated),
        )
        self._rows["tax_intake_leads"].append(row + self._later_columns_of_intake(at, updated, became))

    def _later_columns_of_intake(self, at: int, updated: int, became: Account | None) -> Row:
        chance, columns = self._chance, self._shape.columns["tax_intake_leads"]
        row: Row = ()
        if "convertedToClient" in columns:
            linked = became.profile_id if became and chance.happens(0.7) else None
            converted = chance.timestamp(updated) if became and chance.happens(0.9) else None
            row += (linked, "t" if became else "f", converted)
        if "tax_year" in columns:
            row += (str(chance.pick(_INTAKE_YEARS)),)
        if "unqualified" in columns:
            lost = not became and chance.happens(0.08)
            row += (
                "t" if lost else "f",
                "no answer" if lost else None,
                chance.timestamp(updated) if lost and chance.happens(0.9) else None,
                chance.pick(words.NOTES) if lost else None,
                None if became else chance.timestamp(chance.after(at, 90 * DAY)),
            )
        return row

    # Leads

    def _with_leads_only(self, person: Person) -> None:
        chance = self._chance
        email, is_own = self._lead_email(person)
        kind = chance.pick(_LEAD_TYPES)
        first_lead = self._lead(person, kind, chance.pick(_STATUSES), person.arrived, email)
        at = person.arrived
        for _ in range(chance.pick(_LEADS_EACH) - 1):
            at = chance.after(at, 200 * DAY)
            self._lead(person, kind, chance.pick(_STATUSES), at, self._typed_email(email, 0.6))
        if is_own:
            if chance.happens(0.015):
                # A user who signed up and did not continue has no profile.
                self._user(person, person.email)
            if chance.happens(_INTAKE_OF_LEAD):
                self._intake(
                    person, chance.before(person.arrived, 20 * DAY), self._typed_email(person.email, 0.9), None
                )
            self._crm.meet_lead(self._rows, person, first_lead)
            self._household_email = person.email

    def _lead_email(self, person: Person) -> tuple[str, bool]:
        """Return the email of a person's leads, and whether it is the person's own."""
        luck = self._chance.random()
        if luck < 0.007:
            return self._chance.pick(words.NOT_EMAILS), False
        if luck < 0.014 and self._household_email:
            return self._household_email, False
        return person.email, True

    def _leads_before_the_account(self, person: Person, role: str) -> Lead:
        chance = self._chance
        kind = _LEAD_TYPE_OF_ROLE.get(role, "CUSTOMER")
        first_lead = None
        for _ in range(chance.pick(_LEADS_EACH)):
            at = chance.before(person.arrived, 90 * DAY)
            email = self._typed_email(person.email, 0.85)
            lead = self._lead(person, kind, chance.pick(_STATUSES_OF_ACCOUNTS), at, email)
            first_lead = first_lead or lead
        assert first_lead is not None  # noqa: S101 - there is at least one
        return first_lead

    def _lead(self, person: Person, kind: str, status: str, at: int, email: str) -> Lead:
        chance = self._chance
        updated = at if status == "NEW" and chance.happens(0.7) else chance.after(at, 120 * DAY)
        contacted = None
        if status in _CONTACTED and chance.happens(0.85):
            contacted = chance.timestamp(at + chance.number(updated - at + 1))
        lead = Lead(
            kind=kind,
            at=at,
            first=self._typed_name(person.first),
            last=self._typed_name(person.last),
            email=self._typed_email(email, 0.93),
            phone="" if chance.happens(0.06) else self._typed_phone(person),
            source=chance.pick(_SOURCES) if chance.happens(0.94) else None,
            attribution=self._attribution(at),
        )
        self._rows["leads"].append(
            (
                chance.cuid(at),
                kind,
                status,
                lead.first,
                lead.last,
                lead.email,
                lead.phone,
                *self._answers(kind),
                chance.maybe(0.12, words.MESSAGES),
                lead.source,
                *self._visit(),
                *lead.attribution,
                self._assignment(at),
                "t" if chance.happens(0.25) else "f",
                chance.maybe(0.3, words.CONTACT_METHODS),
                contacted,
                chance.maybe(0.3, words.NOTES) if contacted else None,
                chance.timestamp(at),
                chance.timestamp(updated),
            )
        )
        return lead

    def _answers(self, kind: str) -> Row:
        """Return the answers in the forms for customers, preparers and affiliates."""
        chance = self._chance
        if kind == "CUSTOMER":
            situation, income = chance.maybe(0.7, words.TAX_SITUATIONS), chance.maybe(0.5, words.INCOMES)
            return (situation, income, None, None, None, None, None)
        experience = chance.maybe(0.8, words.EXPERIENCES)
        if kind == "TAX_PREPARER":
            ptin = f"P00{chance.number(1_000_000):06d}" if chance.happens(0.6) else None
            return (None, None, ptin, chance.maybe(0.8, words.CERTIFICATIONS), experience, None, None)
        return (None, None, None, None, None, experience, chance.maybe(0.8, words.AUDIENCES))

    def _visit(self) -> Row:
        """Return campaign, IP address and browser."""
        chance = self._chance
        campaign: Row = (None, None, None)
        if chance.happens(0.2):
            campaign = (
                chance.pick(words.UTM_SOURCES),
                chance.pick(words.UTM_MEDIUMS),
                chance.pick(words.UTM_CAMPAIGNS),
            )
        address = f"{chance.pick(words.IP_ADDRESSES)}{1 + chance.number(254)}"
        return (*campaign, address, chance.maybe(0.9, words.USER_AGENTS))

    def _attribution(self, at: int) -> Row:
        """Return username, type, rate, locked at, method, confidence and cookie."""
        chance = self._chance
        luck = chance.random()
        if luck < 0.1 or not self._referrers:
            return _NO_ATTRIBUTION
        if luck < 0.64:
            return _DIRECT
        if luck < 0.65:
            # No referrer. Some forms store that as text.
            return ("", "", None, None, "direct", "100", None)
        method, confidence = chance.pick(_METHODS)
        rate = chance.pick(_RATES) if chance.happens(0.9) else None
        locked = chance.timestamp(chance.after(at, MINUTE)) if rate and chance.happens(0.95) else None
        cookie = f"attr_{chance.number(16**8):08x}" if method == "cookie" else None
        username = chance.pick(self._referrers).username
        return (username, chance.pick(_REFERRER_TYPES), rate, locked, method, confidence, cookie)

    def _assignment(self, at: int) -> str | None:
        """Return the id of a preparer's profile, sometimes of the user, rarely of a preparer who no longer exists."""
        chance = self._chance
        if not self._preparers or not chance.happens(0.3):
            return None
        preparer = chance.pick(self._preparers)
        luck = chance.random()
        if luck < 0.88:
            return preparer.profile_id
        if luck < 0.97:
            return preparer.user_id or preparer.profile_id
        return chance.cuid(chance.before(at, 30 * SECOND)) if luck < 0.99 else ""

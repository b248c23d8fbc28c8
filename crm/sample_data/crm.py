"""The contacts that the CRM already has, for three percent of the people, with their history.

The CRM has created contacts for new leads, and its users have added people manually. So some contacts match a lead or a
profile by email, user or Clerk id; some have an old address, or one in another case; some match no row; and some
contradict the accounts, which requires a resolution by an operator.
"""

from dataclasses import dataclass
from typing import Final

from crm.sample_data import words
from crm.sample_data.chance import DAY, HOUR, MINUTE, SECOND, Chance, weighted
from crm.sample_data.people import Account, Lead, Person, Row
from crm.sample_data.shapes import Shape

_SHARE: Final = 0.03
_NO_ATTRIBUTION: Final = (None, None, None, None, None, "100")
#: By lead type, or by role if there was no lead.
_CONTACT_TYPES: Final = {"CUSTOMER": "LEAD", "TAX_PREPARER": "PREPARER", "AFFILIATE": "AFFILIATE", "CLIENT": "CLIENT"}
_INTERACTION_TYPES: Final = weighted(words.INTERACTION_TYPES)
#: The keys by which a contact matches an account. `split` and `taken` contradict the account.
_MEETINGS: Final = weighted(
    {"all": 30, "user": 18, "clerk": 15, "email": 17, "another case": 10, "split": 6, "taken": 4}
)

Rows = dict[str, list[Row]]


@dataclass(frozen=True, slots=True)
class _Card:
    """The keys of a contact."""

    email: str
    user_id: str | None = None
    clerk_id: str | None = None


class Crm:
    """Generates the contacts, interactions and stage history that the application's users created."""

    def __init__(self, chance: Chance, shape: Shape) -> None:
        self._chance = chance
        self._stages = shape.stages
        self._scores = "leadScore" in shape.columns["crm_contacts"]
        # A user without a contact, who will be assigned to a wrong contact.
        self._free_user: str | None = None

    def in_another_case(self, email: str) -> str:
        """Return the same address, mostly in another case."""
        chance = self._chance
        luck = chance.random()
        if luck < 0.3:
            return email.title()
        if luck < 0.6:
            return email.capitalize()
        if luck < 0.8:
            return email.upper()
        own, _, domain = email.partition("@")
        return f"{own}@{domain.capitalize()}"

    def meet_lead(self, rows: Rows, person: Person, lead: Lead) -> None:
        """Maybe add a contact that the CRM created for this lead, or a user added later."""
        chance = self._chance
        if not chance.happens(_SHARE):
            return
        email = person.email
        if chance.happens(0.15):
            email = self.in_another_case(email)
        elif chance.happens(0.08):
            # No row has this address.
            email = f"walk-in.{person.email}"
        kept = chance.happens(0.6)
        attribution = lead.attribution[:6] if kept else _NO_ATTRIBUTION
        self._contact(rows, lead, _Card(email), lead.source if kept else "manual", attribution)

    def meet_account(self, rows: Rows, person: Person, account: Account, lead: Lead | None) -> None:
        """Maybe add a contact that a user created for this account, with some of its keys."""
        chance = self._chance
        if not chance.happens(_SHARE):
            if account.user_id:
                self._free_user = account.user_id
            return
        known = lead or Lead(
            kind=account.role if account.role in _CONTACT_TYPES else "CUSTOMER",
            at=account.at,
            first=account.first or "",
            last=account.last or "",
            email=person.email,
            phone=account.phone or "",
            source="manual",
            attribution=_NO_ATTRIBUTION,
        )
        for card in self._cards(person, account):
            self._contact(rows, known, card, known.source, known.attribution[:6])

    def _cards(self, person: Person, account: Account) -> tuple[_Card, ...]:
        old_email = f"old.{person.email}"
        meeting = self._chance.pick(_MEETINGS)
        if meeting == "user" and account.user_id:
            return (_Card(old_email, user_id=account.user_id),)
        if meeting == "clerk" and account.clerk_id:
            return (_Card(old_email, clerk_id=account.clerk_id),)
        if meeting == "split" and account.user_id:
            return (_Card(old_email, user_id=account.user_id), _Card(person.email, clerk_id=account.clerk_id))
        if meeting == "taken" and self._free_user:
            stranger, self._free_user = self._free_user, None
            return (_Card(person.email, user_id=stranger),)
        if meeting == "another case":
            return (_Card(self.in_another_case(person.email)),)
        if meeting == "all":
            return (_Card(person.email, account.user_id, account.clerk_id),)
        return (_Card(person.email),)

    def _contact(self, rows: Rows, known: Lead, card: _Card, source: str | None, attribution: Row) -> None:
        chance = self._chance
        at = chance.after(known.at, 5 * MINUTE)
        updated = chance.after(at, 90 * DAY)
        contact_id = chance.cuid(at)
        stage = chance.pick(self._stages)
        entered = at if stage == "NEW" else at + chance.number(updated - at + 1)
        row: Row = (
            contact_id,
            card.user_id,
            card.clerk_id,
            _CONTACT_TYPES[known.kind],
            known.first.strip() or "Unknown",
            known.last.strip() or "Unknown",
            card.email,
            known.phone or None,
            None,
            chance.maybe(0.2, ("single", "married", "head of household")),
            str(chance.number(5)) if chance.happens(0.2) else None,
            f"{chance.number(120_000)}.5" if chance.happens(0.1) else None,
            chance.maybe(0.2, ("2022", "2023", "2024")),
            stage,
            chance.timestamp(entered),
            source,
            None,
            None,
            *attribution,
            chance.timestamp(at),
            chance.timestamp(updated),
            None if stage == "NEW" else chance.timestamp(entered),
        )
        if self._scores:
            row += (str(chance.number(100)), chance.timestamp(updated))
        rows["crm_contacts"].append(row)
        if stage != "NEW":
            rows["crm_stage_history"].append(
                (
                    chance.cuid(entered),
                    contact_id,
                    "NEW",
                    stage,
                    None,
                    chance.maybe(0.3, words.NOTES),
                    chance.timestamp(entered),
                )
            )
        for _ in range(chance.number(4)):
            self._interaction(rows, contact_id, card, at)

    def _interaction(self, rows: Rows, contact_id: str, card: _Card, since: int) -> None:
        chance = self._chance
        kind = chance.pick(_INTERACTION_TYPES)
        at = chance.after(since, 60 * DAY)
        moment = chance.timestamp(at)
        interaction_id = chance.cuid(at)
        is_email = kind == "EMAIL"
        rows["crm_interactions"].append(
            (
                interaction_id,
                contact_id,
                card.user_id,
                kind,
                "INBOUND" if chance.happens(0.35) else "OUTBOUND",
                chance.pick(words.SUBJECTS) if is_email else None,
                chance.pick(words.MESSAGES) if is_email else chance.pick(words.NOTES),
                str(chance.number(HOUR // SECOND)) if kind == "PHONE_CALL" else None,
                f"<{interaction_id}@mail.example.com>" if is_email else None,
                f'{{"{card.email}"}}' if is_email else None,
                moment,
                moment,
                moment,
            )
        )

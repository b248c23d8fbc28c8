"""Anything in any order: a machine that backfills, takes runs back, and in between lets the world go on.

After every step nothing that a person wrote is overwritten, nobody whom they deleted is back, the books balance, and a
verification finds exactly what somebody who watched expects, never a defect.

The default is what a CI run has time for; `make soak` takes a longer look.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from django.db import connection
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from crm.conflicts import resolving
from crm.errors import OperatorError
from crm.outcome import Source
from crm.rollback.report import as_json
from crm.rollback.runner import roll_back
from crm.rules.row_reference import RowReference
from crm.verification import verify
from tests.conftest import Database
from tests.support import commands, reference, reference_update
from tests.support.machine import expectations
from tests.support.machine.expectations import Found
from tests.support.machine.memory import Memory
from tests.support.machine.world import LedgerEntry, State, Update, World
from tests.support.populations import (
    CODE_COLUMNS,
    HAS_CLERK_USER_ID,
    HAS_CONVERSIONS,
    HAS_TAX_YEARS,
    MOMENTS,
    NOT_ADDRESSES,
    ROLES,
)
from tests.support.profiles import MACHINE_EXAMPLES, MACHINE_STEPS, SOAKING

GENERATIONS = ("2025_10_mixed", "2026_01")
EXAMPLES, STEPS = (MACHINE_EXAMPLES // len(GENERATIONS), MACHINE_STEPS) if SOAKING else (2, 25)
UNKNOWN_RUN = 10**6

# Few people, so that they meet: an address comes in its plain form mostly, and now and then it is none.
ADDRESSES = ("ann@example.com", "bob@example.com", "cy@example.org")
EMAILS = (*ADDRESSES * 2, *map(str.upper, ADDRESSES), "Ann@Example.com ", NOT_ADDRESSES[0])
SEPARATE_EMAILS = ("bob@example.com", "ann.junior@example.com", "bob.junior@example.com")
emails = st.sampled_from(EMAILS)
CODES = ("ref", "REF", "other")
names = st.sampled_from(("Ann", "Lee", " Bo ", ""))
phones = st.sampled_from(("555 0100", "555 0199", " "))
moments = st.sampled_from(MOMENTS)
referrals = st.fixed_dictionaries(
    {
        "referrerUsername": st.sampled_from(["ref", "other"]),
        "referrerType": st.just("AFFILIATE"),
        "commissionRate": st.sampled_from([Decimal("12.50"), Decimal("7.00"), None]),
        "commissionRateLockedAt": st.none() | moments,
        "attributionMethod": st.none() | st.just("cookie"),
        "attributionConfidence": st.sampled_from([100, 85]),
    }
)
attributions: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}), st.sampled_from([100, 40]).map(lambda n: {"attributionConfidence": n}), referrals
)
statuses = st.sampled_from(("NEW", "CONTACTED", "QUALIFIED", "CONVERTED", "DISQUALIFIED"))
lead_changes = st.one_of(
    st.fixed_dictionaries({"status": statuses}),
    st.fixed_dictionaries({"email": emails}),
    st.fixed_dictionaries({"phone": phones}),
    referrals,
    st.none(),
)
profile_changes = st.one_of(
    st.fixed_dictionaries({"phone": st.none() | phones}),
    st.fixed_dictionaries({"companyName": st.none() | st.just("Other Ltd"), "firstName": names}),
)
contact_edits: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"firstName": names}),
    st.fixed_dictionaries({"phone": st.none() | phones}),
    st.fixed_dictionaries({"company": st.none() | st.just("By hand")}),
    st.fixed_dictionaries({"lastContactedAt": st.none() | moments}),
    st.fixed_dictionaries({"assignedPreparerId": st.none() | st.just("somebody"), "assignedAt": moments}),
    st.just({"assignedPreparerId": None, "assignedAt": None}),
    referrals,
)
run_options = st.fixed_dictionaries(
    {},
    optional={
        "with_signups": st.just(value=True),
        "batch_size": st.sampled_from([1, 2, 7]),
        "only": st.sets(st.sampled_from(Source), min_size=1, max_size=4).map(
            lambda s: tuple(x for x in Source if x in s)
        ),
    },
)


class Machine(RuleBasedStateMachine):
    """The application, people in the CRM and an operator, each doing what they do."""

    def __init__(self, database: Database, generation: str) -> None:
        super().__init__()
        self.world = World(database, generation)
        self.memory = Memory()
        # Most rows are to be migrated.
        self.roles = st.sampled_from(
            [r for r in ROLES[generation] if r.upper() in reference.PROFILE_SOURCES]
        ) | st.sampled_from(ROLES[generation])

    # The operator

    @initialize(data=st.data())
    def the_first_days(self, data: st.DataObject) -> None:
        self._newcomers(data, 2, 5)
        self._backfill({}, None, rehearsed=False)

    @rule(data=st.data())
    def a_night(self, data: st.DataObject) -> None:
        """Some people come, and then there is a run."""
        self._newcomers(data, 0, 2)
        self._backfill({}, None, rehearsed=False)

    @rule(data=st.data(), options=run_options, limit=st.none() | st.integers(1, 4))
    def a_run_with_options(self, data: st.DataObject, options: dict[str, Any], limit: int | None) -> None:
        """Some people come, and then somebody tries first and runs a part."""
        self._newcomers(data, 0, 2)
        self._backfill(options, limit, rehearsed=True)

    @rule(data=st.data(), options=run_options, rehearsed=st.booleans())
    def a_second_look(self, data: st.DataObject, options: dict[str, Any], rehearsed: bool) -> None:  # noqa: FBT001 - hypothesis
        """Some people come, and a run looks again at what it had settled."""
        self._newcomers(data, 0, 2)
        before = self.world.state()
        foretold = commands.run(**options, update=True, dry_run=True) if rehearsed else None
        report: dict[str, Any] = {}
        after = self._ours(lambda: report.update(commands.run(**options, update=True)))
        expectations.assert_a_second_look_fills_no_blank_of_theirs(before, after, self.memory)
        assert foretold is None or _looks(foretold) == _looks(report)
        # The judge of second looks knows neither of sources that are left out nor of resolutions.
        if "only" not in options and not before.resolutions:
            world = _as_the_judge_of_second_looks_sees_it(before)
            with_signups = options.get("with_signups", False)
            looks = reference_update.run(world, before.population, update=True, with_signups=with_signups)
            assert (after.contacts, after.ledger) == (world.contacts, world.ledger)
            assert {name: report[name] for name in vars(looks)} == vars(looks)

    def _backfill(self, options: dict[str, Any], limit: int | None, *, rehearsed: bool) -> None:
        before = self.world.state()
        expected = _expected(before, options.get("only"), limit, with_signups=options.get("with_signups", False))
        if rehearsed:
            everything = self.world.everything()
            foretold = commands.run(**options, limit=limit, dry_run=True)
            assert _counts(foretold) == _expected_counts(expected)
            assert self.world.everything() == everything
        after = self._ours(lambda: commands.run(**options, limit=limit))
        self._assert_as_expected(after, expected)

    @rule(batch_size=st.sampled_from([1, 1000]), odds=st.integers(0, 9))
    def a_backfill_by_two(self, batch_size: int, odds: int) -> None:
        """Processes are slow, so they are rare. People's keys may make it a matter of who of the two comes first."""
        if odds == 9 and not self.memory.theirs and not self.memory.written:
            expected = _expected(self.world.state())
            after = self._ours(lambda: commands.run(workers=2, batch_size=batch_size))
            self._assert_as_expected(after, expected)

    @precondition(lambda self: self.world.runs())
    @rule(data=st.data(), batch_size=st.sampled_from([1, 2, 1000]))
    def a_rollback(self, data: st.DataObject, batch_size: int) -> None:
        """Of a run that has something left, mostly."""
        runs = st.sampled_from([*reversed(self.world.runs()), UNKNOWN_RUN])
        if there := self._runs_with_something_left():
            runs = st.sampled_from(there) | st.sampled_from(there) | runs
        self._roll_back(data.draw(runs, label="run"), batch_size)

    @precondition(lambda self: self._unresolved())
    @rule(data=st.data())
    def a_conflict_is_resolved(self, data: st.DataObject) -> None:
        row = RowReference.parse(data.draw(st.sampled_from(self._unresolved()), label="row"))
        contacts = sorted(self.world.state().contacts)
        belongs = data.draw(st.booleans(), label="belongs to a contact")
        if contacts and belongs:
            resolving.belongs_to(row, data.draw(st.sampled_from(contacts), label="contact"))
        else:
            with suppress(OperatorError):  # somebody has that address
                resolving.is_separate(row, data.draw(st.sampled_from(SEPARATE_EMAILS), label="address"))

    def _unresolved(self) -> list[str]:
        entries = self.world.state().entries.values()
        return sorted(entry.row for entry in entries if entry.reason in ("conflict", "stale_decision"))

    @precondition(lambda self: self._contacts_of_ours())
    @rule(data=st.data(), batch_size=st.sampled_from([1, 2, 1000]))
    def a_contact_turns_out_to_be_wrong(self, data: st.DataObject, batch_size: int) -> None:
        """So a run that wrote it is taken back: the one that made it, or one that filled it."""
        contact = data.draw(st.sampled_from(self._contacts_of_ours()), label="contact")
        state = self.world.state()
        writers: list[LedgerEntry | Update] = [*state.entries.values(), *state.updates]
        runs = sorted({writer.run for writer in writers if writer.contact_id == contact})
        self._roll_back(data.draw(st.sampled_from(runs), label="run"), batch_size)

    def _contacts_of_ours(self) -> list[str]:
        state = self.world.state()
        return sorted(state.creators().keys() & state.contacts.keys())

    @rule(data=st.data(), options=run_options, update=st.booleans())
    def a_run_is_taken_back_and_run_again(self, data: st.DataObject, options: dict[str, Any], update: bool) -> None:  # noqa: FBT001 - hypothesis
        """Rollback and backfill equal backfill."""
        self._newcomers(data, 0, 2)
        options = options | {"update": update}
        first = self._ours(lambda: commands.run(**options))
        latest = self.world.runs()[-1]
        self._roll_back(latest, 1000)
        again = self._ours(lambda: commands.run(**options))
        assert again.contacts == first.contacts
        assert again.ledger == first.ledger
        assert again.history == first.history

    def _roll_back(self, run: int, batch_size: int) -> None:
        before = self.world.state()
        if run not in self._runs_with_something_left():
            self._assert_refused(run)
            return
        foretold = json.loads(as_json(roll_back(run, dry_run=True)))
        report: dict[str, Any] = {}
        after = self._ours(lambda: report.update(json.loads(as_json(roll_back(run, batch_size=batch_size)))))
        expectations.assert_taken_back(before, after, run, self.memory)
        expected = expectations.rollback_counts(before, after, run)
        assert {name: report[name] for name in expected} == expected
        assert {name: foretold[name] for name in expected} == expected
        assert foretold["by_reason"] == report["by_reason"]
        assert (report["status"], report["balanced"]) == ("finished", True)

    def _runs_with_something_left(self) -> list[int]:
        state = self.world.state()
        return sorted({entry.run for entry in state.entries.values()} | {update.run for update in state.updates})

    def _assert_refused(self, run: int) -> None:
        everything = self.world.everything()
        for dry_run in (True, False):
            with pytest.raises(OperatorError):
                roll_back(run, dry_run=dry_run)
        assert self.world.everything() == everything

    def _ours(self, command: Any) -> State:
        """Run a command of ours; whatever it is, it takes nothing from anybody."""
        before, others = self.world.state(), self.world.other_tables()
        command()
        after = self.world.look()
        assert self.world.other_tables() == others
        expectations.assert_nothing_of_theirs_is_lost(before, after, self.memory)
        expectations.assert_the_ledger_is_whole(after)
        self.memory.entries_written(before, after)
        return after

    def _assert_as_expected(self, after: State, expected: reference.Result) -> None:
        assert after.contacts == expected.contacts
        assert after.ledger == expected.ledger

    # The application

    @property
    def _newcomer_kinds(self) -> list[Callable[[st.DataObject], None]]:
        return [self._a_form_is_sent, self._a_profile_is_made, self._an_intake_comes_in, self._somebody_signs_up]

    def _newcomers(self, data: st.DataObject, least: int, most: int) -> None:
        for _ in range(data.draw(st.integers(least, most), label="newcomers")):
            data.draw(st.sampled_from(self._newcomer_kinds), label="newcomer")(data)

    def _somebody_signs_up(self, data: st.DataObject) -> None:
        """Who may get a profile later."""
        self._add_user(data)

    def _a_profile_is_made(self, data: st.DataObject) -> None:
        state = self.world.state()
        waiting = sorted(state.users.keys() - {profile["userId"] for profile in state.profiles.values()})
        user_id = data.draw(st.sampled_from([None, *waiting]), label="who signed up") or self._add_user(data)
        if user_id is None and self.world.generation not in HAS_CLERK_USER_ID:
            return  # every profile has a user there
        profile: dict[str, Any] = {
            "userId": user_id,
            "role": data.draw(self.roles),
            "firstName": data.draw(names),
            "phone": data.draw(st.none() | phones),
            "companyName": data.draw(st.none() | st.just("Lee Ltd")),
            "createdAt": data.draw(moments),
        }
        column = data.draw(st.sampled_from(CODE_COLUMNS))
        profile[column] = self._free_code(data, column)
        if self.world.has_clerk_user_id:
            taken = {row["clerkUserId"] for row in self.world.state().profiles.values()}
            profile["clerkUserId"] = data.draw(st.sampled_from([None, *sorted({"user_a", "user_b"} - taken)]))
        identifier = self.world.add("profiles", **profile)
        self.memory.preparer_came_or_went([identifier, user_id], self.world.state())
        self.memory.codes_changed([profile[column]], self.world.state())

    def _free_code(self, data: st.DataObject, column: str) -> str | None:
        taken = {row[column] for row in self.world.state().profiles.values()}
        return data.draw(st.sampled_from([None, *(code for code in CODES if code not in taken)]), label=column)

    def _a_form_is_sent(self, data: st.DataObject) -> None:
        state = self.world.state()
        self.world.add(
            "leads",
            type=data.draw(st.sampled_from(["CUSTOMER", "TAX_PREPARER", "AFFILIATE"])),
            status=data.draw(statuses),
            email=data.draw(emails),
            firstName=data.draw(names),
            lastName="Lead",
            phone=data.draw(phones),
            lastContactedAt=data.draw(st.none() | moments),
            assignedPreparerId=data.draw(_preparers(state)),
            createdAt=data.draw(moments),
            **data.draw(attributions),
        )

    def _an_intake_comes_in(self, data: st.DataObject) -> None:
        state, year = self.world.state(), data.draw(st.sampled_from([2023, 2024]))
        has_years = self.world.generation in HAS_TAX_YEARS
        taken = {row["email"] for row in state.tax_intake_leads.values() if not has_years or row["tax_year"] == year}
        if not (free := sorted(set(EMAILS) - taken)):
            return
        intake: dict[str, Any] = {
            "email": data.draw(st.sampled_from(free)),
            "first_name": data.draw(names),
            "last_name": "Intake",
            "phone": data.draw(phones),
            "country_code": data.draw(st.sampled_from(["+1", "+52"])),
            "referrerUsername": data.draw(st.sampled_from([None, " ", "ref"])),
            "attributionMethod": data.draw(st.sampled_from([None, "direct", "email_match"])),
            "assignedPreparerId": data.draw(st.sampled_from([None, "", "nobody", *state.profiles, *state.users])),
            "lastContactedAt": data.draw(st.none() | moments),
            "created_at": data.draw(moments),
        }
        if self.world.generation in HAS_CONVERSIONS:
            intake["profileId"] = data.draw(st.sampled_from([None, *state.profiles]))
            intake["convertedToClient"] = data.draw(st.booleans())
        if has_years:
            intake |= {"tax_year": year, "unqualified": data.draw(st.sampled_from([False, False, True]))}
        self.world.add("tax_intake_leads", **intake)
        self.memory.intakes_came_or_went(intake, state=state)

    @precondition(lambda self: self._possible_changes())
    @rule(data=st.data())
    def a_source_row_changes(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._possible_changes()), label="what")(data)

    def _possible_changes(self) -> list[Callable[[st.DataObject], None]]:
        state = self.world.state()
        changes: list[Callable[[st.DataObject], None]] = []
        if state.leads:
            changes += [self._a_lead_changes]
        if state.tax_intake_leads:
            changes += [self._an_intake_changes, self._an_intake_expires]
        if state.profiles:
            changes += [self._a_profile_changes, self._a_profile_is_deleted]
            changes += [self._a_client_is_assigned, self._a_profile_gets_a_code]
        if state.users:
            changes += [self._an_account_gets_another_email]
        if any(row["userId"] is None for row in state.profiles.values()):
            changes += [self._a_profile_gets_an_email]
        return changes

    def _a_lead_changes(self, data: st.DataObject) -> None:
        state = self.world.state()
        lead = data.draw(st.sampled_from(sorted(state.leads)), label="lead")
        reassignments = st.fixed_dictionaries({"assignedPreparerId": _preparers(state)})
        change = data.draw(lead_changes | reassignments, label="change")
        if change is None:
            self.world.delete("leads", lead)
        else:
            self.world.change("leads", lead, **change)
        self.memory.row_changed(f"leads:{lead}")

    def _an_intake_changes(self, data: st.DataObject) -> None:
        state, intake = self.world.state(), self._an_intake(data)
        changes: list[st.SearchStrategy[dict[str, Any]]] = [
            st.fixed_dictionaries({"phone": phones}),
            st.fixed_dictionaries({"assignedPreparerId": st.sampled_from([None, "nobody", *state.profiles])}),
            st.fixed_dictionaries({"lastContactedAt": moments}),
        ]
        if self.world.generation in HAS_CONVERSIONS:
            profiles = st.sampled_from([None, *state.profiles])
            changes.append(st.fixed_dictionaries({"convertedToClient": st.just(value=True), "profileId": profiles}))
        change = data.draw(st.one_of(changes), label="change")
        before = state.tax_intake_leads[intake]
        self.world.change("tax_intake_leads", intake, **change)
        self.memory.intakes_came_or_went(before, before | change, state=state)
        self.memory.row_changed(f"tax_intake_leads:{intake}")

    def _an_intake_expires(self, data: st.DataObject) -> None:
        state, intake = self.world.state(), self._an_intake(data)
        self.world.delete("tax_intake_leads", intake)
        self.memory.intakes_came_or_went(state.tax_intake_leads[intake], state=state)
        self.memory.row_changed(f"tax_intake_leads:{intake}")

    def _an_intake(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.world.state().tax_intake_leads)), label="intake")

    def _a_profile_changes(self, data: st.DataObject) -> None:
        profile = data.draw(st.sampled_from(sorted(self.world.state().profiles)), label="profile")
        change = data.draw(profile_changes | st.fixed_dictionaries({"role": self.roles}), label="change")
        self._change_profile(profile, change)

    def _change_profile(self, profile: str, change: dict[str, Any]) -> None:
        """Its role decides whether its codes are a preparer's."""
        was = self.world.state().profiles[profile]
        self.world.change("profiles", profile, **change)
        self.memory.row_changed(f"profiles:{profile}")
        if change.keys() & {"role", *CODE_COLUMNS}:
            self.memory.codes_changed(
                [row[name] for row in (was, was | change) for name in CODE_COLUMNS], self.world.state()
            )

    def _a_profile_gets_a_code(self, data: st.DataObject) -> None:
        profile = data.draw(st.sampled_from(sorted(self.world.state().profiles)), label="profile")
        column = data.draw(st.sampled_from(CODE_COLUMNS), label="column")
        self._change_profile(profile, {column: self._free_code(data, column)})

    def _a_client_is_assigned(self, data: st.DataObject) -> None:
        """To another preparer, mostly; or to none, or to one more."""
        state = self.world.state()
        client = data.draw(st.sampled_from(sorted(state.profiles)), label="client")
        preparer = data.draw(st.sampled_from([None, *sorted(state.profiles)]), label="preparer")
        keeps_others = data.draw(st.sampled_from([False, False, True]), label="keeps the others")
        theirs = {row["preparerId"]: row["id"] for row in state.client_preparers.values() if row["clientId"] == client}
        for other, identifier in theirs.items():
            if other != preparer and not keeps_others:
                self.world.change("client_preparers", identifier, isActive=False)
        at = data.draw(moments, label="assigned at")
        if preparer in theirs:
            self.world.change("client_preparers", theirs[preparer], isActive=True, assignedAt=at)
        elif preparer is not None:
            self.world.add("client_preparers", clientId=client, preparerId=preparer, isActive=True, assignedAt=at)
        self.memory.client_assigned(client)

    def _a_profile_gets_an_email(self, data: st.DataObject) -> None:
        state = self.world.state()
        without = sorted(row["id"] for row in state.profiles.values() if row["userId"] is None)
        if user_id := self._add_user(data):
            profile = data.draw(st.sampled_from(without), label="profile")
            self.world.change("profiles", profile, userId=user_id)
            self.memory.row_changed(f"profiles:{profile}")
            self.memory.preparer_came_or_went([user_id], state)

    def _an_account_gets_another_email(self, data: st.DataObject) -> None:
        state = self.world.state()
        email = self._free_email(data, "users")
        if email is not None:
            user = data.draw(st.sampled_from(sorted(state.users)), label="user")
            self.world.change("users", user, email=email)
            self.memory.account_changed(user, state)

    def _a_profile_is_deleted(self, data: st.DataObject) -> None:
        with_account = data.draw(st.booleans(), label="with its account")
        state = self.world.state()
        profile = data.draw(st.sampled_from(sorted(state.profiles)), label="profile")
        user_id = state.profiles[profile]["userId"]
        if with_account and user_id:
            self.world.delete("users", user_id)
            self.memory.row_changed(f"users:{user_id}")
        else:
            self.world.delete("profiles", profile)
        self.memory.row_changed(f"profiles:{profile}")
        self.memory.preparer_came_or_went([profile, user_id], state)
        # Its intakes lose it, and with it what tells that they are of one person.
        theirs = [row for row in state.tax_intake_leads.values() if row.get("profileId") == profile]
        self.memory.intakes_came_or_went(*theirs, state=state)
        self.memory.codes_changed([state.profiles[profile][name] for name in CODE_COLUMNS], state)

    def _add_user(self, data: st.DataObject) -> str | None:
        """A new account, or None."""
        email = self._free_email(data, "users")
        return None if email is None else self.world.add("users", email=email)

    def _free_email(self, data: st.DataObject, table: str) -> str | None:
        state = self.world.state()
        rows = state.users if table == "users" else state.contacts
        taken = {row["email"] for row in rows.values()}
        return data.draw(st.sampled_from([None, *(email for email in (*EMAILS, "") if email not in taken)]))

    # People in the CRM

    @rule(data=st.data())
    def a_contact_is_made_by_hand(self, data: st.DataObject) -> None:
        state, email = self.world.state(), self._free_email(data, "crm_contacts")
        if not email:
            return
        accounts = set(state.users) - {contact["userId"] for contact in state.contacts.values()}
        contact = self.world.add(
            "crm_contacts",
            email=email,
            userId=data.draw(st.sampled_from([None, *sorted(accounts)])),
            contactType="LEAD",
            firstName="Con",
            lastName="Tact",
            phone=data.draw(st.none() | phones),
            createdAt=self.world.now(),
        )
        self.memory.theirs.add(contact)

    @precondition(lambda self: self.world.state().contacts)
    @rule(data=st.data())
    def somebody_edits_a_contact(self, data: st.DataObject) -> None:
        edits = [
            self._a_contact_is_edited,
            self._a_contact_is_saved,
            self._a_contact_gets_another_key,
            self._a_contact_enters_another_stage,
        ]
        data.draw(st.sampled_from(edits), label="how")(data)

    @precondition(lambda self: self.world.state().contacts)
    @rule(data=st.data())
    def somebody_talks_to_a_contact_or_deletes_it(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([self._a_note_is_written, self._a_contact_is_deleted]), label="what")(data)

    def _a_contact_is_edited(self, data: st.DataObject) -> None:
        self._save(self._a_contact(data), **data.draw(contact_edits, label="edit"))

    def _a_contact_is_saved(self, data: st.DataObject) -> None:
        """Without a change that the backfill knows of, so that `updatedAt` alone tells."""
        contact, state = self._a_contact(data), self.world.state()
        self.world.change("crm_contacts", contact, **data.draw(st.sampled_from([{}, {"taxYear": 2024}]), label="edit"))
        self.memory.contact_saved(contact, {}, state)

    def _a_contact_gets_another_key(self, data: st.DataObject) -> None:
        state, contact, email = self.world.state(), self._a_contact(data), self._free_email(data, "crm_contacts")
        free = sorted(set(state.users) - {contact["userId"] for contact in state.contacts.values()})
        self._save(contact, **({"email": email} if email else {"userId": free[0]} if free else {}))

    def _a_contact_enters_another_stage(self, data: st.DataObject) -> None:
        contact = self._a_contact(data)
        stage = data.draw(st.sampled_from(self.world.stages))
        was = self.world.state().contacts[contact]["stage"]
        self._save(contact, stage=stage, stageEnteredAt=self.world.now())
        self.world.add("crm_stage_history", contactId=contact, fromStage=was, toStage=stage)

    def _a_note_is_written(self, data: st.DataObject) -> None:
        contact = self._a_contact(data)
        self.world.add("crm_interactions", contactId=contact, type="NOTE")
        if data.draw(st.booleans(), label="saves the contact"):
            self._save(contact, lastContactedAt=self.world.now())

    def _a_contact_is_deleted(self, data: st.DataObject) -> None:
        contact, state = self._a_contact(data), self.world.state()
        self.world.delete("crm_contacts", contact)
        self.memory.contact_deleted(contact, state)

    def _a_contact(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.world.state().contacts)), label="contact")

    def _save(self, contact: str, **columns: Any) -> None:
        state = self.world.state()
        self.world.change("crm_contacts", contact, **columns)
        self.memory.contact_saved(contact, columns, state)

    # What always holds

    @invariant()
    def a_verification_finds_exactly_what_happened(self) -> None:
        state = self.world.look()
        report = verify(connection)
        found = {
            Found(finding.check.value, finding.kind.value, finding.row, finding.contact_id, frozenset(finding.columns))
            for finding in report.findings.kept
        }
        assert found == expectations.findings(state, self.memory)
        assert report.defects == 0
        counted = expectations.census(state)
        assert report.row_counts.balances
        assert {
            "excluded": sum(report.row_counts.excluded.values()),
            "in_ledger": report.row_counts.in_ledger,
            "pending": sum(report.row_counts.pending.values()),
        } == counted


def _preparers(state: State) -> st.SearchStrategy[str | None]:
    """What a lead may name as its preparer."""
    return st.sampled_from([None, "", "nobody", *state.profiles, *state.users])


def _expected(
    state: State, only: Any = None, limit: int | None = None, *, with_signups: bool = False
) -> reference.Result:
    return reference.backfill(
        state.population,
        ledger=state.ledger,
        only=only,
        limit=limit,
        resolutions=state.resolutions,
        with_signups=with_signups,
    )


def _counts(answer: dict[str, Any]) -> dict[str, int]:
    return {name: answer[name] for name in ("read", "created", "merged", "exists", "error", "error_new", "already")}


def _expected_counts(expected: reference.Result) -> dict[str, int]:
    return _counts(vars(expected.counts))


def _looks(answer: dict[str, Any]) -> dict[str, Any]:
    names = ("revisited", "updated", "kept", "unchanged", "updated_and_kept", "updated_by_column", "kept_by_column")
    return _counts(answer) | {name: answer[name] for name in names}


def _as_the_judge_of_second_looks_sees_it(state: State) -> reference_update.World:
    world = reference_update.World(
        dict(state.contacts), state.ledger, dict(state.seen), dict(state.seen_preparer), set(state.looked)
    )
    for contact_id, entry in state.creators().items():
        world.made[contact_id] = reference_update.Made(entry.updated_at, set(expectations.columns_of(entry)))
    for contact_id in state.contacts:
        world.given[contact_id] = {name for update in state.updates_of(contact_id) for name in update.filled}
        world.left[contact_id] = {update.contact_updated_at for update in state.updates_of(contact_id)}
        merged = state.merged_into(contact_id)
        world.merged_in[contact_id] = {column for entry in merged for column in expectations.columns_of(entry)}
    return world


@pytest.mark.hypothesis
@pytest.mark.parametrize("generation", GENERATIONS)
def test_whatever_happens_in_whatever_order_nothing_is_lost_and_nothing_is_hidden(
    database: Database, generation: str
) -> None:
    class Example(Machine):
        def __init__(self) -> None:
            super().__init__(database, generation)

    run_state_machine_as_test(
        Example,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=True,
        ),
    )

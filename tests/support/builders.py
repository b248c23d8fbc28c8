"""Rows of the application's tables, one at a time: what a test does not name is plausible and the same everywhere."""

from __future__ import annotations

import itertools
from typing import Any

from django.db import connection

from tests.support.populations import read_contacts, read_ledger
from tests.support.reference import Entry, Row, address_of

CREATED_AT = "2025-01-02 03:04:05.678"
UPDATED_AT = "2025-02-03 04:05:06.789"
ASSIGNED_AT = "2025-03-04 05:06:07.891"
LATER = "2025-06-07 08:09:10.111"

_numbers = itertools.count(1)


def add_user(email: str, **columns: Any) -> str:
    """An account of the application; returns its id."""
    return _insert(
        "users", {"id": _new_id(), "email": email, "createdAt": CREATED_AT, "updatedAt": UPDATED_AT}, columns
    )


def add_profile(role: str = "CLIENT", *, email: str | None = None, **columns: Any) -> str:
    """A profile, with a user of its own when there is an email; returns its id."""
    profile = {
        "id": _new_id(),
        "userId": None if email is None else add_user(email),
        "role": role,
        "firstName": "Pat",
        "lastName": "Profile",
        "createdAt": CREATED_AT,
        "updatedAt": UPDATED_AT,
    }
    return _insert("profiles", profile, columns)


def add_lead(email: str, status: str = "NEW", **columns: Any) -> str:
    """A lead of type CUSTOMER; returns its id."""
    lead = {
        "id": _new_id(),
        "type": "CUSTOMER",
        "status": status,
        "firstName": "Lee",
        "lastName": "Lead",
        "email": email,
        "phone": "555 0100",
        "createdAt": CREATED_AT,
        "updatedAt": UPDATED_AT,
    }
    return _insert("leads", lead, columns)


def add_intake(email: str, **columns: Any) -> str:
    """An intake; returns its id."""
    intake = {
        "id": _new_id(),
        "first_name": "Ina",
        "last_name": "Intake",
        "email": email,
        "phone": "555 0100",
        "created_at": CREATED_AT,
        "updated_at": UPDATED_AT,
    }
    return _insert("tax_intake_leads", intake, columns)


def assign_client(client: str, preparer: str, **columns: Any) -> str:
    """An active preparer of a client, both by their profiles; returns the id of the row that says so."""
    row = {"id": _new_id(), "clientId": client, "preparerId": preparer, "assignedAt": ASSIGNED_AT}
    return _insert("client_preparers", row, columns)


def add_contact(email: str, **columns: Any) -> str:
    """A contact that somebody made in the CRM; returns its id."""
    contact = {
        "id": _new_id(),
        "contactType": "LEAD",
        "firstName": "Con",
        "lastName": "Tact",
        "email": email,
        "createdAt": CREATED_AT,
        "updatedAt": UPDATED_AT,
    }
    return _insert("crm_contacts", contact, columns)


def add_many_leads(count: int, status: str = "NEW", *, first: int = 1) -> None:
    """So many leads of as many people, whose numbers begin with `first`; one person's leads share the address."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO leads (id, type, status, "firstName", "lastName", email, phone, "createdAt", "updatedAt")
            SELECT lower(%(status)s) || lpad(n::text, 12, '0'), 'CUSTOMER', %(status)s::"LeadStatus", 'Lee', 'Lead',
                   'person-' || n || '@example.com', '555 0100', %(created)s, %(updated)s
              FROM generate_series(%(first)s::int, %(first)s::int + %(count)s::int - 1) AS n
            """,
            {"status": status, "first": first, "count": count, "created": CREATED_AT, "updated": UPDATED_AT},
        )


def add_many_contacts(count: int) -> None:
    """Contacts that somebody made in the CRM, with the addresses of the people of `add_many_leads`."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO crm_contacts (id, "contactType", "firstName", "lastName", email, "createdAt", "updatedAt")
            SELECT 'contact' || n, 'LEAD', 'Con', 'Tact', 'person-' || n || '@example.com', %s, %s
              FROM generate_series(1, %s) AS n
            """,
            [CREATED_AT, UPDATED_AT, count],
        )


def contacts() -> dict[str, Row]:
    """The contacts by id, under the database's own column names."""
    with connection.cursor() as cursor:
        return read_contacts(cursor)


def contact_with(email: str) -> Row:
    """The one contact whose address this is, in whatever spelling."""
    (found,) = (contact for contact in contacts().values() if address_of(contact["email"]) == email)
    return found


def ledger() -> dict[str, Entry]:
    """The ledger by row reference."""
    with connection.cursor() as cursor:
        return read_ledger(cursor)


def _new_id() -> str:
    return f"c{next(_numbers):024d}"


def _insert(table: str, row: Row, columns: Row) -> str:
    row = row | columns
    names = ", ".join(f'"{column}"' for column in row)
    values = ", ".join(["%s"] * len(row))
    with connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO {table} ({names}) VALUES ({values})", list(row.values()))
    return str(row["id"])


def change(table: str, row: str, **columns: Any) -> None:
    """The application, or a person in it, writes a row: `updatedAt` moves along."""
    columns = {"updated_at" if table == "tax_intake_leads" else "updatedAt": LATER} | columns
    assignments = ", ".join(f'"{column}" = %s' for column in columns)
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE {table} SET {assignments} WHERE id = %s", [*columns.values(), row])
        assert cursor.rowcount == 1

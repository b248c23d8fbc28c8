"""The history of one person: rows, contacts, ledger entries, updates, resolutions, runs and rollbacks. Only reads.

A trace starts from a contact, a source row or an address, and follows the tables of the backfill to everything that is
connected with it. It contains ids of rows and contacts, runs, outcomes, columns and times, but no personal data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.errors import OperatorError
from crm.models.ledger import RunStatus
from crm.outcome import Outcome, Source
from crm.postgres.facts.schema import DatabaseFacts, examine
from crm.postgres.loaders import read_as_text
from crm.postgres.snapshot import snapshot
from crm.repair.rules import PREPARER
from crm.rules.addresses import canonical_address, canonical_address_sql, trimmed_address_sql
from crm.rules.mapping import contact_id_sql, normalised_email
from crm.rules.row_reference import RowReference, table_sql
from crm.rules.source_rows import SOURCE_TABLES

#: The maximum number of listed rollbacks that may have reversed a row or an update here, of which they keep no record.
MAX_ROLLBACKS = 20

_CONTACTS_OF_ADDRESS = f"SELECT id FROM crm_contacts WHERE {canonical_address_sql('email')} = %s"
_ROWS_OF_ADDRESS = {
    "profiles": f"""
SELECT 'profiles', p.id FROM users u JOIN profiles p ON p."userId" = u.id WHERE {canonical_address_sql("u.email")} = %s
""",
    **{
        table: f"SELECT '{table}', id FROM {table} WHERE {canonical_address_sql('email')} = %s"
        for table in ("leads", "tax_intake_leads")
    },
    "users": f"""
SELECT 'users', id FROM users WHERE {canonical_address_sql("email")} = %s
   AND (NOT EXISTS (SELECT FROM profiles WHERE profiles."userId" = users.id)
        OR EXISTS (SELECT FROM ledger_entry WHERE source = 'signups' AND source_id = users.id))
""",
}
_ROWS_OF_OWN_ADDRESS = f"""
SELECT 'profiles', p.id FROM profiles p LEFT JOIN users u ON u.id = p."userId"
 WHERE {canonical_address_sql("p.email")} = %s AND COALESCE({trimmed_address_sql("u.email")}, '') = ''
"""
_RESOLVED_FOR_ADDRESS = 'SELECT "row" FROM conflict_decision WHERE separate_email = %s'
_CONTACTS = 'SELECT id, "createdAt", "updatedAt" FROM crm_contacts WHERE id = ANY(%s) ORDER BY id'
# Three parts, so that each can use an index: by key, by contact, and the few errors.
_ENTRIES = f"""
SELECT {table_sql("entry")}, source_id, id, source, outcome, reason, contact_id, filled, run_id, source_updated_at,
       seen_updated_at, sqlstate, "constraint", "column", "table", "trigger"
  FROM (SELECT * FROM ledger_entry WHERE id = ANY(%(keys)s)
         UNION
        SELECT * FROM ledger_entry WHERE contact_id = ANY(%(contacts)s) AND outcome IN ('merged', 'exists')
         UNION
        SELECT * FROM ledger_entry WHERE contact_id = ANY(%(contacts)s) AND outcome = 'error') entry
 ORDER BY run_id, id
"""
_UPDATES = f"""
SELECT {table_sql("change")}, source_id, contact_id, run_id, columns, from_type, to_type, from_stage, to_stage
  FROM contact_update change
 WHERE contact_id = ANY(%(contacts)s) OR (line_id = ANY(%(keys)s) AND columns <> '{PREPARER}') ORDER BY id
"""
_RESOLUTIONS = """
SELECT "row", contact_id, decided_at FROM conflict_decision
 WHERE id = ANY(%(keys)s) OR contact_id = ANY(%(contacts)s) ORDER BY decided_at
"""
_ROWS = 'SELECT id, {label}::text, r."{created_at}", {updated_at} FROM {table} r WHERE id = ANY(%s)'
# A scan of whole tables: only for contacts of which nothing else is known.
_ROWS_THAT_WOULD_MAKE = {
    table: f"SELECT '{table}', id FROM {table} WHERE {contact_id_sql(computed)} = ANY(%(contacts)s)"
    for table in SOURCE_TABLES
    for computed in [f"'{table}:' || id"]
}
_IS_COMPUTED = re.compile("c[0-9a-f]{24}")
_RUNS = """
SELECT id, kind, status, started_at, finished_at, version FROM backfill_run WHERE id = ANY(%s) ORDER BY id
"""
_ROLLBACKS = """
SELECT of_id, run_id, status, started_at, updates_reversed, of_id = ANY(%(runs)s)
  FROM rollback JOIN backfill_run run ON run.id = run_id
 WHERE of_id = ANY(%(runs)s)
    OR run_id IN (SELECT run_id FROM rollback JOIN backfill_run run ON run.id = run_id
                   WHERE (%(is_pending)s OR updates_reversed > 0)
                     AND started_at >= COALESCE((SELECT min(moment::timestamp) FROM unnest(%(created)s::text[]) moment)
                                                AT TIME ZONE 'UTC', '-infinity')
                   ORDER BY run_id DESC LIMIT %(most)s)
 ORDER BY run_id
"""

Found = dict[str, Any]


@dataclass(slots=True)
class _Trail:
    """The contacts and rows that were found so far."""

    contacts: set[str] = field(default_factory=set)
    rows: set[RowReference] = field(default_factory=set)

    @property
    def keys(self) -> list[str]:
        """The keys of the rows' ledger entries, and of the entries that created the contacts."""
        return sorted({row.entry_id for row in self.rows} | self.contacts)


def trace_reference(connection: BaseDatabaseWrapper, text: str) -> dict[str, Any]:
    """Return the trace of a contact, given by its id, or of a source row, given by its reference.

    Raises OperatorError for an email address, which other users could read in the process list, and if the database
    does not meet the requirements.
    """
    _require_text(text)
    if text.partition(":")[0] in SOURCE_TABLES and ":" in text:
        return _trace(connection, _Trail(rows={RowReference.parse(text)}))
    if "@" in text:
        raise OperatorError(
            "An email address cannot be an argument, because every user of this machine could read it: write - "
            "instead, and give the address on standard input."
        )
    if ":" in text:
        # Raises OperatorError with the names of the tables.
        RowReference.parse(text)
    return _trace(connection, _Trail(contacts={text}))


def trace_address(connection: BaseDatabaseWrapper, text: str) -> dict[str, Any]:
    """Return the trace of the person with an email address, in any spelling.

    Raises OperatorError for text that is not a plain address, unless that exact text is stored somewhere, and if the
    database does not meet the requirements.
    """
    _require_text(text)
    address = canonical_address(text)
    if not address:
        raise OperatorError("There is no email address on standard input.")
    trace = _trace(connection, _Trail(), address)
    if not trace["found"] and normalised_email(text) is None:
        raise OperatorError(
            "The text on standard input is not a plain email address, and is not stored anywhere: give the address "
            "without a name, < > or mailto:."
        )
    return trace


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OperatorError("The text is not valid UTF-8.") from None
    if "\0" in text:
        raise OperatorError("The text contains NUL, which PostgreSQL cannot store.")


def _trace(connection: BaseDatabaseWrapper, trail: _Trail, address: str | None = None) -> dict[str, Any]:
    with snapshot(connection):
        facts = examine(connection, for_writing=False)
        if not facts.has_ledger:
            raise OperatorError(
                "There is no ledger that this role may read, so there is nothing to trace: run `python manage.py "
                "migrate` and `backfill_crm_contacts` first, or GRANT SELECT on its tables."
            )
        reader = _Reader(connection, facts)
        if address is not None:
            reader.add_people_of(trail, address)
        trace = reader.follow(trail)
        # After a rollback, no entry names the contact that it deleted, but the row that created it still exists.
        unknown = [contact["contact_id"] for contact in trace["contacts"] if contact["state"] == "unknown"]
        return reader.follow(trail) if reader.add_rows_that_would_make(trail, unknown) else trace


@dataclass(frozen=True, slots=True)
class _Reader:
    connection: BaseDatabaseWrapper
    facts: DatabaseFacts

    def add_people_of(self, trail: _Trail, address: str) -> None:
        trail.contacts.update(contact for (contact,) in self._rows(_CONTACTS_OF_ADDRESS, [address]))
        queries = [_ROWS_OF_ADDRESS[table] for table in self.facts.tables]
        if "profiles.email" not in self.facts.missing:
            queries.append(_ROWS_OF_OWN_ADDRESS)
        rows = self._rows(" UNION ALL ".join(queries), [address] * len(queries))
        trail.rows.update(RowReference(*row) for row in rows)
        trail.rows.update(RowReference.parse(row) for (row,) in self._rows(_RESOLVED_FOR_ADDRESS, [address]))

    def add_rows_that_would_make(self, trail: _Trail, contacts: Iterable[str]) -> bool:
        """Add the rows from which the ids of contacts are derived. Return whether there are any."""
        if not (ids := [contact for contact in contacts if _IS_COMPUTED.fullmatch(contact)]):
            return False
        query = " UNION ALL ".join(_ROWS_THAT_WOULD_MAKE[table] for table in self.facts.tables)
        rows = {RowReference(*row) for row in self._rows(query, {"contacts": ids})}
        trail.rows.update(rows)
        return bool(rows)

    def follow(self, trail: _Trail) -> dict[str, Any]:
        """Follow rows to contacts and back until there is nothing new, and return the trace."""
        before: tuple[int, int] | None = None
        entries: list[Found] = []
        updates: list[Found] = []
        resolutions: list[Found] = []
        while before != (len(trail.contacts), len(trail.rows)):
            before = len(trail.contacts), len(trail.rows)
            asked = {"keys": trail.keys, "contacts": sorted(trail.contacts)}
            entries = [_entry(row) for row in self._rows(_ENTRIES, asked)]
            updates = [_update(row) for row in self._rows(_UPDATES, asked)]
            resolutions = [_resolution(row) for row in self._rows(_RESOLUTIONS, asked)]
            found = [*entries, *updates, *resolutions]
            trail.rows.update(RowReference.parse(each["row"]) for each in found if not _is_of_preparer(each))
            trail.contacts.update(each["contact_id"] for each in found if each["contact_id"] is not None)
        by_row = {entry["row"]: entry for entry in entries}
        contacts = self._contacts(trail, entries)
        rows = self._source_rows(trail.rows, by_row)
        runs = sorted({each["run"] for each in (*entries, *updates)})
        names = ("rolls_back", "run", "status", "started_at", "updates_reversed", "run_stands_here")
        created = [row["created_at"] for row in rows]
        asked_of_rollbacks = {
            "runs": runs,
            "is_pending": any(row["state"] == "pending" for row in rows),
            # The creation time of a row that no longer exists is unknown.
            "created": [] if None in created else created,
            "most": MAX_ROLLBACKS,
        }
        rollbacks = [dict(zip(names, each, strict=True)) for each in self._rows(_ROLLBACKS, asked_of_rollbacks)]
        return {
            "found": bool(entries or updates or resolutions)
            or any(contact["state"] != "unknown" for contact in contacts)
            or any(row["state"] != "unknown" for row in rows),
            "contacts": contacts,
            "rows": rows,
            "lines": entries,
            "updates": updates,
            "decisions": resolutions,
            "runs": [
                dict(zip(("run", "kind", "status", "started_at", "finished_at", "version"), run, strict=True))
                for run in self._rows(_RUNS, [runs])
            ],
            "rollbacks": rollbacks,
        }

    def _contacts(self, trail: _Trail, entries: Iterable[Found]) -> list[Found]:
        """Return the contacts, including existing ones that have the derived id of a row but no ledger entry."""
        there = {contact: moments for contact, *moments in self._rows(_CONTACTS, [trail.keys])}
        made_by = {entry["contact_id"]: entry["row"] for entry in entries if entry["outcome"] == Outcome.CREATED}
        known = {entry["contact_id"] for entry in entries}
        return [
            {
                "contact_id": contact,
                "state": "there" if contact in there else "deleted" if contact in known else "unknown",
                "made_by": made_by.get(contact),
                "created_at": there[contact][0] if contact in there else None,
                "updated_at": there[contact][1] if contact in there else None,
            }
            for contact in sorted(trail.contacts | there.keys())
        ]

    def _source_rows(self, rows: Iterable[RowReference], entries: Mapping[str, Found]) -> list[Found]:
        there: dict[RowReference, tuple[str | None, ...]] = {}
        for table in self.facts.tables:
            source_table = SOURCE_TABLES[table]
            query = _ROWS.format(
                label=source_table.label_sql(self.facts.missing),
                created_at=source_table.own["created_at"].column,
                updated_at=source_table.updated_at,
                table=table,
            )
            ids = [row.source_id for row in rows if row.table == table]
            for source_id, *values in self._rows(query, [ids]) if ids else ():
                there[RowReference(table, source_id)] = tuple(values)
        found = []
        for row in sorted(rows):
            label, created_at, updated_at = there.get(row, (None, None, None))
            source = self.facts.source_of(row.table, label) if row in there else None
            found.append(
                {
                    "row": str(row),
                    "state": self._state(row, entries.get(str(row)), label, is_there=row in there, source=source),
                    "source": source.value if source else None,
                    "created_at": created_at,
                    "updated_at": updated_at,
                }
            )
        return found

    def _state(
        self, row: RowReference, entry: Found | None, label: str | None, *, is_there: bool, source: Source | None
    ) -> str:
        """Return the state of a row."""
        if not is_there:
            return "gone" if entry else "unknown"
        if source is None or (source.is_of_signups and not entry):
            return f"excluded ({self.facts.exclusion(row.table, label)})"
        return "in the ledger" if entry else "pending"

    def _rows(self, query: str, parameters: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            return list(cursor.fetchall())


def _entry(row: tuple[Any, ...]) -> Found:
    table, source_id, key, source, outcome, reason, contact, filled, run, settled_at, seen_at, *refusal = row
    names = ("sqlstate", "constraint", "column", "table", "trigger")
    return {
        "row": f"{table}:{source_id}",
        "line": key,
        "source": source,
        "outcome": outcome,
        "reason": reason,
        "contact_id": contact,
        "filled": filled.split(",") if filled else [],
        "run": run,
        "row_updated_at": settled_at,
        "row_seen_at": seen_at,
        "refusal": {name: value for name, value in zip(names, refusal, strict=True) if value is not None},
    }


def _is_of_preparer(found: Found) -> bool:
    """Return whether the row of an update is that of the contact's preparer, who is another person."""
    return bool(found.get("columns") == [PREPARER])


def _update(row: tuple[Any, ...]) -> Found:
    table, source_id, contact, run, columns, from_type, to_type, from_stage, to_stage = row
    return {
        "row": f"{table}:{source_id}",
        "contact_id": contact,
        "run": run,
        "columns": columns.split(","),
        "type": [from_type, to_type] if to_type else None,
        "stage": [from_stage, to_stage] if to_stage else None,
    }


def _resolution(row: tuple[Any, ...]) -> Found:
    reference, contact, decided_at = row
    # The address of the row's own contact is personal data, so the trace only shows that there is one.
    return {"row": reference, "contact_id": contact, "is_separate": contact is None, "decided_at": decided_at}


def as_lines(trace: Mapping[str, Any]) -> list[str]:
    """Return a trace as lines of text: contacts, rows with their entries, updates, resolutions, runs, rollbacks."""
    return [
        *map(_contact_line, trace["contacts"]),
        *(line for row in trace["rows"] for line in _row_lines(row, trace["lines"])),
        *map(_update_line, trace["updates"]),
        *map(_resolution_line, trace["decisions"]),
        *map(_run_line, trace["runs"]),
        *map(_rollback_line, trace["rollbacks"]),
    ]


def _contact_line(contact: Found) -> str:
    made_by = f"created by {contact['made_by']}" if contact["made_by"] else "not created by the backfill"
    state = {
        "there": f"in the CRM, {made_by}, created {_utc(contact['created_at'])}, updated {_utc(contact['updated_at'])}",
        "deleted": f"deleted from the CRM, {made_by}; only --recreate-deleted recreates it",
        "unknown": "not in the CRM, and no ledger entry names it",
    }[contact["state"]]
    return f"Contact {contact['contact_id']}: {state}"


def _row_lines(row: Found, entries: Iterable[Found]) -> list[str]:
    state = {
        "gone": "no longer in the source",
        "unknown": "neither in the source nor in the ledger",
        "pending": "pending: no run has migrated it, or a rollback reversed it; the next run migrates it",
    }.get(row["state"], row["state"])
    head = f"Row {row['row']}: {state}"
    if row["updated_at"] is not None:
        head += f", updated {_utc(row['updated_at'])}"
    return [head, *(f"  {_entry_line(entry)}" for entry in entries if entry["row"] == row["row"])]


def _entry_line(entry: Found) -> str:
    line = f"Run {entry['run']}, {entry['source']}: {entry['outcome']}"
    if entry["reason"]:
        line += f" {entry['reason']}"
    if entry["contact_id"]:
        line += f", contact {entry['contact_id']}"
    if entry["filled"]:
        line += f", filled {', '.join(entry['filled'])}"
    line += "".join(f", {name} {value}" for name, value in entry["refusal"].items())
    if entry["row_seen_at"]:
        line += f"; revisited with updatedAt {_utc(entry['row_seen_at'])}"
    return line


def _update_line(update: Found) -> str:
    line = f"Update in run {update['run']} of contact {update['contact_id']} from {update['row']}: "
    line += ", ".join(update["columns"])
    steps = [f"{step[0]} -> {step[1]}" for step in (update["type"], update["stage"]) if step]
    return f"{line} ({', '.join(steps)})" if steps else line


def _resolution_line(resolution: Found) -> str:
    whose = "its own contact" if resolution["is_separate"] else f"contact {resolution['contact_id']}"
    return f"Resolution of {resolution['row']} at {_utc(resolution['decided_at'])}: {whose}"


def _run_line(run: Found) -> str:
    started = _utc(run["started_at"])
    return f"Run {run['run']}: {run['kind']}, {run['status']}, started {started}, version {run['version']}"


def _rollback_line(rollback: Found) -> str:
    by, of = rollback["run"], rollback["rolls_back"]
    reversed_updates = rollback["updates_reversed"]
    updates = f", reversed {_updates(reversed_updates)}" if reversed_updates else ""
    head = f"Run {by}: rollback of run {of}, {rollback['status']}, started {_utc(rollback['started_at'])}{updates}. "
    if rollback["run_stands_here"]:
        verb = "were kept" if rollback["status"] == RunStatus.FINISHED else "are still in place"
        return f"{head}The changes of run {of} above {verb}"
    return f"{head}It may have reversed something here: rollbacks keep no record of single rows"


def _updates(count: int) -> str:
    return f"{count:,} {'update of a contact' if count == 1 else 'updates of contacts'}"


def _utc(moment: str | None) -> str:
    """Format PostgreSQL's text of a timestamp in UTC, with or without an offset."""
    return f"{moment.removesuffix('+00')} UTC" if moment else "an unknown time"

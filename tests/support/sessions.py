"""Every command of ours on a database that is not what it should be, and what it then says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from manage import main
from tests.support.commands import Finished, ended
from tests.support.processes import session
from tests.support.scratch import as_the_default

#: Every command that touches the database; the number of a run need not exist.
COMMANDS = (
    ("backfill_crm_contacts", "--no-progress"),
    ("backfill_crm_contacts", "--dry-run", "--no-progress"),
    ("backfill_crm_contacts", "--update", "--no-progress"),
    ("rollback_crm_backfill", "1", "--no-progress"),
    ("rollback_crm_backfill", "1", "--dry-run"),
    ("repair_crm_contacts", "--types", "--no-progress"),
    ("repair_crm_contacts", "--types", "--apply", "--no-progress"),
    ("verify_crm_contacts",),
    ("backfill_runs", "list"),
    ("backfill_runs", "cancel", "1"),
    ("backfill_runs", "watch", "1"),
    ("trace_contact", "c1"),
    ("export_backfill_errors",),
    ("resolve_crm_conflict", "leads:1", "--contact", "c1"),
    ("check", "--database", "default"),
    ("migrate",),
    ("load_sample_data", "--people", "1"),
)


def assert_refused(finished: tuple[int, str], *named: str) -> None:
    code, line = finished
    assert code == 2, line
    assert line.count("\n") == 1
    assert [name for name in named if name not in line] == []


def managed(*command: str, url: str) -> Finished:
    """`manage.py` with a command on another URL, in this process."""
    with as_the_default(url):
        return ended(lambda: main(["manage.py", *command]))


def ended_on(url: str, *command: str) -> tuple[int, str]:
    """How `manage.py` ends with a command on another URL, and its line on stderr."""
    finished = managed(*command, url=url)
    return int(str(finished.code)), finished.stderr


@contextmanager
def role_with(**strange: str) -> Iterator[str]:
    """The environment's address of a superuser that has these settings, as far as the server knows them."""
    with session() as owner:
        owner.autocommit = True
        owner.execute("CREATE ROLE strange SUPERUSER LOGIN")
        try:
            for name, value in strange.items():
                if owner.execute("SELECT true FROM pg_settings WHERE name = %s", [name]).fetchone():
                    # A name of one of our own dictionaries.
                    literal = value if name == "search_path" else f"'{value}'"
                    owner.execute(f"ALTER ROLE strange SET {name} = {literal}".encode())
            yield "strange"
        finally:
            owner.execute("DROP ROLE strange")

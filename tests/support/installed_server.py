"""A PostgreSQL that is installed on this machine, such as Debian's, in the place of the embedded one.

`CRM_TEST_SERVER=/usr/lib/postgresql/15/bin` in the environment of pytest. Every process of the tests has a server of
its own, which is started by its first connection and gone with it.
"""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from config import embedded

VARIABLE = "CRM_TEST_SERVER"
#: Where its programs are; empty without it.
PROGRAMS = os.environ.get(VARIABLE, "")
#: PostgreSQL does not run as root; Debian's package makes this user.
OWNER = "postgres"
PORT = "5432"
_OPTIONS = f"-c listen_addresses= -p {PORT} -c fsync=off -c max_connections=100"


def use_where_asked_for() -> None:
    """Let whoever asks for the embedded server have the installed one."""
    if PROGRAMS:
        address = cache(lambda: _start(Path(PROGRAMS)))
        embedded.start = lambda _data: address()  # type: ignore[assignment] # for this process alone


def _start(programs: Path) -> embedded.Address:
    # The path of a socket has to be short.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    as_owner: list[str] = []
    if os.geteuid() == 0:
        owner = pwd.getpwnam(OWNER)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_owner = ["runuser", "-u", OWNER, "--"]

    def run(program: str, *arguments: str) -> None:
        command = [*as_owner, str(programs / program), *arguments]
        # Its log goes to a file: a server that keeps a pipe open would never let go of whoever reads it.
        done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)  # noqa: S603 - the programs that were asked for
        assert done.returncode == 0, done.stderr.decode()

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", embedded.USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N")

    def stop() -> None:
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)

    run("pg_ctl", "-D", data, "-l", str(folder / "log"), "-o", f"{_OPTIONS} -k {folder}", "-w", "start")
    atexit.register(stop)
    address = embedded.Address(host=str(folder), port=PORT)
    embedded._create_database(address)
    return address

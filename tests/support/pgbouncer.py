"""PgBouncer in transaction mode, the real one, before a server."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import embedded

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
PORT = 6432
CONFIGURATION = """
[databases]
* = host={server.host} port={server.port}

[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {folder}
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 1
query_wait_timeout = 20
{more}
"""


@contextmanager
def pgbouncer(server: embedded.Address, role: str, more: str = "") -> Iterator[Path]:
    """PgBouncer before the server, with more of a configuration if need be; where its socket lies."""
    assert PGBOUNCER is not None
    # The path of a socket has to be short.
    folder = Path(tempfile.mkdtemp(prefix="pgb"))
    # It refuses to run as root, and has to be somebody who may enter the folder of the server's socket.
    owner = pwd.getpwuid(Path(server.host, f".s.PGSQL.{server.port}").stat().st_uid)
    (folder / "users").write_text(f'"{role}" ""\n')
    (folder / "ini").write_text(CONFIGURATION.format(server=server, port=PORT, folder=folder, more=more))
    user = []
    if os.geteuid() == 0:
        user = ["-u", owner.pw_name]
        for path in (folder, *folder.iterdir()):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    log = (folder / "log").open("w")
    process = subprocess.Popen([PGBOUNCER, *user, str(folder / "ini")], stdout=log, stderr=log)  # noqa: S603 - found above
    try:
        deadline = time.monotonic() + 10
        while not _accepts_connections(folder / f".s.PGSQL.{PORT}"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield folder
    finally:
        process.terminate()
        process.wait(10)
        log.close()
        shutil.rmtree(folder)


def _accepts_connections(path: Path) -> bool:
    # The socket's file exists before PgBouncer listens on it.
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0

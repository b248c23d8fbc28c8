"""The identity of the process that executes a run, and whether it still exists.

A process id is not enough: ids are reused, and every container has a process 1. So a process is identified by host,
boot, PID namespace, process id and start time.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple, Self

PROC = Path("/proc")
#: Positions of the state and the start time in /proc/<pid>/stat, counted after the name, which may contain spaces.
_STATE, _STARTED = 0, 19
#: The states of a process that has ended, but that its parent has not waited for.
_ENDED = ("Z", "X")


class ProcessIdentity(NamedTuple):
    """A process. A value that could not be read is None; `started` is in clock ticks since the boot."""

    host: str
    process_id: int
    boot_id: str | None
    pid_namespace: str | None
    started: int | None

    @classmethod
    def own(cls) -> Self:
        """Return the identity of this process."""
        stat = _stat(os.getpid())
        started = None if stat is None else int(stat[_STARTED])
        return cls(socket.gethostname(), os.getpid(), _boot_id(), _pid_namespace(), started)

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended. False for a process that is not visible from here."""
        here = ProcessIdentity.own()
        where = (self.host, self.boot_id, self.pid_namespace)
        if None in (*where, self.started) or where != (here.host, here.boot_id, here.pid_namespace):
            return False
        try:
            os.kill(self.process_id, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        stat = _stat(self.process_id)
        return stat is not None and (stat[_STATE] in _ENDED or int(stat[_STARTED]) != self.started)


def _boot_id() -> str | None:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return None


def _stat(process_id: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat after the name, or None if it cannot be read."""
    try:
        text = (PROC / str(process_id) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()

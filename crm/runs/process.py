"""Which process works on a run, and whether it is still there.

A number alone says little: numbers are used again, and in each container there is a process 1. What is compared is the
process on its host since its boot, in its namespace, by the moment when it was started.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple, Self

PROC = Path("/proc")
#: Where the state and the start are in /proc/<pid>/stat, counted behind the name, which may hold anything.
_STATE, _STARTED = 0, 19
#: The states of a process that has ended and that nobody has asked for yet.
_ENDED = ("Z", "X")


class ProcessIdentity(NamedTuple):
    """A process. What is None could not be seen; `started` is in ticks of the clock since the boot."""

    host: str
    process_id: int
    boot_id: str | None
    pid_namespace: str | None
    started: int | None

    @classmethod
    def own(cls) -> Self:
        """This process."""
        stat = _stat(os.getpid())
        started = None if stat is None else int(stat[_STARTED])
        return cls(socket.gethostname(), os.getpid(), _boot_id(), _pid_namespace(), started)

    def is_gone(self) -> bool:
        """Whether it has ended for certain. Of a process that cannot be seen from here nobody knows."""
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
    """What the system says of a process, behind its name; None where it says nothing."""
    try:
        text = (PROC / str(process_id) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()

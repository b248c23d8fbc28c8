"""Runs that somebody has begun, on this machine or on another one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from crm.models import BackfillRun
from crm.runs.process import ProcessIdentity


def make_run(status: str = "running", **columns: Any) -> BackfillRun:
    """A run of somebody's on another machine."""
    given = {"version": "1", "generation": "2025_10", "operator": "pat", "host": "elsewhere", "process_id": 1} | columns
    made: BackfillRun = BackfillRun.objects.create(status=status, **given)
    return made


def a_dead_process() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def columns_of(process: ProcessIdentity) -> dict[str, Any]:
    """A process as a run's record has it."""
    names = ("host", "process_id", "boot_id", "pid_namespace", "process_started")
    return dict(zip(names, process, strict=True))


def neighbour(**differing: Any) -> dict[str, Any]:
    """A process that is no more, as a record has it that was made here, but for what differs."""
    gone = ProcessIdentity.own()._replace(process_id=a_dead_process(), started=1)
    return columns_of(gone) | differing

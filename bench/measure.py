"""One measurement: a process, its time, its memory, and the processor time of both sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from bench.server import Server


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a candidate took. `seconds` is the work itself, `wall` the process from start to exit."""

    seconds: float
    wall: float
    rows: int
    client_cpu: float
    server_cpu: float
    client_memory_mb: float

    @property
    def seconds_a_row(self) -> float:
        """What is compared between sizes."""
        return self.seconds / self.rows


def measure(server: Server, database: str, arguments: list[str]) -> Measurement:
    """Run `python ARGUMENTS` against the database. It prints a JSON object with `seconds` and its rows."""
    environment = {**os.environ, "DATABASE_URL": server.url(database), "DEBUG": "on", "CRM_DOTENV": "off"}
    server_before, started = server.cpu_seconds(), time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(  # noqa: S603 - our own modules
            [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as process,
    ):
        printed = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - started
        if process.returncode not in (0, 1) or not printed:
            complaints.seek(0)
            raise RuntimeError(f"{arguments} ended with {process.returncode}: {complaints.read()[-2000:]}")
    answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return Measurement(
        seconds=answer["seconds"],
        wall=wall,
        rows=_rows_of(answer),
        client_cpu=usage.ru_utime + usage.ru_stime,
        server_cpu=server.cpu_seconds() - server_before,
        client_memory_mb=usage.ru_maxrss / 1024,
    )


def _rows_of(answer: dict[str, Any]) -> int:
    """The rows that a candidate came across: those that it read or passed over, verified or took back."""
    if "rolls_back" in answer:
        taken = (answer, answer["merges"], answer["lines"])
        return sum(of.get(verdict, 0) for of in taken for verdict in ("reversed", "kept", "failed"))
    if "compared" in answer:
        return int(answer["rows"])
    return int(answer["read"] + (answer.get("already") or 0))

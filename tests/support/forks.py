"""The command as a process that takes no time to start: a fork of this one, with connections of its own.

It can be killed for real, from outside or by its own hand at a moment that is exact.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.management.commands.backfill_crm_contacts import Command
from tests.support.commands import each_statement, statement_in

_context = multiprocessing.get_context("fork")
COMMIT = "COMMIT"
_BYTES = 4
#: Long enough for a machine with much else to do; nothing waits for its end.
AT_MOST_SECONDS = 60


def fork(
    *arguments: str, prepare: Callable[[], object] = lambda: None, printed: Path = Path(os.devnull)
) -> BaseProcess:
    """Start `backfill_crm_contacts` in a process and a process group of its own, after `prepare` has run there.

    What it prints goes into the file `printed`.
    """
    # No connection may be shared with a child.
    connections.close_all()
    process = _context.Process(target=_live, args=(arguments, prepare, printed))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """Wait for its end; its exit code."""
    process.join(AT_MOST_SECONDS)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_for_orphans(process: BaseProcess) -> None:
    """Wait until nobody of the process group of a command that has ended works on the database of the tests."""
    others = """
        SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
    """
    until = time.monotonic() + AT_MOST_SECONDS
    with connection.cursor() as cursor:
        while time.monotonic() < until:
            cursor.execute(others)
            if cursor.fetchone() == (0,):
                return
            time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    raise AssertionError("its workers live on")


def _live(arguments: tuple[str, ...], prepare: Callable[[], object], printed: Path) -> None:
    os.setpgid(0, 0)
    with printed.open("a", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
        prepare()
        Command().run_from_argv(["manage.py", "backfill_crm_contacts", *arguments])


def kill_this_process(_command: int) -> None:
    """Kill whoever has come to the statement: the command, or one of its workers."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_command(command: int) -> None:
    """Kill the command, which leaves its workers orphans."""
    os.kill(command, signal.SIGKILL)


def kill_everybody(_command: int) -> None:
    """Kill the command and its workers at once, as when the plug is pulled."""
    os.killpg(0, signal.SIGKILL)


class _SharedCount:
    """Counts over all processes that have inherited it. Whoever is killed meanwhile leaves nothing locked behind."""

    def __init__(self) -> None:
        self._file, name = tempfile.mkstemp()
        Path(name).unlink()
        weakref.finalize(self, os.close, self._file)

    @property
    def value(self) -> int:
        """How far it has got."""
        return int.from_bytes(os.pread(self._file, _BYTES, 0))

    def next(self) -> int:
        """Count one more."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        count = self.value + 1
        os.pwrite(self._file, count.to_bytes(_BYTES), 0)
        fcntl.lockf(self._file, fcntl.LOCK_UN)
        return count


@dataclass(kw_only=True)
class Mishap:
    """What happens to a command at the statement of this number: just before it is sent, or so many seconds after.

    Statements and commits are counted from 1 on, over all processes, those of the reading ahead left out: that goes on
    meanwhile, so it does not always come in the same place. What happens is told the id of the command's process.
    """

    statement: int
    happening: Callable[[int], object] = kill_this_process
    delay: float | None = None
    _command: int = 0
    _count: _SharedCount = field(default_factory=lambda: _SharedCount())
    #: What is never left, as the process ends before.
    _to_its_end: ExitStack = field(default_factory=ExitStack)

    def prepare(self) -> None:
        """Let it happen to this process, which is the command."""
        self._command = os.getpid()
        self._to_its_end.enter_context(labels_are_watched(self._pass))

    @property
    def came(self) -> bool:
        """Whether the command got to the statement."""
        return self._count.value >= self.statement

    def _pass(self, _label: str, send: Callable[[], Any]) -> Any:
        if self._count.next() != self.statement:
            return send()
        if self.delay is None:
            self.happening(self._command)
            return send()
        later = threading.Timer(self.delay, self.happening, [self._command])
        later.start()
        answer = send()
        # Whoever is killed by it never sees it end.
        later.join()
        return answer


@contextmanager
def labels() -> Iterator[list[str]]:
    """Collect what a `Mishap` counts: the statements of this process and its commits."""
    sent: list[str] = []

    def collect(label: str, send: Callable[[], Any]) -> Any:
        sent.append(label)
        return send()

    with labels_are_watched(collect):
        yield sent


@contextmanager
def labels_are_watched(around: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Let `around` send each statement and commit."""

    def watched(label: str, send: Callable[[], Any]) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return send()
        return around(label, send)

    def watched_execute(execute: Any, sql: Any, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        return watched(statement_in(sql), lambda: execute(sql, parameters, many, context))

    commit = BaseDatabaseWrapper.commit
    with each_statement(watched_execute), pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseDatabaseWrapper, "commit", lambda wrapper: watched(COMMIT, lambda: commit(wrapper)))
        yield

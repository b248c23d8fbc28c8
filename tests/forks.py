"""The command as a process that takes no time to start: a fork of this one, with connections of its own.

It can be killed for real, from outside or by its own hand at a moment that is exact.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from crm.management.commands.backfill_crm_contacts import Command

_context = multiprocessing.get_context("fork")
COMMIT = "COMMIT"
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


@dataclass(kw_only=True)
class Death:
    """A kill at the statement of this number, just before it is sent, or, with a `delay`, so many seconds after that.

    Statements and commits are counted from 1 on, over all processes, those of the reading ahead left out: that goes on
    meanwhile, so it does not always come in the same place.
    """

    statement: int
    delay: float | None = None
    kill: Callable[[int], None] = kill_this_process
    _command: int = 0
    _count: Any = field(default_factory=lambda: _context.Value("i", 0))

    def prepare(self) -> None:
        """Let this process, which is the command, die of it."""
        self._command = os.getpid()
        _watch(self._die)

    @property
    def came(self) -> bool:
        """Whether the run got to the statement."""
        return bool(self._count.value >= self.statement)

    def _die(self, _label: str, send: Callable[[], Any]) -> Any:
        with self._count.get_lock():
            self._count.value += 1
            is_time = self._count.value == self.statement
        if not is_time:
            return send()
        if self.delay is None:
            self.kill(self._command)
            return send()
        killer = threading.Timer(self.delay, self.kill, [self._command])
        killer.start()
        answer = send()
        # Whoever is killed by it never sees it end.
        killer.join()
        return answer


@contextmanager
def labels() -> Iterator[list[str]]:
    """Collect what a `Death` counts: the statements of this process and its commits."""
    sent: list[str] = []

    def collect(label: str, send: Callable[[], Any]) -> Any:
        sent.append(label)
        return send()

    with pytest.MonkeyPatch.context() as patch:
        _watch(collect, patch)
        yield sent


def _watch(around: Callable[[str, Callable[[], Any]], Any], patch: pytest.MonkeyPatch | None = None) -> None:
    patch = patch or pytest.MonkeyPatch()
    execute = CursorWrapper._execute_with_wrappers  # type: ignore[attr-defined] # Django's own, which its stubs leave out
    commit = BaseDatabaseWrapper._commit  # type: ignore[attr-defined] # the same

    def watched(label: str, send: Callable[[], Any]) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return send()
        return around(label, send)

    def watched_execute(cursor: Any, sql: Any, parameters: Any, many: bool, executor: Any) -> Any:  # noqa: FBT001 - Django's signature
        return watched(str(sql).strip(), lambda: execute(cursor, sql, parameters, many, executor))

    def watched_commit(wrapper: Any) -> Any:
        return watched(COMMIT, lambda: commit(wrapper))

    patch.setattr(CursorWrapper, "_execute_with_wrappers", watched_execute)
    patch.setattr(BaseDatabaseWrapper, "_commit", watched_commit)

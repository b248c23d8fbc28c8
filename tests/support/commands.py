"""The command as an operator runs it: arguments in, exit code and both streams out."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

from django.core.management import load_command_class
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from crm.backfill.report import as_json
from crm.backfill.runner import run_backfill
from crm.rules.options import RunOptions
from crm.runs.lost_reports import noted
from crm.try_execute import QUOTE


class Finished(NamedTuple):
    """How a command ended."""

    code: object
    stdout: str
    stderr: str

    @property
    def answer(self) -> dict[str, Any]:
        """What --json printed: one object on one line, and nothing else."""
        assert self.stdout.count("\n") == 1
        answer: dict[str, Any] = json.loads(self.stdout)
        return answer


def ended(run: Callable[[], object]) -> Finished:
    """How something ends that may exit, with what it printed."""
    stdout, stderr = StringIO(), StringIO()
    code: object = 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            code = run() or 0
        except SystemExit as end:
            code = end.code
    return Finished(code, stdout.getvalue(), stderr.getvalue())


def called(name: str, *arguments: str) -> Finished:
    """`manage.py` with a command of ours and these arguments, in this process; log lines go their own way."""
    # A command takes hold of the streams when it is made.
    return ended(lambda: load_command_class("crm", name).run_from_argv(["manage.py", name, *arguments]))


def backfill(*arguments: str) -> Finished:
    """`manage.py backfill_crm_contacts` with these arguments, in this process."""
    return called("backfill_crm_contacts", *arguments)


def run(**options: Any) -> dict[str, Any]:
    """Run with these options, and return what --json prints."""
    report = run_backfill(RunOptions(**options))
    with noted(report.run_id, report.lost_reports):
        answer: dict[str, Any] = json.loads(as_json(report))
    return answer


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """To write more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def statement_in(sql: str) -> str:
    """What is executed: a statement as it was sent, or the one that `try_execute` is given."""
    _, is_given, rest = str(sql).partition(QUOTE)
    return rest.partition(QUOTE)[0].strip() if is_given else str(sql).strip()


class Statement(NamedTuple):
    """A statement that was sent, and how many rows it returned or touched."""

    sql: str
    parameters: Any
    rows: int


@contextmanager
def statements() -> Iterator[list[Statement]]:
    """Collect the statements that are sent inside, over whichever connection and from whichever thread."""
    sent: list[Statement] = []

    def record(execute: Any, sql: str, parameters: Any, many: bool, context: dict[str, Any]) -> Any:  # noqa: FBT001 - Django's signature
        result = execute(sql, parameters, many, context)
        sent.append(Statement(" ".join(statement_in(sql).split()), parameters, context["cursor"].rowcount))
        return result

    with each_statement(record):
        yield sent


@contextmanager
def each_statement(watch: Callable[[Any, Any, Any, bool, dict[str, Any]], Any]) -> Iterator[None]:
    """Let `watch`, as Django's `execute_wrapper` takes it, send each statement over whichever connection of whichever
    thread."""
    watched: list[BaseDatabaseWrapper] = []

    def join(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
        if not any(connection is one for one in watched):
            watched.append(connection)
            stack.enter_context(connection.execute_wrapper(watch))

    with ExitStack() as stack:
        for connection in connections.all():
            join(connection)
        connection_created.connect(join, weak=False)
        stack.callback(connection_created.disconnect, join)
        yield


def rollback(*arguments: str) -> Finished:
    """`manage.py rollback_crm_backfill` with these arguments, in this process."""
    return called("rollback_crm_backfill", *arguments, "--no-progress")


def update(**options: Any) -> dict[str, Any]:
    """A run with --update, which a dry run has foretold to the last count."""
    foretold = run(update=True, dry_run=True, **options)
    done = run(update=True, **options)
    assert told(foretold) == told(done)
    assert foretold["balanced"] is done["balanced"] is True
    return done


def told(report: dict[str, Any]) -> dict[str, Any]:
    """What a report counts, but for what a dry run cannot have: the tables at the end."""
    of_one_run = (
        "run",
        "dry_run",
        "started_at",
        "finished_at",
        "contacts_gone",
        "seconds",
        "balanced",
        "pending",
        "already",
        "rows",
        "ledger",
        "contacts_gone",
    )
    return {name: value for name, value in report.items() if name not in of_one_run}

"""`python manage.py backfill_runs`: list, show and watch runs; pause, resume or cancel one from another process."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Sequence
from datetime import datetime
from typing import Any

from django.core.management.base import CommandError, CommandParser

from crm.errors import OperatorError
from crm.interruption import StoppedError, sleep_until_signal
from crm.management.arguments import positive, run_number
from crm.management.operator_command import OperatorCommand
from crm.models import BackfillRun
from crm.models.ledger import RunStatus
from crm.outcome import NUMBERS, Outcome, Repair
from crm.output.table import Column, Table, console_on
from crm.rules.options import as_arguments
from crm.runs import control, lease
from crm.runs.watching import POLL_INTERVAL, watch

_HELP = {
    "pause": "stop a run at its next batch; no other run can start until it is resumed or cancelled",
    "resume": "let the next run continue where a paused run stopped",
    "cancel": "stop a run at its next batch permanently; committed batches stay",
}
STOPPED = 4
#: If a run is still `running` when watching ends, its process is dead.
_EXIT_CODES_OF_WATCH = {RunStatus.FINISHED: 0, RunStatus.FAILED: 5, RunStatus.RUNNING: 5}
_COLUMNS = (
    Column("run", is_number=True),
    *map(Column, ("kind", "status", "started (UTC)")),
    *(Column(name, is_number=True) for name in ("read", *Outcome, "new errors", "changed")),
    Column("last heartbeat (UTC)"),
    Column("rollback", may_be_cut=True),
)
#: Keys that do not apply to a rollback.
_OF_A_BACKFILL = (
    *NUMBERS,
    *("batches", "by_source", "by_reason", "new_by_reason", "updated_by_column", "kept_by_column"),
)
#: What continues a run that a nightly backfill does not continue.
_CONTINUED_BY_ITSELF: dict[str, str] = {
    BackfillRun.Kind.ROLLBACK: "the rollback",
    BackfillRun.Kind.REPAIR: "the repair",
}
#: Keys of rows, which a repair does not read.
_OF_ROWS = ("read", *Outcome, "error_new", "updated_and_kept", "by_reason", "new_by_reason")
_LEFT_OUT = {BackfillRun.Kind.ROLLBACK: _OF_A_BACKFILL, BackfillRun.Kind.REPAIR: _OF_ROWS}
#: Keys whose number is an identifier, not a count.
_NUMBERS_OF_THINGS = ("run", "rolls_back", "process_id")


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "List, show and watch runs of the backfill; pause, resume or cancel a run. Exit code 2: not possible, for the "
        "reason given on stderr; 4: stopped; otherwise 0. The exit code of watch depends on the run: 0: finished; "
        "4: paused, cancelled or interrupted (or watching was stopped); 5: failed, or its process is dead."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the actions and their options."""
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
        listing = _parser_of(actions, "list", "list the latest runs, newest first")
        listing.add_argument(
            "--last", type=positive, default=20, metavar="N", help="number of runs (default: %(default)s)"
        )
        listing.add_argument("--json", action="store_true", help="print one JSON array of runs")
        showing = _parser_of(actions, "show", "show everything recorded about a run")
        _add_run(showing)
        showing.add_argument("--json", action="store_true", help="print one JSON object")
        _add_run(_parser_of(actions, "watch", "follow a run to its end; Ctrl-C stops watching, not the run"))
        for action in control.ACTIONS:
            _add_run(_parser_of(actions, action, _HELP[action]))

    def handle(self, *_args: Any, action: str, **options: Any) -> None:
        """Run the action. The exit codes are in the help."""
        try:
            if "run" in options:
                options["run"] = control.number(options["run"])
            if action == "watch":
                self._watch(options["run"])
            else:
                self._answer(action, options)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from None

    def _watch(self, run_id: int) -> None:
        try:
            status = self._follow(watch(run_id, lambda: sleep_until_signal(POLL_INTERVAL)))
        except KeyboardInterrupt:
            raise StoppedError(
                f"Interrupted. Run {run_id} continues; `python manage.py backfill_runs pause {run_id}` stops it."
            ) from None
        if code := _EXIT_CODES_OF_WATCH.get(status, STOPPED):
            raise SystemExit(code)

    def _follow(self, following: Generator[str, None, BackfillRun]) -> RunStatus:
        while True:
            try:
                self.stdout.write(next(following))
            except StopIteration as end:
                return RunStatus(end.value.status)
            self.stdout.flush()

    def _answer(self, action: str, options: dict[str, Any]) -> None:
        if action == "list":
            found = control.latest(options["last"])
            if options["json"]:
                self.stdout.write(json.dumps([control.summary(run) for run in found]))
            elif found:
                _table(found).print_on(console_on(self.stdout))
            else:
                self.stdout.write("There is no run yet.")
        elif action == "show":
            details = control.details(options["run"])
            if options["json"]:
                self.stdout.write(json.dumps(details))
            else:
                _details(details).print_on(console_on(self.stdout))
        else:
            self.stdout.write(_what_now(action, control.act(action, options["run"])))


def _parser_of(actions: Any, action: str, what: str) -> CommandParser:
    parser: CommandParser = actions.add_parser(action, help=what, description=f"{what[0].upper()}{what[1:]}.")
    return parser


def _add_run(parser: CommandParser) -> None:
    help_text = f"the run's number, as shown by `backfill_runs list`, or `{control.LATEST}`"
    parser.add_argument("run", type=run_number, metavar="RUN", help=help_text)


def _what_now(action: str, run: BackfillRun) -> str:
    if action == "pause":
        what = (
            "is paused. Its process was already dead, and now no other run can start"
            if lease.process_is_gone(run)
            else "is paused and stops at its next batch"
        )
        continues = _CONTINUED_BY_ITSELF.get(run.kind, "the next run")
        return (
            f"Run {run.pk} {what}. `python manage.py backfill_runs resume {run.pk}` lets {continues} continue, "
            f"`cancel {run.pk}` ends it permanently."
        )
    if action == "resume" and run.kind == BackfillRun.Kind.ROLLBACK:
        return (
            f"Run {run.pk} is {run.status} and no longer blocks other runs. Nothing is running yet: only "
            f"`{_command_of(run)}` continues it. A nightly backfill would recreate what was reversed: disable it until "
            "the rollback has finished."
        )
    if action == "resume" and run.kind == BackfillRun.Kind.REPAIR:
        return (
            f"Run {run.pk} is {run.status} and no longer blocks other runs. Nothing is running yet: only "
            f"`{_command_of(run)}` continues it."
        )
    if action == "resume":
        return (
            f"Run {run.pk} is {run.status} and no longer blocks other runs. Nothing is running yet: to continue, start "
            f"`{_command_of(run)}` or wait for the nightly run."
        )
    return f"Run {run.pk} is cancelled. If it was running, it stops at its next batch. Committed batches stay."


def _command_of(run: BackfillRun) -> str:
    """Return the command that continues the run."""
    if run.kind == BackfillRun.Kind.ROLLBACK:
        arguments = ["rollback_crm_backfill", str(run.options["rolls_back"])]
    elif run.kind == BackfillRun.Kind.REPAIR:
        arguments = ["repair_crm_contacts", *(Repair(name).option for name in run.options["repairs"]), "--apply"]
    else:
        arguments = ["backfill_crm_contacts", *as_arguments(run.options)]
    return shlex.join(["python", "manage.py", *arguments])


def _table(found: Sequence[BackfillRun]) -> Table:
    table = Table(*_COLUMNS)
    for run in found:
        table.add(*_cells(run))
    return table


def _cells(run: BackfillRun) -> tuple[str | int, ...]:
    counts = [run.read, *(getattr(run, outcome) for outcome in Outcome), run.error_new, run.updated]
    return (
        str(run.pk),
        run.kind,
        f"{run.status} (dead)" if run.status == RunStatus.RUNNING and lease.process_is_gone(run) else run.status,
        _moment(run.started_at),
        *counts,
        _moment(run.heartbeat_at) if run.status == RunStatus.RUNNING else "",
        control.taken_back(run),
    )


def _details(details: dict[str, Any]) -> Table:
    """Return one row per key; nested values as JSON. Omits keys that are unknown or do not apply."""
    left_out = _LEFT_OUT.get(details["kind"], ())
    table = Table(Column(), Column())
    for name, value in details.items():
        if value is not None and name not in left_out:
            table.add(name, _shown(name, value))
    return table


def _shown(name: str, value: Any) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if name in _NUMBERS_OF_THINGS else value
    return value if isinstance(value, str) else json.dumps(value)


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"

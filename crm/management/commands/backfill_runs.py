"""`python manage.py backfill_runs`: look at runs, watch one, and pause, resume or cancel one from outside."""

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
from crm.outcome import NUMBERS, Outcome
from crm.output.table import Column, Table, console_on
from crm.rules.options import as_arguments
from crm.runs import control, lease
from crm.runs.watching import POLL_INTERVAL, watch

_HELP = {
    "pause": "stop it at its next batch; no other run may start until it is resumed or cancelled",
    "resume": "let the next run go on where a paused one stopped",
    "cancel": "stop it at its next batch for good; what was committed stays",
}
STOPPED = 4
#: A run that is `running` at the end of the watching is dead.
_EXIT_CODES_OF_WATCH = {RunStatus.FINISHED: 0, RunStatus.FAILED: 5, RunStatus.RUNNING: 5}
_COLUMNS = (
    Column("run", is_number=True),
    *map(Column, ("kind", "status", "started (UTC)")),
    *(Column(name, is_number=True) for name in ("read", *Outcome, "new errors", "changed")),
    Column("last heartbeat (UTC)"),
    Column("taken back", may_be_cut=True),
)
#: What a rollback has none of.
_OF_A_BACKFILL = (
    *NUMBERS,
    *("batches", "by_source", "by_reason", "new_by_reason", "updated_by_column"),
)
#: What is a name in digits, and no count of anything.
_NUMBERS_OF_THINGS = ("run", "rolls_back", "process_id")


class Command(OperatorCommand):
    """Arguments, one call, print."""

    help = (
        "List, show and watch runs of the backfill; pause, resume or cancel one. Exit code 2: it cannot be done, and "
        "the line on stderr says why; 4: stopped; otherwise 0. Of watch that of the run's end: 0: finished; 4: paused, "
        "cancelled or interrupted (or the watching was stopped); 5: failed, or dead."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's attribute

    def add_arguments(self, parser: CommandParser) -> None:
        """What may be asked."""
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
        listing = _parser_of(actions, "list", "the last runs, the newest first")
        listing.add_argument("--last", type=positive, default=20, metavar="N", help="how many (default: %(default)s)")
        listing.add_argument("--json", action="store_true", help="print one JSON array of runs")
        showing = _parser_of(actions, "show", "one run, with all that is known of it")
        _add_run(showing)
        showing.add_argument("--json", action="store_true", help="print one JSON object")
        _add_run(_parser_of(actions, "watch", "follow a run to its end; Ctrl-C ends the watching and not the run"))
        for action in control.ACTIONS:
            _add_run(_parser_of(actions, action, _HELP[action]))

    def handle(self, *_args: Any, action: str, **options: Any) -> None:
        """Do it. The exit codes are in the help."""
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
                f"Interrupted. Run {run_id} goes on: `python manage.py backfill_runs pause {run_id}` stops it."
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
                self.stdout.write("There has been no run.")
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
    help_text = f"the run's number, as `backfill_runs list` shows it, or `{control.LATEST}`"
    parser.add_argument("run", type=run_number, metavar="RUN", help=help_text)


def _what_now(action: str, run: BackfillRun) -> str:
    if action == "pause":
        what = (
            ". Nothing is at work, its process is gone; but no other run may start now."
            if lease.process_is_gone(run)
            else ": it ends at its next batch."
        )
        goes_on = "it be gone on with" if run.kind == BackfillRun.Kind.ROLLBACK else "the next run go on"
        return (
            f"Run {run.pk} is paused{what} `python manage.py backfill_runs resume {run.pk}` lets {goes_on}, "
            f"`cancel {run.pk}` ends it for good."
        )
    if action == "resume" and run.kind == BackfillRun.Kind.ROLLBACK:
        return (
            f"Run {run.pk} is {run.status}: it keeps no other one out any more. Nothing runs yet; only "
            f"`{_command_of(run)}` goes on from there. A nightly backfill brings back what was reversed: switch it off "
            "until the rollback is at its end."
        )
    if action == "resume":
        return (
            f"Run {run.pk} is {run.status}: it keeps no other one out any more. Nothing runs yet; the next run goes on "
            f"from there. Start it with `{_command_of(run)}`, or leave it to the next night."
        )
    return f"Run {run.pk} is cancelled: if it was going, it ends at its next batch. What was committed stays."


def _command_of(run: BackfillRun) -> str:
    """The command that asks for the same again."""
    if run.kind == BackfillRun.Kind.ROLLBACK:
        arguments = ["rollback_crm_backfill", str(run.options["rolls_back"])]
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
    """A name and a value a row; what is nested as JSON, what is unknown or of no concern not at all."""
    left_out = _OF_A_BACKFILL if details["kind"] == BackfillRun.Kind.ROLLBACK else ()
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

"""How far a run is, whatever its kind: what it reports batch by batch, and how stderr shows it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

#: Without a terminal, a line about this often; seconds.
LINE_EVERY = 10.0


class Progress(Protocol):
    """Watches a run, which works through its parts: the sources of a backfill, the entries of a rollback."""

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:
        """Show what there is to do: how many of the unit ("source rows") each part has, by its name for people."""

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Show that a batch was committed, with `done` more of the part.

        `result` says what became of all of the part up to now; without it the rate is shown. A part that was not
        announced has an unknown end.
        """

    def end(self) -> None:
        """The run is over."""


class Silence:
    """A progress that shows nothing."""

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:
        """Nothing."""

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class TerminalProgress:
    """A bar a part, with the rate or the result, and the time left."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f} / {task.total:,.0f}", justify="right"),
            TextColumn("{task.fields[result]:>14}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_batch = 0.0

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:
        """Show an empty bar for each part."""
        self._bars.console.print(f"{sum(parts.values()):,} {unit} to look at", highlight=False)
        self._bars.start()
        self._last_batch = self._bars.get_time()
        for part, total in parts.items():
            self._add(part, total)

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Move the part's bar on. What arrived since the count makes the bar longer, never fuller than full."""
        if part not in self._tasks:
            self._add(part, 0)
        task = self._bars.tasks[self._tasks[part]]
        if task.start_time is None:
            # Its first batch has taken since the end of the one before.
            task.start_time = self._last_batch
        self._last_batch = self._bars.get_time()
        completed = task.completed + done
        if not result and task.elapsed:
            result = f"{completed / task.elapsed:,.0f} rows/s"
        self._bars.update(task.id, completed=completed, total=max(task.total or 0, completed), result=result)

    def _add(self, part: str, total: int) -> None:
        self._tasks[part] = self._bars.add_task(part, total=total, result="", start=False)

    def end(self) -> None:
        """Leave the bars as they are."""
        self._bars.stop()


class LineProgress:
    """A line now and then, for a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._unit = ""
        self._to_do = self._done = 0
        self._started = self._last_line = time.monotonic()

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:
        """Say how much there is to do."""
        self._unit, self._to_do = unit, sum(parts.values())
        self._print(f"{self._to_do:,} {unit} to look at", *(parts if len(parts) == 1 else ()))

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Say how far the run is, when it has not been said for a while."""
        self._done += done
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            result = result or f"{self._done / (now - self._started):,.0f} rows/s"
            self._print(f"{self._done:,} of {max(self._to_do, self._done):,} {self._unit}, {result}", part)

    def _print(self, text: str, *part: str) -> None:
        self._console.print(": ".join((*part, text)), highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Nothing: the summary follows."""


def progress_on_stderr(*, wanted: bool) -> Progress:
    """Bars on a terminal, lines elsewhere; nothing where none is wanted."""
    console = Console(stderr=True)
    if not wanted:
        return Silence()
    return TerminalProgress(console) if console.is_terminal else LineProgress(console)

"""Progress of a run: the interface that a run reports to after each batch, and its output on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

#: Seconds between two lines of LineProgress.
LINE_EVERY = 10.0


class Progress(Protocol):
    """Receives the progress of a run by part: the sources of a backfill, the entries of a rollback."""

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:
        """Start. `parts` has the total of each part, in `unit`, such as "source rows", by the part's display name."""

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Show that a batch was committed, with `done` more units of the part.

        `result` is the result of the part so far; without it, the rate is shown. A part that `begin` did not name has
        an unknown total.
        """

    def end(self) -> None:
        """Stop, at the end of the run."""


class Silence:
    """Shows nothing."""

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:
        """Do nothing."""

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


class TerminalProgress:
    """Shows a bar for each part, with the rate or the result, and the remaining time."""

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
        self._bars.console.print(f"{sum(parts.values()):,} {unit} to process", highlight=False)
        self._bars.start()
        self._last_batch = self._bars.get_time()
        for part, total in parts.items():
            self._add(part, total)

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Advance the bar of the part. If rows were added since the count, the total grows with them."""
        if part not in self._tasks:
            self._add(part, 0)
        task = self._bars.tasks[self._tasks[part]]
        if task.start_time is None:
            # The first batch of a part began when the batch before it ended.
            task.start_time = self._last_batch
        self._last_batch = self._bars.get_time()
        completed = task.completed + done
        if not result and task.elapsed:
            result = f"{completed / task.elapsed:,.0f} rows/s"
        self._bars.update(task.id, completed=completed, total=max(task.total or 0, completed), result=result)

    def _add(self, part: str, total: int) -> None:
        self._tasks[part] = self._bars.add_task(part, total=total, result="", start=False)

    def end(self) -> None:
        """Stop updating the bars."""
        self._bars.stop()


class LineProgress:
    """Prints a line every LINE_EVERY seconds, for a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._unit = ""
        self._to_do = self._done = 0
        self._started = self._last_line = 0.0

    def begin(self, unit: str, parts: Mapping[str, int]) -> None:
        """Print the total."""
        self._unit, self._to_do = unit, sum(parts.values())
        self._started = self._last_line = time.monotonic()
        self._print(f"{self._to_do:,} {unit} to process", *(parts if len(parts) == 1 else ()))

    def advance(self, part: str, done: int, result: str = "") -> None:
        """Print the progress, unless a line was printed within LINE_EVERY seconds."""
        self._done += done
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            result = result or f"{self._done / (now - self._started):,.0f} rows/s"
            self._print(f"{self._done:,} of {max(self._to_do, self._done):,} {self._unit}, {result}", part)

    def _print(self, text: str, *part: str) -> None:
        self._console.print(": ".join((*part, text)), highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Do nothing: the summary follows."""


def progress_on_stderr(*, wanted: bool) -> Progress:
    """Return a progress with bars if stderr is a terminal, otherwise with lines; a silent one if not `wanted`."""
    console = Console(stderr=True)
    if not wanted:
        return Silence()
    return TerminalProgress(console) if console.is_terminal else LineProgress(console)

"""Standard output and standard error, either of which may be full or closed.

What cannot be written to standard output ends a command with an exit code of its own, whoever was writing: the command,
argparse, rich, or the interpreter when it flushes at its end. What cannot be written to standard error is lost, since
there is no place left to say so; it never ends a run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, TextIO, cast

from crm.errors import OperatorError

STANDARD_ERROR = 2


class OutputError(OperatorError):
    """Standard output could not be written, for the system's reason."""

    exit_code: ClassVar[int] = 6

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"Standard output could not be written ({reason}), so what was printed there is not complete. What the "
            "command did stays done."
        )
        self.reason = reason


class _Stream:
    """A standard stream; None is one that was closed before the interpreter began."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write."""
        if self._stream is None:
            self._fail("it is closed")
        else:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # Otherwise the interpreter would try to write what is buffered once more, and complain.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, cast(TextIO, self._stream).fileno())
            os.close(nowhere)
        self._fail(error.strerror or type(error).__name__)

    def _fail(self, reason: str) -> None:
        """What cannot be written is lost."""


class _StandardOutput(_Stream):
    def _fail(self, reason: str) -> None:
        raise OutputError(reason)


def with_checked_output(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a program; its exit code, or that of an output that could not be written."""
    # A connection must not get the number of a stream that is closed.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        pass
    os.close(descriptor)
    sys.stdout = cast(TextIO, _StandardOutput(sys.stdout))
    sys.stderr = cast(TextIO, _Stream(sys.stderr))
    code: Any
    try:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
    except OutputError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    sys.stderr.flush()
    return int(code or 0)

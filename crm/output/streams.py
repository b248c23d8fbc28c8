"""Standard output and standard error, which may be full or closed.

If standard output cannot be written, the command ends with its own exit code, whether the command, argparse, rich or
the interpreter's final flush was writing. Output to standard error that cannot be written is lost, because there is no
other place to report it; it never ends a run.
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
    """Standard output could not be written. `reason` is that of the operating system."""

    exit_code: ClassVar[int] = 6

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"Standard output could not be written ({reason}), so it is incomplete. Changes that the command has made "
            "stay."
        )
        self.reason = reason


class _Stream:
    """Wraps a standard stream, which is None if it was closed before the interpreter started."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text."""
        if self._stream is None:
            self._fail("it is closed")
        else:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # Otherwise the interpreter would try to write the buffer again when it exits, and print an error.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, cast(TextIO, self._stream).fileno())
            os.close(nowhere)
        self._fail(error.strerror or type(error).__name__)

    def _fail(self, reason: str) -> None:
        """Ignore the failure: the text is lost."""


class _StandardOutput(_Stream):
    def _fail(self, reason: str) -> None:
        raise OutputError(reason)


def with_checked_output(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a program, and return its exit code, or that of OutputError if standard output could not be written."""
    # So that no connection gets the descriptor of a closed stream.
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

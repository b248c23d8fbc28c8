"""Files that hold what concerns people: for this user alone, and never written through what lies at their name.

A file is made exclusively, with mode 0600 whatever the umask, so whatever has its name is refused, and a symbolic link
never followed: no list takes the place of an older one. What is to be whole is made beside its name and gets the name
when it is complete: whoever reads it sees nothing half written.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from crm.errors import OperatorError


def new_file(path: Path) -> TextIO:
    """Open a new file to write text to it. Raises OSError: FileExistsError where anything has its name."""
    return open(path, "x", newline="", encoding="utf-8", opener=_private)


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """A new file to write text to, which gets its name at the end, and no name where an error comes first.

    Raises OSError: at once where the folder cannot be written to, and FileExistsError, at once or at the end, where
    anything has the name.
    """
    with suppress(FileNotFoundError):
        path.lstat()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    beside = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        with new_file(beside) as file:
            yield file
            file.flush()
            # After a crash the name is to be that of a complete file.
            os.fsync(file.fileno())
        # A link never replaces what has the name by now.
        path.hardlink_to(beside)
    finally:
        with suppress(OSError):
            beside.unlink()


@contextmanager
def file_of_option(path: Path, option: str) -> Iterator[TextIO]:
    """A complete file that an option names. Raises OperatorError where it cannot be made, with the way out."""
    try:
        with complete_file(path) as file:
            yield file
    except FileExistsError:
        raise OperatorError(f"{path} is there already: name a new file with {option}.") from None
    except OSError as error:
        raise OperatorError(
            f"The file {path} cannot be written: {error.strerror}. Name another one with {option}."
        ) from None


def _private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    # The umask may have taken more than was meant.
    os.fchmod(descriptor, 0o600)
    return descriptor

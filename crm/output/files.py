"""Creates files with data about people, which only this user can read.

A file is created exclusively, with mode 0600 whatever the umask. So an existing file is never overwritten, and a
symbolic link never followed. A file that must be complete is written under a temporary name in the same folder, and
gets its own name at the end, so that no reader sees a partial file.
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
    """Create a file and open it for writing text. Raises FileExistsError if anything has its name, or OSError."""
    return open(path, "x", newline="", encoding="utf-8", opener=_private)


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """Open a new file for writing text. It gets its name at the end of the block, or is deleted if an error is raised.

    Raises FileExistsError, at the beginning or the end, if anything has its name, and OSError if the file cannot be
    written.
    """
    with suppress(FileNotFoundError):
        path.lstat()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    beside = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        with new_file(beside) as file:
            yield file
            file.flush()
            # So that the file is complete under its name even after a crash.
            os.fsync(file.fileno())
        # Unlike a rename, a link does not replace an existing file.
        path.hardlink_to(beside)
    finally:
        with suppress(OSError):
            beside.unlink()


@contextmanager
def file_of_option(path: Path, option: str) -> Iterator[TextIO]:
    """Open a `complete_file` that is given by an option. Raises OperatorError, with a remedy, if that fails."""
    with errors_of_option(path, option), complete_file(path) as file:
        yield file


@contextmanager
def errors_of_option(path: Path, option: str) -> Iterator[None]:
    """Raise errors of creating or writing the file of an option as OperatorError, with a remedy."""
    try:
        yield
    except FileExistsError:
        raise OperatorError(f"{path} already exists: name a new file with {option}. Nothing was written.") from None
    except OSError as error:
        raise OperatorError(
            f"{path} cannot be written ({error.strerror}): name another file with {option}. Nothing was written."
        ) from None


def _private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    # The umask may have removed bits of the mode.
    os.fchmod(descriptor, 0o600)
    return descriptor

"""Files that hold what concerns people: for this user alone, and never written through what lies at their name.

A file is made exclusively, with mode 0600 whatever the umask, so a symbolic link is refused or replaced and never
followed. What is to replace a file is made beside it and renamed when it is complete: whoever reads the name sees the
old file or the new one, and nothing half written.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


def new_file(path: Path) -> TextIO:
    """Open a new file to write text to it. Raises OSError: FileExistsError where anything has its name."""
    return open(path, "x", newline="", encoding="utf-8", opener=_private)


@contextmanager
def replaced_file(path: Path) -> Iterator[TextIO]:
    """A file to write text to, which takes the place of `path` at the end, and of nothing where an error comes first.

    Raises OSError: at once where the folder cannot be written to, and where `path` is neither a file nor a link.
    """
    with suppress(FileNotFoundError):
        if stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFLNK):
            raise FileExistsError(errno.EEXIST, "Not an ordinary file")
    beside = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        with new_file(beside) as file:
            yield file
            file.flush()
            # After a crash the name is to be that of a complete file.
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    # The umask may have taken more than was meant.
    os.fchmod(descriptor, 0o600)
    return descriptor

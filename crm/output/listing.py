"""A CSV file that lists the results of a run row by row, batch by batch, while the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from crm.errors import OperatorError
from crm.output.files import errors_of_option, new_file
from crm.output.spreadsheet import row_writer

#: Writes the rows of a batch. Raises ListingError.
WriteRows = Callable[[Iterable[Iterable[str]]], None]


class ListingError(Exception):
    """The list of rows cannot be written. `reason` is that of the operating system."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the list of rows cannot be written ({reason})")
        self.reason = reason


@contextmanager
def csv_listing(path: Path, columns: Sequence[str]) -> Iterator[WriteRows]:
    """Create the CSV file of the option --csv with these columns, and yield a function that writes the rows of a batch.

    Raises OperatorError if the file exists (it may be the list of an interrupted run) or cannot be written. The file is
    removed if the block raises an error before its first batch, because then nothing was changed and the next call can
    use the same name. The function raises ListingError if writing fails.
    """
    with errors_of_option(path, "--csv"):
        # Written in place instead of renamed at the end, so that the list survives if the run is killed.
        file = new_file(path)

    write_row = row_writer(file)

    def write(rows: Iterable[Iterable[str]]) -> None:
        try:
            for row in rows:
                write_row(row)
            file.flush()
            # The rows of a batch are on disk before the next batch begins.
            os.fsync(file.fileno())
        except OSError as error:
            raise ListingError(error.strerror or type(error).__name__) from None

    has_batches = False

    def write_batch(rows: Iterable[Iterable[str]]) -> None:
        nonlocal has_batches
        has_batches = True
        write(rows)

    try:
        write([columns])
        yield write_batch
    except ListingError as error:
        path.unlink()
        raise OperatorError(f"{path} cannot be written ({error.reason}). Nothing was written.") from None
    except BaseException:
        if not has_batches:
            path.unlink()
        raise
    finally:
        # A failed write has already been reported.
        with suppress(OSError):
            file.close()

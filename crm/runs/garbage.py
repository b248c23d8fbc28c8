"""Settings of Python's garbage collector for the time of a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: Number of new containers that starts a collection: about those of two batches.
YOUNG_OBJECTS = 200_000


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Make collections rare, and exclude the objects that exist already.

    A batch consists of about a hundred thousand small objects without cycles, which are all freed together. With the
    default thresholds the collector examines each of them several times, which takes a third of the client's time.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()

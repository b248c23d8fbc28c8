"""Python's collector of cyclic garbage, kept from looking at every batch again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: Containers that may be made before the collector looks at them: about those of two batches.
YOUNG_OBJECTS = 200_000


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Let the collector run seldom, and never look at what is there already.

    A batch is a hundred thousand small objects that hold no cycle and go all at once. By default the collector looks
    at each of them several times before that, for a third of the client's time.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()

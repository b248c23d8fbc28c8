"""Ctrl-C and SIGTERM: the first asks the run to end with its batch, the second ends it now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the operator asked to stop. Ask it between batches."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take the signals while inside, and give them back after."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._request) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.requested = True

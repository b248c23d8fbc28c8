"""A line to the real server that can be cut at an exact statement: before the server gets it, or after it has done it.

A proxy on a socket of its own, in a thread of the test. It understands as much of the protocol as it takes to count
what executes something: a Query, a FunctionCall, or whatever a Sync ends. Statements are numbered within their
connection, and connections in the order in which they are opened: that is the same every time, also where one
connection reads ahead while another one writes.
"""

from __future__ import annotations

import re
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from django.db import connection

from config import embedded
from tests.support.processes import address, session
from tests.support.scratch import as_the_default

PORT = 5432
_HEAD = 5
#: How long a late commit waits for a question; seconds.
_TO_ASK = 2.0
_QUESTION = "SELECT pg_xact_status("
_CHUNK = 1 << 16
#: Long enough for a machine with much else to do; nothing waits for its end.
AT_MOST_SECONDS = 60


class Moment(StrEnum):
    """When the line is cut."""

    BEFORE = "before"  # the server never gets the statement
    AFTER = "after"  # the server has done it, and nobody hears of it
    LATE = "late"  # the server gets it when it was asked in vain what became of it


class Place(NamedTuple):
    """A statement: the number of its connection and its number there, both from 1 on."""

    connection: int
    statement: int


class Commit(NamedTuple):
    """A commit by its number over all connections, where several processes share the work."""

    number: int


class Cut(NamedTuple):
    """Where and when the line is cut, and whether it stays so: nobody gets through any more then."""

    place: Place | Commit
    moment: Moment
    for_good: bool = False


@dataclass(slots=True)
class Wire:
    """What goes over the line: every statement by its place, in the order in which they came."""

    cut: Cut | None = None
    sent: dict[Place, str] = field(default_factory=dict)
    was_cut: bool = False
    #: Set when the server is asked for the second time what became of a transaction: the first answer was none.
    was_asked: threading.Event = field(default_factory=threading.Event)
    _opened: int = 0
    _commits: int = 0
    _questions: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def opened(self) -> int:
        """Number one more connection."""
        with self._lock:
            self._opened += 1
            return self._opened

    def passes(self, place: Place, text: str) -> Moment | None:
        """Take note of a statement; when the line is to be cut at it, if at all."""
        with self._lock:
            self.sent[place] = text
            self._commits += text == "COMMIT"
            self._questions += text.startswith(_QUESTION)
            if self._questions > 1:
                self.was_asked.set()
            if self.cut is None or self.was_cut:
                return None
            here = Commit(self._commits) if isinstance(self.cut.place, Commit) else place
            if here != self.cut.place or (isinstance(here, Commit) and text != "COMMIT"):
                return None
            self.was_cut = True
            return self.cut.moment

    @property
    def is_dead(self) -> bool:
        """Whether nobody gets through any more."""
        return self.was_cut and self.cut is not None and self.cut.for_good


@contextmanager
def wired(cut: Cut | None = None) -> Iterator[Wire]:
    """Let every connection of this process go over a wire; `url` of it is for other processes."""
    with wire(cut) as (line, url), as_the_default(url):
        yield line
    wait_for_the_server()


@contextmanager
def wire(cut: Cut | None = None) -> Iterator[tuple[Wire, str]]:
    """A wire to the database of the tests, and the URL of its near end."""
    folder = Path(tempfile.mkdtemp(prefix="wire"))
    line = Wire(cut)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / f".s.PGSQL.{PORT}"))
        listening.listen()
        listens = address()
        far_end = f"{listens.host}/.s.PGSQL.{listens.port}"
        accepting = threading.Thread(target=_accept, args=(listening, line, far_end), daemon=True)
        accepting.start()
        try:
            name = connection.settings_dict["NAME"]
            yield line, f"postgresql://{embedded.USER}@localhost:{PORT}/{name}?host={quote(str(folder), safe='')}"
        finally:
            # Closing alone would not wake up whoever accepts.
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            shutil.rmtree(folder)


def wait_for_the_server() -> None:
    """Wait until the server is done with everybody else: with what was cut off, too."""
    others = """
        SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
    """
    connection.close()
    until = time.monotonic() + AT_MOST_SECONDS
    with session() as observer:
        observer.autocommit = True
        while observer.execute(others).fetchone() != (0,):
            assert time.monotonic() < until, "somebody is still at work"
            time.sleep(0.002)


def _accept(listening: socket.socket, line: Wire, far_end: str) -> None:
    while True:
        try:
            near, _ = listening.accept()
        except OSError:
            return
        if line.is_dead:
            near.close()
            continue
        far = socket.socket(socket.AF_UNIX)
        far.connect(far_end)
        threading.Thread(target=_Carrier(line, line.opened(), near, far).carry, daemon=True).start()


class _GoneError(Exception):
    """One end of a connection is gone."""


class _Carrier:
    """Carries what one connection says to and fro."""

    def __init__(self, line: Wire, number: int, near: socket.socket, far: socket.socket) -> None:
        self._line = line
        self._number = number
        self._near = near
        self._far = far
        self._statements = 0
        self._text = ""

    def carry(self) -> None:
        """Until one end is gone, or the line is cut."""
        try:
            with suppress(_GoneError, OSError):
                self._carry()
        finally:
            for end in (self._near, self._far):
                # A worker process that was forked meanwhile has a copy, which a close would not hang up.
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _carry(self) -> None:
        self._far.sendall(self._startup())
        with selectors.DefaultSelector() as selector:
            selector.register(self._near, selectors.EVENT_READ)
            selector.register(self._far, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._far:
                        self._near.sendall(_received(self._far))
                    else:
                        self._pass_message_on()

    def _startup(self) -> bytes:
        """The first message, which has no kind: what it asks for, or that another connection's work be cancelled."""
        length = _exactly(self._near, 4)
        return length + _exactly(self._near, int.from_bytes(length) - 4)

    def _pass_message_on(self) -> None:
        message = _message(self._near)
        moment = self._moment_at(message)
        if moment is Moment.BEFORE:
            raise _GoneError
        if moment is Moment.LATE:
            self._near.shutdown(socket.SHUT_RDWR)
            # Whoever has only read does not ask.
            self._line.was_asked.wait(_TO_ASK)
        self._far.sendall(message)
        if moment is not None:
            # The server is ready for the next statement when it is done with this one, its commit included.
            while not _message(self._far).startswith(b"Z"):
                pass
            raise _GoneError

    def _moment_at(self, message: bytes) -> Moment | None:
        kind, body = message[:1], message[_HEAD:]
        if kind == b"P":
            self._text = body.split(b"\0")[1].decode(errors="replace")
        if kind not in (b"Q", b"F", b"S"):
            return None
        text = body.rstrip(b"\0").decode(errors="replace") if kind == b"Q" else self._text
        self._statements += 1
        return self._line.passes(Place(self._number, self._statements), re.sub(r"\s+", " ", text).strip())


def _message(end: socket.socket) -> bytes:
    head = _exactly(end, _HEAD)
    return head + _exactly(end, int.from_bytes(head[1:]) - 4)


def _exactly(end: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        parts += _received(end, size - len(parts))
    return bytes(parts)


def _received(end: socket.socket, most: int = _CHUNK) -> bytes:
    data = end.recv(most)
    if not data:
        raise _GoneError
    return data

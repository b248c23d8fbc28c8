"""Starts Python processes quickly, as forks of a process that has already imported the libraries of the project.

`python manage.py` spends most of its time on the imports of Django, psycopg and others, which do not depend on the
settings. Here one process imports them once, and forks for each request. A fork has its own arguments, environment,
working directory, umask and streams, reads the settings and imports the modules of the project itself, and exits like
an interpreter.

Tests call `begin` and `end`. Run as a program, this module replaces `python`.
"""

from __future__ import annotations

import json
import os
import socket
import sys

#: The timeout of a connection in seconds, long enough for a busy machine.
_TIMEOUT = 180
#: The number of bytes in which the id of the process is sent.
_DIGITS = 16
#: Modules that do not depend on the settings. They import most of the other modules.
_IMPORTED = (
    *("asyncio", "concurrent.futures", "csv", "environ", "psycopg", "psycopg.errors", "rich.console", "rich.progress"),
    *("django.contrib.admin", "django.core.mail", "django.core.management", "django.db.backends.postgresql.base"),
    *("django.db.migrations.executor", "django.db.models", "django.forms", "django.http", "django.template"),
)


def begin(
    path: str, arguments: list[str], environment: dict[str, str], folder: str, umask: int | None, *streams: int
) -> tuple[socket.socket, int]:
    """Start a program as a fork of the process that listens on the socket `path`, with these three streams.

    Returns the connection over which `end` receives the exit code, and the id of the process.
    """
    wanted = {"arguments": arguments, "environment": environment, "folder": folder, "umask": umask}
    asking = socket.socket(socket.AF_UNIX)
    asking.settimeout(_TIMEOUT)
    asking.connect(path)
    socket.send_fds(asking, [b"\n"], list(streams))
    asking.sendall(json.dumps(wanted).encode() + b"\n")
    return asking, int(asking.recv(_DIGITS))


def end(asking: socket.socket) -> int:
    """Wait until the process has ended, and return its exit code."""
    with asking:
        return int(asking.recv(_DIGITS))


def serve(descriptor: int) -> None:
    """Fork for each connection to this listening socket until stdin ends. Only a fork returns, to run its program."""
    import importlib
    import selectors
    import signal

    for name in _IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, _bury)
    with socket.socket(fileno=descriptor) as listening, selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            if any(key.fd == 0 for key, _ in selector.select()):
                os._exit(0)
            asking, _ = listening.accept()
            if os.fork() == 0:
                break
            asking.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    fork = os.fork()
    if fork:
        asking.sendall(f"{fork:{_DIGITS}}".encode())
        _, status = os.waitpid(fork, 0)
        asking.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    _become(asking)


def _bury(*_signal: object) -> None:
    """Reap the children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _become(asking: socket.socket) -> None:
    """Receive the request over the connection, and apply it to this process."""
    _, streams, _, _ = socket.recv_fds(asking, 1, 3)
    with asking, asking.makefile("rb") as question:
        wanted = json.loads(question.readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(wanted["folder"])
    if wanted["umask"] is not None:
        os.umask(wanted["umask"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = wanted["arguments"]


def _run_program() -> None:
    """Run the program that the arguments name, like the interpreter."""
    import runpy

    first, *rest = sys.argv
    if first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - what -c is for
    elif first == "-m":
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as the interpreter has it
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        assert not first.startswith("-"), "an option of the interpreter's own"
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))  # noqa: PTH100, PTH120 - as the interpreter has it
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    command, where, *program = sys.argv[1:]
    if command == "serve":
        serve(int(where))
        _run_program()
    else:
        before = os.umask(0)
        going, _ = begin(where, program, dict(os.environ), os.getcwd(), before, 0, 1, 2)  # noqa: PTH109 - bash's folder
        sys.exit(end(going))

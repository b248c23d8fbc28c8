"""Python processes that start at once: forks of one that has imported what the project imports of others.

Most of what `python manage.py` does is to import Django, psycopg and the like, which know nothing of settings. Here a
process does it once, and forks: the fork has its own arguments, environment, folder, umask and streams, reads the
settings and imports all of the project itself, and ends as any interpreter does.

`begin` and `end` are for the tests. Run as a program, this module takes the place of `python`.
"""

from __future__ import annotations

import json
import os
import socket
import sys

#: Long enough for a machine with much else to do; seconds.
_AT_MOST = 180
#: The id of the process comes first, in so many bytes.
_DIGITS = 16
#: Modules that know nothing of the settings; they bring along most of what is imported.
_IMPORTED = (
    *("asyncio", "concurrent.futures", "csv", "environ", "psycopg", "psycopg.errors", "rich.console", "rich.progress"),
    *("django.contrib.admin", "django.core.mail", "django.core.management", "django.db.backends.postgresql.base"),
    *("django.db.migrations.executor", "django.db.models", "django.forms", "django.http", "django.template"),
)


def begin(
    path: str, arguments: list[str], environment: dict[str, str], folder: str, umask: int | None, *streams: int
) -> tuple[socket.socket, int]:
    """Let the process at this socket fork, with these three streams; where the exit code will come, and the id."""
    wanted = {"arguments": arguments, "environment": environment, "folder": folder, "umask": umask}
    asking = socket.socket(socket.AF_UNIX)
    asking.settimeout(_AT_MOST)
    asking.connect(path)
    socket.send_fds(asking, [b"\n"], list(streams))
    asking.sendall(json.dumps(wanted).encode() + b"\n")
    return asking, int(asking.recv(_DIGITS))


def end(asking: socket.socket) -> int:
    """Wait for the end; the exit code."""
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
    """Let no child that has ended stay a zombie."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _become(asking: socket.socket) -> None:
    """Take over what was asked for."""
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
    """Run what the arguments name, as the interpreter would."""
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

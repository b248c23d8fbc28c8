"""A process of the bench: `python -m bench.candidate NAME` runs the limit or one of the naive ways, and prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
django.setup()

from django.conf import settings  # noqa: E402 - Django must be set up first
from django.db import connection  # noqa: E402 - Django must be set up first

from bench.limit import run_limit  # noqa: E402 - Django must be set up first
from bench.naive import CANDIDATES  # noqa: E402 - Django must be set up first


def main(name: str) -> None:
    """Run it, and say how long it took."""
    settings.DEBUG = False  # or Django would keep every statement
    connection.ensure_connection()
    started = time.monotonic()
    rows = run_limit(connection.connection) if name == "limit" else CANDIDATES[name]()
    seconds = time.monotonic() - started
    sys.stdout.write(json.dumps({"seconds": seconds, "read": rows}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

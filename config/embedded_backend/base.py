"""Starts the embedded server on the first connection, and reports on stderr that it is in use.

So importing the settings (for `--help`, a type checker, `check`) starts nothing.
"""

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from django.db.backends.postgresql import base, client

from config import embedded


class DatabaseClient(client.DatabaseClient):
    """`dbshell` on the embedded server."""

    def runshell(self, parameters: Iterable[str]) -> None:
        """Start psql."""
        # The address is known after the first connection; the server runs as long as this process.
        with self.connection.temporary_connection():
            pass
        super().runshell(parameters)


class DatabaseWrapper(base.DatabaseWrapper):
    """Django's PostgreSQL backend; `EMBEDDED_DATA` in the settings of the database is the data directory."""

    client_class = DatabaseClient

    def get_connection_params(self) -> dict[str, Any]:
        """Start the server if it is not running, and return the parameters with its address."""
        data = self.settings_dict["EMBEDDED_DATA"]
        address = embedded.start(data)
        _announce(data)
        self.settings_dict.update(HOST=address.host, PORT=address.port)
        return super().get_connection_params()


@cache
def _announce(data: Path) -> None:
    sys.stderr.write(f"Using the embedded development database in {data}.\n")

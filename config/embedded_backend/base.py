"""Starts the embedded server when the first connection is wanted, and says that it is the one that is worked on.

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
    """`dbshell`, on the embedded server and no other."""

    def runshell(self, parameters: Iterable[str]) -> None:
        """Start psql."""
        # Where the server listens is known once it has been connected to; it runs as long as this process.
        with self.connection.temporary_connection():
            pass
        super().runshell(parameters)


class DatabaseWrapper(base.DatabaseWrapper):
    """PostgreSQL as Django has it; `EMBEDDED_DATA` in the settings of the database names the data folder."""

    client_class = DatabaseClient

    def get_connection_params(self) -> dict[str, Any]:
        """Start the server where it does not run, and return where it listens."""
        data = self.settings_dict["EMBEDDED_DATA"]
        address = embedded.start(data)
        _announce(data)
        self.settings_dict.update(HOST=address.host, PORT=address.port)
        return super().get_connection_params()


@cache
def _announce(data: Path) -> None:
    sys.stderr.write(f"This is the embedded development database in {data}.\n")

"""Starts the embedded server when the first connection is wanted.

So importing the settings (for `--help`, a type checker, `check`) starts nothing.
"""

from pathlib import Path
from typing import Any

from django.db.backends.postgresql import base

from config import embedded


class DatabaseWrapper(base.DatabaseWrapper):
    """PostgreSQL as Django has it; `EMBEDDED_DATA` in the settings of the database names the data folder."""

    def get_connection_params(self) -> dict[str, Any]:
        address = embedded.start(Path(self.settings_dict["EMBEDDED_DATA"]))
        self.settings_dict.update(HOST=address.host, PORT=address.port)
        return super().get_connection_params()

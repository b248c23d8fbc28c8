"""`python manage.py check`: whether others can read the file with the password of the database."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Tags, Warning, register  # noqa: A004 - Django's name

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@register(Tags.security)
def check_dotenv(app_configs: Sequence[AppConfig] | None = None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001 - Django's signature
    """Warn of a file .env that group or world may read or write."""
    path = Path(settings.BASE_DIR) / ".env"
    if os.environ.get("CRM_DOTENV") == "off":
        return []
    try:
        mode = path.stat().st_mode
    except OSError:
        # Not there; what cannot be read is told when the settings are read.
        return []
    if not mode & _OTHERS:
        return []
    return [
        Warning(
            f"{path} has the password of the database and the secret key in it, and has the mode "
            f"{stat.S_IMODE(mode):04o}: other users of this machine may read or change it.",
            hint=f"chmod 600 {shlex.quote(str(path))}",
            id="crm.W010",
        )
    ]

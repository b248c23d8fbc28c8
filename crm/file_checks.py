"""`python manage.py check`: who can read the file with the password of the database; variables that nothing reads."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Tags, Warning, register  # noqa: A004 - Django's name

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@register(Tags.security)
def check_dotenv(app_configs: Sequence[AppConfig] | None = None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001 - Django's signature
    """Warn of a file .env that group or world may read or write, or that another user owns."""
    path = Path(settings.BASE_DIR) / ".env"
    if os.environ.get("CRM_DOTENV") == "off":
        return []
    try:
        found = path.stat()
    except OSError:
        # Not there; what cannot be read is told when the settings are read.
        return []
    mode, name, us = stat.S_IMODE(found.st_mode), shlex.quote(str(path)), os.geteuid()
    faults: list[str] = []
    remedies: list[str] = []
    # Whoever owns the folder may put another file there, and other code beside it.
    if found.st_uid not in (us, 0, path.parent.stat().st_uid):
        faults.append(f"belongs to the user {found.st_uid}, who is neither this one nor root nor owns the folder")
        remedies.append(f"chown {us} {name}")
    if mode & _OTHERS:
        faults.append(f"has the mode {mode:04o}")
        remedies.append(f"chmod 600 {name}")
    if not faults:
        return []
    return [
        Warning(
            f"{path} has the password of the database and the secret key in it, and {' and '.join(faults)}: "
            "other users of this machine may read or change it.",
            hint=" && ".join(remedies),
            id="crm.W010",
        )
    ]


@register()
def check_variables(app_configs: Sequence[AppConfig] | None = None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001 - Django's signature
    """Warn of variables that begin as ours do and that no setting reads. Those of .env are in the environment too."""
    known = settings.CRM_VARIABLES
    messages: list[CheckMessage] = []
    for name in sorted(os.environ):
        if name.startswith("CRM_") and name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"Write {nearest[0]}" if nearest else f"The names are {', '.join(known)}: correct it"
            messages.append(
                Warning(
                    f"No setting reads the variable {name}, so it has no effect.",
                    hint=f"{hint}, or leave it out.",
                    id="crm.W011",
                )
            )
    return messages

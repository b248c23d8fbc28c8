"""`python manage.py check`: the permissions of .env, and variables that no setting reads."""

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
    """Warn if other users may read or write .env, or own it."""
    path = Path(settings.BASE_DIR) / ".env"
    if os.environ.get("CRM_DOTENV") == "off":
        return []
    try:
        found = path.stat()
    except OSError:
        # The file does not exist. Reading the settings reports a file that cannot be read.
        return []
    mode, name, us = stat.S_IMODE(found.st_mode), shlex.quote(str(path)), os.geteuid()
    faults: list[str] = []
    remedies: list[str] = []
    # The owner of the folder could replace the file and the code anyway.
    if found.st_uid not in (us, 0, path.parent.stat().st_uid):
        faults.append(f"belongs to the user {found.st_uid}, not to this user, root or the owner of the folder")
        remedies.append(f"chown {us} {name}")
    if mode & _OTHERS:
        faults.append(f"has the mode {mode:04o}")
        remedies.append(f"chmod 600 {name}")
    if not faults:
        return []
    return [
        Warning(
            f"{path} contains the password of the database and the secret key, but {' and '.join(faults)}: "
            "other users of this machine may be able to read or change it.",
            hint=" && ".join(remedies),
            id="crm.W010",
        )
    ]


@register()
def check_variables(app_configs: Sequence[AppConfig] | None = None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001 - Django's signature
    """Warn of variables with the prefix CRM_ that no setting reads. Includes those of .env."""
    known = settings.CRM_VARIABLES
    messages: list[CheckMessage] = []
    for name in sorted(os.environ):
        if name.startswith("CRM_") and name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"Use {nearest[0]}" if nearest else f"Use one of {', '.join(known)}"
            messages.append(
                Warning(
                    f"No setting reads the variable {name}, so it has no effect.",
                    hint=f"{hint}, or remove it.",
                    id="crm.W011",
                )
            )
    return messages

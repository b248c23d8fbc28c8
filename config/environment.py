"""Reads typed values from the environment with django-environ, and refuses values that it would misread.

django-environ reads a misspelled `on` as off, and a value that begins with $ as the name of another variable; if that
is unset, it returns the default. It keeps white space around the items of a list. Its errors quote the value, which may
be a secret.
"""

from collections.abc import Callable
from typing import Any, Final

import environ
from django.core.exceptions import ImproperlyConfigured

_SWITCH: Final = dict.fromkeys(environ.Env.BOOLEAN_TRUE_STRINGS, True) | dict.fromkeys(
    ("false", "off", "no", "n", "0"), False
)
_FAULT: Final = {bool: "neither on nor off: write one of them", int: "not a whole number: correct it"}


def _switch(text: str) -> bool:
    return _SWITCH[text.lower()]


def _whole_number(text: str) -> int:
    # int() accepts 1_000 and digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


_PARSERS: Final[dict[Any, Callable[[str], Any]]] = {bool: _switch, int: _whole_number}


class Env(environ.Env):  # type: ignore[misc] # django-environ has no type hints
    """Reads variables, such as `env.bool("DEBUG", default=False)`.

    White space around a value is removed. An empty variable counts as unset.
    """

    def get_value(self, var: str, cast: Any = None, default: Any = environ.Env.NOTSET, **_parsing: Any) -> Any:
        """Return the value of a variable, or the default. Raises ImproperlyConfigured, without the value."""
        text = self.ENVIRON.get(var, "").strip()
        if not text and default is not self.NOTSET:
            return default
        try:
            value: Any = _PARSERS[cast](text) if cast in _PARSERS else self.parse_value(text, cast)
        except (KeyError, ValueError):
            raise ImproperlyConfigured(f"{var} is {_FAULT[cast]}, or leave it out.") from None
        return [item.strip() for item in value] if cast is list else value

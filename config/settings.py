"""The settings of the project. They come from the environment and, if it exists, the file .env next to manage.py.

With DATABASE_URL this is production unless DEBUG is on: the admin needs a SECRET_KEY and is served over HTTPS only.
With CRM_EMBEDDED_DATA instead, this is development on the embedded PostgreSQL in that directory. With neither there is
no database: a server that lost its DATABASE_URL must not use a demo database. .env.example lists every variable.
"""

import os
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.validators import validate_email

from config import database, dotenv, embedded
from config.environment import Env

BASE_DIR = Path(__file__).resolve().parent.parent

#: The longest timeout of PostgreSQL, in seconds.
LONGEST_TIMEOUT = 2_147_483
#: The limits of Django's deployment check (security.W009).
SHORTEST_KEY, FEWEST_DIFFERENT = 50, 5

#: The variables that begin with CRM_; the system check reports any other one as misspelled.
CRM_VARIABLES = (
    *("CRM_ASSIGN_TO_REFERRER", "CRM_DOTENV", "CRM_EMBEDDED_DATA", "CRM_PLACEHOLDER_DOMAIN", "CRM_STATEMENT_TIMEOUT"),
)

env = Env()


def _read_dotenv(path: Path) -> None:
    """Load the file into the environment, whose own values take precedence. A missing file is ignored.

    Raises ImproperlyConfigured if the file is unreadable or does not set DATABASE_URL.
    """
    if env.str("CRM_DOTENV", default="") == "off" or not os.path.lexists(path):
        return
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Reading a pipe could wait forever.
            raise ImproperlyConfigured(
                f"{path} cannot be read because it is not a regular file: replace it with one, or set CRM_DOTENV=off "
                "to ignore it."
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImproperlyConfigured(
            f"{path} cannot be read ({type(error).__name__}): make it UTF-8 text that this user can read, or set "
            "CRM_DOTENV=off to ignore it."
        ) from None
    for name, value in dotenv.parse(text).items():
        os.environ.setdefault(name, value)
    if "DATABASE_URL" not in env:
        raise ImproperlyConfigured(
            f"{path} does not set DATABASE_URL: add it, or set CRM_DOTENV=off in the environment to ignore the file."
        )


def _development_key(path: Path) -> str:
    """Return a secret that is created once per checkout: sessions survive a restart of the development server."""
    made_up = path.with_name(f"{path.name}.{os.getpid()}")
    if not path.exists():
        made_up.touch(mode=0o600)
        made_up.write_text(secrets.token_urlsafe(50), encoding="ascii")
        # A link never replaces a file: processes that start at the same time all use the first key.
        with suppress(FileExistsError):
            path.hardlink_to(made_up)
        made_up.unlink()
    return path.read_text(encoding="ascii")


HOW_TO_MAKE_A_KEY = (
    'Create one with `python3 -c "import secrets; print(secrets.token_urlsafe(50))"` and set it in the environment or '
    "in .env."
)


def _secret_key() -> str:
    key: str = env.str("SECRET_KEY", default="")
    is_strong = len(key) >= SHORTEST_KEY and len(set(key)) >= FEWEST_DIFFERENT
    if key and (DEBUG or is_strong):
        return key
    if key:
        raise ImproperlyConfigured(
            f"SECRET_KEY is easily guessed: the admin signs its sessions with it, so it needs at least {SHORTEST_KEY} "
            f"characters, {FEWEST_DIFFERENT} of them different. {HOW_TO_MAKE_A_KEY}"
        )
    if DEBUG or IS_DEVELOPMENT:
        return _development_key(BASE_DIR / ".secret-key.development")
    # Only the admin needs a key, and is not served without one; the other commands work without it.
    return ""


def _embedded_data() -> Path | None:
    """Return the data directory of the embedded server, if one is set."""
    folder = env.str("CRM_EMBEDDED_DATA", default="")
    if folder and "DATABASE_URL" in env:
        raise ImproperlyConfigured(
            "DATABASE_URL and CRM_EMBEDDED_DATA are both set, so the database is ambiguous: unset CRM_EMBEDDED_DATA to "
            "use DATABASE_URL. To use the embedded development database, unset DATABASE_URL, and set CRM_DOTENV=off if "
            ".env sets it."
        )
    return Path(folder).resolve() if folder else None


def _seconds(name: str, default: int, most: int | None = None) -> int:
    seconds: int = env.int(name, default=default)
    if most is not None and seconds > most:
        raise ImproperlyConfigured(f"{name} is greater than {most}: set 0 for no limit.")
    return seconds


def _domain(name: str, default: str) -> str:
    value: str = env.str(name, default=default).lower()
    try:
        validate_email(f"client-0@{value}")
    except ValidationError:
        raise ImproperlyConfigured(
            f"{name} is not the domain of an email address: correct it, or remove it to use {default}."
        ) from None
    return value


_read_dotenv(BASE_DIR / ".env")

# The database

BACKFILL_SCHEMA = "crm_backfill"
database.require_no_detour(os.environ)
IS_DEVELOPMENT = "DATABASE_URL" not in env
EMBEDDED_DATA = _embedded_data()

DATABASE_CONNECTION_LIMIT: int | None = None
LEGACY_SCHEMA = database.DEFAULT_SCHEMA
DATABASES: dict[str, dict[str, Any]]

if not IS_DEVELOPMENT:
    _database = database.parse(env.str("DATABASE_URL", default=""), backfill_schema=BACKFILL_SCHEMA)
    LEGACY_SCHEMA = _database.legacy_schema
    DATABASE_CONNECTION_LIMIT = _database.connection_limit
    DATABASES = {"default": _database.django_entry(BACKFILL_SCHEMA)}
else:
    DATABASES = {"default": embedded.django_entry(EMBEDDED_DATA, BACKFILL_SCHEMA, LEGACY_SCHEMA)}

# Options of the operator

# Whether a lead or an intake without a preparer gets the one who referred the person.
CRM_ASSIGN_TO_REFERRER: bool = env.bool("CRM_ASSIGN_TO_REFERRER", default=True)
CRM_PLACEHOLDER_DOMAIN = _domain("CRM_PLACEHOLDER_DOMAIN", default="crm-backfill.invalid")
# The limit for one statement of a command, in seconds; statements of a batch have a limit of a minute.
CRM_STATEMENT_TIMEOUT = _seconds("CRM_STATEMENT_TIMEOUT", default=600, most=LONGEST_TIMEOUT)

# Security

DEBUG: bool = env.bool("DEBUG", default=False)
SECRET_KEY = _secret_key()
#: Why the admin cannot be served; None if it can.
NOT_SERVED = (
    None
    if SECRET_KEY
    else "SECRET_KEY is not set: the admin signs its sessions with it, and there is no default in production. "
    f"{HOW_TO_MAKE_A_KEY}"
)
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=[])
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", default=[])

# Turn this off only to view the admin through `runserver` on your own machine.
HTTPS_ONLY: bool = env.bool("HTTPS_ONLY", default=not DEBUG and not IS_DEVELOPMENT)
SECURE_SSL_REDIRECT = HTTPS_ONLY
SESSION_COOKIE_SECURE = HTTPS_ONLY
CSRF_COOKIE_SECURE = HTTPS_ONLY
# One hour, so that a mistake is temporary; raise it when HTTPS has worked for some time.
SECURE_HSTS_SECONDS = _seconds("SECURE_HSTS_SECONDS", default=3600 if HTTPS_ONLY else 0)
SECURE_HSTS_INCLUDE_SUBDOMAINS = HTTPS_ONLY
SECURE_HSTS_PRELOAD = HTTPS_ONLY
# Trust this header only from a proxy that always sets it, whatever the client sent.
if env.bool("BEHIND_TLS_PROXY", default=False):
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

# The admin

INSTALLED_APPS = [
    # First, because its runserver replaces Django's.
    "crm",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{validator}"}
    for validator in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]

ROOT_URLCONF = "config.urls"
STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

LANGUAGE_CODE = "en-us"
USE_I18N = True
USE_TZ = True
TIME_ZONE = "UTC"

# Log to stderr, so that stdout contains only the output of a command. INFO messages, such as a wait for --max-rate, are
# shown only on a terminal: cron would mail them every night.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"},
    },
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "line",
            "level": "INFO" if sys.stderr is not None and sys.stderr.isatty() else "WARNING",
        },
    },
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {
        "crm": {"level": "INFO"},
    },
}

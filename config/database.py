"""Translates DATABASE_URL from Prisma's format into Django settings. Pure: reads, starts and connects to nothing.

libpq refuses a URL with Prisma's parameters. So each parameter is translated if it has a meaning here, dropped if it
only tunes Prisma's engine, and refused if dropping it would be unsafe. An unknown parameter is refused by name.

    schema                the application's schema; second in the search path, after crm_backfill
    sslmode, channel_binding, application_name, connect_timeout, host, port, options
                          passed to libpq; `host` may be the directory of a socket
    sslaccept=strict      sslmode=verify-full, with the given root certificate or those of the system
    sslcert               in Prisma the certificate of the server's authority: sslrootcert. With `sslkey` it is
                          libpq's parameter: the client's certificate
    sslrootcert=system    the certificate authorities of the system, with sslmode=verify-full
    sslidentity           refused: libpq does not read PKCS#12
    pgbouncer=true        no start-up options, no server-side cursors
    connection_limit      the number of connections that a run may use
    pool_timeout, socket_timeout, statement_cache_size, max_connection_lifetime, max_idle_connection_lifetime
                          dropped: there is no pool, every batch has its own timeout, and no statement is prepared

No message contains the URL or a value from it: in a malformed URL, any part may be the password.

`Env.db_url` of django-environ passes every parameter on to libpq, drops one that is given twice, and does not know what
they mean to Prisma. What it cannot read it quotes, in a warning or an error, or takes for a URL without a database.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured

# Prisma's defaults.
DEFAULT_HOST: Final = "localhost"
DEFAULT_PORT: Final = 5432
DEFAULT_SCHEMA: Final = "public"
DEFAULT_CONNECT_TIMEOUT: Final = "5"

APPLICATION_NAME: Final = "crm_backfill"
#: Send a statement and its values to the server separately. As one text, an error in a single row would write all rows
#: into the server's log.
BINDING: Final = {"server_side_binding": True}
# PostgreSQL truncates a longer name silently, and it then names another schema.
LONGEST_NAME: Final = 63

_PASSED_ON: Final = frozenset(
    {
        "application_name",
        "channel_binding",
        "connect_timeout",
        "options",
        "sslcert",
        "sslkey",
        "sslmode",
        "sslpassword",
        "sslrootcert",
    }
)
_TRANSLATED: Final = frozenset({"connection_limit", "host", "pgbouncer", "port", "schema", "sslaccept"})
_DROPPED: Final = frozenset(
    {
        "max_connection_lifetime",
        "max_idle_connection_lifetime",
        "pool_timeout",
        "socket_timeout",
        "statement_cache_size",
    }
)
_WHOLE_NUMBERS: Final = frozenset({"connect_timeout", "connection_limit"}) | _DROPPED
_CHOICES: Final = {
    "channel_binding": ("disable", "prefer", "require"),
    "pgbouncer": ("true", "false"),
    "sslaccept": ("strict", "accept_invalid_certs"),
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
}
_FILES: Final = ("sslcert", "sslkey", "sslrootcert")
#: libpq's name for the certificates of the operating system.
SYSTEM_CERTIFICATES: Final = "system"
# The upper bound of max_connections in PostgreSQL.
MAX_CONNECTIONS: Final = 262_143


#: Variables that make libpq connect to another server than the one that a connection names.
DETOURS: Final = ("PGHOSTADDR", "PGSERVICE")


class DatabaseUrlError(ImproperlyConfigured):
    """DATABASE_URL cannot be used. The message has the name, the reason and the remedy in one line, never a value."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"DATABASE_URL cannot be used: {reason}. {way_out}")


def require_no_detour(environment: Mapping[str, str]) -> None:
    """Refuse an environment in which libpq would connect to another server than the one in DATABASE_URL.

    Raises ImproperlyConfigured.
    """
    if found := [name for name in DETOURS if environment.get(name)]:
        raise ImproperlyConfigured(
            f"{' and '.join(found)} in the environment would make the connection use another server than the one in "
            "DATABASE_URL: unset it."
        )


@dataclass(frozen=True)
class Database:
    """The parts of a URL. `repr` omits the secret ones."""

    host: str
    port: int
    name: str
    user: str
    legacy_schema: str
    behind_pgbouncer: bool
    connection_limit: int | None
    password: str = field(repr=False)
    libpq: dict[str, str] = field(repr=False)

    def django_entry(self, backfill_schema: str) -> dict[str, Any]:
        """Return the entry for Django's DATABASES, with `backfill_schema` first in the search path."""
        libpq = dict(self.libpq)
        if not self.behind_pgbouncer:
            own = startup_options(backfill_schema, self.legacy_schema)
            libpq["options"] = f"{libpq['options']} {own}" if "options" in libpq else own
        return {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": self.host,
            "PORT": str(self.port),
            "NAME": self.name,
            "USER": self.user,
            "PASSWORD": self.password,
            "OPTIONS": {**libpq, **BINDING},
            "DISABLE_SERVER_SIDE_CURSORS": self.behind_pgbouncer,
        }


def parse(url: str, *, backfill_schema: str) -> Database:
    """Parse a URL in Prisma's format. Raises DatabaseUrlError, which names the part that cannot be used."""
    parts = _split(url)
    parameters = _parameters(parts.query)
    credentials, _, address = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    host, port = _address(address)
    host = _decoded(parameters.get("host") or host, "host", encoded="host" not in parameters) or DEFAULT_HOST
    _require_one_host(host)
    return Database(
        host=host,
        port=_port(parameters["port"]) if "port" in parameters else port,
        name=_name(parts.path),
        user=_decoded(user, "user"),
        password=_decoded(password, "password"),
        legacy_schema=_legacy_schema(parameters.get("schema") or DEFAULT_SCHEMA, backfill_schema),
        behind_pgbouncer=parameters.get("pgbouncer") == "true",
        connection_limit=int(parameters["connection_limit"]) if "connection_limit" in parameters else None,
        libpq=_libpq(parameters),
    )


def startup_options(backfill_schema: str, legacy_schema: str) -> str:
    """Return the start-up options of a connection. The search path is quoted for SQL, then for the options parser."""
    path = f"{backfill_schema},{quoted_name(legacy_schema)}"
    escaped = "".join(f"\\{character}" if character.isspace() or character == "\\" else character for character in path)
    return f"-c search_path={escaped} -c TimeZone=UTC"


def quoted_name(name: str) -> str:
    """Return the name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _split(url: str) -> SplitResult:
    if not url.strip():
        raise DatabaseUrlError(
            "it is set but empty",
            "Give it a value, or unset it and set CRM_EMBEDDED_DATA to use the embedded development database.",
        )
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        # The message of this error quotes the URL.
        raise DatabaseUrlError("it is not a URL", _PERCENT_ENCODE) from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise DatabaseUrlError(
            "it does not begin with postgresql:// or postgres://",
            "Give the direct address of the PostgreSQL database, without quotation marks.",
        )
    if parts.fragment or "#" in url:
        raise DatabaseUrlError("it contains a #", _PERCENT_ENCODE)
    return parts


_PERCENT_ENCODE: Final = (
    "In a user name or password, characters such as @ : / ? # [ ] % must be percent-encoded (# is %23, / is %2F)."
)


def _parameters(query: str) -> dict[str, str]:
    given = parse_qsl(query, keep_blank_values=True)
    parameters = dict(given)
    for name, value in parameters.items():
        _check_parameter(name, value)
    if len(parameters) < len(given):
        twice = next(name for name in parameters if sum(name == other for other, _ in given) > 1)
        raise DatabaseUrlError(f"the parameter {twice} is given more than once", "Remove all but one.")
    if "sslidentity" in parameters:
        raise DatabaseUrlError(
            "sslidentity is a PKCS#12 file, which libpq does not read",
            "Split it with openssl into a certificate and a key, and set sslcert and sslkey.",
        )
    return parameters


def _check_parameter(name: str, value: str) -> None:
    if name not in _PASSED_ON | _TRANSLATED | _DROPPED | {"sslidentity"}:
        # Show only a plain word: the rest of a password that contains a ? or & ends up here, too.
        shown = f"the parameter {name}" if _is_plain_word(name) else "one of its parameters"
        raise DatabaseUrlError(f"{shown} is unknown", f"Remove it from the URL. {_PERCENT_ENCODE}")
    if "\0" in value:
        raise DatabaseUrlError(f"the parameter {name} contains a NUL character", "Remove it from the URL.")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise DatabaseUrlError(f"the parameter {name} has an unknown value", f"Use one of {', '.join(_CHOICES[name])}.")
    if name in _WHOLE_NUMBERS and not (value.isascii() and value.isdigit()):
        raise DatabaseUrlError(f"the parameter {name} is not a whole number", "Correct or remove it.")
    if name == "connection_limit" and not 1 <= int(value[:9]) <= MAX_CONNECTIONS:
        raise DatabaseUrlError(f"connection_limit is not a number from 1 to {MAX_CONNECTIONS}", "Correct or remove it.")
    if name in _FILES and not value.startswith("/") and (name, value) != ("sslrootcert", SYSTEM_CERTIFICATES):
        # Prisma resolves a relative path against the directory of its schema file, which is unknown here.
        raise DatabaseUrlError(f"the parameter {name} is not an absolute path", "Give a path that begins with /.")


def _is_plain_word(name: str) -> bool:
    return name.isascii() and name.replace("_", "").isalpha() and len(name) <= 40


def _address(address: str) -> tuple[str, int]:
    _require_one_host(address)
    host, colon, port = address.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = address, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif set(host) & set("[]:"):
        raise DatabaseUrlError("its host cannot be read", _PERCENT_ENCODE)
    return host, _port(port) if port else DEFAULT_PORT


def _require_one_host(text: str) -> None:
    if "," in text:
        raise DatabaseUrlError("it names several hosts", "Give only the primary server.")


def _port(port: str) -> int:
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise DatabaseUrlError("its port is not a number from 1 to 65535", _PERCENT_ENCODE)
    return int(port)


def _name(path: str) -> str:
    encoded = path.removeprefix("/")
    if not encoded:
        raise DatabaseUrlError("it names no database", "Put the name after the host: postgresql://user@host:5432/name.")
    if "/" in encoded:
        raise DatabaseUrlError("the database name contains a /", _PERCENT_ENCODE)
    return _decoded(encoded, "name of the database")


def _decoded(value: str, what: str, *, encoded: bool = True) -> str:
    try:
        decoded = unquote(value, errors="strict") if encoded else value
    except UnicodeDecodeError:
        raise DatabaseUrlError(f"the {what} is not percent-encoded UTF-8", _PERCENT_ENCODE) from None
    if "\0" in decoded:
        raise DatabaseUrlError(f"the {what} contains a NUL character", "PostgreSQL does not support that: remove it.")
    return decoded


def _legacy_schema(schema: str, backfill_schema: str) -> str:
    if schema == backfill_schema:
        raise DatabaseUrlError(
            f"its schema is {backfill_schema}, which contains the tables of the backfill",
            "Give the schema of the application's tables (Prisma's default is public).",
        )
    if len(schema.encode()) > LONGEST_NAME:
        raise DatabaseUrlError(f"its schema is longer than {LONGEST_NAME} bytes", "Correct the parameter schema.")
    return schema


def _libpq(parameters: dict[str, str]) -> dict[str, str]:
    passed_on = {name: value for name, value in parameters.items() if name in _PASSED_ON and value}
    libpq = {"application_name": APPLICATION_NAME, "connect_timeout": DEFAULT_CONNECT_TIMEOUT} | passed_on
    if "sslcert" in libpq and "sslkey" not in libpq:
        certificate = libpq.pop("sslcert")
        libpq.setdefault("sslrootcert", certificate)
    if parameters.get("sslaccept") == "strict":
        if libpq.get("sslmode") == "disable":
            raise DatabaseUrlError("sslaccept=strict and sslmode=disable contradict each other", "Remove one of them.")
        libpq["sslmode"] = "verify-full"
        libpq.setdefault("sslrootcert", SYSTEM_CERTIFICATES)
    if libpq.get("sslrootcert") == SYSTEM_CERTIFICATES and libpq.setdefault("sslmode", "verify-full") != "verify-full":
        raise DatabaseUrlError(
            "sslrootcert=system needs sslmode=verify-full", "Set that, or name the file of a root certificate."
        )
    return libpq

"""DATABASE_URL, as Prisma writes it, translated into Django's terms. Pure: nothing is read, started or connected.

libpq refuses a URL with Prisma's parameters, so each of them is translated where it has a meaning here, dropped where
it only tunes Prisma's own engine, and refused where dropping it would be unsafe. An unknown one is refused by name.

    schema                the application's schema; comes second in the search path, after our own
    sslmode, channel_binding, application_name, connect_timeout, host, port, options
                          handed to libpq; `host` may be the folder of a socket
    sslaccept=strict      sslmode=verify-full, against the given root certificate or those of the system
    sslcert               to Prisma the certificate of the server's authority: sslrootcert. Beside `sslkey` it is
                          libpq's own parameter: the client's certificate
    sslrootcert=system    the authorities of the system, with sslmode=verify-full
    sslidentity           refused: libpq does not read PKCS#12
    pgbouncer=true        no start-up options, no server-side cursors
    connection_limit      how many connections a run may use
    pool_timeout, socket_timeout, statement_cache_size, max_connection_lifetime, max_idle_connection_lifetime
                          dropped: there is no pool here, every batch has a timeout of its own, and nothing is prepared

No message holds the URL or a value out of it: a password can end up in any part of a URL that was written wrongly.

`Env.db_url` of django-environ hands every parameter on to libpq, drops one that is given twice, and does not know what
they mean to Prisma. What it cannot read it quotes, in a warning or an error, or takes for a URL that has no database.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured

# Prisma's own defaults: a URL that leaves these out means them.
DEFAULT_HOST: Final = "localhost"
DEFAULT_PORT: Final = 5432
DEFAULT_SCHEMA: Final = "public"
DEFAULT_CONNECT_TIMEOUT: Final = "5"

APPLICATION_NAME: Final = "crm_backfill"
#: A statement and its values go to the server apart. In one text, whatever the server had against a single row would
#: write all rows into its log.
BINDING: Final = {"server_side_binding": True}
# PostgreSQL cuts a longer name off without a word, and it then names another schema.
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
#: libpq's word for the certificates of the operating system.
SYSTEM_CERTIFICATES: Final = "system"
# PostgreSQL's own upper bound of max_connections.
MAX_CONNECTIONS: Final = 262_143


#: Variables that lead libpq to another server than the one that a connection names.
DETOURS: Final = ("PGHOSTADDR", "PGSERVICE")


class DatabaseUrlError(ImproperlyConfigured):
    """DATABASE_URL cannot be used. The message is one line: the name, the reason, the way out; never the value."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"DATABASE_URL cannot be used: {reason}. {way_out}")


def require_no_detour(environment: Mapping[str, str]) -> None:
    """Refuse an environment in which libpq would connect to another server than the one that is named.

    Raises ImproperlyConfigured.
    """
    if found := [name for name in DETOURS if environment.get(name)]:
        raise ImproperlyConfigured(
            f"{' and '.join(found)} in the environment would lead to another server than the one that is named: unset "
            "it, and let DATABASE_URL say where to connect."
        )


@dataclass(frozen=True)
class Database:
    """What a URL says. `repr` leaves out what must not be shown."""

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
        """The entry of Django's DATABASES, with our schema before the application's in the search path."""
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
    """Read a URL as Prisma writes it. Raises DatabaseUrlError, which names the part that cannot be used."""
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
    """The start-up options of a connection: the search path, quoted for SQL and then for the server's splitting."""
    path = f"{backfill_schema},{quoted_name(legacy_schema)}"
    escaped = "".join(f"\\{character}" if character.isspace() or character == "\\" else character for character in path)
    return f"-c search_path={escaped} -c TimeZone=UTC"


def quoted_name(name: str) -> str:
    """The name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _split(url: str) -> SplitResult:
    if not url.strip():
        raise DatabaseUrlError(
            "it is set but empty",
            "Give it a value, or unset it and set CRM_EMBEDDED_DATA to work on the embedded development database.",
        )
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        # Its message quotes the URL.
        raise DatabaseUrlError("it is not a URL", _PERCENT_ENCODE) from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise DatabaseUrlError(
            "it does not begin with postgresql:// or postgres://",
            "Give the direct address of the PostgreSQL database, without quotation marks.",
        )
    if parts.fragment or "#" in url:
        raise DatabaseUrlError("there is a # in it", _PERCENT_ENCODE)
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
        raise DatabaseUrlError(f"the parameter {twice} is given more than once", "Leave one of them.")
    if "sslidentity" in parameters:
        raise DatabaseUrlError(
            "sslidentity is a PKCS#12 file, which libpq does not read",
            "Split it with openssl into a certificate and a key, and give sslcert and sslkey.",
        )
    return parameters


def _check_parameter(name: str, value: str) -> None:
    if name not in _PASSED_ON | _TRANSLATED | _DROPPED | {"sslidentity"}:
        # Only a plain word is repeated: the rest of a password that holds a ? or & lands here too.
        shown = f"the parameter {name}" if _is_plain_word(name) else "one of its parameters"
        raise DatabaseUrlError(f"{shown} is not known here", f"Take it out of the URL. {_PERCENT_ENCODE}")
    if "\0" in value:
        raise DatabaseUrlError(f"the parameter {name} holds a NUL character", "Take it out of the URL.")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise DatabaseUrlError(f"the parameter {name} has an unknown value", f"Use one of {', '.join(_CHOICES[name])}.")
    if name in _WHOLE_NUMBERS and not (value.isascii() and value.isdigit()):
        raise DatabaseUrlError(f"the parameter {name} is not a whole number", "Correct it or take it out.")
    if name == "connection_limit" and not 1 <= int(value[:9]) <= MAX_CONNECTIONS:
        raise DatabaseUrlError(
            f"connection_limit is not a number from 1 to {MAX_CONNECTIONS}", "Correct it, or take it out."
        )
    if name in _FILES and not value.startswith("/") and (name, value) != ("sslrootcert", SYSTEM_CERTIFICATES):
        # Prisma resolves a relative path against the folder of its own schema file, which is not here.
        raise DatabaseUrlError(f"the parameter {name} is not a full path", "Give the path from / on.")


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
        raise DatabaseUrlError("it names several hosts", "Give the one of the primary server.")


def _port(port: str) -> int:
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise DatabaseUrlError("its port is not a number from 1 to 65535", _PERCENT_ENCODE)
    return int(port)


def _name(path: str) -> str:
    encoded = path.removeprefix("/")
    if not encoded:
        raise DatabaseUrlError("it names no database", "Put the name after the host: postgresql://user@host:5432/name.")
    if "/" in encoded:
        raise DatabaseUrlError("there is a / in the name of the database", _PERCENT_ENCODE)
    return _decoded(encoded, "name of the database")


def _decoded(value: str, what: str, *, encoded: bool = True) -> str:
    try:
        decoded = unquote(value, errors="strict") if encoded else value
    except UnicodeDecodeError:
        raise DatabaseUrlError(f"the {what} is not percent-encoded UTF-8", _PERCENT_ENCODE) from None
    if "\0" in decoded:
        raise DatabaseUrlError(f"the {what} holds a NUL character", "PostgreSQL has no such thing: take it out.")
    return decoded


def _legacy_schema(schema: str, backfill_schema: str) -> str:
    if schema == backfill_schema:
        raise DatabaseUrlError(
            f"its schema is {backfill_schema}, where the tables of the backfill live",
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
            raise DatabaseUrlError("sslaccept=strict and sslmode=disable contradict each other", "Take one out.")
        libpq["sslmode"] = "verify-full"
        libpq.setdefault("sslrootcert", SYSTEM_CERTIFICATES)
    if libpq.get("sslrootcert") == SYSTEM_CERTIFICATES and libpq.setdefault("sslmode", "verify-full") != "verify-full":
        raise DatabaseUrlError(
            "sslrootcert=system needs sslmode=verify-full", "Say so, or name the file of a root certificate."
        )
    return libpq

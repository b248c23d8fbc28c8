"""DATABASE_URL as Prisma writes it, and what becomes of it."""

import ast
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.core.exceptions import ImproperlyConfigured
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from config import database as database_module
from config.database import BINDING, Database, DatabaseUrlError, parse, startup_options
from tests.support.profiles import examples

SCHEMA = "crm_backfill"
PLAIN = "postgresql://crm:secret@db.example.com:6543/tax"
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def read(url: str) -> Database:
    return parse(url, backfill_schema=SCHEMA)


def entry(url: str) -> dict[str, Any]:
    return read(url).django_entry(SCHEMA)


def refusal(url: str) -> str:
    with pytest.raises(DatabaseUrlError) as caught:
        read(url)
    return str(caught.value)


class TestAddress:
    @pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
    def test_both_schemes(self, scheme: str) -> None:
        database = read(f"{scheme}://crm:secret@db.example.com:6543/tax")
        assert (database.host, database.port, database.name) == ("db.example.com", 6543, "tax")
        assert (database.user, database.password) == ("crm", "secret")

    def test_what_is_left_out_is_what_prisma_means(self) -> None:
        database = read("postgresql:///tax")
        assert (database.host, database.port, database.user, database.password) == ("localhost", 5432, "", "")
        assert database.legacy_schema == "public"
        assert entry("postgresql:///tax")["OPTIONS"]["connect_timeout"] == "5"

    def test_the_folder_of_a_socket(self) -> None:
        assert (
            read("postgresql://crm@localhost/tax?host=/cloudsql/My-Project:eu:db").host == "/cloudsql/My-Project:eu:db"
        )
        assert read("postgresql://crm@%2Fvar%2Frun%2FPostgreSQL/tax").host == "/var/run/PostgreSQL"

    def test_an_address_of_ip_version_6(self) -> None:
        assert (read("postgresql://crm@[::1]:6543/tax").host, read("postgresql://crm@[::1]/tax").port) == ("::1", 5432)

    @given(user=TEXT, password=TEXT, name=TEXT.filter(bool))
    def test_any_percent_encoded_name_and_password(self, user: str, password: str, name: str) -> None:
        database = read(f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@db:1/{quote(name, safe='')}")
        assert (database.user, database.password, database.name) == (user, password, name)
        assert (database.host, database.port) == ("db", 1)

    @given(password=st.text("p@:!$&'()*+,;=~é %", min_size=1).filter(lambda text: "%" not in text))
    def test_what_prisma_reads_without_encoding(self, password: str) -> None:
        assert read(f"postgresql://crm:{password}@db/tax").password == password


class TestParameters:
    def test_the_search_path_has_our_schema_first(self) -> None:
        assert entry(f"{PLAIN}?schema=app")["OPTIONS"]["options"] == (
            '-c search_path=crm_backfill,"app" -c TimeZone=UTC'
        )

    @given(schema=TEXT.filter(lambda text: text != SCHEMA and 0 < len(text.encode()) <= 63))
    def test_any_name_of_a_schema_survives_the_splitting_of_the_server(self, schema: str) -> None:
        assert read(f"{PLAIN}?schema={quote(schema, safe='')}").legacy_schema == schema
        search_path = split_as_the_server_does(startup_options(SCHEMA, schema))[1].removeprefix("search_path=")
        assert search_path == f'{SCHEMA},"{schema.replace(chr(34), chr(34) * 2)}"'

    def test_behind_pgbouncer_nothing_is_set_at_the_start_and_no_cursor_is_kept(self) -> None:
        behind = entry(f"{PLAIN}?pgbouncer=true")
        assert "options" not in behind["OPTIONS"]
        assert behind["DISABLE_SERVER_SIDE_CURSORS"] is True
        assert entry(f"{PLAIN}?pgbouncer=false")["DISABLE_SERVER_SIDE_CURSORS"] is False

    def test_the_connection_limit_is_for_the_runner(self) -> None:
        assert read(f"{PLAIN}?connection_limit=5").connection_limit == 5
        assert read(PLAIN).connection_limit is None

    def test_what_libpq_knows_is_handed_on(self) -> None:
        options = entry(f"{PLAIN}?sslmode=require&connect_timeout=0&application_name=nightly&channel_binding=require")
        assert options["OPTIONS"] | {"options": ""} == {
            "sslmode": "require",
            "connect_timeout": "0",
            "application_name": "nightly",
            "channel_binding": "require",
            "options": "",
            **BINDING,
        }

    def test_what_only_tunes_prisma_is_dropped(self) -> None:
        tuned = f"{PLAIN}?pool_timeout=0&socket_timeout=30&statement_cache_size=0&max_connection_lifetime=300"
        assert entry(tuned) == entry(PLAIN)

    def test_start_up_options_of_the_url_come_before_ours(self) -> None:
        assert entry(f"{PLAIN}?options=endpoint%3Dblue")["OPTIONS"]["options"].startswith(
            "endpoint=blue -c search_path="
        )
        assert entry(f"{PLAIN}?options=endpoint%3Dblue&pgbouncer=true")["OPTIONS"]["options"] == "endpoint=blue"

    def test_libpq_takes_all_that_is_handed_on(self) -> None:
        options = entry(f"{PLAIN}?sslmode=require&sslcert=/ca.pem&schema=my%20schema&connection_limit=5")["OPTIONS"]
        libpq = {name: value for name, value in options.items() if name not in BINDING}
        assert conninfo_to_dict(make_conninfo(**libpq)) == libpq


class TestTls:
    def test_a_certificate_alone_is_the_authority_as_in_prisma(self) -> None:
        options = entry(f"{PLAIN}?sslmode=require&sslcert=/etc/ca.pem")["OPTIONS"]
        assert options["sslrootcert"] == "/etc/ca.pem"
        assert "sslcert" not in options

    def test_a_certificate_with_its_key_is_the_client_as_in_libpq(self) -> None:
        options = entry(f"{PLAIN}?sslmode=require&sslcert=/me.pem&sslkey=/me.key&sslrootcert=/ca.pem")["OPTIONS"]
        assert (options["sslcert"], options["sslkey"], options["sslrootcert"]) == ("/me.pem", "/me.key", "/ca.pem")

    def test_strict_means_that_the_server_is_verified(self) -> None:
        options = entry(f"{PLAIN}?sslaccept=strict&sslmode=require")["OPTIONS"]
        assert (options["sslmode"], options["sslrootcert"]) == ("verify-full", "system")
        assert entry(f"{PLAIN}?sslaccept=strict&sslcert=/ca.pem")["OPTIONS"]["sslrootcert"] == "/ca.pem"

    def test_the_certificates_of_the_system_are_a_value(self) -> None:
        options = entry(f"{PLAIN}?sslrootcert=system")["OPTIONS"]
        assert (options["sslmode"], options["sslrootcert"]) == ("verify-full", "system")
        assert entry(f"{PLAIN}?sslrootcert=system&sslmode=verify-full")["OPTIONS"]["sslrootcert"] == "system"

    def test_what_cannot_be_kept_is_refused(self) -> None:
        assert "verify-full" in refusal(f"{PLAIN}?sslrootcert=system&sslmode=require")
        assert "absolute path" in refusal(f"{PLAIN}?sslcert=system")
        assert "sslidentity" in refusal(f"{PLAIN}?sslidentity=/me.p12&sslpassword=x")
        assert "contradict" in refusal(f"{PLAIN}?sslaccept=strict&sslmode=disable")
        assert "absolute path" in refusal(f"{PLAIN}?sslcert=../ca.pem")


class TestRefusal:
    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("", "empty"),
            ("   ", "empty"),
            ("hunter2", "begin with postgresql://"),
            ("mysql://crm:hunter2@db/tax", "begin with postgresql://"),
            ("prisma+postgres://db/?api_key=hunter2", "begin with postgresql://"),
            ('"postgresql://crm:hunter2@db/tax"', "begin with postgresql://"),
            ("postgresql://crm:hunter2@db", "names no database"),
            ("postgresql://crm:hunter2@db/", "names no database"),
            ("postgresql://crm:hunter2@db/tax/app", "the database name contains a /"),
            ("postgresql://crm:hunter2@one,two/tax", "several hosts"),
            ("postgresql://crm:hunter2@one%2Ctwo/tax", "several hosts"),
            (f"{PLAIN}?host=hunter2,two", "several hosts"),
            ("postgresql://crm:hunter2@db:99999/tax", "port"),
            ("postgresql://crm:hunter2@db:x/tax", "port"),
            ("postgresql://crm:hun#ter2@db/tax", "#"),
            ("postgresql://crm:hun/ter2@db/tax", "percent-encoded"),
            ("postgresql://crm:hun?ter2@db/tax", "percent-encoded"),
            ("postgresql://crm:hun[ter2@db/tax", "percent-encoded"),
            ("postgresql://crm:hunter2℀@db/tax", "percent-encoded"),
            ("postgresql://crm:hunter2%FF@db/tax", "UTF-8"),
            ("postgresql://crm:hunter2%00@db/tax", "NUL"),
            (f"{PLAIN}?sslmode=hunter2", "sslmode has an unknown value"),
            (f"{PLAIN}?pgbouncer=1", "pgbouncer has an unknown value"),
            (f"{PLAIN}?connect_timeout=soon", "connect_timeout is not a whole number"),
            (f"{PLAIN}?pool_timeout=", "pool_timeout is not a whole number"),
            (f"{PLAIN}?connection_limit=0", "connection_limit is not a number from 1 to 262143"),
            (f"{PLAIN}?connection_limit=-1", "connection_limit is not a whole number"),
            (f"{PLAIN}?connection_limit=262144", "connection_limit is not a number from 1 to"),
            (f"{PLAIN}?connection_limit={'9' * 5000}", "connection_limit is not a number from 1 to"),
            (f"{PLAIN}?schema=app&schema=public", "the parameter schema is given more than once"),
            (f"{PLAIN}?schema=crm_backfill", "which contains the tables of the backfill"),
            (f"{PLAIN}?schema={'a' * 64}", "longer than 63 bytes"),
            (f"{PLAIN}?schema=a%00b", "NUL"),
            (f"{PLAIN}?hunter=2", "the parameter hunter is unknown"),
            (f"{PLAIN}?hunter2", "one of its parameters is unknown"),
        ],
    )
    def test_one_line_that_names_the_variable_and_the_reason(self, url: str, reason: str) -> None:
        message = refusal(url)
        assert message.startswith("DATABASE_URL cannot be used: ")
        assert reason in message
        assert "\n" not in message
        assert "hunter2" not in message
        assert "ter2" not in message
        assert "secret" not in message

    @settings(max_examples=examples(30))
    @given(password=st.text(min_size=6, max_size=20).map(lambda text: f"Zq7{text}Zq7"))
    def test_no_password_is_ever_told(self, password: str) -> None:
        url = f"postgresql://crm:{password}@db/tax?schema=app"
        shown = []
        try:
            shown.append(repr(read(url)))
        except DatabaseUrlError as error:
            shown.extend(traceback.format_exception(error))
        assert "Zq7" not in "".join(shown)

    def test_django_knows_the_error_for_one_of_configuration(self) -> None:
        assert issubclass(DatabaseUrlError, ImproperlyConfigured)


def split_as_the_server_does(options: str) -> list[str]:
    """PostgreSQL's pg_split_opts: words between white space, with a backslash before what is meant literally."""
    words, word, characters = [], "", iter(options)
    for character in characters:
        if character == "\\":
            word += next(characters)
        elif character.isspace():
            words.append(word)
            word = ""
        else:
            word += character
    return [given for given in [*words, word] if given]


def test_the_module_is_pure() -> None:
    tree = ast.parse(Path(database_module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"collections.abc", "dataclasses", "typing", "urllib.parse", "django.core.exceptions"}

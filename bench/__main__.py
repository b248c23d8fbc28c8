"""`make bench`: measure every candidate on fresh copies of the same database, in turns, and print medians and ratios.

make bench                                        10,000, 100,000 and 1,000,000 people, three turns
make bench ARGS="--people 100000 --turns 5 --only limit 'one worker'"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.measure import Measurement, measure
from bench.server import SETTINGS, Server
from bench.templates import BACKFILL, EMPTY, FILLED, FILLED_AND_NEW, UPDATED, prepare, template

CANDIDATES: dict[str, tuple[str, list[str]]] = {
    "limit": (EMPTY, ["-m", "bench.candidate", "limit"]),
    "one worker": (EMPTY, BACKFILL),
    "two workers": (EMPTY, [*BACKFILL, "--workers", "2"]),
    "dry run": (EMPTY, [*BACKFILL, "--dry-run"]),
    "rerun, nothing new": (FILLED, BACKFILL),
    "rerun, 1 % new": (FILLED_AND_NEW, BACKFILL),
    "rollback of the first run": (FILLED, ["manage.py", "rollback_crm_backfill", "1", "--json", "--no-progress"]),
    "update, first": (FILLED, [*BACKFILL, "--update"]),
    "update, nothing changed": (UPDATED, [*BACKFILL, "--update"]),
    "verification": (FILLED, ["manage.py", "verify_crm_contacts", "--json"]),
    "bulk_create": (EMPTY, ["-m", "bench.candidate", "bulk_create"]),
    "row by row": (EMPTY, ["-m", "bench.candidate", "row by row"]),
}
#: The ways of the first day, and the largest size at which they are still worth the wait.
LARGEST = {"bulk_create": 100_000, "row by row": 10_000}
#: What candidates must end with: the limit's contacts and ledger, row by row; the same contacts by id; no fewer;
#: the others have no end to compare.
EVERYTHING = ("limit", "one worker", "two workers", "rerun, nothing new")
SAME_IDS = ("rerun, 1 % new",)
NO_FEWER = ("bulk_create", "row by row")
CONTACTS = "SELECT md5(string_agg(md5(c::text), ',' ORDER BY id)) FROM crm_contacts c"
LEDGER = """
SELECT md5(string_agg(md5(
         ROW (id, source, source_id, outcome, reason, contact_id, source_updated_at, seen_preparer, filled)::text),
       ',' ORDER BY id))
  FROM ledger_entry
"""
CONTACT_IDS = "SELECT count(*), md5(string_agg(id, ',' ORDER BY id)) FROM crm_contacts"


def main() -> None:
    """Measure and print."""
    options = _arguments()
    server = Server.start(Path(os.environ.pop("CRM_EMBEDDED_DATA", "") or ".postgres-bench").resolve())
    console = Console(stderr=True, width=120)
    settings = server.settings("server_version", *SETTINGS, "huge_pages_status")
    console.print(", ".join(f"{name} {value}" for name, value in settings.items()), style="dim")
    sizes = sorted(set(options.people))
    for people in sizes:
        prepare(server, people, console)
    figures = _measure_all(server, sizes, options.turns, options.only, console)
    answer = {people: {name: _median(taken) for name, taken in of.items()} for people, of in figures.items()}
    for smaller, people in zip([None, *sizes], sizes, strict=False):
        console.print(_table(people, answer[people], smaller, answer.get(smaller, {})))
    sys.stdout.write(
        json.dumps({size: {name: asdict(one) for name, one in of.items()} for size, of in answer.items()}) + "\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--people", type=_positive, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes")
    parser.add_argument("--turns", type=_positive, default=3, help="measurements of each candidate (default 3)")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="some candidates only")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _measure_all(
    server: Server, sizes: list[int], turns: int, chosen: list[str], console: Console
) -> dict[int, dict[str, list[Measurement]]]:
    """Measure in turns, all candidates of all sizes in each: a machine is faster at one time than at another."""
    figures: dict[int, dict[str, list[Measurement]]] = {people: defaultdict(list) for people in sizes}
    for turn in range(turns):
        for people in sizes:
            ends: dict[str, End] = {}
            for name in chosen:
                if people > LARGEST.get(name, people):
                    continue
                state, arguments = CANDIDATES[name]
                with server.copy_of(template(people, state), "bench_work") as database:
                    taken = measure(server, database, arguments)
                    if turn == 0:
                        ends[name] = _end_of(server, database)
                figures[people][name].append(taken)
                console.print(f"  turn {turn + 1}: {people:,} people, {name} {taken.seconds:.2f} s", style="dim")
            _check_ends(ends)
    return figures


class End(NamedTuple):
    """What a candidate left: digests of the contacts, of the ledger and of the contacts' ids, and how many these are.

    Digests, since the memory of this process would be counted as that of every process that it starts.
    """

    contacts: str
    ledger: str
    ids: str
    size: int


def _end_of(server: Server, database: str) -> End:
    ((contacts,),), ((ledger,),) = server.rows(database, CONTACTS), server.rows(database, LEDGER)
    ((size, ids),) = server.rows(database, CONTACT_IDS)
    return End(contacts, ledger, ids, size)


def _check_ends(ends: dict[str, End]) -> None:
    """All that do the same thing end with the same. Raises RuntimeError, which names those that do not."""
    expected = next((ends[name] for name in EVERYTHING if name in ends), None)
    if expected is None:
        return
    wrong = [name for name, end in ends.items() if name in EVERYTHING and end != expected]
    wrong += [name for name, end in ends.items() if name in SAME_IDS and end.ids != expected.ids]
    wrong += [name for name, end in ends.items() if name in NO_FEWER and end.size < expected.size]
    if wrong:
        raise RuntimeError(f"these end otherwise than the others: {', '.join(wrong)}")


def _median(measurements: list[Measurement]) -> Measurement:
    names = Measurement.__dataclass_fields__
    return Measurement(**{name: statistics.median(getattr(one, name) for one in measurements) for name in names})


def _table(
    people: int, medians: dict[str, Measurement], smaller: int | None, at_smaller: dict[str, Measurement]
) -> Table:
    table = Table(title=f"{people:,} people, medians")
    table.add_column("candidate")
    for heading in (
        "seconds",
        "rows/s",
        "ratio to\nthe limit",
        "share of\none worker",
        "client\nCPU s",
        "server\nCPU s",
        "client\nMB",
        *([f"time a row\nagainst\n{smaller:,}"] if smaller else []),
    ):
        table.add_column(heading, justify="right")
    limit, first_run = medians.get("limit"), medians.get("one worker")
    for name, one in medians.items():
        table.add_row(
            name,
            f"{one.seconds:.2f}",
            f"{one.rows / one.seconds:,.0f}",
            f"{limit.seconds / one.seconds:.2f}" if limit else "",
            f"{one.seconds / first_run.seconds:.1%}" if first_run else "",
            f"{one.client_cpu:.1f}",
            f"{one.server_cpu:.1f}",
            f"{one.client_memory_mb:.0f}",
            *([f"{one.seconds_a_row / at_smaller[name].seconds_a_row:.2f}"] if name in at_smaller else []),
        )
    return table


if __name__ == "__main__":
    main()

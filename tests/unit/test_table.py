"""The tables of the commands: one layout, whole in a pipe, and no wider than a terminal."""

from __future__ import annotations

from io import StringIO

from rich.cells import cell_len
from rich.console import Console

from crm.output.table import Column, Summary, Table

LONG = "matched a contact created elsewhere; unchanged"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def shown(table: Table, file: StringIO, width: int = 40) -> list[str]:
    table.print_on(Console(file=file, width=width, color_system=None))
    return file.getvalue().splitlines()


def people() -> Table:
    table = Table(Column("who"), Column("rows", is_number=True), Column("why", may_be_cut=True), title="People")
    table.add("[bold]Zoë", 1_234_567, LONG)
    table.add("李", 2, "")
    return table


def test_numbers_stand_to_the_right_and_no_line_ends_in_blanks() -> None:
    assert shown(people(), StringIO()) == [
        "People",
        "who             rows  why",
        f"[bold]Zoë  1,234,567  {LONG}",
        "李                 2",
    ]


def test_on_a_terminal_a_long_text_is_cut_off_at_its_edge_and_a_number_never() -> None:
    lines = shown(people(), Terminal())
    assert lines[2] == "[bold]Zoë  1,234,567  matched a contact…"
    assert max(map(cell_len, lines)) == 40
    assert "1,234,567  matched a…" in shown(people(), Terminal(), width=10)[2]
    assert shown(people(), Terminal(), width=200) == shown(people(), StringIO())


def test_a_summary_stands_as_wide_whatever_its_labels_are() -> None:
    summary = Summary("Run 1: finished")
    summary.count("Errors", 3, "1 new", style="red")
    assert shown(summary, StringIO()) == ["Run 1: finished", "Errors                      3  1 new"]


def test_a_table_without_rows_is_its_title() -> None:
    assert shown(Summary("Nothing"), StringIO()) == ["Nothing"]

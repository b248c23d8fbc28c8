"""The output of a verification: summary, JSON object, and CSV file with the findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console

from crm.outcome import Outcome, Source
from crm.output.spreadsheet import row_writer
from crm.output.table import Column, Summary, Table, print_line
from crm.postgres.target import target, target_line
from crm.verification.figures import OTHERS, Figures
from crm.verification.findings import Check, Finding, Kind
from crm.verification.runner import VerificationReport
from crm.version import RULES, VERSION

#: Maximum number of findings of a check and kind in the summary.
LISTED = 10

_TITLE_OF_KIND = {
    Kind.DEFECT: "Defects: no later change explains them",
    Kind.RULES_CHANGED: "Written by other rules than those of this version: no defect",
    Kind.CRM_CHANGED: "Changed in the CRM since the migration: no defect",
    Kind.SOURCE_CHANGED: "Changed in the source since the migration: no defect",
}
_CSV_COLUMNS = ("kind", "check", "row", "contact_id", "columns", "written_by")


def findings_writer(file: TextIO) -> Callable[[Finding], None]:
    """Write the header of the CSV file, and return a function that writes a finding as one line."""
    write = row_writer(file)
    write(_CSV_COLUMNS)

    def write_finding(finding: Finding) -> None:
        names = (finding.row, finding.contact_id, " ".join(finding.columns), finding.written_by)
        write((finding.kind.value, finding.check.value, *names))

    return write_finding


def as_json(report: VerificationReport) -> str:
    """Return the report as one JSON object on one line.

    `findings` has the first hundred of each check and kind, `found` counts all.
    """
    row_counts, comparison, findings = report.row_counts, report.comparison, report.findings
    answer: dict[str, Any] = {
        "ok": not report.exit_code,
        "defects": report.defects,
        "database": target(),
        "generation": report.generation,
        "rows": row_counts.rows,
        "excluded": row_counts.excluded,
        "in_ledger": row_counts.in_ledger,
        "pending": sum(row_counts.pending.values()),
        "pending_by_source": row_counts.pending,
        "balanced": row_counts.balances,
        "ledger": report.entries,
        "deleted_in_crm": report.deleted,
        "source_row_gone": report.rows_gone,
        "compared": comparison.compared,
        "alike": comparison.matching,
        "touched_in_crm": comparison.modified,
        "found": {check.value: findings.of_check(check) for check in Check if findings.of_check(check)},
        "rules": RULES,
        "written_by_other_rules": dict(sorted(findings.written_by.items())),
        "findings": [
            {
                "kind": finding.kind,
                "check": finding.check,
                "row": finding.row,
                "contact_id": finding.contact_id,
                "columns": finding.columns,
                "written_by": finding.written_by,
            }
            for finding in findings.kept
        ],
        "contacts": _figures(report, None),
        "contacts_by_type": {name: _figures(report, name) for name in _types(report)},
        "notes": list(_notes(report)),
        "started_at": report.started_at.isoformat(),
        "finished_at": report.finished_at.isoformat(),
        "seconds": round(report.seconds, 3),
    }
    return json.dumps(answer)


def news(report: VerificationReport) -> str | None:
    """Return the line for stderr; None if the exit code is 0."""
    if not report.exit_code:
        return None
    counts = {check: report.findings.counts[check, Kind.DEFECT] for check in Check}
    what = [f"{check.value} {count:,}" for check, count in counts.items() if count]
    if not report.row_counts.balances:
        what.append("the reconciliation does not hold")
    return f"verification: {_count_of_defects(report)} ({', '.join(what)}); --csv lists them"


def print_report(report: VerificationReport, console: Console) -> None:
    """Print the counts, the findings and the figures."""
    _print_proof(report, console)
    for kind in Kind:
        if report.findings.of_kind(kind):
            _print_findings(report, kind, console)
    _business(report).print_on(console)
    for note in _notes(report):
        print_line(console, note)


def _count_of_defects(report: VerificationReport) -> str:
    return f"{report.defects:,} {'defect' if report.defects == 1 else 'defects'}"


def _print_proof(report: VerificationReport, console: Console) -> None:
    result = _count_of_defects(report) if report.defects else "no defect"
    title = f"Verified in {report.seconds:,.1f} s on generation {report.generation}: {result}"
    table = Summary(title, title_style="bold red" if report.defects else "bold")
    for row in _proof_rows(report):
        table.count(*row)
    table.print_on(console)
    counts = report.row_counts
    reconciliation = (
        f"Reconciliation: {counts.rows:,} rows = {sum(counts.excluded.values()):,} excluded + {counts.in_ledger:,} in "
        f"the ledger + {sum(counts.pending.values()):,} pending  {'(holds)' if counts.balances else '(DOES NOT HOLD)'}"
    )
    for line in (reconciliation, target_line(), ""):
        print_line(console, line)


def _proof_rows(report: VerificationReport) -> Iterator[tuple[str, int, str]]:
    row_counts, comparison = report.row_counts, report.comparison
    yield "Source rows", row_counts.rows, ""
    for reason, count in sorted(row_counts.excluded.items()):
        yield f"  excluded: {reason}", count, "not to be migrated"
    for outcome in Outcome:
        yield f"  {outcome.value}", report.entries.get(outcome, 0), _remark(report, outcome)
    yield "  pending", sum(row_counts.pending.values()), "no defect: the next run of the backfill migrates them"
    for source, count in row_counts.pending.items():
        if count:
            yield f"    {source.title}", count, ""
    yield "Contacts compared", comparison.compared, "created by the backfill, every column but updatedAt"
    yield "  same as their source row", comparison.matching, ""
    yield "  modified in the CRM since", comparison.modified, "updatedAt is not what was written"


def _remark(report: VerificationReport, outcome: Outcome) -> str:
    if outcome is Outcome.ERROR:
        return "listed by python manage.py export_backfill_errors"
    parts = [
        f"{count:,} {what}"
        for count, what in (
            (report.deleted.get(outcome, 0), "deleted in the CRM since"),
            (report.rows_gone.get(outcome, 0), "without their source row"),
        )
        if count
    ]
    return ", ".join(parts)


def _print_findings(report: VerificationReport, kind: Kind, console: Console) -> None:
    columns = (Column("Check", may_be_cut=True), Column("Row"), Column("Contact"), Column("Columns", may_be_cut=True))
    table = Table(*columns, title=_TITLE_OF_KIND[kind], title_style="bold red" if kind is Kind.DEFECT else "bold")
    remaining = []
    for check in Check:
        theirs = [finding for finding in report.findings.kept if (finding.check, finding.kind) == (check, kind)]
        for finding in theirs[:LISTED]:
            table.add(check.statement, finding.row or "", finding.contact_id or "", " ".join(finding.columns))
        if (count := report.findings.counts[check, kind]) > LISTED:
            remaining.append(f"... and {count - LISTED:,} more: {check.statement} (--csv FILE lists all)")
    table.print_on(console)
    for line in (*remaining, ""):
        print_line(console, line)


def _business(report: VerificationReport) -> Table:
    names = ("Total", "With attribution", "Percent", "Oldest", "Newest")
    columns = (Column(), *(Column(name, is_number=True) for name in names))
    table = Table(*columns, title="Contacts in the CRM, by type and source")
    for contact_type in (*_types(report), None):
        of_type = report.figures.get((contact_type, None))
        if of_type is None:
            continue
        table.add(contact_type or "All", *_cells(of_type), style="bold")
        for source in (*Source, OTHERS):
            if (figures := report.figures.get((contact_type, source))) is not None:
                table.add(f"  {source.title if isinstance(source, Source) else 'Others'}", *_cells(figures))
    return table


def _cells(figures: Figures) -> list[str | int]:
    percent = "" if figures.percent is None else f"{figures.percent:.1f} %"
    with_attribution = "" if figures.with_attribution is None else figures.with_attribution
    moments = ((moment or "")[:16] for moment in (figures.oldest, figures.newest))
    return [figures.total, with_attribution, percent, *moments]


def _types(report: VerificationReport) -> list[str]:
    return sorted({name for name, _ in report.figures if name is not None})


def _figures(report: VerificationReport, contact_type: str | None) -> dict[str, Any]:
    of_source = {
        source: figures.as_dict()
        for (name, source), figures in sorted(report.figures.items(), key=lambda item: item[0][1] or "")
        if name == contact_type and source is not None
    }
    of_all = report.figures.get((contact_type, None), Figures(0, 0, None, None))
    return of_all.as_dict() | {"by_source": of_source}


def _notes(report: VerificationReport) -> Iterator[str]:
    for written_by, count in sorted(report.findings.written_by.items()):
        yield (
            f"Findings written by {written_by}: {count:,}. This is version {VERSION}, rules {RULES}. They stay "
            'unchanged: see "Install a new version" in docs/runbook.md.'
        )
    if report.history_is_hidden:
        yield (
            "This role may not read crm_stage_history.id, so it was not checked whether the history has every "
            'promotion. Let the owner of the table GRANT SELECT ("id") ON crm_stage_history.'
        )

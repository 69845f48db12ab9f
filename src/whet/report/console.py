"""The report as text for a terminal or a log: readable at 80 columns and without colour."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from whet.records import Report
from whet.report import words
from whet.report.view import Row, Skipped, StepView, View, view_of

_STYLES = {"good": "green", "bad": "bold red", "": ""}
_LISTED = 12  # layers listed by name under one reason; report.html and report.json hold all


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the before/after table, the warnings, the steps and what was skipped.

    Raises:
        RuntimeFileError: the report lacks an entry.
    """
    view, console = view_of(report), console or Console(highlight=False)
    console.print()
    console.print(plain_text(view.headline, "bold"))
    console.print(plain_text(view.verdict, "bold red" if view.met is False else "green" if view.met else ""))
    for sentence in view.missed:
        console.print(plain_text(f"  missed: {sentence}", "red"))
    console.print(_comparison(view.rows, console))
    for warning in view.warnings:
        console.print(plain_text(f"! {warning}", "yellow"))
    _print_steps(view.steps, console)
    _print_skipped(view, console)
    for note in view.notes:
        console.print(plain_text(note, "dim"))


def report_text(report: Report, width: int = 80) -> str:
    """What `print_report` prints, as text without colour, at most `width` columns wide."""
    out = io.StringIO()
    print_report(report, Console(file=out, width=width, color_system=None, highlight=False))
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").split("\n")) + "\n"


def evidence_table(files: Sequence[dict[str, Any]], notes: Iterable[str] = ()) -> Table:
    """Several measured files (`Evidence.to_dict()`) side by side."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for evidence in files:
        table.add_column(plain_text(evidence["file"]), overflow="fold")

    def add(label: str, cells: Iterable[str]) -> None:
        table.add_row(label, *(plain_text(cell) for cell in cells))

    for label in dict.fromkeys(f"{e['metric']['name']} (n={e['metric']['n']:,})" for e in files):
        add(label, (words.score_with_interval(e["metric"]) for e in files))
    add("file", (words.bytes_text(e["bytes"]) for e in files))
    add("file, gzipped", (words.bytes_text(e["gzip_bytes"]) for e in files))
    for quantile in ("p50", "p90"):
        latencies = [e.get("latency_ms") for e in files]
        add(f"latency {quantile}", ("not measured" if it is None else words.ms_text(it[quantile]) for it in latencies))
    add("stored", (words.stored_text(e["dtypes"]) for e in files))
    add("computed", (words.computed_text(e["dtypes"]) for e in files))
    add("runtime", (f"{e['runtime']['name']} {e['runtime']['version']}" for e in files))
    return table


def plain_text(value: Any, style: str = "") -> Text:
    """Text that rich takes literally: names are never markup, and control characters do not reach the terminal."""
    return Text(words.printable(value), style=style)


def _comparison(rows: Sequence[Row], console: Console) -> Table:
    wide = console.width >= 110
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for header in ("original", "compressed", "change"):
        table.add_column(header, overflow="fold", max_width=None if wide else 24)
    for row in rows:
        table.add_row(
            plain_text(row.label),
            plain_text(row.original),
            plain_text(row.compressed),
            plain_text(row.change, _STYLES[row.tone]),
        )
    return table


def _print_steps(steps: Sequence[StepView], console: Console) -> None:
    for step in steps:
        console.print(plain_text(f"{step.number}. {step.spec}"))
        console.print(plain_text(f"   {step.outcome}", "dim"))
        if step.removal:
            console.print(plain_text(f"   {step.removal}", "dim"))
        if step.stop:
            console.print(plain_text(f"   {step.stop}", "dim"))
        for pattern in step.unmatched:
            console.print(plain_text(f"   ! the pattern {pattern!r} matched no layer", "yellow"))
    console.print()


def _print_skipped(view: View, console: Console) -> None:
    by_reason: dict[tuple[int, str], list[Skipped]] = {}
    for item in view.skipped:
        by_reason.setdefault((item.step, item.reason), []).append(item)
    for (step, reason), items in by_reason.items():
        names = ", ".join(item.name for item in items[:_LISTED])
        more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
        console.print(plain_text(f"skipped in step {step}, {reason}: {names}{more}"))
    if by_reason:
        console.print()

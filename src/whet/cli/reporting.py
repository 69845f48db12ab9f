"""What `whet report` writes and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from whet.errors import SpecError
from whet.records import Report
from whet.report import sinks


def read(path: Path, beside: Sequence[Path]) -> Report:
    """The report at `path`, with those of other runtimes in its comparison."""
    found = Report.read(path)
    if not beside:
        return found
    from whet.report.view import beside as joined

    return joined(found, [Report.read(other) for other in beside])


def write_pages(
    report: Report, html: Path | None, into: Path | None, marker: str | None, made_by: str | None, *, overwrite: bool
) -> bool:
    """Write the page and the Markdown table where they were asked for, and say whether one was."""
    if (into is None) != (marker is None):
        raise SpecError("--into FILE and --marker NAME go together: the table is put between the marker's two comments.")
    if html is not None:
        from whet.report.html import write_html

        write_html(report, html, overwrite=overwrite)
    if into is not None and marker is not None:
        from whet.report.markdown import before_after_table, update_between

        update_between(into, marker, before_after_table(report, command=made_by))
    return html is not None or into is not None


def write_sinks(report: Report, csv: Path | None, tensorboard: Path | None, mlflow: str | None, *, overwrite: bool) -> bool:
    """Write the report to the sinks that were named, and say whether there was one."""
    if csv is not None:
        sinks.write_csv(report, csv, overwrite=overwrite)
    if tensorboard is not None:
        sinks.to_tensorboard(report, tensorboard)
    if mlflow is not None:
        typer.echo(f"MLflow run {sinks.to_mlflow(report, mlflow)}")
    return csv is not None or tensorboard is not None or mlflow is not None


def show(report: Report, *, markdown: bool, made_by: str | None) -> None:
    """Print the report on the terminal, or as a Markdown table."""
    if markdown:
        from whet.report.markdown import before_after_table

        typer.echo(before_after_table(report, command=made_by), nl=False)
        return
    from whet.report.console import print_report

    print_report(report)

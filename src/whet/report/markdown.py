"""The before/after table as Markdown, for a README that is generated and never typed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from whet.errors import OutputError, RuntimeFileError
from whet.files import replacing
from whet.records import Report
from whet.report import words
from whet.report.view import view_of

_MARKER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def before_after_table(report: Report, *, command: str | None = None) -> str:
    """The table with a line below it that says on which hardware, with which runtime and by which command it was made.

    Raises:
        RuntimeFileError: the report lacks an entry.
    """
    view, data = view_of(report), report.data
    lines = ["| | original | compressed | change |", "|---|---|---|---|"]
    rows = [row for row in view.rows if row.label != "computed"]
    lines += [f"| {' | '.join(map(_cell, (r.label, r.original, r.compressed, r.change)))} |" for r in rows]
    environment = data["environment"]
    hardware = ", ".join(str(environment[key]) for key in ("cpu", "os") if environment.get(key))
    runtime, latency = data["compressed"]["runtime"], data["compressed"].get("latency_ms")
    conditions = [f"{runtime['name']} {runtime['version']}"]
    if latency:
        conditions.append(f"batch {latency['batch']}, {latency['threads']} thread{'' if latency['threads'] == 1 else 's'}")
    told = [words.printable(part) for part in (hardware, ", ".join(conditions)) if part]
    closing = _cell(f"Measured on {'; '.join(told)}; in brackets 95 % confidence intervals.")
    if command is not None:
        closing += f" Made by `{words.printable(command).replace('`', '')}`."
    return "\n".join([*lines, "", closing]) + "\n"


def update_between(path: str | os.PathLike[str], marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->` in the file at `path` by `text`.

    Raises:
        RuntimeFileError: there is no such file, or it does not hold the two markers, once each and in order.
        OutputError: the marker's name has other characters than letters, digits and `_.-`, or the file cannot be written.
    """
    if not _MARKER.fullmatch(marker):
        raise OutputError(f"A marker is letters, digits and the characters _ . -, got {marker!r}.")
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as cause:
        raise RuntimeFileError(f"Cannot read {str(path)!r}: {cause.strerror}.") from cause
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    start, stop = content.find(begin), content.find(end)
    if content.count(begin) != 1 or content.count(end) != 1 or stop < start:
        raise RuntimeFileError(f"{str(path)!r} must hold the lines {begin} and {end} once each, in this order.")
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(f"{content[: start + len(begin)]}\n{text.strip()}\n{content[stop:]}", encoding="utf-8")


def _cell(text: str) -> str:
    """`text` as it must stand in a table cell to be read literally."""
    for character, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*"), ("[", "\\[")):
        text = text.replace(character, written)
    return words.printable(text)

"""The folder that `compress` writes: refused before any work where something would be lost, filled whole at the end."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from whet.errors import OutputError
from whet.files import check_writable, filling
from whet.records import Report
from whet.report.html import write_html
from whet.report.sinks import write_csv
from whet.runtimes.sessions import companion_of, parts


def check_output(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Refuse, before any work, an output that would lose something or cannot be written."""
    beside = [companion for name in names if (companion := companion_of(folder / name)) is not None]
    present = [path.name for path in (*(folder / name for name in names), *beside) if path.exists()]
    if present and not overwrite:
        raise OutputError(
            f"{str(folder)!r} already holds {', '.join(present)}. Choose another folder, or pass overwrite=True (--overwrite)."
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is a file; out must name a folder.")
    check_writable(folder)


def write_output(folder: Path, names: Sequence[str], original: Path, model: Path, report: Report) -> None:
    """Write the files beside their places first, then rename them: all of them appear, or none is half-written."""
    with filling(folder) as scratch:
        for exported in (original, model):
            for part in parts(exported):  # an .xml has its .bin beside it, a SavedModel is a folder
                copy = scratch / part.relative_to(exported.parent)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(part, copy)
        (scratch / names[2]).write_text(report.to_json(), encoding="utf-8")
        write_html(report, scratch / names[3])
        write_csv(report, scratch)

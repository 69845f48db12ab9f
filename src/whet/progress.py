"""Progress on long work: a bar on a terminal, a line every few seconds elsewhere, nothing when switched off; and a log."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whet.errors import OutputError, SpecError

QUIET_SECONDS = 10.0


class Task:
    """One piece of work under way."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done, self.note = title, total, 0, ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more units are done; `note` is a short text such as `loss 0.31, sparsity 0.42`."""
        self.done += count
        if note is not None:
            self.note = note
        self.show()

    def resume(self, done: int, note: str) -> None:
        """`done` units were done before this task began: they say nothing about its pace."""
        self.done, self.note = done, note
        self.show()

    def show(self) -> None:
        """Draw the present state."""

    def finish(self) -> None:
        """The work has ended."""


class _Lines(Task):
    def __init__(self, title: str, total: int | None) -> None:
        super().__init__(title, total)
        self.started = self.shown = time.monotonic()
        self.before = 0

    def resume(self, done: int, note: str) -> None:
        self.before = done
        super().resume(done, note)

    def show(self) -> None:
        if time.monotonic() - self.shown >= QUIET_SECONDS:
            self.shown = time.monotonic()
            self._print(f"{self.done}/{self.total}{self._left()}" if self.total else str(self.done))

    def _left(self) -> str:
        """The time left at the pace so far."""
        if self.done <= self.before or self.total is None:
            return ""
        seconds = (self.shown - self.started) / (self.done - self.before) * max(self.total - self.done, 0)
        return f", {seconds:.0f} s left" if seconds < 120 else f", {seconds / 60:.0f} min left"

    def finish(self) -> None:
        self._print(f"{time.monotonic() - self.started:.1f} s")

    def _print(self, state: str) -> None:
        print(f"{self.title}: {state}{', ' + self.note if self.note else ''}", file=sys.stderr, flush=True)


class _Bar(Task):
    def __init__(self, title: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(title, total)
        columns = (
            TextColumn("{task.description}", markup=False),  # names from the model are text
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task(title, total=total, note="")

    def resume(self, done: int, note: str) -> None:
        self.bar.reset(self.task, completed=done)
        super().resume(done, note)

    def show(self) -> None:
        self.bar.update(self.task, completed=self.done, note=self.note)

    def finish(self) -> None:
        self.bar.stop()


@contextmanager
def task(title: str, total: int | None, *, enabled: bool) -> Iterator[Task]:
    """A task named `title` of `total` units (None: unknown), shown on standard error while the block runs."""
    made = Task(title, total) if not enabled else _Bar(title, total) if sys.stderr.isatty() else _Lines(title, total)
    try:
        yield made
    finally:
        made.finish()


Record = Mapping[str, Any]
Taker = Callable[[dict[str, Any]], object]  # of a record
Log = Taker | str | os.PathLike[str] | None


def log_to(log: Log) -> Taker | None:
    """What takes the record of each epoch: `log` where it is a function, or one that appends a row to the file `log`.

    A `.jsonl` file gets a JSON object on each line, a `.csv` file a header with the record's keys, then rows.

    Raises:
        SpecError: `log` is neither. OutputError: the file cannot be written, or is a table of other columns.
    """
    if log is None or callable(log):
        return log
    writers = {".jsonl": _json_line, ".csv": _csv_rows}
    if not isinstance(log, str | os.PathLike) or Path(log).suffix not in writers:
        raise SpecError(f"log must be a function of one record, or the path of a .jsonl or .csv file, got {log!r}.")
    path = Path(log)
    text_of = writers[path.suffix]

    def append(record: Mapping[str, Any]) -> None:
        _append(path, lambda written: text_of(record, written, path))

    _append(path, lambda written: "")
    return append


def _append(path: Path, text: Callable[[str], str]) -> None:
    """Write `text`, of the first line that the file has, at its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            file.write(text(file.readline()))
    except (OSError, UnicodeDecodeError) as cause:
        raise OutputError(f"Cannot write the log {str(path)!r}: {cause}. Choose a file that you may write to.") from cause


def _json_line(record: Record, written: str, path: Path) -> str:
    return json.dumps(record) + "\n"


def _csv_rows(record: Record, written: str, path: Path) -> str:
    """The record's row, below a header where nothing is written yet."""
    columns = list(record)
    if written and next(csv.reader([written])) != columns:
        raise OutputError(f"{str(path)!r} is a table of other columns ({written.strip()}). Name another file as log.")
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerows([list(record.values())] if written else [columns, list(record.values())])
    return made.getvalue()

"""Progress on long work: a bar on a terminal, a line every few seconds elsewhere, nothing when switched off."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

    def show(self) -> None:
        """Draw the present state."""

    def finish(self) -> None:
        """The work has ended."""


class _Lines(Task):
    def __init__(self, title: str, total: int | None) -> None:
        super().__init__(title, total)
        self.started = self.shown = time.monotonic()

    def show(self) -> None:
        if time.monotonic() - self.shown >= QUIET_SECONDS:
            self.shown = time.monotonic()
            self._print(f"{self.done}/{self.total}" if self.total else str(self.done))

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

"""Tables of measurements: printed as they grow, kept in a run record, and put into documents from there.

    python benchmarks/tables.py out/quantization.json --into docs/quantization.md

writes every table of the record between its two comments in the document, `<!-- bench-uniform -->` and the same with a slash,
with the machine and the command that made it. Tables for which the document has no place are passed over, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whet.files import replacing
from whet.numerics.statistics import wilson
from whet.report.markdown import update_between
from whet.runtimes.environment import environment

BUSY = 1.3  # runnable processes per core, more than which makes times doubtful


@dataclass
class Table:
    """A table with its conditions. columns: the first is the row's name. notes: below the table. command: what makes it.
    record: a JSON file that holds the table after every row."""

    name: str
    title: str
    columns: Sequence[str]
    command: str
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    record: Path | None = None

    def __post_init__(self) -> None:
        if not self.made:
            found = environment()
            self.made = {key: found[key] for key in ("cpu", "os", "cores")} | {"packages": found["packages"], "load": _load()}
            print(f"\n{self.title}\n\n{_line(self.columns)}\n|{'---|' * len(self.columns)}", flush=True)

    def add(self, *cells: Any) -> None:
        """Add a row and print it."""
        self.rows.append([str(cell) for cell in cells])
        self.made["load"] = max(self.made["load"], _load())
        print(_line(self.rows[-1]), flush=True)
        self._keep()

    def note(self, text: str) -> None:
        """Add a sentence below the table and print it."""
        self.notes.append(text)
        print(f"\n{text}", flush=True)
        self._keep()

    def _keep(self) -> None:
        """Put the table into its record, in place of the one of its name."""
        if self.record is None:
            return
        found = {table.name: table for table in read(self.record)} if self.record.exists() else {}
        plain = [{k: v for k, v in asdict(t).items() if k != "record"} for t in (found | {self.name: self}).values()]
        with replacing(self.record, overwrite=True) as temporary:
            temporary.write_text(json.dumps(plain, indent=1), encoding="utf-8")

    def markdown(self) -> str:
        """The table, its notes, and a line that says where and how it was made."""
        busy = self.made["load"] > BUSY * self.made["cores"]
        where = f"{self.made['cpu']}, {self.made['cores']} cores"
        where += f", busy with other work (load {self.made['load']:.0f}): times are too long" if busy else ""
        lines = [_line(self.columns), f"|{'---|' * len(self.columns)}", *map(_line, self.rows)]
        told = f"{self.title}. {' '.join(self.notes)}".strip()
        return "\n".join([*lines, "", f"{told} Made by `{self.command}` on {where}."])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def top1(right: int, total: int) -> str:
    """Per cent with two decimals and its 95 % interval (Wilson)."""
    low, high = wilson(right, total)
    return f"{100 * right / total:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def against(value: float, bar: float, *, most: bool = False, unit: str = "") -> str:
    """What was to be reached and whether it was. most: the bar is an upper end."""
    reached = value <= bar if most else value >= bar
    return f"{'≤' if most else '≥'} {bar:g}{unit}: {'reached' if reached else '**missed**'}"


class Clock:
    """Seconds since it was made: of the wall, and of this process' processors."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        """Both."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu

    def read(self) -> tuple[str, str]:
        """Both, as cells."""
        wall, cpu = self.seconds()
        return f"{wall:.1f}", f"{cpu:.1f}"


# ------------------------------------------------------------------ records


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that every section has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a small part of everything, to see that it runs")
    made.add_argument("--record", type=Path, help="also put the tables into this JSON file")
    return made


def chosen(names: Sequence[str], known: Iterable[str], what: str) -> list[str]:
    """`names`, or all that are known where none is given; the program ends with a sentence where one is not known."""
    every = list(known)
    for name in names:
        if name not in every:
            sys.exit(f"There is no {what} {name!r}. It is one of {', '.join(every)}.")
    return list(names) or every


def read(path: Path) -> list[Table]:
    """The tables of a record."""
    return [Table(**item) for item in json.loads(path.read_text(encoding="utf-8"))]


def into(record: Path, document: Path) -> int:
    """Write the record's tables into the document; how many had a place there."""
    text = document.read_text(encoding="utf-8")
    wanted = set(re.findall(r"<!-- bench-([A-Za-z0-9_.-]+) -->", text))
    tables = {table.name: table for table in read(record)}
    for name, table in tables.items():
        if name in wanted:
            update_between(document, f"bench-{name}", table.markdown())
        else:
            print(f"{document} has no place <!-- bench-{name} --> for {table.title!r}.")
    for name in sorted(wanted - tables.keys()):
        print(f"{record} has no table {name!r}, which {document} has a place for: left as it was.")
    return len(wanted & tables.keys())


def main() -> int:
    """Put a record's tables into a document."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("record", type=Path)
    options.add_argument("--into", type=Path, required=True)
    given = options.parse_args()
    written = into(given.record, given.into)
    print(f"{written} tables written into {given.into}.")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())

"""The ```python blocks of a page, and what running them in order as written does and prints."""

from __future__ import annotations

import builtins
import doctest
import linecache
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n\n?)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
# What a line prints is told behind it: `print(made.sparsity)  # 0.9`; prose behind a print begins with a letter.
TOLD = re.compile(r"print\(.*\)  # (?P<said>(?:True|False|[-+]?\d)(?:True|False|->|[-+\d.\s])*)")


@dataclass(frozen=True)
class Block:
    """A block of a page: its code, its first line in the page, and the words of the comment right before it."""

    code: str
    line: int
    mark: str

    @property
    def left_out(self) -> str | None:
        """Why it is not run, or None."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run:") else None


def blocks(text: str) -> list[Block]:
    """The blocks of a page in the order in which they run: those marked `run first`, then the others."""
    found = [Block(m["code"], text.count("\n", 0, m.start("code")) + 1, m["mark"] or "") for m in BLOCK.finditer(text)]
    return sorted(found, key=lambda block: block.mark != "run first")


def run_page(page: Path) -> list[tuple[str, str]]:
    """Run a page in a module of its own, in the folder one is in: (told, printed) of each line that tells what it prints.

    Raises: what a block raises, with the page's lines in the traceback.
    """
    text, lines, compared = page.read_text(), page.read_text().splitlines(), []
    linecache.cache[str(page)] = (len(text), None, text.splitlines(keepends=True), str(page))  # for inspect and tracebacks
    module = ModuleType(f"page_{page.stem}")

    def told_print(*values: Any, **options: Any) -> None:
        frame = sys._getframe(1)
        said = TOLD.search(lines[frame.f_lineno - 1]) if frame.f_code.co_filename == str(page) else None
        if said:
            compared.append((said["said"].strip(), " ".join(map(str, values))))
        builtins.print(*values, **options)

    vars(module)["print"] = told_print
    sys.modules[module.__name__] = module
    try:
        for block in blocks(text):
            if block.left_out is None:
                _run(block, page, vars(module))
    finally:
        del sys.modules[module.__name__]
    return compared


def _run(block: Block, page: Path, names: dict[str, Any]) -> None:
    if block.code.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.code, names, page.name, str(page), block.line)
        doctest.DebugRunner(verbose=False).run(test, clear_globs=False)
    else:
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)

"""A job.py: a Python file that defines the model and the data. It is run, so give only files that you trust."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from whet.errors import SpecError

NEEDED = ("model", "train", "val")


@dataclass(frozen=True, slots=True)
class Job:
    """What a job.py defines, each called when asked for."""

    path: Path
    module: ModuleType

    def call(self, name: str, default: Any = None) -> Any:
        """What the function `name()` of the file returns; `default` where the file does not define it.

        Raises:
            SpecError: it is needed and missing, or it is not a function.
        """
        function = getattr(self.module, name, None)
        if function is None:
            if name in NEEDED:
                raise SpecError(f"{self.path.name} must define the function {name}(), and does not. {self._listing()}")
            return default
        if not callable(function):
            raise SpecError(f"{name} in {self.path.name} must be a function without arguments, got {function!r}.")
        return function()

    def check(self, *names: str) -> None:
        """Raise `SpecError` if any of these functions is missing, naming all that are."""
        missing = [name for name in names if getattr(self.module, name, None) is None]
        if missing:
            functions = ", ".join(f"{name}()" for name in missing)
            plural = "s" if len(missing) > 1 else ""
            raise SpecError(f"{self.path.name} must define the function{plural} {functions}. {self._listing()}")

    @property
    def metric(self) -> Any:
        """The metric: a function of (outputs, targets) or a `whet.Metric`; None where the file has none."""
        return getattr(self.module, "metric", None)

    def example(self) -> Any:
        """The example batch to trace with, by `example()` or the first batch of `train()`."""
        from whet.data import Batches

        if getattr(self.module, "example", None) is not None:
            return self.call("example")
        return Batches(self.call("train"), "train()").first()[0]

    def _listing(self) -> str:
        names = [name for name, value in vars(self.module).items() if callable(value) and not name.startswith("_")]
        defined = [name for name in names if getattr(vars(self.module)[name], "__module__", None) == self.module.__name__]
        return f"It defines: {', '.join(defined) or 'no functions'}."


@contextmanager
def opened(path: Path) -> Iterator[Job]:
    """The job in the file at `path`; while the block runs, its folder can be imported from, as `python job.py` would.

    Afterwards `sys.path` and the module's name are as they were.

    Raises:
        SpecError: there is no such file. Errors inside the file are the file's own: `blame` finds their line.
    """
    if not path.is_file():
        raise SpecError(f"There is no job file {str(path)!r}.")
    name, folder = _free_name(path), str(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise SpecError(f"A job is a Python file, got {path.name!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield Job(path, module)
    finally:
        sys.modules.pop(name, None)
        if folder in sys.path:
            sys.path.remove(folder)


def blame(error: BaseException, path: Path) -> str | None:
    """`job.py, line 12, in train: ValueError: …` if `error` comes out of the job's file or its folder, else None."""
    folder = path.resolve().parent
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve().is_relative_to(folder):
        return f"{_shown(Path(error.filename), path)}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(Path(frame.filename), path)]
    if not frames:
        return None
    last = frames[-1]
    where = "" if last.name == "<module>" else f", in {last.name}()"
    return f"{_shown(Path(last.filename), path)}, line {last.lineno}{where}: {type(error).__name__}: {error}"


def _is_theirs(file: Path, job: Path) -> bool:
    """Whether `file` is the job or a module beside it, and not something installed below its folder."""
    file, folder = file.resolve(), job.resolve().parent
    if file == job.resolve():
        return True
    installed = (Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib")).resolve())
    inside = file.is_relative_to(folder) and "site-packages" not in file.parts
    return inside and not any(file.is_relative_to(place) for place in installed)


def _shown(file: Path, job: Path) -> str:
    file, folder = file.resolve(), job.resolve().parent
    return str(job) if file == job.resolve() else str(file.relative_to(folder))


def _free_name(path: Path) -> str:
    """The file's own name, so that its functions can be saved as `job:metric`; another one where that is a module's."""
    stem = path.stem
    if stem.isidentifier() and stem not in sys.modules and importlib.util.find_spec(stem) is None:
        return stem
    return f"whet_job_{abs(hash(str(path.resolve()))):x}"

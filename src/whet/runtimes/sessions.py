"""Opening an exported file with the runtime it is made for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from whet.errors import MissingExtraError, RuntimeFileError
from whet.runtimes.base import Session, Slot
from whet.runtimes.environment import usable_cores

__all__ = ["RUNTIMES", "SUFFIXES", "Runtime", "Session", "Slot", "check_file", "open_session", "parts", "runtime_of"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where the code for one runtime's files is; imported when such a file is opened.

    session: `"module:class"` of its `Session`, called with (path, threads). content: the module that reads what a file
    stores and computes in (`stored`, `weighted` and `computed`, each called with a path), None where nothing reads it.
    package: the module whose import loads the runtime itself, None where opening a file does.
    """

    session: str
    content: str | None
    package: str | None = None

    def load(self) -> None:
        """Import what a file needs to be opened, so that opening it can be timed alone.

        Raises:
            MissingExtraError: the runtime is not installed.
        """
        import_module(self.session.partition(":")[0])
        if self.package is not None:
            try:
                import_module(self.package)
            except ImportError as cause:
                raise MissingExtraError(f"This file's runtime {self.package!r} could not be imported: {cause}.") from cause

    def open(self, path: Path, threads: int) -> Session:
        """The file at `path` as a session."""
        module, _, name = self.session.partition(":")
        session: Session = getattr(import_module(module), name)(path, threads)
        return session

    def reader(self) -> ModuleType | None:
        """The module that reads the content of its files."""
        return None if self.content is None else import_module(self.content)


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime("whet.runtimes.onnxruntime:OnnxSession", "whet.runtimes.onnx_content", "onnxruntime"),
    "openvino": Runtime("whet.runtimes.openvino:OpenVINOSession", "whet.runtimes.openvino_content", "openvino"),
    "litert": Runtime("whet.runtimes.litert:LiteRTSession", "whet.runtimes.litert_content", "ai_edge_litert.interpreter"),
    "executorch": Runtime(
        "whet.runtimes.executorch:ExecuTorchSession", "whet.runtimes.executorch_content", "executorch.runtime"
    ),
    "torch": Runtime("whet.runtimes.torch_program:ProgramSession", "whet.runtimes.torch_program", "torch"),
    "keras": Runtime("whet.runtimes.keras_file:KerasSession", "whet.runtimes.keras_file", "keras"),
    "tensorflow": Runtime("whet.runtimes.savedmodel:SavedModelSession", "whet.runtimes.savedmodel", "tensorflow"),
}
SUFFIXES = {".onnx": "onnxruntime", ".xml": "openvino", ".tflite": "litert", ".pte": "executorch", ".pt2": "torch"}
SUFFIXES |= {".keras": "keras", ".savedmodel": "tensorflow"}
FOLDERS = {".savedmodel": "saved_model.pb"}  # what is a folder, and the file that it must hold
# Files that belong to a file of this suffix, where they exist: "{stem}" and "{name}" are the file's own.
COMPANIONS = {".xml": "{stem}.bin", ".onnx": "{name}.data"}


def companion_of(path: Path) -> Path | None:
    """Where a file of this suffix keeps its weights beside it, if it does so."""
    beside = COMPANIONS.get(path.suffix)
    return None if beside is None else path.with_name(beside.format(stem=path.stem, name=path.name))


def parts(path: str | os.PathLike[str]) -> list[Path]:
    """The file and those that belong to it (weights kept beside it), all of which count as its bytes; a folder's files."""
    path = Path(path)
    if path.is_dir():
        return sorted(item for item in path.rglob("*") if item.is_file())
    companion = companion_of(path)
    return [path, *([companion] if companion is not None and companion.is_file() else [])]


def check_file(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a readable file of a suffix that a runtime here takes.

    Raises:
        RuntimeFileError: a missing file, a folder, an empty or unreadable file, an unknown suffix.
    """
    path = Path(path)
    if path.suffix in FOLDERS and path.exists():
        if not (path / FOLDERS[path.suffix]).is_file():
            raise RuntimeFileError(f"{str(path)!r} must be a folder that holds {FOLDERS[path.suffix]!r}.")
        return path
    if path.is_dir():
        raise RuntimeFileError(f"{str(path)!r} is a folder. Give a file: {' or '.join(SUFFIXES)}.")
    if path.suffix not in SUFFIXES:
        raise RuntimeFileError(f"No runtime here takes {path.name!r}. The suffix must be one of: {', '.join(SUFFIXES)}.")
    try:
        with path.open("rb") as stream:
            if not stream.read(1):
                raise RuntimeFileError(f"{str(path)!r} is empty. Export it again.")
    except OSError as cause:
        if isinstance(cause, FileNotFoundError):
            raise RuntimeFileError(f"There is no file {str(path)!r}.") from cause
        raise RuntimeFileError(f"Cannot read {str(path)!r}: {cause.strerror}.") from cause
    return path


def runtime_of(path: Path) -> Runtime:
    """The runtime that takes files of this suffix, which `check_file` has seen."""
    return RUNTIMES[SUFFIXES[path.suffix]]


def open_session(path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
    """The file at `path`, opened by the runtime for its suffix (see `SUFFIXES`). `threads`: None for all usable cores.

    Raises:
        RuntimeFileError: see `check_file`; also a truncated or foreign file.
        MissingExtraError: the runtime is not installed.
    """
    path = check_file(path)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise RuntimeFileError(f"threads must be an integer of at least 1, or None for all usable cores; got {threads!r}.")
    return runtime_of(path).open(path, usable_cores() if threads is None else threads)

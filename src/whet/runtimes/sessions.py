"""Opening an exported file with the runtime it is made for."""

from __future__ import annotations

import os
from pathlib import Path

from whet.errors import RuntimeFileError
from whet.runtimes.base import Session, Slot
from whet.runtimes.environment import usable_cores

__all__ = ["SUFFIXES", "Session", "Slot", "check_file", "open_session"]

SUFFIXES = {".onnx": "onnxruntime", ".tflite": "litert"}


def check_file(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a readable file of a suffix that a runtime here takes.

    Raises:
        RuntimeFileError: a missing file, a folder, an empty or unreadable file, an unknown suffix.
    """
    path = Path(path)
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


def open_session(path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
    """The file at `path`, opened by ONNX Runtime (.onnx) or LiteRT (.tflite). `threads`: None for all usable cores.

    Raises:
        RuntimeFileError: see `check_file`; also a truncated or foreign file.
        MissingExtraError: the runtime is not installed.
    """
    path = check_file(path)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise RuntimeFileError(f"threads must be an integer of at least 1, or None for all usable cores; got {threads!r}.")
    count = usable_cores() if threads is None else threads
    if SUFFIXES[path.suffix] == "onnxruntime":
        from whet.runtimes.onnxruntime import OnnxSession

        return OnnxSession(path, count)
    from whet.runtimes.litert import LiteRTSession

    return LiteRTSession(path, count)

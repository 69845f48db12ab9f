"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whet.errors import OutputError


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there becomes `path` when the block ends without an error.

    Works for files and folders. On any error the temporary path is removed and `path` is as it was.

    Raises:
        OutputError: `path` exists and `overwrite` is false, or its folder cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputError(f"{str(path)!r} exists. Choose another path, remove it, or pass overwrite=True (--overwrite).")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as cause:
        raise OutputError(
            f"Cannot write to {str(path.parent)!r}: {cause.strerror}. Choose a folder you may write to."
        ) from cause
    try:
        yield folder / path.name
        written = folder / path.name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(written, path)
    except OSError as cause:
        if isinstance(cause, OutputError):
            raise
        raise OutputError(f"Cannot write {str(path)!r}: {cause.strerror or cause}. What was there is unchanged.") from cause
    finally:
        shutil.rmtree(folder, ignore_errors=True)

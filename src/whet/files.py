"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whet.errors import OutputError

FULL = 1 << 16  # a disk with fewer bytes left is full: no file of a model is as small


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there becomes `path` when the block ends without an error.

    Works for files and folders. What else is written beside the temporary path (weights in a file of their own) comes to lie
    beside `path`. On any error all of it is removed and everything is as it was.

    Raises:
        OutputError: `path` or a file beside it exists and `overwrite` is false, or its folder cannot be written.
    """
    path = Path(path)
    made: list[Path] = []
    try:
        if path.exists() and not overwrite:
            raise OutputError(f"{str(path)!r} exists. Choose another path, remove it, or pass overwrite=True (--overwrite).")
        made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]  # innermost first
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as cause:
        _remove_empty(made)
        if isinstance(cause, OutputError):
            raise
        raise OutputError(
            f"Cannot write to {str(path.parent)!r}: {cause.strerror}. Choose a folder you may write to."
        ) from cause
    try:
        yield scratch / path.name
        _place(scratch, path, overwrite)
    except OSError as cause:
        if isinstance(cause, OutputError):
            raise
        raise OutputError(f"Cannot write {str(path)!r}: {cause.strerror or cause}. What was there is unchanged.") from cause
    except Exception as cause:  # native writers tell a full disk in words of their own
        if shutil.disk_usage(scratch).free >= FULL:
            raise
        raise OutputError(f"Cannot write {str(path)!r}: no space is left on its disk. What was there is unchanged.") from cause
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not path.exists():
            _remove_empty(made)


@contextmanager
def filling(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder inside `folder`; the files written there are moved into `folder` when the block ends without an error.

    Files of the same names are replaced, others stay. On an error `folder` is as it was, and gone if it was not there.

    Raises:
        OutputError: `folder` cannot be made or written.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    scratch: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".whet-", dir=folder))
        yield scratch
        for path in sorted(scratch.iterdir()):
            if (folder / path.name).is_dir() and path.is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
    except OSError as cause:
        if isinstance(cause, OutputError):
            raise
        raise OutputError(f"Cannot write to {str(folder)!r}: {cause.strerror or cause}.") from cause
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        _remove_empty(made)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise `OutputError` unless files can be written to `folder`, or to the nearest folder above it that exists."""
    nearest = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as cause:
        raise OutputError(f"Cannot write to {str(nearest)!r}: {cause.strerror}. Choose a folder you may write to.") from cause


def _place(scratch: Path, path: Path, overwrite: bool) -> None:
    """Move all that is in `scratch` beside `path`, which comes last: whoever sees it finds the rest."""
    names = sorted((item.name for item in scratch.iterdir()), key=lambda name: name == path.name)
    if path.name not in names:
        raise FileNotFoundError(errno.ENOENT, "nothing was written", str(path))
    taken = next((name for name in names[:-1] if (path.parent / name).exists()), None)
    if taken is not None and not overwrite:
        raise OutputError(
            f"{str(path.parent / taken)!r}, which belongs to {path.name!r}, exists. Choose another path, remove it, or pass "
            "overwrite=True (--overwrite)."
        )
    before = Path(tempfile.mkdtemp(dir=scratch))
    moved: list[str] = []
    try:
        for name in names:
            if (path.parent / name).exists() and name != path.name:
                os.replace(path.parent / name, before / name)
            if name == path.name:
                _swap(scratch / name, path, before / name)
            else:
                moved.append(name)
                os.replace(scratch / name, path.parent / name)
    except OSError:
        for name in moved:
            (path.parent / name).unlink(missing_ok=True)
            if (before / name).exists():
                os.replace(before / name, path.parent / name)
        raise


def _swap(written: Path, path: Path, aside: Path) -> None:
    """Put `written` in the place of `path`, which waits at `aside` and comes back if that fails."""
    if not (path.is_dir() and not path.is_symlink()):
        os.replace(written, path)
        return
    os.replace(path, aside)
    try:
        os.replace(written, path)
    except OSError:
        os.replace(aside, path)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # never made, or someone else has put something there
            return

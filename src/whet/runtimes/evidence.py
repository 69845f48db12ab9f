"""Evidence: exported files run on the user's data by the runtimes they are made for, side by side."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from whet.data import Batches, concatenate, leaves, rows
from whet.errors import RuntimeFileError
from whet.progress import Task, task
from whet.records import Evidence
from whet.runtimes.base import Session
from whet.runtimes.comparison import Measured, change, metric_drop, parity, plain_warnings
from whet.runtimes.content import read_dtypes
from whet.runtimes.latency import Timings, alternate, noise
from whet.runtimes.scoring import Score, score, take
from whet.runtimes.sessions import open_session
from whet.specs import Metric

__all__ = ["Measured", "Score", "change", "gather", "gzip_size", "metric_drop", "pack", "parity", "predict", "score"]

_CHUNK = 1 << 20
_GZIP_HEADER = 16 + zlib.MAX_WBITS  # zlib's name for the gzip format, whose header then has no name and no time


def gather(
    files: Mapping[str, str | os.PathLike[str]],
    data: Any,
    metric: Metric,
    *,
    threads: int | None = 1,
    batch: int = 1,
    runs: int | None = None,
    seed: int = 0,
    progress: bool = True,
    like: Any = None,
    sparsity: Mapping[str, float] | None = None,
) -> dict[str, Measured]:
    """Run every file on all of `data`, score it, time all in alternation, and compare each with the first, the original.

    batch: examples per timed call (a file of a fixed batch size is timed with its own). runs: timed runs per file; None to
    choose, 0 for no timing. like: outputs in the model's own structure, into which the files' outputs are put, see `pack`.
    sparsity: by file name, the fraction of zero weights, for the warnings.

    Raises:
        RuntimeFileError: a file cannot be run, or returns NaN.
        DataError, MetricError: see `score`.
    """
    data = Batches(data, "data")
    sessions = {name: open_session(path, threads=threads) for name, path in files.items()}
    outputs: dict[str, Any] = {}
    scores: dict[str, Score] = {}
    with task("measuring", len(sessions) * len(data), enabled=progress) as shown:
        for name, session in sessions.items():
            outputs[name] = pack(predict(session, data, shown), session, like)
            scores[name] = score(outputs[name], data, metric, seed=seed)
    times, size = ([], 0) if runs == 0 else _time(list(sessions.values()), data, batch, runs)
    measured: dict[str, Measured] = {}
    for index, (name, session) in enumerate(sessions.items()):
        timings = times[index] if times else None
        evidence = _evidence(Path(files[name]), session, scores[name], timings, size)
        made = Measured(evidence, outputs[name], scores[name].scores, timings, scores[name])
        if measured:
            made = _compare(next(iter(measured.values())), made, metric, (sparsity or {}).get(name), seed)
        measured[name] = made
    return measured


def predict(session: Session, data: Batches, shown: Task | None = None) -> Any:
    """The outputs of a file for all examples of `data`.

    Raises:
        RuntimeFileError: the file cannot run a batch, or returns NaN; the batch and the example are named.
    """
    parts = []
    for index, (inputs, _) in enumerate(data):
        part = session.run(inputs)
        for leaf in leaves(part):
            if leaf.dtype.kind == "f" and np.isnan(leaf).any():
                row = int(np.argwhere(np.isnan(leaf))[0][0]) if leaf.ndim else 0
                raise RuntimeFileError(f"{session.file!r} returns NaN for example {row} of batch {index} of {data.what}.")
        parts.append(part)
        if shown is not None:
            shown.advance(note=session.file)
    try:
        return concatenate(parts)
    except ValueError as cause:
        raise RuntimeFileError(
            f"The outputs of {session.file!r} have other shapes from batch to batch ({cause}). Pad the inputs to one size."
        ) from cause


def pack(outputs: Any, session: Session, like: Any) -> Any:
    """A file's outputs in the structure of `like`: dicts by output name where the names are its keys, else by position.

    Files return an array or a tuple; a model may return a dict, which its metric then expects.

    Raises:
        RuntimeFileError: `like` holds another number of arrays.
    """
    if like is None:
        return outputs
    flat = leaves(outputs)
    if len(flat) != len(leaves(like)):
        raise RuntimeFileError(f"{session.file!r} returns {len(flat)} outputs, and the model {len(leaves(like))}.")
    names = [slot.name for slot in session.outputs]
    if isinstance(like, Mapping) and set(like) == set(names):
        return {key: flat[names.index(key)] for key in like}
    remaining = iter(flat)
    return _fill(like, remaining)


def _fill(like: Any, remaining: Any) -> Any:
    if isinstance(like, Mapping):
        return {key: _fill(item, remaining) for key, item in like.items()}
    if isinstance(like, tuple | list):
        return tuple(_fill(item, remaining) for item in like)
    return next(remaining)


def gzip_size(path: Path) -> int:
    """Bytes of the file compressed by gzip at level 9, with no name and no time in it; read in chunks."""
    packer, size = zlib.compressobj(9, zlib.DEFLATED, _GZIP_HEADER), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())


def _time(sessions: Sequence[Session], data: Batches, batch: int, runs: int | None) -> tuple[list[Timings], int]:
    """The timings of all files, and the number of examples in a call."""
    sizes = {session.fixed_batch for session in sessions} - {None}
    if len(sizes) > 1:
        raise RuntimeFileError(f"Files of different fixed batch sizes cannot be timed side by side; got {sizes}.")
    size = next(iter(sizes), batch) or batch
    inputs, _ = data.first()
    chosen = np.arange(size) % rows(inputs)
    return alternate(sessions, take(inputs, chosen), runs=runs), size


def _evidence(path: Path, session: Session, scored: Score, timings: Timings | None, batch: int) -> Evidence:
    latency = None if timings is None else timings.latency(batch=batch, threads=session.threads)
    noisy = None if latency is None else noise(latency)
    return Evidence(
        file=path.name,
        bytes=path.stat().st_size,
        gzip_bytes=gzip_size(path),
        metric=scored.record,
        latency_ms=latency,
        runtime=session.runtime,
        placement=None,
        dtypes=read_dtypes(path),
        warnings=() if noisy is None else (noisy,),
    )


def _compare(original: Measured, made: Measured, metric: Metric, sparsity: float | None, seed: int) -> Measured:
    moved = change(original, made, metric, seed=seed)
    told = plain_warnings(original.evidence, made.evidence, moved, sparsity=sparsity)
    evidence = replace(
        made.evidence,
        parity=parity(original.outputs, made.outputs),
        warnings=(*told, *made.evidence.warnings),
    )
    return replace(made, evidence=evidence)

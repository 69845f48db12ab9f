"""Evidence: exported files run on the user's data by the runtimes they are made for, side by side."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from whet.data import Batches, concatenate, leaves, rows
from whet.errors import RuntimeFileError, SpecError, require
from whet.progress import Task, task
from whet.records import Evidence, Latency
from whet.runtimes.base import Session
from whet.runtimes.comparison import Measured, change, metric_drop, parity, plain_warnings, timing_ratio
from whet.runtimes.content import read_content
from whet.runtimes.latency import Timings, alternate, noise
from whet.runtimes.probe import probe
from whet.runtimes.scoring import Score, score, take
from whet.runtimes.sessions import open_session, parts
from whet.specs import Metric

__all__ = ["Measured", "Score", "change", "gather", "gzip_size", "metric_drop", "pack", "parity", "predict", "score"]

_CHUNK = 1 << 20
_GZIP_HEADER = 16 + zlib.MAX_WBITS  # zlib's name for the gzip format, whose header then has no name and no time


def gather(
    files: Mapping[str, str | os.PathLike[str]],
    data: Any,
    metric: Metric,
    *,
    threads: int | Sequence[int] | None = 1,
    batches: int | Sequence[int] = 1,
    runs: int | None = None,
    seed: int = 0,
    progress: bool = True,
    like: Any = None,
    sparsity: Mapping[str, float] | None = None,
    processes: bool = False,
) -> dict[str, Measured]:
    """Run every file on all of `data`, score it, time all in alternation, and compare each with the first, the original.

    batches: examples per timed call (a file of a fixed batch size is timed with its own); threads: of the runtime, None for
    all usable cores. Of several of either every pair is timed, the first pair being the one that ratios and warnings are
    about. runs: timed runs per file; None to choose, 0 for no timing. like: outputs in the model's own structure, into which
    the files' outputs are put, see `pack`. sparsity: by file name, the fraction of zero weights, for the warnings.
    processes: also open and run every file in a fresh process, for its memory and its cold start.

    Raises:
        RuntimeFileError: a file cannot be run, or returns NaN.
        DataError, MetricError: see `score`.
    """
    data = data if isinstance(data, Batches) else Batches(data, "data")
    conditions = _conditions(batches, threads)
    sessions = {name: open_session(path, threads=conditions[0][1]) for name, path in files.items()}
    outputs: dict[str, Any] = {}
    scores: dict[str, Score] = {}
    with task("measuring", len(sessions) * len(data), enabled=progress) as shown:
        for name, session in sessions.items():
            outputs[name] = pack(predict(session, data, shown), session, like)
            scores[name] = score(outputs[name], data, metric, seed=seed)
    times = [] if runs == 0 else list(_time_all(files, sessions, data, conditions, runs, seed))
    measured: dict[str, Measured] = {}
    for name, session in sessions.items():
        latencies = [latency[name] for _, latency in times]
        evidence = _evidence(Path(files[name]), session, scores[name], latencies, processes)
        made = Measured(evidence, outputs[name], scores[name].scores, times[0][0][name] if times else None, scores[name])
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
    """Bytes of the file, and of those that belong to it, compressed by gzip at level 9 with no name and no time in it."""
    return sum(_packed(part, zlib.compressobj(9, zlib.DEFLATED, _GZIP_HEADER)) for part in parts(path))


def zstd_size(path: Path) -> dict[str, Any]:
    """`{"value"}`: bytes compressed by Zstandard at level 19; None with a "reason" where its package is not installed."""
    if find_spec("zstandard") is None:
        return {"value": None, "reason": "the package zstandard is not installed: pip install 'whet[zstd]'"}
    zstandard: Any = require("zstandard", "zstd", "Packing a file")
    return {"value": sum(_packed(part, zstandard.ZstdCompressor(level=19).compressobj()) for part in parts(path))}


def _packed(path: Path, packer: Any) -> int:
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())


def _conditions(batches: int | Sequence[int], threads: int | Sequence[int] | None) -> list[tuple[int, int | None]]:
    """Every pair of a batch size and a number of threads, without repetition.

    Raises:
        SpecError: no number, or one below 1.
    """
    sizes = [batches] if isinstance(batches, int) else list(batches)
    counts = [threads] if threads is None or isinstance(threads, int) else list(threads)
    for name, values in (("batches", sizes), ("threads", counts)):
        if not values or any(v is not None and (isinstance(v, bool) or not isinstance(v, int) or v < 1) for v in values):
            raise SpecError(f"{name} must be integers of at least 1, got {values!r}.")
    return list(dict.fromkeys((size, count) for count in counts for size in sizes))


def _time_all(
    files: Mapping[str, str | os.PathLike[str]],
    sessions: Mapping[str, Session],
    data: Batches,
    conditions: Sequence[tuple[int, int | None]],
    runs: int | None,
    seed: int,
) -> Iterator[tuple[dict[str, Timings], dict[str, Latency]]]:
    """For each condition the timings of all files, in alternation, and their records with the ratio to the first."""
    opened = {conditions[0][1]: sessions}
    done = set()
    for batch, threads in conditions:
        if threads not in opened:
            opened = {threads: {name: open_session(path, threads=threads) for name, path in files.items()}}
        used = opened[threads]
        sizes = {session.fixed_batch for session in used.values()} - {None}
        if len(sizes) > 1:
            raise RuntimeFileError(f"Files of different fixed batch sizes cannot be timed side by side; got {sizes}.")
        size = next(iter(sizes), batch) or batch
        if (size, threads) in done:  # a fixed batch size leaves one condition of several
            continue
        done.add((size, threads))
        yield _time(used, data, size, runs, seed)


def _time(
    sessions: Mapping[str, Session], data: Batches, size: int, runs: int | None, seed: int
) -> tuple[dict[str, Timings], dict[str, Latency]]:
    inputs, _ = data.first()
    chosen = np.arange(size) % rows(inputs)
    times = dict(zip(sessions, alternate(list(sessions.values()), take(inputs, chosen), runs=runs), strict=True))
    first = next(iter(times.values()))
    records = {}
    for name, timings in times.items():
        record = timings.latency(batch=size, threads=sessions[name].threads)
        records[name] = record if timings is first else replace(record, ratio=timing_ratio(first, timings, seed=seed))
    return times, records


def _evidence(path: Path, session: Session, scored: Score, latencies: Sequence[Latency], process: bool) -> Evidence:
    found = dict.fromkeys(filter(None, (noise(latency) for latency in latencies)))
    content = read_content(path)
    return Evidence(
        file=path.name,
        bytes=sum(part.stat().st_size for part in parts(path)),
        gzip_bytes=gzip_size(path),
        metric=scored.record,
        latency_ms=latencies[0] if latencies else None,
        runtime=session.runtime,
        placement=None,
        dtypes=content.dtypes,
        warnings=(*found, *content.warnings),
        latencies=tuple(latencies),
        zstd_bytes=zstd_size(path),
        operators=content.operators,
        process=probe(path, threads=session.threads) if process else None,
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

"""`whet measure`: files side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from whet.data import Batches
from whet.errors import SpecError
from whet.pipeline.compressed import as_metric
from whet.report import words
from whet.report.console import evidence_table, plain_text
from whet.runtimes.evidence import Measured, change, gather
from whet.specs import Metric


def measure_files(files: Sequence[Path], data: Any, metric: Any, *, threads: int, batch: int) -> None:
    """Measure `files` on `data` and print them beside each other, with what changed against the first.

    Raises:
        RuntimeFileError, DataError, MetricError: a file, the data or the metric cannot be used.
    """
    if len(set(files)) < len(files):
        raise SpecError("Each file is measured once; one of them was given twice.")
    batches = Batches(data, "data")
    score = as_metric(metric, batches)
    measured = gather({str(path): path for path in files}, batches, score, threads=threads, batch=batch)
    console = Console(highlight=False)
    shown = [{**m.evidence.to_dict(), "file": path} for path, m in measured.items()]
    console.print(evidence_table(shown))
    (first, original), *others = measured.items()
    for path, compared in others:
        console.print(plain_text(f"{path} against {first}: {_difference(original, compared, score)}"))
    for path, found in measured.items():
        for warning in found.evidence.warnings:
            console.print(plain_text(f"! {path}: {warning}", "yellow"))


def _difference(original: Measured, compared: Measured, metric: Metric) -> str:
    moved = change(original, compared, metric)
    parts = [
        f"{metric.name} drop {words.drop_text(moved['metric_drop'], metric.name)}",
        f"{words.ratio_text(moved['size_ratio'])} the bytes",
        f"{words.ratio_text(moved['gzip_ratio'])} gzipped",
    ]
    latency = words.latency_text(moved["latency_ratio"])
    return ", ".join([*parts, f"latency {latency}"] if latency else parts)

"""`whet measure` and `whet compare`: files, and reports, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from whet.data import Batches
from whet.errors import RuntimeFileError, SpecError
from whet.pipeline.compressed import as_metric
from whet.records import Report
from whet.report import words
from whet.report.console import evidence_table, plain_text
from whet.runtimes.evidence import Measured, change, gather
from whet.specs import Metric


def measure_files(
    files: Sequence[Path], data: Any, metric: Any, *, what: str, threads: Sequence[int], batches: Sequence[int]
) -> None:
    """Measure `files` on `data`, which errors call `what`, and print them side by side, with what changed since the first.

    Raises:
        RuntimeFileError, DataError, MetricError: a file, the data or the metric cannot be used.
    """
    if len(set(files)) < len(files):
        raise SpecError("Each file is measured once; one of them was given twice.")
    labelled = Batches(data, what)
    score = as_metric(metric, labelled)
    named = {str(path): path for path in files}
    measured = gather(named, labelled, score, threads=threads, batches=batches, processes=True)
    console = Console(highlight=False)
    shown = [{**m.evidence.to_dict(), "file": path} for path, m in measured.items()]
    console.print(evidence_table(shown))
    console.print(_details(shown))
    (first, original), *others = measured.items()
    for path, compared in others:
        console.print(plain_text(f"{path} against {first}: {_difference(original, compared, score)}"))
    for path, found in measured.items():
        for warning in found.evidence.warnings:
            console.print(plain_text(f"! {path}: {warning}", "yellow"))


def _details(files: Sequence[dict[str, Any]]) -> Table:
    """What `evidence_table` leaves out: all latencies, operators, memory, cold start."""
    table = _table(file["file"] for file in files)
    for index, latency in enumerate(files[0]["latencies"]):
        label = f"batch {latency['batch']}, {latency['threads']} thread{'s' * (latency['threads'] > 1)}: p50 / p99"
        _add(table, label, (_latency(file["latencies"][index]) for file in files))
    _add(table, "operators: integer / float / other", (_operators(file["operators"]) for file in files))
    _add(table, "packed by zstd", (_zstd(file["zstd_bytes"]) for file in files))
    for label, key in (("process, peak memory", "peak_rss_bytes"), ("  runtime imported", "rss_imported_bytes")):
        _add(table, label, (_process(file["process"], key) for file in files))
    for label, key in (("cold start: import runtime", "import_s"), ("  open file", "load_s"), ("  first run", "first_run_s")):
        _add(table, label, (_process(file["process"], key) for file in files))
    return table


def _latency(latency: dict[str, Any]) -> str:
    ratio = latency["ratio"]
    text = f"{words.ms_text(latency['p50'])} / {words.ms_text(latency['p99'])}"
    if ratio is None or ratio["value"] is None:
        return text
    interval = "" if ratio["ci95"] is None else f" [{ratio['ci95'][0]:.3g}, {ratio['ci95'][1]:.3g}]"
    return f"{text}, {words.ratio_text(ratio['value'])}{interval}"


def _operators(operators: dict[str, Any] | None) -> str:
    if operators is None:
        return "not told"
    delegated = operators["delegated"]
    text = f"{operators['quantized']} / {operators['float']} / {operators['other']}"
    return text if delegated is None else f"{text}, {delegated} delegated"


def _zstd(size: dict[str, Any] | None) -> str:
    return "not measured" if size is None or size["value"] is None else words.bytes_text(size["value"])


def _process(process: dict[str, Any] | None, key: str) -> str:
    if process is None or process.get(key) is None:
        return str((process or {}).get("reason", "not measured"))
    return words.bytes_text(process[key]) if key.endswith("_bytes") else words.ms_text(1e3 * process[key])


def _difference(original: Measured, compared: Measured, metric: Metric) -> str:
    moved = change(original, compared, metric)
    parts = [
        f"{metric.name} drop {words.drop_text(moved['metric_drop'], metric.name)}",
        f"{words.ratio_text(moved['size_ratio'])} the bytes",
        f"{words.ratio_text(moved['gzip_ratio'])} gzipped",
    ]
    latency = words.latency_text(moved["latency_ratio"])
    return ", ".join([*parts, f"latency {latency}"] if latency else parts)


def compare_reports(paths: Sequence[Path]) -> None:
    """Print reports beside each other, and what of them cannot be compared.

    Raises:
        SpecError: fewer than two reports, or one given twice.
        RuntimeFileError: a report cannot be read, or lacks an entry.
    """
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise SpecError("whet compare takes two or more different report.json files.")
    reports = {str(path): Report.read(path).data for path in paths}
    rows = {path: _compared(path, data) for path, data in reports.items()}
    console = Console(highlight=False)
    table = _table(rows)
    for label in next(iter(rows.values())):
        _add(table, label, (row[label] for row in rows.values()))
    console.print(table)
    for sentence in differences(reports):
        console.print(plain_text(f"! {sentence}", "yellow"))


def _compared(path: str, data: dict[str, Any]) -> dict[str, str]:
    """The cells of one report by row label."""
    try:
        new, moved = data["compressed"], data["change"]
        metric = new["metric"]
        return {
            "metric": f"{metric['name']} (n={metric['n']:,})",
            "value": words.score_with_interval(metric),
            "drop": words.drop_text(moved["metric_drop"], metric["name"]),
            "file": words.bytes_text(new["bytes"]),
            "of its original": words.ratio_text(moved["size_ratio"]),
            "file, gzipped": words.bytes_text(new["gzip_bytes"]),
            "gzipped, of its original": words.ratio_text(moved["gzip_ratio"]),
            "latency p50": "not measured" if new["latency_ms"] is None else words.ms_text(new["latency_ms"]["p50"]),
            "latency": words.latency_text(moved["latency_ratio"]) or "not measured",
            "runtime": f"{new['runtime']['name']} {new['runtime']['version']}",
            "budget": "met" if data["budget"]["met"] else "missed",
        }
    except (KeyError, TypeError) as cause:
        raise RuntimeFileError(f"The report {path!r} lacks the entry {cause}. Write it again with whet compress.") from cause


def differences(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on what makes these reports hard to compare: other metrics, data, originals or processors."""
    (first, base), *others = reports.items()
    found = []
    for path, data in others:
        old, new = base["compressed"]["metric"], data["compressed"]["metric"]
        if old["name"] != new["name"]:
            found.append(
                f"{path} measures {new['name']!r} and {first} {old['name']!r}: their values and drops cannot be compared"
            )
        elif old["n"] != new["n"]:
            found.append(f"{path} was measured on {new['n']:,} examples and {first} on {old['n']:,}: not the same data")
        if abs(base["original"]["metric"]["value"] - data["original"]["metric"]["value"]) > 1e-9 and old["name"] == new["name"]:
            found.append(f"{path} and {first} do not start from the same value: another original, data or split")
        if _machine(base) != _machine(data):
            found.append(f"{path} was measured on {_machine(data)}, {first} on {_machine(base)}: compare ratios, not times")
    return found


def _machine(data: dict[str, Any]) -> str:
    environment = data.get("environment") or {}
    return str(environment.get("cpu") or environment.get("machine") or "an unknown processor")


def _table(headers: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for header in headers:
        table.add_column(plain_text(header), overflow="fold")
    return table


def _add(table: Table, label: str, cells: Any) -> None:
    table.add_row(label, *(plain_text(cell) for cell in cells))

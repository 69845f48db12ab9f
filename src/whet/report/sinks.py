"""A report as rows and scalars: CSV files always, TensorBoard and MLflow where they are installed.

Each sink takes a finished report, so `whet.compress(…, log=…)` calls any function of one:
`log=lambda report: to_tensorboard(report, "runs/a")`.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whet.errors import OutputError, require
from whet.files import replacing
from whet.records import Report
from whet.report import words
from whet.report.view import view_of

HISTORY, SUMMARY = "history.csv", "summary.csv"
CSV_FILES = (HISTORY, SUMMARY)
_HISTORY_COLUMNS = ("step", "epoch", "loss", "metric", "sparsity", "learning_rate", "eligible")
_FORMULA = ("=", "+", "-", "@", "\t")
_PARAMETER_LENGTH = 500  # what every MLflow server takes


def write_csv(report: Report, folder: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write `history.csv`, one row for each epoch of each training step, and `summary.csv`, the final numbers.

    `summary.csv` has the columns name, original, compressed, change, low, high (of the change's 95 % interval). What was not
    measured is empty; without training `history.csv` is its header. Returns the two paths.

    Raises:
        RuntimeFileError: the report lacks an entry.
        OutputError: a file exists and `overwrite` is false, or cannot be written.
    """
    folder = Path(folder)
    paths = folder / HISTORY, folder / SUMMARY
    texts = history_csv(report), summary_csv(report)
    for path in paths:
        if path.exists() and not overwrite:
            raise OutputError(f"{str(path)!r} exists. Choose another folder, or pass overwrite=True (--overwrite).")
    for path, text in zip(paths, texts, strict=True):
        with replacing(path, overwrite=overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return paths


def history_csv(report: Report) -> str:
    """The text of `history.csv`: step, epoch, loss, metric, sparsity, learning_rate, eligible."""
    rows = [[number, *(row.get(key) for key in _HISTORY_COLUMNS[1:])] for number, row in _epochs(report)]
    return _csv(_HISTORY_COLUMNS, rows)


def summary_csv(report: Report) -> str:
    """The text of `summary.csv`: a row for the metric, bytes, gzipped bytes and each quantile of the latency.

    Raises:
        RuntimeFileError: the report lacks an entry.
    """
    return _csv(("name", "original", "compressed", "change", "low", "high"), _final(report))


def to_tensorboard(report: Report, logdir: str | os.PathLike[str]) -> None:
    """Write the training curves and the final numbers as scalars for TensorBoard.

    Tags: `step 1/loss` and the like over the epochs; `original/bytes`, `compressed/bytes`, `change/bytes` at step 0.

    Raises:
        MissingExtraError: the package tensorboard is not installed.
        RuntimeFileError: the report lacks an entry.
        OutputError: `logdir` cannot be written.
    """
    summary = require("tensorboard.summary", "tensorboard", "Logging to TensorBoard")
    scalars = [*_curves(report), *((name, value, 0) for name, value in _scalars(report).items())]
    try:
        writer = summary.Writer(os.fspath(logdir))
        for name, value, step in scalars:
            writer.add_scalar(name, value, step)
        writer.close()
    except OSError as cause:
        raise OutputError(f"Cannot write to {os.fspath(logdir)!r}: {cause.strerror or cause}.") from cause


def to_mlflow(report: Report, experiment: str | None = None) -> str:
    """Log one MLflow run: curves and final numbers as metrics, the recipe as parameters, report.json and its page as artifacts.

    Where it goes is MLflow's to say (`MLFLOW_TRACKING_URI`, `mlflow.set_tracking_uri`). Inside an active run it is logged to
    that run, else to a new one of `experiment`. Returns the run's id.

    Raises:
        MissingExtraError: MLflow is not installed.
        RuntimeFileError: the report lacks an entry.
        OutputError: MLflow cannot store the run, with its own words.
    """
    mlflow = require("mlflow", "mlflow", "Logging to MLflow")
    from whet.report.html import render_html

    page, scalars = render_html(report) if _is_measured(report) else None, _scalars(report)
    active = mlflow.active_run()
    try:
        if active is not None:
            _log_mlflow(mlflow, report, page, scalars)
            return str(active.info.run_id)
        with mlflow.start_run(experiment_id=_experiment(mlflow, experiment)) as run:
            _log_mlflow(mlflow, report, page, scalars)
            return str(run.info.run_id)
    except (OSError, mlflow.exceptions.MlflowException) as cause:
        raise OutputError(f"MLflow could not store the run at {mlflow.get_tracking_uri()!r}: {cause}") from cause


def _experiment(mlflow: Any, name: str | None) -> str | None:
    """The id of the experiment `name`, made if need be; the one that MLflow has active is left as it is."""
    if name is None:
        return None
    found = mlflow.get_experiment_by_name(name)
    return str(mlflow.create_experiment(name) if found is None else found.experiment_id)


def _log_mlflow(mlflow: Any, report: Report, page: str | None, scalars: Mapping[str, float]) -> None:
    data = report.data
    steps = {f"step {i}": words.spec_text(step["spec"])[:_PARAMETER_LENGTH] for i, step in enumerate(data["steps"], 1)}
    target = ((data.get("compressed") or {}).get("placement") or {}).get("target") or "float"
    mlflow.log_params({"seed": data["seed"], "target": target, **steps})
    mlflow.log_metrics({_mlflow_name(name): value for name, value in scalars.items()})
    for name, value, epoch in _curves(report):
        mlflow.log_metric(_mlflow_name(name), value, step=epoch)
    mlflow.log_text(report.to_json(), "report.json")
    if page is not None:
        mlflow.log_text(page, "report.html")


def _mlflow_name(name: str) -> str:
    """`name` in the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def _epochs(report: Report) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number of the step, one epoch's row)."""
    for number, step in enumerate(report.data.get("steps") or (), 1):
        yield from ((number, row) for row in (step.get("train") or {}).get("history") or ())


def _curves(report: Report) -> Iterator[tuple[str, float, int]]:
    """(tag, value, epoch) of every finite number of the training."""
    for number, row in _epochs(report):
        for key in ("loss", "metric", "sparsity", "learning_rate"):
            if _is_number(row.get(key)):
                yield f"step {number}/{key}", float(row[key]), int(row["epoch"])


def _is_measured(report: Report) -> bool:
    """Whether there is a before and after; the verbs' own reports, `whet.fit(…).report`, hold steps alone."""
    return any(key in report.data for key in ("original", "compressed", "change"))


def _final(report: Report) -> list[list[Any]]:
    if not _is_measured(report):
        return []
    view_of(report)  # says which entry is missing
    before, after, change = (report.data[key] for key in ("original", "compressed", "change"))
    drop, ratio = change["metric_drop"], change.get("latency_ratio") or {}
    low, high = drop.get("ci95") or (None, None)
    rows = [
        [
            f"{before['metric']['name']} (change: drop)",
            before["metric"]["value"],
            after["metric"]["value"],
            drop["value"],
            low,
            high,
        ],
        ["bytes", before["bytes"], after["bytes"], change["size_ratio"], None, None],
        ["gzip_bytes", before["gzip_bytes"], after["gzip_bytes"], change["gzip_ratio"], None, None],
    ]
    old, new = before.get("latency_ms") or {}, after.get("latency_ms") or {}
    low, high = ratio.get("ci95") or (None, None)
    rows.append(["latency_p50_ms", old.get("p50"), new.get("p50"), ratio.get("value"), low, high])
    rows.append(["latency_p90_ms", old.get("p90"), new.get("p90"), None, None, None])
    return rows


def _scalars(report: Report) -> dict[str, float]:
    """`original/bytes` and the like, for every number that was measured."""
    found: dict[str, float] = {}
    for name, before, after, change, *_ in _final(report):
        short = str(name).removesuffix(" (change: drop)")
        found |= {f"original/{short}": before, f"compressed/{short}": after, f"change/{short}": change}
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _csv(header: tuple[str, ...], rows: list[list[Any]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[_literal(value) for value in row] for row in rows])
    return out.getvalue()


def _literal(value: Any) -> Any:
    """A text that a spreadsheet would compute gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value

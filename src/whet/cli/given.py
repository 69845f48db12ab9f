"""What the options and arguments of the command line stand for: data, metrics, recipes, numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whet.cli import inputs, jobs
from whet.errors import OutputError, SpecError


@contextmanager
def job_inputs(model: Path, files: dict[str, Path | None]) -> Iterator[dict[str, Any]]:
    """The model, data, metric and recipe as `whet.compress` takes them, from a job.py or from files."""
    given = [name for name, path in files.items() if path is not None]
    if model.suffix == ".py":
        if given:
            raise SpecError(
                f"{model.name} defines the data; --{given[0]} goes with model.keras. Leave it out, or edit the job."
            )
        with jobs.opened(model) as job:
            job.check(*jobs.NEEDED)
            found = {name: job.call(name) for name in ("model", "train", "val", "test", "example", "recipe")}
            yield {**found, "metric": job.metric}
        return
    missing = [name for name in ("train", "val") if files[name] is None]
    loadable = model.suffix == ".keras"
    if loadable and missing:
        raise SpecError(f"{model.name} needs data: --{' and --'.join(missing)} (.npz files).")
    loaded = inputs.read_keras_model(model)
    yield {"model": loaded, **{name: inputs.read_npz(path) for name, path in files.items() if path is not None}}


def overrides(metric: str | None, recipe: Path | None) -> dict[str, Any]:
    """The metric and recipe named on the command line, which go before the job's own."""
    found: dict[str, Any] = {} if recipe is None else {"recipe": inputs.read_recipe(recipe)}
    return found if metric is None else {**found, "metric": function(metric)}


@contextmanager
def labelled(data: Path, metric: str | None) -> Iterator[tuple[Any, Any]]:
    """Labelled data and its metric (None: the default) from an .npz file or a job.py."""
    chosen = None if metric is None else function(metric)
    if data.suffix != ".py":
        yield inputs.read_npz(data), chosen
        return
    with jobs.opened(data) as job:
        batches = job.call("test")
        yield (job.call("val") if batches is None else batches), (job.metric if chosen is None else chosen)


def function(name: str) -> Any:
    """The function `module:name`, looked for in the present folder too."""
    from whet.specs.base import import_function

    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return import_function(name)


def numbers(option: str, text: str) -> list[int]:
    """`"1,8"` as numbers."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise SpecError(f"{option} takes integers of at least 1, several with commas (1,8); got {text!r}.")
    return found


def amount(text: str | None) -> float | str | None:
    """`"0.25"` as a number, `"300 kB"` as it is."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def written(out: Path, data: dict[str, Any]) -> list[Path]:
    """The files that a compression has written.

    Raises:
        OutputError: one is missing.
    """
    names = (data["original"]["file"], data["compressed"]["file"], "report.json", "report.html", "history.csv", "summary.csv")
    found = [out / name for name in names]
    missing = [path for path in found if not path.exists()]
    if missing:
        raise OutputError(f"{str(missing[0])!r} should have been written and is not there.")
    return found

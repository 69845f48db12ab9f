"""The commands. Frameworks and report drawing are imported when a command needs them, so that --help is fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from whet.errors import OutputError, SpecError, WhetError

BAD_INPUT, BUDGET_MISSED = 2, 3

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[Path, typer.Argument(metavar="JOB.PY|MODEL.KERAS", help="The trained model.", show_default=False)]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def main() -> None:
    """Run the command. Text that the terminal cannot show is replaced, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app(prog_name="whet")


def _version(wanted: bool) -> None:
    if wanted:
        import whet

        typer.echo(f"whet {whet.__version__}")
        raise typer.Exit


@app.callback()
def _whet(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Make a trained PyTorch or Keras 3 model small and fast, and prove that it still works.

    \b
    whet compress job.py -o out/             the model, the data and the metric come from job.py
    whet inspect model.keras                 layers, parameters, multiply-accumulates, bytes
    whet measure out/*.onnx --data val.npz   exported files side by side
    whet report out/report.json              what was gained and what was lost
    whet compare a/report.json b/report.json reports side by side
    whet targets                             what this machine can export to and run
    """


@app.command()
def compress(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.", show_default=False)],
    train: Annotated[Path | None, typer.Option(help="Training data, .npz (with model.keras).")] = None,
    val: Annotated[Path | None, typer.Option(help="Data to decide on, .npz.")] = None,
    test: Annotated[Path | None, typer.Option(help="Data to report on, .npz.")] = None,
    metric: Annotated[str | None, typer.Option(help="A function module:name(outputs, targets).")] = None,
    target: Annotated[str | None, typer.Option(help="The runtime to export for: see whet targets.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML, as report.html shows it.")] = None,
    max_drop: Annotated[float, typer.Option(help="How much the metric may drop, in its own units.")] = 0.01,
    confidence: Annotated[float | None, typer.Option(help="How surely, e.g. 0.95; else by the measured drop alone.")] = None,
    size: Annotated[str | None, typer.Option(help="Bytes of the file: 0.25 (of the original) or '300 kB'.")] = None,
    gzip: Annotated[str | None, typer.Option(help="Bytes of the gzipped file, like --size.")] = None,
    latency: Annotated[str | None, typer.Option(help="Median time: 0.5 (of the original) or '2 ms'.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to train, e.g. cuda.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    debug: DebugOption = False,
) -> None:
    """Compress a model and report before and after.

    It is exported, and the exported file is run beside the exported original: what is reported was measured.

    \b
    whet compress job.py -o out/
    whet compress job.py -o out/ --max-drop 0.005 --size 0.3 --latency "2 ms"
    whet compress model.keras --train train.npz --val val.npz --target litert -o out/

    \b
    job.py is Python, and is run:
        def model(): ...     the trained torch.nn.Module or keras.Model
        def train(): ...     batches, or (inputs, targets) arrays
        def val(): ...       decided on these
        def test(): ...      reported on these (optional)
        def metric(outputs, targets): ...   one score per example (optional)
        def example(): ...   inputs to trace with (optional)
        def recipe(): ...    a whet.Recipe (optional)

    An .npz file holds the arrays x and y, or inputs and targets; with other names, every array is an input of that name
    and y, targets or labels are the targets. It writes original.*, model.*, report.json,
    report.html, history.csv and summary.csv.

    Exit status: 0, or 2 for bad input, or 3 if the budget was missed (the best files are written all the same).
    """
    with _told(debug, model):
        from whet.pipeline.compress import compress as run
        from whet.specs import Budget

        limits: Any = {name: _amount(value) for name, value in (("size", size), ("gzip", gzip), ("latency", latency))}
        budget = Budget(max_drop, confidence=confidence, **limits)
        chosen = _overrides(metric, recipe)
        with _job_inputs(model, {"train": train, "val": val, "test": test}) as inputs:
            inputs |= chosen
            compressed = run(
                budget=budget,
                target=target,
                seed=seed,
                device=device,
                progress=not quiet,
                out=out,
                overwrite=overwrite,
                **inputs,
            )
        if not quiet:
            from whet.report.console import print_report

            print_report(compressed.report)
            typer.echo(f"Written: {', '.join(str(path) for path in _written(out, compressed.report.data))}")
        budget_record = compressed.report.data["budget"]
        if not budget_record["met"]:
            typer.echo(f"Budget missed: {'; '.join(budget_record['missed'])}.", err=True)
            raise typer.Exit(BUDGET_MISSED)


@app.command()
def inspect(
    model: ModelArgument,
    data: Annotated[Path | None, typer.Option(help="An .npz file to take an example from.")] = None,
    debug: DebugOption = False,
) -> None:
    """Show layers, parameters, MACs and bytes.

    MACs are the multiply-accumulates for one example.

    \b
    whet inspect job.py
    whet inspect model.keras
    whet inspect model.keras --data val.npz     for inputs of open shape
    """
    with _told(debug, model):
        from whet.cli import inputs, jobs
        from whet.data import Batches
        from whet.pipeline.verbs import inspect as run

        given = None if data is None else Batches(inputs.read_npz(data), str(data)).first()[0]
        if model.suffix == ".py":
            with jobs.opened(model) as job:
                typer.echo(str(run(job.call("model"), job.example() if given is None else given)))
        else:
            loaded = inputs.read_keras_model(model)
            typer.echo(str(run(loaded, inputs.zeros_like_inputs(loaded) if given is None else given)))


@app.command()
def measure(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Exported files, or .keras.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Labelled data: an .npz file, or a job.py.", show_default=False)],
    metric: Annotated[str | None, typer.Option(help="A function module:name(outputs, targets).")] = None,
    threads: Annotated[str, typer.Option(help="Threads of the runtime; several with commas.", metavar="N[,N]")] = "1",
    batch: Annotated[str, typer.Option(help="Examples per timed call; several with commas.", metavar="N[,N]")] = "1",
    debug: DebugOption = False,
) -> None:
    """Run exported files on data, side by side.

    It shows the metric, bytes, latency, memory, and the types that each file stores and computes in. Each file is run by
    the runtime of its suffix (whet targets lists them), a .keras file by Keras. Several files are timed in alternation and
    compared with the first; the data must be in the layout that each of them takes.

    \b
    whet measure out/model.onnx --data val.npz
    whet measure out/original.onnx out/model.onnx --data job.py
    whet measure model.keras model.tflite --data val.npz --batch 1,8 --threads 1,2
    whet measure model.tflite --data val.npz --metric mymetrics:f1

    With a job.py the data is its test(), or its val() where it has none, and the metric its metric.
    """
    with _told(debug, data):
        from whet.cli.measuring import measure_files

        with _labelled(data, metric) as (batches, score):
            counts, sizes = _numbers("--threads", threads), _numbers("--batch", batch)
            measure_files(files, batches, score, what=data.name, threads=counts, batches=sizes)


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT.JSON...", help="Two or more.", show_default=False)],
    debug: DebugOption = False,
) -> None:
    """Put several reports side by side.

    It shows the metric, its drop, the bytes, and the latency ratio of each, every one against its own original.

    \b
    whet compare a/report.json b/report.json

    Reports of different metrics, data or processors are shown, and what cannot be compared between them is said.
    """
    with _told(debug):
        from whet.cli.measuring import compare_reports

        compare_reports(reports)


class Format(StrEnum):
    """The forms in which `whet report` prints."""

    TEXT = "text"
    MARKDOWN = "md"


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="REPORT.JSON", help="Written by whet compress.", show_default=False)],
    format: Annotated[Format, typer.Option(help="What to print.")] = Format.TEXT,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file instead.")] = None,
    into: Annotated[Path | None, typer.Option(help="Put the Markdown table into this file, with --marker.")] = None,
    marker: Annotated[str | None, typer.Option(help="Between <!-- NAME --> and <!-- /NAME -->.", metavar="NAME")] = None,
    made_by: Annotated[str | None, typer.Option(help="The command that made it, for the Markdown table.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write history.csv and summary.csv to this folder.", metavar="DIR")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Log to this folder for TensorBoard.", metavar="DIR")] = None,
    mlflow: Annotated[str | None, typer.Option(help="Log a run to this experiment of MLflow.", metavar="NAME")] = None,
    beside: Annotated[list[Path] | None, typer.Option(help="Other runtimes' report.json files, for the page.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show what a report.json says.

    On the terminal, as a Markdown table, or as one HTML file that opens offline.

    \b
    whet report out/report.json
    whet report out/report.json --html report.html
    whet report out/report.json --format md
    whet report out/report.json --into README.md --marker demo --made-by "make demo"
    whet report onnx/report.json --beside openvino/report.json --html page.html
    whet report out/report.json --csv numbers/ --tensorboard runs/a --mlflow compression
    """
    with _told(debug):
        from whet.cli import reporting

        found = reporting.read(path, beside or [])
        paged = reporting.write_pages(found, html, into, marker, made_by, overwrite=overwrite)
        sunk = reporting.write_sinks(found, csv, tensorboard, mlflow, overwrite=overwrite)
        if not paged and not sunk:
            reporting.show(found, markdown=format is Format.MARKDOWN, made_by=made_by)


@app.command()
def targets() -> None:
    """List the targets, their rules, and what this machine can do.

    The rules say what a runtime computes in integers, on which codes, and which values share a scale.

    \b
    whet targets
    """
    from whet.runtimes.targets import available
    from whet.specs.target import TARGETS

    for target in available():
        typer.echo(str(target))
        for line in TARGETS[target.name].describe():
            typer.echo(f"    {line}")


@contextmanager
def _told(debug: bool, job: Path | None = None) -> Iterator[None]:
    """Errors as one message: Whet's own, and those raised inside the job's file, with their line. Others are bugs: raised."""
    try:
        yield
    except WhetError as error:
        if debug:
            raise
        typer.echo(f"Error: {error}", err=True)
    except Exception as error:
        from whet.cli.jobs import blame

        where = blame(error, job) if job is not None and job.suffix == ".py" else None
        if debug or where is None or isinstance(error, typer.Exit):
            raise
        typer.echo(f"Error in {where}\nThe whole traceback: --debug.", err=True)
    else:
        return
    raise typer.Exit(BAD_INPUT)


@contextmanager
def _job_inputs(model: Path, files: dict[str, Path | None]) -> Iterator[dict[str, Any]]:
    """The model, data, metric and recipe as `whet.compress` takes them, from a job.py or from files."""
    from whet.cli import inputs, jobs

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
        raise SpecError(f"whet compress {model.name} needs data: --{' and --'.join(missing)} (.npz files).")
    loaded = inputs.read_keras_model(model)
    yield {"model": loaded, **{name: inputs.read_npz(path) for name, path in files.items() if path is not None}}


def _overrides(metric: str | None, recipe: Path | None) -> dict[str, Any]:
    """The metric and recipe named on the command line, which go before the job's own."""
    from whet.cli.inputs import read_recipe

    found: dict[str, Any] = {} if recipe is None else {"recipe": read_recipe(recipe)}
    return found if metric is None else {**found, "metric": _function(metric)}


@contextmanager
def _labelled(data: Path, metric: str | None) -> Iterator[tuple[Any, Any]]:
    """Labelled data and its metric (None: the default) from an .npz file or a job.py."""
    from whet.cli import inputs, jobs

    chosen = None if metric is None else _function(metric)
    if data.suffix != ".py":
        yield inputs.read_npz(data), chosen
        return
    with jobs.opened(data) as job:
        batches = job.call("test")
        yield (job.call("val") if batches is None else batches), (job.metric if chosen is None else chosen)


def _function(name: str) -> Any:
    """The function `module:name`, looked for in the present folder too."""
    from whet.specs.base import import_function

    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return import_function(name)


def _numbers(option: str, text: str) -> list[int]:
    """`"1,8"` as numbers."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise SpecError(f"{option} takes integers of at least 1, several with commas (1,8); got {text!r}.")
    return found


def _amount(text: str | None) -> float | str | None:
    """`"0.25"` as a number, `"300 kB"` as it is."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _written(out: Path, data: dict[str, Any]) -> list[Path]:
    names = (data["original"]["file"], data["compressed"]["file"], "report.json", "report.html", "history.csv", "summary.csv")
    found = [out / name for name in names]
    missing = [path for path in found if not path.exists()]
    if missing:
        raise OutputError(f"{str(missing[0])!r} should have been written and is not there.")
    return found

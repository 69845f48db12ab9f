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

from whet.errors import WhetError

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
    whet sensitivity job.py --bits 8,4       what each layer alone costs when it is quantized
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
        from whet.cli.given import amount, job_inputs, overrides
        from whet.pipeline.compress import compress as run
        from whet.specs import Budget

        limits: Any = {name: amount(value) for name, value in (("size", size), ("gzip", gzip), ("latency", latency))}
        budget = Budget(max_drop, confidence=confidence, **limits)
        chosen = overrides(metric, recipe)
        with job_inputs(model, {"train": train, "val": val, "test": test}) as inputs:
            inputs |= chosen
            if not quiet:
                _told_before(inputs.get("recipe"), inputs["train"], target)
            given: Any = {"target": target, "seed": seed, "device": device, "out": out, "overwrite": overwrite}
            compressed = run(budget=budget, progress=not quiet, **given, **inputs)
        _told_of_job(compressed.report, out, quiet)


def _told_before(recipe: Any, train: Any, target: str | None) -> None:
    """Print what the pruning of the recipe, or of those that are tried without one, will give, and what not."""
    from whet.data import Batches
    from whet.pipeline.compress import recipes_for
    from whet.pipeline.expectation import expectations

    tried = recipes_for(recipe, Batches(train, "train"))
    if len(tried) > 1:
        typer.echo(f"No recipe given: {len(tried)} are tried, the smallest file first, until one holds the budget.", err=True)
    for one in tried:
        for told in expectations(one, target):
            typer.echo(f"Prune: {told}", err=True)


def _told_of_job(report: Any, out: Path, quiet: bool) -> None:
    """Print what was reached and written; a missed budget ends the command with its status."""
    if not quiet:
        from whet.cli.given import written
        from whet.report.console import print_report

        print_report(report)
        typer.echo(f"Written: {', '.join(str(path) for path in written(out, report.data))}")
    budget = report.data["budget"]
    if not budget["met"]:
        typer.echo(f"Budget missed: {'; '.join(budget['missed'])}.", err=True)
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
def sensitivity(
    model: ModelArgument,
    train: Annotated[Path | None, typer.Option(help="Data to calibrate with, .npz (with model.keras).")] = None,
    val: Annotated[Path | None, typer.Option(help="Data to measure on, .npz.")] = None,
    metric: Annotated[str | None, typer.Option(help="A function module:name(outputs, targets).")] = None,
    bits: Annotated[str | None, typer.Option(help="Of weights; else by the recipe, or 8,4.", metavar="N[,N]")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave activations in float.")] = False,
    target: Annotated[str | None, typer.Option(help="The runtime whose rules hold: see whet targets.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe whose Quantize steps are measured.")] = None,
    examples: Annotated[int, typer.Option(help="Examples to calibrate with, and to measure on.", min=1)] = 512,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the numbers to this JSON file too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show what each layer alone costs when it is quantized, the most sensitive first.

    Every layer is switched on by itself in the simulation; its outputs are compared with the float model's, and the metric's
    drop is measured.

    \b
    whet sensitivity job.py
    whet sensitivity job.py --bits 8,4,3 --weights-only
    whet sensitivity model.keras --train train.npz --val val.npz --target litert -o layers.json
    """
    with _told(debug, model):
        from whet.cli.given import job_inputs, numbers, overrides
        from whet.cli.sensing import show_sensitivity

        widths = None if bits is None else numbers("--bits", bits)
        chosen = overrides(metric, recipe)
        with job_inputs(model, {"train": train, "val": val}) as found:
            options: Any = {"bits": widths, "weights_only": weights_only, "target": target, "examples": examples}
            show_sensitivity(found | chosen, **options, out=out, overwrite=overwrite, quiet=quiet)


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
        from whet.cli.given import labelled, numbers
        from whet.cli.measuring import measure_files

        with labelled(data, metric) as (batches, score):
            counts, sizes = numbers("--threads", threads), numbers("--batch", batch)
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

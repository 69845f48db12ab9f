"""`whet.compress`: one call from a trained model to a smaller file that was run, compared and timed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from whet.data import Batches, rows
from whet.errors import DataError, SpecError
from whet.graph.epochs import TrainingRun
from whet.numerics.statistics import examples_needed
from whet.pipeline.compressed import Compressed, as_metric, outputs_of, placement_record, start
from whet.pipeline.output import check_output, write_output
from whet.pipeline.pruning import prune_step
from whet.pipeline.quantizing import quantize_step
from whet.pipeline.rates import trained
from whet.pipeline.side import Model, side_of
from whet.pipeline.verbs import expect
from whet.records import Report
from whet.report.sinks import CSV_FILES
from whet.runtimes.content import check_integer
from whet.runtimes.environment import environment
from whet.runtimes.evidence import Measured, change, gather, parity, score
from whet.specs import (
    Budget,
    Cubic,
    Distill,
    EarlyStopping,
    Global,
    Metric,
    Prune,
    Quantize,
    Recipe,
    Target,
    Train,
    find_target,
    to_dict,
)

CALIBRATION_EXAMPLES = 512
CHECKPOINTS = "checkpoints"  # in the output folder, until all is done
REPORT_FILES = ("report.json", "report.html", *CSV_FILES)
ROUNDING = 1e-9  # 0.97 - 0.96 is not above 0.01


@dataclass(frozen=True, slots=True)
class Job:
    """Everything one `compress` call works with."""

    model: Model
    train: Batches
    val: Batches
    test: Batches | None
    metric: Metric
    budget: Budget
    target: Target
    example: Any
    like: Any  # the model's outputs on the example: the structure that metrics and comparisons expect
    seed: int
    device: str | None
    progress: bool
    checkpoints: Path | None  # a folder


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One recipe, run: its result, its file, and what it was worth on the validation data."""

    recipe: Recipe
    compressed: Compressed
    file: Path
    on_val: Measured
    drop: float
    missed: tuple[str, ...]
    original: Measured  # in the same run


def compress(
    model: Any,
    *,
    train: Any,
    val: Any,
    test: Any = None,
    metric: Any = None,
    budget: Budget | None = None,
    target: str | Target | None = None,
    recipe: Recipe | Sequence[Any] | None = None,
    example: Any = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    log: Callable[[Report], object] | None = None,
) -> Compressed:
    """Compress a trained `model` under `budget`, export it for `target`, run the exported file, and report.

    The original teaches wherever the recipe distills. Without a `recipe`, recipes are tried from the most to the least
    aggressive until one holds the budget. Decisions are made on `val`; the report is on `test` where it is given. When
    no recipe holds the budget, the best one is returned and `report.data["budget"]` says what was missed.

    With `out`, that folder receives the exported original and model, report.json, report.html, and the training history and
    final numbers as CSV. Until then it holds a checkpoint of each training: after a crash the same call goes on from there.
    `log` is called with the report at the end: see `whet.report.sinks` for TensorBoard and MLflow.

    Raises:
        ModelError, DataError, SpecError, MetricError, TargetError, ExportError: what is wrong, where, what is allowed.
        OutputError: `out` already holds such files and `overwrite` is false, or it cannot be written.
    """
    budget = Budget() if budget is None else budget
    expect("budget", budget, Budget)
    _check_log(log)
    original = start(model, example=example, seed=seed)
    rules = find_target(target, original.side.FRAMEWORK)
    folder = None if out is None else Path(out)
    names = (f"original{rules.suffix}", f"model{rules.suffix}", *REPORT_FILES)
    if folder is not None:
        check_output(folder, names, overwrite=overwrite)
    training, validation = Batches(train, "train"), Batches(val, "val")
    if example is None:
        original.example, _ = training.first()
    job = Job(
        original.float_model,
        training,
        validation,
        None if test is None else Batches(test, "test"),
        as_metric(metric, validation),
        budget,
        rules,
        original.example,
        original.side.predict(original.float_model, original.example),
        seed,
        device,
        progress,
        None if folder is None else folder / CHECKPOINTS,
    )
    _check_metric(job)
    with tempfile.TemporaryDirectory(prefix="whet-") as temporary:
        chosen, tried = _search(job, original, recipes_for(recipe, training), Path(temporary))
        result = _finish(job, chosen, tried, Path(temporary) / names[0])
        if folder is not None:
            write_output(folder, names, Path(temporary) / names[0], chosen.file, result.report)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if log is not None:
        log(result.report)
    return result


def _check_log(log: Any) -> None:
    if log is not None and not callable(log):
        raise SpecError(
            f"log must be a function of one report, got {log!r}: log=lambda report: to_tensorboard(report, 'runs')."
        )


def default_recipes(*, classifies: bool, has_targets: bool) -> tuple[Recipe, ...]:
    """The recipes tried when none is given, from the most to the least aggressive."""
    if not has_targets:
        return (Recipe((Quantize(),)),)
    distill = (Distill(),) if classifies else ()

    def trained(sparsity: float) -> Recipe:
        prune = Prune(sparsity, allocation=Global(), schedule=Cubic())
        return Recipe((Train(epochs=10, apply=(prune, *distill), early_stopping=EarlyStopping()), Quantize()))

    return (trained(0.8), trained(0.5), Recipe((Quantize(),)))


def run_recipe(recipe: Recipe, job: Job, name: str = "recipe") -> Compressed:
    """Run the steps of `recipe` on a fresh copy of the model, masks persisting; the original is the teacher.

    `name` begins the names of its checkpoints.
    """
    made = start(job.model, example=job.example, seed=job.seed)
    for number, step in enumerate(recipe.steps, 1):
        checkpoint = None if job.checkpoints is None else job.checkpoints / f"{name}-step-{number}.safetensors"
        if isinstance(step, Train):
            run = TrainingRun(
                train=job.train,
                val=job.val,
                metric=job.metric,
                teacher=job.model if step.distill is not None else None,
                masks=made.masks,
                seed=job.seed,
                device=job.device,
                progress=job.progress,
                checkpoint=checkpoint,
            )
            made.masks, record = trained(made.side, made.float_model, step, run)
        elif isinstance(step, Prune):
            record = prune_step(made, step, job.train, job.target, progress=job.progress)
        else:
            calibration = _some(job.train, CALIBRATION_EXAMPLES, job.seed)
            record = quantize_step(
                made,
                step,
                job.target,
                calibration=calibration,
                train=job.train,
                val=job.val,
                metric=job.metric,
                teacher=job.model,
                device=job.device,
                progress=job.progress,
                checkpoint=checkpoint,
            )
        made.steps += (record,)
    return made


def _search(job: Job, original: Compressed, recipes: tuple[Recipe, ...], folder: Path) -> tuple[Candidate, list[Candidate]]:
    """The first candidate that holds the budget on the validation data, else the best; and all that were tried."""
    baseline = original.export(folder / f"original{job.target.suffix}", job.target)
    tried: list[Candidate] = []
    for index, recipe in enumerate(recipes):
        made = run_recipe(recipe, job, f"recipe-{index + 1}")
        file = made.export(folder / str(index) / f"model{job.target.suffix}", job.target)
        if made.plan is not None and made.plan.values:
            check_integer(file, float_allowed=_float_weights(made))
        untimed = job.budget.latency is None and len(recipes) == 1  # one recipe is timed at the end
        measured = _gather(job, made, baseline, file, job.val, runs=0 if untimed else None)
        tried.append(_judge(job, recipe, made, file, measured["original"], measured["model"]))
        if not tried[-1].missed:
            return tried[-1], tried
    return min(
        tried, key=lambda candidate: (candidate.drop > job.budget.max_drop + ROUNDING, len(candidate.missed), candidate.drop)
    ), tried


def _gather(
    job: Job,
    made: Compressed,
    original: Path,
    model: Path,
    data: Batches,
    *,
    runs: int | None = None,
    processes: bool = False,
) -> dict[str, Measured]:
    """Run both files on `data`."""
    kept, size = sum(int(mask.sum()) for mask in made.masks.values()), sum(mask.size for mask in made.masks.values())
    return gather(
        {"original": original, "model": model},
        data,
        job.metric,
        runs=runs,
        seed=job.seed,
        progress=job.progress,
        like=job.like,
        sparsity={"model": 1 - kept / size} if size else None,
        processes=processes,
    )


def _judge(job: Job, recipe: Recipe, made: Compressed, file: Path, original: Measured, measured: Measured) -> Candidate:
    """Hold one candidate against the budget."""
    budget, moved = job.budget, change(original, measured, job.metric, confidence=job.budget.confidence or 0.95)
    drop, interval = moved["metric_drop"]["value"], moved["metric_drop"]["ci95"]
    missed = []
    if drop > budget.max_drop + ROUNDING:
        missed.append(f"{job.metric.name} drops by {drop:.4g}, allowed {budget.max_drop:.4g}")
    elif budget.confidence is not None and (interval is None or interval[1] > budget.max_drop + ROUNDING):
        missed.append(_unproven(job, original, measured, interval))
    before, after = original.evidence, measured.evidence
    timed = before.latency_ms is not None and after.latency_ms is not None
    for name, old, new, unit in (
        ("size", before.bytes, after.bytes, "bytes"),
        ("gzip", before.gzip_bytes, after.gzip_bytes, "bytes"),
        ("latency", before.latency_ms.p50 if timed else 0.0, after.latency_ms.p50 if timed else 0.0, "ms"),  # type: ignore[union-attr]
    ):
        limit = budget.limit(name, old)
        if limit is not None and new > limit:
            missed.append(f"{name} is {new:,.4g} {unit}, allowed {limit:,.4g}")
    return Candidate(recipe, made, file, measured, drop, tuple(missed), original)


def _unproven(job: Job, original: Measured, measured: Measured, interval: Any) -> str:
    """Why a confident budget does not hold, and how many examples would show it."""
    percent = f"{100 * (job.budget.confidence or 0.95):g} %"
    if interval is None or original.scores is None or measured.scores is None:
        return f"the drop has no interval, so {percent} confidence cannot be shown (give a per-example metric)"
    sign = 1.0 if job.metric.higher_is_better else -1.0
    needed = examples_needed(sign * (original.scores - measured.scores), job.budget.max_drop, job.budget.confidence or 0.95)
    enough = "no number of examples would show it" if needed is None else f"about {needed:,} validation examples would"
    return f"the drop may be up to {interval[1]:.4g} at {percent} confidence, allowed {job.budget.max_drop:.4g}; {enough}"


def _finish(job: Job, chosen: Candidate, tried: list[Candidate], baseline: Path) -> Compressed:
    """Measure the chosen file beside the original on the reporting data and write the report."""
    data, split = (job.val, "val") if job.test is None else (job.test, "test")
    made = chosen.compressed
    measured = _gather(job, made, baseline, chosen.file, data, processes=True)
    simulated = outputs_of(made.side, made.model, data)
    original, model = measured["original"], measured["model"]
    compared = parity(simulated, model.outputs)
    moved = change(original, model, job.metric)
    evidence = replace(model.evidence, placement=placement_record(made.plan))
    allowed = job.budget.max_drop + ROUNDING
    late = moved["metric_drop"]["value"] > allowed and chosen.drop <= allowed
    warnings = (
        [f"the drop on {split} is above the {job.budget.max_drop:.4g} that held on val"] if late and split == "test" else []
    )
    warnings += [f"{pattern!r} in {next(iter(step.spec))} matched nothing" for step in made.steps for pattern in step.unmatched]
    made.data = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "original": original.evidence.to_dict(),
        "compressed": evidence.to_dict(),
        "change": moved,
        "simulation_parity": {"agreement": compared["agreement"], "sqnr_db": compared["sqnr_db"]},
        "recipe": chosen.recipe.to_dict(),
        "budget": {
            "spec": to_dict(job.budget),
            "met": not chosen.missed,
            "missed": list(chosen.missed),
            "decided_on": "val",
            "reported_on": split,
        },
        "candidates": [
            {
                "recipe": candidate.recipe.to_dict(),
                "metric_drop": candidate.drop,
                "bytes": candidate.on_val.evidence.bytes,
                "met": not candidate.missed,
                "missed": list(candidate.missed),
                "chosen": candidate is chosen,
                "on_val": _on_val(candidate.on_val),
                "original_on_val": _on_val(candidate.original),
            }
            for candidate in tried
        ],
        "warnings": warnings,
    }
    return made


def _on_val(measured: Measured) -> dict[str, Any]:
    """What the charts of accuracy against size and latency show of one file."""
    plain = measured.evidence.to_dict()
    return {key: plain[key] for key in ("metric", "bytes", "gzip_bytes", "latency_ms")}


def recipes_for(recipe: Any, train: Batches) -> tuple[Recipe, ...]:
    """What `compress` tries, in order: `recipe`, a Recipe or a list of specs, or without one what fits the data.

    Raises:
        SpecError: it is neither.
    """
    if recipe is None:
        _, targets = train.first()
        classifies = targets is not None and np.issubdtype(np.asarray(targets).dtype, np.integer)
        return default_recipes(classifies=bool(classifies), has_targets=targets is not None)
    if isinstance(recipe, Recipe):
        return (recipe,)
    if isinstance(recipe, list | tuple):
        return (Recipe(tuple(recipe)),)
    raise SpecError(f"recipe must be a whet.Recipe or a list of specs, got {recipe!r}. Read YAML with Recipe.from_yaml.")


def _some(data: Batches, examples: int, seed: int) -> Batches:
    """The first batches, in an order drawn from `seed`, that together hold at least `examples` rows."""
    taken, count = [], 0
    for inputs, _ in data.shuffled(seed):
        taken.append((inputs, None))
        count += rows(inputs)
        if count >= examples:
            break
    if not taken:
        raise DataError("train is empty: there is nothing to calibrate with.")
    return Batches(taken, "calibration (from train)")


def _float_weights(made: Compressed) -> int:
    """How many layers with weights the quantization step left in float, by its own account."""
    return len({row["name"] for row in made.steps[-1].skipped})


def _check_metric(job: Job) -> None:
    """Refuse, before any work, a metric that cannot score the model's outputs for the first batch of val.

    A metric of the whole may need all of it, and is not tried.
    """
    inputs, targets = job.val.first()
    if targets is None or job.metric.per_example:
        score(side_of(job.model).predict(job.model, inputs), Batches([(inputs, targets)], "val"), job.metric)

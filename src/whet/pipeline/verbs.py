"""The single verbs. Each takes a model or a `Compressed`, leaves it untouched and returns a new `Compressed`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from whet.data import Batches
from whet.errors import DataError, SpecError
from whet.graph.epochs import TrainingRun
from whet.graph.summary import Summary
from whet.pipeline.compressed import Compressed, as_metric, outputs_of, plain_model, start
from whet.pipeline.pruning import groups, only_removes, prune_step
from whet.pipeline.quantizing import finish, quantize_step
from whet.pipeline.rates import trained
from whet.pipeline.side import Model, side_of
from whet.pipeline.teaching import teachers_of
from whet.progress import Log, log_to
from whet.records import Evidence
from whet.specs import Distill, Int, Metric, Prune, Quantize, Recipe, Target, Train, find_target


def fit(
    model: Any,
    spec: Train,
    *,
    train: Any,
    val: Any = None,
    metric: Any = None,
    teacher: Any = None,
    example: Any = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Log = None,
) -> Compressed:
    """Train a copy of `model` as `spec` says, with the techniques in `spec.apply`; the best weights are restored.

    `metric` is scored on `val` after every epoch; without `val` the training loss decides. `teacher` is needed when
    `spec.apply` holds a `Distill`: a model, `whet.StoredOutputs`, a list of them, or True for the model itself as it comes.
    Masks of an earlier pruning are kept.

    `checkpoint` names a file that is written after every epoch. Where it exists already the training goes on from it: killed
    at any moment, the same call ends with the same result as if it had not been.

    `log` is a function that is called with a record of every epoch, or a `.jsonl` or `.csv` file to which it is appended: its
    number, phase ("training", "warm-up", "pruning ramp", "recovery"), loss, metric and the metric's name, sparsity, learning
    rate, whether it may be and is the best so far, and seconds.

    Raises:
        SpecError, DataError, ModelError, MetricError: what is wrong, where, and what is allowed.
        OutputError: the checkpoint belongs to another training, or cannot be written.
    """
    expect("spec", spec, Train)
    if spec.distill is not None and teacher is None:
        raise SpecError("Train(apply=[Distill(…)]) needs a teacher: pass teacher= or use whet.distill or whet.compress.")
    batches = Batches(train, "train")
    validation = None if val is None else Batches(val, "val")
    compressed = start(model, example=example, seed=seed)
    _see(compressed, batches)
    score = None if validation is None else as_metric(metric, validation)
    taught = teachers_of(teacher, model)
    run = TrainingRun(
        train=batches,
        val=validation,
        metric=score,
        teacher=taught,
        masks=compressed.masks,
        seed=seed,
        device=device,
        progress=progress,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        log=log_to(log),
    )
    compressed.masks, step = trained(compressed.side, compressed.float_model, spec, run)
    compressed.steps += (step,)
    return compressed


def prune(
    model: Any,
    spec: Prune,
    *,
    fit: Train | None = None,
    train: Any = None,
    val: Any = None,
    metric: Any = None,
    target: str | Target | None = None,
    example: Any = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Log = None,
) -> Compressed:
    """Set the least important weights of a copy of `model` to zero: at once, or on a schedule while training with `fit`.

    `Channel()` and `Head()` remove instead, and the result is checked against the original with what left silenced; they need
    `example` or `train`, and with `fit` the smaller model is trained after. Criteria of gradients take `train` too.
    `Layer()` removes whole layers, `Group(…)` what you name. With `latency=` the file of `target` is timed. `checkpoint` is a
    file to go on from, `log` takes a record of every epoch, as in `fit`.

    Raises:
        SpecError: a schedule without training, or one that cannot reach its target in the given steps.
        ModelError: nothing would change, or the model's own code stands in the way (the operation is named).
    """
    expect("spec", spec, Prune)
    if fit is not None:
        if train is None:
            raise DataError("prune(fit=Train(…)) trains, and needs train= data.")
        if spec.removes:
            smaller = prune(model, spec, train=train, target=target, example=example, seed=seed, progress=progress)
            options = {"train": train, "val": val, "metric": metric, "seed": seed, "device": device, "progress": progress}
            options |= {"checkpoint": checkpoint, "log": log}
            return _fit(smaller, fit, teacher=plain_model(model) if fit.distill is not None else None, **options)
        together = replace(fit, apply=(*fit.apply, spec))
        options = {"example": example, "seed": seed, "device": device, "progress": progress}
        options |= {"checkpoint": checkpoint, "log": log}
        return _fit(model, together, train=train, val=val, metric=metric, **options)
    Recipe((spec,))  # refuses a schedule that needs training
    borrowed = only_removes(spec)
    compressed = start(model, example=example, seed=seed, borrow=borrowed)
    data = None if train is None else Batches(train, "train")
    if data is not None:
        _see(compressed, data)
    elif compressed.example is not None:
        compressed.example, _ = Batches([compressed.example], "example").first()
    rules = find_target(target, compressed.side.FRAMEWORK)
    compressed.steps += (prune_step(compressed, spec, data, rules, progress=progress),)
    if borrowed:
        compressed.side.own(compressed.float_model, model.float_model if isinstance(model, Compressed) else model)
    return compressed


_fit = fit


def distill(
    student: Any,
    teacher: Any,
    spec: Distill,
    *,
    fit: Train,
    train: Any,
    val: Any = None,
    metric: Any = None,
    example: Any = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Log = None,
) -> Compressed:
    """Train a copy of `student` as `fit` says, with `teacher`'s outputs as further targets. The teacher is untouched.

    `teacher` is a model, a `Compressed`, `whet.StoredOutputs` (of any framework or an exported file), or a list of them, which
    `Distill(teachers=…)` makes one; True is the student as it comes.

    `checkpoint` is a file to go on from, `log` takes a record of every epoch, as in `fit`.

    Raises:
        SpecError, DataError, ModelError: a softmaxed teacher, other classes than the student's, missing data.
    """
    expect("spec", spec, Distill)
    expect("fit", fit, Train)
    together = replace(fit, apply=(*fit.apply, spec))
    options = {"example": example, "seed": seed, "device": device, "progress": progress, "checkpoint": checkpoint, "log": log}
    return _fit(student, together, train=train, val=val, metric=metric, teacher=teacher, **options)


def quantize(
    model: Any,
    spec: Quantize | None = None,
    *,
    calibration: Any = None,
    target: str | Target | None = None,
    fit: Train | None = None,
    train: Any = None,
    val: Any = None,
    metric: Any = None,
    example: Any = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Log = None,
) -> Compressed:
    """Quantize a copy of `model` after training, as `target` places it. `calibration` is representative, unlabelled data.

    With `Quantize(qat=QAT(…))` the quantized model is then trained on `train`: epochs and learning rate are QAT's, loss, decay,
    early stopping and distillation `fit`'s; the best epoch on `val` is kept. With `teacher=True` the given model teaches.
    `checkpoint` is a file to go on from, `log` takes a record of every epoch, as in `fit`.

    The result's `model` simulates the integers in float; `export` writes them.

    Raises:
        DataError: calibration, or training data, is missing, empty or not finite.
        SpecError: `fit` without `qat`, or one that prunes.
        ModelError: nothing would be quantized.
        TargetError: an unknown target.
    """
    spec = Quantize() if spec is None else spec
    expect("spec", spec, Quantize)
    compressed = start(model, example=example, seed=seed)
    rules = find_target(target, compressed.side.FRAMEWORK)
    batches = None if calibration is None else Batches(calibration, "calibration")
    if batches is None and isinstance(spec.activations, Int):
        raise DataError(
            "Quantize with activations needs calibration=: some hundred representative inputs, labels are not used. "
            "Random data would give wrong ranges. For weights only write Quantize(Int(8), None)."
        )
    if batches is not None:
        _see(compressed, batches)
    if compressed.example is None:
        raise DataError("quantize() traces the model and needs a batch: pass calibration= or example=.")
    validation = None if val is None else Batches(val, "val")
    step = quantize_step(
        compressed,
        spec,
        rules,
        calibration=batches,
        fit=fit,
        train=None if train is None else Batches(train, "train"),
        val=validation,
        metric=None if validation is None else as_metric(metric, validation),
        teacher=plain_model(model),
        device=device,
        progress=progress,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        log=log_to(log),
    )
    compressed.steps += (step,)
    return compressed


def measure(
    model: Any,
    data: Any,
    *,
    metric: Any = None,
    target: str | Target | None = None,
    batches: int | Sequence[int] = 1,
    threads: int | Sequence[int] = 1,
    progress: bool = True,
) -> Evidence:
    """Measure a file, a `Compressed`, or a model on labelled `data`.

    A path is run by its own runtime, a .keras file by Keras. A `Compressed`, or a model with `target`, is exported to a
    temporary file first. A file is timed at every pair of the `batches` (examples per call) and `threads`, and opened once
    in a fresh process for its memory and cold start. A bare model is run in its framework: its record has no file.

    Raises:
        RuntimeFileError: the file cannot be run. MetricError, DataError: the metric or the data cannot be used.
    """
    from whet.runtimes.evidence import gather, score

    if isinstance(model, str | os.PathLike):
        labelled = Batches(data, "data")
        timed: dict[str, Any] = {"batches": batches, "threads": threads, "processes": True}
        return gather({"model": Path(model)}, labelled, as_metric(metric, labelled), progress=progress, **timed)[
            "model"
        ].evidence
    if isinstance(model, Compressed) or target is not None:
        compressed = model if isinstance(model, Compressed) else start(model)
        labelled = Batches(data, "data")
        _see(compressed, labelled)
        return compressed.measure(labelled, metric, target, batches=batches, threads=threads, progress=progress)
    side, labelled = side_of(model), Batches(data, "data")
    outcome = score(outputs_of(side, model, labelled), labelled, as_metric(metric, labelled))
    return Evidence("", 0, 0, outcome.record, None, {"name": side.FRAMEWORK, "version": ""}, None, {})


def inspect(model: Any, example: Any) -> Summary:
    """Layers, shapes, parameters, MACs and bytes of `model`, run once on `example`, a batch's inputs. Prints as a table."""
    plain = plain_model(model)
    inputs, _ = Batches([example], "example").first()
    return side_of(plain).inspect(plain, inputs)


def _see(compressed: Compressed, data: Batches) -> None:
    """Keep the first batch's inputs as the example to trace with, unless there is one."""
    if compressed.example is None:
        compressed.example, _ = data.first()
    else:
        compressed.example, _ = Batches([compressed.example], "example").first()


def expect(name: str, value: Any, kind: type) -> None:
    """Raise `SpecError` unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise SpecError(f"{name} must be a whet.{kind.__name__}(…), got {value!r}.")


__all__ = ["Metric", "Model", "distill", "finish", "fit", "groups", "inspect", "measure", "prune", "quantize"]

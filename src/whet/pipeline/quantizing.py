"""Quantization inside the pipeline: after training, then in training where the spec says so."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from whet.data import Batches, leaves, rows
from whet.errors import DataError, SpecError
from whet.graph.epochs import TrainingRun
from whet.graph.views import Masks
from whet.pipeline.accuracy import control
from whet.pipeline.adaptive import resolve
from whet.pipeline.compressed import Compressed
from whet.pipeline.side import Model, side_of
from whet.progress import Taker
from whet.records import Step
from whet.specs import Adaptive, Distill, Int, Metric, Quantize, Target, Train, to_dict


def quantize_step(
    compressed: Compressed,
    spec: Quantize,
    target: Target,
    *,
    calibration: Batches | None,
    fit: Train | None = None,
    train: Batches | None = None,
    val: Batches | None = None,
    metric: Metric | None = None,
    teacher: Model | None = None,
    device: str | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
    log: Taker | None = None,
) -> Step:
    """Quantize the float model of `compressed`, which gets a plan, and train it with that plan where `spec.qat` says so.

    Adaptive schemes are resolved first. With `spec.max_drop` all this is done again with fewer layers until the drop on `val`
    holds, see `whet.pipeline.accuracy`.

    Raises:
        DataError: training data or labelled data is missing. SpecError: `fit` prunes, or there is nothing to train.
        BudgetError: no choice of schemes is within the budget of `Adaptive`.
    """
    work = training_of(spec, fit, train)
    if calibration is not None and isinstance(spec.activations, Int):
        warn_of_poor_calibration(calibration)
    said, record = dict[str, dict[str, Any]](), dict[str, Any]()
    fixed, runs = spec, count(1)
    if isinstance(spec.weights, Adaptive):
        found = resolve(compressed, spec, target, calibration=calibration, val=val, metric=metric, progress=progress)
        fixed, said, record["adaptive"] = found.spec, found.rows, found.record

    def run(made: Compressed, by: Quantize) -> Step:
        return _quantized(
            made,
            by,
            target,
            work,
            calibration=calibration,
            train=train,
            val=val,
            metric=metric,
            teacher=teacher,
            device=device,
            progress=progress and spec.max_drop is None,
            checkpoint=_numbered(checkpoint, next(runs)),
            log=log,
        )

    if spec.max_drop is None:
        step = run(compressed, fixed)
    else:
        held = control(compressed, fixed, target, run, calibration=calibration, val=val, metric=metric, progress=progress)
        compressed.float_model, compressed.plan = held.made.float_model, held.made.plan
        step, record["max_drop"] = held.step, held.record
        said = {name: {"sensitivity": row.damage} for row in held.damages for name in row.weights} | said
    changed = tuple({**row, **said.get(row["name"], {})} for row in step.changed)
    return replace(step, spec=to_dict(spec), changed=changed, control=record or None)


def warn_of_poor_calibration(data: Batches) -> None:
    """Warn of `data` that shows no ranges: a single example, or inputs that are all one number."""
    seen = [inputs for inputs, _ in islice(data, 2)]
    poor = None
    if len(seen) == 1 and rows(seen[0]) == 1:
        poor = "is a single example"
    elif all(array.size > 1 and bool(np.all(array == array.flat[0])) for array in map(np.asarray, leaves(seen[0]))):
        poor = f"holds nothing but {np.asarray(leaves(seen[0])[0]).flat[0]} in its first batch"
    if poor is not None:
        warnings.warn(
            f"The data for calibration {poor}: what lies beyond the ranges seen there will be clipped. Give some hundred "
            "examples of what the model will be used on.",
            UserWarning,
            stacklevel=4,
        )


def _quantized(
    compressed: Compressed,
    spec: Quantize,
    target: Target,
    fit: Train | None,
    *,
    calibration: Batches | None,
    train: Batches | None,
    val: Batches | None,
    metric: Metric | None,
    teacher: Model | None,
    device: str | None,
    progress: bool,
    checkpoint: Path | None,
    log: Taker | None,
) -> Step:
    """*In place*: solve a plan, and train with it where there is `fit`."""
    compressed.plan, step = compressed.side.quantize(
        compressed.float_model, spec, target, calibration=calibration, example=compressed.example, progress=progress
    )
    if fit is None or train is None:
        return step
    run = TrainingRun(
        train=train,
        val=val,
        metric=metric,
        teacher=teacher if fit.distill is not None else None,
        masks=compressed.masks,
        seed=compressed.seed,
        device=device,
        progress=progress,
        checkpoint=checkpoint,
        log=log,
    )
    compressed.plan, trained = compressed.side.quantize_aware(compressed.float_model, spec, compressed.plan, fit, run)
    rows = {row["name"]: row for row in trained.changed}
    changed = tuple({**row, **rows.get(row["name"], {})} for row in step.changed)
    return replace(step, changed=changed, seconds=step.seconds + trained.seconds, train=trained.train)


def _numbered(path: Path | None, run: int) -> Path | None:
    """`path` for the first run, a path beside it for each further one that accuracy control asks for."""
    return path if path is None or run == 1 else path.with_name(f"{path.stem}-{run}{path.suffix}")


def training_of(spec: Quantize, fit: Train | None, train: Batches | None) -> Train | None:
    """The training that `spec.qat` asks for: its epochs and learning rate, all else from `fit`; None without `qat`.

    Raises:
        DataError: training data is missing. SpecError: `fit` without `qat`, or a `fit` that prunes.
    """
    if spec.qat is None:
        if fit is not None:
            raise SpecError("quantize(fit=Train(…)) trains with the quantized model: say so with Quantize(…, qat=QAT(…)).")
        return None
    if train is None:
        raise DataError("Quantize(qat=QAT(…)) trains, and needs train= data: batches of (inputs, targets).")
    fit = Train() if fit is None else fit
    if fit.prune is not None:
        raise SpecError(
            "Prune before Quantize(qat=…), not inside its training: whet.prune(…, fit=…) first, or a recipe of "
            "Train(apply=[Prune(…)]) and Quantize(qat=…). Masks are kept."
        )
    teaches = spec.qat.teacher and fit.distill is None
    apply = (*fit.apply, Distill()) if teaches else fit.apply
    return replace(fit, epochs=spec.qat.epochs, learning_rate=spec.qat.learning_rate, apply=apply)


def finish(prepared: Any, *, example: Any = None, masks: Masks | None = None, seed: int = 0) -> Compressed:
    """The result of training that `whet.torch.prepare` or `whet.keras.prepare` began: a `Compressed` that exports.

    `example` is a batch's inputs, to trace with. `masks` are those that were given to `prepare`.

    Raises:
        ModelError: `prepared` was not made by `prepare`, or its weights are not finite.
    """
    side = side_of(prepared)
    float_model, plan = side.finish(prepared)
    if example is not None:
        example, _ = Batches([example], "example").first()
    return Compressed(side, float_model, example, plan, dict(masks or {}), seed=seed)

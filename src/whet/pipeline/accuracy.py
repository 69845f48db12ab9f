"""Accuracy control: the layers that cost most stay float, as few as let the drop measured on the exported file hold."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.data import Batches
from whet.errors import DataError, SpecError
from whet.numerics.statistics import examples_needed, paired_drop
from whet.pipeline.compressed import Compressed
from whet.pipeline.sensitivity import Damage, alone, measured, sampled
from whet.progress import task
from whet.records import Estimate, Step
from whet.runtimes.evidence import Measured, gather, metric_drop
from whet.specs import Metric, Quantize, Target

ROUNDING = 1e-9  # 0.97 - 0.96 is not above 0.01


@dataclass(frozen=True, slots=True)
class Controlled:
    """What was kept: the result and step of the best trial, what every trial measured, and each layer's own damage."""

    made: Compressed
    step: Step
    record: dict[str, Any]
    damages: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class _Trial:
    reverted: tuple[str, ...]
    made: Compressed
    step: Step
    drop: Estimate

    @property
    def worst(self) -> float:
        """The upper end of the drop's interval; the drop itself where the metric has none."""
        return self.drop.value if self.drop.ci95 is None else self.drop.ci95[1]


def control(
    made: Compressed,
    spec: Quantize,
    target: Target,
    run: Callable[[Compressed, Quantize], Step],
    *,
    calibration: Batches | None,
    val: Batches | None,
    metric: Metric | None,
    progress: bool,
) -> Controlled:
    """Quantize by `spec` with as few layers put back to float as let `spec.max_drop` hold on the file, run on `val`.

    Layers go back by falling sensitivity (see `whet.sensitivity`); how many is found by bisection, in at most
    `1 + log2(layers)` files. The drop that must hold is the upper end of its paired 95 % interval. Where none holds, the
    trial of the least drop is kept and the record says what was missed. `run` quantizes a result by a spec, in place; with
    training, every trial trains a copy of the float model.

    Raises:
        DataError: there is no labelled `val`.
    """
    limit = _limit(spec)
    if val is None or metric is None:
        raise DataError(
            "Quantize(max_drop=…) measures the drop on the exported file: pass labelled val= and, if wanted, metric=."
        )
    like = made.side.predict(made.float_model, made.example)
    with tempfile.TemporaryDirectory(prefix="whet-") as folder, task("Accuracy control", None, enabled=progress) as bar:

        def measure(compressed: Compressed, name: str) -> Measured:
            file = compressed.export(Path(folder) / f"{name}{target.suffix}", target, overwrite=True)
            return gather({name: file}, val, metric, runs=0, seed=made.seed, progress=False, like=like)[name]

        original = measure(replace(made, plan=None, data={}, _simulated=None), "original")

        def attempt(reverted: tuple[str, ...]) -> _Trial:
            kept = tuple(glob.escape(layer) for layer in reverted)
            model = made.float_model if spec.qat is None else made.side.copy(made.float_model)
            tried = replace(made, float_model=model, plan=None, data={}, _simulated=None)
            step = run(tried, replace(spec, max_drop=None, keep=(*spec.keep, *kept)))
            trial = _Trial(reverted, tried, step, metric_drop(original, measure(tried, "model"), metric, seed=made.seed))
            bar.advance(note=f"{len(reverted)} in float, drop {trial.drop.value:.4g}")
            return trial

        trials = [attempt(())]
        damages: tuple[Damage, ...] = ()
        unprovable = _unprovable(original, trials[0], limit)
        if trials[0].worst > limit + ROUNDING and unprovable is None:
            few = sampled(val)  # to rank layers; the drop that must hold is that of the file on all of val
            found = measured(made, [alone(spec)], target, calibration=calibration, data=few, metric=metric, progress=False)
            damages = found.rows
            _search(found.ranked(), attempt, limit, trials)
    best = min(trials, key=lambda trial: _order(trial, limit))
    return Controlled(best.made, _told(best, damages), _record(spec, metric, trials, best, unprovable, val), damages)


def _limit(spec: Quantize) -> float:
    if spec.max_drop is None:
        raise SpecError("Accuracy control needs Quantize(max_drop=…).")
    return spec.max_drop


def _search(ranked: tuple[str, ...], attempt: Callable[[tuple[str, ...]], _Trial], limit: float, trials: list[_Trial]) -> None:
    """Add trials: the fewest layers of `ranked`, from the front, whose return to float lets `limit` hold."""
    low, high = 0, len(ranked)  # `low` does not hold; all of them would leave nothing to quantize
    while high - low > 1:
        middle = (low + high) // 2
        trials.append(attempt(ranked[:middle]))
        low, high = (low, middle) if trials[-1].worst <= limit + ROUNDING else (middle, high)


def _order(trial: _Trial, limit: float) -> tuple[bool, float]:
    """The fewest in float of those that hold, else the least drop."""
    held = trial.worst <= limit + ROUNDING
    return not held, float(len(trial.reverted)) if held else trial.worst


def _unprovable(original: Measured, trial: _Trial, limit: float) -> str | None:
    """Why no trial could hold: even equal outputs on so few examples leave a wider interval."""
    scores = original.scores
    if scores is None or trial.drop.ci95 is None:
        return None
    bound = paired_drop(scores, scores)[1]
    if bound <= limit + ROUNDING:
        return None
    needed = examples_needed(0 * scores, limit, 0.95) if limit > 0 else None
    enough = "no number of examples shows a drop of 0" if needed is None else f"give about {needed:,}"
    return f"val has {len(scores):,} examples, which leave an interval up to {bound:.4g} even where no score changes: {enough}"


def _told(best: _Trial, damages: tuple[Damage, ...]) -> Step:
    """The step, which says of every layer in float that it was put back, and why."""
    own = {row.layer: row.damage for row in damages}
    skipped = [
        {**row, "reason": f"put back to float for max_drop: alone it cost {own[row['name']]:.3g}"}
        if row["name"] in best.reverted
        else row
        for row in best.step.skipped
    ]
    return replace(best.step, skipped=tuple(skipped))


def _record(
    spec: Quantize, metric: Metric, trials: list[_Trial], best: _Trial, unprovable: str | None, val: Batches
) -> dict[str, Any]:
    limit = _limit(spec)
    held = best.worst <= limit + ROUNDING
    missed = None
    if not held:
        why = "; " + unprovable if unprovable is not None else f"; {len(best.reverted)} layers are in float"
        missed = f"{metric.name} may drop by {best.worst:.4g} at 95 % confidence, allowed {limit:.4g}{why}"
    rows = [
        {"reverted": list(trial.reverted), "drop": trial.drop.to_dict(), "held": trial.worst <= limit + ROUNDING}
        for trial in trials
    ]
    return {
        "limit": limit,
        "metric": metric.name,
        "measured_on": val.what,
        "met": held,
        "missed": missed,
        "reverted": list(best.reverted),
        "drop": best.drop.to_dict(),
        "trials": rows,
    }

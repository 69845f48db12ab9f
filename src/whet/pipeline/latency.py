"""Channels and heads removed until the exported file runs in a given time, measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from whet.data import Batches, rows
from whet.errors import BudgetError, ModelError, SpecError
from whet.graph.removable import Removable
from whet.numerics.widths import choose_widths, total_ms
from whet.pipeline.compressed import Compressed
from whet.pipeline.latency_table import MOST_WIDTHS, Table, latency_table
from whet.records import Step
from whet.runtimes.latency import Timings, alternate
from whet.runtimes.pinned import pinned
from whet.runtimes.scoring import take
from whet.runtimes.sessions import open_session
from whet.specs import Prune, Target, find_target, to_dict
from whet.specs.budget import latency_limit

_QUICK = ("onnxruntime", "openvino")  # whose files are written in a moment: the table of others is ONNX Runtime's
ROUNDS = 3  # of choosing, exporting and measuring
_SECONDS = 1.5  # of timing whole files
_NEAR = 0.02  # of the limit: what two measurements of one file may differ by
_SPARE = 0.85  # a file faster than this part of its limit has lost more than it had to

Chosen = TypeVar("Chosen")


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One choice, measured. ms: of the pruned file and of the original, timed in alternation."""

    model: Any
    masks: Any
    step: Step
    loss: float
    predicted: float
    ms: float
    original: float

    def holds(self, limit: float) -> bool:
        """Whether the measured time is within `limit`, a fraction of the original's."""
        return self.ms <= limit * self.original * (1 + _NEAR)


def prune_to_latency(compressed: Compressed, spec: Prune, data: Batches | None, target: Target, *, progress: bool) -> Step:
    """*In place*: remove channels or heads until the exported file needs `spec.latency` at most: one row, one thread.

    A table of the times of every layer at every width chooses; then the whole file is exported and timed beside the original.
    Where the table promised too much or too little, the choice is made again by what was seen, in at most three rounds.
    A target whose files take seconds to write is chosen for by ONNX Runtime's table, and measured in its own runtime.

    Raises:
        SpecError: the model is fast enough as it is. ModelError: it cannot become so fast.
    """
    started, side = time.perf_counter(), compressed.side
    found = side.removable(compressed.float_model, spec, example=compressed.example, data=data)
    options = [found.options(family, round_to=spec.round_to, most=MOST_WIDTHS) for family in found.families]
    losses = [found.losses(index, row) for index, row in enumerate(options)]
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        file = exported(compressed, compressed.float_model, target, Path(folder) / f"original{target.suffix}")
        original, limit = asked(compressed, spec, file)
        layers = side.timed_layers(compressed.float_model, compressed.example)
        stand_in = target if target.runtime in _QUICK else find_target("onnxruntime", side.FRAMEWORK)
        table = latency_table(side, layers, found, options, stand_in, progress=progress)
        full = total_ms(table.terms, [0] * len(options))

        def choose(wanted: float) -> tuple[list[int], float, float]:
            chosen = choose_widths(losses, table.terms, full - wanted)
            lost = [options[family][option] for family, option in enumerate(chosen)]
            loss = sum(losses[family][option] for family, option in enumerate(chosen))
            return lost, loss, original - full + total_ms(table.terms, chosen)

        def tried(lost: list[int], number: int, loss: float, predicted: float) -> Trial:
            path = Path(folder) / f"{number}{target.suffix}"
            return _tried(compressed, spec, data, found, lost, target, file, path, (loss, predicted))

        try:
            trials = rounds(choose, tried, limit / original, original)
        except BudgetError as cause:
            raise impossible(
                spec, original, limit, original - full + cause.least, f"lower round_to={spec.round_to}, "
            ) from cause
    best = best_of(trials, limit / original)
    compressed.float_model, compressed.masks = best.model, best.masks
    control = {"latency": record_of(target, table, trials, best, original, limit / original)}
    return replace(best.step, spec=to_dict(spec), seconds=time.perf_counter() - started, control=control)


def rounds(
    choose: Callable[[float], tuple[Chosen, float, float]],
    tried: Callable[[Chosen, int, float, float], Trial],
    limit: float,
    original: float,
) -> list[Trial]:
    """What was tried until a measured time is near `limit`, a fraction of `original` ms, or `ROUNDS` are over.

    choose: (what leaves, its loss, the predicted ms) for ms to be saved by the table. tried: remove it for real, and measure.

    Raises:
        BudgetError: so much cannot be saved.
    """
    wanted, trials = original * (1 - limit), list[Trial]()
    for number in range(ROUNDS):
        try:
            lost, loss, predicted = choose(wanted)
        except BudgetError:
            if trials:
                break
            raise
        trials.append(tried(lost, number, loss, predicted))
        again = _corrected(trials[-1], limit, wanted, original)
        if again is None:
            break
        wanted = again
    return trials


def best_of(trials: list[Trial], limit: float) -> Trial:
    """Of those that hold the limit the least loss, else the least time."""
    return min(trials, key=lambda trial: (not trial.holds(limit), _worth(trial, limit)))


def asked(compressed: Compressed, spec: Prune, file: Path) -> tuple[float, float]:
    """The original's time, and how long the pruned file may take, in ms.

    Raises:
        SpecError: the original is as fast already.
    """
    if spec.latency is None:
        raise SpecError("Pruning to a latency needs Prune(latency=…).")
    (alone,) = time_files(compressed, [file])
    original = float(np.median(alone.ms))
    limit = latency_limit(spec.latency, original)
    if original <= limit:
        raise SpecError(f"The model's file takes {original:.3g} ms and fits Prune(latency={spec.latency!r}) as it is.")
    return original, limit


def _worth(trial: Trial, limit: float) -> float:
    """Of those that hold the least loss, else the least time."""
    return trial.loss if trial.holds(limit) else trial.ms / trial.original


def _corrected(trial: Trial, limit: float, wanted: float, original: float) -> float | None:
    """The saving to ask of the table next, in ms, when this trial was promised `wanted`; None where it is near enough."""
    promised, kept = original - trial.predicted, (1 - trial.ms / trial.original) * original
    if trial.holds(limit) and trial.ms >= _SPARE * limit * trial.original:
        return None
    ratio = min(max(kept / promised, 0.25), 2.0) if promised > 0 else 1.0
    again = (1 - limit) * original / ratio
    return None if abs(again - wanted) < 1e-3 * original else again


def _tried(
    compressed: Compressed,
    spec: Prune,
    data: Batches | None,
    found: Removable,
    lost: list[int],
    target: Target,
    original: Path,
    path: Path,
    told: tuple[float, float],
) -> Trial:
    """Remove for real, on a copy, export, and time beside the original."""
    side = compressed.side
    cut = Prune(granularity=found.named(lost), rebuild=spec.rebuild, reconstruct=spec.reconstruct)
    model, masks, step = side.remove(
        side.copy(compressed.float_model), cut, example=compressed.example, masks=compressed.masks, data=data
    )
    exported(compressed, model, target, path)
    before, after = (float(np.median(times.ms)) for times in time_files(compressed, [original, path]))
    return Trial(model, masks, step, *told, after, before)


def exported(compressed: Compressed, model: Any, target: Target, path: Path) -> Path:
    """The float file of `model`, at `path`."""
    compressed.side.export(model, None, target, path, example=compressed.example)
    return path


def time_files(compressed: Compressed, files: list[Path]) -> list[Timings]:
    """Files in alternation: one row, one thread, one processor."""
    example = take(compressed.example, np.arange(1) % rows(compressed.example))
    with pinned():
        return alternate([open_session(file, threads=1) for file in files], example, budget_s=_SECONDS)


def impossible(spec: Prune, original: float, limit: float, least: float, lower: str = "") -> ModelError:
    """That the file cannot come down to the limit. least: what it can, in ms; lower: what else would help."""
    return ModelError(
        f"Prune(latency={spec.latency!r}) allows {limit:.3g} ms of {original:.3g}, and by the table of its layers the file can "
        f"come down to {least:.3g} ms. Allow more, {lower}or loosen keep=."
    )


def record_of(target: Target, table: Table, trials: list[Trial], best: Trial, original: float, limit: float) -> dict[str, Any]:
    """What a report holds of it."""
    measured, predicted = best.ms / best.original, best.predicted / original
    sentence = (
        f"{target.name}: {best.ms:.3g} ms beside the original's {best.original:.3g} in the same run, {measured:.2f} of it; "
        f"asked for {limit:.2f}; the table of its layers promised {predicted:.2f}"
    )
    missed = None if best.holds(limit) else f"{sentence}. The budget is missed."
    return {
        "target": target.name,
        "limit": limit,
        "measured": measured,
        "predicted": predicted,
        "measured_ms": best.ms,
        "predicted_ms": best.predicted,
        "original_ms": best.original,
        "says": f"{sentence}.",
        "missed": missed,
        "table": list(table.rows),
        "files": table.files,
        "table_target": table.target,
        "trials": [
            {"predicted_ms": t.predicted, "measured_ms": t.ms, "original_ms": t.original, "loss": t.loss} for t in trials
        ],
        "conditions": {"batch": 1, "threads": 1},
    }

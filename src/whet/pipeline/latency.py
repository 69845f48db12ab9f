"""Channels and heads removed until the exported file runs in a given time, measured."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
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
        file = _export(compressed, compressed.float_model, target, Path(folder) / f"original{target.suffix}")
        (alone,) = _time(compressed, [file])
        original = float(np.median(alone.ms))
        limit = latency_limit(_latency(spec), original)
        if original <= limit:
            raise SpecError(f"The model's file takes {original:.3g} ms and fits Prune(latency={spec.latency!r}) as it is.")
        layers = side.timed_layers(compressed.float_model, compressed.example)
        stand_in = target if target.runtime in _QUICK else find_target("onnxruntime", side.FRAMEWORK)
        table = latency_table(side, layers, found, options, stand_in, progress=progress)
        full = total_ms(table.terms, [0] * len(options))
        wanted, trials = original - limit, list[_Trial]()
        for number in range(ROUNDS):
            try:
                chosen = choose_widths(losses, table.terms, full - wanted)
            except BudgetError as cause:
                if trials:
                    break
                raise _impossible(spec, original, limit, full, cause.least) from cause
            predicted = original - full + total_ms(table.terms, chosen)
            lost = [options[family][option] for family, option in enumerate(chosen)]
            loss = sum(losses[family][option] for family, option in enumerate(chosen))
            path = Path(folder) / f"{number}{target.suffix}"
            trials.append(_tried(compressed, spec, found, lost, target, file, path, (loss, predicted)))
            again = _corrected(trials[-1], limit / original, wanted, original)
            if again is None:
                break
            wanted = again
    best = min(trials, key=lambda trial: (not trial.holds(limit / original), _worth(trial, limit / original)))
    compressed.float_model, compressed.masks = best.model, best.masks
    control = {"latency": _record(target, table, trials, best, original, limit / original)}
    return replace(best.step, spec=to_dict(spec), seconds=time.perf_counter() - started, control=control)


def _latency(spec: Prune) -> float | str:
    if spec.latency is None:
        raise SpecError("Pruning to a latency needs Prune(latency=…).")
    return spec.latency


def _worth(trial: _Trial, limit: float) -> float:
    """Of those that hold the least loss, else the least time."""
    return trial.loss if trial.holds(limit) else trial.ms / trial.original


def _corrected(trial: _Trial, limit: float, wanted: float, original: float) -> float | None:
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
    found: Removable,
    lost: list[int],
    target: Target,
    original: Path,
    path: Path,
    told: tuple[float, float],
) -> _Trial:
    """Remove for real, on a copy, export, and time beside the original."""
    side = compressed.side
    cut = Prune(granularity=found.named(lost), rebuild=spec.rebuild)
    model, masks, step = side.remove(
        side.copy(compressed.float_model), cut, example=compressed.example, masks=compressed.masks, data=None
    )
    _export(compressed, model, target, path)
    before, after = (float(np.median(times.ms)) for times in _time(compressed, [original, path]))
    return _Trial(model, masks, step, *told, after, before)


def _export(compressed: Compressed, model: Any, target: Target, path: Path) -> Path:
    compressed.side.export(model, None, target, path, example=compressed.example)
    return path


def _time(compressed: Compressed, files: list[Path]) -> list[Timings]:
    example = take(compressed.example, np.arange(1) % rows(compressed.example))
    with pinned():
        return alternate([open_session(file, threads=1) for file in files], example, budget_s=_SECONDS)


def _impossible(spec: Prune, original: float, limit: float, full: float, least: float) -> ModelError:
    return ModelError(
        f"Prune(latency={spec.latency!r}) allows {limit:.3g} ms of {original:.3g}, and by the table of its layers the file can "
        f"come down to {original - full + least:.3g} ms. Allow more, lower round_to={spec.round_to}, or loosen keep=."
    )


def _record(target: Target, table: Table, trials: list[_Trial], best: _Trial, original: float, limit: float) -> dict[str, Any]:
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

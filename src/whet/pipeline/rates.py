"""`whet.learning_rate`: which learning rate a training can begin with, found by trying (Smith 2017, arXiv:1506.01186)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from whet import texts
from whet.data import Batches
from whet.errors import DataError, ModelError, SpecError
from whet.files import replacing
from whet.graph.epochs import TrainingRun
from whet.graph.views import Masks
from whet.numerics import learning_rates as numerics
from whet.pipeline.compressed import start
from whet.pipeline.side import Side
from whet.pipeline.teaching import teachers_of
from whet.records import Step
from whet.report.rate_picture import rate_picture
from whet.specs import Train
from whet.specs.training import FIND

LOW, HIGH, STEPS = 1e-6, 1.0, 100


@dataclass(frozen=True, slots=True)
class LearningRates:
    """The losses of single steps at rising learning rates, to the last one before they diverged.

    smoothed: means of the losses under a window of a few steps. suggestion: where the smoothed loss falls fastest, a rate to
    begin with. greatest: where it is lowest; beyond, it rises.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool  # before the last rate that was asked for

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses without their noise, one for each rate."""
        return tuple(numerics.smooth(self.losses).tolist())

    @property
    def suggestion(self) -> float:
        """The rate at which the loss falls fastest."""
        return numerics.suggestion(self.rates, self.losses)

    @property
    def greatest(self) -> float:
        """The rate at which the loss is lowest."""
        return numerics.greatest(self.rates, self.losses)

    def plot(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> str:
        """The picture as SVG, written to `path` where one is given.

        Raises:
            OutputError: `path` exists and `overwrite` is false, or cannot be written.
        """
        marks = {"suggestion": self.suggestion, "lowest": self.greatest}
        drawn = rate_picture(self.rates, self.losses, self.smoothed, marks)
        if path is not None:
            with replacing(path, overwrite=overwrite) as temporary:
                temporary.write_text(drawn, encoding="utf-8")
        return drawn

    def __str__(self) -> str:
        end = "diverges behind it" if self.diverged else "does not diverge"
        return (
            f"Learning rate {texts.significant(self.suggestion, 2)}: the loss falls fastest there, is lowest at "
            f"{texts.significant(self.greatest, 2)} and {end} (tried {self.rates[0]:.2g} to {self.rates[-1]:.2g})."
        )

    def _repr_html_(self) -> str:
        return self.plot()


def learning_rate(
    model: Any,
    train: Any,
    *,
    loss: Any = None,
    spec: Train | None = None,
    teacher: Any = None,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    example: Any = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> LearningRates:
    """Train a copy of `model` for up to `steps` batches of `train` while the rate rises exponentially from `low` to `high`.

    The search ends early where the loss diverges. `spec` says how the training will be that the rate is for (loss, techniques,
    precision, accumulation); its pruning is left out. `loss` is short for `spec=Train(loss=…)`. The model is unchanged.
    `Train(learning_rate="find")` begins with the suggestion.

    Raises:
        SpecError: `low`, `high` or `steps` make no range. DataError, ModelError: as in `whet.fit`.
    """
    if not (isinstance(steps, int) and steps >= 10 and 0 < low < high):
        raise SpecError(f"learning_rate() tries at least 10 steps from low to a higher rate, got {steps!r}, {low!r}, {high!r}.")
    spec = Train() if spec is None else spec
    if not isinstance(spec, Train):
        raise SpecError(f"spec must be a whet.Train(…), got {spec!r}.")
    spec = spec if loss is None else replace(spec, loss=loss)
    if spec.distill is not None and teacher is None:
        raise SpecError("Train(apply=[Distill(…)]) needs a teacher: pass teacher=.")
    compressed = start(model, example=example, seed=seed)
    run = TrainingRun(
        train=Batches(train, "train"),
        teacher=teachers_of(teacher, model),
        masks=compressed.masks,
        seed=seed,
        device=device,
        progress=progress,
    )
    return searched(compressed.side, compressed.float_model, spec, run, low=low, high=high, steps=steps)


def searched(
    side: Side, model: Any, spec: Train, run: TrainingRun, *, low: float = LOW, high: float = HIGH, steps: int = STEPS
) -> LearningRates:
    """What `learning_rate` finds for this run; `model` is as it was afterwards.

    Raises:
        ModelError: the loss is not finite from the first step on. DataError: `train` ends too early.
    """
    rates = numerics.ramp(low, high, steps).tolist()
    losses = side.search_rates(model, spec, run, rates)
    if not losses:
        raise ModelError("The loss is not finite at the lowest rate already: check data, loss and weights with whet.inspect.")
    if len(losses) < 3:
        raise DataError(f"The loss diverged after {len(losses)} steps at rates from {low:g} on. Lower low=.")
    return LearningRates(tuple(rates[: len(losses)]), tuple(losses), len(losses) < steps)


def trained(side: Side, model: Any, spec: Train, run: TrainingRun) -> tuple[Masks, Step]:
    """*In place*: train `model` as `spec` says, at a rate that is searched first where it asks for that."""
    if spec.learning_rate != FIND:
        return side.train(model, spec, run)
    found = searched(side, model, spec, run)
    masks, step = side.train(model, replace(spec, learning_rate=found.suggestion), run)
    record = step.train or {}
    return masks, replace(step, train=record | {"notes": [str(found), *record.get("notes", [])]})

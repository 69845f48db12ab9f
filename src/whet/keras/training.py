"""Training on Whet's own copy, by Keras' own training step: masks are held, a teacher heard, the best weights given back."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from whet.data import Batches, primary
from whet.errors import DataError, ModelError, WhetError
from whet.graph.views import Masks
from whet.keras.distill import Teacher
from whet.keras.model import arrange, describe, predict, random_state_kept, short
from whet.keras.objective import Objective
from whet.keras.prune import Masker
from whet.keras.views import to_numpy, walk
from whet.numerics.metrics import default_metric
from whet.numerics.schedules import Ramp, lay
from whet.numerics.scoring import mean_score
from whet.numerics.stopping import Decision, StoppingState, update
from whet.progress import Task, task
from whet.records import Step
from whet.specs import Metric, Train, to_dict

TRAIN_LOSS = "loss on train"


def train(
    model: Any,
    spec: Train,
    *,
    train: Batches,
    val: Batches | None,
    metric: Metric | None,
    teacher: Any,
    masks: Masks,
    seed: int,
    device: str | None,
    progress: bool,
) -> tuple[Masks, Step]:
    """*In place*: train with the techniques in `spec.apply`, masks held after every step, best weights restored.

    Without `val` (or without targets in it) the loss on train decides which epoch is best. The record's `history` has a
    row for each epoch, its `notes` say in words what was decided. The regularization losses of the model's own layers
    are added, as in `fit`.

    Raises:
        SpecError: the pruning schedule does not fit into the training steps.
        ModelError: nothing to train or to prune, a teacher that cannot teach, or a loss that is not finite; after that the
            model has the best weights so far, else those it came with.
        DataError: batches that the model or the loss cannot take.
    """
    started = time.perf_counter()
    steps = spec.epochs * len(train)
    ramp = lay(spec.prune, steps) if spec.prune is not None else None
    with seeded(model, seed), on_device(device):
        objective = Objective(spec, Teacher(teacher, model) if spec.distill is not None else None)
        objective.check(model, *train.first())
        masker = Masker(model, spec.prune, masks)
        loop = _Loop(model, spec, masker, ramp, objective, steps)
        judge = _Judge(model, val, metric)
        with task("Training", steps, enabled=progress) as shown:
            stop = loop.run(train, judge, seed, shown)
    seconds = time.perf_counter() - started
    record = {"history": loop.history, "stop": stop, "metric": judge.name, "notes": [*objective.notes, *judge.notes]}
    step = Step(plain_spec(spec), masker.changed(), masker.skipped, seconds, record, masker.unmatched)
    return masker.masks(), step


def on_device(device: str | None) -> Any:
    """The context in which the backend computes on `device`; None: where it would anyway.

    Raises:
        ModelError: there is no such device.
    """
    if device is None:
        return contextlib.nullcontext()
    try:
        with keras.device(device):
            keras.ops.convert_to_numpy(keras.ops.zeros((1,)))
    except Exception as cause:
        raise ModelError(f"The device {device!r} cannot be used: {short(cause)} Try device='cpu' or 'gpu:0'.") from cause
    return keras.device(device)


class _Student(keras.Model):  # type: ignore[misc]
    """The model under training inside a wrapper, so that the model's own compiled state is never touched."""

    def __init__(self, student: Any, objective: Objective) -> None:
        super().__init__(autocast=False, name="whet")
        self.student = student
        self.objective = objective
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's own outputs."""
        return self.student(inputs, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The objective, and the regularization losses of the student's layers."""
        total = self.objective(y_pred, y)
        for extra in self.losses:
            total = total + keras.ops.sum(keras.ops.cast(extra, total.dtype))
        return total


class _Judge:
    """What decides which epoch is best: a metric on val, else the loss on train."""

    def __init__(self, model: Any, val: Batches | None, metric: Metric | None) -> None:
        self._model, self._val, self._metric = model, val, metric
        self.notes: list[str] = []
        if val is None:
            self.notes.append("there is no val: the loss on train decides which epoch is best")
            self._metric = None
        elif metric is None:
            targets = val.first()[1]
            if targets is None:
                self._val = None
                self.notes.append("val has no targets and no metric was given: the loss on train decides which epoch is best")
            else:
                self._metric = default_metric(primary(targets))

    @property
    def is_scored(self) -> bool:
        """Whether there is a metric on val."""
        return self._metric is not None and self._val is not None

    @property
    def name(self) -> str:
        """What the history's metric is."""
        return self._metric.name if self._metric is not None and self._val is not None else TRAIN_LOSS

    @property
    def higher_is_better(self) -> bool:
        """The direction of `name`."""
        return self._metric.higher_is_better if self._metric is not None and self._val is not None else False

    def value(self, loss: float) -> float:
        """The value of this epoch, whose mean loss was `loss`; NaN when the model's outputs are not finite."""
        if self._val is None or self._metric is None:
            return loss
        outputs = [(predict(self._model, inputs), targets) for inputs, targets in self._val]
        if not all(np.isfinite(primary(output)).all() for output, _ in outputs):
            return math.nan
        return mean_score(self._metric, outputs)


class _Loop:
    """The epochs of one `Train`."""

    def __init__(self, model: Any, spec: Train, masker: Masker, ramp: Ramp | None, objective: Objective, steps: int) -> None:
        self.model, self.spec, self.masker, self.ramp, self.objective, self.steps = model, spec, masker, ramp, objective, steps
        if not model.trainable_weights:
            raise ModelError("No weight is trainable: there is nothing to train. Set layer.trainable = True, or use prune().")
        self.trainer = _Student(model, objective)
        # Compiled by XLA only where Keras needs it to be fast: on CPU, compiling takes longer than it saves.
        jit = "auto" if keras.backend.backend() == "jax" else False
        self.trainer.compile(optimizer=self._optimizer(), jit_compile=jit, auto_scale_loss=False)
        self.outputs: Any = None
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def _optimizer(self) -> Any:
        rate: Any = self.spec.learning_rate
        if self.spec.decay is not None:  # Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts
            rate = keras.optimizers.schedules.CosineDecay(self.spec.learning_rate, self.steps)
        if self.spec.weight_decay:
            optimizer = keras.optimizers.AdamW(rate, weight_decay=self.spec.weight_decay)
        else:
            optimizer = keras.optimizers.Adam(rate)
        narrow = any(layer.compute_dtype == "float16" for _, layer in walk(self.model))
        return keras.optimizers.LossScaleOptimizer(optimizer) if narrow else optimizer

    def run(self, train: Batches, judge: _Judge, seed: int, shown: Task) -> dict[str, Any]:
        """Train to the end or until stopped, restore the best weights, and say why it ended."""
        best = _snapshot(self.model)
        state, decision = StoppingState(), Decision(False, False, "")
        try:
            for epoch in range(1, self.spec.epochs + 1):
                loss = self._epoch(train.shuffled(seed + epoch - 1), epoch, shown)
                value = judge.value(loss)
                state, decision = update(
                    state,
                    value,
                    self.spec.early_stopping,
                    higher_is_better=judge.higher_is_better,
                    eligible=self._is_eligible(),
                )
                self._record(epoch, loss, value, judge, shown)
                if decision.is_best:
                    best = _snapshot(self.model)
                if decision.stop:
                    break
        finally:
            _restore(self.model, best)
            self.masker.hold()
        self._finish(state, judge)
        ran = len(self.history)
        reason = decision.reason if decision.stop else f"ran all {ran} epochs"
        best_epoch = None if state.best_epoch is None else state.best_epoch + 1  # counted from 1, as in the history
        return {"reason": reason, "best_epoch": best_epoch, "epochs": ran}

    def _is_eligible(self) -> bool:
        """Whether a step was taken at the final sparsity."""
        return self.ramp is None or self.ramp.is_done(self.step - 1)

    def _epoch(self, batches: Iterator[tuple[Any, Any]], epoch: int, shown: Task) -> float:
        """The mean loss over the batches of one epoch."""
        losses = []
        for index, (inputs, targets) in enumerate(batches):
            loss = self._step(inputs, targets, f"epoch {epoch}, batch {index}")
            if not math.isfinite(loss):
                raise ModelError(self._diverged(loss, epoch, index))
            losses.append(loss)
            self.step += 1
            shown.advance(1, f"epoch {epoch}/{self.spec.epochs}, loss {loss:.3g}" + self._seen())
        return sum(losses) / len(losses)

    def _step(self, inputs: Any, targets: Any, where: str) -> float:
        """One step of Keras' training loop; its loss."""
        if self.ramp is not None and self.ramp.renews(self.step):
            self.masker.renew(self.ramp.sparsity(self.step))
        arranged = arrange(self.model, inputs)
        compared = self.objective.batch(inputs, targets)
        try:
            batch = keras.tree.map_structure(keras.ops.convert_to_tensor, (arranged, compared))
            logs = self.trainer.train_on_batch(*batch, return_dict=True)
        except WhetError:
            raise
        except Exception as cause:
            shapes = f"inputs of {describe(inputs)}" + ("" if targets is None else f", targets of {describe(targets)}")
            raise DataError(f"The training step failed in {where} on {shapes}: {short(cause)}") from cause
        self.masker.hold()
        return float(logs["loss"])

    def _rate(self, step: int) -> float:
        """The learning rate of `step`: what the optimizer's schedule computes."""
        rate = self.spec.learning_rate
        return rate if self.spec.decay is None else rate * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))

    def _seen(self) -> str:
        last = self.history[-1] if self.history else {}
        scored = f", metric {last['metric']:.4g}" if last.get("metric") is not None else ""
        return scored + (f", sparsity {self.masker.sparsity:.2f}" if self.masker.sparsity else "")

    def _record(self, epoch: int, loss: float, value: float, judge: _Judge, shown: Task) -> None:
        self.history.append(
            {
                "epoch": epoch,
                "loss": loss,
                "metric": value if judge.is_scored and math.isfinite(value) else None,
                "sparsity": self.masker.sparsity,
                "learning_rate": self._rate(self.step - 1),
                "eligible": self._is_eligible(),
            }
        )
        shown.advance(0, f"epoch {epoch}/{self.spec.epochs}, loss {loss:.3g}{self._seen()}")

    def _diverged(self, loss: float, epoch: int, batch: int) -> str:
        return (
            f"The loss is {loss} in epoch {epoch}, batch {batch}. Lower Train.learning_rate (now {self.spec.learning_rate:g}), "
            "and check loss and targets. The weights are back at the best epoch before, or else where they began."
        )

    def _finish(self, state: StoppingState, judge: _Judge) -> None:
        if self.ramp is not None and self.step <= self.ramp.end:
            raise DataError(
                f"train said it had {self.steps // self.spec.epochs} batches and gave {self.step} in {len(self.history)} "
                "epochs: the pruning schedule never ended. Make its length true."
            )
        if state.best_epoch is None:
            raise ModelError(
                f"In no epoch was {judge.name!r} a finite number: the model's outputs on val are NaN or Inf. "
                "Lower Train.learning_rate. The weights are where they began."
            )


def plain_spec(spec: Train) -> dict[str, Any]:
    """The plain form of `spec` for a record; unlike saving, it may name a loss that cannot be imported."""
    if spec.loss is None:
        plain: dict[str, Any] = to_dict(spec)
        return plain
    plain = to_dict(dataclasses.replace(spec, loss=None))
    name = getattr(spec.loss, "__qualname__", type(spec.loss).__name__)
    plain["Train"]["loss"] = {"function": f"{getattr(spec.loss, '__module__', '?')}:{name}"}
    return plain


@contextlib.contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Random numbers of the model's layers, Python and NumPy drawn from `seed`; the global states come back."""
    weights = {id(weight) for weight in model.weights}
    states = [v for v in model.non_trainable_variables if id(v) not in weights and v.name == "seed_generator_state"]
    for index, variable in enumerate(states):
        variable.assign(np.asarray([seed % 2**32, index], "uint32"))
    with random_state_kept():
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def _snapshot(model: Any) -> list[Any]:
    """Copies of all weights, batch norm's statistics too."""
    return [np.array(to_numpy(weight)) for weight in model.weights]


def _restore(model: Any, saved: list[Any]) -> None:
    for weight, value in zip(model.weights, saved, strict=True):
        weight.assign(value)

"""Training on Whet's own copy: a plain loop that holds masks, listens to a teacher and gives the best weights back."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from whet.data import Batches, primary
from whet.errors import DataError, ModelError
from whet.graph.views import Masks
from whet.numerics.metrics import default_metric
from whet.numerics.schedules import Ramp, lay
from whet.numerics.scoring import mean_score
from whet.numerics.stopping import Decision, StoppingState, update
from whet.progress import Task, task
from whet.records import Step
from whet.specs import Metric, Train, to_dict
from whet.torch.distill import teaching
from whet.torch.learner import scale_names
from whet.torch.model import call, dtype_of, evaluating, on_device, to_numpy, to_tensors
from whet.torch.objective import Objective
from whet.torch.prune import Masker

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
    settled: int = 0,
) -> tuple[Masks, Step]:
    """*In place*: train with the techniques in `spec.apply`, masks held after every step, best weights restored.

    Without `val` (or without targets in it) the loss on train decides which epoch is best. The record's `history` has a
    row for each epoch, its `notes` say in words what was decided and left out. No epoch is best that ends before `settled`
    steps.

    Raises:
        SpecError: the pruning schedule does not fit into the training steps.
        ModelError: nothing to train or to prune, a teacher that cannot teach, or a loss that is not finite; after that the
            model has the best weights so far, else those it came with.
        DataError: batches that the model or the loss cannot take.
    """
    started = time.perf_counter()
    steps = spec.epochs * len(train)
    ramp = lay(spec.prune, steps) if spec.prune is not None else None
    with seeded(seed, device), on_device(model, device) as where, teaching(spec.distill, teacher, model, where) as tutor:
        masker = Masker(model, spec.prune, masks)
        loop = _Loop(model, spec, masker, ramp, Objective(spec, tutor, where, dtype_of(model)), steps)
        loop.settled = settled
        judge = _Judge(model, val, metric, where)
        with task("Training", steps, enabled=progress) as shown:
            stop = loop.run(train, judge, seed, shown)
    seconds = time.perf_counter() - started
    record = {"history": loop.history, "stop": stop, "metric": judge.name, "notes": [*judge.notes, *loop.notes]}
    step = Step(plain_spec(spec), masker.changed(), masker.skipped, seconds, record, masker.unmatched)
    return masker.masks(), step


class _Judge:
    """What decides which epoch is best: a metric on val, else the loss on train."""

    def __init__(self, model: Any, val: Batches | None, metric: Metric | None, device: Any) -> None:
        self._model, self._val, self._metric, self._device = model, val, metric, device
        self.notes: list[str] = []
        if val is not None and metric is None:
            targets = val.first()[1]
            if targets is None:
                self._val = None
                self.notes.append("val has no targets and no metric was given: the loss on train decides which epoch is best")
            else:
                self._metric = default_metric(primary(targets))
        if val is None:
            self.notes.append("there is no val: the loss on train decides which epoch is best")
            self._metric = None

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
        outputs = [(self._predict(inputs), targets) for inputs, targets in self._val]
        if not all(np.isfinite(primary(output)).all() for output, _ in outputs):
            return math.nan
        return mean_score(self._metric, outputs)

    def _predict(self, inputs: Any) -> Any:
        with evaluating(self._model), torch.no_grad():
            outputs = call(self._model, to_tensors(inputs, self._device, dtype_of(self._model)))
        found = to_numpy(outputs)
        if found is None:
            raise ModelError(f"{type(self._model).__name__} returned no tensor: there is nothing to score.")
        return found


class _Loop:
    """The epochs of one `Train`."""

    def __init__(self, model: Any, spec: Train, masker: Masker, ramp: Ramp | None, objective: Objective, steps: int) -> None:
        self.model, self.spec, self.masker, self.ramp, self.objective, self.steps = model, spec, masker, ramp, objective, steps
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ModelError("No parameter has requires_grad=True: there is nothing to train. Unfreeze some, or use prune().")
        self.optimizer = torch.optim.AdamW(_decaying(model), lr=spec.learning_rate, weight_decay=spec.weight_decay)
        self.step, self.settled = 0, 0
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.alone = 0  # batches left out: one example, which batch norm cannot train on

    def run(self, train: Batches, judge: _Judge, seed: int, shown: Task) -> dict[str, Any]:
        """Train to the end or until stopped, restore the best weights, and say why it ended."""
        best = _snapshot(self.model)
        modes = [(module, module.training) for module in self.model.modules()]
        if not self.model.training:  # a model in training mode may hold parts in inference mode on purpose
            self.model.train()
        state, decision = StoppingState(), Decision(False, False, "")
        try:
            for epoch in range(1, self.spec.epochs + 1):
                loss = self._epoch(train.shuffled(seed + epoch - 1), epoch, shown)
                value = judge.value(loss)
                state, decision = self._decide(state, value, judge)
                self._record(epoch, loss, value, judge, shown)
                if decision.is_best:
                    best = _snapshot(self.model)
                if decision.stop:
                    break
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            _restore(self.model, best)
            self.masker.hold()
            for module, training in modes:
                module.training = training
        self._finish(state, judge)
        ran = len(self.history)
        reason = decision.reason if decision.stop else f"ran all {ran} epochs"
        best_epoch = None if state.best_epoch is None else state.best_epoch + 1  # counted from 1, as in the history
        return {"reason": reason, "best_epoch": best_epoch, "epochs": ran}

    def _decide(self, state: StoppingState, value: float, judge: _Judge) -> tuple[StoppingState, Decision]:
        return update(
            state, value, self.spec.early_stopping, higher_is_better=judge.higher_is_better, eligible=self._is_eligible()
        )

    def _is_eligible(self) -> bool:
        """Whether a step was taken at the final sparsity, and with ranges that no longer change."""
        return self.step >= self.settled and (self.ramp is None or self.ramp.is_done(self.step - 1))

    def _epoch(self, batches: Iterator[tuple[Any, Any]], epoch: int, shown: Task) -> float:
        """The mean loss over the batches of one epoch."""
        losses = []
        for index, (inputs, targets) in enumerate(batches):
            loss = self._step(inputs, targets)
            if loss is not None:
                if not math.isfinite(loss):
                    raise ModelError(self._diverged(loss, epoch, index))
                losses.append(loss)
            self.step += 1
            note = f"epoch {epoch}/{self.spec.epochs}, loss {losses[-1]:.3g}" if losses else f"epoch {epoch}/{self.spec.epochs}"
            shown.advance(1, note + self._seen())
        if not losses:
            raise DataError("Every batch of train has one example, and batch norm cannot train on those. Use larger batches.")
        return sum(losses) / len(losses)

    def _step(self, inputs: Any, targets: Any) -> float | None:
        """One optimizer step; its loss, or None for a batch of one that batch norm refuses."""
        if self.ramp is not None and self.ramp.renews(self.step):
            self.masker.renew(self.ramp.sparsity(self.step))
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self.objective(self.model, inputs, targets)
        except DataError as error:
            if "Expected more than 1 value per channel when training" not in str(error.__cause__):
                raise
            self.alone += 1
            return None
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
            self.optimizer.step()
            self.masker.hold()  # momentum moves removed weights too, and is undone here
        return value

    def _rate(self) -> float:
        """Cosine decay to zero (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts)."""
        rate = self.spec.learning_rate
        return rate if self.spec.decay is None else rate * 0.5 * (1 + math.cos(math.pi * min(self.step / self.steps, 1)))

    def _seen(self) -> str:
        last = self.history[-1] if self.history else {}
        scored = f", metric {last['metric']:.4g}" if last.get("metric") is not None else ""
        return scored + (f", sparsity {self.masker.sparsity:.2f}" if self.masker.sparsity else "")

    def _record(self, epoch: int, loss: float, value: float, judge: _Judge, shown: Task) -> None:
        is_scored = judge.name != TRAIN_LOSS and math.isfinite(value)
        self.history.append(
            {
                "epoch": epoch,
                "loss": loss,
                "metric": value if is_scored else None,
                "sparsity": self.masker.sparsity,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "eligible": self._is_eligible(),
            }
        )
        shown.advance(0, f"epoch {epoch}/{self.spec.epochs}, loss {loss:.3g}{self._seen()}")

    def _diverged(self, loss: float, epoch: int, batch: int) -> str:
        dtype = dtype_of(self.model)
        hint = f" The model is in {str(dtype).removeprefix('torch.')}: train it in float32." if dtype == torch.float16 else ""
        return (
            f"The loss is {loss} in epoch {epoch}, batch {batch}. Lower Train.learning_rate (now {self.spec.learning_rate:g}), "
            f"and check loss and targets.{hint} The weights are back at the best epoch before, or else where they began."
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
        if self.alone:
            self.notes.append(f"{self.alone} batches of one example were left out: batch norm cannot train on them")


def _decaying(model: Any) -> list[dict[str, Any]]:
    """The trainable parameters in the optimizer's groups: learned scales are never decayed."""
    scales = scale_names(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [parameter for name, parameter in trainable if name not in scales]}]
    kept = [parameter for name, parameter in trainable if name in scales]
    return [*groups, {"params": kept, "weight_decay": 0.0}] if kept else groups


def plain_spec(spec: Train) -> dict[str, Any]:
    """The plain form of `spec` for a record; unlike saving, it may name a loss that cannot be imported."""
    if spec.loss is None:
        plain: dict[str, Any] = to_dict(spec)
        return plain
    plain = to_dict(dataclasses.replace(spec, loss=None))
    name = getattr(spec.loss, "__qualname__", type(spec.loss).__name__)
    plain["Train"]["loss"] = {"function": f"{getattr(spec.loss, '__module__', '?')}:{name}"}
    return plain


@contextmanager
def seeded(seed: int, device: str | None) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python drawn from `seed` while the block runs; the global states come back."""
    on_gpu = torch.cuda.is_initialized() or (device is not None and device.startswith("cuda") and torch.cuda.is_available())
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _snapshot(model: Any) -> dict[str, Any]:
    """Copies of all parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _restore(model: Any, saved: dict[str, Any]) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in saved:
            continue
        if tensor.shape == saved[name].shape:
            tensor.data.copy_(saved[name])
        else:  # a buffer that the forward replaced
            tensor.data = saved[name].clone()

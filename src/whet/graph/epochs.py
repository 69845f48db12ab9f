"""The epochs of a training, whatever the framework: which is best, when to stop, what is written down and shown."""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from whet.data import Batches, primary
from whet.errors import DataError, ModelError
from whet.graph.checkpoints import Checkpoint, data_digest, digest, random_state, set_random_state
from whet.graph.masking import Masker
from whet.graph.views import Masks
from whet.numerics.metrics import default_metric
from whet.numerics.schedules import Ramp, lay
from whet.numerics.scoring import mean_score
from whet.numerics.stopping import Decision, StoppingState, update
from whet.progress import Taker, Task, task
from whet.records import Step
from whet.specs import Metric, Train, to_dict

TRAIN_LOSS = "loss on train"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What a training is given besides the model and its spec.

    Without `val` (or without targets in it) the loss on train decides which epoch is best. teacher: the model that `Distill`
    learns from. masks: of earlier prunings, held. device: None: where the model is. No epoch is best that ends before
    `settled` steps. checkpoint: a file that is written after every epoch; where it exists the training goes on from it.
    log: is called with the record of every epoch, in the process that writes.
    """

    train: Batches
    val: Batches | None = None
    metric: Metric | None = None
    teacher: Any = None
    masks: Masks = field(default_factory=dict)
    seed: int = 0
    device: str | None = None
    progress: bool = True
    settled: int = 0
    checkpoint: Path | None = None
    log: Taker | None = None

    def ramp(self, spec: Train) -> Ramp | None:
        """The schedule of what `spec` prunes, laid on all steps; None where it does not prune.

        Raises:
            SpecError: it does not fit into them.
        """
        return None if spec.prune is None else lay(spec.prune, spec.epochs * len(self.train))


class Judge:
    """What decides which epoch is best: a metric on val, else the loss on train."""

    def __init__(self, run: TrainingRun, predict: Callable[[Any], Any]) -> None:
        """`predict` gives the outputs for a batch's inputs, in inference mode, as NumPy arrays."""
        self._predict, self._val, self._metric = predict, run.val, run.metric
        self.notes: list[str] = []
        if self._val is None:
            self.notes.append("there is no val: the loss on train decides which epoch is best")
            self._metric = None
        elif self._metric is None:
            targets = self._val.first()[1]
            if targets is None:
                self.notes.append("val has no targets and no metric was given: the loss on train decides which epoch is best")
            else:
                self._metric = default_metric(primary(targets))

    @property
    def name(self) -> str:
        """What the history's metric is."""
        return TRAIN_LOSS if self._metric is None else self._metric.name

    @property
    def is_scored(self) -> bool:
        """Whether there is a metric on val."""
        return self._metric is not None

    @property
    def higher_is_better(self) -> bool:
        """The direction of `name`."""
        return self._metric is not None and self._metric.higher_is_better

    def value(self, loss: float) -> float:
        """The value of this epoch, whose mean loss was `loss`; NaN when the model's outputs are not finite."""
        if self._val is None or self._metric is None:
            return loss
        outputs = [(self._predict(inputs), targets) for inputs, targets in self._val]
        if not all(np.isfinite(primary(output)).all() for output, _ in outputs):
            return math.nan
        return mean_score(self._metric, outputs)


@dataclass(slots=True)
class Standing:
    """Where a training stands between two epochs, beside the model and what trains it."""

    best: Any  # a snapshot
    epoch: int = 0
    stopping: StoppingState = field(default_factory=StoppingState)
    decision: Decision = field(default_factory=lambda: Decision(False, False, ""))


class Epochs(ABC):
    """The epochs of one `Train`. A framework side says what a step is, and how weights are kept and given back."""

    def __init__(self, spec: Train, run: TrainingRun, judge: Judge, masker: Masker, ramp: Ramp | None) -> None:
        self.spec, self.given, self.judge, self.masker, self.ramp = spec, run, judge, masker, ramp
        self.steps = spec.epochs * len(run.train)
        self.step, self.base_rate = 0, spec.rate
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @abstractmethod
    def train_on(self, inputs: Any, targets: Any, where: str) -> float | None:
        """One optimizer step; its loss, or None for a batch that was left out. `where` names the batch in errors."""

    @abstractmethod
    def snapshot(self) -> Any:
        """A copy of all weights, statistics too."""

    @abstractmethod
    def restore(self, saved: Any) -> None:
        """Give the model the weights of a snapshot."""

    @abstractmethod
    def packed(self, saved: Any) -> Any:
        """A snapshot as a tree of plain values and NumPy arrays, for a file."""

    @abstractmethod
    def unpacked(self, packed: Any) -> Any:
        """The snapshot that `packed` made this of."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All else that the next step depends on, as `packed`: the optimizer, random numbers, the teacher's projectors."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

    def join(self) -> None:
        """An epoch's steps are done: processes that train together have one model to score, its statistics too."""
        return

    def training_mode(self) -> AbstractContextManager[Any]:
        """The state in which the model trains; left when all is done."""
        return nullcontext()

    @property
    def writes(self) -> bool:
        """Whether this process writes the checkpoint: of several that train together one does."""
        return True

    @property
    def place(self) -> tuple[int, int]:
        """The present batch's place among those of one optimizer step, counted from 0, and how many these are.

        An epoch's last step takes the batches that are left.
        """
        batches = self.steps // self.spec.epochs
        index = self.step % batches
        begin = index - index % self.spec.accumulate
        return index - begin, min(self.spec.accumulate, batches - begin)

    def hint(self) -> str:
        """What else may help where a loss is not finite."""
        return ""

    def run(self) -> dict[str, Any]:
        """Train to the end or until stopped, restore the best weights, and say why it ended."""
        at = Standing(self.snapshot())
        checkpoint = self._checkpoint()
        with self.training_mode(), task("Training", self.steps, enabled=self.given.progress) as shown:
            try:
                if checkpoint is not None:
                    self._go_on(checkpoint, at, shown)
                while at.epoch < self.spec.epochs and not at.decision.stop:
                    self._next(at, shown)
                    if checkpoint is not None:
                        standing = self._standing(at)  # in all processes: what they share in parts they gather together
                        if self.writes:
                            checkpoint.write(standing)
            finally:
                self.restore(at.best)
                self.masker.hold()
        self._check(at.stopping)
        ran, best = len(self.history), at.stopping.best_epoch
        reason = at.decision.reason if at.decision.stop else f"ran all {ran} epochs"
        return {"reason": reason, "best_epoch": None if best is None else best + 1, "epochs": ran}  # counted from 1

    def told(self, stop: dict[str, Any], started: float, notes: list[str]) -> tuple[Masks, Step]:
        """The masks and the report's row; `stop` is what `run` returned, `started` the clock at the beginning."""
        seconds = time.perf_counter() - started
        all_notes = [*notes, *self.judge.notes, *self.notes]
        record = {"history": self.history, "stop": stop, "metric": self.judge.name, "notes": all_notes}
        masker = self.masker
        return masker.masks(), Step(plain_spec(self.spec), masker.changed(), masker.skipped, seconds, record, masker.unmatched)

    def set_rate(self, rate: float) -> None:
        """Take steps at this learning rate from now on; for a spec without decay."""
        self.base_rate = rate

    def rate(self, step: int) -> float:
        """The learning rate of `step`: cosine decay to zero (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5)."""
        rate = self.base_rate
        return rate if self.spec.decay is None else rate * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))

    def _next(self, at: Standing, shown: Task) -> None:
        """One epoch, and what it is worth."""
        at.epoch += 1
        began = time.perf_counter()
        loss = self._epoch(self.given.train.shuffled(self.given.seed + at.epoch - 1), at.epoch, shown)
        self.join()
        value = self.judge.value(loss)
        at.stopping, at.decision = self._decide(at.stopping, value)
        self._record(at.epoch, loss, value)
        shown.advance(0, self._seen(at.epoch, loss))
        if at.decision.is_best:
            at.best = self.snapshot()
        if self.given.log is not None and self.writes:
            told = {"metric_name": self.judge.name, "best": at.decision.is_best, "seconds": time.perf_counter() - began}
            self.given.log(self.history[-1] | told)

    def _checkpoint(self) -> Checkpoint | None:
        """The file of this training, which knows it by what it began with."""
        given = self.given
        if given.checkpoint is None:
            return None
        masks = {f"mask {name}": np.asarray(mask) for name, mask in given.masks.items()}
        belongs = {
            "spec": plain_spec(self.spec),
            "seed": given.seed,
            "metric": self.judge.name,
            "train data": data_digest(given.train),
            "val data": None if given.val is None else data_digest(given.val),
            "model": digest(dict(_named_arrays(self.packed(self.snapshot()))) | masks),
        }
        return Checkpoint(given.checkpoint, belongs)

    def _standing(self, at: Standing) -> dict[str, Any]:
        return {
            "epoch": at.epoch,
            "step": self.step,
            "history": self.history,
            "stopping": dataclasses.asdict(at.stopping),
            "decision": dataclasses.asdict(at.decision),
            "best": self.packed(at.best),
            "weights": self.packed(self.snapshot()),
            "masker": self.masker.state(),
            "random": random_state(),
            "side": self.state(),
        }

    def _go_on(self, checkpoint: Checkpoint, at: Standing, shown: Task) -> None:
        """From where `checkpoint` was written, if it was."""
        found = checkpoint.read()
        if found is None:
            return
        at.epoch, self.step, self.history = found["epoch"], found["step"], found["history"]
        at.stopping, at.decision = StoppingState(**found["stopping"]), Decision(**found["decision"])
        at.best = self.unpacked(found["best"])
        self.restore(self.unpacked(found["weights"]))
        self.masker.restore(found["masker"])
        self.load(found["side"])
        set_random_state(found["random"])
        self.notes.append(f"continued from the checkpoint after epoch {at.epoch}")
        shown.resume(self.step, f"continued after epoch {at.epoch}")

    def _decide(self, state: StoppingState, value: float) -> tuple[StoppingState, Decision]:
        higher = self.judge.higher_is_better
        return update(state, value, self.spec.early_stopping, higher_is_better=higher, eligible=self._is_eligible())

    def _is_eligible(self) -> bool:
        """Whether a step was taken at the final sparsity, and with ranges that no longer change."""
        return self.step >= self.given.settled and (self.ramp is None or self.ramp.is_done(self.step - 1))

    def _phase(self, step: int) -> str:
        """What training is at before `step`."""
        if step < self.given.settled:
            return "observing ranges"
        return "training" if self.ramp is None else self.ramp.phase(step)

    def _epoch(self, batches: Iterator[tuple[Any, Any]], epoch: int, shown: Task) -> float:
        """The mean loss over the batches of one epoch."""
        losses: list[float] = []
        for index, (inputs, targets) in enumerate(batches):
            if self.ramp is not None:
                self.masker.follow(self.ramp, self.step)
            where = f"epoch {epoch}, batch {index}"
            loss = self.train_on(inputs, targets, where)
            if loss is not None:
                if not math.isfinite(loss):
                    raise ModelError(self._diverged(loss, where))
                self.masker.observe()
                self.masker.hold()  # momentum moves removed weights too, and is undone here
                losses.append(loss)
            self.step += 1
            shown.advance(1, self._seen(epoch, losses[-1] if losses else None))
        if not losses:
            raise DataError("Every batch of train has one example, and batch norm cannot train on those. Use larger batches.")
        return sum(losses) / len(losses)

    def _seen(self, epoch: int, loss: float | None) -> str:
        """The line beside the progress bar."""
        last = self.history[-1] if self.history else {}
        line = f"epoch {epoch}/{self.spec.epochs}, {self._phase(max(self.step - 1, 0))}"
        line += "" if loss is None else f", loss {loss:.3g}"
        line += f", {self.judge.name} {last['metric']:.4g}" if last.get("metric") is not None else ""
        return line + (f", sparsity {self.masker.sparsity:.2f}" if self.masker.sparsity else "")

    def _record(self, epoch: int, loss: float, value: float) -> None:
        self.history.append(
            {
                "epoch": epoch,
                "phase": self._phase(self.step - 1),
                "loss": loss,
                "metric": value if self.judge.is_scored and math.isfinite(value) else None,
                "sparsity": self.masker.sparsity,
                "learning_rate": self.rate(self.step - 1),
                "eligible": self._is_eligible(),
            }
        )

    def _diverged(self, loss: float, where: str) -> str:
        return (
            f"The loss is {loss} in {where}. Lower Train.learning_rate (now {self.spec.rate:g}), and check loss and "
            f"targets.{self.hint()} The weights are back at the best epoch before, or else where they began."
        )

    def _check(self, state: StoppingState) -> None:
        if self.ramp is not None and self.step <= self.ramp.end:
            raise DataError(
                f"train said it had {self.steps // self.spec.epochs} batches and gave {self.step} in {len(self.history)} "
                "epochs: the pruning schedule never ended. Make its length true."
            )
        if state.best_epoch is None:
            raise ModelError(
                f"In no epoch was {self.judge.name!r} a finite number: the model's outputs on val are NaN or Inf. "
                "Lower Train.learning_rate. The weights are where they began."
            )


def _named_arrays(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of a tree, by the way to them."""
    if isinstance(tree, dict | list):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _named_arrays(item, f"{path}/{key}")
    elif isinstance(tree, np.ndarray):
        yield path, tree


def plain_spec(spec: Train) -> dict[str, Any]:
    """The plain form of `spec` for a record; unlike saving, it may name a loss that cannot be imported."""
    if spec.loss is None:
        plain: dict[str, Any] = to_dict(spec)
        return plain
    plain = to_dict(dataclasses.replace(spec, loss=None))
    name = getattr(spec.loss, "__qualname__", type(spec.loss).__name__)
    plain["Train"]["loss"] = {"function": f"{getattr(spec.loss, '__module__', '?')}:{name}"}
    return plain

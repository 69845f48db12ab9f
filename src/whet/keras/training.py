"""Training on Whet's own copy, by Keras' own training step: masks are held, a teacher heard, the best weights given back."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from whet.errors import DataError, ModelError, SpecError, WhetError
from whet.graph.epochs import Epochs, Judge, TrainingRun
from whet.graph.rate_search import search, search_run, search_spec
from whet.graph.views import Masks
from whet.keras.distill import Teacher
from whet.keras.model import arrange, describe, predict, random_state_kept, short
from whet.keras.objective import Objective
from whet.keras.prune import Masker
from whet.keras.regularizers import group_lasso
from whet.keras.views import to_numpy, walk
from whet.numerics.schedules import Ramp
from whet.records import Step
from whet.specs import Train


def train(model: Any, spec: Train, run: TrainingRun) -> tuple[Masks, Step]:
    """*In place*: train with the techniques in `spec.apply`, masks held after every step, best weights restored.

    The record's `history` has a row for each epoch, its `notes` say in words what was decided. The regularization losses of
    the model's own layers are added, as in `fit`.

    Raises:
        SpecError: the pruning schedule does not fit into the training steps, or a precision.
        ModelError: nothing to train or to prune, a teacher that cannot teach, or a loss that is not finite; after that the
            model has the best weights so far, else those it came with.
        DataError: batches that the model or the loss cannot take.
    """
    started = time.perf_counter()
    with _looping(model, spec, run) as loop:
        stop = loop.run()
    return loop.told(stop, started, loop.objective.notes)


def search_rates(model: Any, spec: Train, run: TrainingRun, rates: Sequence[float]) -> list[float]:
    """The loss of a step of `spec` at each of `rates` until it diverges; `model` is afterwards as it was.

    Raises:
        SpecError, ModelError, DataError: as in `train`.
    """
    with _looping(model, search_spec(spec, rates[0]), search_run(run)) as loop:
        return search(loop, rates)


@contextlib.contextmanager
def _looping(model: Any, spec: Train, run: TrainingRun) -> Iterator[_Loop]:
    """The loop that trains `model`, on its device, with its teacher."""
    if spec.precision is not None:
        raise SpecError(
            f"Train.precision={spec.precision!r} is PyTorch's autocast. A Keras model computes as its layers' dtype "
            "policies say: build it under keras.config.set_dtype_policy('mixed_bfloat16'), and leave precision out."
        )
    if spec.shard or isinstance(spec.compile, str):
        field = f"compile={spec.compile!r}, a backend of torch.compile," if isinstance(spec.compile, str) else "shard=True"
        raise SpecError(f"Train({field}) is for PyTorch models. Keras models take compile=True (XLA), and keras.distribution.")
    ramp = run.ramp(spec)
    penalty = contextlib.nullcontext() if spec.group_lasso is None else group_lasso(model, spec.group_lasso.strength)
    with seeded(model, run.seed), on_device(run.device), penalty:
        objective = Objective(spec, None if spec.distill is None else Teacher(spec.distill, run.teacher, model))
        objective.check(model, *run.train.first())
        masker = Masker(model, spec.prune, run.masks, run.train, spec.loss)
        judge = Judge(run, lambda inputs: predict(model, inputs))
        yield _Loop(model, objective, spec, run, judge, masker, ramp)


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

    def __init__(self, student: Any, objective: Objective, learning_rate: float) -> None:
        super().__init__(autocast=False, name="whet")
        self.student = objective.hearing(student)
        self.objective = objective
        rates = {name: rate / learning_rate for name, rate in objective.rates().items()}
        # A map is where it began plus `rate · moved`: Adam moves that by the student's rate, and so the map by its own.
        self._maps = {name: (objective.maps[name], rates[name]) for name in rates}
        self.moved = [
            self.add_weight(shape=begun.shape, initializer="zeros", name=f"map_{index}")
            for index, (begun, _) in enumerate(self._maps.values())
        ]
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's own outputs."""
        return self.student(inputs, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The objective, and the regularization losses of the student's layers."""
        maps = {
            name: keras.ops.convert_to_tensor(begun) + rate * keras.ops.convert_to_tensor(moved)
            for (name, (begun, rate)), moved in zip(self._maps.items(), self.moved, strict=True)
        }
        total = self.objective(y_pred, y, maps)
        for extra in self.losses:
            total = total + keras.ops.sum(keras.ops.cast(extra, total.dtype))
        return total


class _Loop(Epochs):
    """Keras' own compiled training step, batch by batch."""

    def __init__(
        self, model: Any, objective: Objective, spec: Train, run: TrainingRun, judge: Judge, masker: Masker, ramp: Ramp | None
    ) -> None:
        super().__init__(spec, run, judge, masker, ramp)
        self.model, self.objective = model, objective
        if not model.trainable_weights:
            raise ModelError("No weight is trainable: there is nothing to train. Set layer.trainable = True, or use prune().")
        self.trainer = _Student(model, objective, spec.rate)
        # Compiled by XLA only where Keras needs it to be fast, or where it is asked for: on CPU, compiling takes long.
        jit = spec.compile or ("auto" if keras.backend.backend() == "jax" else False)
        masker.optimizer = self._optimizer()
        self.trainer.compile(optimizer=masker.optimizer, jit_compile=jit, auto_scale_loss=False)

    def _optimizer(self) -> Any:
        rate: Any = self.spec.rate
        if self.spec.decay is not None:  # Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts
            rate = keras.optimizers.schedules.CosineDecay(self.spec.rate, self.steps)  # counts batches
        options: dict[str, Any] = {"global_clipnorm": self.spec.clip}
        if self.spec.accumulate > 1:
            options["gradient_accumulation_steps"] = self.spec.accumulate
        if self.spec.weight_decay:
            optimizer = keras.optimizers.AdamW(rate, weight_decay=self.spec.weight_decay, **options)
            if self.trainer.moved:
                optimizer.exclude_from_weight_decay(var_list=self.trainer.moved)
        else:
            optimizer = keras.optimizers.Adam(rate, **options)
        narrow = any(layer.compute_dtype == "float16" for _, layer in walk(self.model))
        return keras.optimizers.LossScaleOptimizer(optimizer) if narrow else optimizer

    def train_on(self, inputs: Any, targets: Any, where: str) -> float:
        """One step of Keras' training loop; its loss."""
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
        return float(logs["loss"])

    def set_rate(self, rate: float) -> None:
        """Take steps at this learning rate from now on."""
        super().set_rate(rate)
        self.trainer.optimizer.learning_rate = rate

    def snapshot(self) -> list[Any]:
        """Copies of all weights, batch norm's statistics too."""
        return [np.array(to_numpy(weight)) for weight in self.model.weights]

    def restore(self, saved: list[Any]) -> None:
        """Give the weights their values back."""
        for weight, value in zip(self.model.weights, saved, strict=True):
            weight.assign(value)

    def packed(self, saved: list[Any]) -> Any:
        """A snapshot for a file: it is one already."""
        return saved

    def unpacked(self, packed: Any) -> list[Any]:
        """A snapshot from a file."""
        found: list[Any] = packed
        return found

    def state(self) -> dict[str, Any]:
        """All variables: seeds and what the teacher's losses have learned too, and the optimizer's; the backend's numbers."""
        found = {"variables": self._variables(), "optimizer": self._optimizer_variables()}
        plain = {name: [np.array(to_numpy(variable)) for variable in variables] for name, variables in found.items()}
        return plain | {"generator": backend_random_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for variables, saved in ((self._variables(), state["variables"]), (self._optimizer_variables(), state["optimizer"])):
            for variable, value in zip(variables, saved, strict=True):
                variable.assign(value)
        set_backend_random_state(state["generator"])

    def _variables(self) -> list[Any]:
        return list(self.trainer.variables)

    def _optimizer_variables(self) -> list[Any]:
        optimizer = self.trainer.optimizer
        if not optimizer.built:
            optimizer.build(self.trainer.trainable_variables)
        return list(optimizer.variables)


def backend_random_state() -> Any:
    """Where the random numbers of the torch backend stand; others draw from the model's own seeds alone."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    return torch.get_rng_state().numpy()


def set_backend_random_state(state: Any) -> None:
    """Go on with the random numbers of `backend_random_state`."""
    if state is not None:
        import torch

        torch.set_rng_state(torch.from_numpy(state.copy()))


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

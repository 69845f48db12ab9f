"""The loss of one batch: the user's or the default one, alone or beside a teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from whet.data import primary
from whet.errors import DataError, ModelError
from whet.graph.teaching import padding_of
from whet.keras.distill import (
    IGNORED,
    Teacher,
    distillation,
    ends_in_softmax,
    look_like_probabilities,
)
from whet.keras.hearing import HEARD, OUTPUTS, both_heard
from whet.keras.losses import wide
from whet.keras.model import arrange, describe, forward
from whet.keras.namespace import xp
from whet.specs import Train

TARGETS, TEACHER, TEACHER_HEARD, REAL = "targets", "teacher", "teacher_heard", "real"


class Objective:
    """`student_weight · loss(outputs, targets) + (1 - student_weight) · distillation`, or the loss alone without a teacher."""

    def __init__(self, spec: Train, teacher: Teacher | None) -> None:
        self._spec, self._teacher = spec, teacher
        self._weight = 1.0 if spec.distill is None else spec.distill.student_weight
        self._is_normalized = False  # the model ends in a softmax
        self._is_softmax = False  # and does so by a layer, so that the logarithms of its outputs are logits
        self.notes: list[str] = []
        self._classes = 0  # what integer targets may be, once the outputs were seen
        self._shape: tuple[int, ...] = ()  # of the outputs
        self.maps: dict[str, Any] = {}  # what losses on layers train beside the model, as it begins

    def check(self, model: Any, inputs: Any, targets: Any) -> None:
        """Compute the loss once on the first batch of arrays, in inference mode.

        Raises:
            DataError: the model does not take the inputs, or targets are missing or do not fit the outputs.
            ModelError: a teacher that cannot teach, or a loss that is no scalar.
        """
        heard: dict[str, Any] = {}
        outputs: Any = forward(model, inputs)
        if self.hears:
            outputs = forward(self.hearing(model), arrange(model, inputs))
            heard = outputs[HEARD]
        logits = primary(outputs[OUTPUTS] if self.hears else outputs)
        self._shape = tuple(logits.shape)
        if self._teacher is not None and self._weight < 1:
            self._is_softmax = ends_in_softmax(model)
            self.maps = self._teacher.check(logits, heard, inputs, targets, student_ends_in_softmax=self._is_softmax)
            self.notes += self._teacher.notes
            if self._is_softmax:
                self.notes.append("the student ends in a softmax: the logarithms of its outputs are its logits")
        self._is_normalized = self._spec.loss is None and _is_integer(targets) and look_like_probabilities(logits)
        self._check_targets(tuple(logits.shape), targets)
        batch = self.batch(inputs, targets)
        tensors = [keras.tree.map_structure(keras.ops.convert_to_tensor, each) for each in (batch, self.maps)]
        self(outputs, *tensors)

    @property
    def hears(self) -> bool:
        """Whether layers inside the student are compared: it then runs as `hearing(model)`."""
        return self._teacher is not None and self._weight < 1 and self._teacher.hears_student

    def hearing(self, model: Any) -> Any:
        """`model`, or one that runs it and returns what its named layers computed beside its outputs."""
        return self._teacher.hearing(model) if self._teacher is not None and self.hears else model

    def rates(self) -> dict[str, float]:
        """The learning rate of each map by name."""
        rates = {} if self._teacher is None else self._teacher.losses.rates()
        return {name: rates[name.partition("/")[0]] for name in self.maps}

    def _check_targets(self, shape: tuple[int, ...], targets: Any) -> None:
        """Raise `DataError` where the default loss cannot compare outputs of `shape` with `targets`."""
        if self._spec.loss is not None or self._weight == 0:
            return
        if not isinstance(targets, np.ndarray):
            hint = "The batches have no targets" if targets is None else "The default loss takes one array of targets"
            got = "none" if targets is None else describe(targets)
            raise DataError(
                f"{hint} (outputs of shape {shape}, targets {got}). Pass batches of (inputs, targets), a loss of your own as "
                "Train(loss=…), or Distill(student_weight=0) to learn from the teacher alone."
            )
        if not _is_integer(targets):
            if np.prod(shape[1:]) != np.prod(targets.shape[1:]):
                raise DataError(f"Targets of shape {targets.shape} do not fit outputs of shape {shape}.")
            return
        wanted = targets.shape[:-1] if targets.ndim == len(shape) and targets.shape[-1] == 1 else targets.shape
        if len(shape) < 2 or shape[-1] < 2 or shape[:-1] != wanted:
            raise DataError(
                f"Integer targets of shape {targets.shape} need logits of shape (n, classes) with at least two classes, got "
                f"{shape}. For one logit pass Train(loss=…) with a binary cross-entropy, for numbers float targets."
            )
        self._classes = shape[-1]

    def batch(self, inputs: Any, targets: Any) -> dict[str, Any]:
        """What the training step compares the outputs with: the targets and the teacher's outputs, as there are."""
        if self._classes:
            _check_classes(targets, self._classes)
        found = {} if targets is None else {TARGETS: targets}
        if self._teacher is not None and self._weight < 1:
            found[TEACHER], found[TEACHER_HEARD] = self._teacher.outputs(inputs, targets, self._shape[-1])
            padding = padding_of(inputs, (len(found[TEACHER]), *self._shape[1:-1]))
            found |= {} if padding is None else {REAL: padding}
        return found

    def __call__(self, outputs: Any, batch: Mapping[str, Any], maps: Mapping[str, Any] | None = None) -> Any:
        """The scalar loss on tensors; `batch` is what `batch` made. Runs inside the backend's compiled step."""
        total: Any = 0.0
        outputs, heard = (outputs[OUTPUTS], outputs[HEARD]) if self.hears else (outputs, {})
        targets = batch.get(TARGETS)
        if self._weight > 0:
            total = self._weight * self._supervised(outputs, targets)
        if TEACHER in batch and self._spec.distill is not None:
            softmax = (self._is_softmax, self._teacher is not None and self._teacher.ends_in_softmax)
            learned = distillation(
                self._spec.distill,
                primary(outputs),
                batch[TEACHER],
                targets,
                softmax=softmax,
                padding=batch.get(REAL),
                layers=self._layers(both_heard(heard, batch.get(TEACHER_HEARD, {})), maps or {}),
            )
            total = total + (1 - self._weight) * learned
        return total

    def _layers(self, heard: Any, maps: Mapping[str, Any]) -> Any:
        """The losses on layers as a function of both outputs and the real rows; None where there are none."""
        losses = None if self._teacher is None else self._teacher.losses
        if not losses:
            return None
        return lambda outputs, real: losses.total(heard, outputs, maps, xp=xp, real=real)

    def _supervised(self, outputs: Any, targets: Any) -> Any:
        if self._spec.loss is None:
            return default_loss(primary(outputs), targets, is_normalized=self._is_normalized)
        loss = self._spec.loss(outputs, targets)
        shape = getattr(loss, "shape", None)
        if shape is None or tuple(shape) not in ((), (1,)):
            got = f"a {type(loss).__name__}" if shape is None else f"a tensor of shape {tuple(shape)}"
            raise ModelError(f"Train.loss must return a scalar tensor, got {got}. Average it over the batch.")
        return keras.ops.reshape(loss, ())


def default_loss(outputs: Any, targets: Any, *, is_normalized: bool = False) -> Any:
    """Cross-entropy for integer targets (-100 is ignored), else the mean squared error. Computed in float32 at least.

    Shapes: logits (n, …, classes) with targets (n, …) or (n, …, 1); otherwise outputs and targets of one size. With
    `is_normalized` the outputs are probabilities, not logits.
    """
    outputs = wide(outputs)
    if "int" not in keras.backend.standardize_dtype(targets.dtype):
        # Of one shape: (n, 1) beside (n,) would broadcast to (n, n).
        targets = keras.ops.cast(keras.ops.reshape(targets, keras.ops.shape(outputs)), outputs.dtype)
        return keras.ops.mean(keras.ops.square(outputs - targets))
    if len(targets.shape) == len(outputs.shape):
        targets = keras.ops.squeeze(targets, -1)
    real = keras.ops.not_equal(targets, IGNORED)
    labels = keras.ops.where(real, keras.ops.cast(targets, "int32"), 0)
    log = keras.ops.log(keras.ops.maximum(outputs, 1e-7)) if is_normalized else keras.ops.log_softmax(outputs, axis=-1)
    picked = keras.ops.take_along_axis(log, keras.ops.expand_dims(labels, -1), axis=-1)
    weights = keras.ops.cast(real, outputs.dtype)
    count = keras.ops.maximum(keras.ops.sum(weights), 1.0)
    return -keras.ops.sum(keras.ops.squeeze(picked, -1) * weights) / count


def _check_classes(targets: Any, classes: int) -> None:
    real = targets[targets != IGNORED]
    if real.size and (int(real.min()) < 0 or int(real.max()) >= classes):
        raise DataError(
            f"Targets must be classes from 0 to {classes - 1} (the model has {classes} outputs) or -100 (ignored), got "
            f"{int(real.min())} to {int(real.max())}."
        )


def _is_integer(targets: Any) -> bool:
    return isinstance(targets, np.ndarray) and targets.dtype.kind in "iu"

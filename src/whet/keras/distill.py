"""Distillation: a student learns from its teacher's outputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from whet.data import primary
from whet.errors import ModelError
from whet.keras.clone import last_operation
from whet.keras.losses import distillation_loss, wide
from whet.keras.model import forward
from whet.keras.namespace import xp
from whet.keras.views import to_numpy
from whet.numerics.losses_layers import layer_loss
from whet.numerics.losses_table import NEEDS_CLASSES, check_shapes, looks_like_sigmoid, warn_if_swapped
from whet.specs import BinarySoftTargets, Distill, LogitsMSE, Regression
from whet.specs.distillation import Loss

TINY = 1e-30  # a probability below is taken for this: its logarithm stays finite in float32
_ACTIVATED = (keras.layers.Activation, keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D)
_UNHEARD = (
    "{name} of the layer {layer!r} cannot be heard inside Train with a Keras model. Compare layers in your own loop: "
    "whet.keras.with_features(model, names) returns them beside the logits, whet.keras.layer_loss compares them."
)
IGNORED = -100  # targets with this value (padding) count in no loss, as on the PyTorch side


def look_like_probabilities(outputs: Any) -> bool:
    """Whether `outputs` (…, classes) went through a softmax: at least two classes, none negative, rows that sum to 1."""
    dtype = keras.backend.standardize_dtype(outputs.dtype)
    if len(outputs.shape) < 2 or outputs.shape[-1] < 2 or "float" not in dtype:
        return False
    values = to_numpy(outputs).astype(np.float32)
    tolerance = 1e-2 if dtype in ("float16", "bfloat16") else 1e-4
    return bool((values >= 0).all()) and bool((np.abs(values.sum(-1) - 1) < tolerance).all())


def ends_in_softmax(model: Any) -> bool:
    """Whether a softmax over the classes makes the primary output: a layer, an activation or `keras.ops.softmax`.

    Only the layer graph is asked: outputs that merely look like probabilities are not taken for them.
    """
    found = last_operation(model, primary)
    if found is None:
        return False
    operation, rank = found
    if isinstance(operation, _ACTIVATED):
        operation = operation.activation
    if operation is keras.activations.softmax:
        return True
    is_softmax = type(operation).__name__ == "Softmax" and type(operation).__module__.startswith("keras.")
    return is_softmax and operation.axis in (-1, rank - 1)


def log_probabilities(outputs: Any) -> Any:
    """Logits of a softmax's outputs: `log p` is the logits but for one constant per row, which no softmax sees."""
    outputs = wide(outputs)
    return keras.ops.log(keras.ops.maximum(outputs, TINY))


class Teacher:
    """The logits of a teacher. It runs in inference mode, outside the student's training step, and is never changed."""

    def __init__(self, model: Any, student: Any) -> None:
        """Raises `ModelError` if there is no teacher, or if it shares weights with the student."""
        if not isinstance(model, keras.Model):
            raise ModelError(f"Distill needs a teacher, a keras.Model; got {type(model).__name__}.")
        own = {id(weight) for weight in student.weights}
        shared = [weight.path for weight in model.weights if id(weight) in own]
        if shared:
            raise ModelError(
                f"Teacher and student share {shared[0]!r}: training would change the teacher. Pass a copy as student."
            )
        warn_if_swapped(student.count_params(), model.count_params())
        self._model = model
        self.ends_in_softmax = ends_in_softmax(model)

    def outputs(self, inputs: Any) -> Any:
        """Its primary outputs for a batch of arrays, shape (n, …, classes)."""
        return primary(forward(self._model, inputs))

    def check(self, spec: Distill, student: Any, inputs: Any, targets: Any, *, student_ends_in_softmax: bool) -> None:
        """Look at the first batch: `student` are the primary outputs of the student on `inputs`.

        Raises:
            ModelError: probabilities instead of logits, another number of classes, missing labels, or NaN.
        """
        teacher = self.outputs(inputs)
        sides = (("teacher", teacher, self.ends_in_softmax), ("student", student, student_ends_in_softmax))
        named = next((loss for loss in spec.of_layers if loss.student is not None), None)
        if named is not None:
            raise ModelError(_UNHEARD.format(name=type(named).__name__, layer=named.student))
        for loss in spec.of_outputs:
            for whose, outputs, is_softmax in sides:
                _check_logits(loss, whose, outputs, is_softmax)
            labels, _ = labels_of(targets, student)
            check_shapes(loss, student.shape, teacher.shape, None if labels is None else labels.shape)
        if not np.isfinite(to_numpy(teacher)).all():
            raise ModelError("The teacher returned NaN or Inf on the first batch. Check its weights with whet.inspect.")


def _check_logits(loss: Loss, whose: str, outputs: Any, is_softmax: bool) -> None:
    """Raise `ModelError` if `loss` takes logits and `outputs` are probabilities whose logarithms would not do."""
    name = type(loss).__name__
    if is_softmax and isinstance(loss, LogitsMSE | BinarySoftTargets):
        raise ModelError(
            f"The {whose} ends in a softmax, and {name} compares the logits themselves, which cannot be had from "
            f"probabilities. Take the softmax off the end of the {whose}."
        )
    if isinstance(loss, NEEDS_CLASSES) and not is_softmax and look_like_probabilities(outputs):
        raise ModelError(
            f"The outputs of the {whose} are probabilities (no row has a negative value, each sums to 1), and {name} "
            f"takes logits. Take the softmax off the end of the {whose}, let it end in a Softmax layer or "
            "activation (its logarithm serves as logits), or return its logits."
        )
    if isinstance(loss, BinarySoftTargets) and looks_like_sigmoid(to_numpy(outputs)):
        raise ModelError(
            f"The outputs of the {whose} all lie between 0 and 1, as behind a sigmoid, and {name} takes logits. Take the "
            f"sigmoid off the end of the {whose}."
        )


def distillation(
    spec: Distill, student: Any, teacher: Any, targets: Any, *, softmax: tuple[bool, bool] = (False, False)
) -> Any:
    """The weighted sum of the losses in `spec` on one batch of tensors; rows whose target is -100 (padding) do not count.

    `softmax` says whether student and teacher end in one: then the logarithms of their outputs are their logits.
    """
    labels, real = labels_of(targets, student)
    student, teacher = wide(student), wide(teacher)
    logits = [log_probabilities(z) if is_softmax else z for z, is_softmax in zip((student, teacher), softmax, strict=True)]
    total: Any = 0.0
    for relation in spec.of_layers:
        total = total + relation.weight * layer_loss(relation, student, keras.ops.stop_gradient(teacher), xp=xp)
    for loss in spec.of_outputs:
        s, t = (student, teacher) if isinstance(loss, Regression) else logits
        total = total + loss.weight * distillation_loss(loss, s, t, labels, mask=real)
    return total


def labels_of(targets: Any, student: Any) -> tuple[Any, Any]:
    """Integer targets of the rows of `student` (…, classes) and where they are real, not padding; None where there are none."""
    if targets is None or not hasattr(targets, "dtype") or "int" not in keras.backend.standardize_dtype(targets.dtype):
        return None, None
    if len(targets.shape) == len(student.shape) and targets.shape[-1] == 1:
        targets = keras.ops.squeeze(targets, -1)
    if len(targets.shape) != len(student.shape) - 1:
        return None, None
    return targets, keras.ops.not_equal(targets, IGNORED)

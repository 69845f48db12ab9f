"""Distillation: a student learns from its teacher's outputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from whet.data import primary
from whet.errors import ModelError
from whet.keras.clone import last_operation
from whet.keras.model import forward
from whet.keras.namespace import xp
from whet.keras.views import to_numpy
from whet.numerics import losses
from whet.specs import Distill
from whet.specs.base import check_number

TINY = 1e-30  # a probability below is taken for this: its logarithm stays finite in float32
_ACTIVATED = (keras.layers.Activation, keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D)
IGNORED = -100  # targets with this value (padding) count in no loss, as on the PyTorch side


def soft_targets(student_logits: Any, teacher_logits: Any, temperature: float = 4.0) -> Any:
    """`T² · KL(softmax(t/T) ‖ softmax(s/T))` in nats, mean over all axes but the classes (Hinton et al. 2015, eq. 1-4).

    Shapes: both (…, classes); 16-bit logits are computed in float32. No gradient flows to the teacher.

    Raises:
        ModelError: the shapes differ. SpecError: the temperature is not positive.
    """
    check_number("soft_targets temperature", temperature, low=0, high=1e6, open_low=True)
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if len(shapes[0]) != len(shapes[1]) or any(None not in pair and pair[0] != pair[1] for pair in zip(*shapes, strict=True)):
        raise ModelError(
            f"Student and teacher must give logits of one shape, got {shapes[0]} from the student and {shapes[1]} from the "
            "teacher. Do both know the same classes, in the same order?"
        )
    return losses.soft_targets(wide(student_logits), wide(teacher_logits), temperature, xp=xp)


def wide(tensor: Any) -> Any:
    """16-bit floats as float32."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.ops.cast(tensor, "float32") if dtype in ("float16", "bfloat16") else tensor


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
        self._model = model
        self.ends_in_softmax = ends_in_softmax(model)

    def logits(self, inputs: Any) -> Any:
        """Its logits for a batch of arrays, shape (n, …, classes); of a model that ends in a softmax the logarithms."""
        outputs = primary(forward(self._model, inputs))
        return log_probabilities(outputs) if self.ends_in_softmax else outputs

    def check(self, student_logits: Any, inputs: Any) -> None:
        """Look at the first batch.

        Raises:
            ModelError: probabilities instead of logits, another number of classes, or NaN.
        """
        teacher_logits = self.logits(inputs)
        for whose, logits in (("teacher", teacher_logits), ("student", student_logits)):
            if look_like_probabilities(logits):
                raise ModelError(
                    f"The outputs of the {whose} are probabilities (no row has a negative value, each sums to 1), and soft "
                    f"targets take logits. Take the softmax off the end of the {whose}, let it end in a Softmax layer or "
                    "activation (its logarithm serves as logits), or return its logits."
                )
        if len(student_logits.shape) < 2 or student_logits.shape[-1] < 2:
            shape = tuple(student_logits.shape)
            raise ModelError(f"Soft targets need logits of shape (…, classes) with at least two, got {shape}.")
        soft_targets(student_logits, teacher_logits, 1.0)
        if not np.isfinite(to_numpy(teacher_logits)).all():
            raise ModelError("The teacher returned NaN or Inf on the first batch. Check its weights with whet.inspect.")


def distillation_loss(spec: Distill, student_logits: Any, teacher_logits: Any, targets: Any) -> Any:
    """The sum of the losses in `spec` on one batch of tensors; examples whose target is -100 (padding) do not count."""
    student, teacher = wide(student_logits), wide(teacher_logits)
    share: Any = 1.0
    if targets is not None and "int" in keras.backend.standardize_dtype(targets.dtype):
        if len(targets.shape) == len(student.shape) - 1:
            real = keras.ops.not_equal(targets, IGNORED)
            student = keras.ops.where(keras.ops.expand_dims(real, -1), student, teacher)  # a divergence of 0
            weights = keras.ops.cast(real, student.dtype)
            share = keras.ops.maximum(keras.ops.mean(weights), 1e-9)
    return sum(soft_targets(student, teacher, loss.temperature) for loss in spec.loss) / share

"""Distillation: a student learns from its teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from whet.data import primary
from whet.errors import ModelError
from whet.graph.teacher_store import StoredOutputs
from whet.graph.teaching import TINY, check_teachers, notes_of
from whet.keras.clone import last_operation
from whet.keras.hearing import HEARD, OUTPUTS, Hearing, both_heard
from whet.keras.losses import distillation_loss, wide
from whet.keras.model import arrange, copy, forward
from whet.keras.namespace import xp
from whet.keras.views import to_numpy, walk
from whet.numerics.losses_layers import STUDENT, TEACHER, LayerLosses
from whet.numerics.losses_table import NEEDS_CLASSES, are_probabilities, check_shapes, looks_like_sigmoid
from whet.numerics.teachers import joined
from whet.specs import BinarySoftTargets, Distill, LogitsMSE, Regression, TeacherSubsets
from whet.specs.distillation import Loss

_ACTIVATED = (keras.layers.Activation, keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D)
IGNORED = -100  # targets with this value (padding) count in no loss, as on the PyTorch side


def look_like_probabilities(outputs: Any) -> bool:
    """Whether `outputs` (…, classes) went through a softmax: at least two classes, none negative, rows that sum to 1."""
    dtype = keras.backend.standardize_dtype(outputs.dtype)
    return "float" in dtype and are_probabilities(to_numpy(outputs), 1e-2 if dtype in ("float16", "bfloat16") else 1e-4)


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
    """The logits of a teacher, or of several. They run outside the student's training step, and are never changed."""

    def __init__(self, spec: Distill, given: Any, student: Any) -> None:
        """`given`: a model, `StoredOutputs`, or a tuple of them.

        Raises `ModelError` if there is none, if one shares weights with the student, or if a layer's name is unknown.
        """
        sources = given if isinstance(given, tuple) else (given,)
        check_teachers(spec, sources, keras.Model, "a keras.Model", _weights(student), _weights)
        live = next((model for model in sources if isinstance(model, keras.Model)), None)
        self.losses = LayerLosses(spec, *([name for name, _ in walk(model)] if model else [] for model in (student, live)))
        self._spec = spec
        self._sources = [_source(one, spec, self.losses) for one in sources]
        self._are_softmax = [_is_normalized(one) for one in sources]
        self._is_one = len(sources) == 1 and not isinstance(spec.teachers, TeacherSubsets)
        self.ends_in_softmax = self._is_one and self._are_softmax[0]
        self.notes = [*self.losses.notes(), *notes_of(sources)]
        if any(map(ends_in_softmax, (model for model in sources if isinstance(model, keras.Model)))):
            self.notes.append("the teacher ends in a softmax: the logarithms of its outputs are its logits")

    @property
    def hears_student(self) -> bool:
        """Whether layers inside the student are compared."""
        return any(self.losses.heard(STUDENT, attention=kind) for kind in (False, True))

    def hearing(self, student: Any) -> Any:
        """A model that runs the student and returns what its named layers computed beside its outputs."""
        return Hearing(student, self.losses.heard(STUDENT, attention=False), self.losses.heard(STUDENT, attention=True))

    @property
    def is_stored(self) -> bool:
        """Whether outputs are looked up on the host, which no compiler of accelerators takes."""
        return any(isinstance(source, StoredOutputs) for source in self._sources)

    def outputs(
        self, inputs: Any, targets: Any = None, classes: int = 0, *, run: Callable[[Any, Any], Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The primary outputs (n, …, classes) for a batch of arrays, and what was heard of the teacher's layers.

        Several teachers' are joined into one by the spec, for a student of `classes`. run: how a source is run, by default
        on its own; `run_inside` is for a step that is being compiled.
        """
        found = [(run or _run)(source, inputs) for source in self._sources]
        if self._is_one:
            return found[0]
        logits = [
            log_probabilities(one) if is_softmax else wide(one)
            for (one, _), is_softmax in zip(found, self._are_softmax, strict=True)
        ]
        labels, _ = labels_of(targets, logits[0])
        return joined(self._spec.teachers, logits, labels, classes=classes, xp=xp), {}

    def check(self, student: Any, heard: Any, inputs: Any, targets: Any, *, student_ends_in_softmax: bool) -> dict[str, Any]:
        """Look at the first batch: `student` are the primary outputs of the student on `inputs`, `heard` its layers'.

        The maps that losses train, as they begin.

        Raises:
            ModelError: probabilities instead of logits, another number of classes, missing labels, NaN, or a silent layer.
        """
        for source, is_softmax in zip(self._sources, self._are_softmax, strict=True):
            found, _ = _run(source, inputs)
            if not np.isfinite(to_numpy(found)).all():
                raise ModelError("The teacher returned NaN or Inf on the first batch. Check its weights with whet.inspect.")
            if not isinstance(source, StoredOutputs):
                for loss in self._spec.of_outputs:
                    _check_logits(loss, "teacher", found, is_softmax)
        teacher, its = self.outputs(inputs, targets, student.shape[-1])
        for loss in self._spec.of_outputs:
            _check_logits(loss, "student", student, student_ends_in_softmax)
            labels, _ = labels_of(targets, student)
            check_shapes(loss, student.shape, teacher.shape, None if labels is None else labels.shape)
        both, outputs = both_heard(heard, its), (wide(student), wide(teacher))
        maps: dict[str, Any] = self.losses.maps(both, outputs)
        self.losses.total(both, outputs, keras.tree.map_structure(keras.ops.convert_to_tensor, maps), xp=xp)
        return maps


def _weights(model: Any) -> dict[str, Any]:
    return {weight.path: weight for weight in model.weights}


def _is_normalized(source: Any) -> bool:
    return source.is_normalized if isinstance(source, StoredOutputs) else ends_in_softmax(source)


def _source(given: Any, spec: Distill, losses: LayerLosses) -> Any:
    """Stored outputs, or a model that says what its named layers compute; a copy where it would change."""
    if isinstance(given, StoredOutputs):
        return given
    names = (losses.heard(TEACHER, attention=False), losses.heard(TEACHER, attention=True))
    if not any(names) and not spec.teacher_training:
        return given
    return Hearing(copy(given) if spec.teacher_training else given, *names, training=spec.teacher_training)


def _run(source: Any, inputs: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(source, StoredOutputs):
        return keras.ops.convert_to_tensor(source.outputs(inputs)), {}
    if not isinstance(source, Hearing):
        return primary(forward(source, inputs)), {}
    found = forward(source, arrange(source.inner, inputs))
    return primary(found[OUTPUTS]), found[HEARD]


def run_inside(source: Any, inputs: Any) -> tuple[Any, dict[str, Any]]:
    """The outputs of a teacher inside a training step that may be traced, and what was heard of its layers."""
    if isinstance(source, StoredOutputs):
        return looked_up(source.outputs, keras.tree.flatten(inputs), source.shape), {}
    found = source(inputs, training=False)
    return (primary(found[OUTPUTS]), found[HEARD]) if isinstance(source, Hearing) else (primary(found), {})


def looked_up(function: Callable[[Any], Any], arrays: list[Any], shape: tuple[int, ...]) -> Any:
    """`function(arrays)` as a tensor (n, *shape) of float32, computed on the host in the middle of a compiled step."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        found = tf.numpy_function(lambda *given: function(list(given)), arrays, tf.float32)
        found.set_shape((arrays[0].shape[0], *shape))
        return found
    if backend == "jax":
        import jax

        wanted = jax.ShapeDtypeStruct((arrays[0].shape[0], *shape), "float32")
        return jax.pure_callback(lambda *given: function([np.asarray(one) for one in given]), wanted, *arrays)
    return keras.ops.convert_to_tensor(function([to_numpy(one) for one in arrays]))


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
    spec: Distill,
    student: Any,
    teacher: Any,
    targets: Any,
    *,
    softmax: tuple[bool, bool] = (False, False),
    padding: Any = None,
    layers: Callable[[tuple[Any, Any], Any], Any] | None = None,
) -> Any:
    """The weighted sum of the losses in `spec` on one batch of tensors; rows whose target is -100 (padding) do not count.

    `softmax` says whether student and teacher end in one: then the logarithms of their outputs are their logits. `padding`:
    the rows that are none, where targets do not say so. layers: the losses on layers, of both outputs and the real rows.
    """
    labels, real = labels_of(targets, student)
    real = padding if real is None else real
    student, teacher = wide(student), keras.ops.stop_gradient(wide(teacher))
    logits = [log_probabilities(z) if is_softmax else z for z, is_softmax in zip((student, teacher), softmax, strict=True)]
    total: Any = 0.0 if layers is None else layers((student, teacher), real)
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

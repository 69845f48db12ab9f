"""What teachers add to a loss inside the user's own `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from whet.data import primary, split, to_numpy
from whet.errors import SpecError
from whet.graph.teaching import mask_among
from whet.keras.distill import Teacher, distillation, ends_in_softmax, run_inside
from whet.keras.hearing import HEARD, OUTPUTS, both_heard
from whet.keras.model import arrange, forward
from whet.keras.namespace import xp
from whet.numerics.losses_layers import STUDENT
from whet.specs import Distill


class Lessons:
    """The teachers of one student: looked at once on an example, then heard in every compiled training step."""

    def __init__(self, spec: Distill, given: Any, student: Any, example: Any = None) -> None:
        """given: models, `StoredOutputs`, or a list of them. example: a batch (inputs, targets); see `_example`.

        Raises:
            ModelError: a teacher that cannot teach. SpecError: an example is needed.
        """
        listed = tuple(given) if isinstance(given, tuple | list) else (given,)
        self.spec = spec
        self.teacher = Teacher(spec, tuple(getattr(one, "float_model", one) for one in listed), student)
        self.heard = [self.teacher.losses.heard(STUDENT, attention=kind) for kind in (False, True)]
        self.found: dict[str, Any] = {}  # what the student's layers computed in the pass that is being traced
        self._is_softmax = ends_in_softmax(student)
        self.maps: dict[str, Any] = self._begin(student, example)
        every = self.teacher.losses.rates()
        self.rates = {name: every[name.partition("/")[0]] for name in self.maps}

    def _begin(self, student: Any, example: Any) -> dict[str, Any]:
        """Look at the example; the maps that losses train, as they begin."""
        if example is None and self.teacher.is_stored:
            if any(loss.student is None for loss in self.spec.of_layers):
                raise SpecError("Losses on layers with stored outputs need example=, a batch of the stored inputs and targets.")
            return {}
        inputs, targets = _example(student) if example is None else split(example)
        inputs, targets = to_numpy(inputs, "inputs of the example"), to_numpy(targets, "targets of the example")
        found: Any = forward(student, inputs)
        heard: dict[str, Any] = {}
        if any(self.heard):
            both = forward(self.teacher.hearing(student), arrange(student, inputs))
            found, heard = both[OUTPUTS], both[HEARD]
        outputs = primary(found)
        if example is None:
            targets = np.zeros(tuple(outputs.shape)[:-1], "int32")
        return self.teacher.check(outputs, heard, inputs, targets, student_ends_in_softmax=self._is_softmax)

    def extra(self, inputs: Any, targets: Any, outputs: Any, heard: Mapping[str, Any], maps: Mapping[str, Any]) -> Any:
        """The weighted sum of the losses of the spec on one batch, inside a step that may be traced.

        heard: what the student's layers computed; maps: the trained ones, by name. No gradient flows to the teachers.

        Raises:
            SpecError: layers are compared on several replicas of a TensorFlow strategy, whose traces take turns.
        """
        if any(self.heard) and _replicas() > 1:
            raise SpecError(
                "Layers inside the student are not heard under a TensorFlow strategy of several replicas. Take losses on "
                "outputs there, or the JAX backend with keras.distribution.DataParallel."
            )
        outputs = primary(outputs)
        labels = targets if hasattr(targets, "dtype") else None
        taught, its = self.teacher.outputs(inputs, labels, outputs.shape[-1], run=run_inside)
        mask = mask_among(inputs, tuple(outputs.shape[:-1]))
        losses = self.teacher.losses
        both = both_heard(heard, keras.tree.map_structure(keras.ops.stop_gradient, its))
        return distillation(
            self.spec,
            outputs,
            taught,
            labels,
            softmax=(self._is_softmax, self.teacher.ends_in_softmax),
            padding=None if mask is None else keras.ops.not_equal(mask, 0),
            layers=(lambda pair, real: losses.total(both, pair, maps, xp=xp, real=real)) if losses else None,
        )

    def joint(self, own: Any, regularization: Any, extra: Any) -> Any:
        """`student_weight · own + (1 - student_weight) · extra`, where `own` holds regularization, which counts in full.

        A strategy of TensorFlow's adds up what its replicas return, each of which has seen its part of the batch.
        """
        weight = self.spec.student_weight
        extra = keras.ops.cast(extra, own.dtype) / _replicas()
        kept = sum(
            (keras.ops.sum(keras.ops.cast(one, own.dtype)) for one in regularization), start=keras.ops.zeros((), own.dtype)
        )
        return weight * own + (1 - weight) * (extra + kept / _replicas())


def _replicas() -> int:
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def _example(model: Any) -> tuple[Any, None]:
    """A batch of ones in the shapes that a Functional or Sequential model declares.

    Raises:
        SpecError: it declares none.
    """
    declared = getattr(model, "inputs", None)
    if not declared or any(size is None for tensor in declared for size in tensor.shape[1:]):
        raise SpecError(
            f"{type(model).__name__} declares no shapes of its inputs, and teachers are looked at before they teach. Pass "
            "example=, a batch of inputs and targets."
        )
    arrays = [np.ones((4, *tensor.shape[1:]), keras.backend.standardize_dtype(tensor.dtype)) for tensor in declared]
    return (arrays[0] if len(arrays) == 1 else tuple(arrays)), None


def refuse_maps(lessons: Lessons) -> None:
    """Raise `SpecError` where a loss trains linear maps of its own."""
    if lessons.maps:
        loss = lessons.spec.of_layers[int(next(iter(lessons.maps)).partition(".")[0])]
        raise SpecError(
            f"{type(loss).__name__} trains a linear map beside the model here, and a callback cannot add weights to a compiled "
            "model. Use whet.keras.Distiller(student, teacher, spec), which is compiled and fitted like any model."
        )


def may_compile(wanted: Any) -> Any:
    """`jit_compile` for a step that looks stored outputs up: on TensorFlow XLA cannot ask the host."""
    return False if keras.backend.backend() == "tensorflow" else wanted

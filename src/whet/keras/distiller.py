"""A student and its teachers as one model for the user's own `compile` and `fit`."""

from __future__ import annotations

from typing import Any

import keras

from whet.keras.hearing import listening
from whet.keras.lessons import Lessons, may_compile
from whet.specs import Distill


class Distiller(keras.Model):  # type: ignore[misc]
    """The student, *trained in place* by `fit`; teachers add their losses, also those that train maps of their own.

    ```python
    distiller = whet.keras.Distiller(student, teacher, Distill([SoftTargets(4.0), Features("conv2", "conv4")]))
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    distiller.fit(x, y, epochs=10)
    student.save("student.keras")
    ```
    Its outputs, metrics and validation are the student's; `loss` in training is `student_weight` times the compiled loss and
    the teachers'. Maps are weights of this model, trained by its optimizer at that one's learning rate. `PruningCallback` and
    `EarlyStoppingCallback` know it. With `student_weight=0` it may be compiled without a loss.
    """

    def __init__(self, student: Any, teacher: Any, spec: Distill | None = None, *, example: Any = None) -> None:
        """teacher: a `keras.Model` that takes what the student takes, `StoredOutputs`, or a list of them.

        example: a batch (inputs, targets) on which they are looked at, where the student declares no shapes of its inputs.

        Raises:
            ModelError: there is no teacher, it shares weights with the student, or it cannot teach.
            SpecError: an example is needed.
        """
        super().__init__(autocast=False, name=f"{student.name}_distiller")
        self.student = student
        self.lessons = Lessons(Distill() if spec is None else spec, teacher, student, example)
        self._maps = {
            name: self.add_weight(shape=begun.shape, initializer=_as_is(begun), name=name.replace("/", "_").replace(".", "_"))
            for name, begun in self.lessons.maps.items()
        }
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's own outputs."""
        with listening(self.student, *self.lessons.heard) as heard:
            outputs = self.student(inputs, training=training)
        self.lessons.found = dict(heard)
        return outputs

    def compile(self, *args: Any, jit_compile: Any = "auto", **options: Any) -> None:
        """As of any Keras model."""
        is_stored = self.lessons.teacher.is_stored
        super().compile(*args, jit_compile=may_compile(jit_compile) if is_stored else jit_compile, **options)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The joint loss in training; in validation the compiled one alone."""
        found, self.lessons.found = self.lessons.found, {}
        if self._compile_loss is None and self.lessons.spec.student_weight == 0:
            own: Any = sum(map(keras.ops.sum, self.losses), start=keras.ops.zeros(()))
        else:
            own = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return own
        maps = {name: keras.ops.convert_to_tensor(weight) for name, weight in self._maps.items()}
        return self.lessons.joint(own, self.losses, self.lessons.extra(x, y, y_pred, found, maps))


def _as_is(array: Any) -> Any:
    return lambda shape, dtype=None: keras.ops.convert_to_tensor(array, dtype)


def student_of(model: Any) -> Any:
    """The model that `fit` trains: of a `Distiller` its student."""
    return model.student if isinstance(model, Distiller) else model

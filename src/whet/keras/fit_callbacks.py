"""A teacher, and early stopping that knows of ramps, inside the user's own `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import keras

from whet.errors import ModelError
from whet.graph.watching import Watch
from whet.keras.distiller import student_of
from whet.keras.hearing import listening
from whet.keras.lessons import Lessons, may_compile, refuse_maps
from whet.specs import Distill, EarlyStopping


class DistillationCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Teachers in `model.fit`: the loss becomes `student_weight` times the compiled one and the teachers'.

    ```python
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=10, callbacks=[DistillationCallback(Distill([SoftTargets(4.0)]), teacher)])
    ```
    Teachers run inside the compiled training step, in inference mode, on what the model is given; they are not changed. `loss`
    in the logs is the joint one; what validation computes is the compiled loss alone. When training ends the model is as it
    was. Losses on layers inside compare what both compute; those that train maps of their own (`CRD`, and `Features` of
    layers whose channels differ) need `Distiller`.
    """

    def __init__(self, spec: Distill, teacher: Any, *, example: Any = None) -> None:
        """teacher: a `keras.Model` that takes what the student takes, `StoredOutputs`, or a list of them.

        example: a batch (inputs, targets) on which they are looked at before they teach, where the model declares no shapes.
        """
        super().__init__()
        self._spec, self._teacher, self._example = spec, teacher, example
        self._is_heard = False
        self._undo: ExitStack | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Let the teachers into the loss.

        Raises:
            ModelError: there is no teacher, it shares weights with the student, or it cannot teach.
            SpecError: a loss trains maps of its own, or an example is needed.
        """
        self._leave()
        model, self._is_heard = self.model, False
        lessons = Lessons(self._spec, self._teacher, model, self._example)
        refuse_maps(lessons)
        own, undo = model.compute_loss, ExitStack()
        heard = undo.enter_context(listening(model, *lessons.heard))

        def compute_loss(x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **options: Any) -> Any:
            loss, found = own(x, y, y_pred, sample_weight, **options), dict(heard)
            heard.clear()
            if not options.get("training", True):
                return loss
            self._is_heard = True
            return lessons.joint(loss, model.losses, lessons.extra(x, y, y_pred, found, {}))

        object.__setattr__(model, "compute_loss", compute_loss)
        undo.callback(object.__delattr__, model, "compute_loss")
        undo.callback(setattr, model, "train_function", None)
        if lessons.teacher.is_stored:
            undo.callback(setattr, model, "jit_compile", model.jit_compile)
            model.jit_compile = may_compile(model.jit_compile)
        self._undo = undo
        model.make_train_function(force=True)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """After the first step the teacher must have been asked.

        Raises:
            ModelError: the model's `train_step` computes its loss in another way.
        """
        if not self._is_heard:
            self._leave()
            raise ModelError(
                f"A step was taken and {type(self.model).__name__} did not call compute_loss: its train_step has a loss of its "
                "own. Add whet.keras.distillation_loss(…) there, or call self.compute_loss."
            )

    def on_train_end(self, logs: Any = None) -> None:
        """Leave the model as it was."""
        self._leave()

    def _leave(self) -> None:
        if self._undo is not None:
            self._undo.close()
            self._undo = None


class EarlyStoppingCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """`EarlyStopping` in `model.fit`, aware of the recipe; the best weights come back.

    Nothing is best and no patience begins before the ramp of `after`, a `PruningCallback`, is done, and before the quantizers
    of a model that `prepare` made have observed their ranges. Put it before the `PruningCallback`.
    """

    def __init__(
        self, spec: EarlyStopping, *, monitor: str = "val_loss", higher_is_better: bool = False, after: Any = None
    ) -> None:
        """monitor: the name in the logs of an epoch. after: what has `is_done`, to be waited for."""
        super().__init__()
        self._spec, self._monitor, self._higher, self._after = spec, monitor, higher_is_better, after
        self._state: Mapping[str, Any] | None = None
        self._watch = Watch(spec, monitor, higher_is_better)
        self._steps = self._settled = self._batch = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin anew, or where a state was taken."""
        self._watch = Watch(self._spec, self._monitor, self._higher)
        prepared = getattr(student_of(self.model), "_whet", None)
        self._settled = 0 if prepared is None else max((group.observe for group in prepared.groups.values()), default=0)
        self._steps = 0
        if self._state is not None:
            self._watch.load_state_dict(self._state)
            self._steps, self._state = self._state["steps"], None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count this epoch's batches from here."""
        self._batch = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count; with `steps_per_execution`, `batch` is the last one that ran."""
        self._steps += 1 + batch - self._batch
        self._batch = batch + 1

    @property
    def is_eligible(self) -> bool:
        """Whether epochs may be compared now."""
        return self._steps >= self._settled and (self._after is None or self._after.is_done)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Decide whether to go on.

        Raises:
            MetricError: `monitor` is not in the logs.
        """
        if self._watch.see(logs or {}, self.is_eligible, self._weights).stop:
            self.model.stop_training = True

    def _weights(self) -> Any:
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        return self.model.get_weights()

    def on_train_end(self, logs: Any = None) -> None:
        """Give the best weights back."""
        if self._watch.best is not None:
            self.model.set_weights(self._watch.best)

    @property
    def best_epoch(self) -> int | None:
        """The best epoch, counted from 0; None before there is one."""
        return self._watch.state.best_epoch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in plain values and NumPy arrays."""
        return {"steps": self._steps, **self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next `fit` goes on where `state` was taken."""
        self._state = state

"""Pruning inside the user's own `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from whet.data import Batches
from whet.errors import SpecError
from whet.graph.views import Masks
from whet.keras.distiller import student_of
from whet.keras.fit_callbacks import DistillationCallback, EarlyStoppingCallback
from whet.keras.prune import Masker
from whet.numerics.schedules import Ramp, lay
from whet.specs import OneShot, Prune, from_dict, to_dict

__all__ = ["DistillationCallback", "EarlyStoppingCallback", "PruningCallback"]


class PruningCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Prune while `model.fit` trains: masks follow the schedule, are held after every batch, and stay in the weights.

    ```python
    model.fit(x, y, epochs=10, callbacks=[EarlyStopping(...), PruningCallback(Prune(0.8, schedule=Cubic()))])
    ```
    Put it last: a callback that restores weights when training ends would bring removed weights back after it. The
    schedule spans `epochs` × batches per epoch; where Keras cannot know these (a generator without a length), pass
    `steps`, all training steps. With `initial_epoch` the schedule goes on from there; `state_dict()` and `load_state_dict()`
    resume anywhere, also in the middle of an epoch.
    """

    def __init__(self, spec: Prune, *, steps: int | None = None, data: Any = None) -> None:
        """data: batches of (inputs, targets) for criteria that look at some, and for `RigL`, anew when masks are renewed."""
        super().__init__()
        self._spec, self._steps = spec, steps
        self._data = None if data is None else Batches(data, "data")
        self._masker: Masker | None = None
        self._ramp: Ramp | None = None
        self._state: Mapping[str, Any] | None = None  # to go on from
        self._steps_laid = 0  # what the schedule is laid on
        self._step = 0  # steps done
        self._batch = 0  # batches of this epoch that are done
        self._renewed = -1  # the step for which the masks were looked at last

    def on_train_begin(self, logs: Any = None) -> None:
        """Lay the schedule on this training.

        Raises:
            SpecError: the number of steps is unknown, or too small for the schedule.
            ModelError: nothing would be pruned.
        """
        state, self._state = self._state, None
        self._steps_laid = int(state["steps"]) if state is not None else self._all_steps()
        self._ramp = lay(self._spec, self._steps_laid)
        self._sync()
        masks = self._masker.masks() if self._masker is not None else {}
        self._masker = Masker(student_of(self.model), self._spec, masks, self._data)
        self._step, self._renewed = 0, -1
        if state is not None:
            self._masker.restore(state)
            self._step, self._renewed = int(state["step"]), int(state["renewed"])

    def _all_steps(self) -> int:
        if self._steps is not None:
            return self._steps
        if not self.params.get("steps") and not isinstance(self._spec.schedule, OneShot):
            raise SpecError(
                "The number of batches per epoch is unknown, so the pruning schedule cannot be laid on the training. "
                "Pass PruningCallback(…, steps=epochs * batches) or fit(…, steps_per_epoch=…)."
            )
        return int(self.params["epochs"] * (self.params.get("steps") or 1))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """The first epoch may not be epoch 0."""
        per_epoch = self.params.get("steps")
        if per_epoch and self._step == 0:
            self._step = epoch * per_epoch
        self._batch = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Renew the masks where the schedule says so; the first batch always does, wherever training began."""
        if self._masker is None or self._ramp is None:
            return
        ramp, first, passed = self._ramp, self._renewed < 0, range(self._renewed + 1, self._step + 1)
        moves = [] if first else [(step, ramp.drop_fraction(step)) for step in passed if ramp.drop_fraction(step)]
        if (first and self._step >= ramp.begin) or any(ramp.renews(step) for step in passed):
            self._sync()
            if not (self._masker.sparsity and isinstance(self._spec.schedule, OneShot)):
                self._masker.renew(ramp.sparsity(self._step))
        for step, fraction in moves:
            self._sync()
            self._masker.optimizer = self.model.optimizer
            self._masker.regrow(fraction, step)
        self._renewed = self._step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Set removed weights to zero again. With `steps_per_execution`, `batch` is the last one that ran."""
        if self._masker is None:
            return
        self._step += 1 + batch - self._batch
        self._batch = batch + 1
        self._sync()
        self._masker.observe()
        self._masker.hold()

    def on_train_end(self, logs: Any = None) -> None:
        """Bake the masks in, also into weights that another callback has restored by now."""
        if self._masker is not None:
            self._sync()
            self._masker.hold()

    def _sync(self) -> None:
        """On JAX, training keeps the weights outside the model between batches."""
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, in plain values and NumPy arrays; save it with the weights.

        Raises:
            SpecError: training has not begun.
        """
        if self._masker is None:
            raise SpecError("PruningCallback has no state before fit() has begun.")
        done = {"step": self._step, "renewed": self._renewed}
        return {"spec": to_dict(self._spec), "steps": self._steps_laid, **done, **self._masker.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next `fit` goes on where `state` was taken, over as many steps as were meant; you load weights and optimizer.

        Raises:
            SpecError: `state` belongs to another spec or number of steps.
        """
        steps = state["steps"] if self._steps is None else self._steps
        if from_dict(state["spec"]) != self._spec or state["steps"] != steps:
            raise SpecError(
                f"This state belongs to {from_dict(state['spec'])} over {state['steps']} steps, "
                f"but the PruningCallback was made with {self._spec} over {steps}. Make it with the same."
            )
        self._state = state

    @property
    def masks(self) -> Masks:
        """The masks by kernel name: 1 where kept."""
        return self._masker.masks() if self._masker is not None else {}

    @property
    def sparsity(self) -> float:
        """The fraction removed now, of the weights that are pruned."""
        return self._masker.sparsity if self._masker is not None else 0.0

    @property
    def is_done(self) -> bool:
        """Whether the final sparsity is in force: only then compare epochs, or begin early stopping's patience."""
        return self._ramp is not None and self._ramp.is_done(self._step)

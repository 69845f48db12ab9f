"""Pruning inside the user's own `fit`."""

from __future__ import annotations

from typing import Any

import keras

from whet.errors import SpecError
from whet.graph.views import Masks
from whet.keras.prune import Masker
from whet.numerics.schedules import Ramp, lay
from whet.specs import OneShot, Prune


class PruningCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Prune while `model.fit` trains: masks follow the schedule, are held after every batch, and stay in the weights.

    ```python
    model.fit(x, y, epochs=10, callbacks=[EarlyStopping(...), PruningCallback(Prune(0.8, schedule=Cubic()))])
    ```
    Put it last: a callback that restores weights when training ends would bring removed weights back after it. The
    schedule spans `epochs` × batches per epoch; where Keras cannot know these (a generator without a length), pass
    `steps`, all training steps. With `initial_epoch` the schedule goes on from there.
    """

    def __init__(self, spec: Prune, *, steps: int | None = None) -> None:
        super().__init__()
        self._spec, self._steps = spec, steps
        self._masker: Masker | None = None
        self._ramp: Ramp | None = None
        self._step = 0  # steps done
        self._renewed = -1  # the step for which the masks were looked at last

    def on_train_begin(self, logs: Any = None) -> None:
        """Lay the schedule on this training.

        Raises:
            SpecError: the number of steps is unknown, or too small for the schedule.
            ModelError: nothing would be pruned.
        """
        steps = self._steps
        if steps is None:
            if not self.params.get("steps") and not isinstance(self._spec.schedule, OneShot):
                raise SpecError(
                    "The number of batches per epoch is unknown, so the pruning schedule cannot be laid on the training. "
                    "Pass PruningCallback(…, steps=epochs * batches) or fit(…, steps_per_epoch=…)."
                )
            steps = self.params["epochs"] * (self.params.get("steps") or 1)
        self._ramp = lay(self._spec, steps)
        self._sync()
        self._masker = Masker(self.model, self._spec, self._masker.masks() if self._masker is not None else {})
        self._step, self._renewed = 0, -1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """The first epoch may not be epoch 0."""
        per_epoch = self.params.get("steps")
        if per_epoch and self._step == 0:
            self._step = epoch * per_epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Renew the masks where the schedule says so; the first batch always does, wherever training began."""
        if self._masker is None or self._ramp is None:
            return
        ramp, first = self._ramp, self._renewed < 0
        due = any(ramp.renews(step) for step in range(self._renewed + 1, self._step + 1))
        if (first and self._step >= ramp.begin) or due:
            self._sync()
            if not (self._masker.sparsity and isinstance(self._spec.schedule, OneShot)):
                self._masker.renew(ramp.sparsity(self._step))
        self._renewed = self._step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Set removed weights to zero again. With `steps_per_execution`, `batch` is the last one that ran."""
        if self._masker is None:
            return
        self._step += 1 + batch - self._batch(batch)
        self._sync()
        self._masker.hold()

    def _batch(self, batch: int) -> int:
        """The batch of this epoch that was expected to end now."""
        per_epoch = self.params.get("steps")
        return self._step % per_epoch if per_epoch else batch

    def on_train_end(self, logs: Any = None) -> None:
        """Bake the masks in, also into weights that another callback has restored by now."""
        if self._masker is not None:
            self._sync()
            self._masker.hold()

    def _sync(self) -> None:
        """On JAX, training keeps the weights outside the model between batches."""
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()

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

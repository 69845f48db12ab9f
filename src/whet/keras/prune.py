"""Pruning of single weights: one-shot, inside training, and in the user's own loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from whet.data import Batches
from whet.graph.masking import Masker as _Masker
from whet.graph.masking import check_one_shot
from whet.graph.scheduling import ScheduledPruner
from whet.graph.views import Masks
from whet.keras.importance import gradients_for, statistics_for
from whet.keras.inputs import InputReader
from whet.keras.optimizers import forget
from whet.keras.views import Kernel, kernels, to_numpy, unpruned, walk
from whet.numerics.namespace import numpy_namespace as xp
from whet.records import Step
from whet.specs import Prune


def prune(model: Any, spec: Prune, *, masks: Masks, data: Batches | None = None) -> tuple[Masks, Step]:
    """*In place*: zero the least important weights at once. Weights masked before stay masked and count as removed.

    Raises:
        SpecError: the schedule needs training, or the criterion data.
        ModelError: nothing would change.
    """
    check_one_shot(spec)
    started = time.perf_counter()
    masker = Masker(model, spec, masks, data)
    masker.renew(spec.fraction)
    return masker.masks(), masker.step(spec, started)


def adopt(model: Any) -> Masks:
    """The masks that another tool has put on `model`: none, since no tool puts any on Keras 3 models."""
    return {}


class Masker(_Masker):
    """Masks on the kernels of a model: renewed by their scores, held after every optimizer step.

    A layer used twice has one kernel and one mask. Masks are in Keras' own layout, (…, in, out).
    """

    noun, xp = "kernel", xp

    def _read(self, model: Any) -> None:
        self._kernels = {kernel.name: kernel for kernel in kernels(model)}
        self._tensors: dict[str, Any] = {}  # what is removed, on the backend

    def _prunable(self, model: Any) -> tuple[Sequence[Kernel], Sequence[tuple[str, str]], Sequence[str]]:
        return list(self._kernels.values()), unpruned(model), [path for path, _ in walk(model)] + list(self._kernels)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._kernels[name].variable.shape) if name in self._kernels else None

    def _values(self, name: str) -> Any:
        return to_numpy(self._kernels[name].variable).astype(np.float32)

    def _is_zero(self, name: str, mask: Any) -> Any:
        return np.asarray(mask) == 0

    def _set(self, name: str, removed: Any) -> None:
        super()._set(name, removed)
        self._tensors[name] = keras.ops.convert_to_tensor(removed, dtype="bool")

    def _floats(self, name: str) -> Any:
        return np.array(to_numpy(self._kernels[name].variable), np.float32)

    def _put(self, array: Any, name: str) -> Any:
        return array

    def _host(self, array: Any) -> Any:
        return array

    def _statistics(self, criterion: Any) -> dict[str, Any]:
        return statistics_for(self._model, criterion, self._data, self._loss)

    def _gradients(self, seed: int) -> dict[str, Any]:
        return {} if self._data is None else gradients_for(self._model, self._data, 1, loss=self._loss, seed=seed)

    def _reader(self, data: Batches, batches: int) -> InputReader:
        return InputReader(self._model, data, batches)

    def hold(self) -> None:
        """Set removed weights to zero again. Chosen, not multiplied: -1 · 0 is -0, which does not compress."""
        for name in self._removed:
            variable = self._kernels[name].variable
            variable.assign(keras.ops.where(self._tensors[name], keras.ops.zeros_like(variable.value), variable.value))

    def _forget(self, name: str, grown: Any) -> None:
        forget(self.optimizer, self._kernels[name].variable, grown)

    def masks(self) -> Masks:
        """The masks by kernel name: 1 where kept."""
        return {name: (~removed).astype(np.uint8) for name, removed in self._removed.items()}


class Pruner(ScheduledPruner):
    """Pruning in your own training loop. The first masks are set at once; then call `step()` after every training step.

    ```python
    pruner = whet.keras.Pruner(model, Prune(0.8, schedule=Cubic()), steps=epochs * len(batches))
    for x, y in batches:
        model.train_on_batch(x, y)
        pruner.step()
    ```
    The model stays an ordinary model: its removed weights are zeros. `state_dict()` resumes in the middle of a ramp.
    In `fit`, use `PruningCallback`.
    """

    _masker_class = Masker

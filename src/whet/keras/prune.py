"""Pruning of single weights: one-shot, inside training, and in the user's own loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from whet.graph.masking import Masker as _Masker
from whet.graph.masking import ScheduledPruner, check_one_shot
from whet.graph.views import Masks
from whet.keras.views import Kernel, kernels, to_numpy, unpruned, walk
from whet.numerics.criteria import random_scores, weight_importance
from whet.numerics.namespace import numpy_namespace as xp
from whet.records import Step
from whet.specs import Prune, Random


def prune(model: Any, spec: Prune, *, masks: Masks, data: Any = None) -> tuple[Masks, Step]:
    """*In place*: zero the least important weights at once. Weights masked before stay masked and count as removed.

    Raises:
        SpecError: the schedule needs training.
        ModelError: nothing would change.
    """
    check_one_shot(spec)
    started = time.perf_counter()
    masker = Masker(model, spec, masks)
    masker.renew(spec.fraction)
    return masker.masks(), masker.step(spec, started)


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

    def _scores(self, weight: Kernel, index: int, criterion: Any) -> Any:
        values = self._values(weight.name)
        if isinstance(criterion, Random):
            scores = random_scores(criterion.seed, index, values.shape).astype(np.float32)
        else:
            scores = weight_importance(criterion, values, None, xp=xp)
        old = self._gone(weight.name)
        return scores if old is None else np.where(old, np.float32(-np.inf), scores)

    def hold(self) -> None:
        """Set removed weights to zero again. Chosen, not multiplied: -1 · 0 is -0, which does not compress."""
        for name in self._removed:
            variable = self._kernels[name].variable
            variable.assign(keras.ops.where(self._tensors[name], keras.ops.zeros_like(variable), variable))

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

"""Magnitude pruning of single weights: one-shot, inside training, and in the user's own loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from whet.errors import ModelError, SpecError
from whet.graph.placement import selected, unmatched
from whet.graph.views import Masks
from whet.keras.views import Kernel, kernels, to_numpy, unpruned, walk
from whet.numerics.criteria import random_scores, weight_importance
from whet.numerics.histograms import Histogram, histogram
from whet.numerics.masks import most_removed, patterned, unfit
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.schedules import Ramp, lay
from whet.records import Step
from whet.specs import OneShot, Prune, Random, from_dict, to_dict
from whet.specs.base import check_integer


def prune(model: Any, spec: Prune, *, masks: Masks, data: Any = None) -> tuple[Masks, Step]:
    """*In place*: zero the least important weights at once. Weights masked before stay masked and count as removed.

    Raises:
        SpecError: the schedule needs training.
        ModelError: nothing would change.
    """
    if not isinstance(spec.schedule, OneShot):
        raise SpecError("A Cubic schedule needs training: write Train(apply=[Prune(…, schedule=Cubic())]).")
    started = time.perf_counter()
    masker = Masker(model, spec, masks)
    masker.renew(spec.fraction)
    step = Step(to_dict(spec), masker.changed(), masker.skipped, time.perf_counter() - started, unmatched=masker.unmatched)
    return masker.masks(), step


class Masker:
    """Masks on the kernels of a model: renewed by magnitude, held after every optimizer step.

    A layer used twice has one kernel and one mask. Masks are in Keras' own layout, (…, in, out).
    """

    def __init__(self, model: Any, spec: Prune | None, masks: Mapping[str, Any]) -> None:
        """`masks` are those from before; without a spec they are held and never renewed.

        Raises:
            ModelError: a mask that fits no kernel, or a spec that would change nothing.
        """
        self._kernels = {kernel.name: kernel for kernel in kernels(model)}
        self._removed: dict[str, Any] = {}  # name -> bool array, True where removed
        self._tensors: dict[str, Any] = {}  # the same on the backend
        for name, mask in masks.items():
            self._set(name, self._fit(name, mask))
        self.skipped: tuple[dict[str, str], ...] = ()
        self.unmatched: tuple[str, ...] = ()
        self._spec, self._chosen = spec, tuple[Kernel, ...]()
        self._before: dict[str, Histogram | None] = {}
        if spec is not None:
            self._select(model, spec)
        self.hold()

    def _fit(self, name: str, mask: Any) -> Any:
        kernel, shape = self._kernels.get(name), tuple(np.shape(mask))
        if kernel is None or tuple(kernel.variable.shape) != shape:
            got = "there is no such kernel" if kernel is None else f"the kernel has shape {tuple(kernel.variable.shape)}"
            raise ModelError(f"A mask of shape {shape} is for {name!r}, but {got}. Masks belong to the model they came from.")
        return np.asarray(mask) == 0

    def _set(self, name: str, removed: Any) -> None:
        self._removed[name] = removed
        self._tensors[name] = keras.ops.convert_to_tensor(removed, dtype="bool")

    def _select(self, model: Any, spec: Prune) -> None:
        skipped = unpruned(model)
        chosen = []
        for kernel in self._kernels.values():
            reason = selected(kernel.layer, spec.keep, spec.include, kernel.name)
            if reason is None and np.prod(kernel.variable.shape) < 2:
                reason = "a single weight is never removed"
            if reason is None:
                reason = unfit(tuple(kernel.variable.shape), (kernel.out_axis, kernel.in_axis), spec.granularity)
            if reason is None:
                chosen.append(kernel)
            else:
                skipped.append((kernel.layer, reason))
        self._chosen = tuple(chosen)
        self.skipped = tuple({"name": name, "reason": reason} for name, reason in skipped)
        names = [path for path, _ in walk(model)] + list(self._kernels)
        self.unmatched = tuple(unmatched(dict.fromkeys(names, ()), (*spec.keep, *(spec.include or ()))))
        if not self._chosen:
            self._nothing("")
        sizes = [int(np.prod(kernel.variable.shape)) for kernel in self._chosen]
        gone = [int(self._removed[kernel.name].sum()) if kernel.name in self._removed else 0 for kernel in self._chosen]
        if most_removed(sizes, gone, spec.fraction, spec.allocation, spec.granularity) == 0:
            self._nothing(f"sparsity {spec.fraction:g} is reached already, or removes less than one weight of any layer")
        self._before = {kernel.name: histogram(_array(kernel)) for kernel in chosen}

    def _nothing(self, why: str) -> None:
        reasons = why or "; ".join(f"{row['name']}: {row['reason']}" for row in self.skipped[:8])
        never = f" These patterns match no layer: {', '.join(self.unmatched)}." if self.unmatched else ""
        raise ModelError(
            f"Prune would change nothing in this model ({reasons or 'it has no convolution or dense kernel'}).{never} "
            "Raise sparsity=, or loosen keep= or include=."
        )

    def renew(self, sparsity: float) -> None:
        """Remove the fraction `sparsity` of the chosen weights; what is removed already counts and stays removed."""
        if self._spec is None:
            return
        scores = [self._scores(kernel, i, self._spec.criterion) for i, kernel in enumerate(self._chosen)]
        axes = [(kernel.out_axis, kernel.in_axis) for kernel in self._chosen]
        for kernel, mask in zip(self._chosen, patterned(scores, axes, self._spec, sparsity, xp=xp), strict=True):
            old = self._removed.get(kernel.name)
            self._set(kernel.name, mask == 0 if old is None else (mask == 0) | old)
        self.hold()

    def _scores(self, kernel: Kernel, index: int, criterion: Any) -> Any:
        weight = to_numpy(kernel.variable).astype(np.float32)
        if isinstance(criterion, Random):
            scores = random_scores(criterion.seed, index, weight.shape).astype(np.float32)
        else:
            scores = weight_importance(criterion, weight, None, xp=xp)
        old = self._removed.get(kernel.name)
        return scores if old is None else np.where(old, np.float32(-np.inf), scores)

    def _count(self) -> int:
        return sum(int(removed.sum()) for removed in self._removed.values())

    def hold(self) -> None:
        """Set removed weights to zero again. Chosen, not multiplied: -1 · 0 is -0, which does not compress."""
        for name, removed in self._tensors.items():
            variable = self._kernels[name].variable
            variable.assign(keras.ops.where(removed, keras.ops.zeros_like(variable), variable))

    def reset(self, masks: Mapping[str, Any]) -> None:
        """Hold `masks` in the place of the present ones. Weights that these had removed stay zero until they are loaded."""
        self._removed, self._tensors = {}, {}
        for name, mask in masks.items():
            self._set(name, self._fit(name, mask))
        self.hold()

    def masks(self) -> Masks:
        """The masks by kernel name: 1 where kept."""
        return {name: (~removed).astype(np.uint8) for name, removed in self._removed.items()}

    def changed(self) -> tuple[dict[str, Any], ...]:
        """A row for each masked kernel: `{"name", "parameters", "sparsity", "histogram"}`, the last of kernels pruned here."""
        rows = []
        for name, removed in self._removed.items():
            gone, before = int(removed.sum()), self._before.get(name)
            if gone:
                row = {"name": name, "parameters": removed.size, "sparsity": gone / removed.size}
                drawn = {} if before is None else {"histogram": before.beside(_array(self._kernels[name]))}
                rows.append(row | drawn)
        return tuple(rows)

    @property
    def sparsity(self) -> float:
        """The fraction removed of all weights that have a mask; 0 without masks."""
        size = sum(int(removed.size) for removed in self._removed.values())
        return self._count() / size if size else 0.0


def _array(kernel: Kernel) -> Any:
    return to_numpy(kernel.variable).astype(np.float32)


class Pruner:
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

    def __init__(self, model: Any, spec: Prune, steps: int, *, masks: Masks | None = None) -> None:
        """`steps` is the number of training steps that the schedule is laid on; `masks` are those from before.

        Raises:
            SpecError: the schedule does not fit into `steps`.
            ModelError: nothing would change.
        """
        check_integer("Pruner.steps", steps, low=1)
        self._spec, self._steps = spec, steps
        self._ramp: Ramp = lay(spec, steps)
        self._masker = Masker(model, spec, masks or {})
        self._step = 0
        self._renew()

    def _renew(self) -> None:
        if self._ramp.renews(self._step):
            self._masker.renew(self._ramp.sparsity(self._step))

    def step(self) -> None:
        """One training step was taken: hold the masks, and renew them where the schedule says so."""
        self._step += 1
        self._masker.hold()
        self._renew()

    @property
    def sparsity(self) -> float:
        """The fraction removed now, of the weights that are pruned."""
        return self._masker.sparsity

    @property
    def is_done(self) -> bool:
        """Whether the final sparsity is in force: only then compare epochs, or begin early stopping's patience."""
        return self._ramp.is_done(self._step)

    @property
    def masks(self) -> Masks:
        """The masks by kernel name: 1 where kept."""
        return self._masker.masks()

    def hold(self) -> None:
        """Set removed weights to zero, as after weights were loaded."""
        self._masker.hold()

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, in plain values and NumPy arrays."""
        return {"spec": to_dict(self._spec), "steps": self._steps, "step": self._step, "masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the model's own weights are loaded by you, before or after.

        Raises:
            SpecError: `state` belongs to another spec or number of steps.
            ModelError: its masks do not fit this model.
        """
        if from_dict(state["spec"]) != self._spec or state["steps"] != self._steps:
            raise SpecError(
                f"This state belongs to {from_dict(state['spec'])} over {state['steps']} steps, "
                f"but the Pruner was made with {self._spec} over {self._steps}. Make it with the same."
            )
        self._masker.reset(state["masks"])
        self._step = int(state["step"])

"""Pruning of single weights: one-shot, inside training, and in the user's own loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from whet.data import Batches
from whet.graph.masking import Masker as _Masker
from whet.graph.masking import ScheduledPruner, check_one_shot
from whet.graph.views import Masks, WeightView
from whet.numerics.criteria import random_scores, weight_importance
from whet.records import Step
from whet.specs import Fisher, Prune, Random
from whet.torch.importance import gradients_for
from whet.torch.namespace import xp
from whet.torch.views import weight_views


def prune(model: Any, spec: Prune, *, masks: Masks, data: Batches | None = None) -> tuple[Masks, Step]:
    """*In place*: zero the least important weights at once. Weights masked before stay masked and count as removed.

    Raises:
        SpecError: the schedule needs training, or the criterion data.
        ModelError: nothing would change.
    """
    check_one_shot(spec)
    started = time.perf_counter()
    masker = Masker(model, spec, masks)
    masker.gradients = gradients_for(model, spec.criterion, data)
    masker.renew(spec.fraction)
    return masker.masks(), masker.step(spec, started)


class Masker(_Masker):
    """Masks on the parameters of a model: renewed by their scores, held after every optimizer step.

    Tied weights are one parameter and have one mask, under the first of their names.
    """

    noun, xp = "parameter", xp

    def __init__(self, model: Any, spec: Prune | None, masks: Mapping[str, Any]) -> None:
        """As for any side; `gradients` are as `gradients_for` gives them, without: those that training left."""
        self.gradients: dict[str, Any] = {}
        super().__init__(model, spec, masks)

    def _read(self, model: Any) -> None:
        self._parameters = dict(model.named_parameters())

    def _prunable(self, model: Any) -> tuple[Sequence[WeightView], Sequence[tuple[str, str]], Sequence[str]]:
        views = weight_views(model)
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False)) if name]
        return views.weights, views.skipped, names

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._parameters[name].shape) if name in self._parameters else None

    def _values(self, name: str) -> Any:
        return self._parameters[name].detach().float().cpu().numpy()

    def _is_zero(self, name: str, mask: Any) -> Any:
        return (torch.as_tensor(mask) == 0).to(self._parameters[name].device)

    def _scores(self, weight: WeightView, index: int, criterion: Any) -> Any:
        values = weight.array.detach()
        values = values if values.dtype == torch.float64 else values.float()
        if isinstance(criterion, Random):
            scores = torch.from_numpy(random_scores(criterion.seed, index, values.shape)).to(values.device).float()
        else:
            gradient = self.gradients.get(weight.name)
            if gradient is None and weight.array.grad is not None:
                gradient = weight.array.grad.detach().to(values.dtype)
                gradient = gradient**2 if isinstance(criterion, Fisher) else gradient
            scores = weight_importance(criterion, values, gradient, xp=xp).float()
        old = self._gone(weight.name)
        return scores if old is None else scores.masked_fill(old, -torch.inf)

    def _gone(self, name: str) -> Any:
        removed = self._removed.get(name)
        if removed is not None and removed.device != self._parameters[name].device:  # the model has moved
            removed = self._removed[name] = removed.to(self._parameters[name].device)
        return removed

    def hold(self) -> None:
        """Set removed weights to zero again. Filled, not multiplied: -1 · 0 is -0, which does not compress."""
        with torch.no_grad():
            for name in self._removed:
                self._parameters[name].masked_fill_(self._gone(name), 0.0)

    def masks(self) -> Masks:
        """The masks by parameter name: 1 where kept."""
        return {name: (~removed).to(torch.uint8).cpu().numpy() for name, removed in self._removed.items()}


class Pruner(ScheduledPruner):
    """Pruning in your own training loop. The first masks are set at once; then call `step()` after every `optimizer.step()`.

    ```python
    pruner = whet.torch.Pruner(model, Prune(0.8, schedule=Cubic()), steps=epochs * len(loader))
    for inputs, targets in loader:
        …
        optimizer.step()
        pruner.step()
    ```
    The model stays an ordinary module: its removed weights are zeros. `state_dict()` resumes in the middle of a ramp.
    """

    _masker_class = Masker

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, in plain values and tensors (`torch.load` with `weights_only`)."""
        state = super().state_dict()
        return state | {"masks": {name: torch.from_numpy(mask) for name, mask in state["masks"].items()}}

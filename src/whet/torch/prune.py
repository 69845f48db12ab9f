"""Pruning of single weights: one-shot, inside training, and in the user's own loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from whet.data import Batches
from whet.graph.masking import Masker as _Masker
from whet.graph.masking import check_one_shot
from whet.graph.scheduling import ScheduledPruner
from whet.graph.views import Masks, WeightView
from whet.records import Step
from whet.specs import Fisher, Prune, UserCriterion
from whet.specs.criteria import FROM_GRADIENTS
from whet.torch.importance import gradients_for, statistics_for
from whet.torch.inputs import InputReader
from whet.torch.namespace import xp
from whet.torch.sharding import divided, own_part, whole
from whet.torch.views import weight_views


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


class Masker(_Masker):
    """Masks on the parameters of a model: renewed by their scores, held after every optimizer step.

    Tied weights are one parameter and have one mask, under the first of their names.
    """

    noun, xp = "parameter", xp

    def _read(self, model: Any) -> None:
        self._parameters = dict(model.named_parameters())

    def _prunable(self, model: Any) -> tuple[Sequence[WeightView], Sequence[tuple[str, str]], Sequence[str]]:
        views = weight_views(model)
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False)) if name]
        return views.weights, views.skipped, names

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._parameters[name].shape) if name in self._parameters else None

    def _values(self, name: str) -> Any:
        return whole(self._parameters[name].detach()).float().cpu().numpy()

    def _is_zero(self, name: str, mask: Any) -> Any:
        return (torch.as_tensor(mask) == 0).to(self._parameters[name].device)

    def _floats(self, name: str) -> Any:
        values = whole(self._parameters[name].detach())
        return values.clone() if values.dtype == torch.float64 else values.to(torch.float32, copy=True)

    def _put(self, array: Any, name: str) -> Any:
        return torch.from_numpy(array).to(self._parameters[name].device)

    def _host(self, array: Any) -> Any:
        return array.cpu().numpy()

    def _statistics(self, criterion: Any) -> dict[str, Any]:
        if self._data is not None:
            found = statistics_for(self._model, criterion, self._data, self._loss)
            return {name: value.to(self._parameters[name].device) for name, value in found.items()}
        if not isinstance(criterion, (*FROM_GRADIENTS, UserCriterion)):
            return {}
        found = self._left()
        return {name: gradient**2 for name, gradient in found.items()} if isinstance(criterion, Fisher) else found

    def _left(self) -> dict[str, Any]:
        """The gradients that training has left."""
        return {name: p.grad.detach().float() for name, p in self._parameters.items() if p.grad is not None}

    def _gradients(self, seed: int) -> dict[str, Any]:
        left = self._left()
        if self._data is None or all(weight.name in left for weight in self._chosen):
            return left
        return gradients_for(self._model, self._data, 1, loss=self._loss, seed=seed)

    def _reader(self, data: Batches, batches: int) -> InputReader:
        return InputReader(self._model, data, batches)

    def _agreed(self, removed: dict[str, Any]) -> dict[str, Any]:
        distributed = torch.distributed
        if self._data is None or not distributed.is_available() or not distributed.is_initialized():
            return removed
        first = {name: gone.to(torch.uint8) for name, gone in removed.items()}
        for gone in first.values():
            distributed.broadcast(gone, 0)
        return {name: gone.bool() for name, gone in first.items()}

    def _gone(self, name: str) -> Any:
        removed = self._removed.get(name)
        if removed is not None and removed.device != self._parameters[name].device:  # the model has moved
            removed = self._removed[name] = removed.to(self._parameters[name].device)
        return removed

    def hold(self) -> None:
        """Set removed weights to zero again. Filled, not multiplied: -1 · 0 is -0, which does not compress."""
        with torch.no_grad():
            for name in self._removed:
                parameter = self._parameters[name]
                own_part(parameter).masked_fill_(own_part(divided(self._gone(name), parameter)), 0.0)

    def _forget(self, name: str, grown: Any) -> None:
        parameter = self._parameters[name]
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value.masked_fill_(grown, 0.0)

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

    def __init__(
        self, model: Any, spec: Prune, steps: int, *, masks: Masks | None = None, data: Any = None, optimizer: Any = None
    ) -> None:
        """`steps` is the number of training steps that the schedule is laid on; `masks` are those from before.

        `model` may be wrapped in DistributedDataParallel or compiled; names are those of the module inside. data: batches for
        criteria that look at some, anew whenever masks are renewed. Without, those that need gradients take what backward()
        has left: call `step()` before `zero_grad()`. optimizer: the one that trains the model, whose moments of weights that
        `RigL` grows become zero. Processes that train together take the masks of the first.

        Raises:
            SpecError: the schedule does not fit into `steps`.
            ModelError: nothing would change.
        """
        super().__init__(inside(model), spec, steps, masks=masks, data=data, optimizer=optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, in plain values and tensors (`torch.load` with `weights_only`)."""
        return {key: _tensors(value) if key in _ARRAYS else value for key, value in super().state_dict().items()}


_ARRAYS = ("masks", "last", "moved")


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def inside(model: Any) -> Any:
    """The user's module inside DistributedDataParallel and `torch.compile`."""
    while isinstance(model, torch.nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model

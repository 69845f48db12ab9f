"""Magnitude pruning of single weights: one-shot, inside training, and in the user's own loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from whet.data import Batches
from whet.errors import ModelError, SpecError
from whet.graph.placement import selected, unmatched
from whet.graph.views import Masks, WeightView
from whet.numerics.criteria import random_scores, weight_importance
from whet.numerics.histograms import Histogram, histogram
from whet.numerics.masks import most_removed, patterned, unfit
from whet.numerics.schedules import Ramp, lay
from whet.records import Step
from whet.specs import Fisher, OneShot, Prune, Random, from_dict, to_dict
from whet.specs.base import check_integer
from whet.torch.importance import gradients_for
from whet.torch.namespace import xp
from whet.torch.views import weight_views


def prune(model: Any, spec: Prune, *, masks: Masks, data: Batches | None = None) -> tuple[Masks, Step]:
    """*In place*: zero the least important weights at once. Weights masked before stay masked and count as removed.

    Raises:
        SpecError: the schedule needs training, or the criterion data.
        ModelError: nothing would change.
    """
    if not isinstance(spec.schedule, OneShot):
        name = type(spec.schedule).__name__
        raise SpecError(f"A {name} schedule needs training: write Train(apply=[Prune(…, schedule={name}())]).")
    started = time.perf_counter()
    masker = Masker(model, spec, masks)
    masker.gradients = gradients_for(model, spec.criterion, data)
    masker.renew(spec.fraction)
    step = Step(to_dict(spec), masker.changed(), masker.skipped, time.perf_counter() - started, unmatched=masker.unmatched)
    return masker.masks(), step


class Masker:
    """Masks on the parameters of a model: renewed by magnitude, held after every optimizer step.

    Tied weights are one parameter and have one mask, under the first of their names.
    """

    def __init__(self, model: Any, spec: Prune | None, masks: Mapping[str, Any]) -> None:
        """`masks` are those from before; without a spec they are held and never renewed.

        Raises:
            ModelError: a mask that fits no parameter, or a spec that would change nothing.
        """
        self._parameters = dict(model.named_parameters())
        self._removed: dict[str, Any] = {name: self._fit(name, mask) for name, mask in masks.items()}
        self.skipped: tuple[dict[str, str], ...] = ()
        self.unmatched: tuple[str, ...] = ()
        self._spec = spec
        self._views: tuple[WeightView, ...] = ()
        self._before: dict[str, Histogram | None] = {}
        self.gradients: dict[str, Any] = {}  # as `gradients_for` gives them; without, those that training left
        if spec is not None:
            self._select(model, spec)
        self.hold()

    def _fit(self, name: str, mask: Any) -> Any:
        parameter = self._parameters.get(name)
        shape = tuple(np.shape(mask)) if not isinstance(mask, torch.Tensor) else tuple(mask.shape)
        if parameter is None or tuple(parameter.shape) != shape:
            got = "there is no such parameter" if parameter is None else f"the parameter has shape {tuple(parameter.shape)}"
            raise ModelError(
                f"There is a mask of shape {shape} for {name!r}, but {got}. Masks belong to the model they came from."
            )
        return (torch.as_tensor(mask) == 0).to(parameter.device)

    def _select(self, model: Any, spec: Prune) -> None:
        views = weight_views(model)
        skipped = list(views.skipped)
        chosen = []
        for view in views.weights:
            reason = selected(view.layer, spec.keep, spec.include, view.name)
            if reason is None and view.array.numel() < 2:
                reason = "a single weight is never removed"
            if reason is None:
                reason = unfit(tuple(view.array.shape), (view.out_axis, view.in_axis), spec.granularity)
            if reason is None:
                chosen.append(view)
            else:
                skipped.append((view.layer, reason))
        self._views = tuple(chosen)
        self.skipped = tuple({"name": name, "reason": reason} for name, reason in skipped)
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False)) if name]
        self.unmatched = tuple(unmatched(dict.fromkeys(names, ()), (*spec.keep, *(spec.include or ()))))
        if not self._views:
            self._nothing("")
        sizes = [view.array.numel() for view in self._views]
        gone = [int(self._removed[view.name].sum()) if view.name in self._removed else 0 for view in self._views]
        if most_removed(sizes, gone, spec.fraction, spec.allocation, spec.granularity) == 0:
            self._nothing(f"sparsity {spec.fraction:g} is reached already, or removes less than one weight of any layer")
        self._before = {view.name: histogram(_array(view.array)) for view in chosen}

    def _nothing(self, why: str) -> None:
        reasons = why or "; ".join(f"{row['name']}: {row['reason']}" for row in self.skipped[:8])
        never = f" These patterns match no layer: {', '.join(self.unmatched)}." if self.unmatched else ""
        raise ModelError(
            f"Prune would change nothing in this model ({reasons or 'it has no convolution or linear weight'}).{never} "
            "Raise sparsity=, or loosen keep= or include=."
        )

    def renew(self, sparsity: float) -> None:
        """Remove the fraction `sparsity` of the chosen weights; what is removed already counts and stays removed."""
        if self._spec is None:
            return
        scores = [self._scores(view, i, self._spec.criterion) for i, view in enumerate(self._views)]
        axes = [(view.out_axis, view.in_axis) for view in self._views]
        for view, mask in zip(self._views, patterned(scores, axes, self._spec, sparsity, xp=xp), strict=True):
            old = self._removed.get(view.name)
            self._removed[view.name] = mask == 0 if old is None else (mask == 0) | old.to(mask.device)
        self.hold()

    def _scores(self, view: WeightView, index: int, criterion: Any) -> Any:
        weight = view.array.detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        if isinstance(criterion, Random):
            scores = torch.from_numpy(random_scores(criterion.seed, index, weight.shape)).to(weight.device).float()
        else:
            gradient = self.gradients.get(view.name)
            if gradient is None and view.array.grad is not None:
                gradient = view.array.grad.detach().to(weight.dtype)
                gradient = gradient**2 if isinstance(criterion, Fisher) else gradient
            scores = weight_importance(criterion, weight, gradient, xp=xp).float()
        old = self._removed.get(view.name)
        return scores if old is None else scores.masked_fill(old.to(scores.device), -torch.inf)

    def _counts(self) -> int:
        return sum(int(removed.sum()) for removed in self._removed.values())

    def hold(self) -> None:
        """Set removed weights to zero again. Filled, not multiplied: -1 · 0 is -0, which does not compress."""
        with torch.no_grad():
            for name, removed in self._removed.items():
                parameter = self._parameters[name]
                if removed.device != parameter.device:
                    removed = self._removed[name] = removed.to(parameter.device)
                parameter.masked_fill_(removed, 0.0)

    def reset(self, masks: Mapping[str, Any]) -> None:
        """Hold `masks` in the place of the present ones. Weights that these had removed stay zero until they are loaded."""
        self._removed = {name: self._fit(name, mask) for name, mask in masks.items()}
        self.hold()

    def masks(self) -> Masks:
        """The masks by parameter name: 1 where kept."""
        return {name: (~removed).to(torch.uint8).cpu().numpy() for name, removed in self._removed.items()}

    def changed(self) -> tuple[dict[str, Any], ...]:
        """A row for each masked weight: `{"name", "parameters", "sparsity", "histogram"}`, the last of weights pruned here."""
        rows = []
        for name, removed in self._removed.items():
            gone, before = int(removed.sum()), self._before.get(name)
            if gone:
                row = {"name": name, "parameters": removed.numel(), "sparsity": gone / removed.numel()}
                drawn = {} if before is None else {"histogram": before.beside(_array(self._parameters[name]))}
                rows.append(row | drawn)
        return tuple(rows)

    @property
    def sparsity(self) -> float:
        """The fraction removed of all weights that have a mask; 0 without masks."""
        size = sum(removed.numel() for removed in self._removed.values())
        return self._counts() / size if size else 0.0


def _array(tensor: Any) -> Any:
    return tensor.detach().float().cpu().numpy()


class Pruner:
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
        """One optimizer step was taken: hold the masks, and renew them where the schedule says so."""
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
        """The masks by parameter name: 1 where kept."""
        return self._masker.masks()

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, in plain values and tensors (`torch.load` with `weights_only`)."""
        masks = {name: torch.from_numpy(mask) for name, mask in self.masks.items()}
        return {"spec": to_dict(self._spec), "steps": self._steps, "step": self._step, "masks": masks}

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

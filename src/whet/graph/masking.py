"""What both sides' pruning of single weights shares: which weights, how many are gone, when masks are renewed, what is told."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from whet.errors import ModelError, SpecError
from whet.graph.placement import selected, unmatched
from whet.graph.views import Masks
from whet.numerics.histograms import Histogram, histogram
from whet.numerics.masks import most_removed, patterned, unfit
from whet.numerics.namespace import Namespace
from whet.numerics.schedules import Ramp, lay
from whet.records import Step
from whet.specs import OneShot, Prune, from_dict, to_dict
from whet.specs.base import check_integer


class Prunable(Protocol):
    """A weight that can be pruned: its name, the layer that users name in keep and include, and where its channels are."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def out_axis(self) -> int: ...
    @property
    def in_axis(self) -> int | None: ...


def check_one_shot(spec: Prune) -> None:
    """Raise SpecError if the schedule of `spec` needs training."""
    if not isinstance(spec.schedule, OneShot):
        name = type(spec.schedule).__name__
        raise SpecError(f"A {name} schedule needs training: write Train(apply=[Prune(…, schedule={name}())]).")


class Masker(ABC):
    """Masks on the weights of a model: renewed by their scores, held after every optimizer step.

    A framework side says which weights there are, what they score, and how removed ones are set to zero.
    """

    noun: ClassVar[str]  # what the side calls a weight that can have a mask: parameter, kernel
    xp: ClassVar[Namespace]  # of the scores and masks

    def __init__(self, model: Any, spec: Prune | None, masks: Mapping[str, Any]) -> None:
        """`masks` are those from before; without a spec they are held and never renewed.

        Raises:
            ModelError: a mask that fits no weight, or a spec that would change nothing.
        """
        self.skipped: tuple[dict[str, str], ...] = ()
        self.unmatched: tuple[str, ...] = ()
        self._spec = spec
        self._chosen: tuple[Any, ...] = ()
        self._before: dict[str, Histogram | None] = {}
        self._removed: dict[str, Any] = {}  # weight name -> bool array of the side, True where removed
        self._read(model)
        for name, mask in masks.items():
            self._set(name, self._fit(name, mask))
        if spec is not None:
            self._select(model, spec)
        self.hold()

    @abstractmethod
    def _read(self, model: Any) -> None:
        """Remember the weights of `model`."""

    @abstractmethod
    def _prunable(self, model: Any) -> tuple[Sequence[Prunable], Sequence[tuple[str, str]], Sequence[str]]:
        """The weights that can be pruned; (name, reason) of those that cannot; all names that patterns may mean."""

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the weight `name`; None where there is none."""

    @abstractmethod
    def _values(self, name: str) -> npt.NDArray[np.float32]:
        """The present values of the weight `name`."""

    @abstractmethod
    def _is_zero(self, name: str, mask: Any) -> Any:
        """Where `mask` is zero, as a bool array of the side, where the weight `name` lies."""

    @abstractmethod
    def _scores(self, weight: Any, index: int, criterion: Any) -> Any:
        """The importance of each of its values, -inf where removed already; `index` is its place among the chosen."""

    @abstractmethod
    def hold(self) -> None:
        """Set removed weights to zero again. Filled, not multiplied: -1 · 0 is -0, which does not compress."""

    @abstractmethod
    def masks(self) -> Masks:
        """The masks by weight name: 1 where kept."""

    def _gone(self, name: str) -> Any:
        """What is removed of the weight `name`; None where it has no mask."""
        return self._removed.get(name)

    def _set(self, name: str, removed: Any) -> None:
        self._removed[name] = removed

    def _fit(self, name: str, mask: Any) -> Any:
        found, shape = self._shape(name), tuple(mask.shape) if hasattr(mask, "shape") else np.shape(mask)
        if found != shape:
            got = f"there is no such {self.noun}" if found is None else f"the {self.noun} has shape {found}"
            raise ModelError(
                f"There is a mask of shape {shape} for {name!r}, but {got}. Masks belong to the model they came from."
            )
        return self._is_zero(name, mask)

    def _select(self, model: Any, spec: Prune) -> None:
        weights, without, names = self._prunable(model)
        skipped, chosen, sizes = list(without), [], []
        for weight in weights:
            shape = self._shape(weight.name) or ()
            reason = selected(weight.layer, spec.keep, spec.include, weight.name)
            if reason is None and math.prod(shape) < 2:
                reason = "a single weight is never removed"
            if reason is None:
                reason = unfit(shape, (weight.out_axis, weight.in_axis), spec.granularity)
            if reason is None:
                chosen.append(weight)
                sizes.append(math.prod(shape))
            else:
                skipped.append((weight.layer, reason))
        self._chosen = tuple(chosen)
        self.skipped = tuple({"name": name, "reason": reason} for name, reason in skipped)
        self.unmatched = tuple(unmatched(dict.fromkeys(names, ()), (*spec.keep, *(spec.include or ()))))
        if not chosen:
            self._nothing("")
        gone = [int(self._removed[weight.name].sum()) if weight.name in self._removed else 0 for weight in chosen]
        if most_removed(sizes, gone, spec.fraction, spec.allocation, spec.granularity) == 0:
            self._nothing(f"sparsity {spec.fraction:g} is reached already, or removes less than one weight of any layer")
        self._before = {weight.name: histogram(self._values(weight.name)) for weight in chosen}

    def _nothing(self, why: str) -> None:
        reasons = why or "; ".join(f"{row['name']}: {row['reason']}" for row in self.skipped[:8])
        reasons = reasons or "it has no convolution or linear weight"
        never = f" These patterns match no layer: {', '.join(self.unmatched)}." if self.unmatched else ""
        raise ModelError(
            f"Prune would change nothing in this model ({reasons}).{never} Raise sparsity=, or loosen keep= or include=."
        )

    def renew(self, sparsity: float) -> None:
        """Remove the fraction `sparsity` of the chosen weights; what is removed already counts and stays removed."""
        if self._spec is None:
            return
        scores = [self._scores(weight, i, self._spec.criterion) for i, weight in enumerate(self._chosen)]
        axes = [(weight.out_axis, weight.in_axis) for weight in self._chosen]
        for weight, mask in zip(self._chosen, patterned(scores, axes, self._spec, sparsity, xp=self.xp), strict=True):
            old = self._gone(weight.name)
            self._set(weight.name, mask == 0 if old is None else (mask == 0) | old)
        self.hold()

    def reset(self, masks: Mapping[str, Any]) -> None:
        """Hold `masks` in the place of the present ones. Weights that these had removed stay zero until they are loaded."""
        fitting = {name: self._fit(name, mask) for name, mask in masks.items()}
        self._removed.clear()
        for name, removed in fitting.items():
            self._set(name, removed)
        self.hold()

    def changed(self) -> tuple[dict[str, Any], ...]:
        """A row for each masked weight: `{"name", "parameters", "sparsity", "histogram"}`, the last of weights pruned here."""
        rows = []
        for name, removed in self._removed.items():
            size, gone, before = math.prod(removed.shape), int(removed.sum()), self._before.get(name)
            if gone:
                row = {"name": name, "parameters": size, "sparsity": gone / size}
                drawn = {} if before is None else {"histogram": before.beside(self._values(name))}
                rows.append(row | drawn)
        return tuple(rows)

    @property
    def sparsity(self) -> float:
        """The fraction removed of all weights that have a mask; 0 without masks."""
        size = sum(math.prod(removed.shape) for removed in self._removed.values())
        return sum(int(removed.sum()) for removed in self._removed.values()) / size if size else 0.0

    def step(self, spec: Prune, started: float) -> Step:
        """What was done so far, as a row of the report; `started` is the `time.perf_counter()` at its beginning."""
        return Step(to_dict(spec), self.changed(), self.skipped, time.perf_counter() - started, unmatched=self.unmatched)


class ScheduledPruner:
    """A schedule laid on the user's own loop: the masks are renewed where it says so and held after every step."""

    _masker_class: ClassVar[type[Masker]]

    def __init__(self, model: Any, spec: Prune, steps: int, *, masks: Masks | None = None) -> None:
        """`steps` is the number of training steps that the schedule is laid on; `masks` are those from before.

        Raises:
            SpecError: the schedule does not fit into `steps`.
            ModelError: nothing would change.
        """
        check_integer("Pruner.steps", steps, low=1)
        self._spec, self._steps = spec, steps
        self._ramp: Ramp = lay(spec, steps)
        self._masker = self._masker_class(model, spec, masks or {})
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

    def hold(self) -> None:
        """Set removed weights to zero, as after weights were loaded."""
        self._masker.hold()

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
        """The masks by weight name: 1 where kept."""
        return self._masker.masks()

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

"""What both sides' pruning of single weights shares: which weights, which of them go, what is told."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from whet.data import Batches
from whet.errors import ModelError, SpecError
from whet.graph.inputs import InputReader, Pattern
from whet.graph.placement import selected, unmatched
from whet.graph.views import Masks
from whet.numerics.criteria import movement, random_scores, weight_importance
from whet.numerics.histograms import Histogram, histogram
from whet.numerics.masks import most_removed, patterned, removed_counts, unfit
from whet.numerics.namespace import Namespace
from whet.numerics.regrow import rigl
from whet.numerics.schedules import Ramp
from whet.records import Step
from whet.specs import NM, Movement, OneShot, Prune, Random, SparseGPT, to_dict


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

    def __init__(
        self, model: Any, spec: Prune | None, masks: Mapping[str, Any], data: Batches | None = None, loss: Any = None
    ) -> None:
        """`masks` are those from before; without a spec they are held and never renewed.

        data: batches for criteria that look at some; loss: of (outputs, targets) for their gradients, None for the default.

        Raises:
            ModelError: a mask that fits no weight, or a spec that would change nothing.
        """
        self._model, self._data, self._loss = model, data, loss
        self.skipped: tuple[dict[str, str], ...] = ()
        self.unmatched: tuple[str, ...] = ()
        self._spec = spec
        self._chosen: tuple[Any, ...] = ()
        self._before: dict[str, Histogram | None] = {}
        self._removed: dict[str, Any] = {}  # weight name -> bool array of the side, True where removed
        self._last: dict[str, Any] = {}  # for Movement: the weights after the last step, and the sums of their scores
        self._moved: dict[str, Any] = {}
        self.optimizer: Any = None  # whose moments of weights that grow are set to zero
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
    def _floats(self, name: str) -> Any:
        """A copy of the weight `name` as an array of the side, of 32 bits or more."""

    @abstractmethod
    def _put(self, array: Any, name: str) -> Any:
        """A NumPy array as one of the side, where the weight `name` lies."""

    @abstractmethod
    def _host(self, array: Any) -> npt.NDArray[Any]:
        """An array of the side as a NumPy array."""

    @abstractmethod
    def _statistics(self, criterion: Any) -> Mapping[str, Any]:
        """By weight name what `weight_importance` needs beside the weight, as far as there is data, as arrays of the side."""

    @abstractmethod
    def _gradients(self, seed: int) -> Mapping[str, Any]:
        """By weight name ∂L/∂w of one batch as arrays of the side; those of weights that are removed too."""

    @abstractmethod
    def _reader(self, data: Batches, batches: int) -> InputReader:
        """What sees the inputs of the weights."""

    @abstractmethod
    def hold(self) -> None:
        """Set removed weights to zero again. Filled, not multiplied: -1 · 0 is -0, which does not compress."""

    @abstractmethod
    def _forget(self, name: str, grown: Any) -> None:
        """*In place*: the moments that `self.optimizer` keeps of the weight `name` become zero where it has `grown`."""

    @abstractmethod
    def masks(self) -> Masks:
        """The masks by weight name: 1 where kept."""

    def _gone(self, name: str) -> Any:
        """What is removed of the weight `name`; None where it has no mask."""
        return self._removed.get(name)

    def _set(self, name: str, removed: Any) -> None:
        self._removed[name] = removed

    def _count(self, name: str) -> int:
        return int(self.xp.count_nonzero(self._removed[name]))

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
        gone = [self._count(weight.name) if weight.name in self._removed else 0 for weight in chosen]
        if most_removed(sizes, gone, spec.fraction, spec.allocation, spec.granularity) == 0:
            self._nothing(f"sparsity {spec.fraction:g} is reached already, or removes less than one weight of any layer")
        self._before = {weight.name: histogram(self._values(weight.name)) for weight in chosen}
        if isinstance(spec.criterion, Movement):
            self._last = {weight.name: self._floats(weight.name) for weight in chosen}

    def _nothing(self, why: str) -> None:
        reasons = why or "; ".join(f"{row['name']}: {row['reason']}" for row in self.skipped[:8])
        reasons = reasons or "it has no convolution or linear weight"
        never = f" These patterns match no layer: {', '.join(self.unmatched)}." if self.unmatched else ""
        raise ModelError(
            f"Prune would change nothing in this model ({reasons}).{never} Raise sparsity=, or loosen keep= or include=."
        )

    def follow(self, ramp: Ramp, step: int) -> None:
        """Renew the masks, or move them, where the schedule says so before `step`."""
        if ramp.renews(step):
            self.renew(ramp.sparsity(step))
        fraction = ramp.drop_fraction(step)
        if fraction:
            self.regrow(fraction, step)

    def renew(self, sparsity: float) -> None:
        """Remove the fraction `sparsity` of the chosen weights; what is removed already counts and stays removed."""
        if self._spec is None:
            return
        if isinstance(self._spec.criterion, SparseGPT):
            self._solve(self._spec.criterion, sparsity)
            return
        found = self._moved or self._statistics(self._spec.criterion)
        scores = [self._scores(weight.name, i, found.get(weight.name)) for i, weight in enumerate(self._chosen)]
        axes = [(weight.out_axis, weight.in_axis) for weight in self._chosen]
        masks = patterned(scores, axes, self._spec, sparsity, xp=self.xp)
        gone = {weight.name: ~mask for weight, mask in zip(self._chosen, masks, strict=True)}
        self._take({name: new if (old := self._gone(name)) is None else new | old for name, new in gone.items()})

    def _take(self, removed: dict[str, Any]) -> None:
        """Have new masks, and hold them."""
        for name, gone in self._agreed(removed).items():
            self._set(name, gone)
        self.hold()

    def _agreed(self, removed: dict[str, Any]) -> dict[str, Any]:
        """What is removed; where processes train together, on data of their own, the same in all of them."""
        return removed

    def _scores(self, name: str, index: int, statistic: Any) -> Any:
        """The importance of each value of a weight, -inf where removed already; `index` is its place among the chosen."""
        values, old, xp = self._floats(name), self._gone(name), self.xp
        criterion = self._spec.criterion if self._spec is not None else None
        if isinstance(criterion, Random):
            scores = self._put(random_scores(criterion.seed, index, values.shape), name)
        elif isinstance(criterion, Movement) and statistic is None and self._last:
            scores = xp.full_like(values, 0.0)  # nothing has moved yet, and nothing is removed yet
        else:
            scores = weight_importance(criterion, values, statistic, xp=xp)
        scores = xp.cast(scores, "float32")
        return scores if old is None else xp.where(old, xp.full_like(scores, -math.inf), scores)

    def _solve(self, criterion: SparseGPT, sparsity: float) -> None:
        """`SparseGPT`, layer by layer: each on the inputs that the layers before, pruned already, give it."""
        spec = self._spec
        if spec is None or self._data is None:
            raise SpecError("The criterion SparseGPT looks at the inputs of layers: pass batches as train=, targets or not.")
        reader = self._reader(self._data, criterion.batches)
        counts = removed_counts([self._shape(weight.name) or () for weight in self._chosen], sparsity, spec.allocation)
        for weight, count in zip(self._chosen, counts, strict=True):
            seen = reader.sums([weight.name], True).get(weight.name)
            if seen is None:
                raise SpecError(
                    f"SparseGPT sees no input of {weight.name!r}, which no convolution or linear layer reads: name it in keep=."
                )
            pattern = None
            if isinstance(spec.granularity, NM):
                pattern = Pattern(spec.granularity.n, spec.granularity.m, weight.in_axis or 0)
            old = None if weight.name not in self._removed else self.masks()[weight.name] == 0
            values, mask = seen.solve(self._values(weight.name), count, pattern, old, criterion.block, criterion.damping)
            reader.assign(weight.name, values)
            self._set(weight.name, self._is_zero(weight.name, mask))
        self.hold()

    def observe(self) -> None:
        """One training step was taken: note where weights have moved, for `Movement`. Called before `hold`."""
        for name, last in self._last.items():
            now = self._floats(name)
            score = movement(last, now - last)
            self._moved[name] = self._moved[name] + score if name in self._moved else score
            self._last[name] = now

    def regrow(self, fraction: float, seed: int) -> None:
        """`RigL`: of the kept weights `fraction` with the least magnitude go, and as many with the largest gradient grow.

        Those that grow begin at zero, and so do their moments in the optimizer.
        """
        gradients, moved = self._gradients(seed), {}
        for weight in self._chosen:
            removed = self._gone(weight.name)
            gradient = gradients.get(weight.name)
            if removed is None or gradient is None:
                raise SpecError(
                    f"RigL needs the gradient of {weight.name!r}, and there is none: pass data= batches of (inputs, "
                    "targets), or in PyTorch call step() after backward() and before zero_grad()."
                )
            moved[weight.name] = ~rigl(self._floats(weight.name), gradient, ~removed, fraction, xp=self.xp)
        before = {name: self._gone(name) for name in moved}
        self._take(moved)
        for name, old in before.items() if self.optimizer is not None else ():
            self._forget(name, old & ~self._gone(name))

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
            size, gone, before = math.prod(removed.shape), self._count(name), self._before.get(name)
            if gone:
                row = {"name": name, "parameters": size, "sparsity": gone / size}
                drawn = {} if before is None else {"histogram": before.beside(self._values(name))}
                rows.append(row | drawn)
        return tuple(rows)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on: the masks, and for Movement its sums, as NumPy arrays."""
        kept = {name: {key: self._host(value) for key, value in part.items()} for name, part in self._history().items()}
        return {"masks": self.masks(), **{name: part for name, part in kept.items() if part}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the weights are loaded by others.

        Raises:
            ModelError: its masks do not fit this model.
        """
        self.reset(state["masks"])
        for name, part in self._history().items():
            part.clear()
            part.update({key: self._put(np.asarray(value), key) for key, value in state.get(name, {}).items()})

    def _history(self) -> dict[str, dict[str, Any]]:
        return {"last": self._last, "moved": self._moved}

    @property
    def sparsity(self) -> float:
        """The fraction removed of all weights that have a mask; 0 without masks."""
        size = sum(math.prod(removed.shape) for removed in self._removed.values())
        return sum(map(self._count, self._removed)) / size if size else 0.0

    def step(self, spec: Prune, started: float) -> Step:
        """What was done so far, as a row of the report; `started` is the `time.perf_counter()` at its beginning."""
        return Step(to_dict(spec), self.changed(), self.skipped, time.perf_counter() - started, unmatched=self.unmatched)

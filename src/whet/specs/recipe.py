"""Recipes and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import yaml

from whet.errors import SpecError
from whet.specs.base import check_type, from_dict, spec, to_dict
from whet.specs.pruning import Prune, Ramped
from whet.specs.quantization import Quantize
from whet.specs.training import Train

FORMAT = 1


@spec
@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps that run in order. The techniques inside one `Train` act together; masks persist to the end."""

    steps: tuple[Train | Prune | Quantize, ...]

    def __post_init__(self) -> None:
        steps = tuple(self.steps) if isinstance(self.steps, list | tuple) else (self.steps,)
        if not steps:
            raise SpecError("Recipe needs at least one step: Train(…), Prune(…) or Quantize(…).")
        for step in steps:
            check_type("Recipe step", step, Train, Prune, Quantize)
            if isinstance(step, Prune) and isinstance(step.schedule, Ramped):
                name = type(step.schedule).__name__
                raise SpecError(f"A {name} schedule needs training: write Train(apply=[Prune(…, schedule={name}())]).")
        for step in steps[:-1]:
            if isinstance(step, Quantize):
                raise SpecError("Quantize must be the last step of a Recipe: what follows would change the quantized weights.")
        object.__setattr__(self, "steps", steps)

    def to_dict(self) -> dict[str, Any]:
        """`{"format": 1, "recipe": [step, …]}` in plain values."""
        return {"format": FORMAT, "recipe": to_dict(self.steps)}

    @classmethod
    def from_dict(cls, plain: Any) -> Recipe:
        """The recipe that `to_dict` wrote; a bare list of steps is taken too.

        Raises:
            SpecError: another format version, an unknown step or field.
        """
        if isinstance(plain, dict) and "recipe" in plain:
            if plain.get("format", FORMAT) != FORMAT:
                raise SpecError(f"This Whet reads recipes of format {FORMAT}, got format {plain.get('format')!r}.")
            plain = plain["recipe"]
        if not isinstance(plain, list | tuple):
            raise SpecError(f"A recipe is a list of steps under the key 'recipe', got {plain!r}.")
        return cls(from_dict(plain))

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """The recipe in YAML text. Raises `SpecError` if it is not one."""
        try:
            plain = yaml.safe_load(text)
        except yaml.YAMLError as cause:
            raise SpecError(f"The recipe is not valid YAML: {cause}") from cause
        return cls.from_dict(plain)


@spec
@dataclass(frozen=True, slots=True)
class Metric:
    """A score. `fn(outputs, targets)` gets NumPy arrays and returns one score per example, or one number for all.

    With `per_example=False` it is called once on everything.
    """

    fn: Callable[..., Any]
    _: KW_ONLY
    higher_is_better: bool = True
    per_example: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise SpecError(f"Metric.fn must be a function of (outputs, targets), got {self.fn!r}.")
        check_type("Metric.higher_is_better", self.higher_is_better, bool)
        check_type("Metric.per_example", self.per_example, bool)
        check_type("Metric.name", self.name, str)
        if not self.name:
            object.__setattr__(self, "name", getattr(self.fn, "__name__", type(self.fn).__name__))

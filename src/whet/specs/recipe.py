"""Recipes, budgets and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import yaml

from whet.errors import SpecError
from whet.specs.base import check_number, check_type, from_dict, spec, to_dict
from whet.specs.pruning import Cubic, Prune
from whet.specs.quantization import Quantize
from whet.specs.training import Train

FORMAT = 1
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "us": 1e-3, "ms": 1.0, "s": 1e3}
_SIZE_UNITS = ("B", "kB", "MB", "GB", "KiB", "MiB", "GiB")
_TIME_UNITS = ("us", "ms", "s")


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
            if isinstance(step, Prune) and isinstance(step.schedule, Cubic):
                raise SpecError("A Cubic schedule needs training: write Train(apply=[Prune(…, schedule=Cubic())]).")
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
class Budget:
    """What the compressed model may cost.

    `max_drop` is in the metric's own units (0.01 of accuracy is one point). `size` and `gzip` are bytes of the exported
    file, `latency` its median time; a number is a fraction of the original's, a text an absolute value (`"300 kB"`,
    `"2 ms"`). With `confidence` the upper end of the paired interval of the drop must hold, not its point estimate.
    """

    max_drop: float = 0.01
    _: KW_ONLY
    confidence: float | None = None
    size: float | str | None = None
    gzip: float | str | None = None
    latency: float | str | None = None

    def __post_init__(self) -> None:
        check_number("Budget.max_drop", self.max_drop, low=0, high=1e12)
        if self.confidence is not None:
            check_number("Budget.confidence", self.confidence, low=0.5, high=1, open_high=True)
        for name, units in (("size", _SIZE_UNITS), ("gzip", _SIZE_UNITS), ("latency", _TIME_UNITS)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str):
                parse_quantity(f"Budget.{name}", value, units)
            else:
                _check_fraction(name, value)

    def limit(self, name: str, original: float) -> float | None:
        """The limit of `"size"`, `"gzip"` (bytes) or `"latency"` (ms), given the original's value; None if unlimited."""
        value = getattr(self, name)
        if value is None:
            return None
        if isinstance(value, str):
            return parse_quantity(f"Budget.{name}", value, _TIME_UNITS if name == "latency" else _SIZE_UNITS)
        return float(value) * original


def _check_fraction(name: str, value: Any) -> None:
    try:
        check_number(f"Budget.{name} as a fraction of the original", value, low=0, high=10, open_low=True)
    except SpecError as cause:
        example = "2 ms" if name == "latency" else "300 kB"
        raise SpecError(f"{cause} An absolute limit is written as text: {example!r}.") from None


def parse_quantity(owner: str, text: str, units: tuple[str, ...]) -> float:
    """`"300 kB"` as bytes, `"2 ms"` as milliseconds. Raises `SpecError` with the units allowed."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in units:
        raise SpecError(f"{owner} must be a number and one of the units {', '.join(units)}, got {text!r}.")
    value = float(match[1]) * _UNITS[match[2]]
    if value == 0:
        raise SpecError(f"{owner} must be more than nothing, got {text!r}.")
    return value


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

"""What a compressed model may cost."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

from whet.errors import SpecError
from whet.specs.base import check_number, spec

_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "us": 1e-3, "ms": 1.0, "s": 1e3}
_SIZE_UNITS = ("B", "kB", "MB", "GB", "KiB", "MiB", "GiB")
_TIME_UNITS = ("us", "ms", "s")


@spec
@dataclass(frozen=True, slots=True)
class Budget:
    """What the compressed model may cost.

    `max_drop` is in the metric's own units (0.01 of accuracy is one point). `size` and `gzip` are bytes of the exported
    file, `latency` its median time; a number is a fraction of the original's, a text an absolute value (`"300 kB"`,
    `"2 ms"`). `bits` is the average over all quantized weights. With `confidence` the upper end of the paired interval of
    the drop must hold, not its point estimate.
    """

    max_drop: float = 0.01
    _: KW_ONLY
    confidence: float | None = None
    size: float | str | None = None
    gzip: float | str | None = None
    latency: float | str | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        check_number("Budget.max_drop", self.max_drop, low=0, high=1e12)
        if self.confidence is not None:
            check_number("Budget.confidence", self.confidence, low=0.5, high=1, open_high=True)
        if self.bits is not None:
            check_number("Budget.bits", self.bits, low=1, high=32)
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


def check_latency(owner: str, value: Any) -> None:
    """Raise `SpecError` unless `value` is a fraction of the original's time below 1, or a text as "2 ms"."""
    if isinstance(value, str):
        parse_quantity(owner, value, _TIME_UNITS)
        return
    try:
        check_number(owner, value, low=0, high=1, open_low=True, open_high=True)
    except SpecError as cause:
        raise SpecError(
            f"{cause} It is a fraction of the original's time; an absolute limit is written as text: '2 ms'."
        ) from None


def latency_limit(value: float | str, original_ms: float) -> float:
    """A latency budget in milliseconds."""
    return parse_quantity("latency", value, _TIME_UNITS) if isinstance(value, str) else float(value) * original_ms


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

"""Numbers as people read them: `89.4 kB`, `97.5 % [95.5, 98.5]`. Every text here is plain: whoever draws it escapes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_PERCENT = ("accuracy", "top1", "top-1", "top5", "top-5")


def printable(value: Any) -> str:
    """`value` as one line without control characters, which a terminal might obey."""
    return "".join(c if c.isprintable() else "�" for c in str(value).replace("\n", " ").replace("\t", " "))


def bytes_text(count: float) -> str:
    """`89_412` as `89.4 kB`; units are powers of 1,000, as in `Budget(size="300 kB")`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size * 0.9995:
            return f"{significant(count / size)} {unit}"
    return f"{int(count)} B"


def significant(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, in full: `0.0213`, `27.1`, `1,240`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded value: 0.9996 is 1.00
    decimals = max(0, digits - 1 - exponent)
    return f"{value:.2e}" if decimals > 6 else f"{value:,.{decimals}f}"


def ms_text(milliseconds: float) -> str:
    """`0.0213 ms`."""
    return f"{significant(milliseconds)} ms"


def percent(fraction: float, decimals: int = 1) -> str:
    """`0.8` as `80.0 %`."""
    return f"{100 * fraction:.{decimals}f} %"


def is_percentage(metric: str) -> bool:
    """Whether the scores of `metric` read better as percentages."""
    return any(word in metric.lower() for word in _PERCENT)


def score(metric: Mapping[str, Any]) -> str:
    """The value of a metric alone: `97.5 %`, or `0.0123`."""
    return percent(metric["value"]) if is_percentage(metric["name"]) else significant(metric["value"], 4)


def score_with_interval(metric: Mapping[str, Any]) -> str:
    """The value and its 95 % interval: `97.5 % [95.5, 98.5]`."""
    return score(metric) + interval(metric, is_percentage(metric["name"]), 4)


def drop_text(drop: Mapping[str, Any], metric: str) -> str:
    """The drop of a metric, positive when worse: `0.3 points [-0.8, 1.4]`."""
    if is_percentage(metric):
        return f"{100 * drop['value']:.2f} points{interval(drop, True, 3, decimals=2)}"
    return significant(drop["value"]) + interval(drop, False, 3)


def interval(estimate: Mapping[str, Any], in_percent: bool, digits: int, decimals: int = 1) -> str:
    """` [low, high]`, or nothing where there is no interval."""
    if estimate.get("ci95") is None:
        return ""
    low, high = estimate["ci95"]
    if in_percent:
        return f" [{100 * low:.{decimals}f}, {100 * high:.{decimals}f}]"
    return f" [{significant(low, digits)}, {significant(high, digits)}]"


def ratio_text(ratio: float) -> str:
    """`0.303 ×`."""
    return f"{significant(ratio)} ×"

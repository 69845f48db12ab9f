"""Numbers and specs in the words of a report. Every text here is plain: whoever draws it escapes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from whet.runtimes.comparison import OPENING

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


def latency_verdict(ratio: Mapping[str, Any] | None) -> str | None:
    """`faster`, `SLOWER`, or that nothing can be told, by the interval or, without one, the value; None if not timed.

    Less than `OPENING` of difference is noise: so much may one file differ from itself, opened twice.
    """
    if not ratio or ratio.get("value") is None:
        return None
    low, high = ratio["ci95"] if ratio.get("ci95") is not None else (ratio["value"], ratio["value"])
    if high < 1 - OPENING:
        return "faster"
    return "SLOWER" if low > 1 + OPENING else "no difference beyond the noise"


def latency_text(ratio: Mapping[str, Any] | None) -> str:
    """`1.29 × [1.21, 1.33] SLOWER`, or nothing if it was not timed."""
    verdict = latency_verdict(ratio)
    return "" if ratio is None or verdict is None else f"{ratio_text(ratio['value'])}{interval(ratio, False, 3)} {verdict}"


def spec_text(plain: Any) -> str:
    """A spec's plain form as it is written in Python: `Prune(sparsity=0.8, schedule=Cubic())`."""
    if isinstance(plain, Mapping):
        if set(plain) == {"function"}:
            return str(plain["function"])
        if len(plain) == 1:
            ((name, fields),) = plain.items()
            if str(name)[:1].isupper() and isinstance(fields, Mapping | None):
                return f"{name}({', '.join(f'{key}={spec_text(item)}' for key, item in (fields or {}).items())})"
        return "{" + ", ".join(f"{key}: {spec_text(item)}" for key, item in plain.items()) + "}"
    if isinstance(plain, list | tuple):
        return f"[{', '.join(spec_text(item) for item in plain)}]"
    return repr(plain) if isinstance(plain, str) else str(plain)


def recipe_text(recipe: Any) -> str:
    """The steps of a plain recipe on one line."""
    return " → ".join(spec_text(step) for step in recipe_steps(recipe)) or "none"


def recipe_steps(recipe: Any) -> Sequence[Any]:
    """The list of steps in a plain recipe, with or without its format version."""
    steps = recipe.get("recipe", []) if isinstance(recipe, Mapping) else recipe
    return steps if isinstance(steps, list | tuple) else []


def stored_text(dtypes: Mapping[str, Any]) -> str:
    """What a file stores, largest first: `int8 20.9 kB, int32 320 B`."""
    stored = dtypes.get("stored") or {}
    return ", ".join(f"{name} {bytes_text(n)}" for name, n in sorted(stored.items(), key=lambda item: -item[1])) or "nothing"


def computed_text(dtypes: Mapping[str, Any]) -> str:
    """What a file computes: `QLinearConv uint8 ×2, QGemm uint8 ×2`."""
    computed = dtypes.get("computed") or {}
    parts = [f"{op} {dtype} ×{n}" for op, counts in computed.items() for dtype, n in counts.items()]
    return ", ".join(parts) or "nothing"


def environment_rows(environment: Any, prefix: str = "") -> list[tuple[str, str]]:
    """An environment record as (name, text) rows; nested mappings become `versions.torch`-like names."""
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            rows.extend(environment_rows(value, f"{prefix}{key} · "))
        elif key.endswith("_bytes") and isinstance(value, int):
            rows.append((f"{prefix}{key.removesuffix('_bytes')}", bytes_text(value)))
        elif isinstance(value, list | tuple):
            rows.append((f"{prefix}{key}", ", ".join(str(item) for item in value) or "none"))
        else:
            rows.append((f"{prefix}{key}", "unknown" if value is None else str(value)))
    return rows

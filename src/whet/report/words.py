"""Numbers (of `whet.texts`) and specs in the words of a report. Every text here is plain: whoever draws it escapes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from whet.runtimes.comparison import OPENING
from whet.texts import bytes_text as bytes_text
from whet.texts import drop_text as drop_text
from whet.texts import interval as interval
from whet.texts import is_percentage as is_percentage
from whet.texts import ms_text as ms_text
from whet.texts import percent as percent
from whet.texts import printable as printable
from whet.texts import ratio_text as ratio_text
from whet.texts import score as score
from whet.texts import score_with_interval as score_with_interval
from whet.texts import significant as significant


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

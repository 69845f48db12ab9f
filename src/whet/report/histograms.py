"""The values of a weight before and after a step as two outlines, small enough for a cell of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.report import words

WIDTH, HEIGHT = 128, 34


@dataclass(frozen=True, slots=True)
class Drawn:
    """before, after: SVG paths. counts: the same as texts of numbers, from which the page tells what the pointer is on."""

    before: str
    after: str
    low: float
    high: float
    counts_before: str
    counts_after: str
    label: str


def drawn(histogram: Mapping[str, Any]) -> Drawn:
    """The outlines of one record of `whet.numerics.histograms`. A bar's height is the square root of its count, so that
    the spike of zeros that pruning leaves does not flatten everything else."""
    low, high = map(float, histogram["edges"])
    before, after = ([int(count) for count in histogram[key]] for key in ("before", "after"))
    top = math.sqrt(max(1, *before, *after))
    label = f"values from {words.significant(low)} to {words.significant(high)}, before (filled) and after (line)"
    return Drawn(
        _outline(before, top) + f"V{HEIGHT}Z",
        _outline(after, top) + f"V{HEIGHT}",
        low,
        high,
        ",".join(map(str, before)),
        ",".join(map(str, after)),
        label,
    )


def _outline(counts: Sequence[int], top: float) -> str:
    width = f"{WIDTH / len(counts):g}"
    parts = [f"M0 {HEIGHT}"]
    height = None
    for count in counts:
        y = f"{HEIGHT - (HEIGHT - 1) * math.sqrt(count) / top:.1f}".removesuffix(".0")
        if y != height:
            parts.append(f"V{y}")
        parts.append(f"h{width}")
        height = y
    return "".join(parts)

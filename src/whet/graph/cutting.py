"""What a removal tells and carries along, the same for every framework: smaller weights, masks, constants, how exact it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.graph.groups import Gone, Groups
from whet.graph.ids import IntArray
from whet.graph.views import Masks

Floats = npt.NDArray[np.float64]
SILENT, CONSTANT, VARYING = 0, 1, 2
_CONSTANT = 1e-4  # of a channel's largest value: what it may vary by and be called constant


def changed(groups: Groups, gone: Gone) -> tuple[dict[str, Any], ...]:
    """A row for each smaller parameter: `{"name", "parameters", "removed", "shape", "left"}`, shapes before and after."""
    rows = []
    for name, axes in groups.kept(gone).items():
        held = groups.structure.held[name]
        if held.is_parameter:
            left = [len(axes[d]) if d in axes else n for d, n in enumerate(held.shape)]
            size = math.prod(held.shape)
            removed = 1 - math.prod(left) / size
            rows.append({"name": name, "parameters": size, "removed": removed, "shape": list(held.shape), "left": left})
    return tuple(rows)


def cut_masks(masks: Masks, kept: Mapping[str, Mapping[int, IntArray]]) -> Masks:
    """Masks of tensors that have lost positions, without these."""
    out = {}
    for name, mask in masks.items():
        for axis, positions in kept.get(name, {}).items():
            mask = np.take(mask, positions, axis)
        out[name] = np.ascontiguousarray(mask)
    return out


def difference(found: list[Any], expected: list[Any]) -> float:
    """The largest difference of any output, over the largest value of that output; infinite where shapes or integers differ."""
    if len(found) != len(expected):
        return math.inf
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if one.shape != two.shape:
            return math.inf
        if one.size and two.dtype.kind == "f":
            finite = np.isfinite(two)
            if not np.array_equal(one[~finite], two[~finite], equal_nan=True):
                return math.inf
            gap = np.abs(one[finite].astype(np.float64) - two[finite]).max(initial=0.0)
            worst = max(worst, float(gap / max(np.abs(two[finite]).max(initial=0.0), 1e-12)))
        elif not np.array_equal(one, two):
            return math.inf
    return worst if math.isfinite(worst) else math.inf


def kinds_of(low: Floats, high: Floats) -> IntArray:
    """From the least and greatest value of each channel: always zero, always another number, or neither."""
    largest = np.maximum(np.abs(low), np.abs(high))
    return np.where(high - low <= _CONSTANT * largest, np.where(largest == 0, SILENT, CONSTANT), VARYING)


@dataclass(slots=True)
class Constants:
    """What was done about channels that leave.

    silent, constant, varying: how many groups were zero, always another number, or neither. folded, left: rows of layers
    whose readers got the constant, and of those that could not. before: changed tensors, and what they held.
    """

    silent: int = 0
    constant: int = 0
    varying: int = 0
    folded: list[dict[str, Any]] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)
    before: list[tuple[Any, Any]] = field(default_factory=list)

    def count(self, kinds: Iterable[int]) -> None:
        """Count the groups; what no reader saw varies."""
        counted = Counter(kinds)
        self.silent, self.constant = counted[SILENT], counted[CONSTANT]
        self.varying = counted.total() - self.silent - self.constant

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the step's record."""
        counts = {"silent": self.silent, "constant": self.constant, "varying": self.varying}
        return {**counts, "folded": self.folded, "left": self.left}

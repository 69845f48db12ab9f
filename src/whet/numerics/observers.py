"""Observers: what range a tensor takes, seen batch by batch in constant memory."""

from __future__ import annotations

from dataclasses import dataclass

from whet.numerics.namespace import Array, Namespace


@dataclass(frozen=True, slots=True)
class Range:
    """The least and greatest value seen, and how many values that were."""

    low: float
    high: float
    count: int

    @property
    def is_finite(self) -> bool:
        """Whether neither NaN nor Inf was seen."""
        return self.low - self.low == 0 and self.high - self.high == 0


def observe_minmax(state: Range | None, x: Array, *, xp: Namespace) -> Range:
    """The range of everything seen so far and of `x`. NaN and Inf stay visible in the result."""
    count = 1
    for size in x.shape:
        count *= int(size)
    if count == 0:
        return state if state is not None else Range(float("inf"), float("-inf"), 0)
    low, high = float(xp.min(x)), float(xp.max(x))
    if state is None or state.count == 0:
        return Range(low, high, count)
    # min() and max() of Python drop a NaN that stands second; the sum keeps it.
    if low != low or state.low != state.low:
        low = high = float("nan")
    else:
        low, high = min(low, state.low), max(high, state.high)
    return Range(low, high, state.count + count)


def channel_range(weight: Array, axis: int | None, *, xp: Namespace) -> tuple[Array, Array]:
    """Least and greatest value of `weight` per index of `axis`: shape (channels,), or () when `axis` is None."""
    if axis is None:
        return xp.min(weight), xp.max(weight)
    others = tuple(i for i in range(len(weight.shape)) if i != axis % len(weight.shape))
    return xp.min(weight, axis=others), xp.max(weight, axis=others)

"""K-means in one dimension: the levels of least squared error, found exactly and not by a random restart.

Sorted, every cluster is an interval, and dynamic programming over intervals finds the optimum (Wang & Song 2011,
"Ckmeans.1d.dp", The R Journal 3/2; see `whet.numerics.intervals`). Rows with more than `EXACT` values are first merged into
hundreds of narrow bins, solved exactly, and then moved by Lloyd's steps over all values, exactly, from sums of sorted blocks.

Shapes: R rows (tensors, channels or groups), n values in each, k clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import DataError, SpecError
from whet.numerics.intervals import Sums, optimal_means

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

EXACT = 2048  # values in a row up to which the optimum is exact
BINS = (256, 1024)  # of even width, and as many of even count, that longer rows are merged into: the least, and the most
VALUES_PER_BIN = 64  # in between
BATCH = 1 << 22  # values times clusters solved together: bounds the memory
UNBLOCKED = 1 << 20  # values in a row up to which every prefix sum is kept
BLOCK = 1024  # values of a longer row whose sums are kept
LLOYD_STEPS = 200


def kmeans_levels(
    values: Array, clusters: int, *, importance: Array | None = None, keep_zero: bool = False
) -> npt.NDArray[np.float32]:
    """The levels `c` that minimise `Σ h (x - c(x))²`, `c(x)` being the nearest to x: (R, k) float32, ascending.

    values: (R, n), each row for itself. importance: h, not negative, broadcasting against values (such as the diagonal of the
    Hessian); 1 by default. keep_zero: one level is exactly 0, for pruned weights, and the others are the best beside it.
    Where a row has fewer distinct values than clusters, its greatest level repeats. For rows of up to `EXACT` values the
    result is optimal, for longer ones a fixed point of Lloyd's iteration beside the optimum.

    Raises:
        SpecError: clusters is not positive.
        DataError: values are not finite or not in rows, or importance is negative or not finite.
    """
    values = np.asarray(values)
    weights = _checked(values, clusters, importance)
    rows, size = values.shape
    found = np.zeros((rows, clusters), np.float32)
    if size == 0:
        return found
    solve, step = (_optimal, BATCH // (size * clusters)) if size <= EXACT else (_near_optimal, BATCH // size)
    for first in range(0, rows, max(1, step)):
        part = slice(first, first + max(1, step))
        found[part] = solve(values[part], clusters, None if weights is None else weights[part], keep_zero)
    return found


def squared_error(values: Array, levels: Array, *, importance: Array | None = None) -> Floats:
    """`Σ h (x - c(x))²` of each row, (R,) in float64, `c(x)` being the nearest of the row's levels (R, k)."""
    values = np.asarray(values)
    weights = _checked(values, 1, importance)
    errors = np.zeros(values.shape[0])
    for row, table in enumerate(np.sort(np.asarray(levels, np.float64), axis=1)):
        exact = values[row].astype(np.float64)
        missed = exact - table[np.searchsorted((table[1:] + table[:-1]) / 2, exact)]
        missed *= missed
        errors[row] = missed.sum() if weights is None else np.dot(missed, weights[row])
    return errors


def _checked(values: Array, clusters: int, importance: Array | None) -> Floats | None:
    """The importance in the shape of `values`."""
    if clusters < 1:
        raise SpecError(f"kmeans_levels needs at least 1 cluster, got {clusters}.")
    if values.ndim != 2:
        raise DataError(f"kmeans_levels needs values in rows, (rows, values), got the shape {values.shape}: reshape them.")
    if values.size and not np.isfinite(values.min() + values.max()):
        raise DataError("kmeans_levels got NaN or Inf among the values, which no level is near: find the layer they come from.")
    if importance is None:
        return None
    weights = np.asarray(importance, np.float64)
    if weights.size and not (weights.min() >= 0 and np.isfinite(weights.max())):
        raise DataError("kmeans_levels needs an importance that is finite and not negative for every value.")
    return np.broadcast_to(weights, values.shape)


def _optimal(values: Array, clusters: int, weights: Floats | None, keep_zero: bool) -> Floats:
    """The optimal levels of every row, (R, k), ascending."""
    if weights is None:
        ordered = np.sort(values, axis=1).astype(np.float64)
    else:
        order = np.argsort(values, axis=1, kind="stable")
        ordered = np.take_along_axis(values, order, 1).astype(np.float64)
        weights = np.take_along_axis(weights, order, 1)
    # Counted from the mean, sums of values far from zero keep their digits. The level at zero must stay where it is.
    shift = np.zeros((len(ordered), 1)) if keep_zero else ordered.mean(axis=1, keepdims=True)
    means = optimal_means(Sums.of(ordered - shift, weights), clusters, zero=keep_zero)
    return np.asarray(means + shift, np.float64)


def _near_optimal(values: Array, clusters: int, weights: Floats | None, keep_zero: bool) -> Floats:
    """The levels of rows too long for the exact solution, (R, k), ascending: bins solved exactly, then Lloyd's steps."""
    rows = [_Blocks(row, None if weights is None else weights[index]) for index, row in enumerate(values)]
    bins = [blocks.bins() for blocks in rows]
    most = max(middles.size for middles, _ in bins)
    middles = np.stack([np.pad(m, (0, most - m.size), mode="edge") for m, _ in bins])
    weight = np.stack([np.pad(w, (0, most - w.size)) for _, w in bins])
    levels = _optimal(middles, clusters, weight, keep_zero)
    return np.stack([_settled(blocks, start, keep_zero) for blocks, start in zip(rows, levels, strict=True)])


def _settled(blocks: _Blocks, levels: Floats, keep_zero: bool) -> Floats:
    """Lloyd's iteration from `levels` (k,): each becomes the mean of what is nearest to it, until nothing moves."""
    pinned = int(np.argmin(np.abs(levels))) if keep_zero else None
    for _ in range(LLOYD_STEPS):
        weight, first = np.diff(blocks.sums(blocks.bounds(levels)), axis=1)
        moved = np.divide(first, weight, out=levels.copy(), where=weight > 0)
        if pinned is not None:
            moved[pinned] = 0.0
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels


class _Blocks:
    """A sorted row with the sums of h and h·x over its blocks, from which the sum over any interval takes one block's time."""

    def __init__(self, values: Array, weights: Floats | None) -> None:
        if weights is None:
            self.values, self._weighted, self._weights = np.sort(values), None, None
        else:
            order = np.argsort(values, kind="stable")
            self.values, self._weights = values[order], weights[order]
            self._weighted = self.values * self._weights
        self._block = 1 if values.size <= UNBLOCKED else BLOCK
        self._first_before = self._prefix(self.values if self._weighted is None else self._weighted)
        self._weight_before = None if self._weights is None else self._prefix(self._weights)

    def _prefix(self, array: Array) -> Floats:
        """The sum before each block, (blocks + 1,)."""
        whole = array.size // self._block * self._block
        sums = array[:whole].reshape(-1, self._block).sum(axis=1, dtype=np.float64)
        return np.concatenate([[0.0], np.cumsum(sums)])

    def sums(self, at: npt.NDArray[np.intp]) -> Floats:
        """The sums of h and of h·x over the values before each of `at`: (2, len(at))."""
        first = self._before(at, self._first_before, self.values if self._weighted is None else self._weighted)
        if self._weights is None or self._weight_before is None:
            return np.stack([at.astype(np.float64), first])
        return np.stack([self._before(at, self._weight_before, self._weights), first])

    def _before(self, at: npt.NDArray[np.intp], prefix: Floats, array: Array) -> Floats:
        found = prefix[at // self._block]
        if self._block > 1:
            found = found + [array[i // self._block * self._block : i].sum(dtype=np.float64) for i in at.tolist()]
        return np.asarray(found)

    def bounds(self, levels: Floats) -> npt.NDArray[np.intp]:
        """Where the values of each level begin and end, (k + 1,): a value half-way between two levels goes to the lower."""
        inner = np.searchsorted(self.values, ((levels[1:] + levels[:-1]) / 2).astype(self.values.dtype), side="right")
        return np.concatenate([[0], inner, [self.values.size]]).astype(np.intp)

    def bins(self) -> tuple[Floats, Floats]:
        """Mean and weight of narrow bins of even width and of even count, ascending; a value where all weigh nothing."""
        low, high = float(self.values[0]), float(self.values[-1])
        bins = min(max(BINS[0], self.values.size // VALUES_PER_BIN), BINS[1])
        even = np.searchsorted(self.values, np.linspace(low, high, bins + 1)[1:-1].astype(self.values.dtype))
        at = np.unique(np.concatenate([even, np.linspace(0, self.values.size, bins + 1).astype(np.intp)]))
        weight, first = np.diff(self.sums(at), axis=1)
        middles = np.divide(first, weight, out=self.values[at[:-1]].astype(np.float64), where=weight > 0)
        return middles, weight

"""Moments of a layer's inputs over calibration data, and what they say about its output: all that rounding needs to know.

For rows `x` of the im2col'ed input, a weight `W` (rows = outputs, columns = inputs), and `x̂`, the same inputs as the compressed
model sees them, the mean squared error of an output is a quadratic of the rounded weight `Ŵ`,

    E|W x − Ŵ x̂|² = tr(W H Wᵀ) − 2 tr(W C Ŵᵀ) + tr(Ŵ Ĥ Ŵᵀ),    H = E[x xᵀ],  C = E[x x̂ᵀ],  Ĥ = E[x̂ x̂ᵀ],

so that the data is no longer needed once H, C and Ĥ are known. With a bias that is free to follow, moments become covariances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import DataError

Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]
BLOCK_ROWS = 8192  # float32 products are summed over at most so many rows before they join the float64 sums


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What calibration remembers of the inputs of one weight, in float64.

    second: `E[x xᵀ]` (columns, columns). mean, absmax: (columns,). count: rows seen. With compressed inputs `x̂` seen beside:
    second_quantized `E[x̂ x̂ᵀ]`, cross `E[x x̂ᵀ]` (row: x, column: x̂) and mean_quantized, else None.
    """

    second: Float64s
    mean: Float64s
    absmax: Float64s
    count: int
    second_quantized: Float64s | None = None
    cross: Float64s | None = None
    mean_quantized: Float64s | None = None

    @property
    def columns(self) -> int:
        """How many inputs a row has."""
        return int(self.mean.shape[0])

    @property
    def inputs(self) -> Float64s:
        """The second moment of what the compressed layer reads: of `x̂` where it was seen, else of `x`."""
        return self.second if self.second_quantized is None else self.second_quantized

    def centered(self) -> Moments:
        """Covariances in place of second moments: the error that is left when a free bias takes up the means."""
        mean_quantized = self.mean_quantized
        if self.cross is None or self.second_quantized is None or mean_quantized is None:
            return Moments(_less(self.second, self.mean, self.mean), self.mean, self.absmax, self.count)
        return Moments(
            _less(self.second, self.mean, self.mean),
            self.mean,
            self.absmax,
            self.count,
            _less(self.second_quantized, mean_quantized, mean_quantized),
            _less(self.cross, self.mean, mean_quantized),
            mean_quantized,
        )


def update(state: Moments | None, x: Floats, x_quantized: Floats | None = None) -> Moments:
    """The moments of everything seen so far and of the rows of `x` (rows, columns), in constant memory.

    x_quantized: the same rows as the compressed model sees them; given always or never.

    Raises:
        DataError: shapes that do not fit, no rows, or values that are not finite.
    """
    _check(state, x, x_quantized)
    blocks = range(0, x.shape[0], BLOCK_ROWS)
    for start in blocks:
        rows = slice(start, start + BLOCK_ROWS)
        found = _of_block(x[rows], None if x_quantized is None else x_quantized[rows])
        state = found if state is None else merge(state, found)
    if state is None:
        raise DataError("Moments need at least one row of inputs, got none. Give calibration data that is not empty.")
    return state


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of rows together."""
    count = a.count + b.count
    share = b.count / count

    def mixed(old: Float64s | None, new: Float64s | None) -> Float64s | None:
        return None if old is None or new is None else old + (new - old) * share

    return Moments(
        a.second + (b.second - a.second) * share,
        a.mean + (b.mean - a.mean) * share,
        np.maximum(a.absmax, b.absmax),
        count,
        mixed(a.second_quantized, b.second_quantized),
        mixed(a.cross, b.cross),
        mixed(a.mean_quantized, b.mean_quantized),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """The error of each output row as a function of its rounded weight `ŵ`: `ŵᵀ H ŵ − 2 bᵀ ŵ + c`.

    hessian H: (columns, columns), `E[x̂ x̂ᵀ]`. linear b: (rows, columns), `E[t x̂ᵀ]` of the wanted outputs t. constant c: (rows,),
    `E[t²]`. `reconstruction` makes it for the layer's own outputs; other targets serve as well.
    """

    hessian: Float64s
    linear: Float64s
    constant: Float64s

    def error(self, weight: Floats) -> Float64s:
        """Mean squared error of each output, (rows,), for `weight` (rows, columns); never below 0."""
        weight = np.asarray(weight, np.float64)
        parabola = np.einsum("rc,rc->r", weight @ self.hessian - 2 * self.linear, weight)
        return np.asarray(np.maximum(parabola + self.constant, 0.0), np.float64)

    def damped(self, near: Floats, damping: float) -> Quadratic:
        """The error plus `λ · |ŵ − near|²`: what the data does not tell stays near.

        near: (rows, columns), the float weight. λ is `damping` times the mean diagonal of H.
        """
        added = damping * mean_diagonal(self.hessian)
        exact = np.asarray(near, np.float64)
        hessian = self.hessian + added * np.eye(self.hessian.shape[0])
        return Quadratic(hessian, self.linear + added * exact, self.constant + added * np.sum(exact**2, axis=1))


def mean_diagonal(hessian: Floats) -> float:
    """Mean of the positive entries on the diagonal; 1 where none is."""
    diagonal = np.einsum("ii->i", hessian)
    alive = diagonal[diagonal > 0]
    return float(np.mean(alive)) if alive.size else 1.0


def reconstruction(weight: Floats, moments: Moments) -> Quadratic:
    """`E|W x − Ŵ x̂|²` as a quadratic of `Ŵ`; hand in `moments.centered()` where the bias will be corrected.

    weight: (rows, columns), the float weight.
    """
    if weight.ndim != 2 or weight.shape[1] != moments.columns:
        raise DataError(f"The weight must be (rows, {moments.columns}) as the moments are, got {tuple(weight.shape)}.")
    exact = np.asarray(weight, np.float64)
    of_outputs = exact @ moments.second
    linear = of_outputs if moments.cross is None else exact @ moments.cross
    return Quadratic(moments.inputs, linear, np.einsum("rc,rc->r", of_outputs, exact))


def _of_block(x: Floats, x_quantized: Floats | None) -> Moments:
    count = x.shape[0]
    second = (x.T @ x).astype(np.float64) / count
    mean = np.asarray(np.mean(x, axis=0, dtype=np.float64), np.float64)
    absmax = np.max(np.abs(x), axis=0).astype(np.float64)
    if x_quantized is None:
        return Moments(second, mean, absmax, count)
    return Moments(
        second,
        mean,
        absmax,
        count,
        (x_quantized.T @ x_quantized).astype(np.float64) / count,
        (x.T @ x_quantized).astype(np.float64) / count,
        np.asarray(np.mean(x_quantized, axis=0, dtype=np.float64), np.float64),
    )


def _less(second: Float64s, left: Float64s, right: Float64s) -> Float64s:
    """A covariance; variances that rounding made negative are 0."""
    covariance = second - np.outer(left, right)
    diagonal = np.einsum("ii->i", covariance)
    if left is right:
        covariance = (covariance + covariance.T) / 2
        diagonal = np.einsum("ii->i", covariance)
        tiny = diagonal <= 1e-12 * np.einsum("ii->i", second)
        covariance[tiny, :] = covariance[:, tiny] = 0.0
    return covariance


def _check(state: Moments | None, x: Floats, x_quantized: Floats | None) -> None:
    if x.ndim != 2:
        raise DataError(f"Inputs must be (rows, columns), got shape {tuple(x.shape)}. Unfold convolutions' inputs first.")
    if state is not None and x.shape[1] != state.columns:
        raise DataError(f"Inputs had {state.columns} columns before and have {x.shape[1]} now.")
    if x_quantized is not None and x_quantized.shape != x.shape:
        raise DataError(f"Float and quantized inputs must pair up, got {tuple(x.shape)} and {tuple(x_quantized.shape)}.")
    if state is not None and (state.cross is None) != (x_quantized is None):
        raise DataError("Quantized inputs must be given for every batch or for none.")
    for name, array in (("Inputs", x), ("Quantized inputs", x_quantized)):
        if array is not None and not np.all(np.isfinite(array)):
            raise DataError(f"{name} hold NaN or Inf. Find the batch with whet.inspect, or clean the calibration data.")

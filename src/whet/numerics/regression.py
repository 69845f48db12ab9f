"""Moments of a layer's inputs and wanted outputs: all that rounding the layer, and correcting its bias, needs to know.

`x̂` are rows of the im2col'ed input as the compressed model sees them, `t` the outputs that are wanted for them: those of the
float model. With `Ŵ` the rounded weight and a bias `b`,

    E|t − Ŵ x̂ − b|² = tr(Ŵ Ĥ Ŵᵀ) − 2 tr(B Ŵᵀ) + c,    Ĥ = E[x̂ x̂ᵀ],  B = E[(t − b) x̂ᵀ],  c = E|t − b|²,

and with a bias that is free, `b = E[t] − Ŵ E[x̂]`, all three are covariances. `t` has one column for each output, which costs
less than the moments between float and quantized inputs, and may hold more than the layer's own output: what the other
branch of a sum has lost by quantization.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.errors import DataError
from whet.numerics.moments import Float64s, Floats, Moments, Quadratic


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """What calibration remembers of one weight (or one group of a grouped convolution), in float64.

    second: `E[x̂ x̂ᵀ]` (columns, columns). mean, absmax: (columns,) of x̂. cross: `E[t x̂ᵀ]` (rows, columns). target_mean,
    target_second: `E[t]`, `E[t²]` (rows,). count: rows of data seen.
    """

    second: Float64s
    mean: Float64s
    absmax: Float64s
    cross: Float64s
    target_mean: Float64s
    target_second: Float64s
    count: int

    @property
    def moments(self) -> Moments:
        """The inputs alone."""
        return Moments(self.second, self.mean, self.absmax, self.count)

    def part(self, rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]) -> Regression:
        """Of some outputs, and of some inputs."""
        at, read = np.flatnonzero(rows), np.flatnonzero(columns)
        return Regression(
            self.second[np.ix_(read, read)],
            self.mean[read],
            self.absmax[read],
            self.cross[np.ix_(at, read)],
            self.target_mean[at],
            self.target_second[at],
            self.count,
        )

    def quadratic(self, bias: Floats | None) -> Quadratic:
        """The output error as a function of the rounded weight; bias: (rows,) as it is, or None where it is free."""
        if bias is None:
            cross = self.cross - np.outer(self.target_mean, self.mean)
            return Quadratic(self.moments.centered().second, cross, self.target_variance)
        fixed = np.asarray(bias, np.float64)
        constant = self.target_second - 2 * fixed * self.target_mean + fixed**2
        return Quadratic(self.second, self.cross - np.outer(fixed, self.mean), np.maximum(constant, 0.0))

    @property
    def target_variance(self) -> Float64s:
        """(rows,)."""
        return np.asarray(np.maximum(self.target_second - self.target_mean**2, 0.0), np.float64)

    def free_bias(self, weight: Floats) -> Float64s:
        """`E[t] − Ŵ E[x̂]`, (rows,): the bias of least error for the rounded `weight` (rows, columns)."""
        return np.asarray(self.target_mean - np.asarray(weight, np.float64) @ self.mean, np.float64)

    def output_variance(self, weight: Floats) -> Float64s:
        """Variance of `Ŵ x̂`, (rows,)."""
        exact = np.asarray(weight, np.float64)
        variance = np.einsum("rc,rc->r", exact @ self.moments.centered().second, exact)
        return np.asarray(np.maximum(variance, 0.0), np.float64)


def regression(inputs: Floats, targets: Floats) -> Regression:
    """The moments of one block of data: inputs x̂ (n, columns), targets t (n, rows). Products are in the dtype of `inputs`.

    Raises:
        DataError: shapes that do not fit, no rows, or values that are not finite.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or inputs.shape[0] != targets.shape[0] or not inputs.shape[0]:
        raise DataError(f"Inputs (n, columns) and targets (n, rows) must pair up, got {inputs.shape} and {targets.shape}.")
    count = inputs.shape[0]
    return checked(
        Regression(
            (inputs.T @ inputs).astype(np.float64) / count,
            np.asarray(np.mean(inputs, axis=0, dtype=np.float64), np.float64),
            np.max(np.abs(inputs), axis=0).astype(np.float64),
            (targets.T @ inputs).astype(np.float64) / count,
            np.asarray(np.mean(targets, axis=0, dtype=np.float64), np.float64),
            np.asarray(np.mean(np.square(targets, dtype=np.float64), axis=0), np.float64),
            count,
        )
    )


def checked(state: Regression) -> Regression:
    """`state`, whose values are finite.

    Raises:
        DataError: they are not.
    """
    for array in (state.second, state.cross, state.target_second):
        if not np.all(np.isfinite(array)):
            raise DataError(
                "A layer's inputs or outputs hold NaN or Inf. Clean the calibration data, or look at earlier weights."
            )
    return state


def merged(a: Regression | None, b: Regression) -> Regression:
    """The moments of two sets of rows together."""
    if a is None:
        return b
    count = a.count + b.count
    share = b.count / count

    def mixed(old: Float64s, new: Float64s) -> Float64s:
        return np.asarray(old + (new - old) * share, np.float64)

    return Regression(
        mixed(a.second, b.second),
        mixed(a.mean, b.mean),
        np.maximum(a.absmax, b.absmax),
        mixed(a.cross, b.cross),
        mixed(a.target_mean, b.target_mean),
        mixed(a.target_second, b.target_second),
        count,
    )


def reconstructed(seen: Regression, near: Floats, bias: Floats | None, damping: float) -> Float64s:
    """The weight (rows, columns) of least `E|t - W x̂ - b|² + λ |W - near|²`.

    near: (rows, columns). bias: (rows,) as it is, or None where it is free. λ is `damping + columns / rows of data` of the mean
    `E[x̂²]`: few rows tell little about many columns.
    """
    error = seen.quadratic(bias).damped(near, damping + near.shape[1] / max(seen.count, 1))
    return np.asarray(np.linalg.solve(error.hessian, error.linear.T).T, np.float64)

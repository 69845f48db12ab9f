"""Whether an exported file returns what its model does."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ExportError

TOLERANCE = 1e-3  # of the largest output: what float kernels may differ by


def check_output(expected: npt.NDArray[Any], found: npt.NDArray[Any], where: str, *, quantized: bool) -> None:
    """Compare one output of a file with the model's; `where` names both in errors. Integers are compared by shape alone.

    Of float files the largest error counts. Integer kernels round differently by a step here and there, while a file that is
    wrong is off by the size of the outputs: of quantized files the root mean square counts.

    Raises:
        ExportError: another shape, NaN or Inf, or values that differ by more than kernels do.
    """
    if expected.shape != found.shape:
        raise ExportError(f"{where}: the file returns the shape {found.shape}, the model {expected.shape}.")
    if expected.dtype.kind != "f" or expected.size == 0:
        return
    if not np.isfinite(found).all():
        raise ExportError(f"{where}: the file returns NaN or Inf, the model does not.")
    error = np.abs(expected.astype(np.float64) - found)
    largest = float(np.abs(expected).max())
    if quantized:
        wrong = _root_mean_square(error) > 0.5 * _root_mean_square(expected) + 1e-6
    else:
        wrong = float(error.max()) > TOLERANCE * max(largest, 1e-3)
    if wrong:
        raise ExportError(
            f"{where}: the file differs from the model by up to {error.max():.3g} (outputs reach {largest:.3g}). "
            "Please report this model; the file was not kept."
        )


def _root_mean_square(array: npt.NDArray[Any]) -> float:
    return float(np.sqrt((array.astype(np.float64) ** 2).mean()))

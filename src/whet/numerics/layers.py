"""How much a block of a model matters, from what it does to its input or to the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def vectors(array: Array) -> npt.NDArray[np.float64]:
    """The states in a block's input or output, (vectors, size): one a token of 3 axes, else one an example."""
    array = np.asarray(array, np.float64)
    return array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array.reshape(len(array), -1)


def influence(before: Array, after: Array) -> tuple[float, int]:
    """`Σ (1 - cos(x, y))` over all vectors, and how many: the block's influence is their quotient.

    Block Influence (Men et al. 2024, ShortGPT, arXiv:2403.03853, eq. 1); 0 where nothing is turned. Vectors of zeros that stay
    so are not turned, others are.
    """
    x, y = vectors(before), vectors(after)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide(np.sum(x * y, axis=1), norms, out=np.zeros(len(x)), where=norms > 0)
    still = (norms == 0) & np.all(x == y, axis=1)
    return float(np.sum(1 - np.where(still, 1.0, cosine))), len(x)


def output_error(reference: Sequence[Array], changed: Sequence[Array]) -> float:
    """`Σ (r - a)² / Σ r²` over all outputs; the numerator where the reference is zero."""
    pairs = [(np.asarray(r, np.float64), np.asarray(a, np.float64)) for r, a in zip(reference, changed, strict=True)]
    error, power = (
        float(sum(np.sum(np.square(part)) for part in parts)) for parts in ([r - a for r, a in pairs], [r for r, _ in pairs])
    )
    return error / power if power else error

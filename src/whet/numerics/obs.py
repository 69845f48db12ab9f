"""Pruning that makes up for what it removes: SparseGPT, a row-wise optimal brain surgeon.

Frantar & Alistarh 2023, arXiv:2301.00774. Legend: W (n, c) weights, H (c, c) `2 X Xᵀ` of the layer's inputs, M the mask.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from whet.errors import DataError

Floats = npt.NDArray[np.float64]


def sparsegpt(
    weight: Floats,
    hessian: Floats,
    *,
    count: int = 0,
    keep: int = 0,
    m: int = 0,
    removed: npt.NDArray[np.bool_] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """The pruned weights with the others updated, and the mask (Algorithm 1).

    Columns are done from the left. The weight w_c with the least `w_c² / [H⁻¹]_cc²` of its block goes, `[H⁻¹]_cc` read off the
    Cholesky factor U of H⁻¹ (`H⁻¹ = Uᵀ U`), and its error `w_c / U_cc` is spread over the columns to the right: `W -= e · U_c`.

    Args:
        weight: (n, c). hessian: (c, c), symmetric and positive semi-definite; an input that is always 0 has a zero row.
        count: how many weights go in all, those of `removed` among them, each block of columns its share of the others; not
            used where m is given.
        keep, m: instead, `keep` of every m neighbouring columns of a row.
        removed: (n, c), what goes in any case.
        block: columns between two choices of the mask. damping: a fraction of the mean of H's diagonal, added to it.

    Raises:
        DataError: the Hessian is not finite, of another size, or cannot be inverted.
    """
    n, c = weight.shape
    if hessian.shape != (c, c) or not np.isfinite(hessian).all():
        raise DataError(f"The Hessian of a weight {weight.shape} must be finite and ({c}, {c}), got {hessian.shape}.")
    work, upper = weight.astype(np.float64).copy(), inverse_factor(hessian.astype(np.float64), damping)
    diagonal = np.diag(upper)
    gone = np.zeros((n, c), bool) if removed is None else removed
    mask = np.ones((n, c), np.uint8)
    block = max(block // m, 1) * m if m else block
    edges = [*range(0, c, block), c]
    counts = _shares(gone, max(count, int(gone.sum())), edges)
    for (start, end), share in zip(pairwise(edges), counts, strict=True):
        errors = np.zeros((n, end - start))
        if not m:
            mask[:, start:end] = _keep_highest(_scores(work, diagonal, gone, start, end), share)
        for j in range(start, end):
            if m and (j - start) % m == 0:
                score = _scores(work, diagonal, gone, j, min(j + m, c))
                order = np.argsort(score, axis=1, kind="stable")[:, : max(score.shape[1] - keep, 0)]
                np.put_along_axis(mask[:, j : j + m], order, 0, axis=1)
                mask[:, j : j + m][gone[:, j : j + m]] = 0
            error = np.where(mask[:, j] == 0, work[:, j], 0.0) / upper[j, j]
            work[:, j:end] -= np.outer(error, upper[j, j:end])
            errors[:, j - start] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    return np.where(mask == 0, 0.0, work), mask


def inverse_diagonal(hessian: Floats, damping: float = 0.01) -> Floats:
    """`[(H + λI)⁻¹]_cc`, (c,): what the optimal brain surgeon divides by (`numerics.criteria.obs`).

    Raises:
        DataError: the Hessian cannot be inverted.
    """
    diagonal: Floats = (inverse_factor(hessian, damping) ** 2).sum(0)
    return diagonal


def _scores(work: Floats, diagonal: Floats, gone: npt.NDArray[np.bool_], start: int, end: int) -> Floats:
    """`w_c² / U_cc²` of some columns; -inf for what goes in any case."""
    columns = slice(start, end)
    return np.where(gone[:, columns], -np.inf, work[:, columns] ** 2 / diagonal[columns] ** 2)


def _shares(gone: npt.NDArray[np.bool_], count: int, edges: list[int]) -> list[int]:
    """How many weights of each block of columns go, together `count`: those gone, and an even share of the others."""
    own = [int(gone[:, start:end].sum()) for start, end in pairwise(edges)]
    free = [gone.shape[0] * (end - start) - n for (start, end), n in zip(pairwise(edges), own, strict=True)]
    share = (count - sum(own)) / max(sum(free), 1)
    upto = np.round(np.cumsum([0, *free]) * share).astype(int)
    return [n + int(more) for n, more in zip(own, np.diff(upto), strict=True)]


def inverse_factor(hessian: Floats, damping: float) -> Floats:
    """U, upper triangular, with `(H + λI)⁻¹ = Uᵀ U`."""
    damped = hessian.copy()
    diagonal = np.diag(damped).copy()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if (~dead).any() else 1.0
    damped[np.diag_indices_from(damped)] = np.where(dead, mean, diagonal) + damping * mean
    try:
        inverse = np.linalg.inv(damped)
        factor = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float64)
    except np.linalg.LinAlgError as cause:
        raise DataError(f"The Hessian cannot be inverted ({cause}). Give more calibration data, or raise damping.") from cause
    return np.asarray(factor, np.float64)


def _keep_highest(score: Floats, count: int) -> npt.NDArray[np.uint8]:
    """1 but for the `count` lowest; ties by position."""
    mask = np.ones(score.size, np.uint8)
    mask[np.argsort(score.reshape(-1), kind="stable")[:count]] = 0
    return mask.reshape(score.shape)

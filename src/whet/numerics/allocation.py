"""How much each layer loses."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """The fraction each layer keeps: `ε · (Σ sizes) / (Π sizes)`, at most 1, together `density` of all weights.

    ε is solved for; layers that would keep more than all are kept whole and ε solved for the rest (Evci et al. 2020,
    arXiv:1911.11134, appendix A). shapes: of the weights, (out, in, kernel…).
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / max(math.prod(shape), 1) for shape in shapes]
    whole: set[int] = set()
    while len(whole) < len(shapes):
        free = [i for i in range(len(shapes)) if i not in whole]
        left = density * sum(sizes) - sum(sizes[i] for i in whole)
        epsilon = left / sum(raw[i] * sizes[i] for i in free)
        over = [i for i in free if epsilon * raw[i] > 1]
        if not over:
            return [1.0 if i in whole else max(epsilon * raw[i], 0.0) for i in range(len(shapes))]
        whole.update(over)
    return [1.0] * len(shapes)


def rounded_counts(sizes: Sequence[int], fractions: Sequence[float], total: int) -> list[int]:
    """Whole numbers near `fractions · sizes`, each below its size, together `total` where that can be.

    The largest remainders are rounded up first; ties go to the first.
    """
    limits = [max(size - 1, 0) for size in sizes]
    exact = [min(fraction * size, limit) for fraction, size, limit in zip(fractions, sizes, limits, strict=True)]
    counts = [math.floor(value) for value in exact]
    while (missing := min(total, sum(limits)) - sum(counts)) > 0:
        order = sorted((i for i in range(len(sizes)) if counts[i] < limits[i]), key=lambda i: (counts[i] - exact[i], i))
        for i in order[:missing]:
            counts[i] += 1
    return counts


def uniform_counts(sizes: Sequence[int], sparsity: float) -> list[int]:
    """The same fraction of every layer, rounded half to even; never all of one."""
    return [min(round(sparsity * size), max(size - 1, 0)) for size in sizes]


def ranked_counts(scores: Sequence[Floats], sparsity: float, *, most: float = 0.9) -> list[int]:
    """How many of each layer are among the lowest `sparsity` of all; never more than the fraction `most` of a layer.

    Ties go by position, the first layer's first. What a layer may not lose, others lose.
    """
    limits = [min(math.floor(most * len(layer)), len(layer) - 1) for layer in scores]
    owner = np.concatenate([np.full(len(layer), i) for i, layer in enumerate(scores)])
    order = np.argsort(np.concatenate([np.asarray(layer, np.float64) for layer in scores]), kind="stable")
    counts, left = [0] * len(scores), round(sparsity * len(owner))
    for i in owner[order].tolist():
        if left == 0:
            break
        if counts[i] < limits[i]:
            counts[i] += 1
            left -= 1
    return counts


def ranked_within(scores: Sequence[Floats], kinds: Sequence[Hashable], sparsity: float) -> list[int]:
    """As `ranked_counts`, within layers of one kind (isomorphic pruning: Fang et al. 2024, arXiv:2407.04616)."""
    counts = [0] * len(scores)
    for kind in dict.fromkeys(kinds):
        alike = [i for i, other in enumerate(kinds) if other == kind]
        for i, count in zip(alike, ranked_counts([scores[i] for i in alike], sparsity), strict=True):
            counts[i] = count
    return counts


def round_kept(size: int, lost: int, *, step: int, width: int = 1, others: int = 0) -> int:
    """How many of `size` groups leave, near `lost`, so that what is left of the axis is a multiple of `step`.

    width: positions of the axis in each group; others: positions of the axis that these groups do not hold. The nearest
    number is taken, of two the smaller loss; 0 where none leaves at least one group.
    """
    if step == 1 or lost == 0:
        return lost
    fit = [n for n in range(1, size) if (others + (size - n) * width) % step == 0]
    return min([0, *fit], key=lambda n: (abs(n - lost), n)) if fit else 0

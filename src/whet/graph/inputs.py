"""What calibration data shows of the inputs that a weight multiplies: all that Wanda, OBS and SparseGPT need to know."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from whet.graph.matrices import Layout
from whet.numerics.obs import inverse_diagonal, sparsegpt
from whet.specs import OBS

Floats = npt.NDArray[np.float64]
BLOCK = 8192  # rows that are summed in float32
ROWS = 1 << 16  # of one weight, over all calibration data: a sample of the positions where there are more


@dataclass(frozen=True, slots=True)
class Pattern:
    """`keep` of every `m` neighbours along `axis` of a weight stay."""

    keep: int
    m: int
    axis: int


@dataclass(slots=True, eq=False)
class InputSums:
    """Sums over rows `x`, the inputs of one weight of `shape`, which reshaped to that of `layout` becomes its matrices.

    squares: `Σ x²`, (groups, columns). products: `Σ x xᵀ`, (groups, columns, columns), where it was asked for.
    """

    shape: tuple[int, ...]
    layout: Layout
    squares: Floats
    products: Floats | None
    count: int

    def add(self, other: InputSums) -> InputSums:
        """The sums over the rows of both; a weight that is read in two ways is told by the first."""
        if other.layout != self.layout:
            return self
        both = None if self.products is None or other.products is None else self.products + other.products
        return InputSums(self.shape, self.layout, self.squares + other.squares, both, self.count + other.count)

    def norms(self) -> Floats:
        """`√E[x²]` of the input that each weight multiplies, in the weight's shape."""
        return self._spread(np.sqrt(self.squares / self.count))

    def inverse_diagonals(self, damping: float) -> Floats:
        """`[H⁻¹]_cc` with `H = 2 E[x xᵀ]` of the input that each weight multiplies, in the weight's shape.

        Raises:
            DataError: H cannot be inverted.
        """
        return self._spread(np.stack([inverse_diagonal(h, damping) for h in self.hessians()]))

    def hessians(self) -> Floats:
        """`2 E[x xᵀ]`, (groups, columns, columns)."""
        products = self.products
        return np.stack([np.diag(s) for s in self.squares]) if products is None else 2 * products / self.count

    def solve(
        self, weight: npt.NDArray[Any], count: int, pattern: Pattern | None, removed: Any, block: int, damping: float
    ) -> tuple[Floats, npt.NDArray[np.uint8]]:
        """`numerics.obs.sparsegpt` on each group's matrix: the new weight and its mask, in the weight's shape.

        pattern: of an n:m mask, else `count` weights go. removed: what is masked already, or None.

        Raises:
            DataError: H cannot be inverted.
        """
        columns = np.arange(self.squares.shape[1]) if pattern is None else self._along(pattern.axis)
        matrices = self._matrices(weight.astype(np.float64))[..., columns]
        gone = self._matrices(np.zeros(self.shape, bool) if removed is None else removed)[..., columns]
        hessians = self.hessians()[:, columns][:, :, columns]
        options: dict[str, Any] = {"block": block, "damping": damping}
        if pattern is not None:
            options |= {"keep": pattern.keep, "m": pattern.m}
        free = np.cumsum([0, *(int((~part).sum()) for part in gone)])
        upto = np.round(free * max(count - int(gone.sum()), 0) / max(free[-1], 1)).astype(int)
        new, masks, back = [], [], np.argsort(columns)
        for part, old, hessian, more in zip(matrices, gone, hessians, np.diff(upto), strict=True):
            solved, mask = sparsegpt(part, hessian, count=int(old.sum()) + int(more), removed=old, **options)
            new.append(solved[:, back])
            masks.append(mask[:, back])
        return self._array(np.stack(new)), self._array(np.stack(masks))

    def _along(self, axis: int) -> npt.NDArray[np.intp]:
        """The order of the columns in which neighbours lie along `axis` of the weight."""
        stride = math.prod(self.shape[axis + 1 :])
        flat = np.arange(math.prod(self.shape))
        own = flat // stride % self.shape[axis]
        others = flat - own * stride
        found: npt.NDArray[np.intp] = np.lexsort((self._matrices(own)[0, 0], self._matrices(others)[0, 0]))
        return found

    def _matrices(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self.layout.matrices(array.reshape(self.layout.shape))

    def _spread(self, columns: Floats) -> Floats:
        """Values for each column, (groups, columns), at every weight that multiplies it."""
        groups, width = columns.shape
        rows = self.layout.outputs // groups
        return self._array(np.broadcast_to(columns[:, None], (groups, rows, width)))

    def _array(self, matrices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self.layout.array(matrices).reshape(self.shape)


class InputReader(Protocol):
    """Runs a model on data and sums up what its weights read."""

    def sums(self, names: Collection[str], with_products: bool) -> dict[str, InputSums]:
        """By weight name what it reads; weights of layers that are no convolution or linear layer are missing."""

    def assign(self, name: str, value: npt.NDArray[Any]) -> None:
        """*In place*: another value of a weight of the model."""


def sums_of(columns: npt.NDArray[np.float32], shape: tuple[int, ...], layout: Layout, with_products: bool) -> InputSums:
    """The sums over `columns`, (groups, rows, columns): products in float32 over some rows, in float64 over all."""
    groups, rows, width = columns.shape
    squares = np.zeros((groups, width))
    products = np.zeros((groups, width, width)) if with_products else None
    for start in range(0, rows, BLOCK):
        x = columns[:, start : start + BLOCK]
        squares += np.square(x).sum(1)
        if products is not None:
            products += x.transpose(0, 2, 1) @ x
    return InputSums(shape, layout, squares, products, rows)


def statistic(found: InputSums, criterion: Any) -> Floats:
    """What the criterion wants to know of the inputs: for OBS `[H⁻¹]_cc`, else `√E[x²]`, in the weight's shape."""
    return found.inverse_diagonals(criterion.damping) if isinstance(criterion, OBS) else found.norms()

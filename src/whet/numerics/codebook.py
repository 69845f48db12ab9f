"""Non-uniform quantization: `x ≈ scale * levels[code]`, with a table of levels for the tensor or for each row of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.numerics.affine import spread
from whet.numerics.levels import between, nearest_level
from whet.numerics.namespace import Array, numpy_namespace
from whet.specs.schemes import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """A solved non-uniform quantizer, as plain arrays.

    scale: as in `QParams`. levels: float32, ascending, of shape (levels,) for the whole tensor, or (*scale.shape, levels)
    with a table for each scale. axis, group: as in `QParams`.
    """

    levels: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    spec: Scheme
    axis: int | None = None
    group: tuple[int, int] | None = None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.spec.bits

    def encode(self, array: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """The nearest codes of a tensor; half-way between two levels the even code wins (see `whet.numerics.levels`)."""
        scaled = array / spread(self.scale, array.shape, self.axis, self.group)
        if self.levels.ndim == 1:
            codes: npt.NDArray[np.int32] = nearest_level(scaled, self.levels, xp=numpy_namespace)
            return codes
        middles = self.levels[..., 1:] / 2 + self.levels[..., :-1] / 2
        columns = (self._spread(middles[..., index], array.shape) for index in range(middles.shape[-1]))
        found: npt.NDArray[np.int32] = between(scaled, columns, xp=numpy_namespace)
        return found

    def decode(self, codes: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """What `codes` stand for."""
        scale = spread(self.scale, codes.shape, self.axis, self.group)
        if self.levels.ndim == 1:
            values: npt.NDArray[np.float32] = (self.levels[codes] * scale).astype(np.float32)
            return values
        values = np.zeros(codes.shape, np.float32)
        for index in range(self.levels.shape[-1]):
            values += np.where(codes == index, self._spread(self.levels[..., index], codes.shape), 0)
        table: npt.NDArray[np.float32] = (values * scale).astype(np.float32)
        return table

    def _spread(self, column: Array, shape: tuple[int, ...]) -> Array:
        """One column of the tables in a shape that broadcasts against a tensor of `shape`."""
        return column if np.ndim(column) == 0 else spread(column, shape, self.axis, self.group)

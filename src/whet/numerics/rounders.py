"""Rounders: how the values of some columns of a weight become codes. One protocol for integers and for codebooks.

A rounder is called with `values` (rows, k) and the `columns` (k,) they stand in, and returns `(codes, rounded)` of that shape:
integer codes and the values they stand for, in the dtype of `values`. It must return the *nearest* value it can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.numerics.affine import SCALE_FLOOR

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int32]
Columns = npt.NDArray[np.intp]
Rounder = Callable[[Floats, Columns], tuple[Codes, Floats]]


def integer_rounder(
    scale: npt.ArrayLike,
    qmin: int,
    qmax: int,
    *,
    shape: tuple[int, int],
    zero_point: npt.ArrayLike = 0.0,
    group_size: int | None = None,
    order: Columns | None = None,
) -> Rounder:
    """`q = clip(round(w / scale) + zero_point, qmin, qmax)`, half to even; rounded: `scale (q − zero_point)`.

    scale, zero_point: (), (rows,), (rows, 1), or (rows, groups) with `group_size` columns each (the last group may be smaller).
    order: the columns' group by position, `order[i]` being the group of column i, in place of neighbours.
    """
    of_column = _group_of_column(shape[1], group_size, order)
    scales, zeros = _matrix(scale, shape[0], "scale"), _matrix(zero_point, shape[0], "zero_point")
    for name, table in (("scale", scales), ("zero_point", zeros)):
        if table.shape[1] not in (1, int(of_column.max(initial=0)) + 1):
            groups = int(of_column.max(initial=0)) + 1
            raise SpecError(
                f"{name} has {table.shape[1]} groups for {groups} groups of columns; give one for each or one for all."
            )
    scales = np.asfortranarray(np.maximum(scales, SCALE_FLOOR))

    symmetric = not np.any(zeros)

    def round_columns(values: Floats, columns: Columns) -> tuple[Codes, Floats]:
        step = _pick(scales, of_column, columns).astype(values.dtype)
        codes = np.round(values / step)
        if symmetric:
            np.clip(codes, qmin, qmax, out=codes)
            return codes.astype(np.int32), codes * step
        zero = _pick(zeros, of_column, columns).astype(values.dtype)
        np.clip(codes + zero, qmin, qmax, out=codes)
        return codes.astype(np.int32), (codes - zero) * step

    return round_columns


def codebook_rounder(
    levels: npt.ArrayLike, scale: npt.ArrayLike = 1.0, *, shape: tuple[int, int], group_size: int | None = None
) -> Rounder:
    """The nearest of `scale · levels`; a value half-way takes the lower level.

    levels: (k,) ascending, for all rows, or (rows, k). scale: as in `integer_rounder`.
    """
    of_column = _group_of_column(shape[1], group_size, None)
    scales = np.maximum(_matrix(scale, shape[0], "scale"), SCALE_FLOOR)
    table = np.atleast_2d(np.asarray(levels, np.float64))
    if np.any(np.diff(table, axis=1) < 0):
        raise SpecError("The levels of a codebook must ascend. Sort them.")
    middles = (table[:, 1:] + table[:, :-1]) / 2

    def round_columns(values: Floats, columns: Columns) -> tuple[Codes, Floats]:
        step = _pick(scales, of_column, columns)
        unit = values / step
        codes = np.zeros(values.shape, np.int32)
        for index in range(middles.shape[1]):
            codes += unit > middles[:, index : index + 1]
        rounded = table[0][codes] if table.shape[0] == 1 else np.take_along_axis(table, codes, axis=1)
        return codes, (rounded * step).astype(values.dtype)

    return round_columns


def with_mask(rounder: Rounder, mask: Floats, zero_codes: npt.ArrayLike = 0) -> Rounder:
    """`rounder`, but exactly 0 (code `zero_codes`, which broadcasts to the mask) where `mask` (rows, columns) is 0."""
    kept = np.asarray(mask) != 0
    zeros = np.broadcast_to(np.asarray(zero_codes, np.int32), kept.shape)

    def round_columns(values: Floats, columns: Columns) -> tuple[Codes, Floats]:
        codes, rounded = rounder(values, columns)
        here = kept[:, columns]
        return np.where(here, codes, zeros[:, columns]), np.where(here, rounded, values.dtype.type(0))

    return round_columns


def expand_groups(per_group: npt.ArrayLike, group_size: int, columns: int) -> npt.NDArray[np.float64]:
    """(rows, groups) → (rows, columns): each group's value for each of its columns."""
    return np.repeat(np.asarray(per_group, np.float64), group_size, axis=1)[:, :columns]


def _group_of_column(columns: int, group_size: int | None, order: Columns | None) -> Columns:
    if order is not None:
        return np.asarray(order, np.intp)
    return np.zeros(columns, np.intp) if group_size is None else np.arange(columns) // group_size


def _matrix(values: npt.ArrayLike, rows: int, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim < 2:
        array = array.reshape(-1, 1)
    if array.ndim != 2 or array.shape[0] not in (1, rows):
        raise SpecError(f"{name} must be one for all, (rows,) or (rows, groups) with {rows} rows, got {array.shape}.")
    return np.asfortranarray(array)


def _pick(table: npt.NDArray[np.float64], of_column: Columns, columns: Columns) -> npt.NDArray[np.float64]:
    """What belongs to `columns`, (rows, k) or (rows, 1). `table` lies in memory group by group: one column is one piece."""
    if table.shape[1] == 1:
        return table
    if len(columns) == 1:
        group = int(of_column[columns[0]])
        return table[:, group : group + 1]
    return table[:, of_column[columns]]

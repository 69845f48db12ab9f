"""Codebooks of tensors: one rule for ties, whatever the table covers, in every array library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whet.numerics.codebook import Codebook
from whet.numerics.levels import nearest_level
from whet.numerics.namespace import numpy_namespace
from whet.specs import KMeans
from whet.torch.namespace import xp as torch_xp

LEVELS = np.asarray([-1.0, 0.0, 1.0, 3.0], np.float32)
HALF_WAY = np.asarray([-9, -0.5, 0.5, 2.0, 9, 0.25], np.float32)
CODES = [0, 0, 2, 2, 3, 1]  # of two codes that are as near, the even one
ROWS = np.stack([HALF_WAY, HALF_WAY * 2, HALF_WAY / 4])
SCALES = np.asarray([1, 2, 0.25], np.float32)


def test_half_way_the_even_code_wins_for_the_whole_tensor_rows_and_groups() -> None:
    whole = Codebook(LEVELS, np.float32(1), KMeans(2))
    np.testing.assert_array_equal(whole.encode(HALF_WAY), CODES)
    rows = Codebook(np.stack([LEVELS] * 3), SCALES, KMeans(2), axis=0)
    np.testing.assert_array_equal(rows.encode(ROWS), [CODES] * 3)
    columns = Codebook(np.stack([LEVELS] * 3), SCALES, KMeans(2), axis=1)
    np.testing.assert_array_equal(columns.encode(ROWS.T.copy()), np.transpose([CODES] * 3))
    groups = Codebook(np.tile(LEVELS, (3, 2, 1)), np.stack([SCALES, SCALES], 1), KMeans(2), axis=0, group=(1, 3))
    np.testing.assert_array_equal(groups.encode(ROWS), [CODES] * 3)
    np.testing.assert_array_equal(groups.decode(groups.encode(ROWS)), LEVELS[[CODES] * 3] * SCALES[:, None])


@pytest.mark.parametrize("side", ["numpy", "torch", "keras"])
def test_a_tables_codes_are_those_of_nearest_level_in_every_library(side) -> None:
    rng = np.random.default_rng(0)
    tables = np.sort(rng.integers(-8, 8, (5, 8)), axis=1).astype(np.float32) / 4  # ties abound, and levels repeat
    x = rng.integers(-18, 18, (5, 200)).astype(np.float32) / 8
    codes = Codebook(tables, np.ones(5, np.float32), KMeans(3), axis=0).encode(x)
    middles = (tables[:, 1:] + tables[:, :-1]) / 2
    assert np.mean(np.any(x[..., None] == middles[:, None], axis=-1)) > 0.1
    make, xp = _library(side)
    np.testing.assert_array_equal(np.asarray(nearest_level(make(x), make(tables), xp=xp)), codes)
    for row, table, wanted in zip(x, tables, codes, strict=True):
        np.testing.assert_array_equal(np.asarray(nearest_level(make(row), make(table), xp=xp)), wanted)


def _library(side):
    if side == "keras":
        keras = pytest.importorskip("keras")
        from whet.keras.namespace import xp

        return keras.ops.convert_to_tensor, xp
    return (torch.from_numpy, torch_xp) if side == "torch" else (np.asarray, numpy_namespace)

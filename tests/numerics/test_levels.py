"""Tables of levels against the published ones, and codes that are equal in every array library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from whet.errors import SpecError
from whet.numerics.affine import SCALE_FLOOR
from whet.numerics.levels import (
    absmax_scale,
    float8_e4m3_levels,
    level_values,
    nearest_level,
    nf4_levels,
    piecewise_levels,
    power_of_two_levels,
    search_breakpoints,
    search_scale,
    table_errors,
)
from whet.numerics.namespace import numpy_namespace as xp
from whet.torch.namespace import xp as torch_xp

TABLES = {
    "nf4": nf4_levels(),
    "powers": power_of_two_levels(4),
    "8-bit powers": power_of_two_levels(8),
    "sums of powers": power_of_two_levels(4, 2),
    "piecewise": piecewise_levels(4, 0.4),
    "float8": float8_e4m3_levels(),
}


def test_nf4_is_the_published_table() -> None:
    """Dettmers et al. 2023, App. E."""
    published = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
    ]
    published += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    published += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    np.testing.assert_allclose(nf4_levels(), published, atol=3e-7)
    assert nf4_levels()[7] == 0


def test_powers_of_two_by_hand() -> None:
    np.testing.assert_array_equal(power_of_two_levels(2), [-1, 0, 1])
    np.testing.assert_array_equal(power_of_two_levels(3), [-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    np.testing.assert_array_equal(power_of_two_levels(4)[8:], 2.0 ** -np.arange(6, -1, -1))
    assert power_of_two_levels(8)[power_of_two_levels(8) > 0][0] == 2.0**-62


@pytest.mark.parametrize(
    ("bits", "terms", "sets"),
    [
        (3, 1, [[0, 1 / 2, 1 / 4, 1 / 8]]),  # the published sets p0, p1, p2 of 2, 3, 4, 5 and 6 bits of magnitude
        (4, 2, [[0, 1 / 2, 1 / 4, 1 / 16], [0, 1 / 8]]),
        (5, 2, [[0, 1 / 2, 1 / 8, 1 / 32], [0, 1 / 4, 1 / 16, 1 / 64]]),
        (6, 3, [[0, 2**-1, 2**-3, 2**-6], [0, 2**-2, 2**-4, 2**-7], [0, 2**-5]]),
        (7, 3, [[0, 2**-1, 2**-4, 2**-7], [0, 2**-2, 2**-5, 2**-8], [0, 2**-3, 2**-6, 2**-9]]),
    ],
)
def test_additive_powers_of_two_are_the_published_sets(bits, terms, sets) -> None:
    sums = np.unique([sum(choice) for choice in np.stack(np.meshgrid(*sets), -1).reshape(-1, len(sets))])
    found = power_of_two_levels(bits, terms)
    np.testing.assert_allclose(found[found >= 0], sums / sums.max(), rtol=1e-6)


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_table_is_ascending_symmetric_and_fits_its_bits(bits, terms) -> None:
    tables = [power_of_two_levels(bits, terms), *([piecewise_levels(bits, 0.3)] if bits > 2 else [])]
    for table in tables:
        assert np.all(np.diff(table) > 0) and table[-1] == 1 and table.dtype == np.float32
        np.testing.assert_array_equal(table, -table[::-1])
        assert table.size == (1 << bits) - 1 or (bits == 8 and terms == 1 and table.size == 127)


def test_piecewise_by_hand() -> None:
    np.testing.assert_allclose(piecewise_levels(4, 0.4)[8:], [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    both = piecewise_levels(3, [0.2, 0.5])
    np.testing.assert_allclose(both[:, 4:], [[0.1, 0.2, 1.0], [0.25, 0.5, 1.0]], rtol=1e-6)


def test_the_breakpoint_of_normal_weights_is_the_published_one() -> None:
    """Fang et al. 2020, eq. 9: p = ln(0.8614 m + 0.6079) for σ = 1 and the greatest magnitude m."""
    weights = np.random.default_rng(0).normal(size=(1, 100_000)).astype(np.float32)
    greatest = float(np.abs(weights).max())
    found = search_breakpoints(weights, 8)[0] * greatest
    assert abs(found - np.log(0.8614 * greatest + 0.6079)) <= greatest / 30


def test_float8_is_the_cast() -> None:
    table = float8_e4m3_levels()
    every = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(table, np.unique(values[np.isfinite(values)]))
    rng = np.random.default_rng(0)
    x = np.concatenate([table, table[1:] / 2 + table[:-1] / 2, rng.normal(size=50_000) * 80]).astype(np.float32)
    x = np.clip(x, -448, 448)
    cast = torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(level_values(nearest_level(x, table, xp=xp), table, xp=xp), cast)


@given(x=arrays(np.float32, st.integers(0, 30), elements=st.floats(-3, 3, width=32)), name=st.sampled_from(sorted(TABLES)))
@settings(deadline=None)
def test_no_level_is_nearer(x, name) -> None:
    table = TABLES[name]
    codes = nearest_level(x, table, xp=xp)
    assert codes.dtype == np.int32
    distances = np.abs(x[:, None].astype(np.float64) - table.astype(np.float64))
    middles = 1e-7 * np.abs(x)  # the rounding of a middle to float32
    assert np.all(distances[np.arange(x.size), codes] <= distances.min(1, initial=np.inf) + middles)


def test_half_way_the_even_code_wins() -> None:
    levels = np.asarray([-1.0, 0.0, 1.0, 3.0], np.float32)
    x = np.asarray([-9, -0.5, 0.5, 2.0, 9], np.float32)
    np.testing.assert_array_equal(nearest_level(x, levels, xp=xp), [0, 0, 2, 2, 3])
    np.testing.assert_array_equal(nearest_level(x[None], levels[None], xp=xp), [[0, 0, 2, 2, 3]])
    repeated = np.asarray([0.0, 1.0, 1.0, 1.0], np.float32)
    assert level_values(nearest_level(np.ones(1, np.float32), repeated, xp=xp), repeated, xp=xp) == 1


def points(table: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(5)
    near = np.concatenate([table, table[1:] / 2 + table[:-1] / 2])
    around = np.concatenate([near, np.nextafter(near, np.float32(9e9)), np.nextafter(near, np.float32(-9e9))])
    return np.concatenate([around, rng.normal(size=24_000) * table.max() / 2])[:24_000].astype(np.float32).reshape(4, 60, 100)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_codes_are_the_same_on_torch_keras_and_in_a_compiled_graph(name) -> None:
    keras = pytest.importorskip("keras")
    from whet.keras.namespace import xp as keras_xp

    table = TABLES[name]
    x = points(table)
    codes = nearest_level(x, table, xp=xp)
    values = level_values(codes, table, xp=xp)
    rows, tables = x.reshape(240, 100), np.stack([table * np.float32(1 + i / 7) for i in range(240)])
    of_rows = nearest_level(rows, tables, xp=xp)
    np.testing.assert_array_equal(of_rows[0], nearest_level(rows[0], tables[0], xp=xp))
    for make, space in ((torch.from_numpy, torch_xp), (keras.ops.convert_to_tensor, keras_xp)):
        found = nearest_level(make(x), make(table), xp=space)
        np.testing.assert_array_equal(np.asarray(found), codes)
        assert "int32" in str(found.dtype)
        np.testing.assert_array_equal(np.asarray(level_values(found, make(table), xp=space)), values)
        found = nearest_level(make(rows), make(tables), xp=space)
        np.testing.assert_array_equal(np.asarray(found), of_rows)
        np.testing.assert_array_equal(
            np.asarray(level_values(found, make(tables), xp=space)), level_values(of_rows, tables, xp=xp)
        )


@pytest.mark.parametrize("jit", [False, True])
def test_codes_in_a_tensorflow_graph_of_any_batch_size(jit) -> None:
    tf = pytest.importorskip("tensorflow")
    from whet.keras.namespace import xp as keras_xp

    table = nf4_levels()

    def run(x):
        levels = tf.constant(table)
        return level_values(nearest_level(x, levels, xp=keras_xp), levels, xp=keras_xp)

    graph = tf.function(run, jit_compile=jit, input_signature=[tf.TensorSpec((None, 60, 100), tf.float32)])
    x = points(table)
    np.testing.assert_array_equal(graph(tf.constant(x)).numpy(), level_values(nearest_level(x, table, xp=xp), table, xp=xp))


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("weighed", [False, True])
def test_the_searched_scale_is_as_good_as_a_fine_grids(name, weighed) -> None:
    rng = np.random.default_rng(1)
    rows = (rng.standard_t(4, size=(5, 128)) * np.logspace(-9, 3, 5)[:, None]).astype(np.float32)
    importance = rng.random(rows.shape) if weighed else None
    table, whole = TABLES[name], absmax_scale(rows, TABLES[name])
    found = table_errors(rows, table, search_scale(rows, table, importance=importance), importance=importance)
    grid = [table_errors(rows, table, whole * np.float32(part), importance=importance) for part in np.linspace(0.2, 1.3, 300)]
    assert np.all(found <= table_errors(rows, table, whole, importance=importance))
    beside = found / np.min(grid, axis=0)
    assert beside.max() <= 1.2 and beside.mean() <= 1.05


def test_absmax_reaches_the_greatest_value_of_either_sign() -> None:
    rows = np.asarray([[3.0, -1.0], [0.5, -2.0], [0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(absmax_scale(rows, nf4_levels()), np.asarray([3, 2, SCALE_FLOOR], np.float32))
    np.testing.assert_allclose(absmax_scale(rows, float8_e4m3_levels())[0] * 448, 3)
    lopsided = np.asarray([-0.5, 0, 1], np.float32)
    np.testing.assert_array_equal(absmax_scale(rows, lopsided)[:2], [3, 4])


def test_errors_are_those_of_the_codes() -> None:
    rng = np.random.default_rng(2)
    rows, importance = rng.normal(size=(3, 50)).astype(np.float32), rng.random(50)
    table, scale = nf4_levels(), np.asarray([1.0, 2.0, 0.5], np.float32)
    stored = level_values(nearest_level(rows / scale[:, None], table, xp=xp), table, xp=xp) * scale[:, None]
    wanted = (importance * (rows - stored).astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose(table_errors(rows, table, scale, importance=importance), wanted, rtol=1e-6)


def test_bits_without_a_table_are_refused() -> None:
    for build, least in ((power_of_two_levels, 2), (lambda bits: piecewise_levels(bits, 0.5), 3)):
        for bits in (least - 1, 9):
            with pytest.raises(SpecError, match=f"{least} to 8 bits, got {bits}"):
                build(bits)
    with pytest.raises(SpecError, match="at least 1 term"):
        power_of_two_levels(4, 0)

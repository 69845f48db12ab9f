"""The same numerics on every array library: one computation over `xp`, whose results are compared bit by bit.

Run as a script it writes the results of Keras on the backend in KERAS_BACKEND to a file: `python numerics_parity.py out.npz`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from whet.numerics.affine import fake_quantize, qparams, quantize
from whet.numerics.criteria import magnitude
from whet.numerics.levels import float8_e4m3_levels, level_values, nearest_level, nf4_levels
from whet.numerics.losses_features import attention_transfer, hints, same_positions
from whet.numerics.losses_relations import pkt, rkd_angle, rkd_distance, similarity_preserving
from whet.numerics.losses_table import logit_loss
from whet.numerics.masks import mask_lowest, masks_for
from whet.numerics.observers import channel_range, observe_minmax
from whet.specs import DIST, DKD, BinarySoftTargets, Global, Int, LogitsMSE, PerTensor, SoftTargets, Uniform

SIZE = 65_536
SPECS = {
    "uint8": Int(8, symmetric=False, granularity=PerTensor()),
    "int8": Int(8),
    "int8_full": Int(8, narrow=False),
    "int4": Int(4),
    "uint2": Int(2, symmetric=False, granularity=PerTensor()),
    "int16": Int(16),
}
EXACT = "exact"  # prefix of results that must be equal bit by bit; the others may differ by rounding


def values() -> np.ndarray:
    """65,536 normal values, then every exact code, half and quarter point of a power-of-two scale, and signed zeros."""
    rng = np.random.default_rng(7)
    grid = np.arange(-1100, 1100, dtype=np.float32) / 4 * 2.0**-6
    tiny = np.asarray([0.0, -0.0, 1e-12, -1e-12, 2.0**-7, -(2.0**-7), 1e30, -1e30], np.float32)
    return np.concatenate([rng.normal(size=SIZE).astype(np.float32), grid, tiny]).astype(np.float32)


def tied_scores() -> list[np.ndarray]:
    """Three score arrays with many exact ties, zeros among them."""
    rng = np.random.default_rng(8)
    return [
        rng.integers(0, 40, (256, 256)).astype(np.float32) / 8,
        rng.integers(0, 3, (64, 8, 3, 3)).astype(np.float32),
        np.zeros((10,), np.float32),
    ]


def compute(xp: Any, make: Callable[[np.ndarray], Any], back: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """Every result by name. `make` turns a NumPy array into the library's own, `back` the reverse."""
    found: dict[str, Any] = {}
    x = make(values())
    for name, spec in SPECS.items():
        scale, zero = make(np.asarray(2.0**-6, np.float32)), make(np.asarray(3.0 if not spec.symmetric else 0.0, np.float32))
        found[f"exact codes {name} half points"] = quantize(x, scale, zero, spec, xp=xp)
        low, high = make(np.asarray(-2.7182817, np.float32)), make(np.asarray(3.1415927, np.float32))
        scale, zero = qparams(low, high, spec, xp=xp)
        found[f"exact scale {name}"], found[f"exact zero point {name}"] = scale, zero
        found[f"exact codes {name}"] = quantize(x, scale, zero, spec, xp=xp)
        found[f"exact fake {name}"] = fake_quantize(x, scale, zero, spec, xp=xp)
    for name, table in (("nf4", nf4_levels()), ("float8", float8_e4m3_levels())):
        found[f"exact level codes {name}"] = codes = nearest_level(x, make(table), xp=xp)
        found[f"exact levels {name}"] = level_values(codes, make(table), xp=xp)
        rows, tables = make(values()[:600].reshape(6, 100)), make(np.stack([table * np.float32(i + 1) for i in range(6)]))
        found[f"exact level codes of rows {name}"] = codes = nearest_level(rows, tables, xp=xp)
        found[f"exact levels of rows {name}"] = level_values(codes, tables, xp=xp)
    found |= _ranges(xp, make)
    scores = [make(s) for s in tied_scores()]
    for sparsity in (0.0, 0.5, 0.8, 0.999):
        for allocation in (Uniform(), Global()):
            for i, mask in enumerate(masks_for(scores, sparsity, allocation, xp=xp)):
                found[f"exact mask {sparsity} {type(allocation).__name__} {i}"] = mask
    found["exact mask random"] = mask_lowest(magnitude(x, xp=xp), 50_000, xp=xp)
    rng = np.random.default_rng(9)
    student, teacher = (make(rng.normal(size=(32, 10)).astype(np.float32) * 5) for _ in range(2))
    labels, real = rng.integers(0, 10, 32), np.arange(32) < 20
    for spec in (SoftTargets(), SoftTargets(100.0, standardize=True), BinarySoftTargets(), LogitsMSE(), DKD(), DIST()):
        found[f"{spec}"] = logit_loss(spec, student, teacher, make(labels), xp=xp)
        found[f"{spec} with padding"] = logit_loss(spec, student, teacher, make(labels), xp=xp, real=make(real))
    found |= _features(xp, make)
    return {name: back(value) for name, value in found.items()}


def _features(xp: Any, make: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    student, teacher = (make(rng.normal(size=(8, *shape)).astype(np.float32)) for shape in ((4, 6, 5), (2, 3, 7)))
    pooled = same_positions(student, teacher, xp=xp)
    found = {"pooled": pooled[0], "hints": hints(pooled[0], pooled[1][..., :5], xp=xp)}
    found["attention transfer"] = attention_transfer(*pooled, xp=xp)
    for loss in (rkd_distance, rkd_angle, similarity_preserving, pkt):
        found[loss.__name__] = loss(student, teacher, xp=xp)
    return found


def _ranges(xp: Any, make: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    rng = np.random.default_rng(10)
    weight = rng.normal(size=(3, 3, 8, 16)).astype(np.float32)
    found: dict[str, Any] = {}
    for axis in (None, 0, 3, -1):
        low, high = channel_range(make(weight), axis, xp=xp)
        found[f"exact low {axis}"], found[f"exact high {axis}"] = low, high
    low, high = channel_range(make(weight[0, 0, 0]), 0, xp=xp)  # one dimension: a channel each, nothing to reduce
    found["exact low of one dimension"], found["exact high of one dimension"] = low, high
    scales, zeros = qparams(low, high, Int(8, symmetric=False), xp=xp)
    found["exact scales of channels"], found["exact zero points of channels"] = scales, zeros
    state = None
    for part in (weight[0], weight[1], weight[2]):
        state = observe_minmax(state, make(part), xp=xp)
    found["exact observed"] = make(np.asarray([state.low, state.high, state.count], np.float32))
    dirty = weight.copy()
    dirty[1, 1, 1, 1] = np.nan
    found["exact NaN is seen"] = make(np.asarray([not observe_minmax(state, make(dirty), xp=xp).is_finite], np.float32))
    for name in ("sum", "mean", "min", "max"):
        reduce = getattr(xp, name)
        found[f"exact {name} over no axis"] = reduce(make(weight), axis=())
        found[f"{name} over axes"] = reduce(make(weight), axis=(0, 2), keepdims=True)
        found[f"{name} over all"] = reduce(make(weight))
    return found


def assert_same(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    """Equal names, shapes and values: bit by bit where the name says so."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        got = found[name]
        assert got.shape == value.shape, f"{name}: {got.shape} instead of {value.shape}"
        if name.startswith(EXACT):
            different = int(np.sum(got != value))
            assert different == 0, f"{name}: {different} of {value.size} elements differ"
        else:
            np.testing.assert_allclose(got, value, rtol=3e-5, atol=1e-6, err_msg=name)


def gradient_points() -> tuple[np.ndarray, np.ndarray]:
    """Values around the range [-1, 0.75] of four codes at scale 0.25 and zero point 4 of 3 unsigned bits, and the gradients there."""
    x = np.asarray([-3.0, -1.001, -1.0, -0.99, -0.125, 0.0, 0.1, 0.374, 0.75, 0.76, 9.0], np.float32)
    return x, np.asarray([0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0], np.float32)


if __name__ == "__main__":
    import keras

    from whet.keras.namespace import xp as keras_xp

    results = compute(keras_xp, keras.ops.convert_to_tensor, lambda v: np.asarray(keras.ops.convert_to_numpy(v)))
    if keras.backend.backend() == "torch":
        points, _ = gradient_points()
        x = keras.ops.convert_to_tensor(points).detach().requires_grad_(True)
        scale, zero = (keras.ops.convert_to_tensor(np.asarray(v, np.float32)) for v in (0.25, 4.0))
        fake_quantize(x, scale, zero, Int(3, symmetric=False), xp=keras_xp).sum().backward()
        results["gradient"] = x.grad.cpu().numpy()
    np.savez(sys.argv[1], **results)

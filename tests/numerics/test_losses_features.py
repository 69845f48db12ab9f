"""Losses on features and relations against their formulas, one example, pair and triple at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from whet.errors import ModelError
from whet.numerics.losses_features import attention_map, attention_transfer, hints, same_positions
from whet.numerics.losses_relations import pkt, rkd_angle, rkd_distance, similarity_preserving
from whet.numerics.namespace import numpy_namespace as xp

RELATIONS = [rkd_distance, rkd_angle, similarity_preserving, pkt]


def features(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def test_hints() -> None:
    s, t = features((3, 2, 4, 5), (3, 2, 4, 5))
    assert hints(s, t, xp=xp) == pytest.approx(math.fsum(((s - t) ** 2).ravel()) / s.size, rel=1e-12)


def test_attention_transfer() -> None:
    s, t = features((3, 2, 4, 5), (3, 2, 4, 7))
    total = []
    for a, b in zip(s, t, strict=True):
        q = [np.asarray([np.mean(row**2) for row in z.reshape(8, -1)]) for z in (a, b)]
        total += list((q[0] / np.linalg.norm(q[0]) - q[1] / np.linalg.norm(q[1])) ** 2)
    assert attention_transfer(s, t, xp=xp) == pytest.approx(math.fsum(total) / 24, rel=1e-10)
    assert attention_transfer(5 * t, t, xp=xp) == pytest.approx(0, abs=1e-15)  # the strength does not matter, the place does
    assert (attention_map(np.zeros((2, 3, 4)), xp=xp) == 0).all()


def test_the_coarser_resolution_is_common() -> None:
    s, t = features((2, 4, 6, 3), (2, 2, 2, 5))
    a, b = same_positions(s, t, xp=xp)
    assert b is t and a.shape == (2, 2, 2, 3)
    for n, i, j in itertools.product(range(2), range(2), range(2)):
        np.testing.assert_allclose(a[n, i, j], s[n, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((0, 1)))
    a, b = same_positions(t, s, xp=xp)
    assert a is t and b.shape == (2, 2, 2, 3)
    dense = features((4, 3), (4, 6))
    assert all(x is y for x, y in zip(same_positions(*dense, xp=xp), dense, strict=True))
    with pytest.raises(ModelError, match=r"positions \(4, 6\) of the student and \(3, 6\) of the teacher"):
        same_positions(s, np.zeros((2, 3, 6, 3)), xp=xp)
    with pytest.raises(ModelError, match=r"\(2, 4, 6, 3\) of the student and \(2, 9\) of the teacher have no common"):
        same_positions(s, np.zeros((2, 9)), xp=xp)


def test_rkd_distance() -> None:
    s, t = features((5, 3), (5, 2, 2))
    distances = []
    for z in (s, t.reshape(5, 4)):
        d = np.asarray([[math.dist(a, b) for a in z] for b in z])
        distances.append(d / d[d > 0].mean())
    wanted = math.fsum(huber(a - b) for a, b in zip(*(d.ravel() for d in distances), strict=True)) / 25
    assert rkd_distance(s, t, xp=xp) == pytest.approx(wanted, rel=1e-12)


def test_rkd_angle() -> None:
    s, t = features((5, 3), (5, 4))

    def cosine(z, i, j, k):
        if j in (i, k):
            return 0.0
        a, b = z[i] - z[j], z[k] - z[j]
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    triples = list(itertools.product(range(5), repeat=3))
    wanted = math.fsum(huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triples) / 125
    assert rkd_angle(s, t, xp=xp) == pytest.approx(wanted, rel=1e-10)


def test_similarity_preserving() -> None:
    s, t = features((5, 3), (5, 2, 2))
    grams = []
    for z in (s, t.reshape(5, 4)):
        gram = np.asarray([[a @ b for b in z] for a in z])
        grams.append(np.asarray([row / np.linalg.norm(row) for row in gram]))
    assert similarity_preserving(s, t, xp=xp) == pytest.approx(np.linalg.norm(grams[0] - grams[1], "fro") ** 2 / 25, rel=1e-10)


def test_pkt() -> None:
    s, t = features((6, 3), (6, 4))
    total = 0.0
    for i in range(6):
        rows = []
        for z in (s, t):
            kernel = [(z[i] @ z[j] / (np.linalg.norm(z[i]) * np.linalg.norm(z[j])) + 1) / 2 + 1e-7 for j in range(6) if j != i]
            rows.append(np.asarray(kernel) / math.fsum(kernel))
        total += math.fsum(rows[1] * np.log((rows[1] + 1e-7) / (rows[0] + 1e-7)))
    assert pkt(s, t, xp=xp) == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.parametrize("loss", RELATIONS)
def test_relations_outlive_what_does_not_change_them(loss) -> None:
    """All see no rotation and no common scale; distances and angles see no shift; the order of the examples is no matter."""
    s, t = features((6, 4), (6, 3))
    turn = np.linalg.qr(features((4, 4), seed=1)[0])[0]
    value = loss(s, t, xp=xp)
    assert value > 1e-4 and loss(t, t, xp=xp) == pytest.approx(0, abs=1e-15)
    assert loss(7 * s @ turn, t, xp=xp) == pytest.approx(value, rel=1e-6)
    order = np.asarray([3, 1, 5, 0, 2, 4])
    assert loss(s[order], t[order], xp=xp) == pytest.approx(value, rel=1e-10)
    if loss in (rkd_distance, rkd_angle):
        assert loss(s + 5, t, xp=xp) == pytest.approx(value, rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            arrays(np.float32, (n, 3), elements=st.floats(-1e4, 1e4, width=32)),
            arrays(np.float32, (n, 2), elements=st.floats(-1e4, 1e4, width=32)),
        )
    )
)
def test_finite_and_never_negative(pair) -> None:
    """Equal examples, zeros, batches of one."""
    s, t = pair
    for loss in (*RELATIONS, lambda a, b, xp: attention_transfer(a[:, :, None], a[:, ::-1, None], xp=xp)):
        found = loss(s, t, xp=xp)
        assert np.isfinite(found) and found >= 0

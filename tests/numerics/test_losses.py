"""Distillation losses on logits against their formulas written out in float64, one row and one class at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from whet.errors import ModelError
from whet.numerics.losses import binary_soft_targets, dist, divergence, dkd, soft_targets, squared_error, standardized
from whet.numerics.losses_table import logit_loss, looks_like_sigmoid
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs import DIST, DKD, BinarySoftTargets, LogitsMSE, Regression, SoftTargets

SPECS = [
    SoftTargets(),
    SoftTargets(2.0, standardize=True),
    BinarySoftTargets(3.0),
    LogitsMSE(),
    Regression(),
    DKD(),
    DKD(0.5, 2.0, 1.5),
    DIST(),
    DIST(2.0, 0.5, 1.0),
]
TEMPERATURES = [0.5, 1.0, 4.0, 20.0, 100.0]


def logs(row):
    """log softmax of a list of floats."""
    top = max(row)
    total = math.log(math.fsum(math.exp(z - top) for z in row))
    return [z - top - total for z in row]


def kl(teacher, student):
    """Σ p log(p/q) of two rows of logits."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(logs(teacher), logs(student), strict=True))


def book_soft(s, t, temperature):
    return temperature**2 * math.fsum(kl(b / temperature, a / temperature) for a, b in zip(s, t, strict=True)) / len(s)


def book_dkd(s, t, labels, alpha, beta, temperature):
    total = []
    for a, b, k in zip(s / temperature, t / temperature, labels, strict=True):
        rest = [np.delete(z, k) for z in (a, b)]
        pair = [(z[k], max(r) + math.log(math.fsum(np.exp(r - max(r))))) for z, r in zip((a, b), rest, strict=True)]
        total.append(alpha * kl(pair[1], pair[0]) + beta * kl(rest[1], rest[0]))
    return temperature**2 * math.fsum(total) / len(total)


def book_dist(s, t, beta, gamma, temperature):
    q, p = (np.exp([logs(row) for row in z / temperature]) for z in (s, t))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def logits(shape, spread=3.0, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * spread, rng.normal(size=shape) * spread


def classes_of(shape, seed=2):
    return np.random.default_rng(seed).integers(0, shape[-1], shape[:-1])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 7), (4,)])
def test_soft_targets(temperature, shape) -> None:
    s, t = logits(shape)
    rows = [z.reshape(-1, shape[-1]) for z in (s, t)]
    assert soft_targets(s, t, temperature, xp=xp) == pytest.approx(book_soft(*rows, temperature), rel=1e-9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spread", [0.3, 3.0, 100.0, 1e4])
def test_float32_keeps_the_digits(temperature, spread) -> None:
    """To 1e-5 of the float64 sum, from nearly equal to one-hot; `Σ p (log p - log q)` in float32 has three digits at T = 100."""
    s, t = (z.astype(np.float32) for z in logits((64, 10), spread))
    exact = [z.astype(np.float64) for z in (s, t)]
    labels = classes_of((64, 10))
    assert soft_targets(s, t, temperature, xp=xp) == pytest.approx(book_soft(*exact, temperature), rel=1e-5)
    found = dkd(s, t, labels, alpha=1.0, beta=8.0, temperature=temperature, xp=xp)
    assert found == pytest.approx(book_dkd(*exact, labels, 1.0, 8.0, temperature), rel=1e-5)
    assert found.dtype == np.float32
    if (spread, temperature) == (0.3, 100.0):
        ls, lt = (z / np.float32(100) for z in (s, t))
        ls, lt = (z - np.log(np.sum(np.exp(z), -1, keepdims=True)) for z in (ls, lt))
        naive = 1e4 * np.mean(np.sum(np.exp(lt) * (lt - ls), -1))
        assert abs(naive / book_soft(*exact, temperature) - 1) > 5e-4


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_each_row_keeps_its_digits_where_the_models_nearly_agree(classes) -> None:
    """Row by row, to 1e-4 of float64's, though the divergences are of 1e-7: the difference of the log-probabilities has too few."""
    s, t = (z.astype(np.float32) / np.float32(100) for z in logits((16, classes), 0.1))
    exact = [kl(b, a) for a, b in zip(s.astype(float), t.astype(float), strict=True)]
    found = divergence(t, s, xp=xp)
    far = np.asarray(exact) > 1e-8
    assert far.any()
    np.testing.assert_allclose(found[far], np.asarray(exact)[far], rtol=1e-4)


def test_a_shift_of_a_rows_logits_does_not_matter() -> None:
    s, t = logits((3, 4))
    assert soft_targets(t, t, 4.0, xp=xp) == 0 and soft_targets(t + 5, t, 4.0, xp=xp) == pytest.approx(0, abs=1e-12)
    far = (s.astype(np.float32) + np.float32(1000), t.astype(np.float32))
    near = book_soft(*(z.astype(np.float64) for z in far), 50.0)
    assert soft_targets(*far, 50.0, xp=xp) == pytest.approx(near, rel=1e-5)


def test_huge_logits_stay_finite() -> None:
    student, teacher = np.asarray([[1e4, 0.0, -1e4]], np.float32), np.asarray([[-1e4, 0.0, 1e4]], np.float32)
    assert soft_targets(student, teacher, 1.0, xp=xp) == pytest.approx(2e4)
    # TCKD: the target has all of the teacher's probability and e^-2e4 of the student's; NCKD: e^0 against e^-1e4.
    found = dkd(student, teacher, np.asarray([2]), alpha=1.0, beta=8.0, temperature=1.0, xp=xp)
    assert found == pytest.approx(2e4 + 8 * 1e4)


def test_the_gradients_size_does_not_depend_on_the_temperature() -> None:
    """Hinton et al. 2015, section 2.1: T² keeps the balance; for high T the loss nears half the squared logit difference / N."""
    student, teacher = (x - x.mean(-1, keepdims=True) for x in np.random.default_rng(3).normal(size=(2, 50, 10)))
    wanted = np.mean(np.sum((student - teacher) ** 2, -1)) / (2 * 10)
    assert soft_targets(student, teacher, 1000.0, xp=xp) == pytest.approx(wanted, rel=1e-2)


def test_standardized_targets_see_no_scale() -> None:
    s, t = logits((8, 5))
    expected = book_soft(*((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) for z in (s, t)), 2.0)
    for student in (s, 7 * s + 3):
        assert soft_targets(student, t, 2.0, standardize=True, xp=xp) == pytest.approx(expected, rel=1e-9)
    assert (standardized(np.full((2, 3), 7.0), xp=xp) == 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_binary_soft_targets(temperature) -> None:
    s, t = logits((6, 4))
    q, p = (1 / (1 + np.exp(-z / temperature)) for z in (s, t))
    wanted = temperature**2 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert binary_soft_targets(s, t, temperature, xp=xp) == pytest.approx(wanted, rel=1e-9)
    far = np.asarray([[1e4, -1e4]], np.float32)
    assert binary_soft_targets(far, -far, 2.0, xp=xp) == pytest.approx(4 * 5e3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(9, 3), (2, 5, 7), (3, 2)])
def test_dkd(temperature, shape) -> None:
    s, t = logits(shape)
    labels = classes_of(shape)
    rows = [z.reshape(-1, shape[-1]) for z in (s, t)]
    wanted = book_dkd(*rows, labels.ravel(), 1.5, 3.0, temperature)
    assert dkd(s, t, labels, alpha=1.5, beta=3.0, temperature=temperature, xp=xp) == pytest.approx(wanted, rel=1e-9)


def test_dkd_with_the_teachers_own_weight_is_soft_targets() -> None:
    """Zhao et al. 2022, eq. 5: KD = TCKD + (1 - p_target) · NCKD, row by row."""
    s, t = logits((7, 5))
    labels = classes_of((7, 5))
    found = 0.0
    for i in range(7):
        row = (s[i : i + 1], t[i : i + 1], labels[i : i + 1])
        rest = 1 - math.exp(logs(t[i] / 4.0)[labels[i]])
        found += dkd(*row, alpha=1.0, beta=rest, temperature=4.0, xp=xp) / 7
    assert found == pytest.approx(soft_targets(s, t, 4.0, xp=xp), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dist(temperature, dtype) -> None:
    s, t = (z.astype(dtype) for z in logits((12, 5)))
    wanted = book_dist(s.astype(float), t.astype(float), 2.0, 0.5, temperature)
    found = dist(s, t, beta=2.0, gamma=0.5, temperature=temperature, xp=xp)
    assert found == pytest.approx(wanted, rel=1e-5 if dtype == np.float32 else 1e-7)


def test_dist_sees_relations_only() -> None:
    """Rows that agree but for scale correlate fully, opposite ones cost 2, and one value everywhere says nothing."""
    _, t = logits((6, 4))
    assert dist(t, t, beta=1.0, gamma=1.0, temperature=1.0, xp=xp) == pytest.approx(0, abs=1e-9)
    pair = np.asarray([[2.0, 0.0], [0.0, 1.0]])
    assert dist(pair[:, ::-1], pair, beta=1.0, gamma=0.0, temperature=1.0, xp=xp) == pytest.approx(2)
    flat = np.zeros((6, 4))
    assert dist(flat, t, beta=1.0, gamma=1.0, temperature=1.0, xp=xp) == pytest.approx(2, rel=1e-6)


def test_squared_error() -> None:
    s, t = logits((2, 3, 4))
    assert squared_error(s, t, xp=xp) == pytest.approx(np.mean((s - t) ** 2), rel=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_padding_counts_in_no_mean(spec) -> None:
    """A padded batch costs what its real rows cost, whatever lies in the padding."""
    s, t = logits((3, 4, 5))
    labels, real = classes_of((3, 4, 5)), np.ones((3, 4), bool)
    real[0, 2:], real[2, 1:] = False, False
    wanted = logit_loss(spec, s[real], t[real], labels[real], xp=xp)
    for rubbish in (0.0, 1e4):
        dirty = [np.where(real[..., None], z, rubbish) for z in (s, -t)]
        marked = np.where(real, labels, -100)
        assert logit_loss(spec, dirty[0], -dirty[1], marked, xp=xp, real=real) == pytest.approx(wanted, rel=1e-9)
    assert logit_loss(spec, s, t, labels, xp=xp, real=np.zeros((3, 4), bool)) == 0
    assert logit_loss(spec, s, t, labels, xp=xp, real=np.ones((3, 4), bool)) == pytest.approx(
        logit_loss(spec, s, t, labels, xp=xp), rel=1e-12
    )


pairs = st.integers(2, 6).flatmap(
    lambda classes: st.integers(1, 5).flatmap(
        lambda rows: st.tuples(
            *[arrays(np.float32, (rows, classes), elements=st.floats(-1e4, 1e4, width=32)) for _ in range(2)],
            arrays(np.int64, (rows,), elements=st.integers(0, classes - 1)),
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(pair=pairs, temperature=st.floats(0.5, 100))
def test_never_negative_never_infinite_and_nothing_between_equals(pair, temperature) -> None:
    s, t, labels = pair
    for found, same in (
        (soft_targets(s, t, temperature, xp=xp), soft_targets(t, t, temperature, xp=xp)),
        (soft_targets(s, t, temperature, standardize=True, xp=xp), 0.0),
        (binary_soft_targets(s, t, temperature, xp=xp), binary_soft_targets(t, t, temperature, xp=xp)),
        (dkd(s, t, labels, alpha=1.0, beta=8.0, temperature=temperature, xp=xp), 0.0),
        (dist(s, t, beta=1.0, gamma=1.0, temperature=temperature, xp=xp), 0.0),
    ):
        assert np.isfinite(found) and found >= 0 and same == 0
    exact = divergence(t.astype(float) / temperature, s.astype(float) / temperature, xp=xp)
    rows = [kl(b / temperature, a / temperature) for a, b in zip(s.astype(float), t.astype(float), strict=True)]
    np.testing.assert_allclose(exact, rows, rtol=1e-6, atol=1e-9)


def test_what_does_not_fit_is_named() -> None:
    s = np.zeros((4, 3))
    with pytest.raises(ModelError, match=r"got \(4, 3\) from the student and \(4, 2\) from the teacher"):
        logit_loss(SoftTargets(), s, s[:, :2], xp=xp)
    with pytest.raises(ModelError, match=r"DIST needs logits .* at least two, got \(4, 1\).*BinarySoftTargets"):
        logit_loss(DIST(), s[:, :1], s[:, :1], xp=xp)
    with pytest.raises(ModelError, match="DKD needs integer targets"):
        logit_loss(DKD(), s, s, xp=xp)
    with pytest.raises(ModelError, match=r"DKD needs one integer target for each row of the logits \(4, 3\), got \(3,\)"):
        logit_loss(DKD(), s, s, np.zeros(3, int), xp=xp)
    assert logit_loss(Regression(), s[:, 0], s[:, 0] + 2, xp=xp) == 4


def test_outputs_of_a_sigmoid_are_told_from_logits() -> None:
    z = np.random.default_rng(0).normal(size=(16, 2))
    assert looks_like_sigmoid(1 / (1 + np.exp(-z))) and not looks_like_sigmoid(z) and not looks_like_sigmoid(np.full(3, 0.5))

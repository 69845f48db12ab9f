"""Distillation losses on logits: pure functions of two outputs, in the namespace of their arrays.

Throughout: student and teacher (…, classes), classes last; `real` (…) booleans, False where a row is padding and counts
in no mean. Every result is a scalar. No gradient flows to the teacher.
"""

from __future__ import annotations

from whet.numerics.namespace import Array, Namespace

_SMALL = 0.25  # below, exp(-d) - 1 + d is summed as a series
_SERIES = (1 / 2, -1 / 6, 1 / 24, -1 / 120, 1 / 720, -1 / 5040, 1 / 40320, -1 / 362880, 1 / 3628800, -1 / 39916800)
_EXPONENTIAL = (1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320)  # of (eˣ - 1) / x
_NOWHERE = 200.0  # a logit this far below all others has probability e⁻²⁰⁰ at most
_TINY = 1e-16  # added to squared norms: a constant row correlates with nothing, and its gradient is finite


def soft_targets(
    student: Array,
    teacher: Array,
    temperature: float,
    *,
    xp: Namespace,
    standardize: bool = False,
    real: Array | None = None,
) -> Array:
    """`T² · KL(softmax(t/T) ‖ softmax(s/T))` in nats, mean over the rows (Hinton et al. 2015, arXiv:1503.02531, eq. 1-4).

    With `standardize` each row of logits first becomes `(z - mean) / deviation` (Sun et al. 2024, arXiv:2403.01427, eq. 6).
    """
    if standardize:
        student, teacher = standardized(student, xp=xp), standardized(teacher, xp=xp)
    teacher = xp.stop_gradient(teacher)
    rows = divergence(teacher / temperature, student / temperature, xp=xp)
    return temperature**2 * mean_of_rows(rows, real, xp=xp)


def binary_soft_targets(
    student: Array, teacher: Array, temperature: float, *, xp: Namespace, real: Array | None = None
) -> Array:
    """`T² · KL(Bernoulli(σ(t/T)) ‖ Bernoulli(σ(s/T)))`, mean over all logits: soft targets of sigmoid outputs.

    `σ(z)` is the softmax over `(z, 0)`. Shapes: (…, labels), each label a question of its own.
    """
    pairs = [xp.concatenate([z[..., None], xp.full_like(z, 0.0)[..., None]], axis=-1) for z in (student, teacher)]
    rows = divergence(xp.stop_gradient(pairs[1]) / temperature, pairs[0] / temperature, xp=xp)
    return temperature**2 * mean_of_rows(xp.mean(rows, axis=-1), real, xp=xp)


def squared_error(student: Array, teacher: Array, *, xp: Namespace, real: Array | None = None) -> Array:
    """`mean((s - t)²)` over classes and rows: matched logits (Ba & Caruana 2014, arXiv:1312.6184, eq. 1, without its ½).

    It serves regression too, with (…, outputs).
    """
    difference = student - xp.stop_gradient(teacher)
    return mean_of_rows(xp.mean(difference * difference, axis=-1), real, xp=xp)


def dkd(
    student: Array,
    teacher: Array,
    labels: Array,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    xp: Namespace,
    real: Array | None = None,
) -> Array:
    """`T² · (α · TCKD + β · NCKD)`, mean over the rows: decoupled distillation (Zhao et al. 2022, arXiv:2203.08679, eq. 7).

    TCKD is the divergence between (target, all others), NCKD the one among the others. `labels` (…) are integers; rows
    that are not `real` may hold any.
    """
    classes = student.shape[-1]
    target = xp.one_hot(labels, classes)
    s, t = student / temperature, xp.stop_gradient(teacher) / temperature
    others_s, others_t = _without(s, target, xp), _without(t, target, xp)
    pair_s, pair_t = (_against(z, others, target, xp) for z, others in ((s, others_s), (t, others_t)))
    rows = alpha * divergence(pair_t, pair_s, xp=xp) + beta * divergence(others_t, others_s, xp=xp)
    return temperature**2 * mean_of_rows(rows, real, xp=xp)


def dist(
    student: Array,
    teacher: Array,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    xp: Namespace,
    real: Array | None = None,
) -> Array:
    """`T² · (β · L_inter + γ · L_intra)` (Huang et al. 2022, arXiv:2205.10536, eq. 8-10; `T²` as in the authors' code).

    `L_inter` is `1 - ρ`, Pearson's correlation, between two rows of `softmax(z/T)`, mean over the rows; `L_intra` that
    between two columns (one class over the batch), mean over the classes.
    """
    flat = [xp.reshape(z / temperature, (-1, student.shape[-1])) for z in (xp.stop_gradient(teacher), student)]
    by_row, by_column = zip(*(_probabilities(z, xp) for z in flat), strict=True)
    real = None if real is None else xp.reshape(real, (-1,))
    between = _uncorrelated(*(z - xp.mean(z, axis=1, keepdims=True) for z in by_row), axis=1, xp=xp)
    inter = mean_of_rows(between, real, xp=xp)
    within = _uncorrelated(*(_centred_columns(z, real, xp) for z in by_column), axis=0, xp=xp)
    one, none = xp.full_like(by_row[0], 1.0), xp.full_like(by_row[0], 0.0)
    some = None if real is None else xp.max(xp.where(real[:, None], one, none), axis=0) > 0
    intra = mean_of_rows(within, some, xp=xp)
    return temperature**2 * (beta * inter + gamma * intra)


def standardized(logits: Array, *, xp: Namespace) -> Array:
    """`(z - mean) / σ` of each row (…, classes), with `σ² = mean((z - mean)²)`; rows of one value become zeros."""
    centred = logits - xp.mean(logits, axis=-1, keepdims=True)
    return centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + 1e-14)


def divergence(teacher: Array, student: Array, *, xp: Namespace) -> Array:
    """`KL(softmax(t) ‖ softmax(s))` of each row (…, classes) -> (…), in nats, also where both are nearly equal.

    `Σ p·log(p/q)` cancels to nothing in float32 at high temperatures. Here each term is `p · (e⁻ᵈ - 1 + d)` with
    `d = log(p/q)`, which is never negative and has the same sum, since `Σp = Σq`; `d` comes from the logits' difference, and
    an error common to a row's `d` counts in second order only.
    """
    log_p, log_q = xp.log_softmax(teacher, axis=-1), xp.log_softmax(student, axis=-1)
    p, q = xp.exp(log_p), xp.exp(log_q)
    raw = (teacher - xp.max(teacher, axis=-1, keepdims=True)) - (student - xp.max(student, axis=-1, keepdims=True))
    d = raw - xp.sum(p * (raw - (log_p - log_q)), axis=-1, keepdims=True)
    return xp.sum(bregman(p, q, d, xp=xp), axis=-1)


def bregman(p: Array, q: Array, d: Array, *, xp: Namespace) -> Array:
    """`p·d - p + q` for `d = log(p/q)`, elementwise: `p · d² · (1/2 - d/6 + d²/24 - …)` where d is small."""
    is_small = xp.abs(d) < _SMALL
    x = xp.where(is_small, d, xp.full_like(d, 0.0))  # the branch not taken must have a finite gradient
    series = xp.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * x + coefficient
    return xp.where(is_small, p * x * x * series, p * d - p + q)


def mean_of_rows(values: Array, real: Array | None, *, xp: Namespace) -> Array:
    """The mean over the rows that are `real`, of the same shape; 0 if none is, and over all of them if it is None."""
    if real is None:
        return xp.mean(values)
    none = xp.full_like(values, 0.0)
    count = xp.sum(xp.where(real, xp.full_like(values, 1.0), none))
    return xp.sum(xp.where(real, values, none)) / xp.clip(count, 1.0, 1e30)


def _without(logits: Array, target: Array, xp: Namespace) -> Array:
    """The logits with the target's far below all others."""
    lowest = xp.stop_gradient(xp.min(logits, axis=-1, keepdims=True)) - _NOWHERE
    return xp.where(target, lowest + xp.full_like(logits, 0.0), logits)


def _against(logits: Array, others: Array, target: Array, xp: Namespace) -> Array:
    """Two logits of each row: the target's, and the log of the sum of the exponentials of the others."""
    own = xp.sum(xp.where(target, logits, xp.full_like(logits, 0.0)), axis=-1, keepdims=True)
    top = xp.stop_gradient(xp.max(others, axis=-1, keepdims=True))
    rest = top + xp.log(xp.sum(xp.exp(others - top), axis=-1, keepdims=True))
    return xp.concatenate([own, rest], axis=-1)


def _probabilities(logits: Array, xp: Namespace) -> tuple[Array, Array]:
    """`softmax(z)` (n, K), to be centred by row and by column; less 1/K where all are nearly that, as at high temperatures.

    There, with `u = z - mean(z)` and `m = eᵘ - 1`, the difference is `(m - mean(m)) / Σ(1 + m)`, which keeps its digits.
    """
    u = logits - xp.mean(logits, axis=-1, keepdims=True)
    is_small = xp.max(xp.abs(u), axis=-1, keepdims=True) < _SMALL
    x = xp.where(is_small, u, xp.full_like(u, 0.0))  # the branch not taken must have a finite gradient
    m = xp.full_like(x, _EXPONENTIAL[-1])
    for coefficient in reversed(_EXPONENTIAL[:-1]):
        m = m * x + coefficient
    m = m * x
    near = (m - xp.mean(m, axis=-1, keepdims=True)) / xp.sum(1.0 + m, axis=-1, keepdims=True)
    p = xp.exp(xp.log_softmax(logits, axis=-1))
    return xp.where(is_small, near, p), xp.where(xp.max(xp.abs(u)) < _SMALL, near, p)


def _centred_columns(x: Array, real: Array | None, xp: Namespace) -> Array:
    """The columns of (n, classes) minus their means over the real rows; zero in the other rows."""
    if real is None:
        return x - xp.mean(x, axis=0, keepdims=True)
    none = xp.full_like(x, 0.0)
    rows = real[:, None]
    count = xp.sum(xp.where(rows, none + 1.0, none), axis=0, keepdims=True)
    mean = xp.sum(xp.where(rows, x, none), axis=0, keepdims=True) / xp.clip(count, 1.0, 1e30)
    return xp.where(rows, x - mean, none)


def _uncorrelated(a: Array, b: Array, *, axis: int, xp: Namespace) -> Array:
    """`1 - cos(a, b)` along `axis` of centred arrays, as half the squared distance of unit vectors, which cancels nothing."""
    square_a, square_b = xp.sum(a * a, axis=axis, keepdims=True), xp.sum(b * b, axis=axis, keepdims=True)
    difference = a / xp.sqrt(square_a + _TINY) - b / xp.sqrt(square_b + _TINY)
    missing = 0.5 * (_TINY / (square_a + _TINY) + _TINY / (square_b + _TINY))  # how far the vectors are from unit length
    return 0.5 * xp.sum(difference * difference, axis=axis) + xp.sum(missing, axis=axis)

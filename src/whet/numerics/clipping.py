"""From what was observed to the range that is quantized: percentiles, least squared error, least divergence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.numerics.affine import qparams
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.observers import HistogramRange, Range
from whet.specs.quantization import MSE, Entropy, Observer, Percentile
from whet.specs.schemes import Int

Floats = npt.NDArray[np.float64]
Loss = Callable[[Floats, Floats], Floats]

TRIES_1D = 33  # candidates of a search in which one number moves
TRIES_2D = 11  # for each end, where both move
SMOOTHING = 1e-4  # of a count: Q where P holds something and Q nothing
ZOOMS = 3  # each search looks again around its best candidate, between its neighbours


def needs_histogram(observer: Observer) -> bool:
    """Whether the ranges of `observer` come from a `HistogramRange`; the others need a `Range`."""
    return isinstance(observer, Percentile | MSE | Entropy)


def range_of(state: Range | HistogramRange, observer: Observer, spec: Int) -> tuple[float, float]:
    """The range `(low, high)` that `observer` takes from what was seen, for codes of `spec`.

    It lies within what was seen, widened to hold zero; `qparams` makes scale and zero point of it. Per tensor.

    Raises:
        SpecError: `observer` needs a histogram and `state` has none.
    """
    if not needs_histogram(observer):
        return state.low, state.high
    if not isinstance(state, HistogramRange):
        name = type(observer).__name__
        raise SpecError(f"{name}() needs a histogram of the values, got a {type(state).__name__}: use observe_histogram.")
    if isinstance(observer, Percentile):
        return percentile_range(state, observer.percentile)
    return mse_range(state, spec) if isinstance(observer, MSE) else entropy_range(state, spec)


def percentile_range(state: HistogramRange, percentile: float) -> tuple[float, float]:
    """The `100 - percentile`-th and the `percentile`-th percentile, linear within bins: each end clips alike.

    99.99 clips one value in 10,000 at either end. The ends never lie outside what was seen.
    """
    if not _countable(state):
        return state.low, state.high
    below = np.concatenate([[0], np.cumsum(state.counts)]).astype(np.float64)
    wanted = np.asarray([100 - percentile, percentile]) / 100 * below[-1]
    low, high = _inverse(below, state.edges, wanted)
    return float(np.clip(low, state.low, state.high)), float(np.clip(high, state.low, state.high))


def _inverse(below: Floats, edges: Floats, wanted: Floats) -> tuple[float, float]:
    """Where `below`, which never falls, first reaches the first of `wanted`, and last the second: empty bins are left out."""
    found = []
    for target, side in zip(wanted, ("right", "left"), strict=True):
        place = int(np.clip(np.searchsorted(below, target, side=side), 1, below.size - 1))  # type: ignore[call-overload]
        inside = below[place] - below[place - 1]
        part = (target - below[place - 1]) / inside if inside else 0.0
        found.append(float(edges[place - 1] + part * (edges[place] - edges[place - 1])))
    return found[0], found[1]


def mse_range(state: HistogramRange, spec: Int) -> tuple[float, float]:
    """The range of least expected squared error, rounding and clipping together (Banner et al. 2019, arXiv:1810.05723, eq. 3).

    The error of every bin is integrated exactly, values lying evenly in it, for the scale and zero point that `qparams` gives
    to a candidate. Symmetric codes search one number; asymmetric ones both ends, where values of both signs were seen.
    """
    return _searched(state, spec, partial(_squared_error, state, spec)) if _countable(state) else (state.low, state.high)


def entropy_range(state: HistogramRange, spec: Int) -> tuple[float, float]:
    """The range of least divergence `KL(P ‖ Q)` in nats (Migacz 2017, "8-bit Inference with TensorRT").

    P: the histogram with all beyond the range added to the outermost bins of the range. Q: the histogram within the range, the
    counts of each code spread evenly over the bins of P that hold something and round to this code. As published, for codes of
    either kind. Where P holds only what was clipped, Q is 10⁻⁴ of a count (as in MXNet). The bin that begins at zero takes its
    upper neighbour's count, since zero itself is never rounded and would drown the rest behind a ReLU (as in NVIDIA's
    pytorch-quantization). A code is never narrower than a bin, where nothing would be rounded and the divergence says nothing:
    the full range stays where its codes are (from about 11 bits on).
    """
    return _searched(state, spec, partial(_divergence, state, spec)) if _countable(state) else (state.low, state.high)


def _countable(state: HistogramRange) -> bool:
    return state.is_finite and state.count > 0 and state.low < state.high


def _searched(state: HistogramRange, spec: Int, loss: Loss) -> tuple[float, float]:
    """The ends of least loss: fractions of the full range, then finer ones around the best, the widest of equals."""
    low, high = min(state.low, 0.0), max(state.high, 0.0)
    if spec.symmetric:
        reach = max(-low, high)
        share, _ = _zoom(loss, (reach, reach), both=False)
        return max(low, -reach * share), min(high, reach * share)
    if low == 0 or high == 0:
        share, _ = _zoom(loss, (-low, high), both=False)
        return low * share, high * share
    shares = _zoom(loss, (-low, high), both=True)
    return low * shares[0], high * shares[1]


def _zoom(loss: Loss, reach: tuple[float, float], *, both: bool) -> tuple[float, float]:
    """The shares of `reach` (below, above zero) of least loss; one share for both ends unless `both`."""
    tries = TRIES_2D if both else TRIES_1D
    centre, width = (0.5, 0.5), 0.5
    best, least = (1.0, 1.0), float(loss(np.asarray([-reach[0]]), np.asarray([reach[1]]))[0])
    for _ in range(ZOOMS):
        lows, highs = (np.unique(np.clip(np.linspace(c - width, c + width, tries), 1e-3, 1.0))[::-1] for c in centre)
        if both:
            lows, highs = (grid.reshape(-1) for grid in np.meshgrid(lows, highs, indexing="ij"))
        else:
            lows = highs
        losses = loss(-reach[0] * lows, reach[1] * highs)
        place = int(np.argmin(losses))
        if losses[place] < least:
            best, least = (float(lows[place]), float(highs[place])), float(losses[place])
        centre, width = best, 2 * width / (tries - 1)
    return best


def _lattice(low: Floats, high: Floats, spec: Int) -> tuple[Floats, Floats, Floats]:
    """Scale, and the lowest and highest code less the zero point, of each candidate: (candidates, 1)."""
    scale, zero = qparams(low[:, None], high[:, None], spec, xp=xp)
    return np.asarray(scale), spec.qmin - np.asarray(zero), spec.qmax - np.asarray(zero)


def _squared_error(state: HistogramRange, spec: Int, low: Floats, high: Floats) -> Floats:
    """The mean squared error of each candidate range, in the unit of the values squared: (candidates,).

    With t = x / scale and its nearest code c (less the zero point), `∫ (t - c)² dt = c / 12 + (t - c)³ / 3` from 0 to t: each
    code inside adds 1/12, and beyond the last code only the second term grows.
    """
    scale, least, greatest = _lattice(low, high, spec)
    t = state.edges / scale
    code = np.clip(np.round(t), least, greatest)
    per_bin = np.diff(code / 12 + (t - code) ** 3 / 3, axis=1)
    return np.asarray((per_bin @ state.counts.astype(np.float64)) * scale[:, 0] ** 3 / (state.width * state.count))


def _divergence(state: HistogramRange, spec: Int, low: Floats, high: Floats) -> Floats:
    """`KL(P ‖ Q)` in nats of each candidate range: (candidates,)."""
    scale, least, greatest = _lattice(low, high, spec)
    counts = state.counts.astype(np.float64)
    if 0 <= -state.start < counts.size - 1:
        counts[-state.start] = counts[1 - state.start]
    middles = (state.edges[:-1] + state.edges[1:]) / 2
    losses = [
        _divergence_of(counts, np.round(middles / step), int(bottom), int(top)) if step >= state.width else float("inf")
        for step, bottom, top in zip(scale[:, 0], least[:, 0], greatest[:, 0], strict=True)
    ]
    return np.asarray(losses)


def _divergence_of(counts: Floats, codes: Floats, least: int, greatest: int) -> float:
    inside = np.flatnonzero((codes >= least) & (codes <= greatest))
    if inside.size == 0 or not counts[inside].any():
        return float("inf")
    first, last = int(inside[0]), int(inside[-1]) + 1
    reference = counts[first:last].copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    group = (codes[first:last] - codes[first]).astype(np.intp)
    held = reference > 0
    bins_of, sum_of = np.bincount(group, weights=held), np.bincount(group, weights=counts[first:last])
    spread = np.maximum((sum_of / np.maximum(bins_of, 1))[group], SMOOTHING)
    p, q = reference[held] / reference.sum(), spread[held] / spread[held].sum()
    return float(np.sum(p * np.log(p / q)))

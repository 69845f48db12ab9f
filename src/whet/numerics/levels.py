"""Tables of levels for non-uniform quantization, `x ≈ scale * levels[code]`, and the nearest level of each value.

Tables are float32, ascending, of shape (k,) with k ≤ 2 ** bits levels; zero is one of them. A table of rows, (R, k), has one
for each row. Rule for ties: a value half-way between two levels takes the one with the even code, as rounding half to even
does; in the table of float8 that is the cast's own rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.numerics.affine import SCALE_FLOOR
from whet.numerics.namespace import Array, Namespace

Floats = npt.NDArray[np.float32]

LEAST_POWER = -62  # of two, in a table: far below every weight, and a scaled level is still a normal float32
SHRINKS = (0.25, 1.25, 33)  # candidates for a scale, as parts of the one that reaches the greatest value
REFINED = 8  # candidates around the best of these
BREAKPOINTS = 39  # candidates for the breakpoint of a piecewise table
BATCH = 1 << 18  # values that a search looks at together


def nf4_levels() -> Floats:
    """NormalFloat: 16 levels at quantiles of the normal distribution, ±1 the outermost.

    `Φ⁻¹` at evenly spaced probabilities from 1/2 to `1 - (1/32 + 1/30) / 2`, seven steps below zero and eight above, each side
    with zero as its end, divided by the greatest (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, eq. 4 and App. E).
    """
    outer = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    below = [-quantile(p) for p in np.linspace(outer, 0.5, 8)[:-1]]
    above = [quantile(p) for p in np.linspace(0.5, outer, 9)[1:]]
    return _table(np.asarray([*below, 0.0, *above]) / quantile(outer))


def power_of_two_levels(bits: int, terms: int = 1) -> Floats:
    """Signed powers of two, 1 the greatest, and zero: `2 ** bits - 1` levels (Miyashita et al. 2016, arXiv:1603.01025).

    terms: with 2 and more, each level is a sum of that many powers, one from each of as many sets (additive powers of two, Li
    et al. 2020, arXiv:1909.13144, eq. 5), divided by the greatest. The `bits - 1` bits of the magnitude go round the sets; sets
    with a bit less come before the last round, which for sets of 2 bits gives the published tables. Powers below 2⁻⁶², which
    only one term of 8 bits has, are left out.
    """
    _check_bits("power_of_two_levels", bits, 2)
    if terms < 1:
        raise SpecError(f"power_of_two_levels needs at least 1 term, got {terms}.")
    if terms == 1:
        powers = np.arange(0, max(2 - (1 << (bits - 1)), LEAST_POWER) - 1, -1)
        return _mirrored(np.ldexp(1.0, powers))
    sums = np.zeros(1)
    for powers_of_set in _sets_of_powers(bits - 1, terms):
        choices = np.concatenate([[0.0], np.ldexp(1.0, np.asarray(powers_of_set, np.int64))])
        sums = (sums[:, None] + choices).reshape(-1)
    return _mirrored(np.sort(sums)[1:] / sums.max())


def _sets_of_powers(bits: int, terms: int) -> list[list[int]]:
    """The exponents of each set: a set of b bits has 2 ** b - 1 of them, and all differ."""
    widths = [bits // terms + (index < bits % terms) for index in range(terms)]
    counts = [(1 << width) - 1 for width in widths if width]
    found: list[list[int]] = [[] for _ in counts]
    rounds, power = counts[0], 0
    for turn in range(rounds):
        for index, count in enumerate(counts):
            skipped = 0 if count == rounds else rounds - 1 - count
            if skipped <= turn < skipped + count:
                power -= 1
                found[index].append(power)
    return found


def piecewise_levels(bits: int, breakpoints: npt.ArrayLike) -> Floats:
    """Two uniform intervals on either side of zero, finer to the breakpoint and coarser to 1: `2 ** bits - 1` levels.

    (Fang et al. 2020, PWLQ, arXiv:2002.00104, §3.) breakpoints: in (0, 1), a number, giving (k,), or (R,), giving (R, k). The
    inner interval has `2 ** (bits - 2)` steps, the outer one a step less. `bits` counts the bit that tells the intervals apart,
    which the paper's b does not.
    """
    _check_bits("piecewise_levels", bits, 3)
    inner = 1 << (bits - 2)
    outer = inner - 1
    at = np.asarray(breakpoints, np.float64)[..., None]
    near = at * np.arange(1, inner + 1) / inner
    far = at + (1 - at) * np.arange(1, outer + 1) / outer
    return _mirrored(np.concatenate([near, far], axis=-1))


def float8_e4m3_levels() -> Floats:
    """The 253 finite values of float8 e4m3fn, from -448 to 448 (Micikevicius et al. 2022, arXiv:2209.05433, table 1)."""
    code = np.arange(1, 127)  # 127 is NaN
    exponent, fraction = code >> 3, (code & 7) / 8
    return _mirrored(np.ldexp(np.where(exponent > 0, 1 + fraction, 2 * fraction), np.maximum(exponent, 0) - 7))


def nearest_level(x: Array, levels: Array, *, xp: Namespace) -> Array:
    """The code of the level nearest to each value, int32, in the shape of `x`.

    levels: (k,), for x of any shape; or (R, k) for x (R, n), each row with its own; in the floating type of x, which is float32
    or wider. Values beyond the last level take it. Exactly half-way, the even code wins.
    """
    middles = levels[..., 1:] / 2 + levels[..., :-1] / 2
    if len(levels.shape) > 1:
        return between(x, (middles[:, index : index + 1] for index in range(int(middles.shape[-1]))), xp=xp)
    return _even(xp.searchsorted(middles, x, side="left"), xp.searchsorted(middles, x, side="right"), xp)


def between(x: Array, middles: Iterable[Array], *, xp: Namespace) -> Array:
    """The codes of `x` between `middles`, ascending, each of which broadcasts against `x`; on a middle the even code wins."""
    below = not_above = xp.cast(xp.full_like(x, 0.0), "int32")
    for middle in middles:
        below = below + xp.cast(middle < x, "int32")
        not_above = not_above + xp.cast(middle <= x, "int32")
    return _even(below, not_above, xp)


def _even(below: Array, not_above: Array, xp: Namespace) -> Array:
    """The even code where `x` lies on a middle: how many middles lie below it, and how many not above, then differ."""
    return xp.where(below % 2 == 0, below, not_above)


def level_values(codes: Array, levels: Array, *, xp: Namespace) -> Array:
    """What `codes` stand for: `levels[code]`, or each row's own for levels (R, k) and codes (R, n)."""
    if len(levels.shape) == 1:
        return xp.take(levels, codes)
    rows, size = int(levels.shape[0]), int(levels.shape[1])
    start = xp.reshape(xp.positions(levels[:, 0]) * size, (rows, 1))
    return xp.take(xp.reshape(levels, (-1,)), codes + start)


def absmax_scale(rows: npt.NDArray[Any], levels: Floats) -> Floats:
    """The least scale at which no value of a row lies beyond the outermost levels: (R,), at least `SCALE_FLOOR`."""
    table = np.asarray(levels, np.float32)
    above = np.max(rows, axis=1, initial=0.0) / table[..., -1]
    below = np.max(-rows, axis=1, initial=0.0) / -table[..., 0]
    return np.asarray(np.maximum(np.maximum(above, below), SCALE_FLOOR), np.float32)


def search_scale(rows: npt.NDArray[Any], levels: Floats, *, importance: npt.NDArray[Any] | None = None) -> Floats:
    """The scale of least `Σ h (x - ŵ)²` for each row, (R,), with the table `levels` (k,).

    Parts from 1/4 to 5/4 of `absmax_scale` are tried, then finer ones around the best; `absmax_scale` itself wins a tie. More
    than 1 helps tables whose levels lie far apart at their end. importance: h, broadcasting against rows (R, n); 1 by default.
    """
    whole = absmax_scale(rows, levels)
    parts = np.linspace(SHRINKS[1], SHRINKS[0], SHRINKS[2])
    best, least = np.ones(len(rows)), table_errors(rows, levels, whole, importance=importance)
    offsets = np.linspace(0.5, -0.5, REFINED + 2)[1:-1] * 2 * (parts[0] - parts[1])
    for tries in (parts[:, None] + np.zeros(len(rows)), None):
        for part in tries if tries is not None else best + offsets[:, None]:
            errors = table_errors(rows, levels, (whole * part).astype(np.float32), importance=importance)
            better = errors < least
            best, least = np.where(better, part, best), np.where(better, errors, least)
    return np.maximum(whole * best, SCALE_FLOOR).astype(np.float32)


def search_breakpoints(rows: npt.NDArray[Any], bits: int, *, importance: npt.NDArray[Any] | None = None) -> Floats:
    """The breakpoint of least `Σ h (x - ŵ)²` for each row, (R,), for `piecewise_levels` at `absmax_scale` (PWLQ, §3.2).

    Found among `BREAKPOINTS` even steps of the greatest magnitude, from the error itself rather than from the paper's normal
    approximation.
    """
    candidates = np.linspace(0, 1, BREAKPOINTS + 2)[1:-1]
    scale = absmax_scale(rows, piecewise_levels(bits, 0.5))
    errors = np.stack([table_errors(rows, piecewise_levels(bits, at), scale, importance=importance) for at in candidates])
    return np.asarray(candidates[np.argmin(errors, axis=0)], np.float32)


def table_errors(
    rows: npt.NDArray[Any], levels: Floats, scale: Floats, *, importance: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.float64]:
    """`Σ h (x - ŵ)²` of each row (R,), with `ŵ` the nearest of `scale * levels`. levels: (k,); scale: (R,)."""
    middles = levels[1:] / 2 + levels[:-1] / 2
    errors = np.zeros(len(rows))
    step = max(1, BATCH // max(1, rows.shape[1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        values, unit = np.asarray(rows[part], np.float32), scale[part, None]
        missed = values - levels[np.searchsorted(middles, values / unit)] * unit
        missed = missed.astype(np.float64) ** 2
        if importance is not None:
            missed = missed * (importance[part] if np.ndim(importance) == 2 and len(importance) == len(rows) else importance)
        errors[part] = missed.sum(axis=1)
    return errors


def _check_bits(owner: str, bits: int, least: int) -> None:
    if not least <= bits <= 8:
        raise SpecError(f"{owner} has tables for {least} to 8 bits, got {bits}.")


def _mirrored(positive: npt.NDArray[np.float64]) -> Floats:
    """Positive levels in any order, zero and the negative ones, ascending."""
    positive = np.sort(positive, axis=-1)
    return _table(np.concatenate([-positive[..., ::-1], np.zeros((*positive.shape[:-1], 1)), positive], axis=-1))


def _table(levels: npt.NDArray[np.float64]) -> Floats:
    return levels.astype(np.float32)

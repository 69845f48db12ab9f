"""Distillation losses on what attention layers compute: pure functions of queries, keys and values, per head.

Throughout: n examples, h heads, l positions, d numbers a head. Positions that are padding count in no mean; they are read off
`allowed`: one that no query may look at. Every result is a scalar. No gradient flows to the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from whet.errors import ModelError
from whet.numerics.losses import divergence, mean_of_rows
from whet.numerics.namespace import Array, Namespace

_NOWHERE = 200.0  # a score this far below all others has probability e⁻²⁰⁰ at most
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Attention:
    """One call of an attention layer. query, key, value: (n, h, l, d). allowed: booleans that broadcast to (n, h, l, l), False
    where a query may not look; None where it may everywhere. scale: what `query · key` is multiplied with, 1/√d if None."""

    query: Array
    key: Array
    value: Array
    allowed: Array | None = None
    scale: float | None = None

    @property
    def heads(self) -> int:
        """Of the queries; keys and values may have fewer (grouped queries)."""
        return int(self.query.shape[1])


def attention_matrices(student: Attention, teacher: Attention, *, xp: Namespace, divergent: bool = False) -> Array:
    """`mean((A_s - A_t)²)` over heads and pairs, `A = q·kᵀ·scale` (TinyBERT; Jiao et al. 2020, arXiv:1909.10351, eq. 7).

    As in that paper's experiments before the softmax, where it converged faster. With `divergent` the distributions are
    compared instead: `mean over heads and queries of KL(softmax(A_t) ‖ softmax(A_s))` (MiniLM; Wang et al. 2020,
    arXiv:2002.10957, eq. 4). Of other numbers of heads the mean is taken over groups, down to their greatest common divisor.

    Raises:
        ModelError: other positions.
    """
    _check_positions(student, teacher)
    scores = [_scores(one, xp) for one in (student, teacher)]
    common = math.gcd(student.heads, teacher.heads)
    allowed, rows = _allowed(student, teacher, scores[0], xp)
    if divergent:
        logs = [_mean_log(_masked(one, mask, xp), common, xp) for one, mask in zip(scores, allowed, strict=True)]
        return mean_of_rows(divergence(xp.stop_gradient(logs[1]), logs[0], xp=xp), _every_head(rows, logs[0], xp), xp=xp)
    a, b = (_grouped(one, common, xp) for one in scores)
    difference = a - xp.stop_gradient(b)
    both = None if allowed[0] is None or allowed[1] is None else _all_heads(allowed[0], allowed[1], difference, xp)
    if both is not None and rows is not None:
        both = xp.where(rows[:, None, :, None], both, xp.full_like(both, 0.0))
    return mean_of_rows(difference * difference, None if both is None else both > 0, xp=xp)


def relations(student: Attention, teacher: Attention, *, of: str, heads: int | None = None, xp: Namespace) -> Array:
    """`mean over heads and positions of KL(R_t ‖ R_s)`, `R = softmax(x·xᵀ/√d)` of x the queries, keys or values.

    Of values: MiniLM (Wang et al. 2020, arXiv:2002.10957, eq. 6-7); of all three: MiniLMv2 (Wang et al. 2021, arXiv:2012.15828,
    eq. 4-6). The heads of each model are joined and cut into `heads` relation heads, by default as many as both have in common,
    so that neither heads nor widths need be the same.

    Raises:
        ModelError: other positions, or widths that `heads` does not divide.
    """
    _check_positions(student, teacher)
    vectors = [getattr(one, of) for one in (student, teacher)]
    count = heads or math.gcd(*(int(x.shape[1]) for x in vectors))
    logs = []
    _, rows = _allowed(student, teacher, _scores(student, xp), xp)
    for whose, x in zip(("student", "teacher"), vectors, strict=True):
        width = x.shape[1] * x.shape[3]
        if width % count:
            raise ModelError(
                f"{count} relation heads do not divide the {width} numbers of a position of the {whose}. Choose other heads=."
            )
        joined = xp.reshape(xp.moveaxis(x, 1, 2), (-1, x.shape[2], count, width // count))
        cut = xp.moveaxis(joined, 2, 1)
        scores = xp.matmul(cut, xp.transpose(cut)) / math.sqrt(width // count)
        logs.append(xp.log_softmax(_masked(scores, None if rows is None else rows[:, None, None, :], xp), axis=-1))
    return mean_of_rows(divergence(xp.stop_gradient(logs[1]), logs[0], xp=xp), _every_head(rows, logs[0], xp), xp=xp)


def _check_positions(student: Attention, teacher: Attention) -> None:
    shapes = [(one.query.shape[2], one.key.shape[2]) for one in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"Attention over {shapes[0][0]}×{shapes[0][1]} positions of the student and {shapes[1][0]}×{shapes[1][1]} of the "
            "teacher cannot be compared: both must read the same tokens."
        )


def _scores(one: Attention, xp: Namespace) -> Array:
    """`q·kᵀ·scale`, (n, h, l, l)."""
    key, heads = one.key, one.key.shape[1]
    if heads != one.heads:  # grouped queries: each key serves several
        key = xp.concatenate([key[:, i // (one.heads // heads)][:, None] for i in range(one.heads)], axis=1)
    scale = 1 / math.sqrt(one.query.shape[-1]) if one.scale is None else one.scale
    return xp.matmul(one.query, xp.transpose(key)) * scale


def _allowed(student: Attention, teacher: Attention, like: Array, xp: Namespace) -> tuple[list[Array | None], Array | None]:
    """What each model allows, as numbers (n, h or 1, l, l) of `like`'s size, and the positions (n, l) that are not padding."""
    one = xp.full_like(like[:, :1], 1.0)
    found = [None if m.allowed is None else xp.where(m.allowed, one, xp.full_like(one, 0.0)) for m in (student, teacher)]
    known = [mask for mask in found if mask is not None]
    if not known:
        return [None, None], None
    seen = xp.max(xp.max(known[0], axis=1), axis=1) > 0  # keys that some query may look at
    square = student.query.shape[2] == student.key.shape[2]
    full = [mask if mask is not None else known[0] for mask in found]
    return [mask > 0 for mask in full], seen if square else None


def _masked(scores: Array, allowed: Array | None, xp: Namespace) -> Array:
    """Scores, far below all others where they are not allowed."""
    if allowed is None:
        return scores
    lowest = xp.stop_gradient(xp.min(scores, axis=-1, keepdims=True)) - _NOWHERE
    return xp.where(allowed, scores, lowest + xp.full_like(scores, 0.0))


def _grouped(x: Array, groups: int, xp: Namespace) -> Array:
    """(n, h, l, l) -> (n, groups, l, l): the mean over the heads of each group."""
    heads, rows, columns = x.shape[1:]
    if heads == groups:
        return x
    return xp.mean(xp.reshape(x, (-1, groups, heads // groups, rows, columns)), axis=2)


def _mean_log(scores: Array, groups: int, xp: Namespace) -> Array:
    """The logarithms of the attention distributions, averaged over the heads of each group."""
    logs = xp.log_softmax(scores, axis=-1)
    return logs if scores.shape[1] == groups else xp.log(_grouped(xp.exp(logs), groups, xp) + _TINY)


def _every_head(rows: Array | None, like: Array, xp: Namespace) -> Array | None:
    """The real positions (n, l) for each head of `like` (n, h, l, l): (n, h, l)."""
    if rows is None:
        return None
    one = xp.full_like(like[..., 0], 1.0)
    return xp.where(rows[:, None, :], one, xp.full_like(one, 0.0)) > 0


def _all_heads(a: Array, b: Array, like: Array, xp: Namespace) -> Array:
    """1 where both models allow it, in the shape of `like`."""
    one, none = xp.full_like(like, 1.0), xp.full_like(like, 0.0)
    return xp.where(a, one, none) * xp.where(b, one, none)
